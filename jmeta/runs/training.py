"""Meta-training a run in its folder: what is trained, checked, saved and logged, and how it ends."""

import dataclasses
import json
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jmeta.core import MetaLearner, TaskSource
from jmeta.devices import cores_for, mesh_of, on_one_device, share
from jmeta.errors import ConfigError, NonFiniteError
from jmeta.evaluate import evaluate
from jmeta.models.weights import Matched
from jmeta.runs import hosts, settings
from jmeta.runs.checkpoint import latest_step, restore, save
from jmeta.runs.config import Config
from jmeta.runs.loggers import Logger, Row
from jmeta.runs.run import BEST, LAST, Run, read_rows, write_settings
from jmeta.runs.start import started
from jmeta.runs.stopping import Signals
from jmeta.step import TrainState
from jmeta.train import Metrics, fit

CHECKS = 20  # validations of a run
EPISODES = 100  # of each validation


class Parts(NamedTuple):
    """What a run trains with, made before its folder is, so that what cannot work leaves nothing behind.

    Args:
        config: the settings.
        learner: in training.
        tester: at test.
        source: of training tasks.
        validation: of validation tasks.
        test: of test tasks.
        begin: the `TrainState` before the first meta-step.
        matched: which of its weights are those of another run or a file; None where none are.
    """

    config: Config
    learner: MetaLearner
    tester: MetaLearner
    source: TaskSource
    validation: TaskSource
    test: TaskSource
    begin: TrainState
    matched: Matched | None = None


def on_all_cores(config: Config) -> Config:
    """The settings of a new run with one device a core of a CPU, unless `devices` is given.

    Convolutions on few images do not fill the threads of an operation; a regression's few numbers and trajectories are
    computed for all tasks together.

    Args:
        config: the settings.

    Returns:
        The same, for a classification with `devices`.
    """
    if config.devices is not None or config.kind != "classification":
        return config
    devices = cores_for(config.tasks)
    return dataclasses.replace(config, devices=devices) if devices > 1 else config


def parts_of(config: Config, *, begun: bool = False) -> Parts:
    """Loads the data of a run and makes its learner.

    Args:
        config: the settings.
        begun: whether the run has a checkpoint, to which it does not matter from what weights it began.

    Returns:
        The parts.

    Raises:
        JmetaError: whatever does not fit: data, network, sizes.
    """
    share(mesh_of(config.devices), config.tasks)  # first of all, as a CPU is divided before JAX starts
    source, validation, test = (settings.make_source(config, split) for split in ("train", "validation", "test"))
    learner = settings.make_learner(config, source)
    tester = settings.make_learner(config, validation, "test")
    begin, matched = settings.begin(config, learner, source), None
    if not begun:
        begin, matched = started(config, begin)
    return Parts(config, learner, tester, source, validation, test, begin, matched)


def resumed(folder: Path, parts: Parts) -> Parts:
    """The same from the last checkpoint of a folder on, if it has one.

    Args:
        folder: of the run.
        parts: of `parts_of`.

    Returns:
        The parts to go on with.

    Raises:
        ConfigError: the run is further than its steps shall be.
    """
    if latest_step(folder / LAST) is None:
        return parts
    begin = restore(folder / LAST, parts.begin)
    if int(begin.step) > parts.config.steps:
        raise ConfigError(f"{folder} is at step {begin.step} already; give --steps of more, or another --out.")
    return parts._replace(begin=begin)


def train(
    folder: Path, parts: Parts, signals: Signals, *, loggers: Sequence[Logger] = (), stopped: Callable[[], None]
) -> Run:
    """Meta-trains in a folder.

    Args:
        folder: of the run; `only_writer` holds it.
        parts: of `parts_of`, or of `resumed` to go on.
        signals: what ends the run in order.
        loggers: are given each row of `metrics.jsonl`, those that are there already first.
        stopped: tells how to go on, where a signal ends the process.

    Returns:
        The run, at its last step or where its patience ended.

    Raises:
        NonFiniteError: a meta-step was not finite; what was finite is saved.
    """
    config, train_state = parts.config, parts.begin
    rows: list[Row] = [row for row in read_rows(folder) if row["step"] <= int(train_state.step)]
    if hosts.is_first():
        write_settings(folder, config, rows, {"train": parts.source, "test": parts.test})
    for logger in loggers:
        for row in rows:
            logger(row)
    if int(train_state.step) < config.steps and not out_of_patience(config, rows):
        train_state = _trained(folder, parts, signals, loggers, stopped, rows, train_state)
    hosts.wait("the best checkpoint")
    best = restore(folder / BEST, train_state) if latest_step(folder / BEST) is not None else None
    return Run(config, train_state, rows, best)


def _trained(
    folder: Path,
    parts: Parts,
    signals: Signals,
    loggers: Sequence[Logger],
    stopped: Callable[[], None],
    rows: list[Row],
    train_state: TrainState,
) -> TrainState:
    config = parts.config
    key, metric, mesh = jax.random.key(config.seed), config.metric, mesh_of(config.devices)
    scan = max(1, config.steps // 100)
    begun = time.monotonic() - (rows[-1]["seconds"] if rows else 0.0)
    saving = threading.Lock()
    done: list[TrainState] = []  # the state of the last scan, whose row is written

    def save_done() -> None:
        with saving:
            save(folder / LAST, done[-1])

    def late() -> None:
        if not hosts.several():  # else all would have to save it
            save_done()

    def checked(train_state: TrainState) -> dict[str, float]:
        θ, state = train_state.params, train_state.state
        asked: dict[str, Any] = {"episodes": EPISODES, "metric": metric, "mesh": mesh}
        result = evaluate(key, parts.tester, θ, state, parts.validation, **asked)
        return {"validation": result[metric.__name__], "validation_ci95": result["ci95"]}

    def callback(train_state: TrainState, metrics: Metrics) -> bool:
        row = {**metrics, "seconds": round(time.monotonic() - begun, 2)}
        check = metrics["step"] == config.steps or metrics["step"] // scan % (100 // CHECKS) == 0
        if check:
            row |= checked(train_state)
            if best_row(config, [*rows, row]) is row:
                save(folder / BEST, train_state)
        rows.append(row)
        if hosts.is_first():
            with (folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
        done[:] = [train_state]
        if number := hosts.largest(signals.number or 0):  # a signal to one process ends all
            signals.number = number
        if check or number:  # after the row, which going on from this checkpoint would not write again
            save_done()
        if number:
            raise KeyboardInterrupt
        for logger in loggers:
            logger(row)
        return out_of_patience(config, rows)

    try:
        with signals.held(lambda: bool(done), late, stopped), warnings.catch_warnings():
            # patience may end a run that goes on at once
            warnings.filterwarnings("ignore", message="the first call of the callback returned True")
            fitted = fit(
                key,
                parts.learner,
                parts.source,
                optimizer=settings.make_optimizer(config),
                steps=config.steps,
                tasks=config.tasks,
                log_every=scan,
                train_state=train_state,
                callback=callback,
                progress=False,
                mesh=mesh,
            )
            return on_one_device(fitted.train_state)  # what comes after is not done by each of them
    except NonFiniteError as error:
        save(folder / LAST, error.train_state)
        rates = "--resume --outer-rate" + (" or --resume --inner-rate" if config.inner_rate is not None else "")
        help_ = (
            f"the run keeps what it had at step {error.step}: go on with other rates by {rates}, or train anew with "
            "another --out"
        )
        raise NonFiniteError(f"{str(error).rstrip('.')}; {help_}.", error.step, error.train_state) from error


def best_row(config: Config, rows: Sequence[Row]) -> Row | None:
    """The first row of the best validation, None before the first of them."""
    checked = [row for row in rows if "validation" in row]
    sign = -1.0 if config.kind == "regression" else 1.0  # of an error the least is best
    return max(checked, key=lambda row: sign * row["validation"], default=None)


def out_of_patience(config: Config, rows: Sequence[Row]) -> bool:
    """Whether as many validations as the patience has were no better than the best before them."""
    if config.patience is None:
        return False
    checked = [row for row in rows if "validation" in row]
    best = best_row(config, rows)
    return best is not None and len(checked) - 1 - checked.index(best) >= config.patience


def steps_within(parts: Parts, minutes: float) -> int:
    """How many meta-steps of a run fit into so many minutes, compilation and validation included; at least 10.

    Args:
        parts: of the run; the number of its steps does not matter.
        minutes: what meta-training may take in all.

    Returns:
        The number of steps, measured on this machine by two short scans.
    """
    config = parts.config
    begun, clock = time.monotonic(), list[float]()
    fit(
        jax.random.key(config.seed),
        parts.learner,
        parts.source,
        optimizer=settings.make_optimizer(config),
        steps=15,
        tasks=config.tasks,
        log_every=5,
        callback=lambda *_: clock.append(time.monotonic()),
        mesh=mesh_of(config.devices),
    )
    compiling, each = clock[0] - begun, (clock[-1] - clock[0]) / 10
    left = 60.0 * minutes - 3.0 * compiling  # the program of the run itself, and that of its validation
    return max(10, int(0.85 * left / max(each, 1e-6)))


def on_resume(stored: Config, given: Mapping[str, Any]) -> tuple[Config, list[str]]:
    """A stored run with what may change when it goes on.

    Args:
        stored: its settings.
        given: settings that may change, as far as they are given anew.

    Returns:
        The settings to go on with, and what changed, in words.
    """
    changed = {name: value for name, value in given.items() if value != getattr(stored, name)}
    words = [f"{name.replace('_', ' ')} {getattr(stored, name)} -> {value}" for name, value in changed.items()]
    if "steps" in changed:
        words.append(f"the outer rate goes on by the schedule of a run of {changed['steps']} steps")
    return dataclasses.replace(stored, **changed), words
