"""Tip-Adapter: names of classes and a cache of the support (Zhang et al. 2022)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Key

from jmeta.core import Adapted, Examples, MetaLearner, Model, Params, State, Task
from jmeta.distances import unit
from jmeta.embedding import embedded
from jmeta.errors import ConfigError
from jmeta.hyperparameters import Number, learned_number, violated
from jmeta.inner import descend
from jmeta.learners.zero_shot import Describe, init_aligned, init_towers, read_aligned, read_descriptions
from jmeta.losses import softmax_cross_entropy
from jmeta.masks import described, only, shots


class Cache(NamedTuple):
    """`Adapted.params` of Tip-Adapter.

    Args:
        params: θ.
        keys: `[n, features]`, the embeddings of the support, of unit length unless they were fine-tuned.
        targets: `[n, ways]`, what they stand for.
        names: `[ways, features]`, of unit length.
        told: `[ways]`, which classes have a description.
    """

    params: Params
    keys: Float[Array, "n features"]
    targets: Float[Array, "n ways"]
    names: Float[Array, "ways features"]
    told: Bool[Array, "ways"]


def tip_adapter(
    model: Model,
    *,
    aligned: bool = False,
    finetune: bool = False,
    residual: Number = 1.0,
    sharpness: Number = 5.5,
    scale: Number = 100.0,
    tuning_steps: int = 20,
    tuning_rate: Number = 1e-3,
    describe: Describe = None,
) -> MetaLearner:
    """Tip-Adapter: a classifier of class names, and beside it a cache that maps examples of the support to labels.

    With z, the embeddings zᵢ of the support and wₖ of the class names, all of unit length, the logit of class k is

        s z·wₖ + α Σᵢ exp(−β (1 − z·zᵢ)) yᵢₖ.

    With `finetune`, which is Tip-Adapter-F, the keys zᵢ are trained on the support by AdamW.

    Args:
        model: the embedding f_θ, whose outputs `[n, features]` have any width; `jmeta.identity()` for embeddings.
        aligned: whether descriptions are what the network takes, as embeddings of names beside those of sentences by
            one encoder, or of CLIP; then f_θ reads them too. Without, g_θ reads them as in `jmeta.zero_shot`.
        finetune: whether the keys are trained on the support.
        residual: α before training.
        sharpness: β before training.
        scale: s before training; 100 is CLIP's.
        tuning_steps: of fine-tuning.
        tuning_rate: of fine-tuning, annealed to 0 by a cosine.
        describe: g_θ before its last linear map; default as in `jmeta.zero_shot`.

    Returns:
        The learner, for any number of ways and shots, none included; its support has descriptions. s, α and β are
        meta-learned with θ, beside which they stand as `"scale"`, `"residual"` and `"sharpness"`, 0 at the start;
        embeddings that are aligned need no training. `Adapted.params` is `Cache(θ, keys, targets, names, told)`. A
        class without a description is as likely, by its name, as the others in the mean.

    Raises:
        ConfigError: α, β, s or the rate is not positive, or the number of steps negative.
        ModelError: a model is no `Model`.
        DataError: from `init` and `fit`: the support has no descriptions, or, where they are aligned, of another shape
            than its inputs.

    Example:
        >>> import jmeta
        >>> learner = jmeta.tip_adapter(jmeta.identity(), aligned=True)
        >>> tuned = jmeta.tip_adapter(jmeta.identity(), aligned=True, finetune=True)

    Reference: Zhang, Zhang, Fang, Gao, Li, Dai, Qiao, Li 2022, "Tip-Adapter: Training-free Adaption of CLIP for
    Few-shot Classification", section 3, https://arxiv.org/abs/2207.09519.

    Differences from the paper: α, β and s are learned on training tasks, where the paper searches α and β on a
    validation set; fine-tuning takes full batches.
    """
    start = {"residual": residual, "sharpness": sharpness, "scale": scale}
    for name, value in (start | {"tuning_rate": tuning_rate}).items():
        if violated(value > 0):
            raise ConfigError(f"{name} is {value}; give a positive number.")
    if tuning_steps < 0:
        raise ConfigError(f"tuning_steps is {tuning_steps}; give 0 or more.")
    adam = optax.adamw(optax.cosine_decay_schedule(tuning_rate, max(1, tuning_steps)), eps=1e-4)

    def init(key: Key[Array, ""], task: Task) -> tuple[Params, State]:
        params, state = init_aligned(model, key, task) if aligned else init_towers(model, describe, key, task)
        return {**params, **{name: jnp.zeros(()) for name in start}}, state

    def logits(cache: Cache, z: Float[Array, "n features"]) -> Float[Array, "n ways"]:
        numbers = {name: learned_number(value, cache.params[name]).astype(z.dtype) for name, value in start.items()}
        by_name = numbers["scale"] * z @ cache.names.T
        known = cache.told.astype(z.dtype)
        mean = by_name @ known / jnp.maximum(known.sum(), 1.0)
        affinity = jnp.exp(-numbers["sharpness"] * (1.0 - z @ cache.keys.T))
        by_cache = numbers["residual"] * affinity @ cache.targets
        there = cache.told | (shots(cache.targets) > 0)
        return only(there, jnp.where(cache.told[None], by_name, mean[:, None]) + by_cache)

    def adapt(key: Key[Array, ""], params: Params, state: State, support: Examples) -> Adapted:
        z = unit(support.inputs)
        if aligned:
            names = read_aligned(model, key, params, state, support)
        else:
            names, state = read_descriptions(describe, key, params, state, support, train=True)
        told = described(support.descriptions)
        return Adapted(Cache(params, z, support.targets, unit(names.astype(z.dtype)), told), state, {})

    def tuned(key: Key[Array, ""], params: Params, state: State, support: Examples) -> Adapted:
        adapted = adapt(key, params, state, support)
        cache: Cache = adapted.params

        def loss(keys: Float[Array, "n features"]) -> Float[Array, ""]:
            return softmax_cross_entropy(logits(cache._replace(keys=keys), cache.keys), cache.targets)

        def step(carry: Any, _: None) -> Any:
            keys, state = carry
            value, gradient = jax.value_and_grad(loss)(keys)
            return descend(adam, gradient, state, keys), value

        begin = (cache.keys, adam.init(cache.keys))
        (keys, _), _ = jax.lax.scan(step, begin, length=tuning_steps)
        return adapted._replace(params=cache._replace(keys=keys), info={"inner_loss": loss(keys)})

    def predict(key: Key[Array, ""], adapted: Adapted, z: Float[Array, "queries features"]) -> Array:
        return logits(adapted.params, unit(z))

    plain = embedded(model, init, adapt, predict, softmax_cross_entropy)
    if not finetune:
        return plain
    # fine-tuning is for the support of a new task; what is meta-learned is learned without
    return embedded(model, init, tuned, predict, softmax_cross_entropy)._replace(objective=plain.objective)
