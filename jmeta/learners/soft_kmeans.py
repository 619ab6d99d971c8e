"""Semi-supervised prototypical networks by soft k-means (Ren et al. 2018)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from jmeta.core import Adapted, Examples, MetaLearner, Model, Params, State, Task
from jmeta.distances import squared_euclidean
from jmeta.embedding import embedded
from jmeta.errors import ConfigError
from jmeta.learners.prototypical import Classes, nearest, prototypes
from jmeta.learners.transductive import weighted_means
from jmeta.losses import softmax_cross_entropy
from jmeta.masks import only, rows_there, shots


def soft_kmeans(model: Model, *, refinements: int = 1, distractor_cluster: bool = False) -> MetaLearner:
    """Soft k-means: prototypes that examples without a label refine.

    Prototypes cₖ start at the mean of the shots. Then each example without a label belongs to class k by
    mₖ = softmaxₖ(−‖z − cₖ‖²), and cₖ becomes the mean of the shots of the class, which weigh 1, and of the examples
    without a label, which weigh mₖ. p(y = k | x) = softmaxₖ(−‖f_θ(x) − cₖ‖²).

    Examples without a label are rows of zeros in the targets of the support that are not outside of its mask:
    `jmeta.from_arrays(..., unlabelled=5, distractors=2)`, of which some may be of no class of the task at all. For
    those `distractor_cluster` adds a class at 0 with a learned radius r, whose −‖z‖² / r² − log r is beside
    −‖z − cₖ‖², of radius 1.

    Args:
        model: the embedding f_θ, whose outputs `[n, features]` have any width.
        refinements: how often prototypes are refined.
        distractor_cluster: whether there is a class at 0 that takes what belongs to no other.

    Returns:
        The learner, for any number of ways; without an example that has no label it is `jmeta.prototypical`, whose θ it
        has if there is no class at 0, else `{"model": θ, "log_radius": log r}`. `Adapted.params` is
        `Classes(θ, prototypes [ways, features], present [ways])`.

    Raises:
        ConfigError: the number of refinements is negative.
        ModelError: `model` is no `Model`.

    Example:
        >>> import jmeta
        >>> learner = jmeta.soft_kmeans(jmeta.linen(jmeta.Conv4(outputs=None, pooling="max")))
        >>> tasks = jmeta.glyphs(unlabelled=5, distractors=2, queries=5)

    Reference: Ren, Triantafillou, Ravi, Snell, Swersky, Tenenbaum, Larochelle, Zemel 2018, "Meta-Learning for
    Semi-Supervised Few-Shot Classification", sections 3.1.1 and 3.1.2, https://arxiv.org/abs/1803.00676.

    Differences from the paper: none in these two; its third, masked soft k-means, is not here.
    """
    if refinements < 0:
        raise ConfigError(f"refinements is {refinements}; give 0 or more.")

    def init(key: Key[Array, ""], task: Task) -> tuple[Params, State]:
        params, state = model.init(key, task.support.inputs)
        if not distractor_cluster:
            return params, state
        radius = jnp.zeros((), jax.tree.leaves(task.support.inputs)[0].dtype)
        return {"model": params, "log_radius": radius}, {"model": state}

    def adapt(key: Key[Array, ""], params: Params, state: State, support: Examples) -> Adapted:
        z, targets = support.inputs, support.targets
        present = shots(targets) > 0
        unlabelled = (rows_there(support) & ~targets.any(axis=1)).astype(z.dtype)
        c = prototypes(z, targets)
        for _ in range(refinements):
            logits = only(present, -squared_euclidean(z, c))
            if distractor_cluster:
                outside = -jnp.square(z).sum(axis=1) * jnp.exp(-2.0 * params["log_radius"]) - params["log_radius"]
                logits = jnp.concatenate([logits, outside[:, None]], axis=1)
            belongs = jax.nn.softmax(logits, axis=1)[:, : len(c)]
            c = weighted_means(z, targets + belongs * unlabelled[:, None])
        return Adapted(Classes(params, c, present), state, {})

    part = "model" if distractor_cluster else None
    return embedded(model, init, adapt, nearest(squared_euclidean), softmax_cross_entropy, part=part)
