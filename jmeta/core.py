"""The contract of jmeta: a task, a model, a meta-learner, a source of tasks.

Everything is a pure function of pytrees. A batch of tasks is a `Task` with a leading task axis on every leaf, and
`over_tasks` is the only place that knows this axis: a learner is written for one task.
"""

import inspect
from collections.abc import Callable, Generator, Mapping
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from jmeta.errors import ModelError
from jmeta.tree import path_name, widened

Params: TypeAlias = PyTree
State: TypeAlias = PyTree
Info = Mapping[str, Array]
Mask: TypeAlias = Bool[Array, "n"] | None


class Examples(NamedTuple):
    """Labelled examples of one task.

    Args:
        inputs: `[ways * shots, ...]`, sorted by class.
        targets: `[ways * shots, ways]` one-hot for classification, so that the shape carries the number of ways;
            `[shots, outputs]` for regression. A row of zeros is an example without a label, a column of zeros a class
            that has no example.
        descriptions: side information of a support, `[ways, ...]`: attributes, an embedding, token ids of the text
            that describes each class, images of similar classes, or a dictionary of these; zeros say nothing. A class
            without an example is known by its description alone, which is zero-shot learning. Default: none.
        mask: `[ways * shots]`, which rows are there; the others fill up the shape, so that tasks of different ways and
            shots share one compiled program, and change no answer: normalisation, losses, adaptation and metrics leave
            them away. Default: all are there.
        classes: `[ways * shots]`, the number of each example's class among all classes of the source, and
        rows: `[ways * shots]`, its row in the arrays that the source was made from: what `evaluate(details=True)`
            reports; no learner looks at them. Default: not told.
    """

    inputs: PyTree
    targets: PyTree
    descriptions: PyTree = ()
    mask: Bool[Array, "n"] | tuple[()] = ()
    classes: Int[Array, "n"] | tuple[()] = ()
    rows: Int[Array, "n"] | tuple[()] = ()


class Task(NamedTuple):
    """One episode: what a learner adapts to, and what it is asked afterwards.

    Args:
        support: everything that `adapt` may see, as a rule `Examples`.
        query: what it may not see, as a rule `Examples`.
    """

    support: PyTree
    query: PyTree


class Apply(Protocol):
    """The second function of a `Model`."""

    def __call__(
        self, key: Key[Array, ""], params: Params, state: State, inputs: PyTree, *, train: bool
    ) -> tuple[PyTree, State]: ...


class Model(NamedTuple):
    """A network as two pure functions; `jmeta.linen(module)` makes one from a Flax module.

    Args:
        init: `(key, inputs) -> (params, state)`; `state` holds what is not trained by gradient. Its entries
            `"batch_stats"`, moving averages over training, and `"task_stats"`, statistics of one support, tell a
            learner how the network wants to see its examples, see `jmeta.embedded`.
        apply: `(key, params, state, inputs, *, train, mask=None) -> (outputs, state)`; `train` is true on what the
            network learns from and false on what it answers. `mask` says which rows of the inputs are there; it is
            given for tasks that have one alone, so that a network without statistics over rows need not take it.
    """

    init: Callable[[Key[Array, ""], PyTree], tuple[Params, State]]
    apply: Apply


class Adapted(NamedTuple):
    """What `adapt` learned from one support set.

    Args:
        params: φ, the adapted parameters: all that `predict` needs.
        state: the model's state after the support set.
        info: what a person may want to read (inner losses, a residual); scalars or small arrays.
        optimiser_state: of the inner optimiser, for who goes on from φ. Default: none.
    """

    params: PyTree
    state: State
    info: Info
    optimiser_state: PyTree = ()


Keys: TypeAlias = Key[Array, "..."]  # one for each task, or a single one, which `keys_of` splits
KeysOf = Callable[[int], Keys]  # of the tasks of a step
Objective = Callable[[Keys, Params, State, Task], tuple[Float[Array, ""], tuple[State, Info]]]


def _as_they_are(keys: Keys, params: Params, state: State, tasks: Task) -> Task:
    return tasks


class MetaLearner(NamedTuple):
    """A learner of learners as four pure functions: the whole public contract.

    Args:
        init: `(key, task) -> (params, state)`: θ, which the outer optimiser trains, and a state that is carried.
        adapt: `(key, params, state, support) -> Adapted`: one task, sees the support only.
        predict: `(key, adapted, inputs) -> outputs`: one task.
        objective: `(keys, params, state, tasks) -> (scalar, (state, info))`: a batch of tasks and a key for each, so
            that what a task draws does not depend on those beside it; what `jax.grad` differentiates in θ.
            `jmeta.over_tasks` makes it from that of one task, and splits a single key where it is given one.
        collect: `(keys, params, state, tasks) -> tasks`: what the objective gets in place of a batch of tasks, drawn
            once a step at the θ before the update: trajectories, in reinforcement learning. Default: the tasks.
    """

    init: Callable[[Key[Array, ""], Task], tuple[Params, State]]
    adapt: Callable[[Key[Array, ""], Params, State, PyTree], Adapted]
    predict: Callable[[Key[Array, ""], Adapted, PyTree], PyTree]
    objective: Objective
    collect: Callable[[Keys, Params, State, Task], Task] = _as_they_are


class Feed(Protocol):
    """What gives the data of tasks by their keys, where not all data lie on the device; `jmeta.stream` has one."""

    def load(self, keys: Keys) -> PyTree:
        """The data that `sample` finds the tasks of these keys in, `[tasks]`."""

    def fits(self, tasks: int) -> int:
        """How many steps of so many tasks may lie on the device at a time."""

    def chunks(self, keys_of: KeysOf, steps: range, tasks: int, length: int, mesh: Any) -> Generator[PyTree]:
        """The data of `length` steps after `length` steps, the next read while the last is in use.

        `keys_of` gives the keys of the tasks of a step, each device of the mesh gets those of its own tasks.
        """


class TaskSource(NamedTuple):
    """A distribution over tasks.

    Args:
        data: the arrays that tasks are cut from, an explicit argument of the compiled step; closed over, they would
            become constants inside the program.
        sample: `(key, data) -> Task`, pure, runs on the device inside the compiled step.
        protocol: what the tasks are (`ways`, `shots`, `queries`, ...); stands in every result.
        names: the description of each class, in the order of the class index; empty where classes have none.
        feed: what gives `fit` and `evaluate` the data of the tasks to come, chunk by chunk, in place of `data`, which
            then holds those of one task, for its shapes. Default: `data` are all data.
    """

    data: PyTree
    sample: Callable[[Key[Array, ""], PyTree], Task]
    protocol: Mapping[str, Any]
    names: tuple[str, ...] = ()
    feed: Feed | None = None

    def __repr__(self) -> str:  # without its arrays, which may be a whole data set
        return f"TaskSource({', '.join(f'{name}={value!r}' for name, value in self.protocol.items())})"


def episodic(
    init: Callable[[Key[Array, ""], Task], tuple[Params, State]],
    adapt: Callable[[Key[Array, ""], Params, State, PyTree], Adapted],
    predict: Callable[[Key[Array, ""], Adapted, PyTree], PyTree],
    loss: Callable[[PyTree, PyTree], Float[Array, ""]],
) -> MetaLearner:
    """A `MetaLearner` from three functions of one task and a loss.

    The objective is the mean over a batch of tasks `i` of `loss(predict(adapt(θ, supportᵢ), queryᵢ))`.

    Args:
        init: `(key, task) -> (params, state)`.
        adapt: `(key, params, state, support) -> Adapted`.
        predict: `(key, adapted, inputs) -> outputs`.
        loss: `(outputs, targets) -> scalar`, the outer loss on the queries of one task; for tasks with a mask it takes
            `mask=` as well.

    Returns:
        The learner; see `over_tasks` for its state and info after a batch.

    Example:
        >>> import jax, jax.numpy as jnp, jmeta
        >>> learner = jmeta.episodic(  # predicts the mean of the support targets plus a learned offset
        ...     init=lambda key, task: (jnp.zeros(()), ()),
        ...     adapt=lambda key, params, state, support: jmeta.Adapted(params + support.targets.mean(), state, {}),
        ...     predict=lambda key, adapted, inputs: jnp.broadcast_to(adapted.params, inputs.shape),
        ...     loss=jmeta.mean_squared_error,
        ... )
        >>> source = jmeta.sinusoid(shots=5)
        >>> params, state = learner.init(jax.random.key(0), source.sample(jax.random.key(1), source.data))
        >>> params.shape
        ()
    """

    def checked_adapt(key: Key[Array, ""], params: Params, state: State, support: PyTree) -> Adapted:
        check_examples("support", support)
        return adapt(key, params, state, support)

    def one_task(
        key: Key[Array, ""], params: Params, state: State, task: Task
    ) -> tuple[Float[Array, ""], tuple[State, Info]]:
        adapt_key, predict_key = jax.random.split(key)
        adapted = checked_adapt(adapt_key, params, state, task.support)
        outputs = predict(predict_key, adapted, task.query.inputs)
        return measured(loss, outputs, task.query), (adapted.state, adapted.info)

    return MetaLearner(init, checked_adapt, predict, over_tasks(one_task))


def has_statistics(state: State, kind: str) -> bool:
    """Whether the state of a network holds statistics of a kind, `"batch_stats"` or `"task_stats"`."""
    return any(kind in path_name(path).split("/") for path, _ in jax.tree.leaves_with_path(state))


def outputs_of(
    model: Model, key: Key[Array, ""], params: Params, state: State, examples: Any, *, train: bool
) -> tuple[PyTree, State]:
    """The outputs of a network for examples, of which rows outside of the mask do not count, and its state after it.

    Args:
        model: the network.
        key: for its random parts.
        params: of the network.
        state: of the network.
        examples: `Examples`, or whatever has `inputs`.
        train: as in `Model`.

    Returns:
        `(outputs, state)`.
    """
    mask = getattr(examples, "mask", ())
    given = {} if isinstance(mask, tuple) else {"mask": mask}
    return model.apply(key, params, state, examples.inputs, train=train, **given)


def measured(measure: Callable[..., Any], outputs: Any, examples: Any) -> Any:
    """A loss or metric of the outputs for examples, of which rows outside of the mask do not count.

    Args:
        measure: `(outputs, targets) -> scalar`, or `(outputs, targets, mask=) -> scalar` for tasks with a mask.
        outputs: `[n, ...]`.
        examples: `Examples`, or whatever has `targets`.

    Returns:
        Its value.

    Raises:
        ModelError: the examples have a mask, and `measure` takes none.

    Example:
        >>> import jax.numpy as jnp, jmeta
        >>> from jmeta.core import measured
        >>> padded = jmeta.Examples((), jnp.ones((2, 1)), mask=jnp.asarray([True, False]))
        >>> float(measured(jmeta.mean_squared_error, jnp.asarray([[1.0], [9.0]]), padded))
        0.0
    """
    mask = getattr(examples, "mask", ())
    if isinstance(mask, tuple):
        return measure(outputs, examples.targets)
    parameters = inspect.signature(measure).parameters.values()
    if not any(p.name == "mask" or p.kind is p.VAR_KEYWORD for p in parameters):
        name = getattr(measure, "__name__", "the loss")
        raise ModelError(
            f"the tasks have rows that are not there, and {name} takes no mask; let it take `mask=` and leave those "
            "rows away, as jmeta.mean_squared_error does."
        )
    return measure(outputs, examples.targets, mask=mask)


def over_tasks(one_task: Objective) -> Objective:
    """The objective of a batch of tasks from that of one task: the only place that knows the task axis.

    Args:
        one_task: `(key, params, state, task) -> (scalar, (state, info))`.

    Returns:
        The same of a batch of tasks, with a key for each or one to split: the mean of the scalars. The state after a
        batch is the mean over tasks of each floating leaf, which for moving averages is the moving average of the mean
        statistics; other leaves are taken from the first task. `info` holds the mean over tasks of each entry.

    Example:
        >>> import jax, jax.numpy as jnp, jmeta
        >>> objective = jmeta.over_tasks(lambda key, params, state, task: (params * task.query, (state, {})))
        >>> float(objective(jax.random.key(0), jnp.ones(()), (), jmeta.Task((), jnp.arange(4.0)))[0])
        1.5
    """

    def objective(key: Keys, params: Params, state: State, tasks: Task) -> tuple[Float[Array, ""], tuple[State, Info]]:
        keys = keys_of(key, tasks)
        losses, (states, info) = jax.vmap(one_task, in_axes=(0, None, None, 0))(keys, params, state, tasks)
        return widened(losses).mean(), (mean_over_tasks(states), mean_over_tasks(info))

    return objective


def keys_of(key: Keys, tasks: PyTree) -> Key[Array, "tasks"]:
    """A key for each task of a batch: those that are given, or those that a single one is split into."""
    single = 0 if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else 1  # axes of a key, of the old kind one
    return key if key.ndim > single else jax.random.split(key, len(jax.tree.leaves(tasks)[0]))


def check_examples(name: str, examples: PyTree) -> None:
    """Raises `ModelError` where `Examples` have integer labels for targets, as elsewhere is the custom, or lists."""
    if not isinstance(examples, Examples) or isinstance(examples.targets, tuple):
        return
    if isinstance(examples.targets, list) or isinstance(examples.inputs, list):
        raise ModelError(f"inputs or targets of the {name} are a list; give arrays: jnp.asarray(...).")
    shape, dtype = jnp.shape(examples.targets), jnp.result_type(examples.targets)
    whole = not jnp.issubdtype(dtype, jnp.inexact)
    if len(shape) == 1 or (whole and len(shape) == 2 and shape[1] == 1):
        labels = "targets" if len(shape) == 1 else "targets[:, 0]"
        help_ = f"one-hot rows, jax.nn.one_hot({labels}, ways)" if whole else "[n, outputs], targets[:, None]"
        kind = "integer labels" if whole else "of shape"
        raise ModelError(f"the targets of the {name} are {kind} {list(shape)}; give {help_}.")


def check_model(model: Any) -> None:
    """Raises `ModelError` unless it is a `Model`; a Flax module has functions of the same names and other contracts."""
    if not isinstance(model, Model):
        raise ModelError(
            f"the model is a {type(model).__name__}; wrap it: jmeta.linen(module), or jmeta.nnx, jmeta.equinox or "
            "jmeta.haiku, makes a Model of it."
        )


def mean_over_tasks(tree: PyTree) -> PyTree:
    """The mean over the leading task axis of each floating leaf; the first task's entry of every other leaf."""
    return jax.tree.map(lambda x: x.mean(axis=0) if jnp.issubdtype(x.dtype, jnp.floating) else x[0], tree)
