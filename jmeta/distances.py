"""Distance kernels in matmul form: no array of shape [queries, classes, features] is ever built."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def squared_euclidean(
    queries: Float[Array, "queries features"], classes: Float[Array, "classes features"]
) -> Float[Array, "queries classes"]:
    """‖z − c‖² = ‖z‖² − 2 zᵀc + ‖c‖², clipped at 0 against cancellation.

    Args:
        queries: `[queries, features]`, z.
        classes: `[classes, features]`, c.

    Returns:
        `[queries, classes]`, never negative.

    Example:
        >>> import jax.numpy as jnp, jmeta
        >>> float(jmeta.squared_euclidean(jnp.zeros((1, 2)), jnp.ones((1, 2)))[0, 0])
        2.0

    Reference: Snell et al. 2017, "Prototypical Networks for Few-shot Learning", section 2.3.
    """
    # The common shift leaves every distance as it is and keeps the three terms small.
    centre = classes.mean(axis=0, keepdims=True)
    z, c = queries - centre, classes - centre
    squares = jnp.square(z).sum(axis=1, keepdims=True) + jnp.square(c).sum(axis=1, keepdims=True).T
    return jnp.maximum(squares - 2.0 * z @ c.T, 0.0)


def cosine(
    queries: Float[Array, "queries features"], classes: Float[Array, "classes features"]
) -> Float[Array, "queries classes"]:
    """1 − zᵀc / (‖z‖ ‖c‖), with norms kept away from 0 so that the gradient is finite everywhere.

    Args:
        queries: `[queries, features]`, z.
        classes: `[classes, features]`, c.

    Returns:
        `[queries, classes]` in `[0, 2]`; 1 for a vector of zeros.

    Example:
        >>> import jax.numpy as jnp, jmeta
        >>> float(jmeta.cosine(jnp.ones((1, 2)), -jnp.ones((1, 2)))[0, 0])
        2.0

    Reference: Vinyals et al. 2016, "Matching Networks for One Shot Learning", section 2.1.
    """
    return 1.0 - unit(queries) @ unit(classes).T


def unit(x: Float[Array, "n features"]) -> Float[Array, "n features"]:
    """Each row over its norm, which is kept away from 0 so that the gradient is finite everywhere.

    Args:
        x: `[n, features]`.

    Returns:
        `[n, features]`, rows of norm 1; a row of zeros stays.

    Example:
        >>> import jax.numpy as jnp
        >>> from jmeta.distances import unit
        >>> unit(jnp.array([[3.0, 4.0]])).tolist()
        [[0.6000000238418579, 0.800000011920929]]
    """
    tiny = jnp.finfo(x.dtype).tiny ** 0.5
    return x / jnp.sqrt(jnp.square(x).sum(axis=1, keepdims=True) + tiny)


DISTANCES = {"squared_euclidean": squared_euclidean, "cosine": cosine}
