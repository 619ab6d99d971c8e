"""N-way K-shot episodes from arrays, sampled on the device inside the compiled step."""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key, Num

from jmeta.core import Examples, Task, TaskSource
from jmeta.data.descriptions import Descriptions, checked_descriptions
from jmeta.data.text import TokenIds
from jmeta.errors import ConfigError, DataError
from jmeta.inputs import as_array, as_seen, stored

Transform = Callable[[Key[Array, ""], Num[Array, "n ..."]], Num[Array, "n ..."]]
Size = int | tuple[int, int]


class EpisodeData(NamedTuple):
    """The arrays that episodes are cut from, rows sorted by class.

    Args:
        inputs: `[rows, ...]`.
        first: `[classes]`, the first row of each class.
        count: `[classes]`, the number of rows of each class.
        rows: `[rows]`, where each row lay in the arrays as they were given.
        family: `[classes]`, the family of each class; an episode draws all of its classes from one family.
        families: `[families]`, the families with at least as many classes as an episode has ways.
        descriptions: `[classes, ...]`, or `()` where classes have none.
    """

    inputs: Num[Array, "rows ..."]
    first: Int[Array, "classes"]
    count: Int[Array, "classes"]  # type: ignore[assignment]
    rows: Int[Array, "rows"]
    family: Int[Array, "classes"]
    families: Int[Array, "families"]
    descriptions: Any = ()


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
            or an embedding, which become float32, or the token ids of a text, which
            `jmeta.TokenIds(jmeta.hashed_text(texts))` marks as such.
        families: `[classes]`, a family for each class in the same order; an episode then draws its classes from one
            family, uniform over the families that have at least `ways` classes. Default: one family.
        transform: `(key, inputs [n, ...]) -> inputs`, applied on the device to the rows of an episode (augmentation).
        batch: instead of an episode, a task is this many rows drawn from all classes at once, for `jmeta.transfer`.
        min_rows: classes with fewer rows are dropped, with their names, descriptions and families;
            `protocol["dropped"]` says how many. Default: a class that is too small is an error.
        ordered: whether rows are in the order of time, so that the support of a class comes before its queries.

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
    _check_counts(classes, count, names, *((2, 1, 0) if batch else (ways, slots, queries)))
    family = np.zeros(len(classes), np.int32) if families is None else np.asarray(families)
    if len(family) != len(classes):
        raise DataError(f"there are {len(family)} families but {len(classes)} classes; give one family for each class.")
    kinds, sizes = np.unique(family, return_counts=True)
    if batch is None and not (sizes >= ways).any():
        raise DataError(f"no family has {ways} classes (the largest has {np.max(sizes)}); ask for fewer ways.")
    data = EpisodeData(
        inputs=jnp.asarray(inputs[order]),
        first=jnp.asarray(first, jnp.int32),
        count=jnp.asarray(count, jnp.int32),
        rows=jnp.asarray(order, jnp.int32),
        family=jnp.asarray(family, jnp.int32),
        families=jnp.asarray(kinds[sizes >= ways], jnp.int32),
        descriptions=() if descriptions is None else checked_descriptions(descriptions, classes, names),
    )
    if batch is not None:
        protocol = {"ways": len(classes), "batch": batch, **dropped}
        return TaskSource(data, _batch_sampler(batch, transform), protocol, tuple(names))
    size = {"ways": (least_ways, ways), "shots": (least_shots, shots), "queries": (least_queries, queries)}
    sample = _episode_sampler(**size, most=int(np.max(count)), transform=transform, ordered=ordered)
    return TaskSource(data, sample, {**spans(**size), **dropped}, tuple(names))


# The samplers close over no array, so that equal sources share a program.


def _episode_sampler(
    ways: tuple[int, int],
    shots: tuple[int, int],
    queries: tuple[int, int],
    *,
    most: int,
    transform: Transform | None,
    ordered: bool,
) -> Callable[[Key[Array, ""], EpisodeData], Task]:
    """Draws an episode whose classes have at most `most` rows; sizes are `(least, most)`."""
    (least_ways, ways_), (least_shots, shots_), (least_queries, queries_) = ways, shots, queries
    slots = max(shots_, 1)
    varies = least_ways < ways_ or least_shots < slots

    def sample(key: Key[Array, ""], data: EpisodeData) -> Task:
        class_key, row_key, transform_key = jax.random.split(key, 3)
        chosen = _choose_classes(class_key, data, ways_)
        rows = jax.vmap(lambda key, first, count: first + choose_rows(key, count, most, slots + queries_))(
            jax.random.split(row_key, ways_), data.first[chosen], data.count[chosen]
        )
        rows = jnp.sort(rows, axis=1) if ordered else rows
        inputs = _take(transform, transform_key, data, rows.reshape(-1))
        inputs = inputs.reshape(ways_, slots + queries_, *inputs.shape[1:])
        support, query = (
            _examples(inputs[:, part], chosen, data.rows[rows[:, part]]) for part in (slice(slots), slice(slots, None))
        )
        there = jnp.ones(ways_, bool)
        if varies:
            ways_key, shots_key = jax.random.split(jax.random.fold_in(key, 3))
            there = jnp.arange(ways_) < jax.random.randint(ways_key, (), least_ways, ways_ + 1)
            counts = jnp.where(there, jax.random.randint(shots_key, (ways_,), least_shots, shots_ + 1), 0)
            support = keep(support, (jnp.arange(slots)[None] < counts[:, None]).reshape(-1))
            if least_queries == queries_:
                query = keep(query, jnp.repeat(there, queries_))
        if least_queries < queries_:
            drawn = jax.random.randint(jax.random.fold_in(key, 4), (ways_,), least_queries, queries_ + 1)
            asked = jnp.where(there, drawn, 0)
            query = keep(query, (jnp.arange(queries_)[None] < asked[:, None]).reshape(-1))
        told = jax.tree.map(lambda x: masked(x[chosen], there), data.descriptions)
        return Task(support._replace(descriptions=told), query)

    return sample


def _batch_sampler(batch: int, transform: Transform | None) -> Callable[[Key[Array, ""], EpisodeData], Task]:
    """Draws rows of all classes at once, with replacement."""

    def sample(key: Key[Array, ""], data: EpisodeData) -> Task:
        row_key, transform_key = jax.random.split(key)
        rows = jax.random.randint(row_key, (batch,), 0, len(data.inputs))
        inputs = _take(transform, transform_key, data, rows)
        labels = (jnp.searchsorted(data.first, rows, side="right") - 1).astype(jnp.int32)
        targets = jax.nn.one_hot(labels, len(data.first), dtype=jnp.float32)
        return Task((), Examples(inputs, targets, classes=labels, rows=data.rows[rows]))

    return sample


def _take(
    transform: Transform | None, key: Key[Array, ""], data: EpisodeData, rows: Int[Array, "n"]
) -> Num[Array, "n ..."]:
    inputs = as_seen(data.inputs[rows])
    return inputs if transform is None else transform(key, inputs)


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
        if given is None or isinstance(given, Mapping) or len(given) == 0:
            return given
        if len(given) != len(classes):
            raise DataError(f"there are {len(given)} descriptions but {len(classes)} classes; give one for each class.")
        return [one for one, kept in zip(given, large, strict=True) if kept]

    told = TokenIds(of_large(descriptions.ids)) if isinstance(descriptions, TokenIds) else of_large(descriptions)
    order = order[np.isin(labels[order], classes[large])]
    return labels, order, of_large(names), told, of_large(families), {"dropped": int((~large).sum())}


def keep(examples: Examples, kept: Bool[Array, "n"]) -> Examples:
    """The examples without the labels of those that are not kept, and with kept inputs, in turn, in their places."""
    order = jnp.argsort(~kept, stable=True)
    row = jnp.arange(len(kept))
    inputs = examples.inputs[jnp.where(kept, row, order[row % jnp.maximum(kept.sum(), 1)])]
    inputs = jnp.where(kept.any(), inputs, jnp.zeros_like(inputs))
    targets = examples.targets * kept[:, None].astype(examples.targets.dtype)
    return examples._replace(inputs=inputs, targets=targets, mask=kept)


def masked(x: Num[Array, "n ..."], kept: Bool[Array, "n"]) -> Num[Array, "n ..."]:
    """Zeros in the rows that are not kept."""
    return jnp.where(kept.reshape(len(x), *(1 for _ in x.shape[1:])), x, jnp.zeros_like(x))


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


def _choose_classes(key: Key[Array, ""], data: EpisodeData, ways: int) -> Int[Array, "ways"]:
    family_key, class_key = jax.random.split(key)
    family = jax.random.choice(family_key, data.families)
    score = jnp.where(data.family == family, jax.random.uniform(class_key, data.first.shape), -1.0)
    return jax.lax.top_k(score, ways)[1]


def choose_rows(key: Key[Array, ""], count: Int[Array, ""], most: int, rows: int) -> Int[Array, "rows"]:
    """`rows` of the first `count` rows, without replacement, in random order; `most` bounds `count`."""
    score = jnp.where(jnp.arange(most, dtype=count.dtype) < count, jax.random.uniform(key, (most,)), -1.0)
    return jax.lax.top_k(score, rows)[1]


def _examples(inputs: Num[Array, "ways n ..."], classes: Int[Array, "ways"], rows: Int[Array, "ways n"]) -> Examples:
    ways, n = inputs.shape[:2]
    targets = jnp.repeat(jnp.eye(ways, dtype=jnp.float32), n, axis=0)
    told = {"classes": jnp.repeat(classes, n), "rows": rows.reshape(-1)}
    return Examples(inputs.reshape(ways * n, *inputs.shape[2:]), targets, **told)


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
    classes: np.ndarray, count: np.ndarray, names: Sequence[str], ways: int, shots: int, queries: int
) -> None:
    if names and len(names) != len(classes):
        raise DataError(f"there are {len(names)} names but {len(classes)} classes; give one name for each class.")
    if len(classes) < ways:
        raise DataError(f"{ways} ways need {ways} classes, but there are {len(classes)}; ask for fewer ways.")
    if count.min() < shots + queries:
        worst = int(np.argmin(count))
        name = f"{names[worst]!r}" if names else str(classes[worst])
        raise DataError(
            f"class {name} has {count[worst]} examples, but {shots} shots + {queries} queries need {shots + queries}; "
            f"ask for fewer, or drop such classes by min_rows={shots + queries}."
        )
