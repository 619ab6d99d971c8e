"""Tasks of any number of ways and of unequal shots, as Meta-Dataset draws them."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from jmeta.core import Examples, Task, TaskSource
from jmeta.data.sampling import EpisodeData, Transform, choose_classes, choose_rows, descriptions_of, keep, take
from jmeta.errors import DataError

_MOST_SHOTS = 100  # a class with more rows counts as one of so many
_LEAST_WAYS = 5


def varying(
    source: TaskSource,
    *,
    ways: tuple[int, int] = (_LEAST_WAYS, 50),
    queries: int = 10,
    support: int = 500,
    transform: Transform | None = None,
) -> TaskSource:
    """The episodes of Meta-Dataset: many ways or few, and shots that differ between the classes of an episode.

    Of an episode's N classes, N uniform in `ways`, each has q queries, q = min(`queries`, half of the rows of the
    smallest). The support has min(`support`, Σₖ ⌈β min(100, nₖ − q)⌉) examples, β uniform in (0, 1]. Class k has
    min(⌊Rₖ (support − N)⌋ + 1, nₖ − q) of them, Rₖ in proportion to e^αₖ nₖ, αₖ uniform in [ln ½, ln 2].

    Args:
        source: of `jmeta.from_arrays`, whose arrays the episodes are cut from; `jmeta.glyphs`, `jmeta.omniglot`,
            `jmeta.from_folder`, `jmeta.from_embeddings`, `jmeta.tfds` and `jmeta.benchmark` make such sources.
        ways: `(least, most)`; no more than there are classes.
        queries: no more of a class than so many.
        support: no more examples of all classes together than so many.
        transform: `(key, inputs [n, ...]) -> inputs`, augmentation on the device; that of `source` is left.

    Returns:
        A source of tasks with `Examples` of `support` and of `ways · queries` rows, of which those that are there are
        in the mask, see `jmeta.from_arrays`.

    Raises:
        DataError: a source that was not cut from arrays, or that has fewer classes than `ways`.

    Example:
        >>> import jax, jmeta, numpy as np
        >>> images = np.random.default_rng(0).normal(size=(60, 8, 8, 1))
        >>> source = jmeta.varying(jmeta.from_arrays(images, np.repeat(np.arange(6), 10), queries=5), support=20)
        >>> task = source.sample(jax.random.key(0), source.data)
        >>> task.support.targets.shape, bool((task.support.targets.sum(axis=0) > 0).sum() >= 5)
        ((20, 6), True)

    Reference: Triantafillou et al. 2020, "Meta-Dataset: A Dataset of Datasets for Learning to Learn from Few Examples",
    section 3.2 and appendix A.

    Differences from the paper: a data set whose classes have a hierarchy is drawn from as any other.
    """
    if not isinstance(source.data, EpisodeData):
        raise DataError("the episodes of varying are cut from arrays; give it a source of jmeta.from_arrays.")
    family, families = np.asarray(source.data.family), np.asarray(source.data.families)
    classes = min(int((family == one).sum()) for one in families)
    least, most = min(ways), min(max(ways), classes)
    if classes < least or least < 2:
        raise DataError(f"ways is {tuple(ways)}, and the source has {classes} classes; give from 2 to {classes}.")
    if support < most:
        raise DataError(f"support is {support}, and each of {most} ways has an example; give at least {most}.")
    if queries < 1 or int(source.data.count.min()) < 2:
        raise DataError("each class needs a query and a shot; give queries of at least 1, and classes of two rows.")
    largest = int(source.data.count.max())
    sample = _sampler(least, most, queries, support, largest, transform)
    about = {name: value for name, value in source.protocol.items() if name not in ("ways", "shots", "queries")}
    told = {"ways": [least, most], "shots": "varying", "queries": queries, "support": support}
    return TaskSource(source.data, sample, {**about, **told}, source.names)


def _sampler(
    least: int, most: int, queries: int, support: int, largest: int, transform: Transform | None
) -> Callable[[Key[Array, ""], EpisodeData], Task]:
    def sample(key: Key[Array, ""], data: EpisodeData) -> Task:
        class_key, ways_key, shots_key, row_key, transform_key = jax.random.split(key, 5)
        chosen = choose_classes(class_key, data, most)
        there = jnp.arange(most) < jax.random.randint(ways_key, (), least, most + 1)
        count = data.count[chosen]
        asked = jnp.minimum(queries, jnp.where(there, count, largest).min() // 2)
        shots = jnp.where(there, shots_of(shots_key, count, there, asked, support), 0)
        # of each class its queries come first, then its shots
        order = jax.vmap(lambda key, count: choose_rows(key, count, largest, largest))(
            jax.random.split(row_key, most), count
        )
        column, place = _places(shots, support)
        rows = data.first[chosen][column] + order[column, jnp.minimum(asked + place, largest - 1)]
        own = jnp.arange(support) < shots.sum()
        q = jnp.arange(most * queries)
        query_rows = data.first[chosen][q // queries] + order[q // queries, jnp.minimum(q % queries, largest - 1)]
        answerable = there[q // queries] & (q % queries < asked)
        rows = jnp.concatenate([jnp.where(own, rows, 0), jnp.where(answerable, query_rows, 0)])
        inputs = take(transform, transform_key, data, rows)

        def examples(part: slice, column: Int[Array, "n"], kept: Array) -> Examples:
            targets = jnp.eye(most, dtype=jnp.float32)[column]
            told = {"classes": chosen[column], "rows": data.rows[rows[part]]}
            return keep(Examples(inputs[part], targets, **told), kept)

        told = descriptions_of(transform, jax.random.fold_in(key, 8), data.descriptions, chosen, there)
        of_support = examples(slice(support), column, own)._replace(descriptions=told)
        return Task(of_support, examples(slice(support, None), q // queries, answerable))

    return sample


def shots_of(
    key: Key[Array, ""], count: Int[Array, "ways"], there: Array, queries: Int[Array, ""], support: int
) -> Int[Array, "ways"]:
    """The shots of each class that is there, of `count` rows each; their sum is at most `support`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jmeta.data.varying import shots_of
        >>> shots = shots_of(jax.random.key(0), jnp.asarray([20, 40]), jnp.asarray([True, True]), jnp.asarray(5), 30)
        >>> bool((shots >= 1).all()), int(shots.sum()) <= 30
        (True, True)
    """
    β_key, α_key = jax.random.split(key)
    β = 1.0 - jax.random.uniform(β_key)  # in (0, 1]
    free = jnp.where(there, jnp.minimum(_MOST_SHOTS, count - queries), 0).astype(jnp.float32)
    total = jnp.minimum(float(support), jnp.ceil(β * free).sum())
    α = jax.random.uniform(α_key, count.shape, minval=math.log(0.5), maxval=math.log(2.0))
    share = jnp.where(there, jnp.exp(α) * count.astype(jnp.float32), 0.0)
    wanted = jnp.floor(share / share.sum() * (total - there.sum().astype(jnp.float32))).astype(count.dtype) + 1
    return jnp.minimum(wanted, count - queries)


def _places(shots: Int[Array, "ways"], support: int) -> tuple[Int[Array, "support"], Int[Array, "support"]]:
    """The class of each row of the support, and which of its shots the row is."""
    ends = jnp.cumsum(shots)
    row = jnp.arange(support, dtype=ends.dtype)
    column = jnp.minimum(jnp.searchsorted(ends, row, side="right"), len(shots) - 1).astype(jnp.int32)
    return column, jnp.clip(row - (ends - shots)[column], 0, jnp.maximum(shots[column] - 1, 0))
