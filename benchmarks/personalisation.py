"""Users with hidden preferences, a global model beside MAML: `python -m benchmarks.personalisation`.

A user rates items by y = tanh(w · x) + noise, where the taste w is the sum of a common part and one of the user's own.
Each user is a task of `jmeta.from_groups`; what is compared is how well unseen ratings of unseen users are predicted,
by the number of ratings that were seen of them.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import tyro

import jmeta
from benchmarks.results import RESULTS, Results

FEATURES, RATINGS, USERS, UNSEEN = 8, 60, 400, 100
SEEN = (1, 2, 5, 10, 20, 40)
INNER_RATE, INNER_STEPS = 0.1, 5


def ratings(seed: int, users: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Items `[rows, features]`, ratings `[rows]` and users `[rows]`."""
    random = np.random.default_rng(seed)
    common = np.random.default_rng(0).normal(size=FEATURES)
    taste = common + random.normal(size=(users, FEATURES))
    items = random.normal(size=(users, RATINGS, FEATURES)) / np.sqrt(FEATURES)
    y = np.tanh(2 * np.einsum("urf,uf->ur", items, taste)) + 0.1 * random.normal(size=(users, RATINGS))
    return items.reshape(-1, FEATURES), y.ravel(), np.repeat(np.arange(users), RATINGS)


def learners() -> Mapping[str, tuple[jmeta.MetaLearner, bool]]:
    """Each with whether it is trained on the other users."""
    model = jmeta.linen(jmeta.MLP(outputs=1))
    mse: dict[str, Any] = {"loss": jmeta.mean_squared_error}
    steps: dict[str, Any] = {"inner_rate": INNER_RATE, "inner_steps": INNER_STEPS}
    alone = jmeta.maml(
        model, inner_rate=0.01, inner_steps=200, inner_optimizer=optax.adam, adjoint=jmeta.first_order(), **mse
    )
    return {
        "global model": (jmeta.transfer(model, new_head=False, inner_steps=0, **mse), True),
        "global model, fine-tuned": (
            jmeta.transfer(model, new_head=False, inner_rate=0.02, inner_steps=20, **mse),
            True,
        ),
        "a model for each user": (alone, False),
        "MAML": (jmeta.maml(model, **steps, **mse), True),
    }


def measure(learner: jmeta.MetaLearner, is_trained: bool, steps: int, seed: int) -> dict[str, Any]:
    """The error on unseen users after each number of ratings."""
    train = jmeta.from_groups(*ratings(seed + 2, USERS), shots=10, queries=20)
    fitted = jmeta.fit(
        jax.random.key(seed),
        learner,
        train,
        optimizer=optax.adam(optax.cosine_decay_schedule(1e-3, steps)),
        steps=steps if is_trained else 0,
        tasks=25,
        log_every=500,
    )

    def error(seen: int) -> dict[str, Any]:
        test = jmeta.from_groups(*ratings(1, UNSEEN), shots=seen, queries=20)
        key = jax.random.key(1)
        return jmeta.evaluate(key, learner, fitted.params, fitted.state, test, metric=jmeta.mean_squared_error)

    return {str(seen): error(seen) for seen in SEEN}


def main(steps: int = 5000, seed: int = 0, file: Path = RESULTS / "personalisation.json") -> None:
    """Trains on 400 users, tests on 100 others, and writes table and picture.

    Args:
        steps: meta-steps of 25 users.
        seed: of training; the unseen users are those of seed 1.
        file: where the numbers go; table and picture go beside.
    """
    results = Results(file, {"steps": steps, "seed": seed})
    rows = {
        name: results.get(name, partial(measure, learner, is_trained, steps, seed))
        for name, (learner, is_trained) in learners().items()
    }
    text = markdown(steps, seed, rows)
    file.with_suffix(".md").write_text(text)
    picture(file.with_suffix(".png"), rows)
    print(text)


def markdown(steps: int, seed: int, rows: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """The table: mean squared error by ratings seen."""
    lines = [
        f"`python -m benchmarks.personalisation --steps {steps} --seed {seed}`: mean squared error on 20 unseen "
        "ratings of unseen users, 600 tasks, 95 % interval; the noise alone is 0.01.",
        "",
        "| ratings seen | " + " | ".join(map(str, SEEN)) + " |",
        "| --- |" + " ---: |" * len(SEEN),
    ]
    for name, by_seen in rows.items():
        cells = [f"{row['mean_squared_error']:.3f} ± {row['ci95']:.3f}" for row in by_seen.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def picture(file: Path, rows: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    """Draws the error against the number of ratings seen."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 4.0), layout="constrained")
    axes = figure.subplots()
    for name, by_seen in rows.items():
        errors = [row["mean_squared_error"] for row in by_seen.values()]
        axes.errorbar(SEEN, errors, yerr=[row["ci95"] for row in by_seen.values()], marker="o", label=name)
    axes.set(xscale="log", ylim=(0, None), xlabel="ratings seen of a new user", ylabel="mean squared error")
    axes.set_xticks(SEEN, [str(seen) for seen in SEEN])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    tyro.cli(main)
