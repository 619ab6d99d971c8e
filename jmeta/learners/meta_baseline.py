"""Meta-Baseline: nearest mean by cosine, with a learned temperature (Chen et al. 2021)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jmeta.core import Adapted, Examples, MetaLearner, Model, Params, State, Task
from jmeta.distances import cosine
from jmeta.embedding import embedded
from jmeta.errors import ConfigError
from jmeta.hyperparameters import Number, violated
from jmeta.learners.prototypical import Classes, prototypes
from jmeta.losses import softmax_cross_entropy
from jmeta.masks import only, shots


def meta_baseline(model: Model, *, temperature: Number = 10.0) -> MetaLearner:
    """Meta-Baseline: prototypes compared by cosine, times a learned τ, meta-trained from a pre-trained classifier.

    cₖ = mean of f_θ(x) over the shots x of class k; p(y = k | x) = softmaxₖ(τ cos(f_θ(x), cₖ)).

    The first stage of the paper is a classifier of all training classes, `jmeta.transfer` on a source with `batch=`;
    the second is this learner, whose θ begins at what that left as its `body`.

    Args:
        model: the embedding f_θ, whose outputs `[n, features]` have any width.
        temperature: τ before training.

    Returns:
        The learner, for any number of ways. Its parameters are `{"model": θ, "temperature": τ}`; `Adapted.params` is
        `Classes(parameters, prototypes [ways, features], present [ways])`.

    Raises:
        ConfigError: τ is not positive.
        ModelError: `model` is no `Model`.

    Example:
        >>> import jax, jmeta, optax
        >>> model = jmeta.linen(jmeta.Conv4(outputs=None, features=8))
        >>> batches, episodes = jmeta.glyphs(batch=64), jmeta.glyphs(queries=5)
        >>> first = jmeta.fit(jax.random.key(0), jmeta.transfer(model), batches, steps=2, tasks=1)
        >>> learner, optimizer = jmeta.meta_baseline(model), optax.adam(1e-3)
        >>> start = jmeta.init(jax.random.key(1), learner, optimizer, episodes)
        >>> start = start._replace(params={**start.params, "model": first.params["body"]})
        >>> second = jmeta.fit(jax.random.key(1), learner, episodes, optimizer=optimizer, steps=2, train_state=start)

    Reference: Chen, Liu, Xu, Darrell, Wang 2021, "Meta-Baseline: Exploring Simple Meta-Learning for Few-Shot Learning",
    section 3, https://arxiv.org/abs/2003.04390.

    Differences from the paper: none.
    """
    if violated(temperature > 0):
        raise ConfigError(f"temperature is {temperature}; give a positive number.")

    def init(key: Key[Array, ""], task: Task) -> tuple[Params, State]:
        params, state = model.init(key, task.support.inputs)
        dtype = jax.eval_shape(lambda: model.apply(key, params, state, task.support.inputs, train=False))[0].dtype
        return {"model": params, "temperature": jnp.asarray(temperature, dtype)}, {"model": state}

    def adapt(key: Key[Array, ""], params: Params, state: State, support: Examples) -> Adapted:
        means = prototypes(support.inputs, support.targets)
        return Adapted(Classes(params, means, shots(support.targets) > 0), state, {})

    def predict(key: Key[Array, ""], adapted: Adapted, z: Float[Array, "queries features"]) -> Array:
        params, points, present = adapted.params
        return only(present, params["temperature"] * (1.0 - cosine(z, points)))

    return embedded(model, init, adapt, predict, softmax_cross_entropy)
