"""Evaluation on unseen tasks: all episodes are one compiled program."""

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int, Key, PyTree

from jmeta.checks import check_concrete, check_counts, check_memory, check_task
from jmeta.compilation import compiled
from jmeta.core import MetaLearner, Params, State, Task, TaskSource, measured
from jmeta.devices import DIVIDED, Mesh, devices_of, gathered, on_mesh, over_devices, replicated
from jmeta.diagnosis import broken_part
from jmeta.errors import ConfigError, ModelError, NonFiniteError
from jmeta.losses import (
    Pooled,
    accuracy,
    are_classes,
    check_classes,
    expected_calibration_error,
    negative_log_likelihood,
    targets_needed,
)
from jmeta.metrics import interval
from jmeta.step import default_chunk

Metric = Callable[..., Any]


def evaluate(
    key: Key[Array, ""],
    learner: MetaLearner,
    params: Params,
    state: State,
    source: TaskSource,
    *,
    episodes: int = 600,
    task_chunk: int | None = None,
    metric: Metric | Mapping[str, Metric] = accuracy,
    details: bool = False,
    skip_nonfinite: bool = False,
    mesh: jax.sharding.Mesh | None = None,
) -> dict[str, Any]:
    """Adapts to unseen tasks and measures the answers to their queries.

    All episodes are one compiled program.

    Args:
        key: the same key gives the same episodes.
        learner: the meta-learner.
        params: θ.
        state: the learner's state.
        source: where test tasks come from.
        episodes: number of tasks; 600 is the custom of the field.
        task_chunk: how many tasks are adapted at a time. Default: as in `make_step`, at most 32.
        metric: `(outputs, targets) -> scalar`, one value for each task, or a `jmeta.Pooled`; default `jmeta.accuracy`,
            which brings `jmeta.negative_log_likelihood` and `jmeta.expected_calibration_error` with it. Several at
            once: a dict of them, or one that gives a dict of scalars.
        details: whether to tell which classes and rows are mistaken.
        skip_nonfinite: whether episodes with a metric that is not finite are left out and counted.
        mesh: devices over which the episodes are divided, `jax.make_mesh((8,), ("tasks",))`, any number of them; the
            episodes are the same. Default: one device.

    Returns:
        `{metric's name: mean over the episodes, "ci95": half the width of its 95 % interval (1.96 standard errors),
        "episodes", "transductive": whether one query's answer depends on the other queries (measured on one episode),
        and the protocol of the source ("ways", "shots", "queries")}`. Where it does, also `"alone"`, the mean over the
        same episodes where a query is asked alone (five in turn of each), and `"alone_ci95"`. What accuracy brings with
        it, and each of several metrics, has its own interval, `"negative_log_likelihood_ci95"`, and its own
        `"negative_log_likelihood_alone"`. With `skip_nonfinite`, `"skipped"` is the number of episodes left out. With
        `details`, `"details"` is a dict of `"confusion"`, `[classes, classes]`, how often a query of a class (row) was
        answered by a class (column), in the order of `source.names`; `"accuracy_by_class"`, None for a class that was
        not asked; and `"mistaken"`, the rows of the source's arrays that were ever mistaken, `{"row", "class", "asked",
        "wrong"}`, those that were wrong most often first.

    Raises:
        ModelError: the model does not fit the tasks, the metric not the targets (accuracy of a regression), or a metric
            gives more than one number a task.
        ConfigError: a metric that cannot be compiled, details of a source that tells no classes, or a mesh without an
            axis `tasks`.
        NonFiniteError: no episode is finite, of which `skip_nonfinite` shall leave out those that are not.

    Warns:
        UserWarning: an episode is not finite; the sentence names it, and the part of it where the data are not.

    Example:
        >>> import jax, jmeta
        >>> learner = jmeta.maml(jmeta.linen(jmeta.MLP(outputs=1)), inner_rate=0.01, loss=jmeta.mean_squared_error)
        >>> source = jmeta.sinusoid()
        >>> fitted = jmeta.fit(jax.random.key(0), learner, source, steps=10, tasks=4)
        >>> result = jmeta.evaluate(
        ...     jax.random.key(1), learner, fitted.params, fitted.state, source, episodes=20,
        ...     metric=jmeta.mean_squared_error,
        ... )
        >>> sorted(result)
        ['ci95', 'episodes', 'mean_squared_error', 'queries', 'shots', 'transductive']
    """
    if episodes < 2:
        raise ConfigError(f"episodes is {episodes}; give at least 2, as an interval needs.")
    main = getattr(metric, "__name__", "metric")
    metrics: dict[str, Metric] = dict(metric) if isinstance(metric, Mapping) else {main: metric}
    if metric is accuracy:  # of a classifier it is reported as well how sure it is
        metrics |= {one.__name__: one for one in (negative_log_likelihood, expected_calibration_error)}
    given = (key, learner, params, state, source, metrics)
    asked = partial(_found, *given, episodes=episodes, task_chunk=task_chunk, mesh=mesh)

    found = asked(details=details)
    if not (fits := np.asarray(found["fits"])).all():
        check_classes("query", _episode(key, source, episodes, int(np.argmin(fits))).query)
    finite = [np.isfinite(np.asarray(x, np.float64)) for x in jax.tree.leaves(found["values"])]
    kept = np.asarray(np.stack([x.reshape(episodes, -1).all(axis=1) for x in finite]).all(axis=0))
    if not kept.all():
        where = _not_finite(kept, lambda i: _episode(key, source, episodes, i))
        if skip_nonfinite and not kept.any():
            raise NonFiniteError(f"{where}; lower the inner rate, or repair θ.", 0, None)
        if not skip_nonfinite:
            warnings.warn(
                f"{where}; look at these data or lower the inner rate, or leave such episodes out by "
                "jmeta.evaluate(..., skip_nonfinite=True), which counts them.",
                stacklevel=2,
            )
    kept = kept if skip_nonfinite else np.ones(episodes, bool)

    def intervals(values: Mapping[str, PyTree]) -> dict[str, tuple[float, float]]:
        there = jax.tree.map(lambda x: np.asarray(x)[kept], values)
        return {name: interval(x, getattr(metrics.get(name), "summary", None)) for name, x in there.items()}

    results: dict[str, Any] = {}
    for name, (mean, half_width) in intervals(found["values"]).items():
        results |= {name: mean, "ci95" if name == main else f"{name}_ci95": half_width}
    with on_mesh(mesh) as inside:
        one = replicated(inside, (key, params, state, source.data))
        transductive = bool(compiled(_transductive)(*one, learner=learner, sample=source.sample))
    for name, (mean, half_width) in intervals(asked(alone=True)["values"]).items() if transductive else ():
        alone = "alone" if name == main else f"{name}_alone"
        results |= {alone: mean, f"{alone}_ci95": half_width}
    return {
        **results,
        "episodes": int(kept.sum()),
        **({"skipped": episodes - int(kept.sum())} if skip_nonfinite else {}),
        **source.protocol,
        "transductive": transductive,
        **({"details": _details(found["answers"], source)} if details else {}),
    }


def per_episode(
    key: Key[Array, ""],
    learner: MetaLearner,
    params: Params,
    state: State,
    source: TaskSource,
    metrics: Mapping[str, Metric],
    *,
    episodes: int,
    task_chunk: int | None = None,
) -> dict[str, PyTree]:
    """What `evaluate` averages.

    Args:
        key: as in `evaluate`.
        learner: as in `evaluate`.
        params: as in `evaluate`.
        state: as in `evaluate`.
        source: as in `evaluate`.
        metrics: of each task, by name; of a `jmeta.Pooled` its statistics.
        episodes: number of tasks.
        task_chunk: as in `evaluate`.

    Returns:
        The values of each metric `[episodes, ...]`.

    Raises:
        ModelError: the model does not fit the tasks, or a metric gives more than one number a task.
        ConfigError: a metric that cannot be compiled.
    """
    found = _found(key, learner, params, state, source, metrics, episodes=episodes, task_chunk=task_chunk)
    return dict(found["values"])


def _found(
    key: Key[Array, ""],
    learner: MetaLearner,
    params: Params,
    state: State,
    source: TaskSource,
    metrics: Mapping[str, Metric],
    *,
    episodes: int,
    task_chunk: int | None = None,
    alone: bool = False,
    details: bool = False,
    mesh: jax.sharding.Mesh | None = None,
) -> dict[str, Any]:
    """Of each episode the values of the metrics, whether its targets are what they need, and its answers."""
    check_counts(episodes=episodes, task_chunk=task_chunk)
    check_concrete("evaluate", "put adapt and predict of the learner inside", key, params, state, source.data)
    task = jax.eval_shape(source.sample, key, source.data)
    check_task(task)
    chunk = min(-(-episodes // devices_of(mesh)), task_chunk or default_chunk(task, 32))
    check_memory(task, chunk)
    with on_mesh(mesh) as mesh:
        found = compiled(_evaluate)(  # tracing tells what does not fit before anything compiles
            *replicated(mesh, (key, params, state, source.data)),
            learner=learner,
            sample=source.sample,
            episodes=episodes,
            chunk=chunk,
            metrics=tuple(metrics.items()),
            alone=alone,
            details=details,
            mesh=mesh,
        )
        return found if mesh is None else jax.tree.map(lambda x: x[:episodes], gathered(found))


def _episode(key: Key[Array, ""], source: TaskSource, episodes: int, i: int) -> Task:
    """The task of an episode of `evaluate`."""
    return jax.jit(source.sample)(jax.random.split(jax.random.split(key, episodes)[i], 3)[0], source.data)


def _not_finite(finite: np.ndarray, episode: Callable[[int], Task]) -> str:
    i = int(np.argmin(finite))
    part = broken_part(jax.tree.map(lambda x: x[None], episode(i)))
    because = f", where {part}" if part else ", though its data are"
    return f"{(~finite).sum()} of {len(finite)} episodes are not finite, the first of them episode {i}{because}"


_ALONE = 5  # queries of an episode that are asked alone; one by one they cost as much as all together


def _evaluate(
    key: Key[Array, ""],
    params: Params,
    state: State,
    data: PyTree,
    *,
    learner: MetaLearner,
    sample: Callable[[Key[Array, ""], PyTree], Task],
    episodes: int,
    chunk: int,
    metrics: tuple[tuple[str, Metric], ...],
    alone: bool,
    details: bool,
    mesh: Mesh | None,
) -> dict[str, Any]:
    def episode(key: Key[Array, ""], params: Params, state: State, data: PyTree) -> dict[str, Any]:
        sample_key, adapt_key, predict_key = jax.random.split(key, 3)
        task = sample(sample_key, data)
        adapted = learner.adapt(adapt_key, params, state, task.support)

        def answer(inputs: PyTree) -> PyTree:
            return learner.predict(predict_key, adapted, inputs)

        def answer_one(one: PyTree) -> PyTree:
            return jax.tree.map(lambda x: x[0], answer(jax.tree.map(lambda x: x[None], one)))

        if alone:
            n = len(jax.tree.leaves(task.query)[0])
            some = jax.tree.map(lambda x: x[:: max(1, n // _ALONE)], task.query)
            return {"values": _measured(metrics, lax.map(answer_one, some.inputs), some)}
        outputs = answer(task.query.inputs)
        with targets_needed() as needed:
            values = _measured(metrics, outputs, task.query)
        fits = are_classes(task.query.targets) if needed else jnp.asarray(True)
        return {"values": values, "fits": fits, "answers": _answers(outputs, task) if details else ()}

    def each(keys: Key[Array, "n"], given: tuple[Params, State, PyTree]) -> dict[str, Any]:
        return lax.map(lambda key: episode(key, *given), keys, batch_size=None if chunk == 1 else chunk)

    keys = jax.random.split(key, episodes)
    if missing := -episodes % devices_of(mesh):  # each device the same number: some again, of which nothing is read
        keys = keys[jnp.arange(episodes + missing) % episodes]
    return over_devices(mesh, each, DIVIDED)(keys, (params, state, data))


class _Answers(NamedTuple):
    """Of each query: its row, its class, the class or -1 and the column that was answered, whether it is there."""

    rows: Int[Array, "n"]
    classes: Int[Array, "n"]
    answered: Int[Array, "n"]
    column: Int[Array, "n"]
    there: Bool[Array, "n"]


def _answers(outputs: PyTree, task: Task) -> _Answers:
    query = task.query
    if isinstance(getattr(query, "classes", ()), tuple) or isinstance(query.rows, tuple):
        raise ConfigError(
            "details need the class and the row of each query, and the source does not tell them; let its sample give "
            "jmeta.Examples(..., classes=, rows=), as jmeta.from_arrays does."
        )
    column = outputs.argmax(axis=-1).astype(jnp.int32)
    told = [part for part in (task.support, query) if not isinstance(getattr(part, "classes", ()), tuple)]
    # which class each column of the targets means in this episode
    meant = jnp.stack([jnp.where(part.targets > 0, part.classes[:, None], -1).max(axis=0) for part in told]).max(axis=0)
    there = jnp.ones(len(query.rows), bool) if isinstance(query.mask, tuple) else query.mask
    return _Answers(query.rows, query.classes, meant[column], column, there)


def _details(answers: _Answers, source: TaskSource) -> dict[str, Any]:
    there = np.asarray(answers.there).reshape(-1)
    rows, classes, answered, column = (np.asarray(x).reshape(-1)[there] for x in answers[:4])
    if "classes" in source.protocol:  # columns mean the same in all tasks
        count, answered = source.protocol["classes"], column
    else:
        count = max(len(source.names), int(max(classes.max(), answered.max())) + 1)
    confusion = np.zeros((count, count), np.int64)
    np.add.at(confusion, (classes[answered >= 0], answered[answered >= 0]), 1)
    asked = np.bincount(classes, minlength=count)
    right = np.bincount(classes[classes == answered], minlength=count)
    each, place, times = np.unique(rows, return_inverse=True, return_counts=True)
    wrong = np.bincount(place.reshape(-1), weights=classes != answered, minlength=len(each)).astype(int)
    class_of = np.zeros(len(each), int)
    class_of[place.reshape(-1)] = classes
    order = np.lexsort((each, -wrong / times))
    return {
        "confusion": confusion.tolist(),
        "accuracy_by_class": [int(r) / int(n) if n else None for r, n in zip(right, asked, strict=True)],
        "mistaken": [
            {"row": int(each[i]), "class": int(class_of[i]), "asked": int(times[i]), "wrong": int(wrong[i])}
            for i in order
            if wrong[i]
        ],
    }


def _measured(metrics: tuple[tuple[str, Metric], ...], outputs: PyTree, query: PyTree) -> dict[str, PyTree]:
    """Each metric of one task by its name; one that gives a dict gives several."""
    values: dict[str, PyTree] = {}
    for name, metric in metrics:
        pooled = isinstance(metric, Pooled)
        try:
            value = measured(metric.statistics if isinstance(metric, Pooled) else metric, outputs, query)
        except (jax.errors.TracerArrayConversionError, jax.errors.ConcretizationTypeError) as error:
            raise ConfigError(
                f"the metric {name!r} cannot be compiled: it uses NumPy, float() or an `if` on values; write it with "
                "jax.numpy, and jnp.where for the `if`."
            ) from error
        new = value if isinstance(value, Mapping) and not pooled else {name: value}
        for part, x in new.items() if not pooled else ():
            if jnp.shape(x) != ():
                raise ModelError(
                    f"the metric {part!r} has shape {list(jnp.shape(x))}; give one number for a task: take the mean."
                )
        values |= new
    return values


def _transductive(
    key: Key[Array, ""],
    params: Params,
    state: State,
    data: PyTree,
    *,
    learner: MetaLearner,
    sample: Callable[[Key[Array, ""], PyTree], Task],
) -> Array:
    """Whether the answer to the first query changes when the other queries are replaced."""
    task, other = (sample(k, data) for k in jax.random.split(key))
    adapted = learner.adapt(key, params, state, task.support)
    mixed = jax.tree.map(lambda x, y: jnp.concatenate([x[:1], y[1:]]), task.query.inputs, other.query.inputs)
    before, after = (learner.predict(key, adapted, inputs) for inputs in (task.query.inputs, mixed))
    same = jax.tree.map(lambda a, b: jnp.allclose(a[0], b[0], rtol=1e-4, atol=1e-6, equal_nan=True), before, after)
    return ~jnp.stack(jax.tree.leaves(same)).all()
