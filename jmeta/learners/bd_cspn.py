"""Prototypes without bias: BD-CSPN (Liu et al. 2020)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jmeta.core import Examples, MetaLearner, Model, Params
from jmeta.distances import cosine, unit
from jmeta.errors import ConfigError
from jmeta.hyperparameters import Number, violated
from jmeta.learners.prototypical import prototypes
from jmeta.learners.transductive import transductive, weighted_means
from jmeta.masks import only, shots


def bd_cspn(model: Model, *, scale: Number = 10.0, most: int = 8) -> MetaLearner:
    """BD-CSPN: the mean of a class is mended by the queries that are nearest to it.

    Two biases of the means of few shots are diminished. That of the support as a whole: the queries are shifted by
    the mean of the support less the mean of the queries. That of each class: of the queries whose nearest mean cₖ it
    is, the `most` nearest join the shots, and cₖ becomes the mean of all of them, weighted by softmax(s cos(z, cₖ)).
    p(y = k | x) = softmaxₖ(s cos(z, cₖ)), with z = f_θ(x) / ‖f_θ(x)‖.

    Args:
        model: the embedding f_θ, whose outputs `[n, features]` have any width.
        scale: s.
        most: how many queries may join a class.

    Returns:
        The learner, for any number of ways, whose embedding is trained as that of `jmeta.prototypical` and whose
        answers depend on all queries. `Adapted.params` is `Remembered(θ, support)`.

    Raises:
        ConfigError: the scale is not positive, or `most` is negative.
        ModelError: `model` is no `Model`.

    Example:
        >>> import jmeta
        >>> learner = jmeta.bd_cspn(jmeta.linen(jmeta.Conv4(outputs=None, pooling="max")))

    Reference: Liu, Song, Qin 2020, "Prototype Rectification for Few-Shot Learning", section 3,
    https://arxiv.org/abs/1911.10713.

    Differences from the paper: the embedding is trained on episodes, and not as a cosine classifier of all training
    classes, so that s is a number and not learned.
    """
    if violated(scale > 0):
        raise ConfigError(f"scale is {scale}; give a positive number.")
    if most < 0:
        raise ConfigError(f"most is {most}; give 0 or more.")

    def infer(params: Params, support: Examples, queries: Float[Array, "queries features"]) -> Array:
        c, q = rectified(unit(support.inputs), support.targets, unit(queries), scale=scale, most=most)
        return only(shots(support.targets) > 0, scale * (1.0 - cosine(q, c)))

    return transductive(model, infer)


def rectified(
    z: Float[Array, "n features"],
    targets: Float[Array, "n ways"],
    queries: Float[Array, "queries features"],
    *,
    scale: Number = 10.0,
    most: int = 8,
) -> tuple[Float[Array, "ways features"], Float[Array, "queries features"]]:
    """The means of the classes, mended by queries, and the queries, shifted to the support.

    Args:
        z: `[n, features]`, the support.
        targets: `[n, ways]` one-hot; a row of zeros does not count.
        queries: `[queries, features]`.
        scale: s.
        most: how many queries may join a class.

    Returns:
        `[ways, features]` and `[queries, features]`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jmeta.learners.bd_cspn import rectified
        >>> c, q = rectified(jnp.eye(2), jnp.eye(2), jnp.asarray([[3.0, 2.0], [2.0, 3.0]]))
        >>> q.tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    labelled = targets.any(axis=1).astype(targets.dtype)[:, None]
    q = queries + weighted_means(z, labelled) - queries.mean(axis=0, keepdims=True)
    c, present = prototypes(z, targets), shots(targets) > 0
    nearness = only(present, 1.0 - cosine(q, c))
    joins = jax.nn.one_hot(nearness.argmax(axis=1), len(c), dtype=bool)
    place = jnp.argsort(jnp.argsort(jnp.where(joins, -nearness, jnp.inf), axis=0), axis=0)  # 0 for the nearest
    member = jnp.concatenate([targets > 0, joins & (place < most)])
    every = jnp.concatenate([z, q])
    near = jnp.where(member, scale * (1.0 - cosine(every, c)), -jnp.inf)
    top = jnp.where(present, near.max(axis=0), 0.0)
    return weighted_means(every, jnp.exp(near - top[None])), q
