"""Max-pooling with derivatives that are as quick as it is."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


@jax.custom_jvp
def max_pool(x: Float[Array, "n height width channels"]) -> Float[Array, "n height//2 width//2 channels"]:
    """2x2 max-pooling whose derivatives, of any order, go to the largest entry of a window, the first of equal ones.

    Args:
        x: activations; an odd last row or column is left away, as by VALID padding.

    Returns:
        The maximum of each window.

    Example:
        >>> import jax.numpy as jnp
        >>> from jmeta.models.pooling import max_pool
        >>> max_pool(jnp.arange(16.0).reshape(1, 4, 4, 1))[0, ..., 0].tolist()
        [[5.0, 7.0], [13.0, 15.0]]
    """
    # JAX's own derivative of a maximum asks which entries equal it, and counts them: more passes over x, and where XLA
    # computes x twice, in two roundings, none is equal.
    return _windows(x).max(axis=(2, 4))


@max_pool.defjvp
def _max_pool_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    place, ẋ = _place(*primals), _windows(*tangents)
    places = sum(i * lax.broadcasted_iota(jnp.int8, ẋ.shape, axis) for i, axis in ((2, 2), (1, 4)))
    is_largest = place[:, :, None, :, None] == places
    return max_pool(*primals), jnp.where(is_largest, ẋ, jnp.zeros((), ẋ.dtype)).sum(axis=(2, 4))


def _place(x: Array) -> Array:
    """At which of the four places of each window its maximum is."""
    windows = _windows(x)
    a, b, c, d = (windows[:, :, i, :, j] for i in (0, 1) for j in (0, 1))
    upper, lower = jnp.maximum(a, b), jnp.maximum(c, d)
    return jnp.where(lower > upper, jnp.where(d > c, 3, 2), jnp.where(b > a, 1, 0)).astype(jnp.int8)


def _windows(x: Array) -> Array:
    n, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return x.reshape(n, height // 2, 2, width // 2, 2, channels)
