"""Where descriptions stop helping: accuracy against shots, `python -m benchmarks.am3`.

One AM3 model for 0 to 10 shots, beside prototypical networks trained on 1 to 10 shots and zero-shot learning, all with
the same network, steps, classes and seed, on characters that none of them saw in training.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import optax
import tyro

import jmeta
from benchmarks.results import RESULTS, Results, machine_line, markdown_table, percent
from jmeta.data.episodes import Size

SHOTS = (0, 1, 2, 3, 5, 10)
LEARNERS: dict[str, tuple[Callable[[jmeta.Model], jmeta.MetaLearner], Size]] = {
    "am3": (jmeta.am3, (0, 10)),
    "prototypical": (jmeta.prototypical, (1, 10)),
    "zero_shot": (jmeta.zero_shot, 0),
}


def curve(name: str, steps: int, ways: int, seed: int) -> dict[str, Any]:
    """Accuracy on 600 unseen 5-way tasks for each number of shots that the learner can have."""
    make, shots = LEARNERS[name]
    learner = make(jmeta.linen(jmeta.Conv4(outputs=None, pooling="max")))
    source = jmeta.glyphs(ways=ways, shots=shots, queries=5, descriptions="attributes")
    rate = optax.cosine_decay_schedule(1e-3, steps)
    begin = time.monotonic()
    fitted = jmeta.fit(jax.random.key(seed), learner, source, optimizer=optax.adam(rate), steps=steps, tasks=1)
    seconds = time.monotonic() - begin
    results = {}
    for k in SHOTS:
        if (k == 0 and name == "prototypical") or (k > 0 and name == "zero_shot"):
            continue
        test = jmeta.glyphs(split="test", shots=k, queries=15, descriptions="attributes")
        results[str(k)] = jmeta.evaluate(jax.random.key(seed + 1), learner, fitted.params, fitted.state, test)
    return {"seconds": seconds, "shots": results}


def markdown(rows: dict[str, Any]) -> str:
    """A line for each number of shots."""
    lines = [
        [str(k), *(percent(row["shots"][str(k)]) if str(k) in row["shots"] else "–" for row in rows.values())]
        for k in SHOTS
    ]
    times = ["training", *(f"{row['seconds']:.0f} s" for row in rows.values())]
    return machine_line("python -m benchmarks.am3") + markdown_table(["shots", *rows], [*lines, times])


def picture(file: Path, rows: dict[str, Any]) -> None:
    """Accuracy against shots, a line a learner."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, 4.0), layout="constrained")
    axes = figure.subplots()
    for (name, row), style in zip(rows.items(), ("o-", "s--", "^"), strict=True):
        shots = [int(k) for k in row["shots"]]
        values = list(row["shots"].values())
        axes.errorbar(
            shots, [v["accuracy"] for v in values], [v["ci95"] for v in values], fmt=style, label=name, capsize=3
        )
    axes.set(xlabel="shots", ylabel="accuracy, 5-way", title="unseen characters, mean and 95 % interval")
    axes.set_xticks(SHOTS)
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=120)


def main(steps: int = 1500, ways: int = 10, seed: int = 0, out: Path = RESULTS / "am3.json") -> None:
    """Trains and tests all learners, prints the table and stores it with a picture.

    Args:
        steps: meta-steps of each learner.
        ways: classes of a training episode.
        seed: of training; tests draw from the next one.
        out: where the numbers go; table and picture go beside them.
    """
    results = Results(out, {"steps": steps, "ways": ways, "seed": seed})
    for name in LEARNERS:
        results.get(name, partial(curve, name, steps, ways, seed))
    rows = {name: results.rows[name] for name in LEARNERS}
    out.with_suffix(".md").write_text(markdown(rows))
    picture(out.with_suffix(".png"), rows)
    print(markdown(rows))


if __name__ == "__main__":
    tyro.cli(main)
