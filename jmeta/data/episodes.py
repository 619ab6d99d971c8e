"""N-way K-shot episodes from arrays, sampled on the device inside the compiled step."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, Num

from jmeta.core import Examples, Task, TaskSource
from jmeta.errors import DataError

Transform = Callable[[Key[Array, ""], Float[Array, "n ..."]], Float[Array, "n ..."]]


class EpisodeData(NamedTuple):
    """The arrays that episodes are cut from, rows sorted by class.

    Args:
        inputs: `[rows, ...]`.
        first: `[classes]`, the first row of each class.
        count: `[classes]`, the number of rows of each class.
        family: `[classes]`, the family of each class; an episode draws all of its classes from one family.
        families: `[families]`, the families with at least as many classes as an episode has ways.
    """

    inputs: Num[Array, "rows ..."]
    first: Int[Array, "classes"]
    count: Int[Array, "classes"]  # type: ignore[assignment]
    family: Int[Array, "classes"]
    families: Int[Array, "families"]


def from_arrays(
    inputs: np.ndarray | Array,
    labels: np.ndarray | Array | Sequence[int],
    *,
    ways: int = 5,
    shots: int = 1,
    queries: int = 15,
    names: Sequence[str] = (),
    families: np.ndarray | Sequence[int] | None = None,
    transform: Transform | None = None,
    batch: int | None = None,
) -> TaskSource:
    """N-way K-shot episodes from labelled arrays, or batches of all classes to pre-train on.

    An episode draws `ways` classes uniformly without replacement, then `shots + queries` rows of each without
    replacement. The arrays lie on the device, and sampling is part of the compiled step.

    Args:
        inputs: `[n, ...]`; unsigned bytes are stored as such and scaled to `[0, 1]` when sampled, everything else
            becomes float32 and is left as it is.
        labels: `[n]`, any integers, in any order.
        ways: number of classes of an episode.
        shots: labelled support examples a class.
        queries: query examples a class.
        names: the description of each class, in the order of the sorted distinct labels.
        families: `[classes]`, a family for each class in the same order; an episode then draws its classes from one
            family, uniform over the families that have at least `ways` classes. Default: one family.
        transform: `(key, inputs [n, ...]) -> inputs`, applied on the device to the rows of an episode (augmentation).
        batch: instead of an episode, a task is this many rows drawn from all classes at once, for `jmeta.transfer`.

    Returns:
        A source of tasks whose `support` is `Examples([ways * shots, ...], [ways * shots, ways])` and whose `query` is
        `Examples([ways * queries, ...], [ways * queries, ways])`. With `batch`, the support is empty, `()`, and the
        query is `Examples([batch, ...], [batch, classes])`.

    Raises:
        DataError: arrays of different length, non-finite inputs, fewer classes than ways, or a class with fewer rows
            than `shots + queries`.

    Example:
        >>> import jax, jmeta, numpy as np
        >>> images = np.random.default_rng(0).normal(size=(60, 28, 28, 1))
        >>> source = jmeta.from_arrays(images, np.repeat(np.arange(6), 10), ways=5, shots=1, queries=3)
        >>> task = source.sample(jax.random.key(0), source.data)
        >>> task.support.inputs.shape, task.query.targets.shape
        ((5, 28, 28, 1), (15, 5))

    Reference: Vinyals et al. 2016, "Matching Networks for One Shot Learning", section 2.2.
    """
    inputs, labels = stored(np.asarray(inputs)), np.asarray(labels)
    _check(inputs, labels, ways, shots, queries, batch)
    classes, first, count = np.unique(np.sort(labels), return_index=True, return_counts=True)
    _check_counts(classes, count, names, *((2, 1, 0) if batch else (ways, shots, queries)))
    family = np.zeros(len(classes), np.int32) if families is None else np.asarray(families)
    if len(family) != len(classes):
        raise DataError(f"there are {len(family)} families but {len(classes)} classes; give one family for each class.")
    kinds, sizes = np.unique(family, return_counts=True)
    if batch is None and not (sizes >= ways).any():
        raise DataError(f"no family has {ways} classes (the largest has {np.max(sizes)}); ask for fewer ways.")
    data = EpisodeData(
        inputs=jnp.asarray(inputs[np.argsort(labels, kind="stable")]),
        first=jnp.asarray(first, jnp.int32),
        count=jnp.asarray(count, jnp.int32),
        family=jnp.asarray(family, jnp.int32),
        families=jnp.asarray(kinds[sizes >= ways], jnp.int32),
    )
    most = int(np.max(count))

    def sample(key: Key[Array, ""], data: EpisodeData) -> Task:
        class_key, row_key, transform_key = jax.random.split(key, 3)
        chosen = _choose_classes(class_key, data, ways)
        rows = jax.vmap(lambda key, first, count: first + choose_rows(key, count, most, shots + queries))(
            jax.random.split(row_key, ways), data.first[chosen], data.count[chosen]
        )
        inputs = take(transform_key, data, rows.reshape(-1))
        inputs = inputs.reshape(ways, shots + queries, *inputs.shape[1:])
        return Task(_examples(inputs[:, :shots]), _examples(inputs[:, shots:]))

    def sample_batch(key: Key[Array, ""], data: EpisodeData) -> Task:
        row_key, transform_key = jax.random.split(key)
        rows = jax.random.randint(row_key, () if batch is None else (batch,), 0, len(data.inputs))
        inputs = take(transform_key, data, rows)
        labels = jnp.searchsorted(data.first, rows, side="right") - 1
        return Task((), Examples(inputs, jax.nn.one_hot(labels, len(data.first), dtype=inputs.dtype)))

    def take(key: Key[Array, ""], data: EpisodeData, rows: Int[Array, "n"]) -> Float[Array, "n ..."]:
        inputs = data.inputs[rows]
        inputs = inputs.astype(jnp.float32) / 255.0 if inputs.dtype == jnp.uint8 else inputs
        return inputs if transform is None else transform(key, inputs)

    if batch is not None:
        return TaskSource(data, sample_batch, {"ways": len(classes), "batch": batch}, tuple(names))
    protocol = {"ways": ways, "shots": shots, "queries": queries}
    return TaskSource(data, sample, protocol, tuple(names))


def _choose_classes(key: Key[Array, ""], data: EpisodeData, ways: int) -> Int[Array, "ways"]:
    family_key, class_key = jax.random.split(key)
    family = jax.random.choice(family_key, data.families)
    score = jnp.where(data.family == family, jax.random.uniform(class_key, data.first.shape), -1.0)
    return jax.lax.top_k(score, ways)[1]


def choose_rows(key: Key[Array, ""], count: Int[Array, ""], most: int, rows: int) -> Int[Array, "rows"]:
    """`rows` of the first `count` rows, without replacement, in random order; `most` bounds `count`."""
    score = jnp.where(jnp.arange(most) < count, jax.random.uniform(key, (most,)), -1.0)
    return jax.lax.top_k(score, rows)[1]


def _examples(inputs: Float[Array, "ways n ..."]) -> Examples:
    ways, n = inputs.shape[:2]
    targets = jnp.repeat(jnp.eye(ways, dtype=inputs.dtype), n, axis=0)
    return Examples(inputs.reshape(ways * n, *inputs.shape[2:]), targets)


def stored(inputs: np.ndarray) -> np.ndarray:
    """Inputs as they lie on the device: bytes as they are, everything else as float32."""
    if inputs.dtype.kind not in "buif" and inputs.dtype != jnp.bfloat16:
        raise DataError(f"inputs are {inputs.dtype}; give real numbers.")
    with np.errstate(over="ignore"):  # what float32 cannot hold is refused with all that is not finite
        return inputs if inputs.dtype == np.uint8 else inputs.astype(np.float32)


def _check(inputs: np.ndarray, labels: np.ndarray, ways: int, shots: int, queries: int, batch: int | None) -> None:
    for name, value, least in (("ways", ways, 2), ("shots", shots, 1), ("queries", queries, 1), ("batch", batch, 1)):
        if value is not None and value < least:
            raise DataError(f"{name} is {value}; give at least {least}.")
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
            "ask for fewer or drop the class."
        )
