"""Where a number that is not finite came from, told before any advice."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jmeta.core import Keys, MetaLearner, Params, State, Task, keys_of
from jmeta.tree import path_name, widened


def diagnosis(learner: MetaLearner, key: Keys, params: Params, state: State, tasks: Task) -> str:
    """Which part of a meta-step is not finite, in which tasks and leaves, and what helps: two halves of a sentence.

    Looks, in this order, at the tasks, at θ, and task by task at the inner loss, the loss and the gradient; what is
    finite in all of them was made infinite by the update.

    Args:
        learner: the meta-learner.
        key: of the objective, for each task or to split.
        params: θ before the step.
        state: the learner's state before the step.
        tasks: the batch that `collect` gave, with its leading task axis.

    Returns:
        `"the part; the advice"`.

    Example:
        >>> import jax, jax.numpy as jnp, jmeta
        >>> from jmeta.diagnosis import diagnosis
        >>> learner = jmeta.maml(jmeta.linen(jmeta.MLP(outputs=1)), inner_rate=0.01, loss=jmeta.mean_squared_error)
        >>> source = jmeta.sinusoid()
        >>> task = source.sample(jax.random.key(0), source.data)
        >>> params, state = learner.init(jax.random.key(1), task)
        >>> tasks = jax.tree.map(lambda x: x[None] * jnp.nan, task)
        >>> diagnosis(learner, jax.random.key(2), params, state, tasks).partition(":")[0]
        "'support/inputs' of task 0 is not finite"
    """
    keys = keys_of(key, tasks)
    if part := broken_part(tasks):
        return f"{part}; repair the data, or leave such tasks out by skip_nonfinite=True"
    for name, tree in (("θ", params), ("the state", state)):
        for path, leaf in jax.tree.leaves_with_path(tree):
            if _broken(leaf) is not None:
                return f"{name} is not finite before the step, first {_leaf(path, leaf)}; {_lower('outer')}"

    if without := _ids_without_a_row(params, tasks):
        return without

    @jax.jit
    def one(key: Keys, task: Task) -> Any:
        key, batch = jax.tree.map(lambda x: x[None], (key, task))
        return jax.value_and_grad(learner.objective, argnums=1, has_aux=True)(key, params, state, batch)

    found: dict[str, list[int]] = {}
    words: dict[str, str] = {}

    def note(part: str, task: int, detail: str) -> None:
        found.setdefault(part, []).append(task)
        words.setdefault(part, detail)

    for i in range(len(keys)):
        (loss, (_, info)), gradient = one(*jax.tree.map(lambda x: x[i], (keys, tasks)))  # noqa: B023
        inner = _broken(info["inner_loss"]) if "inner_loss" in info else None
        leaf = next((_leaf(p, x) for p, x in jax.tree.leaves_with_path(gradient) if _broken(x) is not None), None)
        if inner is not None:
            step = f" from inner step {inner[-1]} on" if inner else ""
            note("the inner loss", i, f"{step}; {_lower('inner')}")
        elif not bool(jnp.isfinite(loss)):
            note("the loss of the queries", i, f", though the inner loss is; {_lower('inner')}, or the outer one")
        elif leaf is not None:
            advice = "look for a root, a norm or a logarithm of 0, which has no derivative, or lower the outer rate"
            note("the gradient", i, f", though the loss is, first {leaf}; {advice}")
    for part in ("the inner loss", "the loss of the queries", "the gradient"):
        if part in found:
            which = f"task {found[part][0]}" if len(found[part]) == 1 else f"{len(found[part])} tasks"
            return f"{part} of {which} of {len(keys)} is not finite{words[part]}"
    low = [_leaf(p, x) for p, x in jax.tree.leaves_with_path(params) if x.dtype.itemsize < 4]
    where = f", as can be in low precision: {low[0]}" if low else ""
    return f"loss and gradient of each task are finite, and their mean or the update is not{where}; {_lower('outer')}"


def broken_part(tasks: Task) -> str | None:
    """Where the data of a batch of tasks are not finite, or None: `"'query/inputs' of task 3 is not finite: ..."`.

    The row is that of the arrays that the source was made from, where it tells it.
    """
    for path, leaf in jax.tree.leaves_with_path(tasks):
        broken = _broken(leaf)
        if broken is not None:
            row = f", row {_row(tasks, path, broken)}" if len(broken) > 1 else ""
            return f"{path_name(path)!r} of task {broken[0]} is not finite: entry {list(broken)}{row}"
    return None


def _row(tasks: Task, path: Any, broken: tuple[int, ...]) -> int:
    """The row of the user's arrays, where the source tells it, or that of the task."""
    examples = getattr(tasks, path[0].name, None) if hasattr(path[0], "name") else None
    rows = getattr(examples, "rows", ())
    return broken[1] if isinstance(rows, tuple) else int(rows[broken[:2]])


def _ids_without_a_row(params: Params, tasks: Task) -> str | None:
    """The sentence on token ids beyond the rows of an embedding, whose output is NaN; None where there are none."""
    names = ("vectors", "embedding")  # of TextEncoder and of flax.linen.Embed
    tables = [
        (p, x) for p, x in jax.tree.leaves_with_path(params) if path_name(p).split("/")[-1] in names and x.ndim == 2
    ]
    for path, leaf in jax.tree.leaves_with_path(tasks):
        values = np.asarray(widened(leaf))
        if (
            path_name(path).split("/")[-1] in ("targets", "classes", "rows")
            or values.size == 0
            or (values % 1 != 0).any()
        ):
            continue
        for table, rows in tables:
            if values.max() >= len(rows) and len(tables) == 1:
                return (
                    f"{path_name(path)!r} has the id {int(values.max())}, and the table {path_name(table)!r} of the "
                    f"model has {len(rows)} rows; give the network as many rows (buckets) as there are ids"
                )
    return None


def _lower(rate: str) -> str:
    return f"lower the {rate} rate"


def _broken(leaf: Array) -> tuple[int, ...] | None:
    """The place of the first entry that is not finite; `()` of a scalar."""
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return None
    places = np.argwhere(~np.isfinite(np.asarray(widened(leaf))))
    return tuple(int(k) for k in places[0]) if len(places) else None


def _leaf(path: Any, leaf: Array) -> str:
    precision = f" ({leaf.dtype}, whose largest number is {float(jnp.finfo(leaf.dtype).max):.3g})"
    return f"{path_name(path)!r}" + (precision if leaf.dtype.itemsize < 4 else "")
