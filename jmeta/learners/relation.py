"""Relation networks (Sung et al. 2018)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jmeta.core import Adapted, Examples, Mask, MetaLearner, Model, Params, State, Task, check_model
from jmeta.embedding import embedded
from jmeta.learners.prototypical import Classes
from jmeta.losses import checked
from jmeta.masks import shots
from jmeta.models.adapters import linen
from jmeta.models.networks import MLP


def relation(model: Model, *, relation: Model | None = None) -> MetaLearner:
    """Relation networks: how alike a query and a class are is learned, instead of a distance.

    cₖ = mean of f_θ(x) over the shots x of class k; rₖ = σ(g_θ([f_θ(x), cₖ])); the loss is Σₖ (rₖ − 1[y = k])².

    Args:
        model: the embedding f_θ, whose outputs `[n, ..., features]` are vectors or maps of features.
        relation: g_θ, `[pairs, ..., 2 features] -> [pairs, 1]`, the query's features first. Default: a perceptron with
            two hidden layers of 128 and 64.

    Returns:
        The learner, for any number of ways. Outputs are relation scores in `[0, 1]`, 0 for a class without an example.
        `Adapted.params` is `Classes(θ, class features [ways, ...], present [ways])`.

    Raises:
        ModelError: a model is no `Model`.

    Example:
        >>> import jmeta
        >>> learner = jmeta.relation(jmeta.linen(jmeta.Conv4(outputs=None, pooling="max")))

    Reference: Sung, Yang, Zhang, Xiang, Torr, Hospedales 2018, "Learning to Compare: Relation Network for Few-Shot
    Learning", sections 3.2 and 3.4, https://arxiv.org/abs/1711.06025.

    Differences from the paper: a class is the mean of its shots and not their sum, so that shots may vary; the default
    g reads vectors, where the paper's reads maps by two blocks of convolutions (give such a model for `relation`).
    Pairs of queries and classes are formed, as a learned comparison needs: memory grows with queries x classes x
    features.
    """
    compare = relation or linen(MLP(outputs=1, hidden=(128, 64)))
    check_model(compare)

    def init(key: Key[Array, ""], task: Task) -> tuple[Params, State]:
        model_key, compare_key = jax.random.split(key)
        params, state = model.init(model_key, task.support.inputs)
        z, _ = model.apply(key, params, state, task.support.inputs, train=True)
        compare_params, compare_state = compare.init(compare_key, jnp.concatenate([z, z], axis=-1))
        return {"model": params, "compare": compare_params}, {"model": state, "compare": compare_state}

    def adapt(key: Key[Array, ""], params: Params, state: State, support: Examples) -> Adapted:
        counts = shots(support.targets)
        classes = jnp.tensordot(support.targets / jnp.maximum(counts, 1.0)[None], support.inputs, axes=(0, 0))
        return Adapted(Classes(params, classes, counts > 0), state, {})

    def predict(key: Key[Array, ""], adapted: Adapted, z: Float[Array, "queries ... features"]) -> Array:
        params, classes, present = adapted.params
        shape = (z.shape[0], *classes.shape)
        pairs = jnp.concatenate([jnp.broadcast_to(z[:, None], shape), jnp.broadcast_to(classes[None], shape)], axis=-1)
        pairs = pairs.reshape(-1, *pairs.shape[2:])
        scores, _ = compare.apply(key, params["compare"], adapted.state["compare"], pairs, train=False)
        return jnp.where(present[None], jax.nn.sigmoid(scores.reshape(shape[:2])), 0.0)

    return embedded(model, init, adapt, predict, _squared_error)


def _squared_error(
    outputs: Float[Array, "n ways"], targets: Float[Array, "n ways"], mask: Mask = None
) -> Float[Array, ""]:
    """The mean over the labelled rows of Σₖ (rₖ − targetₖ)²."""
    outputs, targets = checked(outputs, targets, classes=True)
    labelled = targets.sum(axis=1) if mask is None else targets.sum(axis=1) * mask.astype(targets.dtype)
    return (jnp.square(outputs - targets).sum(axis=1) * labelled).sum() / jnp.maximum(labelled.sum(), 1.0)
