"""From the settings of a run to its learner, its tasks and its optimiser."""

import contextlib
import dataclasses
import inspect
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Key

from jmeta.core import MetaLearner, Task, TaskSource
from jmeta.data.own import is_path
from jmeta.distances import DISTANCES
from jmeta.errors import ConfigError, JmetaError, ModelError, lookup
from jmeta.models.networks import Norm
from jmeta.runs.entries import LOSSES, METRICS, DataEntry
from jmeta.runs.own import data_entry, model_entry
from jmeta.runs.ranges import check_values
from jmeta.runs.registry import DATA, LEARNERS
from jmeta.step import TrainState
from jmeta.train import init

_BASE: Mapping[str, Any] = {
    "seed": 0,
    "ways": 5,
    "shots": 1,
    "queries": 15,
    "steps": 2000,
    "inner_steps": 1,
    "distance": "squared_euclidean",
    "dtype": "float32",
    "outer_rate": 1e-3,
    "inner_optimizer": None,
    "batch": 64,
}

_REGRESSION: Mapping[str, Any] = {"inner_rate": 0.01}  # as `jmeta.inner.rate_for`: a squared error has no bound

INNER_OPTIMIZERS: Mapping[str, Callable[[float], optax.GradientTransformation]] = {
    "sgd": optax.sgd,
    "momentum": partial(optax.sgd, momentum=0.9),
    "adam": partial(optax.adam, eps_root=1e-8),  # is differentiated through, and √v has no derivative at 0
    "rmsprop": optax.rmsprop,
}
VERSION = 2  # of the settings that a run folder holds; what changes a number of an old run changes this one
OWN = ("split_seed", "size", "channels", "group", "target")
_MAY_BE_0 = ("shots", "train_shots", "inner_steps", "test_inner_steps")  # with descriptions; of a policy that acts
DTYPES = ("float32", "bfloat16")  # of the computation; parameters are float32

# a setting has a meaning where learner, model or data take an argument of this name
_MEANING = {
    "ways": "ways",
    "shots": "shots",
    "train_ways": "ways",
    "train_shots": "shots",
    "inner_rate": "inner_rate",
    "inner_steps": "inner_steps",
    "test_inner_steps": "inner_steps",
    "inner_optimizer": "inner_optimizer",
    "distance": "distance",
    "norm": "norm",
    "dtype": "dtype",
}


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of a run, as its `config.json` holds them; None where one has no meaning for the learner or data."""

    learner: str
    data: str
    model: str
    ways: int | None
    shots: int | None
    queries: int
    train_ways: int | None
    train_queries: int
    steps: int
    tasks: int
    inner_rate: float | None
    inner_steps: int | None
    test_inner_steps: int | None
    distance: str | None
    norm: str | None
    outer_rate: float
    seed: int
    dtype: str | None = None  # these are not in the config.json of older runs
    inner_optimizer: str | None = None
    batch: int | None = None
    train_shots: int | tuple[int, int] | None = None
    descriptions: str | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    network: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    own: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of data of one's own, see `read_own`
    patience: int | None = None
    devices: int | None = None
    version: int = VERSION

    @property
    def kind(self) -> str:
        """Of the tasks: classification, regression or environment."""
        return str(self.own["kind"]) if self.own else DATA[self.data].kind

    @property
    def metric(self) -> Callable[[Any, Any], Array]:
        """What is reported."""
        return METRICS[self.kind]

    def written(self, value: float, half: float | None = None) -> str:
        """A metric as it is read, accuracies in per cent, with half of its interval if that is given."""
        text = f"{100 * value:.1f} %" if self.kind == "classification" else f"{value:.3f}"
        return text if half is None else f"{text} ± {self.written(half)}"

    @property
    def entry(self) -> DataEntry:
        """The data, in the registry or of one's own."""
        return data_entry(self.data, _asked(self.own))


def resolve(learner: str | None = None, data: str | None = None, **flags: Any) -> Config:
    """Fills in what was not given: settings of the data, else of the learner, else of the library.

    Args:
        learner: a name in `jmeta.learners.LEARNERS`; default maml.
        data: a name in `jmeta.data.DATA`; default glyphs.
        flags: other fields of `Config`; None where not given.

    Returns:
        The settings.

    Raises:
        UnknownNameError: a name is in no registry.
        ConfigError: a setting that has no meaning for the learner, the model or the data, or a value that cannot work.

    Example:
        >>> from jmeta.runs.settings import resolve
        >>> resolve("maml", "sinusoid", shots=5).inner_rate
        0.01
    """
    learner, data = learner or "maml", data or "glyphs"
    given = {name: value for name, value in flags.items() if value is not None}
    check_values({"learner": learner, "data": data, **given})
    own = {**_asked(given.pop("own", {})), **{name: given.pop(name) for name in OWN if name in given}}
    if is_path(data) and data not in DATA:
        data = str(Path(data).expanduser().absolute())
    chosen, source = lookup(LEARNERS, learner, "learner"), data_entry(data, own)
    if given.pop("version", VERSION) > VERSION:
        raise ConfigError("the settings are of a newer version of jmeta; install that one.")
    layers: tuple[Mapping[str, Any], ...] = (
        _BASE,
        chosen.defaults,
        _REGRESSION if source.kind == "regression" else {},
        source.defaults,
        chosen.regression if source.kind == "regression" else {},
        given,
    )
    settings: dict[str, Any] = {name: value for layer in layers for name, value in layer.items()}
    network = model_entry(settings["model"])
    settings["own"] = {**own, "kind": source.kind, "division": source.division} if source.division else {}
    for name, owner, make in (("options", learner, chosen.make), ("network", settings["model"], network.make)):
        settings[name] = _options(name, owner, make, *(layer.get(name, {}) for layer in layers))
    needed = {name: value for name, value in chosen.network.items() if name in _parameters(network.make)}
    settings["network"] = needed | settings["network"]
    lookup(DISTANCES, settings["distance"], "distance")
    if settings.setdefault("norm", None) is None:
        settings["norm"] = _parameters(network.make).get("norm")
    if settings["norm"] is not None:
        lookup(dict.fromkeys(get_args(Norm)), settings["norm"], "normalisation")
    lookup(dict.fromkeys(DTYPES), settings["dtype"], "dtype")
    if settings["inner_optimizer"] is not None:
        lookup(INNER_OPTIMIZERS, settings["inner_optimizer"], "inner optimiser")
    for name in ("train_ways", "train_shots", "train_queries", "test_inner_steps"):
        settings.setdefault(name, settings[name.partition("_")[2]])
    if isinstance(settings["train_shots"], list | tuple):  # a list as config.json has it
        least, most = settings["train_shots"]
        settings["train_shots"] = most if least == most else (least, most)
    _fit_to(source, settings, given)
    takes = {name for make in (chosen.make, network.make, source.load) for name in inspect.signature(make).parameters}
    for name, as_name in _MEANING.items():
        if as_name not in takes:
            if name in given:
                raise ConfigError(
                    f"{_flag(name)} has no meaning for {learner} with {settings['model']} on {data}; leave it away."
                )
            settings[name] = None
    if not chosen.pretrains or "batch" not in takes:
        if "batch" in given:
            raise ConfigError(f"--batch has no meaning for {learner} on {data}; leave it away.")
        settings["batch"] = None
    acting = source.kind == "environment"
    if chosen.acts != acting:
        fits = [name for name, other in LEARNERS.items() if other.acts == acting]
        kind = "an environment" if acting else "no environment"
        raise ConfigError(f"{data} is {kind}, which {learner} cannot learn from; use {' or '.join(fits)}.")
    settings["descriptions"] = _descriptions(learner, source, data, settings.get("descriptions"))
    none = {"shots", "train_shots"} if settings["descriptions"] is not None else set()
    check_values(settings, least={name: 0 if name in none or chosen.acts else 1 for name in _MAY_BE_0})
    if settings["train_ways"] != settings["ways"] and not chosen.embedding:
        raise ConfigError(f"{learner} has one output for each way, so --train-ways must equal --ways.")
    return Config(learner=learner, data=data, **settings)


def _asked(own: Mapping[str, Any]) -> dict[str, Any]:
    """What `read_own` takes, of what a run keeps of its data."""
    return {name: value for name, value in own.items() if name != "kind"}


def _fit_to(source: DataEntry, settings: dict[str, Any], given: Mapping[str, Any]) -> None:
    """Ways and queries that nobody asked for are no more than data of one's own has."""
    for prefix, splits in (("train_", ("train",)), ("", ("validation", "test"))):
        if not source.division:
            return
        classes = min(len(source.division[split]) for split in splits)
        least = min(source.rows[name] for split in splits for name in source.division[split])
        shots = settings[f"{prefix}shots"]
        most = {"ways": classes, "queries": max(1, least - (shots if isinstance(shots, int) else max(shots)))}
        if (given.get(f"{prefix}ways") or 0) > classes:
            parts = ", ".join(f"{len(names)} for {split}" for split, names in source.division.items())
            raise ConfigError(
                f"{_flag(prefix + 'ways')} is {given[f'{prefix}ways']}, and of the classes there are {parts}; "
                f"give at most {classes}, or data of more classes."
            )
        for name, value in most.items():
            if prefix + name not in given and (settings[prefix + name] or 0) > value:
                settings[prefix + name] = value


def _descriptions(learner: str, source: DataEntry, data: str, given: str | None) -> str | None:
    """Which descriptions of the data the learner reads."""
    kinds, entry = source.descriptions, LEARNERS[learner]
    if not entry.descriptions and given is None:
        return None
    if not entry.descriptions and "descriptions" not in inspect.signature(entry.make).parameters:
        raise ConfigError(f"--descriptions has no meaning for {learner}; leave it away.")
    if not kinds:
        others = [name for name, other in DATA.items() if other.descriptions]
        raise ConfigError(f"{learner} reads descriptions of classes and {data} has none; use {' or '.join(others)}.")
    if given is not None:
        lookup(dict.fromkeys(kinds), given, f"kind of descriptions of {data},")
    return given or kinds[0]


def _parameters(make: Callable[..., Any]) -> dict[str, Any]:
    """The parameters of a learner or network that are plain values, with their defaults."""
    return {
        name: parameter.default
        for name, parameter in inspect.signature(make).parameters.items()
        if name != "name" and isinstance(parameter.default, bool | int | float | str | None)
    }


def _options(flag: str, owner: str, make: Callable[..., Any], *layers: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a learner or network; a text, as the command line has it, becomes a value of the default's type."""
    taken = {field.name for field in dataclasses.fields(Config)} | {"parent"}
    known = {name: default for name, default in _parameters(make).items() if name not in taken}
    options: dict[str, Any] = {name: value for layer in layers for name, value in layer.items()}
    if options and not known:
        raise ConfigError(f"{owner} has no options; leave --{flag} away.")
    for name, value in options.items():
        default = lookup(known, name, f"option of {owner}")
        if isinstance(value, str) and not isinstance(default, str):
            with contextlib.suppress(ValueError):
                options[name] = json.loads(value.lower())
        is_number = isinstance(options[name], int | float) and not isinstance(options[name], bool)
        wanted = bool if isinstance(default, bool) else int | float if isinstance(default, int | float) else object
        if not isinstance(options[name], wanted) or (wanted == int | float and not is_number):
            raise ConfigError(f"--{flag} {name}={value} is no {type(default).__name__}; the default is {default}.")
    return options


def make_learner(config: Config, source: TaskSource | Task, *, inner_steps: int | None = None) -> MetaLearner:
    """The learner of a run, with a model that fits the tasks of `source`.

    Args:
        config: the settings.
        source: tasks, or the shapes of one; the width of their targets is the number of outputs of a model with a head.
        inner_steps: instead of `config.inner_steps`.

    Returns:
        The learner.

    Raises:
        ConfigError: the learner cannot minimise the loss of the data, or has no inner steps.
    """
    entry, network = LEARNERS[config.learner], model_entry(config.model)
    task = shapes_of(source)
    if entry.acts:
        head = {"actions": task.support.actions}
    else:
        head = {"outputs": None if entry.embedding else task.query.targets.shape[-1]}
        if "outputs" not in inspect.signature(network.make).parameters:
            if not entry.embedding:
                raise ConfigError(
                    f"--model {config.model} takes no argument `outputs`, the width of its last layer, which "
                    f"{config.learner} needs; add it, or take a learner that compares embeddings, as prototypical."
                )
            head = {}
    options = dict(config.options)
    if config.inner_rate is not None:
        options["inner_rate"] = config.inner_rate
    if config.inner_steps is not None:
        options["inner_steps"] = config.inner_steps if inner_steps is None else inner_steps
    elif inner_steps is not None:
        raise ConfigError(f"--inner-steps has no meaning for {config.learner}; leave it away.")
    if config.distance is not None:
        options["distance"] = DISTANCES[config.distance]
    if config.inner_optimizer is not None:
        options["inner_optimizer"] = INNER_OPTIMIZERS[config.inner_optimizer]
    if config.descriptions is not None and not entry.descriptions:
        options["descriptions"] = True
    if "loss" in inspect.signature(entry.make).parameters:
        options["loss"] = LOSSES[config.kind]
    elif config.kind == "regression":
        regress = [name for name, other in LEARNERS.items() if "loss" in inspect.signature(other.make).parameters]
        raise ConfigError(f"{config.learner} classifies, but {config.data} is regression; use {' or '.join(regress)}.")
    given = {"norm": config.norm, "dtype": config.dtype}
    network_options = {name: value for name, value in given.items() if value is not None}
    return entry.make(network.adapter(network.make(**head, **network_options, **config.network)), **options)


def shapes_of(source: TaskSource | Task) -> Task:
    """A task of shapes: that of a source, or one that was stored."""
    if isinstance(source, Task):
        return source
    task: Task = jax.eval_shape(source.sample, jax.random.key(0), source.data)
    return task


def make_source(config: Config, split: str, **episode: Any) -> TaskSource:
    """Tasks of a run: `train` with the training ways and queries, `validation` and `test` with those of the report.

    Args:
        config: the settings.
        split: `"train"`, `"validation"` or `"test"`.
        episode: `ways`, `shots`, `queries` instead of the settings'.

    Returns:
        The tasks.

    Raises:
        ConfigError: other ways than the learner was trained for, or ways of a regression.
        DataError: the data cannot give such tasks.
    """
    ways = episode.get("ways", config.ways)
    for name in episode:
        lookup(dict.fromkeys(("ways", "shots", "queries")), name, "size of an episode")
        if getattr(config, name) is None:
            raise ConfigError(f"{_flag(name)} has no meaning for {config.data}; leave it away.")
    if ways != config.ways and not LEARNERS[config.learner].embedding:
        raise ConfigError(
            f"{config.learner} has one output for each of its {config.ways} ways, so it cannot take {ways}; leave "
            "--ways away, or train a prototypical run, which takes any number."
        )
    train = split == "train"
    size = {
        "ways": config.train_ways if train else config.ways,
        "shots": config.train_shots if train else config.shots,
        "queries": config.train_queries if train else config.queries,
        "batch": config.batch if train else None,
        "descriptions": config.descriptions,
        **episode,
    }
    return config.entry.load(split=split, **{name: value for name, value in size.items() if value is not None})


def begin(config: Config, learner: MetaLearner, source: TaskSource) -> TrainState:
    """The `TrainState` before the first meta-step of a run.

    Args:
        config: the settings.
        learner: as `make_learner` gives.
        source: the training tasks.

    Returns:
        θ, state and optimiser state.

    Raises:
        ModelError: the model does not fit the tasks.
    """
    return _fitting(config, lambda: init(jax.random.key(config.seed), learner, make_optimizer(config), source))


def _fitting(config: Config, make: Callable[[], TrainState]) -> TrainState:
    try:
        return make()
    except JmetaError:
        raise
    except Exception as error:  # a network raises whatever it meets in inputs of another shape
        raise ModelError(
            f"{config.model} cannot take the inputs of {config.data}; leave --model away, or choose another."
        ) from error


def like(config: Config, learner: MetaLearner, source: TaskSource | Task) -> TrainState:
    """The shapes of a run's `TrainState`, to restore a checkpoint into, from those of one task."""

    def start(key: Key[Array, ""], task: Task) -> TrainState:
        params, state = learner.init(key, task)
        return TrainState(key, jnp.zeros((), jnp.int32), params, state, make_optimizer(config).init(params))

    return _fitting(config, lambda: jax.eval_shape(start, jax.random.key(0), shapes_of(source)))


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """The outer optimiser of a run, the learner's own: as a rule Adam at rate β, annealed to 0 by a cosine."""
    return LEARNERS[config.learner].optimizer(config.outer_rate, config.steps)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def protocol(config: Config) -> Mapping[str, Any]:
    """What a reported number needs beside the episodes."""
    return {
        "learner": config.learner,
        "data": config.data,
        "model": config.model,
        "norm": config.norm,
        "dtype": config.dtype,
        "test_inner_steps": config.test_inner_steps,
        "descriptions": config.descriptions,
        "split_seed": config.own.get("split_seed", 0) if config.own else None,
        "options": dict(config.options),
        "network": dict(config.network),
        "ensemble": 1,
        "train_seed": config.seed,
    }
