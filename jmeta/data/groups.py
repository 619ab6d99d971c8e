"""Every group of rows is a task: a user, a patient, a machine."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, Num

from jmeta.core import Examples, Task, TaskSource
from jmeta.data.episodes import choose_rows, stored
from jmeta.errors import DataError


class GroupData(NamedTuple):
    """The arrays that tasks are cut from, rows sorted by group.

    Args:
        inputs: `[rows, ...]`.
        targets: `[rows, outputs]`, one-hot for classification.
        first: `[groups]`, the first row of each group.
        count: `[groups]`, the number of rows of each group.
    """

    inputs: Num[Array, "rows ..."]
    targets: Float[Array, "rows outputs"]
    first: Int[Array, "groups"]
    count: Int[Array, "groups"]  # type: ignore[assignment]


def from_groups(
    inputs: np.ndarray | Array,
    targets: np.ndarray | Array | Sequence[float],
    groups: np.ndarray | Sequence[int] | Sequence[str],
    *,
    shots: int = 5,
    queries: int = 10,
) -> TaskSource:
    """Tasks from rows that belong to groups: each group is a task, as a user whose taste is to be learned.

    A task draws one group uniformly and `shots + queries` of its rows without replacement: support and query are
    disjoint rows of one group. Targets mean the same in all groups, unlike the classes of `from_arrays`.

    Args:
        inputs: `[n, ...]`; unsigned bytes are stored as such and scaled to `[0, 1]` when sampled.
        targets: `[n]` or `[n, outputs]` floats for a regression; `[n]` integers from 0 for a classification, which
            become one-hot over all classes there are.
        groups: `[n]`, the group of each row: integers or names.
        shots: support rows of a task.
        queries: query rows of a task.

    Returns:
        A source of tasks whose `support` is `Examples([shots, ...], [shots, outputs])` and whose `query` is
        `Examples([queries, ...], [queries, outputs])`; `names` holds the groups.

    Raises:
        DataError: arrays of different length, values that are not finite, classes that are not numbered from 0, or a
            group with fewer rows than `shots + queries`.

    Example:
        >>> import jax, jmeta, numpy as np
        >>> x = np.random.default_rng(0).normal(size=(60, 3))
        >>> source = jmeta.from_groups(x, x.sum(axis=1), np.repeat(["ann", "bob", "eve"], 20), shots=5, queries=10)
        >>> task = source.sample(jax.random.key(0), source.data)
        >>> task.support.inputs.shape, task.query.targets.shape
        ((5, 3), (10, 1))
    """
    inputs, targets, groups = stored(np.asarray(inputs)), _targets(np.asarray(targets)), np.asarray(groups)
    for name, value in (("shots", shots), ("queries", queries)):
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
    names, index, count = np.unique(groups, return_inverse=True, return_counts=True)
    if len(count) == 0 or np.min(count) < shots + queries:
        worst = (
            f"group {str(names[np.argmin(count)])!r} has {np.min(count)} rows" if len(count) else "there are no rows"
        )
        raise DataError(
            f"{worst}, but {shots} shots + {queries} queries need {shots + queries}; ask for fewer or drop the group."
        )
    order = np.argsort(index, kind="stable")
    data = GroupData(
        inputs=jnp.asarray(inputs[order]),
        targets=jnp.asarray(targets[order]),
        first=jnp.asarray(np.cumsum(count) - count, jnp.int32),
        count=jnp.asarray(count, jnp.int32),
    )
    most = int(np.max(count))

    def sample(key: Key[Array, ""], data: GroupData) -> Task:
        group_key, row_key = jax.random.split(key)
        group = jax.random.randint(group_key, (), 0, len(data.first))
        rows = data.first[group] + choose_rows(row_key, data.count[group], most, shots + queries)
        x, y = data.inputs[rows], data.targets[rows]
        x = x.astype(jnp.float32) / 255.0 if x.dtype == jnp.uint8 else x
        return Task(Examples(x[:shots], y[:shots]), Examples(x[shots:], y[shots:]))

    protocol = {"groups": len(names), "shots": shots, "queries": queries}
    return TaskSource(data, sample, protocol, tuple(map(str, names)))


def _targets(targets: np.ndarray) -> np.ndarray:
    """`[n, outputs]` float32: integers are classes, anything else is a regression."""
    if np.issubdtype(targets.dtype, np.integer) and targets.ndim == 1:
        if len(targets) and (targets.min() < 0 or len(np.unique(targets)) <= targets.max()):
            raise DataError(
                "integer targets are classes and must be numbered from 0; np.unique(targets, return_inverse=True)[1] "
                "numbers them, and targets.astype(float) makes a regression."
            )
        return np.eye(int(targets.max(initial=0)) + 1, dtype=np.float32)[targets]
    if targets.ndim not in (1, 2):
        raise DataError(f"targets have shape {list(targets.shape)}; give [n] or [n, outputs].")
    return np.asarray(targets if targets.ndim == 2 else targets[:, None], np.float32)
