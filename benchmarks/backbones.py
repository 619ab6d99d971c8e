"""Prototypical networks with ResNet-12 beside Conv4 after as many meta-steps: `python -m benchmarks.backbones`.

Omniglot on 32 x 32 pixels; both networks have batch norm, as in the papers, start from nothing and see the same tasks.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import tyro

import jmeta
from benchmarks.results import RESULTS, Results, machine_line, markdown_table, percent

NETWORKS: dict[str, Callable[[], Any]] = {
    "conv4": lambda: jmeta.Conv4(outputs=None, pooling="max", norm="running"),
    "resnet12": lambda: jmeta.ResNet12(outputs=None, norm="running", dropout=0.0),
}


def source(split: str, **size: Any) -> jmeta.TaskSource:
    """Tasks of characters with a margin of two pixels."""
    found = jmeta.omniglot(split=split)
    images = np.pad(np.asarray(found.data.inputs), ((0, 0), (2, 2), (2, 2), (0, 0)))
    return jmeta.from_arrays(images, np.arange(len(images)) // 20, **size)  # sorted by character


def measured(name: str, steps: int, episodes: int, seed: int) -> dict[str, Any]:
    """Accuracy on test characters, and seconds of training."""
    model = jmeta.linen(NETWORKS[name]())
    learner, begin = jmeta.prototypical(model), time.monotonic()
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-3, steps))
    tasks = source("train", ways=10, shots=1, queries=2)
    fitted = jmeta.fit(jax.random.key(seed), learner, tasks, optimizer=optimizer, steps=steps, tasks=1)
    seconds = time.monotonic() - begin
    test = source("test", ways=5, shots=1, queries=5)
    found = jmeta.evaluate(jax.random.key(seed + 1), learner, fitted.params, fitted.state, test, episodes=episodes)
    numbers = sum(leaf.size for leaf in jax.tree.leaves(fitted.params))
    return {**found, "seconds": seconds, "parameters": numbers}


def markdown(rows: dict[str, Any], seeds: int) -> str:
    """A line for each network and seed."""
    lines = [
        [name, f"{row['parameters']:,}", str(seed), percent(row), f"{row['seconds']:.0f}"]
        for name in NETWORKS
        for seed in range(seeds)
        for row in [rows[f"{name}, seed {seed}"]]
    ]
    header = ["network", "parameters", "seed", "5-way 1-shot", "seconds of training"]
    return machine_line("python -m benchmarks.backbones") + markdown_table(header, lines)


def main(steps: int = 400, episodes: int = 200, seeds: int = 1, out: Path = RESULTS / "backbones.json") -> None:
    """Trains and tests both, prints the table and stores it.

    Args:
        steps: meta-steps, of one 10-way task each.
        episodes: test tasks.
        seeds: of the trainings; tests draw from the next one.
        out: where the numbers go; the table goes beside them.
    """
    results = Results(out, {"steps": steps, "episodes": episodes})
    for seed in range(seeds):
        for name in NETWORKS:
            results.get(f"{name}, seed {seed}", partial(measured, name, steps, episodes, seed))
    out.with_suffix(".md").write_text(markdown(results.rows, seeds))
    print(markdown(results.rows, seeds))


if __name__ == "__main__":
    tyro.cli(main)
