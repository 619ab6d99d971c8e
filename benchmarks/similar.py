"""Characters known by images of similar ones, by attributes, by name: `python -m benchmarks.similar`.

Zero-shot learning on glyphs, none of the test characters seen in training. A similar character is one of training: the
base letter, and another letter with the same marks. On Omniglot somebody who saw half of the drawings of a character
names the known ones of other alphabets that are most like it; here the nearest in pixels do that, and tasks have the
other half of the drawings.
"""

import time
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import tyro

import jmeta
from benchmarks.results import RESULTS, Results, machine_line, markdown_table, percent

KINDS = ("attributes", "text", "similar", "similar+attributes")
RELATED = (1, 3)  # known characters that describe one of Omniglot


@lru_cache
def drawings(split: str) -> np.ndarray:
    """`[characters, 20, 28, 28, 1]` of Omniglot, without rotations."""
    images = np.asarray(jmeta.omniglot(split=split, rotations=False).data.inputs)  # sorted by character
    return images.reshape(-1, 20, *images.shape[1:])


def omniglot(split: str, related: int, **size: Any) -> jmeta.TaskSource:
    """Tasks of half of the drawings, each character described by drawings of the known ones most like the other half.

    The known characters are those of training, but for itself; six drawings in all.
    """
    known, mine = drawings("train"), drawings(split)
    seen = mine[:, 10:].mean(axis=1).reshape(len(mine), -1) / 255.0
    there = known[:, 10:].mean(axis=1).reshape(len(known), -1) / 255.0
    distance = ((seen[:, None] - there[None]) ** 2).sum(axis=-1)
    if split == "train":
        np.fill_diagonal(distance, np.inf)
    nearest = np.argsort(distance, axis=1)[:, :related]
    images = known[nearest, : 6 // related].reshape(len(mine), -1, *known.shape[2:])
    inputs, labels = mine[:, :10].reshape(-1, *mine.shape[2:]), np.repeat(np.arange(len(mine)), 10)
    return jmeta.from_arrays(inputs, labels, descriptions=jmeta.Similar(images), **size)


def omniglot_zero_shot(related: int, steps: int, seed: int) -> dict[str, Any]:
    """Accuracy on unseen characters of alphabets that are not in training."""
    learner = jmeta.zero_shot(jmeta.linen(jmeta.Conv4(outputs=None, pooling="max", norm="running", features=32)))
    optimizer, begin = optax.adam(optax.cosine_decay_schedule(1e-3, steps)), time.monotonic()
    source = omniglot("train", related, ways=10, shots=0, queries=5)
    fitted = jmeta.fit(jax.random.key(seed), learner, source, optimizer=optimizer, steps=steps, tasks=1)
    seconds, asked = time.monotonic() - begin, (jax.random.key(seed + 1), learner, fitted.params, fitted.state)
    test = partial(omniglot, "test", related, shots=0, queries=9)
    return {"seconds": seconds, **{str(n): jmeta.evaluate(*asked, test(ways=n), episodes=400) for n in (5, 20)}}


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
    drawn = [
        [str(related), percent(row["5"]), percent(row["20"]), f"{row['seconds']:.0f}"]
        for related in RELATED
        if (row := rows.get(f"omniglot, {related}"))
    ]
    told = "\n" + markdown_table(["Omniglot: similar characters", "5-way", "20-way", "seconds"], drawn) if drawn else ""
    return machine_line("python -m benchmarks.similar") + markdown_table(header, lines) + told


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
    for related in RELATED:
        results.get(f"omniglot, {related}", partial(omniglot_zero_shot, related, steps, seed))
    out.with_suffix(".md").write_text(markdown(results.rows))
    print(markdown(results.rows))


if __name__ == "__main__":
    tyro.cli(main)
