"""What is told before anything compiles: tasks, numbers, parameters and memory that do not fit."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import Array, Key, PyTree

from jmeta.compilation import memory
from jmeta.core import MetaLearner, Params, State, Task, TaskSource, check_examples
from jmeta.errors import ConfigError, ModelError
from jmeta.step import TrainState
from jmeta.tree import leaf_shapes


def check_task(task: PyTree) -> None:
    """Raises `ModelError` where a source gives something else than tasks whose targets are rows."""
    if not isinstance(task, Task):
        raise ModelError(f"the source gives a {type(task).__name__}; let sample return jmeta.Task(support, query).")
    check_examples("support", task.support)
    check_examples("query", task.query)


def check_memory(task: PyTree, tasks: int) -> None:
    """Raises `ConfigError` where the data of so many tasks alone are more than the machine has."""
    needed = tasks * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(task) if hasattr(x, "dtype"))
    there = memory()
    if there is not None and needed > there:
        raise ConfigError(
            f"{tasks} tasks at a time need {needed / 2**30:,.1f} GB for their examples alone, and this machine has "
            f"{there / 2**30:,.1f} GB; ask for fewer shots, queries or tasks at a time (tasks= of jmeta.fit, "
            "task_chunk= of jmeta.evaluate)."
        )


def check_state(
    train_state: Any,
    learner: MetaLearner,
    optimizer: optax.GradientTransformation,
    source: TaskSource,
    seeds: int | None = None,
) -> None:
    """Raises `ConfigError` unless a `TrainState` is one of this learner and optimiser, before anything compiles."""
    if not isinstance(train_state, TrainState):
        inside = (
            ": give its train_state" if hasattr(train_state, "train_state") else ", as init or an earlier fit gives"
        )
        raise ConfigError(f"train_state is a {type(train_state).__name__}; give a TrainState{inside}.")
    shape = np.shape(train_state.step)
    if shape != (() if seeds is None else (seeds,)):
        of, keys = (f"{shape[0]} seeds" if shape else "one seed"), "one key" if seeds is None else f"{seeds} keys"
        raise ConfigError(f"train_state is of {of}, and there is {keys}; give as many keys as it has seeds.")
    if seeds is not None:
        train_state = jax.eval_shape(lambda tree: jax.tree.map(lambda x: x[0], tree), train_state)

    def start(key: Key[Array, ""], data: PyTree, trained: Params) -> tuple[PyTree, PyTree]:
        params, state = learner.init(key, source.sample(key, data))
        return (params, state), optimizer.init(trained)

    wanted = jax.eval_shape(start, jax.random.key(0), source.data, train_state.params)
    given = ((train_state.params, train_state.state), train_state.optimizer_state)
    for what, here, there in zip(("learner or model", "optimiser"), wanted, given, strict=True):
        ours, theirs = leaf_shapes(here), leaf_shapes(there)
        start_anew = "leave train_state away to start anew"
        if what == "optimiser":
            start_anew = "start from its parameters by jmeta.init(...)._replace(params=...)"
        for leaf in {**ours, **theirs}:
            if ours.get(leaf) != theirs.get(leaf):
                raise ConfigError(
                    f"train_state is of another {what}: it has {leaf} {theirs.get(leaf, 'missing')}, where this one "
                    f"has {ours.get(leaf, 'none')}; give the {what} that it was made with, or {start_anew}."
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


@contextlib.contextmanager
def _a_key_for_each() -> Iterator[None]:
    """Raises `ModelError` where a learner splits or draws from the keys of the tasks as if they were one."""
    try:
        yield
    except ValueError as error:
        if "accepts a single key" not in str(error):
            raise
        raise ModelError(
            "the objective or collect of the learner takes the keys of its tasks, [tasks], for a single one; write it "
            "for one task, jmeta.over_tasks(one_task), or give each task its own under jax.vmap."
        ) from error


def check_gradient(learner: MetaLearner, params: Params, state: State, source: TaskSource) -> None:
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
        keys, task = jax.tree.map(lambda x: x[None], (key, source.sample(key, data)))
        with _a_key_for_each():
            batch = learner.collect(keys, params, state, task)
            value = learner.objective(keys, watched(params), state, batch)[0]
        if value.shape != ():
            raise ModelError(f"the objective has shape {list(value.shape)}; it must be a scalar: take the mean.")
        return value

    jax.eval_shape(jax.grad(objective), params, jax.random.key(0), source.data)
    if jax.tree.leaves(params) and not reached:  # a cotangent that is zero by construction is not passed on
        raise ModelError(
            "the objective does not depend on what the outer loop trains: its gradient is zero by construction; look "
            "for an unused argument, or for an adjoint that cuts the way to it."
        )
