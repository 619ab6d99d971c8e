"""What a network sees of an array: the one rule, for sources, classifiers and the command line."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Num, PyTree

from jmeta.errors import DataError

_AMBIGUOUS = 15  # the largest byte that bits and small codes have, and pictures as a rule do not


class Standardisation(NamedTuple):
    """Means and spreads that bring the numbers of a table near 1, whatever their units.

    Args:
        mean: `[features]`, of the inputs.
        spread: `[features]`, their standard deviations.
        target_mean: of the targets.
        target_spread: their standard deviation.

    Example:
        >>> import jmeta, numpy as np
        >>> standardisation = jmeta.Standardisation(np.asarray([10.0]), np.asarray([2.0]), 0.0, 100.0)
        >>> np.asarray(standardisation.inputs(np.asarray([[14.0]]))).tolist()
        [[2.0]]
    """

    mean: Any
    spread: Any
    target_mean: float
    target_spread: float

    def inputs(self, x: Any) -> Any:
        """(x − mean) / spread."""
        mean, spread = (jnp.asarray(a, jnp.float32)[None] for a in (self.mean, self.spread))
        return (x - mean) / spread

    def targets(self, y: Any) -> Any:
        """(y − mean) / spread."""
        return (y - jnp.float32(self.target_mean)) / jnp.float32(self.target_spread)

    def outputs(self, y: Any) -> Any:
        """What a network answers in the units of the table: y · spread + mean."""
        return y * jnp.float32(self.target_spread) + jnp.float32(self.target_mean)


def as_inputs(x: Any) -> Num[np.ndarray, "n ..."]:
    """Rows as a network of jmeta's sources sees them: pictures of bytes from 0 to 1, all else as it is.

    * unsigned bytes whose rows have three axes or more, `[n, height, width, channels]`, are pictures: x / 255, float32;
    * other integers, token ids, counts or fingerprints of 0 and 1, stay integers: int32;
    * floats and booleans become float32.

    Every source of jmeta (`from_arrays`, `from_groups`, `from_assays`) and `FewShotClassifier` apply this to what they
    are given; what you give to `adapt` and `predict` of a learner yourself goes through it first.

    Args:
        x: `[n, ...]`.

    Returns:
        `[n, ...]`, float32 or int32.

    Raises:
        DataError: no real numbers; integers that int32 cannot hold; bytes `[n, height, width]` beyond 15, which may be
            pictures without a channel axis, or numbers.

    Example:
        >>> import jmeta, numpy as np
        >>> float(jmeta.as_inputs(np.full((2, 8, 8, 1), 255, np.uint8)).max())
        1.0
        >>> jmeta.as_inputs(np.asarray([[3, 255]], np.uint8)).tolist()
        [[3, 255]]
    """
    return np.asarray(as_seen(stored(as_array(x))))


def as_array(x: Any) -> np.ndarray:
    """What may be one array as one; `DataError` for what may not, with what to do."""
    if isinstance(x, Mapping):
        raise DataError(
            "inputs are a dict; write a source of your own, jmeta.TaskSource, whose sample gives jmeta.Examples of it."
        )
    try:
        return np.asarray(x)
    except ValueError as error:
        raise DataError(
            "the inputs have other lengths from one example to the next; bring them to one, series by padding."
        ) from error


def stored(inputs: np.ndarray) -> np.ndarray:
    """Inputs as they lie on the device: bytes as they are, other integers as int32, everything else as float32."""
    if inputs.dtype.kind not in "buif" and inputs.dtype != jnp.bfloat16:
        raise DataError(f"inputs are {inputs.dtype}; give real numbers.")
    if inputs.dtype == np.uint8:
        if inputs.ndim == 3 and inputs.size and inputs.max() > _AMBIGUOUS:
            raise DataError(
                f"inputs are bytes of shape {list(inputs.shape)}, which may be pictures or numbers; give pictures a "
                "channel axis (images[..., None]), and numbers as int32."
            )
        return inputs
    if inputs.dtype.kind in "ui":
        limits = np.iinfo(np.int32)
        if inputs.size and not (limits.min <= inputs.min() and inputs.max() <= limits.max):
            raise DataError(f"inputs are integers beyond {limits.max}, which int32 cannot hold; give them as floats.")
        return inputs.astype(np.int32, copy=False)
    with np.errstate(over="ignore"):  # what float32 cannot hold is refused with all that is not finite
        return inputs.astype(np.float32, copy=False)


def as_seen(x: Any) -> Any:
    """The second half of the rule, of what `stored` gives, on host or device: pictures are scaled, bytes are int32."""
    if x.dtype != np.uint8:
        return x
    return x.astype(np.float32) / np.float32(255.0) if is_picture(x) else x.astype(np.int32)


def is_picture(x: Any) -> bool:
    """Whether rows of bytes are pictures: each has height, width and channels."""
    return x.dtype == np.uint8 and x.ndim >= 4


def as_floats(x: Num[Array, "n ..."]) -> Num[Array, "n ..."]:
    """Integers as float32, for what computes with them."""
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(jnp.float32)


def check_scaled(inputs: PyTree) -> None:
    """Raises `DataError` where pictures of bytes reach a network, which was trained on numbers from 0 to 1."""
    for x in jax.tree.leaves(inputs):
        if hasattr(x, "dtype") and is_picture(x):
            raise DataError(
                f"the inputs are pictures of bytes, {list(x.shape)}, which sources scale to [0, 1]; give "
                "jmeta.as_inputs(images), or images.astype(np.float32) where the network scales them itself."
            )
