"""Losses of one task: outputs and targets of the same shape in, a scalar out."""

import inspect
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from jmeta.errors import ModelError

Mask = Bool[Array, "n"] | None


def measured(measure: Callable[..., Any], outputs: Any, examples: Any) -> Any:
    """A loss or metric of the outputs for examples, of which rows outside of the mask do not count.

    Args:
        measure: `(outputs, targets) -> scalar`, or `(outputs, targets, mask=) -> scalar` for tasks with a mask.
        outputs: `[n, ...]`.
        examples: `Examples`, or whatever has `targets`.

    Returns:
        Its value.

    Raises:
        ModelError: the examples have a mask, and `measure` takes none.

    Example:
        >>> import jax.numpy as jnp, jmeta
        >>> from jmeta.losses import measured
        >>> padded = jmeta.Examples((), jnp.ones((2, 1)), mask=jnp.asarray([True, False]))
        >>> float(measured(jmeta.mean_squared_error, jnp.asarray([[1.0], [9.0]]), padded))
        0.0
    """
    mask = getattr(examples, "mask", ())
    if isinstance(mask, tuple):
        return measure(outputs, examples.targets)
    parameters = inspect.signature(measure).parameters.values()
    if not any(p.name == "mask" or p.kind is p.VAR_KEYWORD for p in parameters):
        name = getattr(measure, "__name__", "the loss")
        raise ModelError(
            f"the tasks have rows that are not there, and {name} takes no mask; let it take `mask=` and leave those "
            "rows away, as jmeta.mean_squared_error does."
        )
    return measure(outputs, examples.targets, mask=mask)


def softmax_cross_entropy(
    outputs: Float[Array, "..."], targets: Float[Array, "n ways"], mask: Mask = None
) -> Float[Array, ""]:
    """The mean over the examples of −Σₖ targetsₖ log softmax(outputs)ₖ.

    Args:
        outputs: `[n, ways]` logits.
        targets: `[n, ways]` one-hot; a row of zeros does not count.
        mask: `[n]`, which rows are there. Default: all.

    Returns:
        The mean loss; code that sums over the `n` examples needs an inner rate α smaller by a factor of `n`.

    Raises:
        ModelError: the outputs do not have the shape of the targets.

    Example:
        >>> import jax.numpy as jnp, jmeta
        >>> float(jmeta.softmax_cross_entropy(jnp.zeros((3, 2)), jnp.eye(3, 2))).__round__(4)
        0.6931
    """
    _check_shape(outputs, targets)
    targets = targets if mask is None else targets * mask[:, None].astype(targets.dtype)
    return optax.losses.softmax_cross_entropy(outputs, targets).sum() / jnp.maximum(targets.sum(), 1.0)


def mean_squared_error(
    outputs: Float[Array, "..."], targets: Float[Array, "n outputs"], mask: Mask = None
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
    _check_shape(outputs, targets)
    squares = jnp.square(outputs - targets)
    if mask is None:
        return squares.mean()
    there = mask.astype(squares.dtype)
    return there @ squares.reshape(len(squares), -1).mean(axis=1) / jnp.maximum(there.sum(), 1.0)


def accuracy(outputs: Float[Array, "..."], targets: Float[Array, "n ways"], mask: Mask = None) -> Float[Array, ""]:
    """The share of examples whose largest output is the target class.

    Args:
        outputs: `[n, ways]` logits.
        targets: `[n, ways]` one-hot; a row of zeros does not count.
        mask: `[n]`, which rows are there. Default: all.

    Returns:
        A share in `[0, 1]`; NaN where an output is not finite.

    Raises:
        ModelError: the outputs do not have the shape of the targets.

    Example:
        >>> import jax.numpy as jnp, jmeta
        >>> float(jmeta.accuracy(jnp.eye(2), jnp.eye(2)))
        1.0
    """
    _check_shape(outputs, targets)
    labelled = targets.any(axis=-1) if mask is None else targets.any(axis=-1) & mask
    right = (outputs.argmax(axis=-1) == targets.argmax(axis=-1)) & labelled
    share = right.sum(dtype=outputs.dtype) / jnp.maximum(labelled.sum(dtype=outputs.dtype), 1.0)
    return jnp.where(jnp.isfinite(outputs).all(), share, jnp.nan)  # the largest of NaN would be class 0


def _check_shape(outputs: Array, targets: Array) -> None:
    if outputs.ndim != targets.ndim:
        raise ModelError(
            f"the model's outputs have shape {list(outputs.shape)} where the targets have {list(targets.shape)}; give "
            "one row of outputs for each input, and images a channel axis (images[..., None])."
        )
    if outputs.shape != targets.shape:
        raise ModelError(
            f"the model's outputs have shape {list(outputs.shape)} where the targets have {list(targets.shape)}; "
            f"give the model {targets.shape[-1]} outputs."
        )
