"""Embeddings adapted to the task by a set-to-set transformer: FEAT (Ye et al. 2020)."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Key

from jmeta.core import Adapted, Examples, Mask, MetaLearner, Model, Params, State, Task
from jmeta.distances import squared_euclidean
from jmeta.embedding import embedded
from jmeta.errors import ConfigError
from jmeta.hyperparameters import Number, violated
from jmeta.learners.prototypical import Classes, prototypes
from jmeta.losses import softmax_cross_entropy
from jmeta.masks import only, shots


class Training(NamedTuple):
    """What the loss of training compares.

    Args:
        logits: `[queries, ways]`.
        support: `Examples` of embeddings.
        queries: `[queries, features]`, embeddings.
        params: of the transformer.
        key: of its dropout.
    """

    logits: Float[Array, "queries ways"]
    support: Examples
    queries: Float[Array, "queries features"]
    params: Params
    key: Key[Array, ""]


def feat(
    model: Model,
    *,
    temperature: Number = 64.0,
    balance: Number = 1.0,
    balance_temperature: Number = 16.0,
    dropout: float = 0.5,
) -> MetaLearner:
    """FEAT: the prototypes of a task look at each other before queries are compared with them.

    With the means cₖ of f_θ(x) over the shots x of class k and T one layer of attention of a set to itself,
    T(c) = LayerNorm(c + W softmax(c Q Kᵀ cᵀ / √d) c V), p(y = k | x) = softmaxₖ(−‖f_θ(x) − T(c)ₖ‖² / τ).

    The loss of training has a second part, `balance` times the cross entropy of −‖z − mₖ‖² / τ₂ for all examples z of
    support and queries, where mₖ is the mean of T over the examples of class k: what T makes of a class stays near it.

    Args:
        model: the embedding f_θ, whose outputs `[n, features]` have any width.
        temperature: τ.
        balance: of the second part of the loss.
        balance_temperature: τ₂.
        dropout: in training, the share of what attention says that is left away.

    Returns:
        The learner, for any number of ways. Its parameters are `{"model": θ, "transformer": T}`; `Adapted.params` is
        `Classes(parameters, adapted prototypes [ways, features], present [ways])`.

    Raises:
        ConfigError: a temperature is not positive, or `dropout` is below 0, or 1 or more.
        ModelError: `model` is no `Model`.

    Example:
        >>> import jmeta
        >>> learner = jmeta.feat(jmeta.linen(jmeta.Conv4(outputs=None, pooling="max")))

    Reference: Ye, Hu, Zhan, Sha 2020, "Few-Shot Learning via Embedding Adaptation with Set-to-Set Functions", sections
    3.3 and 3.4, https://arxiv.org/abs/1812.03664.

    Differences from the paper: f is trained from scratch, where the authors pre-train it as a classifier of all
    training classes, which `jmeta.meta_baseline` shows how to do. Temperatures are those of the authors' commands for a
    Conv4 with one shot.
    """
    for name, value in (("temperature", temperature), ("balance_temperature", balance_temperature)):
        if violated(value > 0):
            raise ConfigError(f"{name} is {value}; give a positive number.")
    if not 0.0 <= dropout < 1.0:
        raise ConfigError(f"dropout is {dropout}; give a share from 0 to below 1.")
    transformer = _SetToSet(dropout)

    def init(key: Key[Array, ""], task: Task) -> tuple[Params, State]:
        model_key, set_key = jax.random.split(key)
        params, state = model.init(model_key, task.support.inputs)
        z = jax.eval_shape(lambda: model.apply(key, params, state, task.support.inputs, train=False))[0]
        own = transformer.init(set_key, jnp.zeros((1, z.shape[-1]), z.dtype), jnp.ones(1, bool))["params"]
        return {"model": params, "transformer": own}, {"model": state}

    def at_once(key: Key[Array, ""], params: Params, z: Array, there: Array, train: bool) -> Array:
        moved = transformer.apply({"params": params}, z, there, train, rngs={"dropout": key})
        return jnp.asarray(moved)

    def adapt(key: Key[Array, ""], params: Params, state: State, support: Examples, train: bool = False) -> Adapted:
        means, present = prototypes(support.inputs, support.targets), shots(support.targets) > 0
        moved = at_once(key, params["transformer"], means, present, train)
        learned = Classes(params, moved, present)
        return Adapted((*learned, support) if train else learned, state, {})

    def predict(key: Key[Array, ""], adapted: Adapted, z: Float[Array, "queries features"]) -> Array:
        _, points, present = adapted.params
        return only(present, -squared_euclidean(z, points) / temperature)

    def evidence(key: Key[Array, ""], adapted: Adapted, z: Float[Array, "queries features"]) -> Training:
        *learned, support = adapted.params
        logits = predict(key, adapted._replace(params=learned), z)
        return Training(logits, support, z, learned[0]["transformer"], key)

    def loss(said: Training, targets: Float[Array, "queries ways"], mask: Mask = None) -> Float[Array, ""]:
        z = jnp.concatenate([said.support.inputs, said.queries])
        y = targets if mask is None else targets * mask[:, None].astype(targets.dtype)
        labels = jnp.concatenate([said.support.targets, y])

        def centre(member: Float[Array, "n"]) -> Float[Array, "features"]:
            moved = at_once(said.key, said.params, z, member > 0, True)
            return member @ moved / jnp.maximum(member.sum(), 1.0)

        near = -squared_euclidean(z, jax.vmap(centre)(labels.T)) / balance_temperature
        second = softmax_cross_entropy(only(shots(labels) > 0, near), labels)
        return softmax_cross_entropy(said.logits, targets, mask) + balance * second

    training = embedded(model, init, partial(adapt, train=True), evidence, loss)
    # dropout and the second part of the loss are for training alone
    return embedded(model, init, adapt, predict, softmax_cross_entropy)._replace(objective=training.objective)


class _SetToSet(nn.Module):
    """One layer of attention of a set to itself, with one head, a residual and a layer norm."""

    dropout: float

    @nn.compact
    def __call__(
        self, x: Float[Array, "n features"], there: Bool[Array, "n"], train: bool = False
    ) -> Float[Array, "n features"]:
        d, kind = x.shape[-1], x.dtype
        query, key, value = (
            nn.Dense(d, use_bias=False, param_dtype=kind, name=name)(x) for name in ("query", "key", "value")
        )
        scores = jnp.where(there[None], query @ key.T / d**0.5, jnp.finfo(x.dtype).min / 2)
        attention = nn.Dropout(0.1, deterministic=not train)(jax.nn.softmax(scores, axis=1))
        said = nn.Dense(d, param_dtype=kind, name="out")(attention @ value)
        return nn.LayerNorm(param_dtype=kind, name="norm")(x + nn.Dropout(self.dropout, deterministic=not train)(said))
