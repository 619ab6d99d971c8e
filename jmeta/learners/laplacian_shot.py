"""LaplacianShot (Ziko et al. 2020)."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jmeta.core import Examples, MetaLearner, Model, Params
from jmeta.distances import squared_euclidean, unit
from jmeta.errors import ConfigError
from jmeta.hyperparameters import Number, violated
from jmeta.learners.bd_cspn import rectified
from jmeta.learners.prototypical import prototypes
from jmeta.learners.transductive import transductive
from jmeta.masks import only, shots


def laplacian_shot(
    model: Model,
    *,
    smoothness: Number = 0.7,
    neighbours: int = 3,
    inference_steps: int = 20,
    rectify: bool = True,
) -> MetaLearner:
    """LaplacianShot: queries go to the nearest mean, and neighbours to the same one.

    With z = f_θ(x) / ‖f_θ(x)‖, aᵢₖ = ‖zᵢ − cₖ‖² and wᵢⱼ = 1 where both queries are among the nearest of each other, ½
    where one is of the other's, the answers Y minimise

        Σᵢ yᵢ·log yᵢ + Σᵢ yᵢ·aᵢ − λ/2 Σᵢⱼ wᵢⱼ yᵢ·yⱼ

    by the updates yᵢ = softmax(−aᵢ + λ Σⱼ wᵢⱼ yⱼ), from softmax(−aᵢ).

    Args:
        model: the embedding f_θ, whose outputs `[n, features]` have any width.
        smoothness: λ.
        neighbours: how many nearest queries each has.
        inference_steps: updates.
        rectify: whether the means cₖ are mended by queries first, see `jmeta.bd_cspn`.

    Returns:
        The learner, for any number of ways, whose embedding is trained as that of `jmeta.prototypical` and whose
        answers depend on all queries. `Adapted.params` is `Remembered(θ, support)`.

    Raises:
        ConfigError: λ, or a number of neighbours or updates, is negative.
        ModelError: `model` is no `Model`.

    Example:
        >>> import jmeta
        >>> learner = jmeta.laplacian_shot(jmeta.linen(jmeta.Conv4(outputs=None, pooling="max")))

    Reference: Ziko, Dolz, Granger, Ben Ayed 2020, "Laplacian Regularized Few-Shot Learning", section 2,
    https://arxiv.org/abs/2006.15486.

    Differences from the paper: the embedding is trained on episodes, and not as a classifier of all training classes;
    w is symmetric, as the bound asks, where the authors' code takes each query's own neighbours; λ is chosen by
    validation there and is a number here.
    """
    counts = {"smoothness": smoothness, "neighbours": neighbours, "inference_steps": inference_steps}
    for name, value in counts.items():
        if violated(value >= 0):
            raise ConfigError(f"{name} is {value}; give 0 or more.")

    def infer(params: Params, support: Examples, queries: Float[Array, "queries features"]) -> Array:
        z, q, present = unit(support.inputs), unit(queries), shots(support.targets) > 0
        w = smoothness * affinity(q, neighbours)
        c = prototypes(z, support.targets)
        if rectify:
            c, q = rectified(z, support.targets, q)
        nearness = only(present, -squared_euclidean(q, c))
        return propagated(nearness, w, inference_steps)

    return transductive(model, infer)


def affinity(z: Float[Array, "n features"], neighbours: int) -> Float[Array, "n n"]:
    """wᵢⱼ: 1 where each of two rows is among the nearest of the other, ½ where one is, 0 of a row and itself.

    Args:
        z: `[n, features]`.
        neighbours: how many are the nearest; all others, where there are no more.

    Returns:
        `[n, n]`, symmetric.

    Example:
        >>> import jax.numpy as jnp
        >>> from jmeta.learners.laplacian_shot import affinity
        >>> affinity(jnp.asarray([[0.0], [1.0], [3.0]]), 1).tolist()
        [[0.0, 1.0, 0.0], [1.0, 0.0, 0.5], [0.0, 0.5, 0.0]]
    """
    row = jnp.arange(z.shape[0])
    itself = row[:, None] == row[None]
    distances = jnp.where(itself, jnp.inf, squared_euclidean(z, z))
    place = jnp.argsort(jnp.argsort(distances, axis=1), axis=1)  # 0 for the nearest; rows may be of any number
    near = ((place < neighbours) & ~itself).astype(distances.dtype)
    return 0.5 * (near + near.T)


def propagated(logits: Float[Array, "n ways"], w: Float[Array, "n n"], steps: int) -> Float[Array, "n ways"]:
    """logits + W y after some updates y = softmax(logits + W y), from softmax(logits)."""

    def step(x: Float[Array, "n ways"], _: None) -> Any:
        return logits + w @ jax.nn.softmax(x, axis=1), None

    return jax.lax.scan(step, logits, length=steps)[0]


def energy(y: Float[Array, "n ways"], logits: Float[Array, "n ways"], w: Float[Array, "n n"]) -> Float[Array, ""]:
    """Σ y log y − Σ y logits − ½ Σ wᵢⱼ yᵢ·yⱼ: what `propagated` lowers from update to update."""
    return jax.scipy.special.xlogy(y, y).sum() - (y * logits).sum() - 0.5 * (y * (w @ y)).sum()
