"""A sweep of the command line: some numbers of a learner at several values, trained at once."""

import dataclasses
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from jmeta.core import MetaLearner
from jmeta.devices import SEEDS, cores_for, mesh_of
from jmeta.errors import ConfigError, lookup
from jmeta.files import write_whole
from jmeta.hyperparameters import Number
from jmeta.runs import settings
from jmeta.runs.config import SETTINGS, Config, check_values
from jmeta.runs.registry import LEARNERS
from jmeta.runs.training import parts_of
from jmeta.sweep import Sweep, sweep


def values_of(options: Sequence[str], learner: str) -> dict[str, list[float]]:
    """The values of each number.

    Args:
        options: `"inner_rate=0.1,0.2"`, of the command line.
        learner: its name in the registry.

    Returns:
        By the name of the argument of the learner.

    Raises:
        ConfigError: no such number, or a value that is none.
    """
    found: dict[str, list[float]] = {}
    for option in options:
        name, _, texts = option.partition("=")
        name = name.replace("-", "_")
        lookup(dict.fromkeys(_numbers(learner)), name, f"number of {learner} to sweep over,")
        try:
            found[name] = [float(text) for text in texts.split(",")]
        except ValueError:
            raise ConfigError(f"--sweep {option} is no list of numbers; write {name}=0.1,0.2,0.4.") from None
        for value in found[name]:
            check_values({name: value})
    return found


def _numbers(learner: str) -> list[str]:
    """The arguments that may be traced: a rate whose default follows from the loss, or a number with a point."""
    parameters = inspect.signature(lookup(LEARNERS, learner, "learner").make).parameters
    rates = {name for name, setting in SETTINGS.items() if setting.of == "learner" and setting.type is float}
    return [name for name, p in parameters.items() if name in rates or isinstance(p.default, float)]


def sweep_of(config: Config, values: Mapping[str, Sequence[float]], seeds: Sequence[int]) -> Sweep:
    """Trains each combination of values with each seed and evaluates it on validation tasks.

    Args:
        config: the settings of all; its devices are those over which values and seeds are divided, by default one a
            core of a CPU.
        values: of `values_of`.
        seeds: or none for that of the settings.

    Returns:
        The rows.
    """
    runs = max(1, len(seeds))
    for column in values.values():
        runs *= len(column)
    devices = cores_for(runs) if config.devices is None else config.devices
    mesh = mesh_of(devices, SEEDS)  # first of all, as a CPU is divided before JAX starts
    parts = parts_of(dataclasses.replace(config, devices=None))

    def maker(split: str) -> Callable[..., MetaLearner]:
        def make(**instead: Number) -> MetaLearner:
            source = parts.source if split == "train" else parts.validation
            return settings.make_learner(config, source, split, **instead)

        return make

    keys = jnp.stack([jax.random.key(seed) for seed in seeds]) if seeds else jax.random.key(config.seed)
    return sweep(
        maker("train"),
        values,
        keys,
        parts.source,
        optimizer=settings.make_optimizer(config),
        steps=config.steps,
        tasks=config.tasks,
        log_every=max(1, config.steps // 100),
        evaluation_source=parts.validation,
        metric=config.metric,
        make_tester=maker("validation"),
        mesh=mesh,
    )


def write(folder: Path, config: Config, swept: Sweep, as_json: Callable[..., str]) -> None:
    """Writes `sweep.md`, `sweep.json` and `sweep.png` into a folder.

    Args:
        folder: which is there.
        config: the settings of all.
        swept: of `sweep_of`.
        as_json: how a dict is written.
    """
    rows = [{"values": row.values, "last": row.last, "validation": row.evaluation} for row in swept.rows]
    about = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    write_whole(
        folder / "sweep.json", as_json({"metric": swept.metric, "config": about, "rows": rows}, indent=2) + "\n"
    )
    write_whole(folder / "sweep.md", swept.table() + "\n")
    swept.plot(folder / "sweep.png")
