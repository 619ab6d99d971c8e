"""Transductive propagation networks (Liu et al. 2019)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from jmeta.core import Adapted, MetaLearner, Model, Params, State, Task
from jmeta.distances import squared_euclidean
from jmeta.embedding import embedded
from jmeta.errors import ConfigError
from jmeta.hyperparameters import Number, violated
from jmeta.learners.transductive import remember
from jmeta.losses import softmax_cross_entropy
from jmeta.masks import only, rows_there, shots


def label_propagation(
    model: Model, *, spread: Number = 0.8, neighbours: int = 10, sharpness: Number = 10.0
) -> MetaLearner:
    """Label propagation, the transductive propagation network: labels flow over a learned graph of all examples.

    With z = f_θ(x) and σ = exp(uᵀz + v), wᵢⱼ = exp(−½ ‖zᵢ/σᵢ − zⱼ/σⱼ‖²) where one of the two is among the nearest of
    the other, else 0, and S = D^−½ W D^−½, Dᵢᵢ = Σⱼ wᵢⱼ, the outputs are the rows of the queries in

        F = (I − α S)⁻¹ Y,

    which is where Y ← α S Y + Y comes to rest; Y has the labels of the support, and zeros elsewhere. θ = (f, u, v) is
    trained through the solution. Examples of the support without a label are part of the graph, too.

    Args:
        model: the embedding f_θ, whose outputs `[n, features]` have any width.
        spread: α, how far labels flow, from 0 to below 1.
        neighbours: how many nearest examples each has.
        sharpness: the unit of squared distances is their mean over all pairs, divided by this.

    Returns:
        The learner, for any number of ways, whose answers depend on all queries. It starts at u = v = 0, so that
        `jmeta.identity()` needs no training.
        `Adapted.params` is `Remembered(θ, support)`.

    Raises:
        ConfigError: α is not from 0 to below 1, the sharpness not positive, or there is no neighbour.
        ModelError: `model` is no `Model`.

    Example:
        >>> import jmeta
        >>> learner = jmeta.label_propagation(jmeta.linen(jmeta.Conv4(outputs=None, pooling="max")))

    Reference: Liu, Lee, Park, Kim, Yang, Hwang, Yang 2019, "Learning to Propagate Labels: Transductive Propagation
    Network for Few-shot Learning", section 3.2, https://arxiv.org/abs/1805.10002.

    Differences from the paper: σ is log-linear in z, where the paper has a small convolutional network on feature maps;
    the unit of distances; wᵢᵢ = 0 as in Zhou et al. 2003; the loss is of the queries, not of the support as well; the
    paper's α = 0.99 and 20 neighbours are for a graph that is trained, before which 0.8 and 10 are better.
    """
    if violated(spread >= 0) or violated(spread < 1):
        raise ConfigError(f"spread is {spread}; give a number from 0 to below 1.")
    if violated(sharpness > 0):
        raise ConfigError(f"sharpness is {sharpness}; give a positive number.")
    if neighbours < 1:
        raise ConfigError(f"neighbours is {neighbours}; give at least 1.")

    def init(key: Key[Array, ""], task: Task) -> tuple[Params, State]:
        params, state = model.init(key, task.support.inputs)
        z, _ = jax.eval_shape(lambda: model.apply(key, params, state, task.support.inputs, train=False))
        u, v = jnp.zeros(z.shape[-1], z.dtype), jnp.zeros((), z.dtype)
        return {"model": params, "slope": u, "offset": v}, {"model": state}

    def predict(key: Key[Array, ""], adapted: Adapted, queries: Float[Array, "queries features"]) -> Array:
        params, support = adapted.params
        targets = support.targets
        z = jnp.concatenate([support.inputs, queries])
        there = jnp.concatenate([rows_there(support), jnp.ones(queries.shape[0], bool)])
        sigma = jnp.exp(z @ params["slope"] + params["offset"])
        w = graph(z / sigma[:, None], there, _mean_square(z, there) / sharpness, neighbours)
        y = jnp.concatenate([targets, jnp.zeros((queries.shape[0], targets.shape[1]), targets.dtype)])
        return only(shots(targets) > 0, spread_labels(w, y.astype(w.dtype), spread)[len(targets) :])

    return embedded(model, init, remember, predict, softmax_cross_entropy)


def _mean_square(z: Float[Array, "n features"], there: Bool[Array, "n"]) -> Float[Array, ""]:
    """The mean squared distance of the examples that are there; a number, as far as gradients go."""
    weight = there.astype(z.dtype)
    weight = weight / jnp.maximum(weight.sum(), 1.0)
    mean = weight @ squared_euclidean(z, z) @ weight
    return jax.lax.stop_gradient(jnp.where(mean > 0, mean, 1.0))


def graph(
    z: Float[Array, "n features"], there: Bool[Array, "n"], scale: Float[Array, ""], neighbours: int
) -> Float[Array, "n n"]:
    """wᵢⱼ = exp(−‖zᵢ − zⱼ‖² / 2 scale) where one is among the nearest of the other, else 0.

    Args:
        z: `[n, features]`.
        there: `[n]`, which rows there are; the others have no neighbour.
        scale: the unit of squared distances.
        neighbours: how many are the nearest; all others, where there are no more.

    Returns:
        `[n, n]`, symmetric.

    Example:
        >>> import jax.numpy as jnp
        >>> from jmeta.learners.label_propagation import graph
        >>> (graph(jnp.asarray([[0.0], [1.0], [3.0]]), jnp.ones(3, bool), jnp.ones(()), 1) > 0).astype(int).tolist()
        [[0, 1, 0], [1, 0, 1], [0, 1, 0]]
    """
    row = jnp.arange(z.shape[0])
    pairs = there[:, None] & there[None] & (row[:, None] != row[None])
    square = squared_euclidean(z, z) / scale
    place = jnp.argsort(jnp.argsort(jnp.where(pairs, square, jnp.inf), axis=1), axis=1)  # 0 for the nearest
    near = (place < neighbours) & pairs
    linked = near | near.T
    return jnp.where(linked, jnp.exp(-0.5 * jnp.where(linked, square, 0.0)), 0.0)


def spread_labels(w: Float[Array, "n n"], y: Float[Array, "n ways"], spread: Number) -> Float[Array, "n ways"]:
    """(I − α D^−½ W D^−½)⁻¹ Y.

    Args:
        w: `[n, n]`, symmetric and not negative.
        y: `[n, ways]`.
        spread: α.

    Returns:
        `[n, ways]`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jmeta.learners.label_propagation import spread_labels
        >>> flow = spread_labels(1.0 - jnp.eye(2), jnp.asarray([[1.0], [0.0]]), 0.5)
        >>> [round(float(x), 3) for x in flow[:, 0]]
        [1.333, 0.667]
    """
    degree = w.sum(axis=1)
    root = jnp.where(degree > 0, jax.lax.rsqrt(jnp.where(degree > 0, degree, 1.0)), 0.0)
    s = root[:, None] * w * root[None]
    return jnp.linalg.solve(jnp.eye(w.shape[0], dtype=w.dtype) - spread * s, y)
