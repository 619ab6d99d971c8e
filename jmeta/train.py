"""Meta-training: everything from sampling to update is one compiled program."""

import contextlib
import itertools
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Int, Key, PyTree

from jmeta.checks import check_concrete, check_counts, check_gradient, check_memory, check_state, check_task
from jmeta.compilation import compiled
from jmeta.core import Info, Keys, MetaLearner, Params, State, Task, TaskSource
from jmeta.devices import MODEL, Mesh, divided, on_mesh, over_seeds, replicated, seeds_of, sharded, share
from jmeta.diagnosis import diagnosis
from jmeta.errors import ConfigError, ConvergenceWarning, NonFiniteError
from jmeta.feed import check_fed, data_of, fed
from jmeta.losses import check_classes, targets_needed
from jmeta.step import TrainState, draw, keys_of_step, make_step, unfit
from jmeta.tree import part_of

Metrics = Mapping[str, Any]


def init(
    key: Keys,
    learner: MetaLearner,
    optimizer: optax.GradientTransformation,
    source: TaskSource,
    *,
    mesh: Mesh | None = None,
) -> TrainState:
    """The `TrainState` before the first meta-step.

    Args:
        key: the key of the whole run, or one for each seed, `[seeds]`.
        learner: the meta-learner.
        optimizer: the outer optimiser.
        source: where tasks come from; one is drawn for its shapes.
        mesh: with an axis `model`, over which θ and the optimiser's state are divided from the start.

    Returns:
        θ and state drawn by `learner.init`, and a new optimiser state; `[seeds, ...]` where there are seeds.

    Raises:
        ConfigError: keys with more than one axis, or an optimiser that wants other parameters.
        ModelError: the model or the loss does not fit the tasks.

    Example:
        >>> import jax, jmeta, optax
        >>> learner = jmeta.maml(jmeta.linen(jmeta.MLP(outputs=1)), loss=jmeta.mean_squared_error)
        >>> train_state = jmeta.init(jax.random.key(0), learner, optax.adam(1e-3), jmeta.sinusoid())
        >>> int(train_state.step)
        0
    """
    if seeds_of(key) is not None:
        return jax.vmap(lambda key: init(key, learner, optimizer, source))(key)
    init_key, sample_key, run_key = jax.random.split(key, 3)
    check_memory(jax.eval_shape(source.sample, sample_key, source.data), 1)
    data = data_of(source, sample_key[None])
    task = compiled(_sample, nested=True)(sample_key, data, sample=source.sample)  # not one operation at a time
    check_task(task)
    params, state = compiled(_init, nested=True)(init_key, task, learner=learner, mesh=mesh)
    with targets_needed() as needed:
        check_gradient(learner, params, state, source)
    if needed:
        check_classes("support", task.support)
        check_classes("query", task.query)
    return TrainState(run_key, jnp.zeros((), jnp.int32), params, state, _start(optimizer, params))


def _start(optimizer: optax.GradientTransformation, params: Params) -> PyTree:
    try:
        return optimizer.init(params)
    except Exception as error:  # whatever an optimiser raises that wants other parameters
        raise ConfigError(unfit(error)) from error


def _sample(key: Key[Array, ""], data: PyTree, *, sample: Callable[[Key[Array, ""], PyTree], Any]) -> Any:
    return sample(key, data)


def _init(key: Key[Array, ""], task: Task, *, learner: MetaLearner, mesh: Mesh | None) -> tuple[Params, State]:
    params, state = learner.init(key, task)
    return sharded(mesh, params), state


class Fit(NamedTuple):
    """The result of `fit`; of many seeds, all arrays are `[seeds, ...]` and all numbers lists of one for each seed.

    Args:
        params: θ.
        state: the learner's state.
        history: the mean of `loss`, `gradient_norm` and the learner's info over each `log_every` steps, with the
            `step` at the end of them.
        train_state: give it to `fit` to go on.
    """

    params: Params
    state: State
    history: list[Metrics]
    train_state: TrainState


def fit(
    key: Keys,
    learner: MetaLearner,
    source: TaskSource,
    *,
    optimizer: optax.GradientTransformation = optax.adam(1e-3),
    steps: int = 1000,
    tasks: int = 32,
    task_chunk: int | None = None,
    log_every: int = 50,
    train_state: TrainState | None = None,
    callback: Callable[[TrainState, Metrics], Any] | None = None,
    skip_nonfinite: bool = False,
    progress: bool | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Fit:
    """Meta-trains a learner on tasks from a source.

    Runs a compiled scan of `log_every` meta-steps at a time, without host transfer inside; compiled once.

    Args:
        key: the same key gives the same result; without effect where `train_state` is given. Keys `[seeds]` train all
            seeds in one program, each with the numbers of its own run. A seed whose meta-step is not finite stops
            alone, and its step stays behind.
        learner: the meta-learner.
        source: where training tasks come from.
        optimizer: outer optimiser; default `optax.adam(1e-3)`.
        steps: number of meta-steps in all, counted from the first of the run, also when it goes on.
        tasks: tasks a step.
        task_chunk: how many tasks are adapted at a time, see `make_step`.
        log_every: meta-steps of one compiled scan: how often metrics reach the host.
        train_state: where to go on; default: from `init`.
        callback: `(train_state, metrics) -> stop`, called after each scan, to log, to save, to stop early. `True`, of
            Python, NumPy or JAX, stops; whatever else it returns (what `file.write` does) means nothing.
        skip_nonfinite: whether tasks whose loss or gradient is not finite are left out of the meta-step instead of
            ending the run; the history counts them, `"skipped"`, the mean number a step. Tasks are then adapted one
            after the other.
        progress: whether a bar is drawn on the error stream. Default: in a terminal and in a notebook.
        mesh: devices over which the tasks of each meta-step are divided, `jax.make_mesh((8,), ("tasks",))`, see
            `make_step`; the results lie on each of them. The seeds are divided over an axis `seeds`, beside it or
            alone. `jax.make_mesh((2, 4), ("tasks", "model"))` divides θ and the optimiser's state over the second axis,
            and so the results. Default: one device.

    Returns:
        The trained parameters and the history.

    Raises:
        ModelError: the model does not fit the tasks; before the meta-step compiles.
        ConfigError: a number of steps or tasks that is none, tasks that do not fit into memory, a `train_state` of
            another learner, model, optimiser or number of seeds, a mesh that does not divide the tasks or seeds, or a
            call under `jit` or `vmap`.
        DataError: an example of a stream cannot be read, or is of another shape.
        NonFiniteError: loss, gradient or update became non-finite, of every seed where there are many; it tells which
            part of it in which tasks and leaves, and carries the last finite `train_state`.

    Warns:
        ConvergenceWarning: the learner's info has `unconverged`, the share of tasks whose inner problem was not solved,
            and it is not 0.
        UserWarning: `train_state` is at `steps` already, so that nothing is left to do; or the first call of the
            callback returned `True`, as `update` of a tqdm bar does whenever it draws; or a seed stopped.

    Example:
        >>> import jax, jmeta
        >>> learner = jmeta.maml(jmeta.linen(jmeta.MLP(outputs=1)), inner_rate=0.01, loss=jmeta.mean_squared_error)
        >>> fitted = jmeta.fit(jax.random.key(0), learner, jmeta.sinusoid(), steps=20, tasks=4, log_every=10)
        >>> [row["step"] for row in fitted.history]
        [10, 20]
    """
    check_counts(steps=steps, tasks=tasks, log_every=log_every)
    help_ = "give it a key for each seed, or put jmeta.init and a jax.lax.scan of jmeta.make_step inside"
    check_concrete("fit", help_, key, source.data, train_state)
    seeds = seeds_of(key)
    check_fed(source, seeds)
    check_memory(jax.eval_shape(source.sample, part_of(0, seeds, key), source.data), tasks * (seeds or 1))
    share(mesh, tasks, seeds)
    if train_state is None:
        with on_mesh(mesh if seeds is None else None) as inside:
            train_state = init(key, learner, optimizer, source, mesh=inside)
    else:
        check_state(train_state, learner, optimizer, source, seeds)
    done = int(np.asarray(train_state.step).min())
    _tell_done(done, int(steps))
    watched = _is_watched() if progress is None else progress
    bar = _bar(steps, done) if watched else contextlib.nullcontext(lambda metrics: None)
    last = np.full(np.shape(train_state.step), steps)  # where each seed ends
    with (
        on_mesh(mesh, seeds) as inside,
        bar as show,
        fed(source, train_state.key, range(done, steps), tasks, log_every, inside) as (length, chunks),
    ):
        train_state = divided(inside, seeds, train_state)
        history: list[Metrics] = []
        while ((begin := np.asarray(train_state.step)) < last).any():
            parts: list[Info] = []
            for data in itertools.islice(chunks, log_every // length):
                jax.block_until_ready(parts[-1:])  # so that no more chunks than two lie on the device
                train_state, info = compiled(_run)(
                    train_state,
                    data,
                    jnp.asarray(last, jnp.int32),
                    learner=learner,
                    optimizer=optimizer,
                    sample=source.sample,
                    tasks=tasks,
                    task_chunk=task_chunk,
                    length=length,
                    skip_nonfinite=skip_nonfinite,
                    mesh=inside,
                    seeds=seeds,
                )
                parts.append(info)
            info = {name: np.concatenate([part[name] for part in parts], axis=begin.ndim) for name in parts[0]}
            ends = np.asarray(train_state.step)
            if (broken := ends < np.minimum(begin + log_every, last)).any():
                last = np.where(broken, ends, last)
                _tell_broken(learner, source, train_state, tasks, broken, stopped=last < steps)
            metrics = _metrics(info, begin, ends)
            _tell_unconverged(metrics, history)
            history.append(metrics)
            show(metrics)
            if callback is not None and _is_true(callback(train_state, metrics)):
                if len(history) == 1 and (ends < last).any():
                    warnings.warn(
                        f"the first call of the callback returned True, which stops the run at step {ends.max()} of "
                        f"{steps}; to go on, let it return None.",
                        stacklevel=2,
                    )
                break
    if mesh is not None and MODEL not in mesh.axis_names:  # whose parts stay: Explicit ones few models compute with
        train_state = replicated(mesh, train_state)  # of which seeds can be taken by their number
    return Fit(train_state.params, train_state.state, history, train_state)


def _tell_done(done: int, steps: int) -> None:
    """Warns where nothing is left to do."""
    if done >= steps > 0:
        warnings.warn(
            f"train_state is at step {done} and steps is {steps}, counted from the first of the run, so that nothing "
            f"is done; steps={done + steps} makes {steps} more.",
            stacklevel=3,
        )


def _tell_broken(
    learner: MetaLearner, source: TaskSource, train_state: TrainState, tasks: int, broken: Any, stopped: Any
) -> None:
    """Raises `NonFiniteError` where every seed, or the only one, has stopped, and else warns of those that just did."""
    steps = train_state.step
    seeds, first = (None, 0) if np.ndim(steps) == 0 else (len(steps), int(np.argmax(broken)))
    why = diagnosis(learner, *_drawn(learner, source, part_of(first, seeds, train_state), tasks))
    if seeds is None:
        raise NonFiniteError(f"the meta-step is not finite at step {steps}: {why}.", int(steps), train_state)
    where = ", ".join(f"at step {steps[i]} of seed {i}" for i in np.flatnonzero(broken))
    sentence = f"the meta-step is not finite {where}: of seed {first}, {why}"
    if stopped.all():
        raise NonFiniteError(f"{sentence}; no seed is left.", int(np.max(steps)), train_state)
    warnings.warn(f"{sentence}; the other seeds go on.", stacklevel=3)


def _metrics(info: Mapping[str, np.ndarray], begin: np.ndarray, ends: np.ndarray) -> Metrics:
    """The means over the meta-steps of a scan; NaN of a seed that made none."""
    arrays = {name: np.asarray(x, np.float64) for name, x in info.items()}

    def means(of_seed: Mapping[str, np.ndarray], done: int) -> dict[str, Any]:
        parts = {name: x[:done] if done else np.full((1, *x.shape[1:]), np.nan) for name, x in of_seed.items()}
        return {name: x.mean(axis=0).tolist() for name, x in parts.items()}

    step = ends.tolist()
    if not ends.ndim:
        return {"step": step} | means(arrays, int(ends - begin)) | {"step": step}
    rows = [means({name: x[i] for name, x in arrays.items()}, int(n)) for i, n in enumerate(ends - begin)]
    return {"step": step} | {name: [row[name] for row in rows] for name in arrays} | {"step": step}


def _tell_unconverged(metrics: Metrics, history: list[Metrics]) -> None:
    """Warns the first time that inner problems were not solved."""
    *before, now = (float(np.nan_to_num(row.get("unconverged", 0.0)).max()) for row in (*history, metrics))
    if now > 0.0 and not any(before):
        warnings.warn(
            f"the inner problem did not converge in {now:.0%} of the tasks up to step {np.max(metrics['step'])}, "
            "so that the meta-gradient is wrong; take more inner steps, another rate, or a larger proximal term.",
            ConvergenceWarning,
            stacklevel=3,
        )


def _is_watched() -> bool:
    ipython = sys.modules.get("IPython")  # who imports it need not run in it
    return sys.stderr.isatty() or getattr(ipython, "get_ipython", lambda: None)() is not None


@contextlib.contextmanager
def _bar(steps: int, done: int) -> Iterator[Callable[[Metrics], None]]:
    """A bar of the meta-steps; gives what takes the metrics of each scan."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("meta-training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=steps, completed=done, note="compiling")

        def show(metrics: Metrics) -> None:
            losses = [x for x in np.ravel(metrics["loss"]) if not np.isnan(x)]  # a seed that stopped has none
            progress.update(bar, completed=int(np.max(metrics["step"])), note=f"loss {np.mean(losses or np.nan):.4g}")

        yield show


def _drawn(
    learner: MetaLearner, source: TaskSource, train_state: TrainState, tasks: int
) -> tuple[Keys, Params, State, Task]:
    """What the next meta-step gives its objective."""
    data = data_of(source, keys_of_step(train_state.key, train_state.step, tasks)[0])
    keys, batch = jax.jit(lambda carry, data: draw(learner, source._replace(data=data), carry, tasks))(
        train_state, data
    )
    return keys, train_state.params, train_state.state, batch


def _is_true(answer: Any) -> bool:
    """Whether it is a single true; what is only truthy, as a count of written characters, is not."""
    return isinstance(answer, bool | np.ndarray | np.generic | jax.Array) and (
        np.shape(answer) == () and np.asarray(answer).dtype == bool and bool(answer)
    )


def _run(
    train_state: TrainState,
    data: PyTree,
    steps: Int[Array, "..."],
    *,
    learner: MetaLearner,
    optimizer: optax.GradientTransformation,
    sample: Callable[[Key[Array, ""], PyTree], Task],
    tasks: int,
    task_chunk: int | None,
    length: int,
    skip_nonfinite: bool = False,
    mesh: Mesh | None = None,
    seeds: int | None = None,
) -> tuple[TrainState, Info]:
    def of_seed(mesh: Mesh | None, own: tuple[TrainState, Array], data: PyTree) -> tuple[TrainState, Info]:
        train_state, steps = own

        @jax.jit  # traced once for its shapes and for the scan
        def step(carry: TrainState, data: PyTree) -> tuple[TrainState, Info]:
            source = TaskSource(data, sample, {})
            options: dict[str, Any] = {
                "tasks": tasks,
                "task_chunk": task_chunk,
                "skip_nonfinite": skip_nonfinite,
                "mesh": mesh,
            }
            return make_step(learner, optimizer, source, **options)(carry, None)

        info = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(step, train_state, data)[1])

        def until_done(carry: TrainState, _: None) -> tuple[TrainState, Info]:
            # The last scan may be longer than what is left to do: skipping keeps one compiled program.
            return lax.cond(carry.step < steps, lambda: step(carry, data), lambda: (carry, info))

        done, infos = lax.scan(until_done, train_state, length=length)
        return sharded(mesh, done), infos  # as it came, so that the next scan is the same program

    return over_seeds(mesh, seeds, of_seed)((train_state, steps), data)
