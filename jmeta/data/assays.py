"""Every assay is a task: which molecules are active, in drug discovery."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int8, Key, Num

from jmeta.core import Examples, Task, TaskSource
from jmeta.data.episodes import Size, span, spans
from jmeta.data.sampling import keep
from jmeta.errors import DataError
from jmeta.inputs import as_seen, stored
from jmeta.tree import widened


class AssayData(NamedTuple):
    """The arrays that tasks are cut from.

    Args:
        features: `[molecules, ...]`.
        labels: `[assays, molecules]`: 1 active, 0 inactive, −1 not measured.
        support: `[assays, sizes]`, how many actives a support of each size has, and
        query: `[assays, sizes]`, how many a query.
    """

    features: Num[Array, "molecules ..."]
    labels: Int8[Array, "assays molecules"]
    support: Int[Array, "assays shots"]
    query: Int[Array, "assays queries"]


def from_assays(
    features: np.ndarray | Array,
    labels: np.ndarray | Array,
    *,
    shots: Size = 16,
    queries: Size = 64,
    balanced: bool = False,
    names: Sequence[str] = (),
) -> TaskSource:
    """2-way tasks from a matrix molecules × assays with missing entries: each assay is a task.

    A task draws one assay uniformly, then support and query rows of it without replacement. The query has as large a
    share of actives as the assay (at least one of each class), so that average precision means what it does there.

    Args:
        features: `[molecules, ...]`, such as fingerprints, which tasks hold as `jmeta.as_inputs` says.
        labels: `[molecules, assays]`: 1 active, 0 inactive; −1 or NaN not measured.
        shots: support molecules of a task, actives and inactives together, or `(least, most)`.
        queries: query molecules of a task, or `(least, most)`.
        balanced: whether half of the support is active; else it has the assay's share (at least one of each class).
        names: the name of each assay.

    Returns:
        A source of tasks whose `support` is `Examples([shots, ...], [shots, 2])`, targets one-hot with the actives in
        column 1, and whose `query` is `Examples([queries, ...], [queries, 2])`. Assays with too few measured molecules
        are left out; `names`, `protocol["assays"]` and `protocol["dropped"]` tell which and how many remain.

    Raises:
        DataError: arrays of different length, features that are not finite, labels other than those above, fewer than
            two shots or queries, or no assay with enough molecules of both classes.

    Example:
        >>> import jax, jmeta, numpy as np
        >>> random = np.random.default_rng(0)
        >>> labels = random.integers(-1, 2, size=(300, 5))
        >>> source = jmeta.from_assays(random.normal(size=(300, 8)), labels, shots=16, queries=32)
        >>> task = source.sample(jax.random.key(0), source.data)
        >>> task.support.inputs.shape, task.query.targets.shape
        ((16, 8), (32, 2))

    Reference: Stanley et al. 2021, "FS-Mol: A Few-Shot Learning Dataset of Molecules", section 4.

    Differences from the paper: its query set is all of the assay but the support; here it has a fixed size.
    """
    features, labels = stored(np.asarray(features)), np.asarray(labels)
    size = {"shots": span("shots", shots), "queries": span("queries", queries)}
    labels = _checked(features, labels, size, names)
    active, inactive = (labels == 1).sum(axis=0), (labels == 0).sum(axis=0)
    share = active / np.maximum(active + inactive, 1)

    def actives(size: np.ndarray) -> np.ndarray:
        return np.clip(np.round(size[None] * share[:, None]), 1, size[None] - 1)

    sizes, query_sizes = (np.arange(least, most + 1) for least, most in size.values())
    in_support = np.broadcast_to(sizes // 2, (len(share), len(sizes))) if balanced else actives(sizes)
    in_query = actives(query_sizes)
    most_active = in_support.max(axis=1) + in_query.max(axis=1)
    most_inactive = (sizes[None] - in_support).max(axis=1) + (query_sizes[None] - in_query).max(axis=1)
    enough = (active >= most_active) & (inactive >= most_inactive)
    if not enough.any():
        raise DataError(
            f"no assay has enough molecules of both classes for {sizes[-1]} shots and {query_sizes[-1]} queries."
        )
    data = AssayData(
        features=jnp.asarray(features),
        labels=jnp.asarray(labels.T[enough], jnp.int8),
        support=jnp.asarray(in_support[enough], jnp.int32),
        query=jnp.asarray(in_query[enough], jnp.int32),
    )
    protocol = {
        "ways": 2,
        **spans(**size),
        "balanced": balanced,
        "assays": int(enough.sum()),
        "dropped": int((~enough).sum()),
        "classes": 2,
    }
    kept = tuple(name for name, keep in zip(names, enough, strict=True) if keep) if names else ()
    return TaskSource(data, _sampler(**size), protocol, kept)


def _checked(
    features: np.ndarray, labels: np.ndarray, size: Mapping[str, tuple[int, int]], names: Sequence[str]
) -> np.ndarray:
    """The labels with −1 for NaN; `DataError` unless all arguments are as they should be."""
    for name, (least, _) in size.items():
        if least < 2:
            raise DataError(f"{name} is {least}; give at least 2, one active and one inactive.")
    if labels.ndim != 2 or len(features) != len(labels):
        raise DataError(
            f"features have shape {list(features.shape)} and labels {list(labels.shape)}; give one row of labels, "
            "[molecules, assays], for each molecule."
        )
    if not np.isfinite(features).all():
        row = int(np.argwhere(~np.isfinite(features))[0][0])
        raise DataError(f"the features of molecule {row} are not finite; remove or repair them.")
    labels = np.where(np.isnan(labels), -1, labels) if np.issubdtype(labels.dtype, np.floating) else labels
    if not np.isin(labels, (-1, 0, 1)).all():
        raise DataError(
            "labels must be 1 (active), 0 (inactive), or −1 or NaN (not measured); for measured values, a regression, "
            "use from_groups, with the assay of each measurement as its group."
        )
    if names and len(names) != labels.shape[1]:
        raise DataError(f"there are {len(names)} names but {labels.shape[1]} assays; give one name for each assay.")
    return labels


def _sampler(shots: tuple[int, int], queries: tuple[int, int]) -> Callable[[Key[Array, ""], AssayData], Task]:
    """Draws a task; sizes are `(least, most)`."""
    (least_shots, most_shots), (least_queries, most_queries) = shots, queries

    def sample(key: Key[Array, ""], data: AssayData) -> Task:
        assay_key, row_key = jax.random.split(key)
        assay = jax.random.randint(assay_key, (), 0, len(data.labels))
        score = jax.random.uniform(row_key, data.labels.shape[1:])
        most = min(most_shots + most_queries, len(score))
        # The molecules of either class in random order; support takes the first, the query those that follow.
        active, inactive = (
            jax.lax.top_k(jnp.where(data.labels[assay] == label, score, -1.0), most)[1] for label in (1, 0)
        )
        zero = jnp.zeros((), jnp.int32)
        more_shots, more_queries = zero, zero
        if least_shots < most_shots or least_queries < most_queries:
            sizes_keys = jax.random.split(jax.random.fold_in(key, 2))
            more_shots = jax.random.randint(sizes_keys[0], (), 0, most_shots - least_shots + 1)
            more_queries = jax.random.randint(sizes_keys[1], (), 0, most_queries - least_queries + 1)
        first, second = data.support[assay, more_shots], data.query[assay, more_queries]

        def examples(rows: int, there: Any, actives: Array, after: Array, after_inactive: Array) -> Examples:
            place = jnp.arange(rows)
            is_active = place < actives
            chosen = jnp.where(
                is_active,
                active[jnp.clip(after + place, 0, most - 1)],
                inactive[jnp.clip(after_inactive + place - actives, 0, most - 1)],
            )
            label = is_active.astype(jnp.int32)
            targets = jax.nn.one_hot(label, 2, dtype=jnp.float32)
            found = Examples(as_seen(data.features[chosen]), targets, classes=label, rows=chosen)
            return found if isinstance(there, int) else keep(found, place < there)

        s: Any = most_shots if least_shots == most_shots else least_shots + more_shots
        q: Any = most_queries if least_queries == most_queries else least_queries + more_queries
        support = examples(most_shots, s, first, zero, zero)
        return Task(support, examples(most_queries, q, second, first, s - first))

    return sample


def average_precision_gain(outputs: Float[Array, "n 2"], targets: Float[Array, "n 2"]) -> Float[Array, ""]:
    """ΔAUPRC: the average precision of ranking the actives first, less their share, which is that of a random order.

    Args:
        outputs: `[n, 2]` logits, the actives' in column 1.
        targets: `[n, 2]` one-hot.

    Returns:
        A number below 1; NaN where an output is not finite or nothing is active. Equal outputs share one rank: each
        counts with the precision at the last of them.

    Example:
        >>> import jax.numpy as jnp, jmeta
        >>> outputs = jnp.array([[0.0, 2.0], [0.0, 1.0], [0.0, -1.0], [0.0, -2.0]])
        >>> float(jmeta.average_precision_gain(outputs, jnp.eye(2)[jnp.array([1, 0, 0, 0])]))
        0.75

    Reference: Stanley et al. 2021, "FS-Mol", section 4.2.
    """
    outputs, targets = widened((outputs, targets))
    score, is_active = outputs[:, 1] - outputs[:, 0], targets[:, 1]
    above = (score[None] >= score[:, None]).astype(score.dtype)  # [n, n]: who is ranked at least as high as whom
    precision = (above @ is_active) / above.sum(axis=1)
    average = (precision * is_active).sum() / is_active.sum()
    return jnp.where(jnp.isfinite(outputs).all(), average - is_active.mean(), jnp.nan)
