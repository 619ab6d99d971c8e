"""Meta-training: everything from sampling to update is one compiled program."""

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from jmeta.compilation import compiled
from jmeta.core import Info, MetaLearner, Params, State, Task, TaskSource, check_examples, mean_over_tasks
from jmeta.diagnosis import diagnosis
from jmeta.errors import ConfigError, ConvergenceWarning, JmetaError, ModelError, NonFiniteError
from jmeta.inner import descend
from jmeta.losses import check_classes, targets_needed
from jmeta.tree import path_name, widened

Metrics = Mapping[str, Any]
Metric = Callable[..., Any]


class TrainState(NamedTuple):
    """All that the next meta-step needs: what a checkpoint holds.

    Args:
        key: the key of the whole run; step `i` draws from `fold_in(key, i)`.
        step: number of meta-steps done.
        params: θ.
        state: the learner's state.
        optimizer_state: the outer optimiser's state.
    """

    key: Key[Array, ""]
    step: Int[Array, ""]
    params: Params
    state: State
    optimizer_state: PyTree


Step = Callable[[TrainState, Any], tuple[TrainState, Info]]


def make_step(
    learner: MetaLearner,
    optimizer: optax.GradientTransformation,
    source: TaskSource,
    *,
    tasks: int = 32,
    task_chunk: int | None = None,
    skip_nonfinite: bool = False,
) -> Step:
    """One meta-step, from sampling to update, as a function for `jax.lax.scan`.

    Draws a batch of tasks, computes the gradient of the learner's objective in θ, updates θ by the optimiser. If the
    loss, the gradient or the update is not finite, the step leaves everything as it was, its counter too.

    Args:
        learner: the meta-learner.
        optimizer: the outer optax optimiser; `value`, `grad` and `value_fn` are passed to its update, so that L-BFGS
            and schedule-free optimisers work, and `objective_fn`, `params -> (value, info)`, to one whose update names
            it: for a constraint in the learner's info (the KL divergence of TRPO).
        source: where tasks come from.
        tasks: tasks a step.
        task_chunk: how many tasks are adapted at a time; the gradient is accumulated over the chunks, so that memory
            does not grow with `tasks`. Default: on CPU as many as keep the cache warm (for images one task, for
            sinusoids all), elsewhere all.
        skip_nonfinite: whether tasks whose loss or gradient is not finite are left out, one after the other being
            looked at; `info["skipped"]` counts them.

    Returns:
        `(TrainState, _) -> (TrainState, info)`; `info` has `loss`, `gradient_norm` and the learner's own.

    Raises:
        ConfigError: `task_chunk` does not divide `tasks`.

    Example:
        >>> import jax, jmeta, optax
        >>> learner = jmeta.maml(jmeta.linen(jmeta.MLP(outputs=1)), loss=jmeta.mean_squared_error)
        >>> source = jmeta.sinusoid()
        >>> step = jmeta.make_step(learner, optax.adam(1e-3), source, tasks=4)
        >>> train_state = jmeta.init(jax.random.key(0), learner, optax.adam(1e-3), source)
        >>> train_state, info = jax.lax.scan(step, train_state, length=3)
        >>> info["loss"].shape
        (3,)
    """
    whole, value_and_gradient = _in_chunks(learner.objective, tasks, task_chunk)
    if skip_nonfinite:
        value_and_gradient = _of_finite_tasks(learner.objective)

    def step(carry: TrainState, _: Any) -> tuple[TrainState, Info]:
        objective_key, batch = _draw(learner, source, carry, tasks)
        (loss, (state, info)), gradient = value_and_gradient(objective_key, carry.params, carry.state, batch)
        objective = _of_kept_tasks(learner.objective, info["kept"]) if skip_nonfinite else whole
        if skip_nonfinite:
            info = {**info, "skipped": tasks - info["kept"].sum(dtype=jnp.float32)}
            del info["kept"]

        def value_and_info(params: Params) -> tuple[Float[Array, ""], Info]:
            value, (_, info) = objective(objective_key, params, carry.state, batch)
            return value, info

        # optimisers refuse arguments that they do not know: L-BFGS this one, SAM all
        named = inspect.signature(optimizer.update).parameters
        takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in named.values())
        offered = {"value": loss, "grad": gradient, "value_fn": lambda params: value_and_info(params)[0]}
        offered = {name: value for name, value in offered.items() if name in named or takes_all}
        if "objective_fn" in named:
            offered["objective_fn"] = value_and_info
        try:
            updated, optimizer_state = descend(optimizer, gradient, carry.optimizer_state, carry.params, **offered)
        except JmetaError:
            raise
        except Exception as error:  # when traced, as that of lookahead, whose parameters are a pair of trees
            raise ConfigError(_unfit(error)) from error
        norm = optax.tree.norm(widened(gradient))
        new = TrainState(carry.key, carry.step + 1, updated, state, optimizer_state)
        leaves = [jnp.isfinite(x).all() for x in jax.tree.leaves(updated) if jnp.issubdtype(x.dtype, jnp.inexact)]
        finite = jnp.stack([jnp.isfinite(loss), jnp.isfinite(norm), *leaves]).all()
        kept = lax.cond(finite, lambda: new, lambda: carry)
        return kept, {**info, "loss": loss, "gradient_norm": norm}

    return step


def _draw(learner: MetaLearner, source: TaskSource, carry: TrainState, tasks: int) -> tuple[Key[Array, ""], Task]:
    """The key of the objective and the tasks of the next meta-step, collected."""
    sample_key, objective_key = jax.random.split(jax.random.fold_in(carry.key, carry.step))
    batch = jax.vmap(source.sample, in_axes=(0, None))(jax.random.split(sample_key, tasks), source.data)
    # `fold_in`, so that learners that collect nothing draw the numbers that they drew without it
    collect_key = jax.random.fold_in(objective_key, 0)
    return objective_key, learner.collect(collect_key, carry.params, carry.state, batch)


def _in_chunks(objective: Any, tasks: int, task_chunk: int | None) -> tuple[Any, Any]:
    """The objective as a mean over chunks of tasks, and its value and gradient, accumulated in a scan."""
    if task_chunk is not None and (task_chunk < 1 or tasks % task_chunk):
        raise ConfigError(f"task_chunk {task_chunk} does not divide {tasks} tasks; choose a divisor.")
    value_and_grad = jax.value_and_grad(objective, argnums=1, has_aux=True)

    def chunks_of(key: Key[Array, ""], batch: Task) -> tuple[Array, Task] | None:
        chunk = task_chunk or default_chunk(jax.tree.map(lambda x: x[0], batch), tasks)
        if chunk == tasks:
            return None
        chunks = tasks // chunk
        return jax.random.split(key, chunks), jax.tree.map(lambda x: x.reshape(chunks, chunk, *x.shape[1:]), batch)

    def averaged(key: Key[Array, ""], params: Params, state: State, batch: Task) -> Any:
        parts = chunks_of(key, batch)
        if parts is None:
            return objective(key, params, state, batch)

        @jax.checkpoint  # who differentiates this keeps one chunk at a time
        def one(_: None, key_and_chunk: tuple[Array, Task]) -> tuple[None, Any]:
            key, part = key_and_chunk
            return None, objective(key, params, state, part)

        return mean_over_tasks(lax.scan(one, None, parts)[1])

    def accumulated(key: Key[Array, ""], params: Params, state: State, batch: Task) -> Any:
        parts = chunks_of(key, batch)
        if parts is None:
            return value_and_grad(key, params, state, batch)
        chunks = len(parts[0])

        def add(total: PyTree, key_and_chunk: tuple[Array, Task]) -> tuple[PyTree, tuple[State, Info]]:
            key, part = key_and_chunk
            (loss, aux), gradient = value_and_grad(key, params, state, part)
            return jax.tree.map(lambda a, b: a + b / chunks, total, widened((loss, gradient))), aux

        first = jax.tree.map(lambda x: x[0], parts[1])
        (loss, _), gradient = jax.eval_shape(value_and_grad, key, params, state, first)
        zero = widened(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (loss, gradient)))
        (loss, total), aux = lax.scan(add, zero, parts)
        return (loss, mean_over_tasks(aux)), jax.tree.map(lambda x, like: x.astype(like.dtype), total, gradient)

    return averaged, accumulated


def _one_by_one(key: Key[Array, ""], batch: Task) -> tuple[Array, Task]:
    tasks = len(jax.tree.leaves(batch)[0])
    return jax.random.split(key, tasks), jax.tree.map(lambda x: x[:, None], batch)


def _of_finite_tasks(objective: Any) -> Any:
    """Value and gradient of an objective as the mean over those tasks of which both are finite; `info["kept"]`."""
    value_and_grad = jax.value_and_grad(objective, argnums=1, has_aux=True)

    def accumulated(key: Key[Array, ""], params: Params, state: State, batch: Task) -> Any:
        def add(total: PyTree, key_and_task: tuple[Array, Task]) -> tuple[PyTree, tuple[State, Info, Array]]:
            (loss, (new, info)), gradient = value_and_grad(key_and_task[0], params, state, key_and_task[1])
            leaves = [x for x in jax.tree.leaves((loss, gradient, new)) if jnp.issubdtype(x.dtype, jnp.inexact)]
            kept = jnp.stack([jnp.isfinite(x).all() for x in leaves]).all()
            part = widened((loss, gradient))
            return jax.tree.map(lambda a, b: jnp.where(kept, a + b, a), total, part), (new, info, kept)

        parts = _one_by_one(key, batch)
        (loss, _), gradient = jax.eval_shape(value_and_grad, key, params, state, jax.tree.map(lambda x: x[0], parts[1]))
        zero = widened(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (loss, gradient)))
        total, (states, info, kept) = lax.scan(add, zero, parts)
        # with no task left this is 0 / 0, which ends the run
        loss, total = jax.tree.map(lambda x: x / kept.sum(dtype=x.dtype), total)
        gradient = jax.tree.map(lambda x, like: x.astype(like.dtype), total, gradient)
        states, info = jax.tree.map(lambda x: _mean_of(kept, x), (states, dict(info)))
        return (loss, (states, {**info, "kept": kept})), gradient

    return accumulated


def _of_kept_tasks(objective: Any, kept: Bool[Array, "tasks"]) -> Any:
    """The objective as the mean over some tasks, for optimisers that ask for it again."""

    def averaged(key: Key[Array, ""], params: Params, state: State, batch: Task) -> Any:
        parts = _one_by_one(key, batch)
        shapes = jax.eval_shape(objective, key, params, state, jax.tree.map(lambda x: x[0], parts[1]))
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        def one(_: None, part: tuple[Array, Array, Task]) -> tuple[None, Any]:
            # the way not taken has no derivative, so that what is not finite in it stays there
            return None, lax.cond(part[0], lambda: objective(part[1], params, state, part[2]), lambda: zero)

        values = lax.scan(one, None, (kept, *parts))[1]
        return jax.tree.map(lambda x: _mean_of(kept, x), values)

    return averaged


def _mean_of(kept: Bool[Array, "tasks"], x: Array) -> Array:
    """The mean over the kept tasks of a floating leaf, the first of them of every other."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x[jnp.argmax(kept)]
    there = kept.reshape(-1, *(1 for _ in x.shape[1:]))
    return jnp.where(there, x, jnp.zeros_like(x)).sum(axis=0) / kept.sum(dtype=x.dtype)


_CHUNK_BYTES = 2**14


def default_chunk(task: Task, tasks: int) -> int:
    """All tasks on an accelerator; on CPU as many as keep the cache warm, which for images is one."""
    if jax.default_backend() != "cpu":
        return tasks
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(task))
    return next(k for k in range(tasks, 0, -1) if tasks % k == 0 and (k == 1 or k * size <= _CHUNK_BYTES))


def init(
    key: Key[Array, ""], learner: MetaLearner, optimizer: optax.GradientTransformation, source: TaskSource
) -> TrainState:
    """The `TrainState` before the first meta-step.

    Args:
        key: the key of the whole run.
        learner: the meta-learner.
        optimizer: the outer optimiser.
        source: where tasks come from; one is drawn for its shapes.

    Returns:
        θ and state drawn by `learner.init`, and a new optimiser state.

    Raises:
        ModelError: the model or the loss does not fit the tasks.

    Example:
        >>> import jax, jmeta, optax
        >>> learner = jmeta.maml(jmeta.linen(jmeta.MLP(outputs=1)), loss=jmeta.mean_squared_error)
        >>> train_state = jmeta.init(jax.random.key(0), learner, optax.adam(1e-3), jmeta.sinusoid())
        >>> int(train_state.step)
        0
    """
    init_key, sample_key, run_key = jax.random.split(key, 3)
    task = source.sample(sample_key, source.data)
    check_task(task)
    params, state = compiled(_init, nested=True)(init_key, task, learner=learner)
    with targets_needed() as needed:
        _check(learner, params, state, source)
    if needed:
        check_classes("support", task.support)
        check_classes("query", task.query)
    return TrainState(run_key, jnp.zeros((), jnp.int32), params, state, _start(optimizer, params))


def _start(optimizer: optax.GradientTransformation, params: Params) -> PyTree:
    try:
        return optimizer.init(params)
    except Exception as error:  # whatever an optimiser raises that wants other parameters
        raise ConfigError(_unfit(error)) from error


def _unfit(error: Exception) -> str:
    reason = " ".join(str(error).split()) or type(error).__name__
    return (
        f"the optimiser cannot update the parameters of the learner ({reason}); take one whose update takes them alone."
    )


def check_task(task: PyTree) -> None:
    """Raises `ModelError` where a source gives something else than tasks whose targets are rows."""
    if not isinstance(task, Task):
        raise ModelError(f"the source gives a {type(task).__name__}; let sample return jmeta.Task(support, query).")
    check_examples("support", task.support)
    check_examples("query", task.query)


def _check_state(
    train_state: Any, learner: MetaLearner, optimizer: optax.GradientTransformation, source: TaskSource
) -> None:
    """Raises `ConfigError` unless a `TrainState` is one of this learner and optimiser, before anything compiles."""
    if not isinstance(train_state, TrainState):
        inside = ": give its train_state" if isinstance(train_state, Fit) else ", as init or an earlier fit gives"
        raise ConfigError(f"train_state is a {type(train_state).__name__}; give a TrainState{inside}.")

    def start(key: Key[Array, ""], data: PyTree) -> tuple[PyTree, PyTree]:
        params, state = learner.init(key, source.sample(key, data))
        return (params, state), optimizer.init(train_state.params)

    wanted = jax.eval_shape(start, jax.random.key(0), source.data)
    given = ((train_state.params, train_state.state), train_state.optimizer_state)
    for what, here, there in zip(("learner or model", "optimiser"), wanted, given, strict=True):
        ours, theirs = (
            {path_name(p): f"{x.dtype}{list(x.shape)}" for p, x in jax.tree.leaves_with_path(tree)}
            for tree in (here, there)
        )
        for leaf in {**ours, **theirs}:
            if ours.get(leaf) != theirs.get(leaf):
                raise ConfigError(
                    f"train_state is of another {what}: it has {leaf} {theirs.get(leaf, 'missing')}, where this one "
                    f"has {ours.get(leaf, 'none')}; give the one that it was made with, or start from its parameters "
                    "by jmeta.init(...)._replace(params=...)."
                )
        if str(jax.tree.structure(here)) != str(jax.tree.structure(there)):
            raise ConfigError(
                f"train_state holds the right arrays of its {what} in other containers (as a FrozenDict for a dict); "
                "give the tree that jmeta.init gives."
            )


def check_counts(**counts: Any) -> None:
    """Raises `ConfigError` unless all are whole numbers of at least 1, or None."""
    for name, value in counts.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | np.integer)):
            raise ConfigError(f"{name} is {value}; give a whole number.")
        least = 0 if name == "steps" else 1
        if value is not None and value < least:
            raise ConfigError(f"{name} is {value}; give at least {least}.")


def check_concrete(name: str, help_: str, *trees: PyTree) -> None:
    """Raises `ConfigError` under `jit`, `vmap` and `grad`."""
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(trees)):
        raise ConfigError(f"{name} is a loop of Python, which jit, vmap and grad cannot look into; {help_}.")


def _init(key: Key[Array, ""], task: Task, *, learner: MetaLearner) -> tuple[Params, State]:
    return learner.init(key, task)


class Fit(NamedTuple):
    """The result of `fit`.

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
    key: Key[Array, ""],
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
) -> Fit:
    """Meta-trains a learner on tasks from a source.

    Runs a compiled scan of `log_every` meta-steps at a time, without host transfer inside; compiled once.

    Args:
        key: the same key gives the same result; without effect where `train_state` is given.
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

    Returns:
        The trained parameters and the history.

    Raises:
        ModelError: the model does not fit the tasks; before the meta-step compiles.
        ConfigError: a number of steps or tasks that is none, a `train_state` of another learner, model or optimiser, or
            a call under `jit` or `vmap`.
        NonFiniteError: loss, gradient or update became non-finite; it tells which part of it in which tasks and leaves,
            and carries the last finite `train_state`.

    Warns:
        ConvergenceWarning: the learner's info has `unconverged`, the share of tasks whose inner problem was not solved,
            and it is not 0.
        UserWarning: `train_state` is at `steps` already, so that nothing is left to do; or the first call of the
            callback returned `True`, as `update` of a tqdm bar does whenever it draws.

    Example:
        >>> import jax, jmeta
        >>> learner = jmeta.maml(jmeta.linen(jmeta.MLP(outputs=1)), inner_rate=0.01, loss=jmeta.mean_squared_error)
        >>> fitted = jmeta.fit(jax.random.key(0), learner, jmeta.sinusoid(), steps=20, tasks=4, log_every=10)
        >>> [row["step"] for row in fitted.history]
        [10, 20]
    """
    check_counts(steps=steps, tasks=tasks, log_every=log_every)
    help_ = "put jmeta.init and a jax.lax.scan of jmeta.make_step inside, for a run of many seeds"
    check_concrete("fit", help_, key, source.data, train_state)
    if train_state is None:
        train_state = init(key, learner, optimizer, source)
    else:
        _check_state(train_state, learner, optimizer, source)
    if (done := int(train_state.step)) >= steps > 0:
        warnings.warn(
            f"train_state is at step {done} and steps is {steps}, counted from the first of the run, so that nothing "
            f"is done; steps={done + steps} makes {steps} more.",
            stacklevel=2,
        )
    history: list[Metrics] = []
    while (begin := int(train_state.step)) < steps:
        train_state, info = compiled(_run)(
            train_state,
            source.data,
            jnp.asarray(steps, jnp.int32),
            learner=learner,
            optimizer=optimizer,
            sample=source.sample,
            tasks=tasks,
            task_chunk=task_chunk,
            length=log_every,
            skip_nonfinite=skip_nonfinite,
        )
        done = int(train_state.step)
        if done < min(begin + log_every, steps):
            why = diagnosis(learner, *_drawn(learner, source, train_state, tasks))
            raise NonFiniteError(f"the meta-step is not finite at step {done}: {why}.", done, train_state)
        means = {name: np.asarray(x, np.float64)[: done - begin].mean(axis=0).tolist() for name, x in info.items()}
        if means.get("unconverged", 0.0) > 0.0 and not any(row.get("unconverged") for row in history):
            warnings.warn(
                f"the inner problem did not converge in {means['unconverged']:.0%} of the tasks up to step {done}, so "
                "that the meta-gradient is wrong; take more inner steps, another rate, or a larger proximal term.",
                ConvergenceWarning,
                stacklevel=2,
            )
        metrics = {"step": done} | means | {"step": done}
        history.append(metrics)
        if callback is not None and _is_true(callback(train_state, metrics)):
            if len(history) == 1 and done < steps:
                warnings.warn(
                    f"the first call of the callback returned True, which stops the run at step {done} of {steps}; to "
                    "go on, let it return None.",
                    stacklevel=2,
                )
            break
    return Fit(train_state.params, train_state.state, history, train_state)


def _drawn(
    learner: MetaLearner, source: TaskSource, train_state: TrainState, tasks: int
) -> tuple[Key[Array, ""], Params, State, Task]:
    """What the next meta-step gives its objective."""
    key, batch = jax.jit(lambda carry, data: _draw(learner, source._replace(data=data), carry, tasks))(
        train_state, source.data
    )
    return key, train_state.params, train_state.state, batch


def _is_true(answer: Any) -> bool:
    """Whether it is a single true; what is only truthy, as a count of written characters, is not."""
    return isinstance(answer, bool | np.ndarray | np.generic | jax.Array) and (
        np.shape(answer) == () and np.asarray(answer).dtype == bool and bool(answer)
    )


def _run(
    train_state: TrainState,
    data: PyTree,
    steps: Int[Array, ""],
    *,
    learner: MetaLearner,
    optimizer: optax.GradientTransformation,
    sample: Callable[[Key[Array, ""], PyTree], Task],
    tasks: int,
    task_chunk: int | None,
    length: int,
    skip_nonfinite: bool = False,
) -> tuple[TrainState, Info]:
    @jax.jit  # traced once for its shapes and for the scan
    def step(carry: TrainState, data: PyTree) -> tuple[TrainState, Info]:
        source = TaskSource(data, sample, {})
        one = make_step(learner, optimizer, source, tasks=tasks, task_chunk=task_chunk, skip_nonfinite=skip_nonfinite)
        return one(carry, None)

    info = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(step, train_state, data)[1])

    def until_done(carry: TrainState, _: None) -> tuple[TrainState, Info]:
        # The last scan may be longer than what is left to do: skipping keeps one compiled program.
        return lax.cond(carry.step < steps, lambda: step(carry, data), lambda: (carry, info))

    return lax.scan(until_done, train_state, length=length)


def _check(learner: MetaLearner, params: Params, state: State, source: TaskSource) -> None:
    """Traces the meta-gradient without computing it, so that what does not fit is told before anything compiles."""
    reached = []

    @jax.custom_vjp
    def watched(params: Params) -> Params:
        return params

    def backward(_: None, cotangent: Params) -> tuple[Params]:
        reached.append(True)
        return (cotangent,)

    watched.defvjp(lambda params: (params, None), backward)

    def objective(params: Params, key: Key[Array, ""], data: PyTree) -> Array:
        task = source.sample(key, data)
        batch = learner.collect(key, params, state, jax.tree.map(lambda x: x[None], task))
        value = learner.objective(key, watched(params), state, batch)[0]
        if value.shape != ():
            raise ModelError(f"the objective has shape {list(value.shape)}; it must be a scalar: take the mean.")
        return value

    jax.eval_shape(jax.grad(objective), params, jax.random.key(0), source.data)
    if jax.tree.leaves(params) and not reached:  # a cotangent that is zero by construction is not passed on
        raise ModelError(
            "the objective does not depend on what the outer loop trains: its gradient is zero by construction; look "
            "for an unused argument, or for an adjoint that cuts the way to it."
        )
