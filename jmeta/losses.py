"""Losses and metrics of one task: outputs and targets of the same shape in, a scalar of at least 32 bits out."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Num, PyTree

from jmeta.core import Examples, Mask, check_examples
from jmeta.errors import ModelError
from jmeta.tree import widened


def softmax_cross_entropy(
    outputs: PyTree, targets: Num[Array, "n ways"] | Bool[Array, "n ways"] | tuple[()], mask: Mask = None
) -> Float[Array, ""]:
    """The mean over the examples of −Σₖ targetsₖ log softmax(outputs)ₖ.

    Args:
        outputs: `[n, ways]` logits.
        targets: `[n, ways]` one-hot, or a probability of each class; a row of zeros does not count.
        mask: `[n]`, which rows are there. Default: all.

    Returns:
        The mean loss; code that sums over the `n` examples needs an inner rate α smaller by a factor of `n`.

    Raises:
        ModelError: the outputs do not have the shape of the targets, or these are no classes: a regression.

    Example:
        >>> import jax.numpy as jnp, jmeta
        >>> float(jmeta.softmax_cross_entropy(jnp.zeros((3, 2)), jnp.eye(3, 2))).__round__(4)
        0.6931
    """
    outputs, targets = checked(outputs, targets, classes=True)
    targets = targets if mask is None else targets * mask[:, None].astype(targets.dtype)
    return optax.losses.softmax_cross_entropy(outputs, targets).sum() / jnp.maximum(targets.sum(), 1.0)


def mean_squared_error(
    outputs: PyTree, targets: Num[Array, "n outputs"] | Bool[Array, "n outputs"] | tuple[()], mask: Mask = None
) -> Float[Array, ""]:
    """The mean over examples and outputs of (outputs − targets)².

    Args:
        outputs: `[n, outputs]`.
        targets: `[n, outputs]`.
        mask: `[n]`, which rows are there. Default: all.

    Returns:
        The mean squared error.

    Raises:
        ModelError: the outputs do not have the shape of the targets.

    Example:
        >>> import jax.numpy as jnp, jmeta
        >>> float(jmeta.mean_squared_error(jnp.zeros((4, 1)), 2 * jnp.ones((4, 1))))
        4.0
    """
    outputs, targets = checked(outputs, targets)
    squares = jnp.square(outputs - targets)
    if mask is None:
        return squares.mean()
    there = mask.astype(squares.dtype)
    return there @ squares.reshape(len(squares), -1).mean(axis=1) / jnp.maximum(there.sum(), 1.0)


def accuracy(
    outputs: PyTree, targets: Num[Array, "n ways"] | Bool[Array, "n ways"] | tuple[()], mask: Mask = None
) -> Float[Array, ""]:
    """The share of examples whose largest output is the target class.

    Args:
        outputs: `[n, ways]` logits.
        targets: `[n, ways]` one-hot; a row of zeros does not count.
        mask: `[n]`, which rows are there. Default: all.

    Returns:
        A share in `[0, 1]`; NaN where an output is not finite.

    Raises:
        ModelError: the outputs do not have the shape of the targets, or these are no classes: a regression.

    Example:
        >>> import jax.numpy as jnp, jmeta
        >>> float(jmeta.accuracy(jnp.eye(2), jnp.eye(2)))
        1.0
    """
    outputs, targets = checked(outputs, targets, classes=True)
    labelled = targets.any(axis=-1) if mask is None else targets.any(axis=-1) & mask
    right = (outputs.argmax(axis=-1) == targets.argmax(axis=-1)) & labelled
    share = right.sum(dtype=outputs.dtype) / jnp.maximum(labelled.sum(dtype=outputs.dtype), 1.0)
    return jnp.where(jnp.isfinite(outputs).all(), share, jnp.nan)  # the largest of NaN would be class 0


@dataclasses.dataclass(frozen=True)
class Pooled:
    """A metric of all queries of all episodes together, where a mean of one number a task would be another number.

    summary(mean over the episodes of statistics); called with the outputs of one task it is that of this task alone.

    Args:
        statistics: `(outputs, targets, mask=None)` -> arrays that are averaged over the episodes: sums, so that an
            episode counts by its queries.
        summary: means of the statistics, as NumPy arrays -> scalar.
        name: in results. Default: that of `statistics`.

    Example:
        >>> import jax.numpy as jnp, jmeta
        >>> def squares(outputs, targets, mask=None):
        ...     return jnp.square(outputs - targets).mean()
        >>> root_mean_square = jmeta.Pooled(squares, lambda mean: mean**0.5)
        >>> float(root_mean_square(jnp.zeros((4, 1)), 2 * jnp.ones((4, 1))))
        2.0
    """

    statistics: Callable[..., PyTree]
    summary: Callable[[PyTree], Any]
    name: str = ""

    @property
    def __name__(self) -> str:
        """As a function has it."""
        return self.name or self.statistics.__name__

    def __call__(self, outputs: PyTree, targets: PyTree, mask: Mask = None) -> Any:
        """The metric of one set of outputs."""
        given = {} if mask is None else {"mask": mask}
        return self.summary(self.statistics(outputs, targets, **given))


def negative_log_likelihood(
    outputs: Float[Array, "..."], targets: Float[Array, "n ways"], mask: Mask = None
) -> Float[Array, ""]:
    """−log softmax(outputs) of the target class, the mean over examples: `jmeta.softmax_cross_entropy` as a metric.

    Args:
        outputs: `[n, ways]` logits.
        targets: `[n, ways]` one-hot; a row of zeros does not count.
        mask: `[n]`, which rows are there. Default: all.

    Returns:
        The mean; log(ways) is that of who knows nothing.

    Raises:
        ModelError: the outputs do not have the shape of the targets.

    Example:
        >>> import jax.numpy as jnp, jmeta
        >>> float(jmeta.negative_log_likelihood(jnp.zeros((3, 2)), jnp.eye(3, 2))).__round__(4)
        0.6931
    """
    return softmax_cross_entropy(outputs, targets, mask)


_BINS = 15


def _gaps(outputs: Float[Array, "..."], targets: Float[Array, "n ways"], mask: Mask = None) -> dict[str, Array]:
    """Of the examples in each bin the sum of confidence − rightness, and the number of all examples."""
    outputs, targets = checked(outputs, targets, classes=True)
    labelled = targets.any(axis=-1) if mask is None else targets.any(axis=-1) & mask
    probabilities = jax.nn.softmax(outputs, axis=-1)
    confidence = probabilities.max(axis=-1)
    right = (outputs.argmax(axis=-1) == targets.argmax(axis=-1)).astype(confidence.dtype)
    bins = jnp.clip(jnp.ceil(confidence * _BINS) - 1, 0, _BINS - 1).astype(jnp.int32)
    there = labelled.astype(confidence.dtype)
    return {"gaps": jax.nn.one_hot(bins, _BINS, dtype=there.dtype).T @ (there * (confidence - right)), "n": there.sum()}


def _mean_gap(statistics: Mapping[str, Any]) -> Any:
    return abs(statistics["gaps"]).sum() / statistics["n"]


expected_calibration_error = Pooled(_gaps, _mean_gap, "expected_calibration_error")
"""Σ over 15 bins of equal width of |Σ over the queries in the bin of (confidence − right)| / n.

The confidence of an answer is its probability, softmax(outputs) of the largest output: a query is right as often as it
is sure where the error is 0. `jmeta.evaluate` takes all queries of all episodes together, as few queries would never
look calibrated.

Example:
    >>> import jax.numpy as jnp, jmeta
    >>> float(jmeta.expected_calibration_error(jnp.zeros((2, 2)), jnp.eye(2)))  # half sure, half right
    0.0

Reference: Guo et al. 2017, "On Calibration of Modern Neural Networks", equation 3, https://arxiv.org/abs/1706.04599.
"""


_needed: ContextVar[list[str] | None] = ContextVar("needed", default=None)


@contextlib.contextmanager
def targets_needed() -> Iterator[list[str]]:
    """Collects what losses and metrics that are traced inside need of the values of targets: `"classes"`, or nothing.

    Shapes are known when a program is traced, values are not: who has a task looks at them by `check_classes`.

    Yields:
        The list, filled afterwards.
    """
    found: list[str] = []
    token = _needed.set(found)
    try:
        yield found
    finally:
        _needed.reset(token)


def are_classes(targets: Num[Array, "n ways"] | Bool[Array, "n ways"]) -> Bool[Array, ""]:
    """Whether every row is one-hot, a distribution over the classes, or zeros."""
    x = jnp.asarray(targets, jnp.float32)
    return ~((x < 0).any() | (x.sum(axis=-1) > 1.0 + 1e-3).any())  # what is no number is told elsewhere


def check_classes(name: str, examples: Any) -> None:
    """Raises `ModelError` where targets that a classifying loss was given are numbers of a regression."""
    targets: Any = getattr(examples, "targets", ())
    if isinstance(targets, jax.core.Tracer) or np.ndim(targets) != 2:
        return
    if not bool(are_classes(targets)):
        row = next(r for r in jnp.asarray(widened(targets)) if not bool(are_classes(r[None])))
        raise ModelError(
            f"the targets of the {name} are no classes, one-hot: a row is {[round(float(x), 4) for x in row[:5]]}; for "
            f"a regression {_REGRESSION}, for classes give jax.nn.one_hot(labels, ways)."
        )


_REGRESSION = "give the learner loss=jmeta.mean_squared_error and evaluate metric=jmeta.mean_squared_error"


def checked(outputs: Any, targets: Any, classes: bool = False) -> tuple[Array, Array]:
    """Outputs and targets as floats of at least 32 bits, `ModelError` unless they fit each other and the loss."""
    check_examples("task", Examples((), targets))
    if not hasattr(outputs, "ndim"):
        raise ModelError(
            f"the learner's answers are a {type(outputs).__name__} and no array; give metric=jmeta.mean_return where "
            "the tasks are environments, or a loss and metric of your own."
        )
    if outputs.ndim != targets.ndim:
        raise ModelError(
            f"the model's outputs have shape {list(outputs.shape)} where the targets have {list(targets.shape)}; give "
            "one row of outputs for each input, and images a channel axis (images[..., None])."
        )
    if outputs.shape != targets.shape:
        raise ModelError(
            f"the model's outputs have shape {list(outputs.shape)} where the targets have {list(targets.shape)}; "
            f"give the model {targets.shape[-1]} outputs, or the tasks {outputs.shape[-1]} columns by ways= (of "
            "jmeta.from_groups classes=)."
        )
    if classes and targets.shape[-1] == 1:
        raise ModelError(
            "the targets have one column, which is one class of one, and any answer is right; for a regression "
            f"{_REGRESSION}."
        )
    if classes and (needed := _needed.get()) is not None:
        needed.append("classes")
    outputs, targets = widened((outputs, targets))
    return outputs, targets if jnp.issubdtype(targets.dtype, jnp.inexact) else targets.astype(outputs.dtype)
