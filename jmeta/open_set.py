"""Rejection: episodes with queries of no class, and how well outputs tell them from the others."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key, PyTree

from jmeta.core import Examples, Mask, Task, TaskSource
from jmeta.errors import ConfigError, DataError
from jmeta.losses import Pooled, checked

Certainty = Callable[[Float[Array, "n ways"]], Float[Array, "n"]]
Sample = Callable[[Key[Array, ""], PyTree], Task]


def max_logit(outputs: Float[Array, "n ways"]) -> Float[Array, "n"]:
    """The largest output of a query: of a prototypical network, minus the distance to the nearest class.

    Args:
        outputs: `[n, ways]` logits.

    Returns:
        `[n]`, large where a query looks like one of a class.

    Example:
        >>> import jax.numpy as jnp, jmeta
        >>> jmeta.max_logit(jnp.asarray([[0.0, -2.0], [-9.0, -8.0]])).tolist()
        [0.0, -8.0]

    Reference: Vaze, Han, Vedaldi, Zisserman 2022, "Open-Set Recognition: a Good Closed-Set Classifier is All You
    Need?", section 5, https://arxiv.org/abs/2110.06207.
    """
    return outputs.max(axis=1)


def max_probability(outputs: Float[Array, "n ways"]) -> Float[Array, "n"]:
    """The largest probability, softmax(outputs), of a query, which a query far from all classes may have as well.

    Args:
        outputs: `[n, ways]` logits.

    Returns:
        `[n]`.

    Example:
        >>> import jax.numpy as jnp, jmeta
        >>> jmeta.max_probability(jnp.zeros((1, 4))).tolist()
        [0.25]

    Reference: Hendrycks, Gimpel 2017, "A Baseline for Detecting Misclassified and Out-of-Distribution Examples in
    Neural Networks", https://arxiv.org/abs/1610.02136.
    """
    return jax.nn.softmax(outputs, axis=1).max(axis=1)


def with_unknown(source: TaskSource, outside: Any = True) -> TaskSource:
    """Episodes whose queries are followed by as many that are of none of their classes: rows of zeros in the targets.

    Args:
        source: of the episodes.
        outside: `[n, ...]`, inputs that are of no class, at least as many as an episode has queries; or True, for the
            queries of another episode that are of other classes.

    Returns:
        A source of such tasks, with the same support and the same known queries.

    Raises:
        ConfigError: the source does not tell the class of a query, or reads its examples while it is used.
        DataError: inputs of another shape, or too few of them.

    Example:
        >>> import jax, jmeta
        >>> from jmeta.open_set import with_unknown
        >>> source = with_unknown(jmeta.glyphs(queries=2))
        >>> source.sample(jax.random.key(0), source.data).query.targets.sum(axis=1).tolist()
        [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    """
    query = jax.eval_shape(source.sample, jax.random.key(0), source.data).query
    others = outside is True
    if source.feed is not None or (others and isinstance(getattr(query, "classes", ()), tuple)):
        raise ConfigError(
            "queries of other classes are drawn from the source, and this one does not tell the class of a query, or "
            "reads its examples while it is used; give it in memory with classes, as jmeta.from_arrays does."
        )
    if not others:
        outside, shape = jnp.asarray(outside), query.inputs.shape
        if outside.shape[1:] != shape[1:] or len(outside) < shape[0]:
            raise DataError(
                f"open_set has the shape {list(outside.shape)}, and an episode has queries {list(shape)}; give inputs "
                "of that shape, as many or more."
            )
    about = {"open_set": "other classes" if others else "inputs of no class"}
    data = (source.data, () if others else outside)
    return source._replace(data=data, sample=_opened(source.sample), protocol={**source.protocol, **about})


@functools.lru_cache(maxsize=64)  # of one sampler one other, so that programs are compiled once
def _opened(sample: Sample) -> Sample:
    def opened(key: Key[Array, ""], data: PyTree) -> Task:
        known, outside = data
        task, unknown_key = sample(key, known), jax.random.fold_in(key, 11)
        n = len(task.query.targets)
        if isinstance(outside, tuple):
            inputs, there = _of_other_classes(task.query, sample(unknown_key, known).query)
        else:
            inputs = outside[jax.random.choice(unknown_key, len(outside), (n,), replace=False)]
            there = jnp.ones(n, bool)
        return task._replace(query=_followed(task.query, inputs.astype(task.query.inputs.dtype), there))

    return opened


def _of_other_classes(query: Examples, other: Examples) -> tuple[Array, Bool[Array, "n"]]:
    """The inputs of another episode's queries that are of other classes, in turn, and which of them are new."""
    n, (theirs, own) = len(other.targets), map(jnp.asarray, (other.classes, query.classes))
    new = ~(theirs[:, None] == own[None]).any(axis=1)
    new = new if isinstance(other.mask, tuple) else new & other.mask
    order, count = jnp.argsort(~new, stable=True), new.sum()
    return other.inputs[order[jnp.arange(n) % jnp.maximum(count, 1)]], jnp.arange(n) < count


def _followed(query: Examples, inputs: Array, there: Bool[Array, "n"]) -> Examples:
    """Queries, and after them those of no class."""
    n = len(query.targets)
    mask = jnp.ones(n, bool) if isinstance(query.mask, tuple) else query.mask
    unknown = jnp.full(len(inputs), -1, jnp.int32)
    told = {
        name: jnp.concatenate([x, unknown])
        for name in ("classes", "rows")
        if not isinstance(x := getattr(query, name), tuple)
    }
    return query._replace(
        inputs=jnp.concatenate([query.inputs, inputs]),
        targets=jnp.concatenate([query.targets, jnp.zeros((len(inputs), query.targets.shape[1]), query.targets.dtype)]),
        mask=jnp.concatenate([mask, there]),
        **told,
    )


@functools.lru_cache(maxsize=64)
def rejection_metrics(certainty: Certainty) -> dict[str, Callable[..., Any]]:
    """Metrics of outputs for queries of which those with a row of zeros in the targets are of no class.

    Args:
        certainty: what is large for a query of a class.

    Returns:
        `auroc`: how often a query of a class scores above one of none, ties counting half; `fpr95`: the share of those
        of no class that are accepted at the threshold which 95 % of the others reach; `threshold`, the mean of it over
        the episodes. Both compare the queries of one episode with each other, and are shares of all of them.
    """

    def scores(outputs: Array, targets: Array, mask: Mask) -> tuple[Array, Array, Array]:
        outputs, targets = checked(outputs, targets, classes=True)
        score, there = certainty(outputs), jnp.ones(len(targets), bool) if mask is None else mask
        return score, targets.any(axis=1) & there, ~targets.any(axis=1) & there

    def threshold(outputs: Array, targets: Array, mask: Mask = None) -> Array:
        score, known, _ = scores(outputs, targets, mask)
        return _reached(score, known)

    def wins(outputs: Array, targets: Array, mask: Mask = None) -> dict[str, Array]:
        score, known, unknown = scores(outputs, targets, mask)
        pairs = (known[:, None] & unknown[None]).astype(score.dtype)
        above = jnp.sign(score[:, None] - score[None]) * 0.5 + 0.5
        return {"wins": (pairs * above).sum(), "pairs": pairs.sum()}

    def accepted(outputs: Array, targets: Array, mask: Mask = None) -> dict[str, Array]:
        score, known, unknown = scores(outputs, targets, mask)
        of = unknown.astype(score.dtype)
        return {"wins": jnp.where(score >= _reached(score, known), of, 0.0).sum(), "pairs": of.sum()}

    return {
        "auroc": Pooled(wins, _share, "auroc"),
        "fpr95": Pooled(accepted, _share, "fpr95"),
        "threshold": threshold,
    }


def _reached(score: Float[Array, "n"], known: Bool[Array, "n"], share: float = 0.95) -> Float[Array, ""]:
    """The largest threshold that at least this share of the known reach."""
    count = known.sum()
    most = jnp.ceil(share * count.astype(jnp.float32) - 1e-4).astype(jnp.int32)
    return jnp.sort(jnp.where(known, score, jnp.inf))[jnp.maximum(count - most, 0)]


def _share(statistics: Mapping[str, Any]) -> Any:
    return statistics["wins"] / statistics["pairs"]


def check_unknown(values: Mapping[str, Any]) -> None:
    """Raises `ConfigError` where no episode of a result had a query of no class."""
    if not values["auroc"]["pairs"].any():
        raise ConfigError(
            "no episode has a query of no class: the source has no other classes than those of an episode; ask for "
            "fewer ways, or give open_set= inputs that are of no class."
        )
