"""From the settings of a run to its learner, its tasks and its optimiser."""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import jax
import optax

from jmeta.core import MetaLearner, TaskSource
from jmeta.data import DATA
from jmeta.distances import DISTANCES
from jmeta.errors import ConfigError
from jmeta.learners import LEARNERS
from jmeta.models import MODELS
from jmeta.models.adapters import linen
from jmeta.registry import lookup

_BASE = {
    "ways": 5,
    "shots": 1,
    "queries": 15,
    "steps": 2000,
    "inner_steps": 1,
    "distance": "squared_euclidean",
    "batch_norm": "transductive",
    "outer_rate": 1e-3,
}


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of a run, as its `config.json` holds them; None where a setting has no meaning for the learner."""

    learner: str
    data: str
    model: str
    ways: int
    shots: int
    queries: int
    train_ways: int
    train_queries: int
    steps: int
    tasks: int
    inner_rate: float | None
    inner_steps: int | None
    test_inner_steps: int | None
    distance: str | None
    batch_norm: str | None
    outer_rate: float
    seed: int


def resolve(learner: str, data: str, seed: int, **flags: Any) -> Config:
    """Fills in what was not given: settings of the data, else of the learner, else of the library.

    Args:
        learner: a name in `jmeta.learners.LEARNERS`.
        data: a name in `jmeta.data.DATA`.
        seed: of the run.
        flags: fields of `Config`; None where not given.

    Returns:
        The settings.

    Raises:
        UnknownNameError: a name is in no registry.
        ConfigError: a setting that has no meaning for the learner or the model, or a value that cannot work.

    Example:
        >>> from jmeta.experiment import resolve
        >>> resolve("maml", "sinusoid", 0, shots=5).inner_rate
        0.01
    """
    chosen = lookup(LEARNERS, learner, "learner")
    given = {name: value for name, value in flags.items() if value is not None}
    settings = {**_BASE, **chosen.defaults, **lookup(DATA, data, "data set").defaults, **given}
    network = lookup(MODELS, settings["model"], "model")
    lookup(DISTANCES, settings["distance"], "distance")
    settings = {
        "train_ways": settings["ways"],
        "train_queries": settings["queries"],
        "test_inner_steps": settings["inner_steps"],
        **settings,
    }
    takes = {**inspect.signature(chosen.make).parameters, **inspect.signature(network.make).parameters}
    if "inner_steps" in takes:
        takes["test_inner_steps"] = takes["inner_steps"]
    for name in ("inner_rate", "inner_steps", "test_inner_steps", "distance", "batch_norm"):
        if name not in takes:
            if name in given:
                flag = name.replace("_", "-")
                raise ConfigError(f"--{flag} has no meaning for {learner} on a {settings['model']}; leave it away.")
            settings[name] = None
    for name in ("steps", "tasks", "inner_steps", "test_inner_steps", "outer_rate", "inner_rate"):
        if settings[name] is not None and not settings[name] > 0:
            raise ConfigError(f"--{name.replace('_', '-')} is {settings[name]}; give a positive number.")
    if settings["train_ways"] != settings["ways"] and not chosen.embedding:
        raise ConfigError(f"{learner} has one output for each way, so --train-ways must equal --ways.")
    return Config(learner=learner, data=data, seed=seed, **settings)


def make_learner(config: Config, source: TaskSource, *, inner_steps: int | None = None) -> MetaLearner:
    """The learner of a run, with a model that fits the tasks of `source`.

    Args:
        config: the settings.
        source: tasks; the width of their targets is the number of outputs of a model with a head.
        inner_steps: instead of `config.inner_steps`.

    Returns:
        The learner.

    Raises:
        ConfigError: the learner cannot minimise the loss of the data.
    """
    entry, data = LEARNERS[config.learner], DATA[config.data]
    task = jax.eval_shape(source.sample, jax.random.key(0), source.data)
    outputs = None if entry.embedding else task.support.targets.shape[-1]
    options: dict[str, Any] = {}
    if config.inner_rate is not None:
        options |= {"inner_rate": config.inner_rate, "inner_steps": inner_steps or config.inner_steps}
    if config.distance is not None:
        options["distance"] = DISTANCES[config.distance]
    if "loss" in inspect.signature(entry.make).parameters:
        options["loss"] = data.loss
    elif data.loss is not DATA["glyphs"].loss:
        raise ConfigError(f"{config.learner} classifies, but {config.data} is regression; choose maml, fomaml or anil.")
    network_options = {} if config.batch_norm is None else {"batch_norm": config.batch_norm}
    return entry.make(linen(MODELS[config.model].make(outputs=outputs, **network_options)), **options)


def make_source(config: Config, split: str, **episode: int) -> TaskSource:
    """Tasks of a run: `train` with the training ways and queries, `validation` and `test` with those of the report.

    Args:
        config: the settings.
        split: `"train"`, `"validation"` or `"test"`.
        episode: `ways`, `shots`, `queries` instead of the settings'.

    Returns:
        The tasks.

    Raises:
        DataError: the data cannot give such tasks.
    """
    train = split == "train"
    size = {
        "ways": config.train_ways if train else config.ways,
        "shots": config.shots,
        "queries": config.train_queries if train else config.queries,
    }
    return DATA[config.data].load(split=split, **size | episode)


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """The outer optimiser of a run: Adam at rate β, annealed to 0 by a cosine over the steps of the run."""
    return optax.adam(optax.cosine_decay_schedule(config.outer_rate, config.steps))


def protocol(config: Config) -> Mapping[str, Any]:
    """What a reported number needs beside the episodes."""
    return {
        "learner": config.learner,
        "data": config.data,
        "model": config.model,
        "batch_norm": config.batch_norm,
        "test_inner_steps": config.test_inner_steps,
        "ensemble": 1,
        "train_seed": config.seed,
    }
