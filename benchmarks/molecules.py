"""Few-shot drug discovery, meta-learning beside two simple rivals: `python -m benchmarks.molecules`.

Every assay of Tox21 and of ToxCast is a task: which molecules are active, from 16 labelled ones. Assays of training,
validation and test are disjoint; molecules are not, as they were all measured in many assays.
"""

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jaxtyping import Array, Float

import jmeta
from benchmarks.results import RESULTS, Results

FOLDER = Path(os.environ.get("MOLECULES_DIR", "."))
SHOTS, QUERIES, EPISODES = 16, 64, 600
TEST_SHARE = {"tox21": 0.25, "toxcast": 0.25}
HIDDEN = (64, 64)

Sources = tuple[jmeta.TaskSource, jmeta.TaskSource]


def sources(folder: Path, name: str, balanced: bool, seed: int) -> Sources:
    """Training and test tasks, of assays divided at random."""
    file = folder / f"{name}.npz"
    if not file.exists():
        raise SystemExit(f"{file} is missing; set MOLECULES_DIR to the folder of tox21.npz and toxcast.npz.")
    data = np.load(file)
    features = np.unpackbits(data["fp2048"], axis=-1)
    order = np.random.default_rng(seed).permutation(data["labels"].shape[1])
    first = round(TEST_SHARE[name] * len(order))
    options: dict[str, Any] = {"shots": SHOTS, "queries": QUERIES, "balanced": balanced}
    train, test = (
        jmeta.from_assays(features, data["labels"][:, columns], **options) for columns in (order[first:], order[:first])
    )
    return train, test


def tanimoto() -> jmeta.MetaLearner:
    """Nearest neighbours: how similar is a molecule to its nearest active, less to its nearest inactive."""

    def similarity(x: Float[Array, "n bits"], y: Float[Array, "m bits"]) -> Float[Array, "n m"]:
        common = x @ y.T
        return common / (x.sum(axis=1, keepdims=True) + y.sum(axis=1, keepdims=True).T - common + 1e-6)

    def predict(key: Array, adapted: jmeta.Adapted, inputs: Array) -> Array:
        support = adapted.params
        to_support = similarity(inputs, support.inputs)
        return jnp.stack([(to_support * support.targets[:, c][None]).max(axis=1) for c in range(2)], axis=1)

    return jmeta.episodic(
        lambda key, task: ({}, {}),
        lambda key, params, state, support: jmeta.Adapted(support, state, {}),
        predict,
        jmeta.softmax_cross_entropy,
    )


def logistic_regression() -> jmeta.MetaLearner:
    """A model of each assay alone, on the fingerprints as they are."""
    fingerprints = jmeta.Model(lambda key, x: ({}, {}), lambda key, params, state, x, *, train: (x, state))
    return jmeta.linear_probe(fingerprints, penalty=0.01)


def maml() -> jmeta.MetaLearner:
    """An MLP on fingerprints."""
    return jmeta.maml(jmeta.linen(jmeta.MLP(outputs=2, hidden=HIDDEN)), inner_rate=0.1, inner_steps=3)


def prototypical() -> jmeta.MetaLearner:
    """An MLP on fingerprints."""
    return jmeta.prototypical(jmeta.linen(jmeta.MLP(outputs=None, hidden=HIDDEN)))


# A rival has no parameters to meta-train.
TRAINED: Mapping[str, Callable[[], jmeta.MetaLearner]] = {"MAML": maml, "ProtoNet": prototypical}
RIVALS: Mapping[str, Callable[[], jmeta.MetaLearner]] = {
    "logistic regression per assay": logistic_regression,
    "Tanimoto nearest neighbours": tanimoto,
}


def measure(name: str, train: jmeta.TaskSource, test: jmeta.TaskSource, steps: int, seed: int) -> dict[str, Any]:
    """ΔAUPRC of one learner over tasks of unseen assays."""
    learner = {**TRAINED, **RIVALS}[name]()
    params: Any = {"body": {}}
    state: Any = {}
    if name in TRAINED:
        optimizer = optax.adam(optax.cosine_decay_schedule(1e-3, steps))
        fitted = jmeta.fit(jax.random.key(seed), learner, train, optimizer=optimizer, steps=steps, tasks=8)
        params, state = fitted.params, fitted.state
    return jmeta.evaluate(
        jax.random.key(seed + 1), learner, params, state, test, episodes=EPISODES, metric=jmeta.average_precision_gain
    )


def main(
    folder: Path = FOLDER,
    data: tuple[str, ...] = ("tox21", "toxcast"),
    steps: int = 500,
    seeds: tuple[int, ...] = (0, 1, 2),
    file: Path = RESULTS / "molecules.json",
) -> None:
    """Meta-trains on some assays, tests on the others, and writes the table.

    Args:
        folder: of `tox21.npz` and `toxcast.npz`; default `$MOLECULES_DIR`.
        data: which of them.
        steps: meta-steps of 8 tasks.
        seeds: of the division of the assays, of training and of the test tasks.
        file: where the numbers go; the table goes beside.
    """
    results, rows = Results(file, {"steps": steps}), {}
    for balanced in (False, True):
        for source in data:
            for seed in seeds:
                train, test = sources(folder, source, balanced, seed)
                for name in (*TRAINED, *RIVALS):
                    row = f"{source}, {'balanced' if balanced else 'stratified'}, {name}, seed {seed}"
                    rows[row] = results.get(row, partial(measure, name, train, test, steps, seed))
                jax.clear_caches()
    text = markdown(steps, seeds, rows)
    file.with_suffix(".md").write_text(text)
    print(text)


def markdown(steps: int, seeds: tuple[int, ...], rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The table: the mean over seeds, with the interval over all their tasks and the range over seeds."""
    columns = list(dict.fromkeys(tuple(row.split(", ")[:2]) for row in rows))
    lines = [
        f"`python -m benchmarks.molecules --steps {steps} --seeds {' '.join(map(str, seeds))}`: "
        f"ΔAUPRC of {SHOTS} labelled molecules, {QUERIES} queries, {EPISODES} tasks of unseen assays for each "
        f"of {len(seeds)} divisions of the assays; ± is the 95 % interval over tasks, in brackets the range over them.",
        "",
        "| | " + " | ".join(", ".join(column) for column in columns) + " |",
        "| --- |" + " ---: |" * len(columns),
    ]
    for name in (*TRAINED, *RIVALS):
        cells = []
        for data, how in columns:
            found = [rows[key] for seed in seeds if (key := f"{data}, {how}, {name}, seed {seed}") in rows]
            values = [row["average_precision_gain"] for row in found]
            half = float(np.sqrt(np.sum(np.square([row["ci95"] for row in found])))) / max(len(found), 1)
            cells.append(f"{np.mean(values):.3f} ± {half:.3f} [{min(values):.3f}, {max(values):.3f}]")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    tyro.cli(main)
