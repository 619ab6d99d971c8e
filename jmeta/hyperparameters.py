"""Hyper-parameters that are numbers: known, or traced where a sweep maps over them."""

from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

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


def learned_number(start: Number, parameter: Float[Array, ""]) -> Float[Array, ""]:
    """A positive number that is learned beside a network: start · exp(20 p), so that steps that suit a network move it.

    Args:
        start: its value at p = 0.
        parameter: p.

    Returns:
        The number, of the type of p.

    Example:
        >>> import jax.numpy as jnp
        >>> from jmeta.hyperparameters import learned_number
        >>> float(learned_number(2.0, jnp.zeros(())))
        2.0
    """
    return jnp.asarray(start, parameter.dtype) * jnp.exp(20.0 * parameter)
