"""The samplers of episodes: pure functions of a key and of arrays, which run on the device inside the compiled step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key, Num

from jmeta.core import Examples, Task
from jmeta.data.queries import apportioned
from jmeta.data.unlabelled import Unlabelled, with_unlabelled
from jmeta.inputs import as_seen
from jmeta.kinds import Similar
from jmeta.masks import masked

Transform = Callable[[Key[Array, ""], Num[Array, "n ..."]], Num[Array, "n ..."]]


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


# The samplers close over no array, so that equal sources share a program.


def episode_sampler(
    ways: tuple[int, int],
    shots: tuple[int, int],
    queries: tuple[int, int],
    *,
    most: int,
    transform: Transform | None,
    ordered: bool,
    balance: float | None,
    more: Unlabelled,
) -> Callable[[Key[Array, ""], EpisodeData], Task]:
    """Draws an episode whose classes have at most `most` rows; sizes are `(least, most)`."""
    (least_ways, ways_), (least_shots, shots_), (least_queries, queries_) = ways, shots, queries
    slots = max(shots_, 1)
    labelled = slots + more.rows  # so many rows of a class come before its queries
    asked = queries_ if balance is None else min(most - labelled, ways_ * queries_)
    varies = least_ways < ways_ or least_shots < slots

    def sample(key: Key[Array, ""], data: EpisodeData) -> Task:
        class_key, row_key, transform_key = jax.random.split(key, 3)
        every = choose_classes(class_key, data, ways_ + more.classes)
        chosen = every[:ways_]
        rows = _rows_of(row_key, data, chosen, most, labelled + asked)
        rows = jnp.sort(rows, axis=1) if ordered else rows
        there = jnp.ones(ways_, bool)
        if varies:
            ways_key, shots_key = jax.random.split(jax.random.fold_in(key, 3))
            there = jnp.arange(ways_) < jax.random.randint(ways_key, (), least_ways, ways_ + 1)
        free, column, answerable = rows[:, slots:labelled], jnp.repeat(jnp.arange(ways_), queries_), None
        rows = jnp.concatenate([rows[:, :slots], rows[:, labelled:]], axis=1)
        if balance is not None:
            room, balance_key = data.count[chosen] - labelled, jax.random.fold_in(key, 5)
            place, answerable = apportioned(balance_key, balance, room, there, queries_, asked)
            column, asked_rows = place // asked, rows[:, slots:].reshape(-1)[place]
            rows = jnp.concatenate([rows[:, :slots], asked_rows.reshape(ways_, queries_)], axis=1)
        inputs = take(transform, transform_key, data, rows.reshape(-1))
        inputs = inputs.reshape(ways_, slots + queries_, *inputs.shape[1:])
        own = jnp.repeat(jnp.arange(ways_), slots)
        support = _examples(inputs[:, :slots], chosen, own, data.rows[rows[:, :slots]])
        query = _examples(inputs[:, slots:], chosen, column, data.rows[rows[:, slots:]])
        if varies:
            counts = jnp.where(there, jax.random.randint(shots_key, (ways_,), least_shots, shots_ + 1), 0)
            support = keep(support, (jnp.arange(slots)[None] < counts[:, None]).reshape(-1))
            if least_queries == queries_:
                query = keep(query, jnp.repeat(there, queries_) if answerable is None else answerable)
        if least_queries < queries_:
            drawn = jax.random.randint(jax.random.fold_in(key, 4), (ways_,), least_queries, queries_ + 1)
            asked_of = jnp.where(there, drawn, 0)
            query = keep(query, (jnp.arange(queries_)[None] < asked_of[:, None]).reshape(-1))
        if more.rows:
            others = _rows_of(jax.random.fold_in(key, 6), data, every[ways_:], most, more.rows)
            rows = jnp.concatenate([free, others]).reshape(-1)
            inputs = take(transform, jax.random.fold_in(key, 7), data, rows)
            kept = jnp.concatenate([there, jnp.ones(more.classes, bool)])
            kept, classes = jnp.repeat(kept, more.rows), jnp.repeat(every, more.rows)
            added = Examples(inputs, (), mask=kept, classes=classes, rows=data.rows[rows])
            support = with_unlabelled(support, added)
        told = descriptions_of(transform, jax.random.fold_in(key, 8), data.descriptions, chosen, there)
        return Task(support._replace(descriptions=told), query)

    return sample


def descriptions_of(
    transform: Transform | None, key: Key[Array, ""], descriptions: Any, chosen: Int[Array, "ways"], there: Any
) -> Any:
    """The descriptions of the classes that are there; images of similar classes are seen and augmented as all are."""

    def of_kind(kind: Any) -> Any:
        own = jax.tree.map(lambda x: masked(x[chosen], there), kind)
        if not isinstance(own, Similar):
            return own
        flat = as_seen(own.images.reshape(-1, *own.images.shape[2:]))
        flat = flat if transform is None else transform(key, flat)
        return own._replace(images=flat.reshape(*own.images.shape[:2], *flat.shape[1:]))

    return jax.tree.map(of_kind, descriptions, is_leaf=lambda x: isinstance(x, Similar))


def _rows_of(
    key: Key[Array, ""], data: EpisodeData, classes: Int[Array, "ways"], most: int, rows: int
) -> Int[Array, "ways rows"]:
    """Rows of each class, in random order."""
    return jax.vmap(lambda key, first, count: first + choose_rows(key, count, most, rows))(
        jax.random.split(key, len(classes)), data.first[classes], data.count[classes]
    )


def batch_sampler(batch: int, transform: Transform | None) -> Callable[[Key[Array, ""], EpisodeData], Task]:
    """Draws rows of all classes at once, with replacement."""

    def sample(key: Key[Array, ""], data: EpisodeData) -> Task:
        row_key, transform_key = jax.random.split(key)
        rows = jax.random.randint(row_key, (batch,), 0, len(data.inputs))
        inputs = take(transform, transform_key, data, rows)
        labels = (jnp.searchsorted(data.first, rows, side="right") - 1).astype(jnp.int32)
        targets = jax.nn.one_hot(labels, len(data.first), dtype=jnp.float32)
        return Task((), Examples(inputs, targets, classes=labels, rows=data.rows[rows]))

    return sample


def take(
    transform: Transform | None, key: Key[Array, ""], data: EpisodeData, rows: Int[Array, "n"]
) -> Num[Array, "n ..."]:
    """The inputs of rows, as a network sees them."""
    inputs = as_seen(data.inputs[rows])
    return inputs if transform is None else transform(key, inputs)


def choose_classes(key: Key[Array, ""], data: EpisodeData, ways: int) -> Int[Array, "ways"]:
    """Classes of one family, without replacement, in random order."""
    family_key, class_key = jax.random.split(key)
    family = jax.random.choice(family_key, data.families)
    score = jnp.where(data.family == family, jax.random.uniform(class_key, data.first.shape), -1.0)
    return jax.lax.top_k(score, ways)[1]


def choose_rows(key: Key[Array, ""], count: Int[Array, ""], most: int, rows: int) -> Int[Array, "rows"]:
    """`rows` of the first `count` rows, without replacement, in random order; `most` bounds `count`."""
    score = jnp.where(jnp.arange(most, dtype=count.dtype) < count, jax.random.uniform(key, (most,)), -1.0)
    return jax.lax.top_k(score, rows)[1]


def _examples(
    inputs: Num[Array, "ways n ..."], classes: Int[Array, "ways"], column: Int[Array, "m"], rows: Int[Array, "ways n"]
) -> Examples:
    targets = jnp.eye(len(classes), dtype=jnp.float32)[column]
    told = {"classes": classes[column], "rows": rows.reshape(-1)}
    return Examples(inputs.reshape(len(column), *inputs.shape[2:]), targets, **told)


def keep(examples: Examples, kept: Bool[Array, "n"]) -> Examples:
    """The examples without the labels of those that are not kept, and with kept inputs, in turn, in their places."""
    order = jnp.argsort(~kept, stable=True)
    row = jnp.arange(len(kept))
    inputs = examples.inputs[jnp.where(kept, row, order[row % jnp.maximum(kept.sum(), 1)])]
    inputs = jnp.where(kept.any(), inputs, jnp.zeros_like(inputs))
    targets = examples.targets * kept[:, None].astype(examples.targets.dtype)
    return examples._replace(inputs=inputs, targets=targets, mask=kept)
