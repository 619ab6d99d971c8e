"""One meta-step, from sampling to update, as a function for `jax.lax.scan`."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from jmeta.core import Info, Keys, MetaLearner, Params, State, Task, TaskSource, mean_over_tasks
from jmeta.devices import DIVIDED, WHOLE, Mesh, averaged, over_devices, sharded, share
from jmeta.errors import ConfigError, JmetaError
from jmeta.inner import descend
from jmeta.tree import widened


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
    mesh: Mesh | None = None,
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
        mesh: a mesh with an axis `tasks`, over whose devices the tasks are divided. Each device draws, adapts and
            differentiates its own, and the mean of all updates θ, which lies on each of them: the numbers are those of
            one device, up to the order of sums. Over an axis `model`, an Auto one, θ is divided. Default: one device.

    Returns:
        `(TrainState, _) -> (TrainState, info)`; `info` has `loss`, `gradient_norm` and the learner's own.

    Raises:
        ConfigError: `task_chunk` does not divide `tasks`, or those of a device; a mesh without an axis `tasks`, or
            whose devices do not divide them; a stream, whose chunks only `fit` and `evaluate` ask for.

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
    if source.feed is not None:
        raise ConfigError("make_step takes no stream, whose data come in chunks; give it to jmeta.fit.")
    objective, value_and_gradient = _divided(learner.objective, tasks, task_chunk, skip_nonfinite, mesh)

    def step(carry: TrainState, _: Any) -> tuple[TrainState, Info]:
        keys, batch = draw(learner, source, carry, tasks, mesh)
        here = (carry.params, carry.state)
        ((loss, (state, info)), gradient), kept = value_and_gradient((keys, batch), here)
        gradient = jax.tree.map(lambda x, like: x.astype(like.dtype), gradient, carry.params)
        if skip_nonfinite:
            info = {**info, "skipped": tasks - kept.sum(dtype=jnp.float32)}

        def value_and_info(params: Params) -> tuple[Float[Array, ""], Info]:
            value, (_, info) = objective((keys, batch, kept), (params, carry.state))
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
            raise ConfigError(unfit(error)) from error
        norm = optax.tree.norm(widened(gradient))
        new = TrainState(carry.key, carry.step + 1, updated, state, optimizer_state)
        leaves = [jnp.isfinite(x).all() for x in jax.tree.leaves(updated) if jnp.issubdtype(x.dtype, jnp.inexact)]
        finite = jnp.stack([jnp.isfinite(loss), jnp.isfinite(norm), *leaves]).all()
        kept = sharded(mesh, lax.cond(finite, lambda: new, lambda: carry))
        return kept, {**info, "loss": loss, "gradient_norm": norm}

    return step


def draw(
    learner: MetaLearner, source: TaskSource, carry: TrainState, tasks: int, mesh: Mesh | None = None
) -> tuple[Keys, Task]:
    """The tasks of the next meta-step, collected, and a key for the objective of each."""
    sample_keys, collect_keys, keys = keys_of_step(carry.key, carry.step, tasks)

    def collected(keys: tuple[Keys, Keys], given: tuple[Params, State, PyTree]) -> Task:
        params, state, data = given
        batch = jax.vmap(source.sample, in_axes=(0, None))(keys[0], data)
        return learner.collect(keys[1], params, state, batch)

    collect = over_devices(mesh, collected, DIVIDED)
    return keys, collect((sample_keys, collect_keys), (carry.params, carry.state, source.data))


def keys_of_step(key: Key[Array, ""], step: Int[Array, ""] | int, tasks: int) -> tuple[Keys, Keys, Keys]:
    """The keys of each task of a meta-step: to sample it, to collect, and for the objective."""
    sample_key, objective_key = jax.random.split(jax.random.fold_in(key, step))
    # `fold_in`, so that learners that collect nothing draw the numbers that they drew without it
    of_each = (sample_key, jax.random.fold_in(objective_key, 0), objective_key)
    sample_keys, collect_keys, keys = (jax.random.split(key, tasks) for key in of_each)
    return sample_keys, collect_keys, keys


def _divided(
    objective: Any, tasks: int, task_chunk: int | None, skip_nonfinite: bool, mesh: Mesh | None
) -> tuple[Any, Any]:
    """The objective as a mean over all tasks, and its value and gradient with which of the tasks it is the mean of."""
    own = share(mesh, tasks)
    if task_chunk is not None and (task_chunk < 1 or own % task_chunk):
        of = "" if mesh is None else " of each device"
        raise ConfigError(f"task_chunk {task_chunk} does not divide {own} tasks{of}; choose a divisor.")
    chunked, chunked_gradient = _in_chunks(objective, own, task_chunk)
    finite, finite_gradient = _of_kept_tasks(objective), _of_finite_tasks(objective)

    def value(part: tuple[Keys, Task, Array], here: tuple[Params, State]) -> Any:
        keys, batch, kept = part
        if skip_nonfinite:
            return averaged(finite(kept, keys, *here, batch), kept.sum())
        return averaged(chunked(keys, *here, batch), 1)

    def value_and_gradient(part: tuple[Keys, Task], here: tuple[Params, State]) -> Any:
        keys, batch = part
        if skip_nonfinite:
            values, kept = finite_gradient(keys, *here, batch)
            return averaged(values, kept.sum()), kept
        return averaged(chunked_gradient(keys, *here, batch), 1), jnp.ones(len(keys), bool)

    # the gradient is taken on each device and then averaged; that of the value is taken from outside
    return over_devices(mesh, value, WHOLE), over_devices(mesh, value_and_gradient, (WHOLE, DIVIDED))


def _in_chunks(objective: Any, tasks: int, task_chunk: int | None) -> tuple[Any, Any]:
    """The objective as a mean over chunks of tasks, and its value and gradient, accumulated in a scan."""
    value_and_grad = jax.value_and_grad(objective, argnums=1, has_aux=True)

    def chunks_of(keys: Keys, batch: Task) -> tuple[Keys, Task] | None:
        chunk = task_chunk or default_chunk(jax.tree.map(lambda x: x[0], batch), tasks)
        return None if chunk == tasks else _in_parts(tasks // chunk, keys, batch)

    def mean(keys: Keys, params: Params, state: State, batch: Task) -> Any:
        parts = chunks_of(keys, batch)
        if parts is None:
            return objective(keys, params, state, batch)

        @jax.checkpoint  # who differentiates this keeps one chunk at a time
        def one(_: None, part: tuple[Keys, Task]) -> tuple[None, Any]:
            return None, objective(part[0], params, state, part[1])

        return mean_over_tasks(lax.scan(one, None, parts)[1])

    def accumulated(keys: Keys, params: Params, state: State, batch: Task) -> Any:
        parts = chunks_of(keys, batch)
        if parts is None:
            return value_and_grad(keys, params, state, batch)
        chunks = len(parts[0])

        def add(total: PyTree, part: tuple[Keys, Task]) -> tuple[PyTree, tuple[State, Info]]:
            (loss, aux), gradient = value_and_grad(part[0], params, state, part[1])
            return jax.tree.map(lambda a, b: a + b / chunks, total, widened((loss, gradient))), aux

        first_keys, first = jax.tree.map(lambda x: x[0], parts)
        (loss, _), gradient = jax.eval_shape(value_and_grad, first_keys, params, state, first)
        zero = widened(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (loss, gradient)))
        (loss, total), aux = lax.scan(add, zero, parts)
        return (loss, mean_over_tasks(aux)), jax.tree.map(lambda x, like: x.astype(like.dtype), total, gradient)

    return mean, accumulated


def _in_parts(parts: int, keys: Keys, batch: Task) -> tuple[Keys, Task]:
    """Keys and tasks, divided into parts along a new leading axis."""
    return jax.tree.map(lambda x: x.reshape(parts, len(x) // parts, *x.shape[1:]), (keys, batch))


def _of_finite_tasks(objective: Any) -> Any:
    """Value and gradient of an objective, summed over those tasks of which both are finite, and which those are."""
    value_and_grad = jax.value_and_grad(objective, argnums=1, has_aux=True)

    def accumulated(keys: Keys, params: Params, state: State, batch: Task) -> Any:
        def add(total: PyTree, part: tuple[Keys, Task]) -> tuple[PyTree, tuple[State, Info, Array]]:
            (loss, (new, info)), gradient = value_and_grad(part[0], params, state, part[1])
            leaves = [x for x in jax.tree.leaves((loss, gradient, new)) if jnp.issubdtype(x.dtype, jnp.inexact)]
            kept = jnp.stack([jnp.isfinite(x).all() for x in leaves]).all()
            more = widened((loss, gradient))
            return jax.tree.map(lambda a, b: jnp.where(kept, a + b, a), total, more), (new, info, kept)

        parts = _in_parts(len(keys), keys, batch)
        one_key, one_task = jax.tree.map(lambda x: x[0], parts)
        (loss, _), gradient = jax.eval_shape(value_and_grad, one_key, params, state, one_task)
        zero = widened(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (loss, gradient)))
        total, (states, info, kept) = lax.scan(add, zero, parts)
        # with no task left the mean is 0 / 0, which ends the run
        loss, gradient = total
        return ((loss, jax.tree.map(lambda x: _sum_of(kept, x), (states, info))), gradient), kept

    return accumulated


def _of_kept_tasks(objective: Any) -> Any:
    """The objective, summed over some tasks, for optimisers that ask for it again."""

    def summed(kept: Bool[Array, "tasks"], keys: Keys, params: Params, state: State, batch: Task) -> Any:
        parts = _in_parts(len(keys), keys, batch)
        one_key, one_task = jax.tree.map(lambda x: x[0], parts)
        shapes = jax.eval_shape(objective, one_key, params, state, one_task)
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        def one(_: None, part: tuple[Array, Keys, Task]) -> tuple[None, Any]:
            # the way not taken has no derivative, so that what is not finite in it stays there
            return None, lax.cond(part[0], lambda: objective(part[1], params, state, part[2]), lambda: zero)

        values = lax.scan(one, None, (kept, *parts))[1]
        return jax.tree.map(lambda x: _sum_of(kept, x), values)

    return summed


def _sum_of(kept: Bool[Array, "tasks"], x: Array) -> Array:
    """The sum over the kept tasks of a floating leaf, the first of them of every other."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x[jnp.argmax(kept)]
    there = kept.reshape(-1, *(1 for _ in x.shape[1:]))
    return jnp.where(there, x, jnp.zeros_like(x)).sum(axis=0)


_CHUNK_BYTES = 2**14


def default_chunk(task: Task, tasks: int) -> int:
    """All tasks on an accelerator; on CPU as many as keep the cache warm, which for images is one."""
    if jax.default_backend() != "cpu":
        return tasks
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(task))
    return next(k for k in range(tasks, 0, -1) if tasks % k == 0 and (k == 1 or k * size <= _CHUNK_BYTES))


def unfit(error: Exception) -> str:
    """What is said of an optimiser that wants other parameters."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return (
        f"the optimiser cannot update the parameters of the learner ({reason}); take one whose update takes them alone."
    )
