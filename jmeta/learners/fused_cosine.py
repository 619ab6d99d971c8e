"""Cosines with the examples and with the name of a class, fused, for embeddings of one space."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from jmeta.core import Adapted, Examples, MetaLearner, Model, Params, State, Task
from jmeta.distances import cosine
from jmeta.embedding import embedded
from jmeta.errors import ConfigError
from jmeta.hyperparameters import Number, learned_number, violated
from jmeta.learners.late_fusion import fused
from jmeta.learners.prototypical import prototypes
from jmeta.learners.zero_shot import Describe, init_aligned, init_towers, read_aligned, read_descriptions
from jmeta.losses import softmax_cross_entropy
from jmeta.masks import described, only, shots


class Known(NamedTuple):
    """`Adapted.params` of fused cosines.

    Args:
        params: θ.
        means: `[ways, features]`, of the shots.
        names: `[ways, features]`.
        shots: `[ways]`, how many.
        told: `[ways]`, which classes have a description.
    """

    params: Params
    means: Float[Array, "ways features"]
    names: Float[Array, "ways features"]
    shots: Float[Array, "ways"]
    told: Bool[Array, "ways"]


def fused_cosine(
    model: Model,
    *,
    aligned: bool = False,
    temperature: Number = 50.0,
    worth: Number = 1.0,
    describe: Describe = None,
) -> MetaLearner:
    """The nearest class by cosine, where a name counts as so many shots.

    With z = f_θ(x), cₖ the mean of z over the Kₖ shots of class k, wₖ its name, and d(a, b) = 1 − cos(a, b),

        dₖ(x) = (Kₖ d(z, cₖ) + β (d(z, wₖ) − δ(x))) / (Kₖ + β), p(y = k | x) = softmaxₖ(−τ dₖ(x)),

    where δ(x) is the mean of d(z, wₖ) − d(z, cₖ) over the classes that have both, as in `jmeta.late_fusion`. With
    `aligned`, wₖ = f_θ(description of class k): what changes the space of the examples changes that of the names
    alike, and before any training, with a network that begins as a turn of the space, this is K cos(z, c) + cos(z, w).

    Args:
        model: f_θ, whose outputs `[n, features]` have any width: for embeddings `jmeta.identity()`, with which there is
            little to train, or a linear map, `jmeta.linen(jmeta.MLP(outputs=None, hidden=()))`.
        aligned: whether descriptions are what the network takes, as embeddings of names beside those of sentences by
            one encoder, or of CLIP; without, g_θ reads them as in `jmeta.zero_shot`.
        temperature: τ before training.
        worth: β before training, how many shots a description is worth.
        describe: g_θ before its last linear map; default as in `jmeta.zero_shot`.

    Returns:
        The learner, for any number of ways and shots, none included; its support has descriptions. τ and β are
        meta-learned with θ, beside which they stand as `"temperature"` and `"worth"`, 0 at the start. `Adapted.params`
        is `Known(θ, means, names, shots, told)`.

    Raises:
        ConfigError: τ or β is not positive.
        ModelError: a model is no `Model`.
        DataError: from `init` and `fit`: the support has no descriptions, or, where they are aligned, of another shape
            than its inputs.

    Example:
        >>> import jmeta
        >>> learner = jmeta.fused_cosine(jmeta.linen(jmeta.MLP(outputs=None, hidden=())), aligned=True)

    Reference: Snell, Swersky, Zemel 2017, "Prototypical Networks for Few-shot Learning", sections 2.3 and 2.7, for
    means and descriptions; Chen et al. 2021, "Meta-Baseline", section 3, for the cosine and its temperature.

    Differences from the papers: their fusion, one network for both, and the number of shots in it are jmeta's own.
    """
    start = {"temperature": temperature, "worth": worth}
    for name, value in start.items():
        if violated(value > 0):
            raise ConfigError(f"{name} is {value}; give a positive number.")

    def init(key: Key[Array, ""], task: Task) -> tuple[Params, State]:
        params, state = init_aligned(model, key, task) if aligned else init_towers(model, describe, key, task)
        return {**params, **{name: jnp.zeros(()) for name in start}}, state

    def adapt(key: Key[Array, ""], params: Params, state: State, support: Examples) -> Adapted:
        if aligned:
            names = read_aligned(model, key, params, state, support)
        else:
            names, state = read_descriptions(describe, key, params, state, support, train=True)
        known = (shots(support.targets), described(support.descriptions))
        means = prototypes(support.inputs, support.targets)
        return Adapted(Known(params, means, names.astype(means.dtype), *known), state, {})

    def predict(key: Key[Array, ""], adapted: Adapted, z: Float[Array, "queries features"]) -> Array:
        params, means, names, count, told = adapted.params
        τ, β = (learned_number(start[name], params[name]).astype(z.dtype) for name in ("temperature", "worth"))
        distances = fused(cosine(z, means), cosine(z, names), count, told, β)
        return only((count > 0) | told, -τ * distances)

    return embedded(model, init, adapt, predict, softmax_cross_entropy)
