"""What transductive learners share: an embedding, and answers that look at all queries of a task at once."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jmeta.core import Adapted, Examples, MetaLearner, Model, Params, State, Task
from jmeta.embedding import embedded
from jmeta.learners.prototypical import prototypical
from jmeta.losses import softmax_cross_entropy

Infer = Callable[[Params, Examples, Float[Array, "queries features"]], Float[Array, "queries ways"]]


class Remembered(NamedTuple):
    """`Adapted.params` where a support is only remembered, since nothing can be inferred before there are queries.

    Args:
        params: θ.
        support: `Examples(embeddings [n, features], targets [n, ways])` with its mask.
    """

    params: Params
    support: Examples


def remember(key: Key[Array, ""], params: Params, state: State, support: Examples) -> Adapted:
    """An `adapt` of embeddings that keeps them."""
    return Adapted(Remembered(params, Examples(support.inputs, support.targets, mask=support.mask)), state, {})


def transductive(model: Model, infer: Infer) -> MetaLearner:
    """A learner whose embedding is trained as that of prototypical networks, and whose answers look at all queries.

    θ is that of the network and nothing else: what `jmeta.prototypical`, a classifier of all training classes or
    someone else has trained serves as it is, and `jmeta.identity()` needs no training.

    Args:
        model: the embedding f_θ, whose outputs `[n, features]` have any width.
        infer: `(θ, support, queries [queries, features]) -> outputs [queries, ways]`, where both are embedded.

    Returns:
        The learner. `Adapted.params` is `Remembered(θ, support)`.

    Raises:
        ModelError: `model` is no `Model`.

    Example:
        >>> import jmeta
        >>> from jmeta.learners.transductive import transductive
        >>> learner = transductive(  # each query beside the mean of all queries
        ...     jmeta.identity(), lambda θ, support, z: (z - z.mean(axis=0)[None]) @ support.inputs.T @ support.targets
        ... )
    """

    def init(key: Key[Array, ""], task: Task) -> tuple[Params, State]:
        return model.init(key, task.support.inputs)

    def predict(key: Key[Array, ""], adapted: Adapted, z: Float[Array, "queries features"]) -> Array:
        params, support = adapted.params
        return infer(params, support, z)

    tested = embedded(model, init, remember, predict, softmax_cross_entropy, part=None)
    return tested._replace(objective=prototypical(model).objective)


def weighted_means(z: Float[Array, "n features"], weights: Float[Array, "n ways"]) -> Float[Array, "ways features"]:
    """The mean of z for each class, to which each row belongs by its weight: the update of k-means.

    Args:
        z: `[n, features]`.
        weights: `[n, ways]`, not negative; a class without any weight has a mean of 0.

    Returns:
        `[ways, features]`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jmeta.learners.transductive import weighted_means
        >>> weighted_means(jnp.asarray([[0.0], [3.0]]), jnp.asarray([[0.2], [0.1]])).tolist()
        [[1.0]]
    """
    total = weights.sum(axis=0)
    return weights.T @ z / jnp.where(total > 0, total, 1.0)[:, None]
