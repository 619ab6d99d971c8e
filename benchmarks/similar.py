"""Characters known by images of similar ones, by attributes, by name: `python -m benchmarks.similar`.

Zero-shot learning on glyphs, none of the test characters seen in training. A similar character is one of training: the
base letter, and another letter with the same marks.
"""

import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import optax
import tyro

import jmeta
from benchmarks.results import RESULTS, Results, machine_line, markdown_table, percent

KINDS = ("attributes", "text", "similar", "similar+attributes")


def zero_shot(descriptions: str, steps: int, seed: int) -> dict[str, Any]:
    """Accuracy on unseen characters of any letters, and of one letter with its marks, after training on the former."""
    learner = jmeta.zero_shot(jmeta.linen(jmeta.Conv4(outputs=None, pooling="max", norm="running", features=32)))
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-3, steps))
    source = jmeta.glyphs(ways=10, shots=0, queries=5, descriptions=descriptions)
    begin = time.monotonic()
    fitted = jmeta.fit(jax.random.key(seed), learner, source, optimizer=optimizer, steps=steps, tasks=1)

    def result(confusable: bool) -> dict[str, Any]:
        test = jmeta.glyphs(split="test", shots=0, queries=15, confusable=confusable, descriptions=descriptions)
        return jmeta.evaluate(jax.random.key(seed + 1), learner, fitted.params, fitted.state, test, episodes=400)

    return {"seconds": time.monotonic() - begin, "glyphs": result(False), "confusable": result(True)}


def markdown(rows: dict[str, Any]) -> str:
    """A line for each kind of descriptions."""
    lines = [
        [kind.replace("+", " and "), percent(row["glyphs"]), percent(row["confusable"]), f"{row['seconds']:.0f}"]
        for kind in KINDS
        if (row := rows.get(kind))
    ]
    header = ["descriptions", "glyphs", "glyphs-confusable", "seconds"]
    return machine_line("python -m benchmarks.similar") + markdown_table(header, lines)


def main(steps: int = 500, seed: int = 0, out: Path = RESULTS / "similar.json") -> None:
    """Trains and tests all cases, prints the table and stores it.

    Args:
        steps: meta-steps of each case, on tasks of ten characters.
        seed: of training; tests draw from the next one.
        out: where the numbers go; the table goes beside them.
    """
    results = Results(out, {"steps": steps, "seed": seed})
    for kind in KINDS:
        results.get(kind, partial(zero_shot, kind, steps, seed))
    out.with_suffix(".md").write_text(markdown(results.rows))
    print(markdown(results.rows))


if __name__ == "__main__":
    tyro.cli(main)
