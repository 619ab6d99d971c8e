"""Every group of rows is a task: a user, a patient, a machine."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, Num

from jmeta.core import Examples, Task, TaskSource
from jmeta.data.episodes import Size, span, spans
from jmeta.data.sampling import choose_rows, keep
from jmeta.errors import DataError
from jmeta.inputs import as_array, as_seen, stored


class GroupData(NamedTuple):
    """The arrays that tasks are cut from, rows sorted by group.

    Args:
        inputs: `[rows, ...]`.
        targets: `[rows, outputs]`, one-hot for classification.
        first: `[groups]`, the first row of each group.
        count: `[groups]`, the number of rows of each group.
        rows: `[rows]`, where each row lay in the arrays as they were given.
    """

    inputs: Num[Array, "rows ..."]
    targets: Float[Array, "rows outputs"]
    first: Int[Array, "groups"]
    count: Int[Array, "groups"]  # type: ignore[assignment]
    rows: Int[Array, "rows"]


def from_groups(
    inputs: np.ndarray | Array,
    targets: np.ndarray | Array | Sequence[float],
    groups: np.ndarray | Sequence[int] | Sequence[str],
    *,
    shots: Size = 5,
    queries: Size = 10,
    classes: int | None = None,
    min_rows: int | None = None,
    ordered: bool = False,
) -> TaskSource:
    """Tasks from rows that belong to groups: each group is a task, as a user whose taste is to be learned.

    A task draws one group uniformly and `shots + queries` of its rows without replacement: support and query are
    disjoint rows of one group. Targets mean the same in all groups, unlike the classes of `from_arrays`.

    Shots and queries may be ranges; then each task draws how many, as far as its group has rows. All tasks keep the
    shape of the largest, and an example that is not there is outside of the mask.

    Args:
        inputs: `[n, ...]`, which tasks hold as `jmeta.as_inputs` says.
        targets: `[n]` or `[n, outputs]` floats for a regression; `[n]` integers from 0 for a classification, which
            become one-hot.
        groups: `[n]`, the group of each row: integers or names.
        shots: support rows of a task, or `(least, most)`.
        queries: query rows of a task, or `(least, most)`.
        classes: how many classes there are, the same for each part of the data that may lack some. Default: one more
            than the largest target, and none may be missing.
        min_rows: groups with fewer rows are dropped; `protocol["dropped"]` says how many. Default: a group that is too
            small is an error.
        ordered: whether rows are in the order of time, so that the support of a task comes before its queries.

    Returns:
        A source of tasks whose `support` is `Examples([shots, ...], [shots, outputs])` and whose `query` is
        `Examples([queries, ...], [queries, outputs])`; `names` holds the groups.

    Raises:
        DataError: arrays of different length, values that are not finite, classes that are not numbered from 0, a row
            without a group, or a group with fewer rows than the least `shots + queries`.

    Example:
        >>> import jax, jmeta, numpy as np
        >>> x = np.random.default_rng(0).normal(size=(60, 3))
        >>> source = jmeta.from_groups(x, x.sum(axis=1), np.repeat(["ann", "bob", "eve"], 20), shots=5, queries=10)
        >>> task = source.sample(jax.random.key(0), source.data)
        >>> task.support.inputs.shape, task.query.targets.shape
        ((5, 3), (10, 1))
    """
    inputs, targets, groups = stored(as_array(inputs)), np.asarray(targets), np.asarray(groups)
    is_class = targets.ndim == 1 and targets.dtype.kind in "ui"
    targets = _targets(targets, classes)
    (least_shots, shots), (least_queries, queries) = span("shots", shots), span("queries", queries)
    for name, value in (("shots", least_shots), ("queries", least_queries)):
        if value < 1:
            raise DataError(f"{name} is {value}; give at least 1.")
    if groups.ndim != 1 or not len(inputs) == len(targets) == len(groups):
        raise DataError(
            f"there are {len(inputs)} inputs, {len(targets)} targets and groups of shape {list(groups.shape)}; give "
            "one target and one group for each input."
        )
    for name, values in (("input", inputs), ("target", targets)):
        if not np.isfinite(values).all():
            row = int(np.argwhere(~np.isfinite(values))[0][0])
            raise DataError(f"{name} {row} is not finite; remove or repair NaN and infinite values.")
    names, count, order, dropped = _divided(groups, min_rows)
    least = least_shots + least_queries
    if len(count) == 0 or np.min(count) < least:
        worst = (
            f"group {str(names[np.argmin(count)])!r} has {np.min(count)} rows" if len(count) else "there are no rows"
        )
        raise DataError(
            f"{worst}, but {least_shots} shots + {least_queries} queries need {least}; ask for fewer, or drop such "
            f"groups by min_rows={least}."
        )
    data = GroupData(
        inputs=jnp.asarray(inputs[order]),
        targets=jnp.asarray(targets[order]),
        first=jnp.asarray(np.cumsum(count) - count, jnp.int32),
        count=jnp.asarray(count, jnp.int32),
        rows=jnp.asarray(order, jnp.int32),
    )
    most = max(int(np.max(count)), shots + queries)
    varies = least_shots < shots or least_queries < queries

    def sample(key: Key[Array, ""], data: GroupData) -> Task:
        group_key, row_key = jax.random.split(key)
        group = jax.random.randint(group_key, (), 0, len(data.first))
        count = data.count[group]
        chosen = choose_rows(row_key, count, most, shots + queries)
        s, q = jnp.asarray(shots, jnp.int32), jnp.asarray(queries, jnp.int32)
        if varies:
            shots_key, queries_key = jax.random.split(jax.random.fold_in(key, 2))
            s = jax.random.randint(shots_key, (), least_shots, jnp.minimum(shots, count - least_queries) + 1)
            q = jax.random.randint(queries_key, (), least_queries, jnp.minimum(queries, count - s) + 1)
        place = jnp.arange(shots + queries)
        if ordered:  # of the rows that are drawn, those that are there in front
            chosen = jnp.sort(jnp.where(place < s + q, chosen, most))

        def examples(start: Any, n: int, there: Any) -> Examples:
            rows = data.first[group] + chosen[jnp.minimum(start + jnp.arange(n), shots + queries - 1)]
            rows = jnp.minimum(rows, len(data.inputs) - 1)
            y = data.targets[rows]
            told = {"rows": data.rows[rows]} | ({"classes": y.argmax(axis=1).astype(jnp.int32)} if is_class else {})
            found = Examples(as_seen(data.inputs[rows]), y, **told)
            return keep(found, jnp.arange(n) < there) if varies else found

        return Task(examples(0, shots, s), examples(s, queries, q))

    protocol = {"groups": len(names), **spans(shots=(least_shots, shots), queries=(least_queries, queries)), **dropped}
    return TaskSource(
        data, sample, protocol | ({"classes": targets.shape[1]} if is_class else {}), tuple(map(str, names))
    )


def _divided(groups: np.ndarray, min_rows: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, int]]:
    """Names, rows of each group, the order that sorts rows by group, how many groups were dropped."""
    missing = np.asarray([g is None or g != g for g in groups.tolist()], bool)
    if missing.any():
        raise DataError(
            f"row {int(np.argmax(missing))} has no group ({groups[np.argmax(missing)]}), and {missing.sum()} rows in "
            "all; give each one, or leave such rows away."
        )
    try:
        names, index, count = np.unique(groups, return_inverse=True, return_counts=True)
    except TypeError:
        raise DataError("groups are of several kinds, which have no order; give integers or names.") from None
    order = np.argsort(index, kind="stable")
    if min_rows is None:
        return names, count, order, {}
    large = count >= min_rows
    if not large.any():
        raise DataError(f"no group has {min_rows} rows (the largest has {max(count, default=0)}); lower min_rows.")
    return names[large], count[large], order[large[index[order]]], {"dropped": int((~large).sum())}


def _targets(targets: np.ndarray, classes: int | None) -> np.ndarray:
    """`[n, outputs]` float32: integers are classes, anything else is a regression."""
    if targets.dtype.kind in "ui" and targets.ndim == 1:
        last = int(targets.max(initial=0))
        if len(targets) and (targets.min() < 0 or (classes is None and len(np.unique(targets)) <= last)):
            raise DataError(
                "integer targets are classes and must be numbered from 0, all of them; where this part of the data "
                f"lacks some, give classes={last + 1} or more, the same for each part; targets.astype(float) makes a "
                "regression."
            )
        if classes is not None and last >= classes:
            raise DataError(f"there is a target {last}, and classes is {classes}; give at least {last + 1}.")
        return np.eye(last + 1 if classes is None else classes, dtype=np.float32)[targets]
    if classes is not None:
        raise DataError(
            "classes are counted where targets are integers, [n]; leave classes away, or give such targets."
        )
    if targets.ndim not in (1, 2):
        raise DataError(f"targets have shape {list(targets.shape)}; give [n] or [n, outputs].")
    return np.asarray(targets if targets.ndim == 2 else targets[:, None], np.float32)
