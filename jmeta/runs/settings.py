"""From the settings of a run to its learner, its tasks and its optimiser."""

import contextlib
import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Key

from jmeta.core import MetaLearner, Task, TaskSource
from jmeta.data.own import is_path
from jmeta.errors import ConfigError, JmetaError, ModelError, lookup, reason_of
from jmeta.hyperparameters import Number
from jmeta.runs.config import OWN, SETTINGS, VERSION, Config, Setting, check_choices, check_values, flag
from jmeta.runs.entries import LOSSES, DataEntry, LearnerEntry
from jmeta.runs.own import asked, data_entry, found_out, model_entry
from jmeta.runs.registry import DATA, LEARNERS
from jmeta.step import TrainState
from jmeta.train import init

_FROM_1 = ("shots", "inner_steps")  # but of what reads descriptions, or acts


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
    given = {name: value for name, value in {"learner": learner, "data": data, **flags}.items() if value is not None}
    check_values(given)
    if given.pop("version", VERSION) > VERSION:
        raise ConfigError("the settings are of a newer version of jmeta; install that one.")
    own = {**asked(given.pop("own", {})), **{name: given.pop(name) for name in OWN if name in given}}
    defaults = {name: setting.default for name, setting in SETTINGS.items() if setting.default is not None}
    learner, data = given.get("learner", defaults["learner"]), given.get("data", defaults["data"])
    if is_path(data) and data not in DATA:
        data = given["data"] = str(Path(data).expanduser().absolute())
    if given.get("from_"):
        given["from_"] = str(Path(given["from_"]).expanduser().absolute())
    chosen, source = lookup(LEARNERS, learner, "learner"), data_entry(data, own)
    _check_support(learner, data, source)
    layers: list[Mapping[str, Any]] = [defaults, chosen.defaults, source.defaults, given]
    if source.kind == "regression":
        of_settings = {name: setting.regression for name, setting in SETTINGS.items() if setting.regression}
        layers = [defaults, chosen.defaults, of_settings, source.defaults, chosen.regression, given]
    settings = {**dict.fromkeys(SETTINGS), **{name: value for layer in layers for name, value in layer.items()}}

    network = model_entry(settings["model"])
    settings["own"] = {**own, **found_out(source)} if source.division else {}
    for name, owner, make in (("options", learner, chosen.make), ("network", settings["model"], network.make)):
        settings[name] = options_of(name, owner, make, *(layer.get(name, {}) for layer in layers))
    needed = {name: value for name, value in chosen.network.items() if name in _parameters(network.make)}
    settings["network"] = needed | settings["network"]

    makes = {"learner": chosen.make, "model": network.make, "data": source.load}
    for name, setting in SETTINGS.items():
        if setting.of and settings[name] is None:
            plain = _parameters(makes[setting.of])
            settings[name] = settings[setting.overlays] if setting.overlays else plain.get(name)
    check_choices(settings)
    _fit_to(source, settings, given)
    settings["descriptions"] = _descriptions(learner, source, data, settings["descriptions"])
    for name in [name for name, setting in SETTINGS.items() if not _has_meaning(setting, makes, chosen)]:
        if name in given:
            model = "" if SETTINGS[name].requires else f" with {settings['model']}"
            raise ConfigError(f"{flag(name)} has no meaning for {learner}{model} on {data}; leave it away.")
        settings[name] = None
    from_0 = _FROM_1 if chosen.acts else ("shots",) if settings["descriptions"] is not None else ()
    counts = [setting for setting in SETTINGS.values() if setting.argument in _FROM_1]
    check_values(settings, least={setting.name: 0 if setting.argument in from_0 else 1 for setting in counts})
    if settings["train_ways"] != settings["ways"] and not chosen.embedding:
        raise ConfigError(f"{learner} has one output for each way, so --train-ways must equal --ways.")
    return Config.of(settings)


def _check_support(learner: str, data: str, source: DataEntry) -> None:
    """A learner that acts needs an environment to act in, and another one examples."""
    acting = source.kind == "environment"
    if LEARNERS[learner].acts != acting:
        if acting:
            fits = " or ".join(name for name, other in LEARNERS.items() if other.acts)
            raise ConfigError(f"{data} is an environment, which {learner} cannot learn from; use --learner {fits}.")
        fits = " or ".join(name for name, other in DATA.items() if other.kind == "environment")
        raise ConfigError(f"{learner} learns by acting in an environment, and {data} is none; use --data {fits}.")


def _has_meaning(setting: Setting, makes: Mapping[str, Callable[..., Any]], chosen: LearnerEntry) -> bool:
    """Whether it is an argument that its part takes."""
    if setting.of is None:
        return True
    taken = setting.argument in inspect.signature(makes[setting.of]).parameters
    return taken and (not setting.requires or getattr(chosen, setting.requires))


def check_names(config: Config) -> None:
    """That learner, data and network are there, and what else a run has by name; data of one's own need not be.

    Args:
        config: of a run folder.

    Raises:
        UnknownNameError: what is not there.
    """
    lookup(LEARNERS, config.learner, "learner")
    model_entry(config.model)
    check_choices(vars(config))
    if not config.own:
        lookup(DATA, config.data, "data set")


def _fit_to(source: DataEntry, settings: dict[str, Any], given: Mapping[str, Any]) -> None:
    """Ways and queries that nobody asked for are no more than data of one's own has."""
    for prefix, splits in (("train_", ("train",)), ("", ("validation", "test"))):
        if not source.division:
            return
        classes = min(len(source.division[split]) for split in splits)
        least = min(source.rows[name] for split in splits for name in source.division[split])
        shots = settings[f"{prefix}shots"]
        labelled = max(1, shots if isinstance(shots, int) else max(shots))  # without shots there is a place for one
        taken = labelled + (settings["unlabelled"] or 0)
        most = {"ways": classes, "queries": max(1, least - taken)}
        if (given.get(f"{prefix}ways") or 0) > classes:
            parts = ", ".join(f"{len(names)} for {split}" for split, names in source.division.items())
            raise ConfigError(
                f"{flag(prefix + 'ways')} is {given[f'{prefix}ways']}, and of the classes there are {parts}; "
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
        raise ConfigError(
            f"{learner} reads descriptions of classes and {data} has none; use {' or '.join(others)}, or "
            "data of your own whose classes have names."
        )
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


def options_of(flag: str, owner: str, make: Callable[..., Any], *layers: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a learner or network; a text, as the command line has it, becomes a value of the default's type."""
    known = {name: value for name, value in _parameters(make).items() if name not in {*SETTINGS, "parent"}}
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


def make_learner(
    config: Config, source: TaskSource | Task, split: str = "train", **instead: Number | None
) -> MetaLearner:
    """The learner of a run, with a model that fits the tasks of `source`.

    Args:
        config: the settings.
        source: tasks, or the shapes of one; the width of their targets is the number of outputs of a model with a head.
        split: `"train"` for the learner in training, another for the one that is tested.
        instead: numbers of the learner instead of the settings', as `inner_steps`; None for none.

    Returns:
        The learner.

    Raises:
        ConfigError: the learner cannot minimise the loss of the data, or has no such number.
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
    options = {**config.options, **config.arguments("learner", split)}
    for name, value in instead.items():
        if value is not None and name not in inspect.signature(entry.make).parameters:
            raise ConfigError(f"{flag(name)} has no meaning for {config.learner}; leave it away.")
        options |= {} if value is None else {name: value}
    if config.descriptions is not None and not entry.descriptions:
        options["descriptions"] = True
    if "loss" in inspect.signature(entry.make).parameters:
        options["loss"] = LOSSES[config.kind]
    elif config.kind == "regression":
        regress = [name for name, other in LEARNERS.items() if "loss" in inspect.signature(other.make).parameters]
        raise ConfigError(f"{config.learner} classifies, but {config.data} is regression; use {' or '.join(regress)}.")
    module = network.make(**head, **config.arguments("model", split), **config.network)
    return entry.make(network.adapter(module), **options)


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
        episode: `ways`, `shots`, `queries` instead of the settings', and `query_balance`, which no setting has.

    Returns:
        The tasks.

    Raises:
        ConfigError: other ways than the learner was trained for, or ways of a regression.
        DataError: the data cannot give such tasks.
    """
    ways = episode.get("ways", config.ways)
    for name in episode:
        lookup(dict.fromkeys(("ways", "shots", "queries", "query_balance")), name, "size of an episode")
        if name not in inspect.signature(config.entry.load).parameters:
            raise ConfigError(f"{flag(name)} has no meaning for {config.data}; leave it away.")
    if ways != config.ways and not LEARNERS[config.learner].embedding:
        raise ConfigError(
            f"{config.learner} has one output for each of its {config.ways} ways, so it cannot take {ways}; leave "
            "--ways away, or train a prototypical run, which takes any number."
        )
    return config.entry.load(split=split, **{**config.arguments("data", split), **episode})


def unknown(config: Config, split: str) -> Any:
    """What `jmeta.evaluate` takes as `open_set`: the rows of no class that the data have, else True."""
    return True if config.entry.outside is None else config.entry.outside(split=split)


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
            f"{config.model} cannot take the inputs of {config.data} ({reason_of(error)}); choose another --model or "
            "other --network options, or leave them away."
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
