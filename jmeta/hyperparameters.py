"""Hyper-parameters that are numbers: known, or traced where a sweep maps over them."""

from typing import TypeAlias

import jax
from jaxtyping import Array

Number: TypeAlias = float | int | Array


def violated(condition: bool | Array) -> bool:
    """Whether a condition on numbers does not hold; of a traced one nothing is known, and `jmeta.sweep` looked before.

    Args:
        condition: a comparison.

    Returns:
        True where it is known to be false.

    Example:
        >>> from jmeta.hyperparameters import violated
        >>> violated(-0.1 > 0), violated(0.1 > 0)
        (True, False)
    """
    return not isinstance(condition, jax.core.Tracer) and not condition
