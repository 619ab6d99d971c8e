"""One row: trained as far as time allows, from where it stopped; chosen by validation; measured on the test classes."""

import dataclasses
import io
import json
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jmeta
from benchmarks.machine import cpu, environment
from benchmarks.packed import packed
from benchmarks.results import PACKAGES
from jmeta.core import Params, State
from jmeta.data.omniglot import SPLITS
from jmeta.errors import NonFiniteError
from jmeta.evaluate import per_episode
from jmeta.files import write_whole
from jmeta.runs import settings
from jmeta.runs.config import Config
from jmeta.step import TrainState

VALIDATION, EPISODES = 300, 1000
VALIDATIONS = 10  # of a whole training
SAVE_EVERY = 60.0  # seconds


class Progress(NamedTuple):
    """What a training has reached, as its checkpoint holds it.

    Args:
        train_state: of the last meta-step.
        best: θ and state of the best validation so far.
        curve: step, loss and validation of each validation.
        seconds: of training, with compilation and validation.
    """

    train_state: TrainState
    best: tuple[Params, State]
    curve: list[dict[str, float]]
    seconds: float


def about(config: Config) -> dict[str, Any]:
    """The settings as JSON gives them back."""
    told: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return told


def better(config: Config, one: float, than: float) -> bool:
    """Whether a number is: an accuracy that is higher, an error that is lower."""
    return one < than if config.kind == "regression" else one > than


def tasks_of(config: Config, split: str, omniglot: Path | None) -> jmeta.TaskSource:
    """The tasks of a split, those of Omniglot from a packed file where one is given."""
    if omniglot is not None and config.data == "omniglot":
        return packed(omniglot, split, **config.arguments("data", split))
    return settings.make_source(config, split)


def _is_key(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def save(file: Path, progress: Progress, told: dict[str, Any]) -> None:
    """Writes a checkpoint whole, with what it is of."""
    leaves = jax.tree.leaves((progress.train_state, progress.best))
    arrays = {str(i): np.asarray(jax.random.key_data(x) if _is_key(x) else x) for i, x in enumerate(leaves)}
    text = json.dumps({"about": told, "curve": progress.curve, "seconds": progress.seconds})
    content = io.BytesIO()
    np.savez(content, text=np.asarray(text), **arrays)  # type: ignore[arg-type]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, content.getvalue())


def restore(file: Path, start: Progress, told: dict[str, Any]) -> Progress:
    """The checkpoint, or the start where there is none of these settings."""
    if not file.exists():
        return start
    with np.load(file) as stored:
        text = json.loads(str(stored["text"]))
        if text["about"] != told:
            print(f"{file} is of other settings; the row starts anew", flush=True)
            return start
        likes, structure = jax.tree.flatten((start.train_state, start.best))
        arrays = (jnp.asarray(stored[str(i)]) for i in range(len(likes)))
        leaves = [jax.random.wrap_key_data(x) if _is_key(like) else x for x, like in zip(arrays, likes, strict=True)]
    train_state, best = jax.tree.unflatten(structure, leaves)
    return Progress(train_state, best, text["curve"], text["seconds"])


def validated(config: Config, progress: Progress, source: jmeta.TaskSource, loss: float) -> Progress:
    """With one more row of the curve, and the present θ as the best one if it is."""
    θ, metric = (progress.train_state.params, progress.train_state.state), config.metric.__name__
    tester, key = settings.make_learner(config, source, "test"), jax.random.key(1)
    values = per_episode(key, tester, *θ, source, {metric: config.metric}, episodes=VALIDATION)
    value = float(np.mean(values[metric]))
    is_best = all(better(config, value, before[metric]) for before in progress.curve)
    row = {"step": int(progress.train_state.step), "loss": loss, metric: value}
    return progress._replace(best=θ if is_best else progress.best, curve=[*progress.curve, row])


def train(
    config: Config, sources: dict[str, jmeta.TaskSource], file: Path, minutes: float | None, scan: int
) -> Progress:
    """Goes on from the checkpoint until all steps are done or time is out; the last row of the curve is the end."""
    begin, told = time.monotonic(), {**about(config), "train": dict(sources["train"].protocol)}
    learner, optimizer = settings.make_learner(config, sources["train"]), settings.make_optimizer(config)

    @partial(jax.jit, static_argnames="length", compiler_options=jmeta.compiler_options())
    def run(train_state: TrainState, data: Any, length: int) -> tuple[TrainState, jax.Array]:
        step = jmeta.make_step(learner, optimizer, sources["train"]._replace(data=data), tasks=config.tasks)
        train_state, info = jax.lax.scan(step, train_state, length=length)
        return train_state, info["loss"].mean()

    start = settings.begin(config, learner, sources["train"])
    progress = restore(file, Progress(start, (start.params, start.state), [], 0.0), told)
    before, saved, loss, done = progress.seconds, begin, float("nan"), int(progress.train_state.step)
    marks = [round(config.steps * i / VALIDATIONS) for i in range(1, VALIDATIONS + 1)]
    data = jax.tree.map(jnp.asarray, sources["train"].data)
    while done < config.steps:
        mark = next(mark for mark in marks if mark > done)
        length = min(scan, mark - done)
        train_state, mean = run(progress.train_state, data, length)
        if int(train_state.step) < done + length:
            raise NonFiniteError(f"meta-step {int(train_state.step)} is not finite.", done, progress.train_state)
        progress, loss, done = progress._replace(train_state=train_state), float(mean), done + length
        if done == mark:
            progress = validated(config, progress, sources["validation"], loss)
            print(f"{file.stem}: {progress.curve[-1]}, {time.monotonic() - begin:.0f} s", flush=True)
        is_out = minutes is not None and time.monotonic() - begin > 60 * minutes
        if done == mark or is_out or time.monotonic() - saved > SAVE_EVERY:
            saved = time.monotonic()
            progress = progress._replace(seconds=before + saved - begin)
            save(file, progress, told)
        if is_out:
            break
    if done in marks:
        return progress
    return validated(config, progress, sources["validation"], loss)  # not kept: a run in one go would not have it


def measure(
    config: Config, file: Path, *, omniglot: Path | None = None, minutes: float | None = None, scan: int = 100
) -> dict[str, Any]:
    """Goes on with the training of a row, and measures what it has reached.

    Args:
        config: its settings.
        file: its checkpoint.
        omniglot: a file of `benchmarks.packed`.
        minutes: of training, after which no further scan begins.
        scan: meta-steps of a compiled scan.

    Returns:
        `best` and `last`, what `jmeta.evaluate` says of the best θ by validation and of the last one on the test
        tasks, with settings, machine and curve.

    Raises:
        NonFiniteError: a meta-step was not finite; the checkpoint is the last one before.
    """
    sources = {split: tasks_of(config, split, omniglot) for split in SPLITS}
    progress = train(config, sources, file, minutes, scan)
    metric, curve = config.metric.__name__, progress.curve
    best = next(row for row in curve if not any(better(config, other[metric], row[metric]) for other in curve))
    tester, device = settings.make_learner(config, sources["test"], "test"), jax.devices()[0].device_kind

    def test(params: Params, state: State) -> dict[str, Any]:
        key = jax.random.key(2)
        return jmeta.evaluate(key, tester, params, state, sources["test"], episodes=EPISODES, metric=config.metric)

    tested = test(*progress.best)
    return {
        "metric": metric,
        "best": tested,
        "best_step": best["step"],
        "last": tested if best is curve[-1] else test(progress.train_state.params, progress.train_state.state),
        "steps": curve[-1]["step"],
        "seconds": progress.seconds,
        "device": cpu() if device == "cpu" else device,
        "environment": environment(PACKAGES),
        "protocol": dict(settings.protocol(config)),
        "settings": about(config),
        "curve": curve,
    }
