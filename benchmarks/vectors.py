"""Learned embeddings of vectors against the nearest mean of the raw features: `python -m benchmarks.vectors`.

65 classes of Gaussian vectors: 25 to train on, 15 to choose the best step by as `jmeta train` does, 25 unseen to test.
In the first data set all features are as noisy, so that nothing beats the nearest mean of the raw ones; in the second
some features are noise, which can be learned.
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
from benchmarks.results import RESULTS, Results, machine_line, markdown_table

LEARNERS = ("prototypical", "matching", "relation", "r2d2", "metaoptnet")
SHOTS = (1, 5)
DATA = ("even noise", "uneven noise")
STEPS, EPISODES = 1000, 600


def tasks(data: str, split: str, shots: int, queries: int) -> jmeta.TaskSource:
    """5-way tasks of vectors that are standardised by the training classes."""
    random = np.random.default_rng(0)
    noise = 0.9 if data == "even noise" else np.exp(random.normal(size=32))
    labels = np.repeat(np.arange(65), 40)
    x = random.normal(size=(65, 32))[labels] + noise * random.normal(size=(len(labels), 32))
    x = (x - x[labels < 25].mean(0)) / x[labels < 25].std(0)
    first, last = {"train": (0, 25), "validation": (25, 40), "test": (40, 65)}[split]
    rows = (first <= labels) & (labels < last)
    return jmeta.from_arrays(x[rows], labels[rows], shots=shots, queries=queries)


def measure(data: str, name: str, shots: int, seed: int) -> dict[str, Any]:
    """What `jmeta.evaluate` says of unseen classes; of the nearest mean without any training."""
    test = tasks(data, "test", shots, 15)
    if name == "nearest mean":
        raw = jmeta.prototypical(jmeta.identity())
        return jmeta.evaluate(jax.random.key(1), raw, {}, {}, test, episodes=EPISODES)
    learner = getattr(jmeta, name)(jmeta.linen(jmeta.MLP(outputs=None)))
    train, validation = tasks(data, "train", shots, 5), tasks(data, "validation", shots, 15)
    best, chosen = -1.0, None

    def keep_the_best(train_state: jmeta.TrainState, metrics: Mapping[str, Any]) -> None:
        nonlocal best, chosen
        θ, state = train_state.params, train_state.state
        result = jmeta.evaluate(jax.random.key(2), learner, θ, state, validation, episodes=200)
        if result["accuracy"] > best:
            best, chosen = result["accuracy"], train_state

    jmeta.fit(
        jax.random.key(seed),
        learner,
        train,
        optimizer=optax.adam(optax.cosine_decay_schedule(1e-3, STEPS)),
        steps=STEPS,
        tasks=4,
        callback=keep_the_best,
    )
    assert chosen is not None
    result = jmeta.evaluate(jax.random.key(1), learner, chosen.params, chosen.state, test, episodes=EPISODES)
    return {**result, "step": int(chosen.step)}


def markdown(rows: dict[str, Any], seeds: int) -> str:
    """A line for each data set and number of shots."""

    def cell(data: str, name: str, shots: int) -> str:
        values = [100 * rows[name_of(data, name, shots, seed)]["accuracy"] for seed in range(seeds)]
        spread = f" ± {np.std(values, ddof=1):.1f}" if seeds > 1 and name != "nearest mean" else ""
        return f"{np.mean(values):.1f}{spread}"

    columns = ("nearest mean", *LEARNERS)
    lines = [[data, str(k), *(cell(data, name, k) for name in columns)] for data in DATA for k in SHOTS]
    return machine_line("python -m benchmarks.vectors") + markdown_table(["data", "shots", *columns], lines)


def name_of(data: str, learner: str, shots: int, seed: int) -> str:
    """`even noise, 1 shots: matching, seed 0`."""
    return f"{data}, {shots} shots: {learner}, seed {seed}"


def main(seeds: int = 3, out: Path = RESULTS / "vectors.json") -> None:
    """Trains and tests what is not there yet, prints the table and stores it.

    Args:
        seeds: of training.
        out: where the numbers go; the table goes beside them.
    """
    results = Results(out, {"steps": STEPS, "episodes": EPISODES})
    for data in DATA:
        for shots in SHOTS:
            for name in ("nearest mean", *LEARNERS):
                for seed in range(seeds):
                    results.get(name_of(data, name, shots, seed), partial(measure, data, name, shots, seed))
    out.with_suffix(".md").write_text(markdown(results.rows, seeds))
    print(markdown(results.rows, seeds))


if __name__ == "__main__":
    tyro.cli(main)
