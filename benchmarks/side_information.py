"""What descriptions add to few shots, and that they never hurt: `python -m benchmarks.side_information`.

Three data sets: characters with attributes, utterances with the names of their intents, and arrays whose class names
say nothing. Each learner has the same network, steps and seeds, one model for 0 to 5 shots, and is tested on unseen
classes, late fusion also with all descriptions taken away.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import linen as nn

import jmeta
from benchmarks.results import RESULTS, Results, machine_line, markdown_table
from jmeta.data.clinc150 import WIDTH, load_clinc150
from jmeta.data.episodes import Size

SHOTS = (0, 1, 2, 5)
LEARNERS: dict[str, tuple[Callable[[jmeta.Model], jmeta.MetaLearner], Size]] = {
    "late_fusion": (jmeta.late_fusion, (0, 5)),
    "prototypical": (jmeta.prototypical, (1, 5)),
    "zero_shot": (jmeta.zero_shot, 0),
    "am3": (jmeta.am3, (0, 5)),
}
WITHOUT = "late_fusion, no descriptions"
COLUMNS = ("late_fusion", WITHOUT, "prototypical", "zero_shot", "am3")


class Convolutions(nn.Module):
    """Four blocks of convolution, group norm and ReLU: no answer depends on the other queries."""

    features: int = 32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(4):
            x = jmeta.Conv(self.features, (3, 3), strides=2, use_bias=False)(x)
            x = nn.relu(nn.GroupNorm(8)(x))
        return x.reshape(len(x), -1)


class Data(NamedTuple):
    """A data set with its network and how long to train.

    Args:
        module: the embedding.
        source: `(split, **size) -> tasks` with descriptions.
        steps: meta-steps.
        tasks: tasks a step.
    """

    module: nn.Module
    source: Callable[..., jmeta.TaskSource]
    steps: int
    tasks: int


def characters() -> Data:
    """Glyphs, described by attributes made of their Unicode names, which unseen characters share."""
    return Data(Convolutions(), partial(jmeta.glyphs, descriptions="attributes"), 1000, 1)


def utterances() -> Data:
    """CLINC150, described by the names of 50 intents, which hardly teach to read those of others."""
    weights = jmeta.inverse_document_frequency(jmeta.hashed_text(load_clinc150().texts, width=WIDTH))
    return Data(jmeta.TextEncoder(features=128, weights=weights), partial(jmeta.clinc150, descriptions="text"), 400, 1)


def arrays() -> Data:
    """Vectors of 25 classes, and of 25 others to test on, under random names."""
    random = np.random.default_rng(0)
    centres, names = random.normal(size=(50, 32)), random.normal(size=(50, 64))
    labels = np.repeat(np.arange(50), 40)
    inputs = centres[labels] + 0.7 * random.normal(size=(2000, 32))

    def source(split: str = "train", **size: Any) -> jmeta.TaskSource:
        rows = (labels < 25) == (split == "train")
        return jmeta.from_arrays(inputs[rows], labels[rows], descriptions=names[np.unique(labels[rows])], **size)

    return Data(jmeta.MLP(outputs=64, hidden=(128,)), source, 1000, 4)


DATA = {"arrays, random names": arrays, "glyphs, attributes": characters, "CLINC150, names": utterances}


def curve(data: str, name: str, quick: bool, seed: int) -> dict[str, Any]:
    """Accuracy on unseen 5-way tasks for each number of shots that the learner can have."""
    (make, shots), (module, source, steps, tasks) = LEARNERS[name], DATA[data]()
    steps, episodes = (10, 10) if quick else (steps, 600)
    learner = make(jmeta.linen(module))
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-3, steps))
    training = source(split="train", ways=10, shots=shots, queries=5)
    begin = time.monotonic()
    fitted = jmeta.fit(jax.random.key(seed), learner, training, optimizer=optimizer, steps=steps, tasks=tasks)
    row: dict[str, Any] = {"seconds": time.monotonic() - begin, "shots": {}, "without": {}}
    row["worth"] = fitted.history[-1].get("worth")
    test = source(split="test", shots=max(SHOTS), queries=15)
    sample = part_of(test)
    for k in SHOTS:
        if (k == 0 and name == "prototypical") or (k > 0 and name == "zero_shot"):
            continue
        for told in (True, False) if k and name == "late_fusion" else (True,):
            row["shots" if told else "without"][str(k)] = jmeta.evaluate(
                jax.random.key(seed + 1),
                learner,
                fitted.params,
                fitted.state,
                test._replace(data=(test.data, k, told), protocol={**test.protocol, "shots": k}, sample=sample),
                episodes=episodes,
            )
    return row


def part_of(source: jmeta.TaskSource) -> Callable[[jax.Array, Any], jmeta.Task]:
    """The same tasks with the labels of some shots and perhaps the descriptions taken away, in one program."""

    def sample(key: jax.Array, data: tuple[Any, int, bool]) -> jmeta.Task:
        everything, shots, told = data
        task = source.sample(key, everything)
        y = task.support.targets
        kept = jnp.arange(len(y)) % max(SHOTS) < shots
        descriptions = jax.tree.map(lambda x: jnp.where(told, x, jnp.zeros_like(x)), task.support.descriptions)
        return task._replace(
            support=task.support._replace(targets=y * kept[:, None].astype(y.dtype), descriptions=descriptions)
        )

    return sample


def accuracies(rows: dict[str, Any], data: str, column: str, seeds: int) -> dict[str, list[float]]:
    """Of each number of shots, those of the seeds."""
    found = [rows[name_of(data, column.split(",")[0], seed)] for seed in range(seeds)]
    results = [row["without" if column == WITHOUT else "shots"] for row in found]
    return {k: [result[k]["accuracy"] for result in results] for k in results[0]}


def name_of(data: str, learner: str, seed: int) -> str:
    """`glyphs, attributes: late_fusion, seed 0`."""
    return f"{data}: {learner}, seed {seed}"


def markdown(rows: dict[str, Any], seeds: int) -> str:
    """A line for each data set and number of shots."""

    def cell(data: str, column: str, k: int) -> str:
        values = accuracies(rows, data, column, seeds).get(str(k))
        if values is None:
            return "–"
        spread = f" ± {100 * np.std(values, ddof=1):.1f}" if seeds > 1 else ""
        return f"{100 * np.mean(values):.1f}{spread}"

    lines = [[data, str(k), *(cell(data, column, k) for column in COLUMNS)] for data in DATA for k in SHOTS]
    worths = {
        data: np.mean([rows[name_of(data, "late_fusion", seed)]["worth"] for seed in range(seeds)]) for data in DATA
    }
    worth = [f"{value:.2f} ({data})" for data, value in worths.items()]
    text = f"\nWhat late fusion found a description to be worth, in shots: {', '.join(worth)}.\n"
    return (
        machine_line("python -m benchmarks.side_information")
        + markdown_table(["data", "shots", *COLUMNS], lines)
        + text
    )


def picture(file: Path, rows: dict[str, Any], seeds: int) -> None:
    """Accuracy against shots, a panel a data set, a line a learner."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    for axes, data in zip(figure.subplots(1, len(DATA)), DATA, strict=True):
        for column, style in zip(COLUMNS, ("o-", "o:", "s--", "^", "x-."), strict=True):
            found = accuracies(rows, data, column, seeds)
            means, errors = ([measure(values) for values in found.values()] for measure in (np.mean, np.std))
            axes.errorbar([int(k) for k in found], means, errors, fmt=style, label=column, capsize=3)
        axes.set(xlabel="shots", title=data)
        axes.set_xticks(SHOTS)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=120)


def main(quick: bool = False, seeds: int = 3, out: Path = RESULTS / "side_information.json") -> None:
    """Trains and tests all learners on all data sets, prints the table and stores it with a picture.

    Args:
        quick: ten steps and ten episodes, to see that everything runs.
        seeds: of training; tests draw from the next one.
        out: where the numbers go; table and picture go beside them.
    """
    results = Results(out, {"quick": quick})
    for seed in range(seeds):
        for data in DATA:
            for name in LEARNERS:
                results.get(name_of(data, name, seed), partial(curve, data, name, quick, seed))
    out.with_suffix(".md").write_text(markdown(results.rows, seeds))
    picture(out.with_suffix(".png"), results.rows, seeds)
    print(markdown(results.rows, seeds))


if __name__ == "__main__":
    tyro.cli(main)
