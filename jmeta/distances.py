"""Distance kernels in matmul form: no array of shape [queries, classes, features] is ever built.

Inputs of less than 32 bits (bfloat16) are widened first, so that the differences of large squares keep their digits.
"""

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
    queries, classes = _wide(queries), _wide(classes)
    # The common shift leaves every distance as it is and keeps the three terms small.
    centre = classes.mean(axis=0, keepdims=True)
    z, c = queries - centre, classes - centre
    squares = jnp.square(z).sum(axis=1, keepdims=True) + jnp.square(c).sum(axis=1, keepdims=True).T
    return jnp.maximum(squares - 2.0 * z @ c.T, 0.0)


def euclidean(
    queries: Float[Array, "queries features"], classes: Float[Array, "classes features"]
) -> Float[Array, "queries classes"]:
    """‖z − c‖, whose derivative where z = c, where there is none, is 0.

    Args:
        queries: `[queries, features]`, z.
        classes: `[classes, features]`, c.

    Returns:
        `[queries, classes]`, never negative.

    Example:
        >>> import jax.numpy as jnp, jmeta
        >>> float(jmeta.euclidean(jnp.zeros((1, 2)), jnp.asarray([[3.0, 4.0]]))[0, 0])
        5.0

    Reference: Snell et al. 2017, "Prototypical Networks for Few-shot Learning", section 2.3, on why its square is the
    usual choice: the mean of a class is nearest to its examples by the square, not by the distance.
    """
    square = squared_euclidean(queries, classes)
    apart = square > 0
    # a derivative of the root at 0 is not finite, and `where` alone would multiply it by 0
    return jnp.where(apart, jnp.sqrt(jnp.where(apart, square, 1.0)), 0.0)


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


def dot_product(
    queries: Float[Array, "queries features"], classes: Float[Array, "classes features"]
) -> Float[Array, "queries classes"]:
    """−zᵀc: no distance in the strict sense, but as every kernel here smaller where the two are closer.

    Args:
        queries: `[queries, features]`, z.
        classes: `[classes, features]`, c.

    Returns:
        `[queries, classes]`, of any sign.

    Example:
        >>> import jax.numpy as jnp, jmeta
        >>> float(jmeta.dot_product(jnp.ones((1, 2)), jnp.ones((1, 2)))[0, 0])
        -2.0
    """
    return -(_wide(queries) @ _wide(classes).T)


def diagonal_mahalanobis(
    queries: Float[Array, "queries features"],
    classes: Float[Array, "classes features"],
    scale: Float[Array, "features"],
) -> Float[Array, "queries classes"]:
    """Σᵢ sᵢ² (zᵢ − cᵢ)², a metric with one learned scale s for each feature.

    Args:
        queries: `[queries, features]`, z.
        classes: `[classes, features]`, c.
        scale: `[features]`, s; what is trained, of any sign. `jmeta.with_metric` makes it part of a model.

    Returns:
        `[queries, classes]`, never negative.

    Example:
        >>> import jax.numpy as jnp, jmeta
        >>> z, c, s = jnp.zeros((1, 2)), jnp.ones((1, 2)), jnp.asarray([1.0, 3.0])
        >>> float(jmeta.diagonal_mahalanobis(z, c, s)[0, 0])
        10.0
    """
    scale = _wide(scale)[None]
    return squared_euclidean(_wide(queries) * scale, _wide(classes) * scale)


def mahalanobis(
    queries: Float[Array, "queries features"],
    classes: Float[Array, "classes features"],
    factor: Float[Array, "features rank"],
) -> Float[Array, "queries classes"]:
    """(z − c)ᵀ M (z − c) with M = L Lᵀ, so that every L gives a metric and no constraint is needed.

    Args:
        queries: `[queries, features]`, z.
        classes: `[classes, features]`, c.
        factor: `[features, rank]`, L; what is trained. `jmeta.with_metric` makes it part of a model.

    Returns:
        `[queries, classes]`, never negative.

    Example:
        >>> import jax.numpy as jnp, jmeta
        >>> float(jmeta.mahalanobis(jnp.zeros((1, 2)), jnp.ones((1, 2)), 2.0 * jnp.eye(2))[0, 0])
        8.0

    Reference: Davis et al. 2007, "Information-Theoretic Metric Learning", section 2; Goldberger et al. 2004,
    "Neighbourhood Components Analysis", section 2.
    """
    factor = _wide(factor)
    return squared_euclidean(_wide(queries) @ factor, _wide(classes) @ factor)


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
    x = _wide(x)
    tiny = jnp.finfo(x.dtype).tiny ** 0.5
    return x / jnp.sqrt(jnp.square(x).sum(axis=1, keepdims=True) + tiny)


def _wide(x: Array) -> Array:
    return x.astype(jnp.float32) if x.dtype.itemsize < 4 else x


DISTANCES = {
    "squared_euclidean": squared_euclidean,
    "euclidean": euclidean,
    "cosine": cosine,
    "dot_product": dot_product,
}
