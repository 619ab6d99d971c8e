"""An in-context learner: a transformer that reads support and query as one sequence."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Key

from jmeta.core import Adapted, Examples, MetaLearner, Model, Params, State, Task
from jmeta.distances import unit
from jmeta.embedding import embedded
from jmeta.errors import ConfigError
from jmeta.learners.matching import label_attention
from jmeta.learners.zero_shot import Describe, init_towers, read_descriptions
from jmeta.losses import softmax_cross_entropy
from jmeta.masks import described


def in_context(
    model: Model, *, layers: int = 2, heads: int = 4, describe: Describe = None, descriptions: bool = False
) -> MetaLearner:
    """A transformer that learns a task by reading it: no gradient step, no class mean.

    An example of the support is the token f_θ(xᵢ) + code of its label, a query is f_θ(x). Every layer lets the tokens
    of the support attend to each other and the query to the support; the last attention has the labels as values,
    p(y | x) = Σᵢ softmaxᵢ(τ cos(h(x), h(xᵢ))) yᵢ with tokens h and a learned τ, and the outputs are log p. The code of
    a label is a random vector, drawn anew for each task, so that a label means nothing but "the same as".

    Args:
        model: the embedding f_θ, whose outputs `[n, features]` have any width.
        layers: number of transformer layers before the last attention.
        heads: of each attention; they divide the features.
        describe: the network that reads descriptions; default as in `jmeta.zero_shot`.
        descriptions: read the descriptions in the support as well: the description of each class is one more
            token with that label, so that one sequence holds images, texts or both, down to zero shots.

    Returns:
        The learner, for any number of ways. Queries do not see each other. `Adapted.params` is
        `(θ, the support's tokens at each layer, targets)`, the cache that every query attends to.

    Raises:
        ConfigError: fewer than one layer or head; from `init` and `fit`: heads do not divide the features.
        ModelError: `model` is no `Model`.
        DataError: from `init` and `fit`: `descriptions` with a support that has none.

    Example:
        >>> import jmeta
        >>> learner = jmeta.in_context(jmeta.linen(jmeta.Conv4(outputs=None, pooling="max")))

    Reference: Kirsch, Harrison, Sohl-Dickstein, Metz 2022, "General-Purpose In-Context Learning by Meta-Learning
    Transformers", https://arxiv.org/abs/2212.04458; Mishra et al. 2018, "A Simple Neural Attentive Meta-Learner";
    labels as codes without meaning: Fifty et al. 2024, "Context-Aware Meta-Learning", https://arxiv.org/abs/2310.10971.

    Differences from the papers: the answer is read from the labels by attention, as in matching networks, instead of
    by a linear layer over a fixed number of labels, so that any number of ways works and none is special; the
    embedding is trained with the transformer.
    """
    if layers < 1 or heads < 1:
        raise ConfigError(f"layers is {layers} and heads is {heads}; give at least 1 of each.")

    def init(key: Key[Array, ""], task: Task) -> tuple[Params, State]:
        model_key, reader_key = jax.random.split(key)
        if descriptions:
            params, state = init_towers(model, describe, model_key, task)
        else:
            model_params, model_state = model.init(model_key, task.support.inputs)
            params, state = {"model": model_params}, {"model": model_state}
        z, _ = model.apply(key, params["model"], state["model"], task.support.inputs, train=True)
        if z.shape[-1] % heads:
            raise ConfigError(f"{heads} heads do not divide {z.shape[-1]} features; choose a divisor.")
        reader = _Reader(layers, heads).init(reader_key, z, task.support.targets.any(axis=1))["params"]
        return {**params, "reader": reader}, state

    def adapt(key: Key[Array, ""], params: Params, state: State, support: Examples) -> Adapted:
        code_key, describe_key = jax.random.split(key)
        z, targets = support.inputs, support.targets
        if descriptions:
            w, state = read_descriptions(describe, describe_key, params, state, support, train=True)
            z = jnp.concatenate([z, w])
            told = described(support.descriptions).astype(targets.dtype)
            targets = jnp.concatenate([targets, jnp.diag(told)])
        codes = jax.random.normal(code_key, (targets.shape[1], z.shape[1]), z.dtype)
        variables = {"params": params["reader"]}
        tokens = _Reader(layers, heads).apply(variables, z, targets @ codes, targets.any(axis=1), method="support")
        return Adapted((params, tokens, targets), state, {})

    def predict(key: Key[Array, ""], adapted: Adapted, z: Float[Array, "queries features"]) -> Array:
        params, tokens, targets = adapted.params
        variables = {"params": params["reader"]}
        scores = _Reader(layers, heads).apply(variables, z, tokens, targets.any(axis=1), method="queries")
        return label_attention(jnp.asarray(scores), targets)

    return embedded(model, init, adapt, predict, softmax_cross_entropy)


class _Block(nn.Module):
    """A pre-norm transformer layer whose tokens attend to a context."""

    heads: int

    @nn.compact
    def __call__(self, tokens: Array, context: Array, labelled: Array) -> Array:
        width = tokens.shape[-1]
        norm = nn.LayerNorm()
        attention = nn.MultiHeadDotProductAttention(self.heads)
        # where nothing is labelled, attention to nothing is not a number: then to everything, which is all zeros
        mask = (labelled | ~labelled.any())[None, None]
        mask = jnp.broadcast_to(mask, (1, tokens.shape[0], context.shape[0]))
        x = tokens + attention(norm(tokens), norm(context), mask=mask)
        return x + nn.Dense(width)(nn.gelu(nn.Dense(2 * width)(nn.LayerNorm()(x))))


class _Reader(nn.Module):
    """The layers, and the scores of the last attention."""

    layers: int
    heads: int

    def setup(self) -> None:
        self.blocks = [_Block(self.heads) for _ in range(self.layers)]
        self.norm = nn.LayerNorm()
        self.code_scale = self.param("code_scale", nn.initializers.constant(0.1), ())
        self.sharpness = self.param("sharpness", nn.initializers.constant(10.0), ())

    def __call__(self, z: Array, labelled: Array) -> Array:
        return self.queries(z, self.support(z, z, labelled), labelled)

    def support(self, z: Array, codes: Array, labelled: Array) -> Array:
        """The tokens of the support before each layer and after the last: `[layers + 1, n, features]`."""
        tokens = [z + self.code_scale * codes]
        for block in self.blocks:
            tokens.append(block(tokens[-1], tokens[-1], labelled))
        return jnp.stack(tokens)

    def queries(self, z: Array, tokens: Array, labelled: Array) -> Array:
        """The scores of the last attention `[queries, n]`: cosines, sharpened."""
        for block, context in zip(self.blocks, tokens, strict=False):
            z = block(z, context, labelled)
        return self.sharpness * (unit(self.norm(z)) @ unit(self.norm(tokens[-1])).T)
