"""The command line: train, evaluate, adapt, search, list."""

import dataclasses
import json
import math
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array, Key
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

import jmeta
from jmeta import experiment, plots
from jmeta.checkpoint import latest_step, restore, save, write_whole
from jmeta.core import Examples, MetaLearner, Task, TaskSource
from jmeta.data import DATA
from jmeta.data.folders import read_images
from jmeta.envs import Trajectory
from jmeta.errors import CheckpointError, ConfigError, DataError, JmetaError, NonFiniteError
from jmeta.experiment import Config, check_seed
from jmeta.inputs import as_inputs
from jmeta.learners import LEARNERS
from jmeta.losses import accuracy
from jmeta.models import MODELS
from jmeta.models.text import TokenIds, hashed_text
from jmeta.runs import Run, load, read_config, read_rows
from jmeta.search import Search, search
from jmeta.stopping import LOCK, Signals, only_writer, say
from jmeta.train import Metrics, TrainState, evaluate, fit

# None stands for "not given", so that --resume can tell what was
_OF_THE_LEARNER = "(default: that of data and learner)"
_Int = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint=_OF_THE_LEARNER)]
_Float = Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint=_OF_THE_LEARNER)]
_Name = Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint=_OF_THE_LEARNER)]
_OtherInt = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: that of the run)")]

_INNER_STEPS, _SHOTS = (0, 1, 2, 3, 5), (1, 2, 3, 5, 10)  # of the adaptation curve
_UPDATES = (0, 1, 2, 3)  # of what acts in environments


@dataclasses.dataclass(frozen=True)
class Train:
    """Meta-train a learner, evaluate it on unseen tasks, and write a run folder."""

    learner: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: maml)")] = None
    """One of `jmeta list`."""
    data: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: glyphs)")] = None
    """One of `jmeta list`."""
    model: _Name = None
    """One of `jmeta list`."""
    ways: _Int = None
    """Classes of an episode."""
    shots: _Int = None
    """Labelled examples a class."""
    queries: _Int = None
    """Query examples a class."""
    train_ways: _Int = None
    """Classes of a training episode, if other than --ways."""
    train_shots: Annotated[
        tuple[int, int] | None, tyro.conf.arg(metavar="LEAST MOST", help_behavior_hint=_OF_THE_LEARNER)
    ] = None
    """Labelled examples a class of a training episode, a range, if other than --shots."""
    train_queries: _Int = None
    """Query examples a class of a training episode, if other than --queries."""
    steps: _Int = None
    """Meta-steps."""
    tasks: _Int = None
    """Tasks of a meta-step."""
    inner_rate: _Float = None
    """Inner rate α, on the mean loss of the support."""
    inner_steps: _Int = None
    """Inner steps in training."""
    test_inner_steps: _Int = None
    """Inner steps at test, if other than --inner-steps."""
    inner_optimizer: _Name = None
    """Inner optimiser: sgd, momentum, adam or rmsprop."""
    batch: _Int = None
    """Images of a batch, for a learner that pre-trains on all classes at once."""
    options: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=VALUE ...")] = ()
    """Options of the learner, as `--options proximal=2.0`; its documentation lists them."""
    descriptions: _Name = None
    """Descriptions of the classes: attributes or text."""
    distance: _Name = None
    """Distance kernel: squared_euclidean, cosine or dot_product."""
    norm: _Name = None
    """Normalisation of the network: group, layer, per_task, running or transductive."""
    network: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=VALUE ...")] = ()
    """Options of the network, as `--network features=32 spatial=mean`; its documentation lists them."""
    dtype: _Name = None
    """Of the computation: float32 or bfloat16; parameters are float32."""
    outer_rate: _Float = None
    """Outer rate β, annealed to 0 over the steps."""
    seed: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: 0)")] = None
    """The same seed gives the same run."""
    out: Path = Path("runs/demo")
    """The run folder."""
    resume: bool = False
    """Go on from the last checkpoint of the run folder, if there is one."""


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Evaluate a run on unseen tasks."""

    run: tyro.conf.Positional[Path]
    """The run folder."""
    episodes: int = 600
    """Unseen tasks."""
    seed: int = 1
    """The same seed gives the same tasks."""
    split: str = "test"
    """test, validation or train."""
    ways: _OtherInt = None
    """Classes of an episode."""
    shots: _OtherInt = None
    """Labelled examples a class."""
    queries: _OtherInt = None
    """Query examples a class."""
    inner_steps: _OtherInt = None
    """Inner steps; 0 does not adapt at all."""
    json: bool = False
    """Print one JSON object."""


@dataclasses.dataclass(frozen=True)
class Adapt:
    """Adapt a run to your own images and classify others."""

    run: tyro.conf.Positional[Path]
    """The run folder."""
    support: Path
    """Labelled images, one sub-folder a class."""
    query: Path
    """Images to classify."""
    invert: bool = False
    """For dark strokes on a light ground: the data sets of jmeta have light strokes on a dark ground."""
    json: bool = False
    """Print one JSON object."""


@dataclasses.dataclass(frozen=True)
class List:
    """List learners, data sets and models."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point of `jmeta`; exits with code 2 and one sentence for whatever the user can put right."""
    commands: dict[str, Callable[..., Any]] = {
        "train": Train,
        "evaluate": Evaluate,
        "adapt": Adapt,
        "search": Search,
        "list": List,
    }
    run: dict[type, Callable[..., Any]] = {
        Train: train,
        Evaluate: evaluate_run,
        Adapt: adapt_run,
        Search: search,
        List: list_all,
    }
    flags = tyro.extras.subcommand_cli_from_dict(
        commands, prog="jmeta", args=arguments, config=(tyro.conf.FlagCreatePairsOff,)
    )
    folders = {name: value.expanduser() for name, value in vars(flags).items() if isinstance(value, Path)}
    flags = dataclasses.replace(flags, **folders)
    with Signals() as signals, warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
        try:
            run[type(flags)](flags, signals) if isinstance(flags, Train) else run[type(flags)](flags)
        except JmetaError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            say(_interrupted(flags))
            os._exit(signals.code)  # XLA may still compute, and crashes when Python is taken down below it
        except OSError as error:
            what, why = error.filename or "a file of the run", error.strerror or error
            print(
                f"error: {what} cannot be written or read ({why}); make room, or give another folder.", file=sys.stderr
            )
            sys.exit(2)


def _interrupted(flags: Any) -> str:
    """What is said of a command that was stopped: how to go on with it."""
    begun = isinstance(flags, Train) and (flags.out / "config.json").exists()
    hint = f"; go on by `jmeta train --resume --out {flags.out}`" if begun else ""
    if isinstance(flags, Search) and (flags.out / "result.json").exists():
        hint = "; go on by the same command with --resume"
    return f"interrupted{hint}."


def train(flags: Train, signals: Signals) -> None:
    """`jmeta train`."""
    config = _config_of(flags)
    source, validation = (experiment.make_source(config, split) for split in ("train", "validation"))
    learner = experiment.make_learner(config, source)
    train_state = experiment.begin(config, learner, source)
    with only_writer(flags.out):
        _config_of(flags)  # once more, as another process may have written while this one waited
        _train(flags, signals, config, source, validation, learner, train_state)


def _train(
    flags: Train,
    signals: Signals,
    config: Config,
    source: TaskSource,
    validation: TaskSource,
    learner: MetaLearner,
    train_state: TrainState,
) -> None:
    checkpoints = flags.out / "checkpoint"
    if latest_step(checkpoints) is not None:
        train_state = restore(checkpoints, train_state)
    rows = [row for row in read_rows(flags.out) if row["step"] <= int(train_state.step)]
    write_whole(flags.out / "config.json", json.dumps(dataclasses.asdict(config), indent=2) + "\n")
    write_whole(flags.out / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    metric = DATA[config.data].metric
    key = jax.random.key(config.seed)
    tester = experiment.make_learner(config, validation, inner_steps=config.test_inner_steps)
    log_every = max(1, config.steps // 100)
    begin = time.monotonic() - (rows[-1]["seconds"] if rows else 0.0)
    saving = threading.Lock()
    done: list[TrainState] = []  # the state of the last scan, whose row is written

    def save_done() -> None:
        with saving:
            save(checkpoints, done[-1])

    held = signals.held(lambda: bool(done), save_done, lambda: say(_interrupted(flags)))
    with _progress() as progress:
        bar = progress.add_task("meta-training", total=config.steps, completed=int(train_state.step), note="compiling")

        def callback(train_state: TrainState, metrics: Metrics) -> None:
            row = {**metrics, "seconds": round(time.monotonic() - begin, 2)}
            check = metrics["step"] == config.steps or metrics["step"] // log_every % 5 == 0
            if check:
                checked = evaluate(
                    key, tester, train_state.params, train_state.state, validation, episodes=100, metric=metric
                )
                row |= {"validation": checked[metric.__name__], "validation_ci95": checked["ci95"]}
            rows.append(row)
            with (flags.out / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            done[:] = [train_state]
            if check or signals.number:  # after the row, which going on from this checkpoint would not write again
                save_done()
            if signals.number:
                raise KeyboardInterrupt
            validations = [_number(config, row["validation"]) for row in rows if "validation" in row]
            note = "  ".join([f"loss {metrics['loss']:.3f}", *(f"validation {last}" for last in validations[-1:])])
            progress.update(bar, completed=metrics["step"], note=note)

        if int(train_state.step) < config.steps:
            try:
                with held:
                    train_state = fit(
                        key,
                        learner,
                        source,
                        optimizer=experiment.make_optimizer(config),
                        steps=config.steps,
                        tasks=config.tasks,
                        log_every=log_every,
                        train_state=train_state,
                        callback=callback,
                    ).train_state
            except NonFiniteError as error:
                save(checkpoints, error.train_state)
                anew = f"the run keeps what it had at step {error.step}, and its rates: train anew with another --out"
                raise NonFiniteError(f"{str(error).rstrip('.')}; {anew}.", error.step, error.train_state) from error
    print(f"meta-training took {time.monotonic() - begin:.0f} s; evaluating on unseen tasks", file=sys.stderr)
    plots.learning_curve(flags.out / "learning_curve.png", rows, metric.__name__)
    _report(flags.out, config, train_state)


def _report(out: Path, config: Config, train_state: TrainState) -> None:
    """Evaluates a trained run, draws how it adapts, and prints it beside nearest mean on raw pixels."""
    metric = DATA[config.data].metric
    result = Run(config, train_state).evaluate()
    write_whole(out / "result.json", _json(result, indent=2) + "\n")
    axis, results = _adaptation(config, train_state, result)
    plots.adaptation_curve(out / "adaptation_curve.png", results, axis, metric.__name__)
    if LEARNERS[config.learner].acts:
        _trajectories(out, config, train_state, "test")
    table = _result_table(config, result)
    source = experiment.make_source(config, "test")
    inputs = jax.eval_shape(source.sample, jax.random.key(0), source.data).query.inputs
    if metric is accuracy and config.shots and inputs.ndim == 4:
        pixels = evaluate(jax.random.key(1), jmeta.prototypical(jmeta.identity()), {}, {}, source, episodes=600)
        table.add_row("nearest mean on raw pixels", _interval(config, pixels))
    _print_result(config, result, table)
    print(f"written to {out}/")


def _adaptation(
    config: Config, train_state: TrainState, result: Mapping[str, Any]
) -> tuple[str, list[Mapping[str, Any]]]:
    """Results against inner steps, of which `result` is one, or against shots for a learner that has none."""
    run = Run(config, train_state)
    if config.inner_steps is None:
        queries = min(5, config.queries)  # so that ten shots are left of the 20 images that a class of Omniglot has
        return "shots", [
            run.evaluate(episodes=200, shots=shots, queries=queries)
            for shots in ((0,) if config.descriptions else ()) + _SHOTS
        ]
    done = result["test_inner_steps"]
    return "test_inner_steps", [
        result if steps == done else run.evaluate(episodes=200, inner_steps=steps)
        for steps in sorted({*(_UPDATES if LEARNERS[config.learner].acts else _INNER_STEPS), done})
    ]


def _trajectories(out: Path, config: Config, train_state: TrainState, split: str) -> None:
    """Draws the episodes of four tasks before and after adaptation."""
    source = experiment.make_source(config, split)
    sample_key, key = jax.random.split(jax.random.key(2))
    tasks = jax.vmap(source.sample, (0, None))(jax.random.split(sample_key, 4), source.data)

    def episodes(inner_steps: int) -> Trajectory:
        learner = experiment.make_learner(config, source, inner_steps=inner_steps)

        def one_task(key: Key[Array, ""], task: Task) -> Trajectory:
            adapt_key, predict_key = jax.random.split(key)
            adapted = learner.adapt(adapt_key, train_state.params, train_state.state, task.support)
            outputs: Trajectory = learner.predict(predict_key, adapted, task.query.inputs)
            return outputs

        return jax.jit(jax.vmap(one_task))(jax.random.split(key, 4), tasks)

    after = episodes(max(1, config.test_inner_steps or 0))
    plots.trajectories(out / "trajectories.png", tasks.support, episodes(0), after)


def evaluate_run(flags: Evaluate) -> None:
    """`jmeta evaluate`."""
    check_seed(flags.seed)
    run = load(flags.run)
    config, train_state = run.config, run.train_state
    sizes = {name: value for name in ("ways", "shots", "queries") if (value := getattr(flags, name)) is not None}
    asked = partial(run.evaluate, flags.split, episodes=flags.episodes, seed=flags.seed, **sizes)
    result = asked(inner_steps=flags.inner_steps)
    results: list[dict[str, Any]] = []
    if LEARNERS[config.learner].acts and flags.inner_steps is None:
        metric = DATA[config.data].metric.__name__
        results = [result if steps == result["test_inner_steps"] else asked(inner_steps=steps) for steps in _UPDATES]
        plots.adaptation_curve(flags.run / "adaptation_curve.png", results, "test_inner_steps", metric)
        _trajectories(flags.run, config, train_state, flags.split)
        result["by_inner_steps"] = [{name: r[name] for name in ("test_inner_steps", metric, "ci95")} for r in results]
    if flags.json:
        print(_json(result))
        return
    table = _result_table(config, result)
    for r in results:
        table.add_row(f"after {r['test_inner_steps']}", _interval(config, r))
    _print_result(config, result, table)


def adapt_run(flags: Adapt) -> None:
    """`jmeta adapt`."""
    run = load(flags.run)
    config, source = run.config, run.source("test")
    support_shape = jax.eval_shape(source.sample, jax.random.key(0), source.data).support
    shape: tuple[int, ...] = support_shape.inputs.shape[1:] if isinstance(support_shape, Examples) else ()
    if len(shape) != 3:
        raise ConfigError(f"{flags.run} was trained on {config.data}, not on images; train on images first.")
    options: dict[str, Any] = {"size": shape[:2], "channels": shape[2], "invert": flags.invert}
    support, query = (read_images(folder, **options) for folder in (flags.support, flags.query))
    if (support.labels < 0).any():
        raise DataError(f"{flags.support} holds images outside of a class; put them into one sub-folder a class.")
    if not LEARNERS[config.learner].embedding and len(support.names) > (config.ways or 0):
        raise DataError(
            f"{flags.run} was trained for {config.ways} ways, but {flags.support} has {len(support.names)} classes; "
            f"give at most {config.ways}, or train a prototypical run, which takes any number."
        )
    classifier = run.classifier()
    classifier.fit(_scaled(support.images), support.labels, _descriptions_of(flags.run, config, support.names))
    probabilities = classifier.predict_proba(_scaled(query.images))
    rows = [
        {"file": str(file), "class": support.names[int(p.argmax())], "probability": float(p.max())}
        for file, p in zip(query.files, probabilities, strict=True)
    ]
    if flags.json:
        print(_json({"predictions": rows, **experiment.protocol(config)}))
        return
    table = Table(Column("file", overflow="fold"), Column("class", overflow="fold"), "probability")
    for row in rows:
        table.add_row(escape(str(row["file"])), escape(str(row["class"])), f"{row['probability']:.3f}")
    Console().print(table)


def _descriptions_of(run: Path, config: Config, names: Sequence[str]) -> Any:
    """What the names of the sub-folders say about the classes, for a run that reads text."""
    if config.descriptions is None:
        return None
    if config.descriptions != "text":
        raise ConfigError(f"{run} reads {config.descriptions}, which a folder has not; train with --descriptions text.")
    return TokenIds(jnp.asarray(hashed_text(names)))


def list_all(flags: List) -> None:
    """`jmeta list`."""
    for title, registry in (("learners", LEARNERS), ("data", DATA), ("models", MODELS)):
        print(title)
        for name, entry in registry.items():
            print(f"  {name:<18} {entry.summary} ({entry.paper})")


def _config_of(flags: Train) -> Config:
    """The settings of a new run, or of the one to go on with; refuses to mix two runs in one folder."""
    given = {name: value for name, value in dataclasses.asdict(flags).items() if value not in (None, ())}
    for name, options in (("options", flags.options), ("network", flags.network)):
        if options:
            given[name] = dict(_named(name, option) for option in options)
    resume, out = given.pop("resume"), given.pop("out")
    if not (out / "config.json").exists():
        if out.exists() and (
            not out.is_dir() or any(file.suffix != ".part" and file.name != LOCK for file in out.iterdir())
        ):
            raise CheckpointError(f"{out} exists and is no run of jmeta; choose another --out.")
        return experiment.resolve(**given)
    if not resume:
        raise CheckpointError(f"{out} exists; add --resume to go on with it, or choose another --out.")
    stored = read_config(out)
    for name in {"options", "network"} & set(given):  # as values, which is how they were stored
        given[name] = getattr(
            experiment.resolve(stored.learner, stored.data, model=stored.model, **{name: given[name]}), name
        )
    for name, value in given.items():
        if value != getattr(stored, name):
            flag = name.replace("_", "-")
            raise ConfigError(
                f"{out} was trained with --{flag} {getattr(stored, name)}, not {value}; leave the flag away to go on "
                "with it, or choose another --out."
            )
    return stored


def _named(flag: str, option: str) -> tuple[str, str]:
    name, equals, value = option.partition("=")
    if not equals:
        raise ConfigError(f"--{flag} {option} has no value; write {name}=VALUE.")
    return name.replace("-", "_"), value


def _scaled(images: np.ndarray) -> np.ndarray:
    return as_inputs(images)


def _json(result: Mapping[str, Any], indent: int | None = None) -> str:
    return json.dumps(_finite(result), indent=indent, allow_nan=False)


def _finite(x: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for them."""
    if isinstance(x, Mapping):
        return {name: _finite(value) for name, value in x.items()}
    if isinstance(x, list | tuple):
        return [_finite(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def _number(config: Config, value: float) -> str:
    return f"{100 * value:.1f} %" if DATA[config.data].metric is accuracy else f"{value:.3f}"


def _interval(config: Config, result: Mapping[str, Any]) -> str:
    value = result[DATA[config.data].metric.__name__]
    return f"{_number(config, value)} ± {_number(config, result['ci95'])}"


def _result_table(config: Config, result: Mapping[str, Any]) -> Table:
    table = Table("learner", f"{DATA[config.data].metric.__name__.replace('_', ' ')}, 95 % interval")
    table.add_row(config.learner, _interval(config, result))
    return table


def _print_result(config: Config, result: Mapping[str, Any], table: Table) -> None:
    steps = result["test_inner_steps"]
    details = [
        *(f"{result[name]} {name}" for name in ("ways", "shots", "queries") if name in result),
        f"{result['episodes']} {result['split']} episodes",
        "transductive" if result["transductive"] else "not transductive",
        *([] if steps is None else [f"{steps} inner step{'' if steps == 1 else 's'}"]),
    ]
    print(f"{config.data}: {', '.join(details)}", flush=True)
    Console().print(table)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
    )


if __name__ == "__main__":
    main()
