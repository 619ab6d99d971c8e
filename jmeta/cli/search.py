"""`jmeta search`: a search for an architecture, and what it is worth beside cells drawn at random."""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import linen as nn
from jaxtyping import PyTree
from rich.console import Console
from rich.table import Table

from jmeta.adjoint import Adjoint, exact, first_order
from jmeta.core import Model, TaskSource
from jmeta.devices import mesh_of, share
from jmeta.errors import CheckpointError, ConfigError, lookup
from jmeta.evaluate import evaluate
from jmeta.files import write_whole
from jmeta.learners.prototypical import prototypical
from jmeta.models.adapters import linen
from jmeta.models.networks import Conv4
from jmeta.runs import pictures
from jmeta.runs.checkpoint import latest_step, restore, save
from jmeta.runs.config import check_values
from jmeta.runs.registry import DATA
from jmeta.runs.stopping import LOCK, Signals, only_writer
from jmeta.search.architecture import darts, genotype, genotype_of, random_genotype, search_tasks
from jmeta.search.cells import CellNetwork, Genotype
from jmeta.step import TrainState
from jmeta.train import Metrics, fit, init

ORDERS: Mapping[str, Callable[[], Adjoint]] = {"second order": exact, "first order": first_order}


@dataclasses.dataclass(frozen=True)
class Search:
    """Search for the cell of a network, train it anew, and compare it with cells drawn at random."""

    data: str = "glyphs"
    """Images: one of `jmeta list`."""
    steps: int = 300
    """Meta-steps of a search: one step of the weights and one of the architecture each."""
    retrain_steps: int = 300
    """Meta-steps of each training anew, as a prototypical network."""
    cells: int = 8
    """Random cells to compare with."""
    nodes: int = 2
    """Nodes of a cell."""
    features: int = 8
    """Channels of the first cell."""
    ways: int = 20
    """Classes of an episode, in training and at test."""
    skips: int | None = None
    """How many skip connections the normal cell may have at most; default: any number."""
    tasks: int = 1
    """Episodes of a meta-step, each of which makes a step of the weights; the next meta-step has their mean."""
    devices: int | None = None
    """Over how many devices the episodes of a meta-step are divided, of a CPU as many as it has cores."""
    seed: int = 0
    """The same seed gives the same search, and other random cells."""
    out: Path = Path("runs/search")
    """The folder of the results."""
    resume: bool = False
    """Go on with what the folder has."""

    def run(self, signals: Signals) -> None:
        """Searches and prints."""
        search(self)

    def hint(self) -> str:
        """How to go on after an interruption."""
        return "; go on by the same command with --resume" if (self.out / "result.json").exists() else ""


def search(flags: Search) -> dict[str, Any]:
    """Runs a search, both orders of it, and the comparison; each part is stored as soon as it is there.

    Args:
        flags: what to do.

    Returns:
        What `result.json` holds: the genotypes, and the accuracy, parameters and seconds of every network.

    Raises:
        ConfigError: numbers that are not positive, or data without images.
        CheckpointError: the folder exists, and `resume` was not asked for or its settings were others.
    """
    settings = _settings(flags)
    with only_writer(flags.out):
        return _searched(flags, _begin(flags, settings))


def _searched(flags: Search, results: dict[str, Any]) -> dict[str, Any]:
    for order, adjoint in ORDERS.items():
        if order not in results["genotypes"]:
            found, seconds, curve = _search(flags, order, adjoint())
            results["genotypes"][order] = found
            results["searches"][order] = {"seconds": seconds, "skips": _skips(found), "curve": curve}
            _write(flags, results)
    chosen = {name: genotype_of(cells) for name, cells in results["genotypes"].items()}
    drawn = {f"random {i}": random_genotype(1000 * flags.seed + i, flags.nodes) for i in range(flags.cells)}
    built = {name: _network(flags, cells) for name, cells in {**chosen, **drawn}.items()}
    networks: dict[str, nn.Module] = {**built, "conv4": _conv4(flags, built["second order"])}
    for name, module in networks.items():
        if name not in results["networks"]:
            results["networks"][name] = _train(flags, linen(module))
            _write(flags, results)
    for name, cells in chosen.items():
        pictures.cells(flags.out / f"{name.replace(' ', '_')}.png", cells)
    accuracies = {name: row["accuracy"] for name, row in results["networks"].items()}
    rivals = [value for name, value in accuracies.items() if name.startswith("random")]
    results["rank"] = {name: 1 + sum(value > accuracies[name] for value in rivals) for name in ORDERS}
    results["median_random"] = float(np.median(rivals)) if rivals else math.nan
    _write(flags, results)
    _print(flags, results)
    return results


def _settings(flags: Search) -> dict[str, Any]:
    lookup(DATA, flags.data, "data set")
    check_values({"seed": flags.seed})
    for name in ("steps", "retrain_steps", "nodes", "features", "ways", "tasks"):
        if getattr(flags, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(flags, name)}; give a positive number.")
    if flags.cells < 0:
        raise ConfigError(f"--cells is {flags.cells}; give 0 or more random cells.")
    if flags.devices is not None and flags.devices < 1:
        raise ConfigError(f"--devices is {flags.devices}; give a positive number.")
    share(mesh_of(flags.devices), flags.tasks)  # before any array, as a CPU is divided before JAX starts
    source = _source(flags, "test")
    if jax.eval_shape(source.sample, jax.random.key(0), source.data).query.inputs.ndim != 4:
        raise ConfigError(f"{flags.data} has no images to search cells for; use glyphs or omniglot.")
    stored = dataclasses.asdict(flags)
    return {name: value for name, value in stored.items() if name not in ("out", "resume")}


def _source(flags: Search, split: str) -> TaskSource:
    entry = DATA[flags.data]
    if entry.kind != "classification":
        raise ConfigError(f"{flags.data} has no images to search cells for; use glyphs or omniglot.")
    return entry.load(split=split, ways=flags.ways, shots=1, queries=15 if split == "test" else 4)


def _begin(flags: Search, settings: Mapping[str, Any]) -> dict[str, Any]:
    file = flags.out / "result.json"
    if file.exists():
        if not flags.resume:
            raise CheckpointError(f"{flags.out} exists; add --resume to go on with it, or choose another --out.")
        stored: dict[str, Any] = json.loads(file.read_text())
        stored["settings"] = {"tasks": 1, "devices": None} | stored["settings"]  # which older folders do not have
        if stored["settings"] != settings:
            name = next((n for n in settings if stored["settings"].get(n) != settings[n]), "steps")
            there = stored["settings"].get(name)
            raise CheckpointError(
                f"{flags.out} was searched with other settings, --{name.replace('_', '-')} {there} and not "
                f"{settings.get(name)}; give them again, or another --out."
            )
        return stored
    if any(file.name != LOCK for file in flags.out.iterdir()):
        raise CheckpointError(f"{flags.out} exists and is no search of jmeta; choose another --out.")
    results = {"settings": dict(settings), "genotypes": {}, "searches": {}, "networks": {}}
    _write(flags, results)
    return results


def _write(flags: Search, results: Mapping[str, Any]) -> None:
    write_whole(flags.out / "result.json", json.dumps(results, indent=2) + "\n")


def _skips(found: Genotype) -> int:
    return sum(name == "skip" for name, _ in found.normal)


def _network(flags: Search, cells: Genotype | None) -> CellNetwork:
    return CellNetwork(features=flags.features, nodes=flags.nodes, genotype=cells)


def _search(flags: Search, order: str, adjoint: Adjoint) -> tuple[Genotype, float, list[dict[str, Any]]]:
    """The cell that a search finds, and after every tenth of it which cell that would be."""
    rate = optax.cosine_decay_schedule(0.1, flags.steps)
    weights = optax.chain(
        optax.clip_by_global_norm(5.0), optax.add_decayed_weights(3e-4), optax.sgd(rate, momentum=0.9)
    )
    learner = darts(prototypical(linen(_network(flags, None))), inner_optimizer=weights, adjoint=adjoint)
    source = search_tasks(_source(flags, "train"), _source(flags, "validation"))
    optimizer = optax.adamw(3e-3, b1=0.5, weight_decay=1e-3)
    train_state = init(jax.random.key(flags.seed), learner, optimizer, source)
    folder = flags.out / "checkpoints" / order.replace(" ", "_")
    if latest_step(folder) is not None:
        train_state = restore(folder, train_state)
    curve_file = folder.with_suffix(".json")
    curve: list[dict[str, Any]] = json.loads(curve_file.read_text()) if curve_file.exists() else []
    curve = [row for row in curve if row["step"] <= int(train_state.step)]
    begin = time.monotonic() - (curve[-1]["seconds"] if curve else 0.0)

    def callback(train_state: TrainState, metrics: Metrics) -> None:
        cells = genotype(train_state.params)
        row = {"step": metrics["step"], "loss": metrics["loss"], "seconds": round(time.monotonic() - begin, 1)}
        curve.append({**row, "skips": _skips(cells), "genotype": cells})
        save(folder, train_state)
        write_whole(curve_file, json.dumps(curve) + "\n")
        print(f"{order}, step {metrics['step']}: loss {metrics['loss']:.3f}, {_skips(cells)} skips", flush=True)

    if int(train_state.step) < flags.steps:
        train_state = fit(
            jax.random.key(flags.seed),
            learner,
            source,
            optimizer=optimizer,
            steps=flags.steps,
            tasks=flags.tasks,
            log_every=max(1, flags.steps // 10),
            train_state=train_state,
            callback=callback,
            progress=False,
            mesh=mesh_of(flags.devices),
        ).train_state
    return genotype(train_state.params, skips=flags.skips), round(time.monotonic() - begin, 1), curve


def _train(flags: Search, model: Model) -> dict[str, Any]:
    """A prototypical network trained from the start, and its accuracy on unseen classes."""
    begin, mesh = time.monotonic(), mesh_of(flags.devices)
    learner = prototypical(model)
    fitted = fit(
        jax.random.key(flags.seed),
        learner,
        _source(flags, "train"),
        optimizer=optax.adam(optax.cosine_decay_schedule(3e-3, flags.retrain_steps)),
        steps=flags.retrain_steps,
        tasks=flags.tasks,
        mesh=mesh,
    )
    seconds = time.monotonic() - begin
    test = _source(flags, "test")
    result = evaluate(jax.random.key(1), learner, fitted.params, fitted.state, test, episodes=300, mesh=mesh)
    row = {**result, "parameters": parameters(fitted.params), "seconds": round(seconds, 1)}
    print(f"{row['accuracy']:.1%} after {row['seconds']} s, {row['parameters']} parameters", flush=True)
    return row


def parameters(tree: PyTree) -> int:
    """How many numbers a tree holds."""
    return sum(x.size for x in jax.tree.leaves(tree))


def _conv4(flags: Search, found: CellNetwork) -> Conv4:
    """A Conv4 of as many parameters as the cell that was found, and with its normalisation."""
    source = _source(flags, "test")
    images = jax.eval_shape(lambda: source.sample(jax.random.key(0), source.data)).query.inputs

    def size(module: Any) -> int:
        return parameters(
            jax.eval_shape(lambda key: linen(module).init(key, jax.numpy.zeros(images.shape)), jax.random.key(0))[0]
        )

    wanted = size(found)
    sizes = (Conv4(outputs=None, features=f, norm=found.norm) for f in range(4, 129, 2))
    return min(sizes, key=lambda module: abs(size(module) - wanted))


def _print(flags: Search, results: Mapping[str, Any]) -> None:
    for name, cells in results["genotypes"].items():
        print(f"{name}: {genotype_of(cells)}")
    table = Table("network", f"{flags.ways}-way 1-shot, 95 % interval", "parameters", "training")
    for name, row in sorted(results["networks"].items(), key=lambda item: -item[1]["accuracy"]):
        interval = f"{row['accuracy']:.1%} ± {row['ci95']:.1%}"
        table.add_row(name, interval, f"{row['parameters']:,}", f"{row['seconds']:.0f} s")
    Console().print(table)
    ranks = ", ".join(f"{name} {rank}" for name, rank in results["rank"].items())
    print(f"rank among the {flags.cells} random cells and itself: {ranks}; written to {flags.out}/")
