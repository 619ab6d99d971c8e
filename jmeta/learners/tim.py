"""Transductive information maximisation (Boudiaf et al. 2020)."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from jmeta.core import Examples, MetaLearner, Model, Params
from jmeta.distances import squared_euclidean, unit
from jmeta.errors import ConfigError
from jmeta.hyperparameters import Number, violated
from jmeta.inner import descend
from jmeta.learners.prototypical import prototypes
from jmeta.learners.transductive import transductive
from jmeta.losses import softmax_cross_entropy
from jmeta.masks import only, shots


def tim(
    model: Model,
    *,
    inference_steps: int = 1000,
    rate: Number = 1e-4,
    support_weight: Number = 0.1,
    certainty_weight: Number = 0.1,
    temperature: Number = 15.0,
) -> MetaLearner:
    """TIM: weights of a classifier that fit the support, and are sure of each query and of no class for all of them.

    With z = f_θ(x) / ‖f_θ(x)‖ and p(k | x) = softmaxₖ(−τ/2 ‖z − wₖ‖²), W minimises by steps of Adam from the means of
    the shots

        λ CE(support) − H(Y) + α H(Y | X),

    where H(Y) is the entropy of the mean of p over the queries and H(Y | X) the mean of its entropies: the mutual
    information of queries and answers, as large as it can be.

    Args:
        model: the embedding f_θ, whose outputs `[n, features]` have any width.
        inference_steps: of Adam.
        rate: of Adam.
        support_weight: λ.
        certainty_weight: α.
        temperature: τ.

    Returns:
        The learner, for any number of ways, whose embedding is trained as that of `jmeta.prototypical` and whose
        answers depend on all queries; H(Y) draws them to equally many of each class. `Adapted.params` is
        `Remembered(θ, support)`.

    Raises:
        ConfigError: the temperature or the rate is not positive, a weight or the number of steps is negative.
        ModelError: `model` is no `Model`.

    Example:
        >>> import jmeta
        >>> learner = jmeta.tim(jmeta.linen(jmeta.Conv4(outputs=None, pooling="max")))

    Reference: Boudiaf, Ziko, Rony, Dolz, Piantanida, Ben Ayed 2020, "Transductive Information Maximization For
    Few-Shot Learning", section 2, TIM-GD, https://arxiv.org/abs/2008.11297.

    Differences from the paper: the embedding is trained on episodes, and not as a classifier of all training classes.
    """
    for name, value in (("temperature", temperature), ("rate", rate)):
        if violated(value > 0):
            raise ConfigError(f"{name} is {value}; give a positive number.")
    counts = {
        "inference_steps": inference_steps,
        "support_weight": support_weight,
        "certainty_weight": certainty_weight,
    }
    for name, value in counts.items():
        if violated(value >= 0):
            raise ConfigError(f"{name} is {value}; give 0 or more.")
    adam = optax.adam(rate)

    def infer(params: Params, support: Examples, queries: Float[Array, "queries features"]) -> Array:
        z, q, present = unit(support.inputs), unit(queries), shots(support.targets) > 0

        def loss(w: Float[Array, "ways features"]) -> Float[Array, ""]:
            of_support, of_queries = (logits(x, w, present, temperature) for x in (z, q))
            fit = softmax_cross_entropy(of_support, support.targets)
            return support_weight * fit - information(of_queries, certainty_weight)

        def step(carry: Any, _: None) -> Any:
            w, state = carry
            return descend(adam, jax.grad(loss)(w), state, w), None

        start = prototypes(z, support.targets)
        (w, _), _ = jax.lax.scan(step, (start, adam.init(start)), length=inference_steps)
        return logits(q, w, present, temperature)

    return transductive(model, infer)


def logits(
    z: Float[Array, "n features"], w: Float[Array, "ways features"], present: Bool[Array, "ways"], temperature: Number
) -> Float[Array, "n ways"]:
    """−τ/2 ‖z − wₖ‖²."""
    return only(present, -0.5 * temperature * squared_euclidean(z, w))


def information(logits: Float[Array, "queries ways"], certainty_weight: Number = 1.0) -> Float[Array, ""]:
    """H(Y) − α H(Y | X), for α = 1 the mutual information of queries and answers.

    Args:
        logits: `[queries, ways]`.
        certainty_weight: α.

    Returns:
        At most log(ways), where each answer is sure and all classes are answered equally often.

    Example:
        >>> import jax.numpy as jnp
        >>> from jmeta.learners.tim import information
        >>> float(information(100.0 * jnp.eye(2))).__round__(4), float(information(jnp.zeros((2, 2))))
        (0.6931, 0.0)
    """
    log_p = jax.nn.log_softmax(logits, axis=1)
    p = jnp.exp(log_p)
    mean, tiny = p.mean(axis=0), jnp.finfo(p.dtype).tiny  # p log p has no derivative at 0
    return -(mean * jnp.log(mean + tiny)).sum() + certainty_weight * (p * log_p).sum(axis=1).mean()
