"""Losses of one task: outputs and targets of the same shape in, a scalar of at least 32 bits out."""

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jmeta.core import Examples, Mask, check_examples
from jmeta.errors import ModelError
from jmeta.tree import widened


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
    outputs, targets = widened((outputs, targets))
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
    outputs, targets = widened((outputs, targets))
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
    outputs, targets = widened((outputs, targets))
    labelled = targets.any(axis=-1) if mask is None else targets.any(axis=-1) & mask
    right = (outputs.argmax(axis=-1) == targets.argmax(axis=-1)) & labelled
    share = right.sum(dtype=outputs.dtype) / jnp.maximum(labelled.sum(dtype=outputs.dtype), 1.0)
    return jnp.where(jnp.isfinite(outputs).all(), share, jnp.nan)  # the largest of NaN would be class 0


def _check_shape(outputs: Array, targets: Array) -> None:
    check_examples("task", Examples((), targets))
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
