"""N-way K-shot episodes from arrays, sampled on the device inside the compiled step."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from jmeta.core import TaskSource
from jmeta.data.descriptions import Descriptions, checked_descriptions, of_classes
from jmeta.data.queries import check_balance
from jmeta.data.sampling import EpisodeData, Transform, batch_sampler, episode_sampler
from jmeta.data.unlabelled import Unlabelled
from jmeta.errors import ConfigError, DataError
from jmeta.inputs import as_array, stored

Size = int | tuple[int, int]


def from_arrays(
    inputs: np.ndarray | Array,
    labels: np.ndarray | Array | Sequence[int],
    *,
    ways: Size = 5,
    shots: Size = 1,
    queries: Size = 15,
    names: Sequence[str] = (),
    descriptions: Descriptions | None = None,
    families: np.ndarray | Sequence[int] | None = None,
    transform: Transform | None = None,
    batch: int | None = None,
    min_rows: int | None = None,
    ordered: bool = False,
    query_balance: float | None = None,
    unlabelled: int = 0,
    distractors: int = 0,
) -> TaskSource:
    """N-way K-shot episodes from labelled arrays, or batches of all classes to pre-train on.

    An episode draws `ways` classes uniformly without replacement, then `shots + queries` rows of each without
    replacement. The arrays lie on the device, and sampling is part of the compiled step.

    Ways, shots and queries may be ranges; then each episode draws its ways, and each of its classes its shots and its
    queries. All episodes keep the shape of the largest: an example that is not there is outside of the mask and has a
    row of zeros in the targets, and its inputs repeat those that are there; a class that is not there has a column of
    zeros.

    Args:
        inputs: `[n, ...]`, which tasks hold as `jmeta.as_inputs` says: pictures of bytes from 0 to 1, other integers
            as they are, everything else as float32.
        labels: `[n]`, any integers, in any order.
        ways: number of classes of an episode, or `(least, most)`.
        shots: labelled support examples a class, or `(least, most)`; with descriptions 0 is allowed.
        queries: query examples a class, or `(least, most)`.
        names: the name of each class, in the order of the sorted distinct labels.
        descriptions: `[classes, ...]` in the same order, or a mapping from each label to its description: attributes
            or an embedding, which become float32, the token ids of a text, which
            `jmeta.TokenIds(jmeta.hashed_text(texts))` marks as such, or images of similar classes, `jmeta.Similar`. A
            dictionary of names gives several kinds that work together; each may be zeros where it says nothing.
        families: `[classes]`, a family for each class in the same order; an episode then draws its classes from one
            family, uniform over the families that have at least `ways` classes. Default: one family.
        transform: `(key, inputs [n, ...]) -> inputs`, applied on the device to the rows of an episode (augmentation).
        batch: instead of an episode, a task is this many rows drawn from all classes at once, for `jmeta.transfer`.
        min_rows: classes with fewer rows are dropped, with their names, descriptions and families;
            `protocol["dropped"]` says how many. Default: a class that is too small is an error.
        ordered: whether rows are in the order of time, so that the support of a class comes before its queries.
        query_balance: an episode has as many queries as without, but each class its share of them, drawn anew from a
            Dirichlet distribution of this concentration (2 is the custom), as far as it has rows. Default: all alike.
        unlabelled: examples a class without a label: rows of zeros in the targets of the support, after all others, for
            `jmeta.soft_kmeans`; only with a mask are they told from what is not there, which is outside of it.
        distractors: how many further classes have `unlabelled` examples in the support.

    Returns:
        A source of tasks whose `support` is `Examples([ways * shots, ...], [ways * shots, ways])` and whose `query` is
        `Examples([ways * queries, ...], [ways * queries, ways])`. With descriptions, `support` is
        `Examples(inputs, targets, descriptions [ways, ...])`; with 0 shots it has one row a class, without a label.
        `classes` and `rows` of the examples tell the number of their class and their row in `inputs`.
        With `batch`, the support is empty, `()`, and the query is `Examples([batch, ...], [batch, classes])`.

    Raises:
        DataError: arrays of different length, non-finite inputs, fewer classes than ways, a class with fewer rows than
            `shots + queries`, tasks without support; descriptions that are missing, not finite, all zeros, of different
            widths, or the same for two classes; integers beyond 0 and 1 that do not say whether they are token ids.

    Example:
        >>> import jax, jmeta, numpy as np
        >>> images = np.random.default_rng(0).normal(size=(60, 28, 28, 1))
        >>> source = jmeta.from_arrays(images, np.repeat(np.arange(6), 10), ways=5, shots=1, queries=3)
        >>> task = source.sample(jax.random.key(0), source.data)
        >>> task.support.inputs.shape, task.query.targets.shape
        ((5, 28, 28, 1), (15, 5))

    Reference: Vinyals et al. 2016, "Matching Networks for One Shot Learning", section 2.2.
    """
    inputs, labels = stored(as_array(inputs)), np.asarray(labels)
    (least_ways, ways), (least_shots, shots) = span("ways", ways), span("shots", shots)
    least_queries, queries = span("queries", queries)
    slots = max(shots, 1)  # without a shot one row a class remains, which has no label
    _check(inputs, labels, least_ways, least_shots, least_queries, batch, descriptions is not None)
    order = np.argsort(labels, kind="stable")
    dropped: dict[str, int] = {}
    if min_rows is not None:
        labels, order, names, descriptions, families, dropped = _without_small(
            labels, order, names, descriptions, families, min_rows
        )
    classes, first, count = np.unique(labels[order], return_index=True, return_counts=True)
    check_balance(query_balance, least_queries, queries)
    more = Unlabelled.of(unlabelled, distractors)
    _check_counts(classes, count, names, *((2, 1, 0) if batch else (ways + more.classes, slots, queries, more.rows)))
    family = np.zeros(len(classes), np.int32) if families is None else np.asarray(families)
    if len(family) != len(classes):
        raise DataError(f"there are {len(family)} families but {len(classes)} classes; give one family for each class.")
    kinds, sizes = np.unique(family, return_counts=True)
    together = ways + more.classes
    if batch is None and not (sizes >= together).any():
        raise DataError(f"no family has {together} classes (the largest has {np.max(sizes)}); ask for fewer ways.")
    data = EpisodeData(
        inputs=jnp.asarray(inputs[order]),
        first=jnp.asarray(first, jnp.int32),
        count=jnp.asarray(count, jnp.int32),
        rows=jnp.asarray(order, jnp.int32),
        family=jnp.asarray(family, jnp.int32),
        families=jnp.asarray(kinds[sizes >= together], jnp.int32),
        descriptions=() if descriptions is None else checked_descriptions(descriptions, classes, names),
    )
    if batch is not None:
        protocol = {"ways": len(classes), "batch": batch, **dropped}
        return TaskSource(data, batch_sampler(batch, transform), protocol, tuple(names))
    size = {"ways": (least_ways, ways), "shots": (least_shots, shots), "queries": (least_queries, queries)}
    sample = episode_sampler(
        **size, most=int(np.max(count)), transform=transform, ordered=ordered, balance=query_balance, more=more
    )
    about = {"query_balance": query_balance, "unlabelled": unlabelled, "distractors": distractors}
    told = {name: value for name, value in about.items() if value}
    return TaskSource(data, sample, {**spans(**size), **told, **dropped}, tuple(names))


def split_classes(
    labels: np.ndarray | Array | Sequence[Any], shares: Sequence[float] = (0.6, 0.2, 0.2), seed: int = 0
) -> tuple[Bool[np.ndarray, "n"], ...]:
    """Divides rows by their class at random, so that no class is in two parts: to train, validate and test on.

    Args:
        labels: `[n]`, the class of each row: integers or names.
        shares: the share of the classes of each part; they add up to 1 at most.
        seed: the same seed gives the same parts, whatever the order of the rows.

    Returns:
        For each part which rows are in it, `[n]`.

    Raises:
        ConfigError: shares that are not positive or add up to more than 1, or a part without a class.

    Example:
        >>> import jmeta, numpy as np
        >>> labels = np.repeat(["ant", "bee", "cat", "dog", "elk"], 4)
        >>> train, test = jmeta.split_classes(labels, (0.6, 0.4), seed=0)
        >>> train.sum(), test.sum(), (train & test).any()
        (np.int64(12), np.int64(8), np.False_)
    """
    if not all(share > 0 for share in shares) or sum(shares) > 1 + 1e-9:
        raise ConfigError(f"shares are {tuple(shares)}; give positive ones that add up to at most 1.")
    labels = np.asarray(labels)
    classes = np.unique(labels)
    shuffled = np.random.default_rng(seed).permutation(classes)
    ends = np.round(np.cumsum([0.0, *shares]) * len(classes)).astype(int)
    if (np.diff(ends) == 0).any():
        raise ConfigError(f"{len(classes)} classes in shares of {tuple(shares)} leave a part without a class.")
    return tuple(np.isin(labels, shuffled[begin:end]) for begin, end in pairwise(ends))


def _without_small(
    labels: np.ndarray,
    order: np.ndarray,
    names: Sequence[str],
    descriptions: Descriptions | None,
    families: Any,
    min_rows: int,
) -> tuple[np.ndarray, np.ndarray, Sequence[str], Descriptions | None, Any, dict[str, int]]:
    """All that belongs to the classes of at least so many rows, and how many classes were dropped."""
    classes, count = np.unique(labels, return_counts=True)
    large = count >= min_rows
    if not large.any():
        raise DataError(f"no class has {min_rows} rows (the largest has {max(count, default=0)}); lower min_rows.")
    for what, given in (("names", names), ("families", families if families is not None else ())):
        if len(given) not in (0, len(classes)):
            raise DataError(f"there are {len(given)} {what} but {len(classes)} classes; give one for each class.")

    def of_large(given: Any) -> Any:
        if given is None or len(given) == 0:
            return given
        return [one for one, kept in zip(given, large, strict=True) if kept]

    order = order[np.isin(labels[order], classes[large])]
    return (
        labels,
        order,
        of_large(names),
        of_classes(large, descriptions),
        of_large(families),
        {"dropped": int((~large).sum())},
    )


def span(name: str, size: Any) -> tuple[int, int]:
    """A number, or a range of numbers, as `(least, most)`."""
    try:
        least, most = (size, size) if isinstance(size, int | np.integer) else size
    except (TypeError, ValueError):
        raise DataError(f"{name} is {size}; give a whole number or (least, most).") from None
    if not all(isinstance(x, int | np.integer) and not isinstance(x, bool) for x in (least, most)) or least > most:
        raise DataError(f"{name} is ({least}, {most}); give (least, most), two whole numbers.")
    return int(least), int(most)


def spans(**sizes: tuple[int, int]) -> dict[str, int | list[int]]:
    """Ranges as a protocol tells them."""
    return {name: most if least == most else [least, most] for name, (least, most) in sizes.items()}


def _check(
    inputs: np.ndarray, labels: np.ndarray, ways: int, shots: int, queries: int, batch: int | None, described: bool
) -> None:
    least = {"ways": (ways, 2), "shots": (shots, 0 if described else 1), "queries": (queries, 1), "batch": (batch, 1)}
    for name, (value, minimum) in least.items():
        if value is not None and value < minimum:
            without = ", or descriptions: a task would have no support" if name == "shots" and value == 0 else ""
            raise DataError(f"{name} is {value}; give at least {minimum}{without}.")
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"labels must be a vector of integers, but are {labels.dtype} of shape {labels.shape}; "
            "np.unique(labels, return_inverse=True)[1] makes one of names."
        )
    if len(inputs) != len(labels):
        raise DataError(f"there are {len(inputs)} inputs but {len(labels)} labels; give one label for each input.")
    if np.issubdtype(inputs.dtype, np.floating) and not np.isfinite(inputs).all():
        row = int(np.argwhere(~np.isfinite(inputs))[0][0])
        raise DataError(f"input {row} is not finite; remove or repair NaN and infinite values.")


def _check_counts(
    classes: np.ndarray, count: np.ndarray, names: Sequence[str], ways: int, shots: int, queries: int, more: int = 0
) -> None:
    if names and len(names) != len(classes):
        raise DataError(f"there are {len(names)} names but {len(classes)} classes; give one name for each class.")
    if len(classes) < ways:
        raise DataError(f"{ways} ways need {ways} classes, but there are {len(classes)}; ask for fewer ways.")
    if count.min() < shots + queries + more:
        worst, least, free = int(np.argmin(count)), shots + queries + more, f" + {more} unlabelled" if more else ""
        name = f"{names[worst]!r}" if names else str(classes[worst])
        raise DataError(
            f"class {name} has {count[worst]} examples, but {shots} shots + {queries} queries{free} need {least}; "
            f"ask for fewer, or drop such classes by min_rows={least}."
        )
