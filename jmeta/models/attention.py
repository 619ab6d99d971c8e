"""Attention of the tokens of each example to one another."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jmeta.tree import widened


def attend(
    queries: Float[Array, "n t width"],
    keys: Float[Array, "n t width"],
    values: Float[Array, "n t width"],
    heads: int,
    there: Bool[Array, "n t"] | None = None,
) -> Float[Array, "n t width"]:
    """softmax(Q Kᵀ / √(width / heads)) V, in each head by itself.

    Args:
        queries: Q.
        keys: K.
        values: V.
        heads: into which the width is divided.
        there: which tokens are attended to; default: all.

    Returns:
        The heads side by side.

    Example:
        >>> import jax.numpy as jnp
        >>> from jmeta.models.attention import attend
        >>> x = jnp.asarray([[[1.0], [3.0]]])
        >>> attend(jnp.zeros_like(x), x, x, 1).tolist()
        [[[2.0], [2.0]]]
    """
    q, k, v = (x.reshape(*x.shape[:2], heads, -1) for x in (queries, keys, values))
    scores = widened(jnp.einsum("nqhe,nkhe->nhqk", q, k)) / q.shape[-1] ** 0.5
    if there is not None:
        scores = jnp.where(there[:, None, None], scores, jnp.finfo(scores.dtype).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("nhqk,nkhe->nqhe", weights, v).reshape(queries.shape)
