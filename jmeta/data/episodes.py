"""N-way K-shot episodes from arrays, sampled on the device inside the compiled step."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, Num

from jmeta.core import Examples, Task, TaskSource
from jmeta.data.text import TokenIds
from jmeta.errors import DataError

Transform = Callable[[Key[Array, ""], Float[Array, "n ..."]], Float[Array, "n ..."]]
Size = int | tuple[int, int]
Descriptions = np.ndarray | Array | Sequence[Any] | Mapping[int, Any] | TokenIds


class EpisodeData(NamedTuple):
    """The arrays that episodes are cut from, rows sorted by class.

    Args:
        inputs: `[rows, ...]`.
        first: `[classes]`, the first row of each class.
        count: `[classes]`, the number of rows of each class.
        family: `[classes]`, the family of each class; an episode draws all of its classes from one family.
        families: `[families]`, the families with at least as many classes as an episode has ways.
        descriptions: `[classes, ...]`, or `()` where classes have none.
    """

    inputs: Num[Array, "rows ..."]
    first: Int[Array, "classes"]
    count: Int[Array, "classes"]  # type: ignore[assignment]
    family: Int[Array, "classes"]
    families: Int[Array, "families"]
    descriptions: Any = ()


def from_arrays(
    inputs: np.ndarray | Array,
    labels: np.ndarray | Array | Sequence[int],
    *,
    ways: Size = 5,
    shots: Size = 1,
    queries: int = 15,
    names: Sequence[str] = (),
    descriptions: Descriptions | None = None,
    families: np.ndarray | Sequence[int] | None = None,
    transform: Transform | None = None,
    batch: int | None = None,
) -> TaskSource:
    """N-way K-shot episodes from labelled arrays, or batches of all classes to pre-train on.

    An episode draws `ways` classes uniformly without replacement, then `shots + queries` rows of each without
    replacement. The arrays lie on the device, and sampling is part of the compiled step.

    Ways and shots may be ranges; then each episode draws its ways, and each of its classes its shots. All episodes keep
    the shape of the largest: an example that is not there is outside of the mask and has a row of zeros in the targets,
    and its inputs repeat those that are there; a class that is not there has a column of zeros.

    Args:
        inputs: `[n, ...]`; unsigned bytes are stored as such and scaled to `[0, 1]` when sampled, everything else
            becomes float32 and is left as it is.
        labels: `[n]`, any integers, in any order.
        ways: number of classes of an episode, or `(least, most)`.
        shots: labelled support examples a class, or `(least, most)`; with descriptions 0 is allowed.
        queries: query examples a class.
        names: the name of each class, in the order of the sorted distinct labels.
        descriptions: `[classes, ...]` in the same order, or a mapping from each label to its description: attributes
            or an embedding, which become float32, or the token ids of a text, which
            `jmeta.TokenIds(jmeta.hashed_text(texts))` marks as such.
        families: `[classes]`, a family for each class in the same order; an episode then draws its classes from one
            family, uniform over the families that have at least `ways` classes. Default: one family.
        transform: `(key, inputs [n, ...]) -> inputs`, applied on the device to the rows of an episode (augmentation).
        batch: instead of an episode, a task is this many rows drawn from all classes at once, for `jmeta.transfer`.

    Returns:
        A source of tasks whose `support` is `Examples([ways * shots, ...], [ways * shots, ways])` and whose `query` is
        `Examples([ways * queries, ...], [ways * queries, ways])`. With descriptions, `support` is
        `Examples(inputs, targets, descriptions [ways, ...])`; with 0 shots it has one row a class, without a label.
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
    inputs, labels = stored(np.asarray(inputs)), np.asarray(labels)
    (least_ways, ways), (least_shots, shots) = _range("ways", ways), _range("shots", shots)
    slots = max(shots, 1)  # without a shot one row a class remains, which has no label
    _check(inputs, labels, least_ways, least_shots, queries, batch, descriptions is not None)
    classes, first, count = np.unique(np.sort(labels), return_index=True, return_counts=True)
    _check_counts(classes, count, names, *((2, 1, 0) if batch else (ways, slots, queries)))
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
        descriptions=() if descriptions is None else checked_descriptions(descriptions, classes, names),
    )
    most = int(np.max(count))
    has_descriptions = descriptions is not None  # `sample` closes over no array, so that equal sources share a program
    varies = least_ways < ways or least_shots < slots

    def sample(key: Key[Array, ""], data: EpisodeData) -> Task:
        class_key, row_key, transform_key = jax.random.split(key, 3)
        chosen = _choose_classes(class_key, data, ways)
        rows = jax.vmap(lambda key, first, count: first + choose_rows(key, count, most, slots + queries))(
            jax.random.split(row_key, ways), data.first[chosen], data.count[chosen]
        )
        inputs = take(transform_key, data, rows.reshape(-1))
        inputs = inputs.reshape(ways, slots + queries, *inputs.shape[1:])
        support, query = _examples(inputs[:, :slots]), _examples(inputs[:, slots:])
        there = jnp.ones(ways, bool)
        if varies:
            ways_key, shots_key = jax.random.split(jax.random.fold_in(key, 3))
            there = jnp.arange(ways) < jax.random.randint(ways_key, (), least_ways, ways + 1)
            counts = jnp.where(there, jax.random.randint(shots_key, (ways,), least_shots, shots + 1), 0)
            support = _keep(support, (jnp.arange(slots)[None] < counts[:, None]).reshape(-1))
            query = _keep(query, jnp.repeat(there, queries))
        if has_descriptions:
            support = support._replace(descriptions=jax.tree.map(lambda x: masked(x[chosen], there), data.descriptions))
        return Task(support, query)

    def sample_batch(key: Key[Array, ""], data: EpisodeData) -> Task:
        row_key, transform_key = jax.random.split(key)
        rows = jax.random.randint(row_key, () if batch is None else (batch,), 0, len(data.inputs))
        inputs = take(transform_key, data, rows)
        labels = jnp.searchsorted(data.first, rows, side="right") - 1
        return Task((), Examples(inputs, jax.nn.one_hot(labels, len(data.first), dtype=jnp.float32)))

    def take(key: Key[Array, ""], data: EpisodeData, rows: Int[Array, "n"]) -> Num[Array, "n ..."]:
        inputs = data.inputs[rows]
        inputs = inputs.astype(jnp.float32) / 255.0 if inputs.dtype == jnp.uint8 else inputs
        return inputs if transform is None else transform(key, inputs)

    if batch is not None:
        return TaskSource(data, sample_batch, {"ways": len(classes), "batch": batch}, tuple(names))
    size = {"ways": (least_ways, ways), "shots": (least_shots, shots)}
    protocol = {name: most if least == most else [least, most] for name, (least, most) in size.items()}
    return TaskSource(data, sample, {**protocol, "queries": queries}, tuple(names))


def _keep(examples: Examples, kept: Bool[Array, "n"]) -> Examples:
    """The examples without the labels of those that are not kept, and with kept inputs, in turn, in their places."""
    inputs, targets, *_ = examples
    order = jnp.argsort(~kept, stable=True)
    row = jnp.arange(len(kept))
    inputs = inputs[jnp.where(kept, row, order[row % jnp.maximum(kept.sum(), 1)])]
    inputs = jnp.where(kept.any(), inputs, jnp.zeros_like(inputs))
    return Examples(inputs, targets * kept[:, None].astype(targets.dtype), mask=kept)


def checked_descriptions(
    descriptions: Descriptions, classes: np.ndarray, names: Sequence[str] = ()
) -> Array | TokenIds:
    """One description for each class as an array `[classes, ...]`; `DataError` unless there is, all of one width."""
    if isinstance(descriptions, TokenIds):
        return TokenIds(_checked(descriptions.ids, classes, names, np.dtype(np.int32)))
    return _checked(descriptions, classes, names, np.dtype(np.float32))


def _checked(descriptions: Any, classes: np.ndarray, names: Sequence[str], dtype: np.dtype) -> Array:
    called = [repr(name) for name in names] or [str(label) for label in classes]
    if isinstance(descriptions, Mapping):
        missing = [name for name, label in zip(called, classes.tolist(), strict=True) if label not in descriptions]
        if missing:
            raise DataError(f"class {missing[0]} has no description; give one for each class.")
        descriptions = [descriptions[label] for label in classes.tolist()]
    if len(descriptions) != len(classes):
        raise DataError(
            f"there are {len(descriptions)} descriptions but {len(classes)} classes; give one for each class."
        )
    shapes = [np.shape(one) for one in descriptions]
    for name, shape in zip(called, shapes, strict=True):
        if shape != shapes[0] or shape == ():
            raise DataError(
                f"the description of class {name} has shape {list(shape)}, that of {called[0]} {list(shapes[0])}; give "
                "vectors of one width."
            )
    array = np.stack([np.asarray(one) for one in descriptions])
    if array.dtype.kind not in "buif" and array.dtype != jnp.bfloat16:
        raise DataError(
            f"descriptions are {array.dtype}; make numbers of them: jmeta.TokenIds(jmeta.hashed_text(texts)) for text."
        )
    if dtype == np.float32 and array.dtype.kind in "ui" and array.max() > 1:
        raise DataError(
            f"descriptions are integers up to {array.max()}, which may be token ids or numbers; give token ids as "
            "jmeta.TokenIds(ids) and numbers as floats."
        )
    if dtype == np.int32 and (array.dtype.kind not in "ui" or array.min() < 0):
        raise DataError(f"token ids are {array.dtype} from {array.min()}; jmeta.hashed_text(texts) makes them.")
    array = array.astype(dtype)
    flat = array.reshape(len(array), -1)
    for name, row in zip(called, flat, strict=True):
        if not np.isfinite(row).all():
            raise DataError(f"the description of class {name} is not finite; remove or repair NaN and infinite values.")
        if not row.any():
            raise DataError(f"the description of class {name} is all zeros, which says nothing; describe it.")
    _, first, inverse = np.unique(flat, axis=0, return_index=True, return_inverse=True)
    for i, j in enumerate(first[inverse.reshape(-1)]):
        if i != j:
            raise DataError(
                f"classes {called[j]} and {called[i]} have the same description; describe what tells them apart, "
                "or make one class of them."
            )
    return jnp.asarray(array)


def masked(x: Num[Array, "n ..."], kept: Bool[Array, "n"]) -> Num[Array, "n ..."]:
    """Zeros in the rows that are not kept."""
    return jnp.where(kept.reshape(len(x), *(1 for _ in x.shape[1:])), x, jnp.zeros_like(x))


def _range(name: str, size: Size) -> tuple[int, int]:
    least, most = (size, size) if isinstance(size, int | np.integer) else size
    if least > most:
        raise DataError(f"{name} is ({least}, {most}); give (least, most).")
    return int(least), int(most)


def _choose_classes(key: Key[Array, ""], data: EpisodeData, ways: int) -> Int[Array, "ways"]:
    family_key, class_key = jax.random.split(key)
    family = jax.random.choice(family_key, data.families)
    score = jnp.where(data.family == family, jax.random.uniform(class_key, data.first.shape), -1.0)
    return jax.lax.top_k(score, ways)[1]


def choose_rows(key: Key[Array, ""], count: Int[Array, ""], most: int, rows: int) -> Int[Array, "rows"]:
    """`rows` of the first `count` rows, without replacement, in random order; `most` bounds `count`."""
    score = jnp.where(jnp.arange(most) < count, jax.random.uniform(key, (most,)), -1.0)
    return jax.lax.top_k(score, rows)[1]


def _examples(inputs: Num[Array, "ways n ..."]) -> Examples:
    ways, n = inputs.shape[:2]
    targets = jnp.repeat(jnp.eye(ways, dtype=jnp.float32), n, axis=0)
    return Examples(inputs.reshape(ways * n, *inputs.shape[2:]), targets)


def stored(inputs: np.ndarray) -> np.ndarray:
    """Inputs as they lie on the device: bytes as they are, everything else as float32."""
    if inputs.dtype.kind not in "buif" and inputs.dtype != jnp.bfloat16:
        raise DataError(f"inputs are {inputs.dtype}; give real numbers.")
    with np.errstate(over="ignore"):  # what float32 cannot hold is refused with all that is not finite
        return inputs if inputs.dtype == np.uint8 else inputs.astype(np.float32)


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
            "ask for fewer or drop the class."
        )
