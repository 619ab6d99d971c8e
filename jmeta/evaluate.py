"""Evaluation on unseen tasks: all episodes are one compiled program."""

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Key, PyTree

from jmeta.checks import check_concrete, check_counts, check_memory, check_task
from jmeta.compilation import compiled
from jmeta.core import MetaLearner, Params, State, Task, TaskSource, measured
from jmeta.details import answers_of, details_of
from jmeta.devices import (
    DIVIDED,
    Mesh,
    check_seeds,
    devices_of,
    divided,
    gathered,
    on_mesh,
    over_devices,
    over_seeds,
    replicated,
)
from jmeta.diagnosis import broken_part
from jmeta.errors import ConfigError, ModelError, NonFiniteError
from jmeta.feed import data_of, fed_episodes
from jmeta.losses import (
    Pooled,
    accuracy,
    are_classes,
    check_classes,
    expected_calibration_error,
    negative_log_likelihood,
    targets_needed,
)
from jmeta.metrics import interval, over_seeds_of
from jmeta.open_set import Certainty, check_unknown, max_logit, rejection_metrics, with_unknown
from jmeta.step import default_chunk
from jmeta.tree import part_of, path_name

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
    open_set: Any = False,
    certainty: Certainty = max_logit,
    skip_nonfinite: bool = False,
    seeds: int | None = None,
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
        open_set: whether an episode is asked as many queries again that are of none of its classes: True for those of
            the other classes of the source, or inputs `[n, ...]` that are of no class at all. A transductive learner
            sees them among the others.
        certainty: of the outputs, by which such queries shall be rejected; `jmeta.max_logit` or
            `jmeta.max_probability`.
        skip_nonfinite: whether episodes with a metric that is not finite are left out and counted.
        seeds: that `params` and `state` are of so many seeds, `[seeds, ...]`, as `fit` gives of as many keys; all of
            them see the same episodes. Default: of one, without an axis.
        mesh: devices over which the episodes are divided, `jax.make_mesh((8,), ("tasks",))`, any number of them; the
            episodes are the same. The seeds are divided over an axis `seeds`. Default: one device.

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

        With `open_set`, `"auroc"` is how often a query of a class is more certain than one of none, `"fpr95"` the share
        of those of none that are accepted where 95 % of the others are, and `"threshold"` the certainty where that is,
        the mean over the episodes; accuracy is of the queries of a class.

        Of many seeds, `"results"` is a list of all this for each; beside it each number stands as the mean over the
        seeds, with half the width of its 95 % interval over the seeds (Student's t), and `"seeds"`, their number.

    Raises:
        ModelError: the model does not fit the tasks, the metric not the targets (accuracy of a regression), or a metric
            gives more than one number a task.
        ConfigError: a metric that cannot be compiled, details of a source that tells no classes, a mesh without an axis
            `tasks`, or parameters that are not of so many seeds.
        NonFiniteError: no episode of a seed is finite, of which `skip_nonfinite` shall leave out those that are not.

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
    if open_set is not False:
        source, metrics = with_unknown(source, open_set), metrics | rejection_metrics(certainty)
    _check_seeds(seeds, (params, state))
    given = (key, learner, params, state, source, metrics)
    asked = partial(_found, *given, episodes=episodes, task_chunk=task_chunk, seeds=seeds, mesh=mesh)

    found = asked(details=details)
    if open_set is not False:
        check_unknown(found["values"])
    if not (fits := np.asarray(found["fits"]).reshape(-1, episodes)[0]).all():  # of each seed alike
        check_classes("query", _episode(key, source, episodes, int(np.argmin(fits))).query)
    with on_mesh(mesh, seeds) as inside:
        own = divided(inside, seeds, (params, state))
        whole = replicated(inside, (key, data_of(source, jax.random.split(key))))
        static: dict[str, Any] = {"learner": learner, "sample": source.sample, "seeds": seeds, "mesh": inside}
        transductive = bool(np.any(compiled(_transductive)(own, whole, **static)))
    alone = asked(alone=True)["values"] if transductive else {}

    def result(seed: int) -> dict[str, Any]:
        values, answers = part_of(seed, seeds, (found["values"], found["answers"]))
        of = "" if seeds is None else f" of seed {seed}"
        kept = _kept(values, episodes, skip_nonfinite, of, lambda i: _episode(key, source, episodes, i))

        def intervals(values: Mapping[str, PyTree]) -> dict[str, tuple[float, float]]:
            there = jax.tree.map(lambda x: np.asarray(x)[kept], values)
            return {name: interval(x, getattr(metrics.get(name), "summary", None)) for name, x in there.items()}

        results: dict[str, Any] = {}
        for name, (mean, half_width) in intervals(values).items():
            results |= {name: mean, "ci95" if name == main else f"{name}_ci95": half_width}
        for name, (mean, half_width) in intervals(part_of(seed, seeds, alone)).items():
            by_itself = "alone" if name == main else f"{name}_alone"
            results |= {by_itself: mean, f"{by_itself}_ci95": half_width}
        return {
            **results,
            "episodes": int(kept.sum()),
            **({"skipped": episodes - int(kept.sum())} if skip_nonfinite else {}),
            **source.protocol,
            "transductive": transductive,
            **({"details": details_of(answers, source)} if details else {}),
        }

    return result(0) if seeds is None else over_seeds_of([result(i) for i in range(seeds)], main)


def _check_seeds(seeds: int | None, tree: PyTree) -> None:
    check_counts(seeds=seeds)
    for path, x in jax.tree.leaves_with_path(tree) if seeds is not None else ():
        if jnp.shape(x)[:1] != (seeds,):
            raise ConfigError(
                f"seeds is {seeds}, and {path_name(path[1:]) or 'a leaf'!r} has the shape {list(jnp.shape(x))}; give "
                "params and state as jmeta.fit gives them of so many keys."
            )


def _kept(values: PyTree, episodes: int, skip_nonfinite: bool, of: str, episode: Callable[[int], Task]) -> np.ndarray:
    """Which episodes count; tells those that are not finite."""
    finite = [np.isfinite(np.asarray(x, np.float64)) for x in jax.tree.leaves(values)]
    kept = np.asarray(np.stack([x.reshape(episodes, -1).all(axis=1) for x in finite]).all(axis=0))
    if not kept.all():
        where = _not_finite(kept, of, episode)
        if skip_nonfinite and not kept.any():
            raise NonFiniteError(f"{where}; lower the inner rate, or repair θ.", 0, None)
        if not skip_nonfinite:
            warnings.warn(
                f"{where}; look at these data or lower the inner rate, or leave such episodes out by "
                "jmeta.evaluate(..., skip_nonfinite=True), which counts them.",
                stacklevel=4,
            )
    return kept if skip_nonfinite else np.ones(episodes, bool)


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
    mesh: jax.sharding.Mesh | None = None,
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
        mesh: as in `evaluate`.

    Returns:
        The values of each metric `[episodes, ...]`.

    Raises:
        ModelError: the model does not fit the tasks, or a metric gives more than one number a task.
        ConfigError: a metric that cannot be compiled.
    """
    given = (key, learner, params, state, source, metrics)
    found = _found(*given, episodes=episodes, task_chunk=task_chunk, mesh=mesh)
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
    seeds: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> dict[str, Any]:
    """Of each episode the values of the metrics, whether its targets are what they need, and its answers."""
    check_counts(episodes=episodes, task_chunk=task_chunk)
    check_concrete("evaluate", "put adapt and predict of the learner inside", key, params, state, source.data)
    task = jax.eval_shape(source.sample, key, source.data)
    check_task(task)
    chunk = min(-(-episodes // devices_of(mesh, seeds)), task_chunk or default_chunk(task, 32))
    check_memory(task, chunk * (seeds or 1))
    check_seeds(mesh, seeds)
    found: list[dict[str, Any]] = []
    with on_mesh(mesh, seeds) as mesh, fed_episodes(source, key, episodes, chunk, mesh, seeds) as parts:
        own = divided(mesh, seeds, (params, state))
        for whole in parts:
            jax.block_until_ready(found[-1:])  # so that no more chunks than two lie on the device
            found.append(
                compiled(_evaluate)(  # tracing tells what does not fit before anything compiles
                    own,
                    whole,
                    learner=learner,
                    sample=source.sample,
                    chunk=chunk,
                    metrics=tuple(metrics.items()),
                    alone=alone,
                    details=details,
                    seeds=seeds,
                    mesh=mesh,
                )
            )
        wanted = (slice(episodes),) if seeds is None else (slice(None), slice(episodes))
        return jax.tree.map(lambda *x: np.concatenate(x, len(wanted) - 1)[wanted], *gathered(found))


def _episode(key: Key[Array, ""], source: TaskSource, episodes: int, i: int) -> Task:
    """The task of an episode of `evaluate`."""
    sample_key = jax.random.split(jax.random.split(key, episodes)[i], 3)[0]
    return jax.jit(source.sample)(sample_key, data_of(source, sample_key[None]))


def _not_finite(finite: np.ndarray, of: str, episode: Callable[[int], Task]) -> str:
    i = int(np.argmin(finite))
    part = broken_part(jax.tree.map(lambda x: x[None], episode(i)))
    because = f", where {part}" if part else ", though its data are"
    return f"{(~finite).sum()} of {len(finite)} episodes{of} are not finite, the first of them episode {i}{because}"


_ALONE = 5  # queries of an episode that are asked alone; one by one they cost as much as all together


def _evaluate(
    own: tuple[Params, State],
    whole: tuple[Key[Array, "n"], PyTree],
    *,
    learner: MetaLearner,
    sample: Callable[[Key[Array, ""], PyTree], Task],
    chunk: int,
    metrics: tuple[tuple[str, Metric], ...],
    alone: bool,
    details: bool,
    seeds: int | None,
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
        return {"values": values, "fits": fits, "answers": answers_of(outputs, task) if details else ()}

    def each(keys: Key[Array, "n"], given: tuple[Params, State, PyTree]) -> dict[str, Any]:
        return lax.map(lambda key: episode(key, *given), keys, batch_size=None if chunk == 1 else chunk)

    def of_seed(mesh: Mesh | None, own: tuple[Params, State], whole: tuple[Key[Array, "n"], PyTree]) -> dict[str, Any]:
        keys, data = whole
        return over_devices(mesh, each, DIVIDED)(keys, (*own, data))

    return over_seeds(mesh, seeds, of_seed)(own, whole)


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
    own: tuple[Params, State],
    whole: tuple[Key[Array, ""], PyTree],
    *,
    learner: MetaLearner,
    sample: Callable[[Key[Array, ""], PyTree], Task],
    seeds: int | None,
    mesh: Mesh | None,
) -> Array:
    """Whether the answer to the first query changes when the other queries are replaced."""

    def of_seed(_: Mesh | None, own: tuple[Params, State], whole: tuple[Key[Array, ""], PyTree]) -> Array:
        (params, state), (key, data) = own, whole
        task, other = (sample(k, data) for k in jax.random.split(key))
        adapted = learner.adapt(key, params, state, task.support)
        mixed = jax.tree.map(lambda x, y: jnp.concatenate([x[:1], y[1:]]), task.query.inputs, other.query.inputs)
        before, after = (learner.predict(key, adapted, inputs) for inputs in (task.query.inputs, mixed))
        same = jax.tree.map(lambda a, b: jnp.allclose(a[0], b[0], rtol=1e-4, atol=1e-6, equal_nan=True), before, after)
        return ~jnp.stack(jax.tree.leaves(same)).all()

    return over_seeds(mesh, seeds, of_seed)(own, whole)
