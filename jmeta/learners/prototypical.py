"""Prototypical networks (Snell et al. 2017)."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from jmeta.core import Adapted, Examples, MetaLearner, Model, Params, State, Task
from jmeta.distances import squared_euclidean
from jmeta.embedding import embedded
from jmeta.losses import softmax_cross_entropy
from jmeta.masks import only, shots

Distance = Callable[
    [Float[Array, "queries features"], Float[Array, "classes features"]], Float[Array, "queries classes"]
]


class Classes(NamedTuple):
    """`Adapted.params` where a class is a point in the space of the embeddings.

    Args:
        params: θ.
        points: `[ways, ...]`, one for each class.
        present: `[ways]`, which classes there are; the others are never the answer.
    """

    params: Params
    points: Float[Array, "ways ..."]
    present: Bool[Array, "ways"]


def prototypical(model: Model, *, distance: Distance = squared_euclidean) -> MetaLearner:
    """Prototypical networks: a class is the mean of its embedded shots, a query belongs to the nearest one.

    cₖ = mean of f_θ(x) over the shots x of class k; p(y = k | x) = softmaxₖ(−d(f_θ(x), cₖ)).

    Args:
        model: the embedding f_θ, whose outputs `[n, features]` have any width; `jmeta.Conv4(outputs=None)`.
        distance: d, `([queries, features], [classes, features]) -> [queries, classes]`.

    Returns:
        The learner. Its parameters do not depend on the number of ways, so that training on more ways than at test, as
        the paper advises, needs no other learner. `Adapted.params` is `Classes(θ, prototypes [ways, features],
        present [ways])`; a class without an example is not present and never the answer.

    Raises:
        ModelError: `model` is no `Model`.

    Example:
        >>> import jmeta
        >>> learner = jmeta.prototypical(jmeta.linen(jmeta.Conv4(outputs=None, pooling="max")))

    Reference: Snell, Swersky, Zemel 2017, "Prototypical Networks for Few-shot Learning", algorithm 1,
    https://arxiv.org/abs/1703.05175.

    Differences from the paper: none in the algorithm. The authors' code normalises support and queries of a training
    episode in one batch and takes moving averages at test: `jmeta.Conv4(outputs=None, norm="running", pooling="max")`.
    """

    def init(key: Key[Array, ""], task: Task) -> tuple[Params, State]:
        return model.init(key, task.support.inputs)

    def adapt(key: Key[Array, ""], params: Params, state: State, support: Examples) -> Adapted:
        means = prototypes(support.inputs, support.targets)
        return Adapted(Classes(params, means, shots(support.targets) > 0), state, {})

    return embedded(model, init, adapt, nearest(distance), softmax_cross_entropy, part=None)


def nearest(distance: Distance) -> Callable[[Key[Array, ""], Adapted, Array], Array]:
    """The `predict` of embeddings by `Classes`: −d to the point of each class, and least for those that are not there.

    Args:
        distance: d.

    Returns:
        `(key, adapted, embeddings [queries, features]) -> [queries, ways]`.

    Example:
        >>> import jax, jax.numpy as jnp, jmeta
        >>> from jmeta.learners.prototypical import Classes, nearest
        >>> adapted = jmeta.Adapted(Classes({}, jnp.eye(2), jnp.ones(2, bool)), {}, {})
        >>> nearest(jmeta.squared_euclidean)(jax.random.key(0), adapted, jnp.eye(2)[:1]).tolist()
        [[-0.0, -2.0]]
    """

    def predict(key: Key[Array, ""], adapted: Adapted, z: Float[Array, "queries features"]) -> Array:
        _, points, present = adapted.params
        return only(present, -distance(z, points))

    return predict


def prototypes(
    embeddings: Float[Array, "shots features"], targets: Float[Array, "shots ways"]
) -> Float[Array, "ways features"]:
    """The mean of the embedded shots of each class; zeros for a class that has none.

    Args:
        embeddings: `[ways * shots, features]`.
        targets: `[ways * shots, ways]` one-hot; a row of zeros does not count.

    Returns:
        `[ways, features]`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jmeta.learners.prototypical import prototypes
        >>> prototypes(jnp.ones((4, 3)), jnp.eye(2).repeat(2, axis=0)).shape
        (2, 3)
    """
    return targets.T @ embeddings / jnp.maximum(shots(targets), 1.0)[:, None]
