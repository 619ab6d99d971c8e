"""Hyper-parameters as an axis: all cells of a grid are trained in one compiled program."""

import inspect
import itertools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Key, PyTree

from jmeta.core import Adapted, Info, Keys, MetaLearner, Params, State, Task, TaskSource
from jmeta.devices import seeds_of
from jmeta.errors import ConfigError, NonFiniteError, lookup
from jmeta.evaluate import Metric, evaluate
from jmeta.losses import accuracy
from jmeta.metrics import over_seeds_of
from jmeta.runs import pictures
from jmeta.step import TrainState
from jmeta.train import Metrics, fit, init

Cell = tuple[tuple[str, float | int], ...]  # the values of one cell, by name


class Row(NamedTuple):
    """One cell of a sweep; of many seeds, numbers of `last` are lists and arrays are `[seeds, ...]`.

    Args:
        values: the hyper-parameters, by name.
        last: the last row of the history.
        evaluation: what `evaluate` reports, of many seeds as with `seeds=`; NaN where an episode is not finite, empty
            where nothing was evaluated.
        params: θ.
        state: the learner's state.
    """

    values: Mapping[str, float]
    last: Metrics
    evaluation: Mapping[str, Any]
    params: Params
    state: State


class Sweep(NamedTuple):
    """The result of `sweep`.

    Args:
        rows: one for each cell, the last hyper-parameter changing fastest.
        metric: the name of what was evaluated, or `"loss"`.
    """

    rows: list[Row]
    metric: str

    def results(self) -> list[tuple[float, float]]:
        """The metric of each row and half of its 95 % interval, which the loss does not have: NaN."""
        if self.metric == "loss":
            return [(float(np.mean(row.last["loss"])), math.nan) for row in self.rows]
        return [(row.evaluation[self.metric], row.evaluation["ci95"]) for row in self.rows]

    def table(self) -> str:
        """A line for each cell, in Markdown: its values, the steps that it made, its last loss and its result."""
        header = [*self.rows[0].values, "step", "loss", *([] if self.metric == "loss" else [self.metric])]
        lines = [header, ["---"] * len(header)]
        for row, (mean, half) in zip(self.rows, self.results(), strict=True):
            result = [] if self.metric == "loss" else [f"{mean:.4g} ± {half:.2g}"]
            step, loss = int(np.min(row.last["step"])), float(np.mean(row.last["loss"]))
            lines.append([*(f"{value:g}" for value in row.values.values()), str(step), f"{loss:.4g}", *result])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def plot(self, file: str | Path) -> None:
        """Draws the results against the first hyper-parameter, a line for each value of the others.

        Args:
            file: where the picture goes.
        """
        pictures.sweep(Path(file), [row.values for row in self.rows], self.results(), self.metric)


def sweep(
    make_learner: Callable[..., MetaLearner],
    values: Mapping[str, Sequence[float | int]],
    key: Keys,
    source: TaskSource,
    *,
    optimizer: optax.GradientTransformation = optax.adam(1e-3),
    steps: int = 1000,
    evaluation_source: TaskSource | None = None,
    evaluation_key: Key[Array, ""] | None = None,
    episodes: int = 600,
    metric: Metric = accuracy,
    make_tester: Callable[..., MetaLearner] | None = None,
    mesh: jax.sharding.Mesh | None = None,
    **options: Any,
) -> Sweep:
    """Trains a learner with each value of some hyper-parameters, all in one compiled program.

    Every cell begins with the θ and sees the tasks of its own run `jmeta.fit(key, make_learner(**values), ...)`, and
    has its numbers.

    Args:
        make_learner: `(**values) -> MetaLearner`; inside the program it is given traced numbers, so that what decides
            shapes or the number of inner steps is no axis.
        values: numbers by the argument of `make_learner`; of several lists all combinations.
        key: as in `fit`; with keys `[seeds]` each cell is trained with all seeds.
        source: where training tasks come from.
        optimizer: as in `fit`.
        steps: as in `fit`.
        evaluation_source: where the tasks of `evaluate` come from, as a rule those for validation. Default: none.
        evaluation_key: of `evaluate`. Default: `jax.random.key(1)`.
        episodes: of `evaluate`.
        metric: of `evaluate`, one.
        make_tester: the learner that is evaluated, as one of more inner steps. Default: `make_learner`.
        mesh: as in `fit`; all cells and seeds together are its seeds.
        options: of `fit`: `tasks`, `task_chunk`, `log_every`, ...

    Returns:
        A row for each cell, a table and a plot.

    Raises:
        ConfigError: no values, a name that `make_learner` does not take, a value that is no number or that the learner
            refuses, or a hyper-parameter that decides what is compiled.
        NonFiniteError: no cell stayed finite.

    Warns:
        UserWarning: a cell stopped, as its meta-step was not finite; the others went on.

    Example:
        >>> import functools, jax, jmeta
        >>> model = jmeta.linen(jmeta.MLP(outputs=1))
        >>> make = functools.partial(jmeta.maml, model, loss=jmeta.mean_squared_error)
        >>> swept = jmeta.sweep(
        ...     make, {"inner_rate": [0.001, 0.01]}, jax.random.key(0), jmeta.sinusoid(), steps=10, tasks=4
        ... )
        >>> [row.values["inner_rate"] for row in swept.rows]
        [0.001, 0.01]
    """
    if "train_state" in options:
        raise ConfigError("a sweep begins anew; leave train_state away.")
    if steps < 1:
        raise ConfigError(f"steps is {steps}; give at least 1.")
    cells, seeds = _cells(make_learner, values), seeds_of(key)
    keys = key[None] if seeds is None else key
    # of each cell as in its own run, which tells what the learner refuses before anything is traced
    starts = [init(keys, make_learner(**dict(cell)), optimizer, source) for cell in cells]
    start: TrainState = jax.tree.map(lambda *x: jnp.concatenate(x), *starts)
    which = jnp.repeat(jnp.arange(len(cells), dtype=jnp.int32), len(keys))
    start = start._replace(state={"cell": which, "state": start.state})
    learner = _of_all(make_learner, cells)
    everyone = jnp.concatenate([keys] * len(cells))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="the meta-step is not finite")  # told below by its values
            given: dict[str, Any] = {"optimizer": optimizer, "steps": steps, "train_state": start, "mesh": mesh}
            fitted = fit(everyone, learner, source, **given, **options)
    except NonFiniteError as error:
        raise NonFiniteError(f"no cell of the sweep is finite: {error}", error.step, error.train_state) from error
    except (jax.errors.ConcretizationTypeError, jax.errors.JAXTypeError) as error:
        raise ConfigError(
            f"a learner cannot be made of traced numbers, of which {', '.join(values)} is one: it decides what is "
            "compiled, as a number of inner steps does; fit a learner for each of its values."
        ) from error
    results: list[dict[str, Any]] = [{}] * len(everyone)
    if evaluation_source is not None:
        tester, n = _of_all(make_tester or make_learner, cells), len(everyone)
        ask: dict[str, Any] = {"episodes": episodes, "metric": metric, "seeds": n, "mesh": mesh}
        unseen = jax.random.key(1) if evaluation_key is None else evaluation_key
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".* episodes of seed")  # their result is NaN
            results = evaluate(unseen, tester, fitted.params, fitted.state, evaluation_source, **ask)["results"]
    name = "loss" if evaluation_source is None else getattr(metric, "__name__", "metric")
    rows = []
    for i, cell in enumerate(cells):
        own = slice(i * len(keys), (i + 1) * len(keys))
        part: Any = own.start if seeds is None else own
        last = _last(fitted.history, range(len(everyone))[own])
        last = {column: x[0] if seeds is None else x for column, x in last.items()}
        evaluated = results[own.start] if seeds is None or not results[0] else over_seeds_of(results[own], name)
        params, state = jax.tree.map(lambda x: x[part], (fitted.params, fitted.state["state"]))  # noqa: B023
        rows.append(Row(dict(cell), last, evaluated, params, state))
    _tell_stopped(rows, int(np.max(fitted.train_state.step)))
    return Sweep(rows, name)


def _cells(make_learner: Callable[..., MetaLearner], values: Mapping[str, Sequence[float | int]]) -> tuple[Cell, ...]:
    taken = inspect.signature(make_learner).parameters
    if not values:
        raise ConfigError('there is nothing to sweep over; give values by name, as {"inner_rate": [0.1, 0.2]}.')
    for name, column in values.items():
        if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in taken.values()):
            lookup(taken, name, "argument of make_learner")
        numbers = all(isinstance(x, int | float | np.number) and not isinstance(x, bool) for x in column)
        if not len(column) or not numbers:
            raise ConfigError(f"the values of {name} are {list(column)}; give a list of numbers.")
    columns = {name: np.asarray(column).tolist() for name, column in values.items()}  # of one type each
    return tuple(tuple(zip(columns, row, strict=True)) for row in itertools.product(*columns.values()))


def _of_all(make_learner: Callable[..., MetaLearner], cells: tuple[Cell, ...]) -> MetaLearner:
    """The learner of all cells, whose state tells of which one it is."""

    def of(state: State) -> MetaLearner:
        columns = {name: [dict(cell)[name] for cell in cells] for name, _ in cells[0]}
        return make_learner(**{name: _chosen(state["cell"], column) for name, column in columns.items()})

    def init(key: Key[Array, ""], task: Task) -> tuple[Params, State]:
        state = {"cell": jnp.zeros((), jnp.int32)}
        params, inner = of(state).init(key, task)
        return params, {**state, "state": inner}

    def adapt(key: Key[Array, ""], params: Params, state: State, support: PyTree) -> Adapted:
        adapted = of(state).adapt(key, params, state["state"], support)
        return adapted._replace(state={"cell": state["cell"], "state": adapted.state})

    def predict(key: Key[Array, ""], adapted: Adapted, inputs: PyTree) -> PyTree:
        return of(adapted.state).predict(key, adapted._replace(state=adapted.state["state"]), inputs)

    def objective(keys: Keys, params: Params, state: State, tasks: Task) -> tuple[Array, tuple[State, Info]]:
        value, (inner, info) = of(state).objective(keys, params, state["state"], tasks)
        return value, ({"cell": state["cell"], "state": inner}, info)

    def collect(keys: Keys, params: Params, state: State, tasks: Task) -> Task:
        return of(state).collect(keys, params, state["state"], tasks)

    return MetaLearner(init, adapt, predict, objective, collect)


def _chosen(cell: Array, column: Sequence[float | int]) -> Array:
    """The number of a cell, as free in its type as one of Python."""
    return lax.select_n(cell, *(jnp.asarray(x) for x in column))


def _last(history: Sequence[Metrics], which: range) -> dict[str, Any]:
    """Of some runs the last row in which each made a step."""
    ends = [max((k for k, row in enumerate(history) if not np.isnan(row["loss"][i])), default=-1) for i in which]
    return {name: [history[k][name][i] for k, i in zip(ends, which, strict=True)] for name in history[-1]}


def _tell_stopped(rows: Sequence[Row], steps: int) -> None:
    stopped = [row for row in rows if np.min(row.last["step"]) < steps]
    if stopped:
        words = (f"{', '.join(f'{name} {x:g}' for name, x in row.values.items())}" for row in stopped)
        warnings.warn(
            f"the meta-step is not finite, so that these stopped before step {steps}: {'; '.join(words)}.", stacklevel=3
        )
