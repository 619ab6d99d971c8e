"""SimpleShot: nearest class mean on the embeddings of a plain classifier (Wang et al. 2019)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from jmeta.core import (
    Adapted,
    Examples,
    Info,
    MetaLearner,
    Model,
    Params,
    State,
    Task,
    check_examples,
    check_model,
    outputs_of,
    over_tasks,
)
from jmeta.distances import squared_euclidean, unit
from jmeta.embedding import at_test
from jmeta.errors import ConfigError
from jmeta.hyperparameters import Number, violated
from jmeta.learners.prototypical import Classes, nearest, prototypes
from jmeta.learners.transfer import check_batches, init_classifier, linear
from jmeta.losses import softmax_cross_entropy
from jmeta.masks import shots


def simpleshot(model: Model, *, centre: bool = True, normalise: bool = True, momentum: Number = 0.99) -> MetaLearner:
    """SimpleShot: pre-train one classifier of all training classes, then take the nearest class mean of its embedding.

    Pre-training minimises the cross-entropy of W f_θ(x) + b over all classes at once. On a task nothing is learned:
    with z = (f_θ(x) − μ) / ‖f_θ(x) − μ‖ and μ the mean embedding of the training classes, class k is the mean cₖ of
    its z, and p(y = k | x) = softmaxₖ(−‖z − cₖ‖²).

    Args:
        model: the embedding f_θ, whose outputs `[n, features]` have any width.
        centre: whether to subtract μ.
        normalise: whether to divide by the length.
        momentum: μ is the moving average over the batches of pre-training, of which this share of the old is kept.

    Returns:
        The learner, for any number of ways. Train it on a source with `batch=...`, whose queries are examples of all
        training classes, and evaluate it on episodes. `Adapted.params` is
        `Classes(θ, prototypes [ways, features], present [ways])`; its state holds μ.

    Raises:
        ConfigError: momentum is not in [0, 1).
        ModelError: `model` is no `Model`.

    Example:
        >>> import jax, jmeta
        >>> learner = jmeta.simpleshot(jmeta.linen(jmeta.Conv4(outputs=None, norm="running")))
        >>> fitted = jmeta.fit(jax.random.key(0), learner, jmeta.glyphs(batch=64), steps=2, tasks=1)

    Reference: Wang, Chao, Weinberger, van der Maaten 2019, "SimpleShot: Revisiting Nearest-Neighbor Classification for
    Few-Shot Learning", section 3, https://arxiv.org/abs/1911.04623.

    Differences from the paper: μ is a moving average during pre-training and not computed after it; the paper stops
    pre-training by the accuracy on validation tasks.
    """
    check_model(model)
    if violated(momentum >= 0) or violated(momentum < 1):
        raise ConfigError(f"momentum is {momentum}; give a number from 0 to 1, without 1.")

    def init(key: Key[Array, ""], task: Task) -> tuple[Params, State]:
        check_batches(task)
        params, state = init_classifier(model, key, task)
        kernel = params["head"]["kernel"]
        return params, {"model": state, "mean": jnp.zeros(len(kernel), kernel.dtype)}

    def one_task(
        key: Key[Array, ""], params: Params, state: State, task: Task
    ) -> tuple[Float[Array, ""], tuple[State, Info]]:
        z, model_state = model.apply(key, params["body"], state["model"], task.query.inputs, train=True)
        loss = softmax_cross_entropy(linear(z, params["head"]), task.query.targets)
        mean = momentum * state["mean"] + (1.0 - momentum) * jax.lax.stop_gradient(z).mean(axis=0)
        return loss, ({"model": model_state, "mean": mean}, {})

    def transformed(z: Float[Array, "n features"], state: State) -> Float[Array, "n features"]:
        z = z - state["mean"][None] if centre else z
        return unit(z) if normalise else z

    def adapt(key: Key[Array, ""], params: Params, state: State, support: Examples) -> Adapted:
        check_examples("support", support)
        z, model_state = outputs_of(at_test(model), key, params["body"], state["model"], support, train=True)
        state = {**state, "model": model_state}
        means = prototypes(transformed(z, state), support.targets)
        return Adapted(Classes(params, means, shots(support.targets) > 0), state, {})

    def predict(key: Key[Array, ""], adapted: Adapted, inputs: PyTree) -> Float[Array, "queries ways"]:
        z, _ = model.apply(key, adapted.params.params["body"], adapted.state["model"], inputs, train=False)
        return nearest(squared_euclidean)(key, adapted, transformed(z, adapted.state))

    return MetaLearner(init, adapt, predict, over_tasks(one_task))
