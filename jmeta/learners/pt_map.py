"""Power transform, and maximum a posteriori by optimal transport (Hu et al. 2021)."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jmeta.core import Examples, MetaLearner, Model, Params
from jmeta.distances import squared_euclidean, unit
from jmeta.errors import ConfigError
from jmeta.hyperparameters import Number, violated
from jmeta.learners.prototypical import prototypes
from jmeta.learners.transductive import transductive, weighted_means
from jmeta.masks import only, shots

_TRANSPORT_STEPS = 1000  # at most, as in the authors' code


def pt_map(
    model: Model, *, power: Number = 1.0, sharpness: Number = 10.0, inference_steps: int = 20, speed: Number = 0.2
) -> MetaLearner:
    """PT-MAP: queries are transported to the classes, equally many to each, at the least cost; classes move to them.

    z = f_θ(x)^β of unit length, then centred on the mean of the support, or of the queries, and of unit length again.
    From the means of the shots, cₖ, repeat: the plan P, `[queries, ways]`, minimises Σ P ‖z − cₖ‖² − H(P) / λ where
    each query gives 1 and each class takes queries / ways; cₖ moves by the share `speed` towards the mean of the shots
    of its class and of the queries, each as much as its P says. The outputs are log P.

    Args:
        model: the embedding f_θ, whose outputs `[n, features]` have any width.
        power: β; ½ makes features of a pre-trained classifier that are never negative, as of a ReLU, look more like a
            Gaussian. 1 leaves them as they are, which is better for an embedding that was trained by distances.
        sharpness: λ.
        inference_steps: how often classes move.
        speed: of the classes.

    Returns:
        The learner, for any number of ways, whose embedding is trained as that of `jmeta.prototypical` and whose
        answers depend on all queries: they are equally many of each class, whatever the queries are. `Adapted.params`
        is `Remembered(θ, support)`.

    Raises:
        ConfigError: power, sharpness or speed is not positive, or the number of steps negative.
        ModelError: `model` is no `Model`.

    Example:
        >>> import jmeta
        >>> learner = jmeta.pt_map(jmeta.linen(jmeta.Conv4(outputs=None, pooling="max")))

    Reference: Hu, Gripon, Pateux 2021, "Leveraging the Feature Distribution in Transfer-based Few-Shot Learning",
    sections 3.2 and 3.3, https://arxiv.org/abs/2006.03806.

    Differences from the paper: the embedding is trained on episodes, and not as a classifier of all training classes,
    for which β is ½ in the paper; features below 0 keep their sign under the power.
    """
    for name, value in (("power", power), ("sharpness", sharpness), ("speed", speed)):
        if violated(value > 0):
            raise ConfigError(f"{name} is {value}; give a positive number.")
    if inference_steps < 0:
        raise ConfigError(f"inference_steps is {inference_steps}; give 0 or more.")

    def infer(params: Params, support: Examples, queries: Float[Array, "queries features"]) -> Array:
        targets = support.targets
        labelled, count = targets.any(axis=1).astype(targets.dtype), shots(targets)
        present = (count > 0).astype(targets.dtype)
        z, q = unit(powered(support.inputs, power)), unit(powered(queries, power))
        z = unit(z - weighted_means(z, labelled[:, None])) * labelled[:, None]
        q = unit(q - q.mean(axis=0, keepdims=True))
        each = jnp.ones_like(q[:, 0])
        shares = each.sum() * present / jnp.maximum(present.sum(), 1.0)

        def transport(c: Float[Array, "ways features"]) -> Float[Array, "queries ways"]:
            return log_transport(sharpness * squared_euclidean(q, c), each, shares)

        def step(c: Float[Array, "ways features"], _: None) -> Any:
            weights = jnp.concatenate([targets, jnp.exp(transport(c))])
            return c + speed * (weighted_means(jnp.concatenate([z, q]), weights) - c), None

        c, _ = jax.lax.scan(step, prototypes(z, targets), length=inference_steps)
        return only(present > 0, transport(c))

    return transductive(model, infer)


def powered(z: Float[Array, "n features"], power: Number) -> Float[Array, "n features"]:
    """Each feature to the power β, with its sign; ε keeps the derivative at 0 finite."""
    return jnp.sign(z) * (jnp.abs(z) + 1e-6) ** power


def log_transport(
    cost: Float[Array, "n ways"], rows: Float[Array, "n"], columns: Float[Array, "ways"]
) -> Float[Array, "n ways"]:
    """log P of the plan that minimises Σ P cost − H(P), by Sinkhorn's iterations on logarithms.

    Args:
        cost: `[n, ways]`.
        rows: `[n]`, what each row gives, met exactly.
        columns: `[ways]`, what each column takes, of the same sum; 0 for one that takes nothing.

    Returns:
        `[n, ways]`, −∞ in a column that takes nothing.

    Example:
        >>> import jax.numpy as jnp
        >>> from jmeta.learners.pt_map import log_transport
        >>> plan = jnp.exp(log_transport(jnp.asarray([[0.0, 9.0], [0.0, 8.0]]), jnp.ones(2), jnp.ones(2)))
        >>> plan.round(2).tolist()  # both would rather have the first column
        [[0.6200000047683716, 0.3799999952316284], [0.3799999952316284, 0.6200000047683716]]

    Reference: Cuturi 2013, "Sinkhorn Distances: Lightspeed Computation of Optimal Transport", algorithm 1.
    """

    def row(v: Float[Array, "ways"]) -> Float[Array, "n"]:
        return jnp.log(rows) - jax.nn.logsumexp(v[None] - cost, axis=1)

    def unmet(carry: Any) -> Bool[Array, ""]:
        step, _, error = carry
        return (step < _TRANSPORT_STEPS) & (error > jnp.finfo(cost.dtype).eps ** 0.5)

    def step(carry: Any) -> Any:
        step, v, _ = carry
        new = jnp.log(columns) - jax.nn.logsumexp(row(v)[:, None] - cost, axis=0)
        taken = columns * jnp.exp(jnp.where(columns > 0, v - new, 0.0))
        return step + 1, new, jnp.abs(taken - columns).max()

    start = (jnp.zeros((), jnp.int32), jnp.log(columns), jnp.asarray(jnp.inf, cost.dtype))
    _, v, _ = jax.lax.while_loop(unmet, step, start)
    return row(v)[:, None] + v[None] - cost
