"""Matching networks (Vinyals et al. 2016)."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Key

from jmeta.core import Adapted, Examples, MetaLearner, Model, Params, State, Task
from jmeta.distances import cosine
from jmeta.embedding import embedded
from jmeta.errors import ConfigError
from jmeta.hyperparameters import Number, violated
from jmeta.learners.prototypical import Distance
from jmeta.losses import softmax_cross_entropy
from jmeta.masks import only, shots


def matching(
    model: Model, *, distance: Distance = cosine, temperature: Number = 0.1, full_context: bool = False
) -> MetaLearner:
    """Matching networks: a query takes the labels of the support, weighed by attention.

    a(x, xᵢ) = softmaxᵢ(−d(f(x), g(xᵢ)) / τ); p(y | x) = Σᵢ a(x, xᵢ) yᵢ. The outputs are log p.

    Args:
        model: the embedding f′_θ = g′_θ, whose outputs `[n, features]` have any width.
        distance: d, `([queries, features], [classes, features]) -> [queries, classes]`.
        temperature: τ; a softmax of cosines themselves, τ = 1, can hardly prefer one of many.
        full_context: embed each example in the context of the support: g by a bidirectional LSTM over the support, f
            by an LSTM of five steps that attends to it. The order of the support then matters.

    Returns:
        The learner, for any number of ways. `Adapted.params` is `(θ, embeddings of the support, targets)`.

    Raises:
        ConfigError: the temperature is not positive.
        ModelError: `model` is no `Model`.

    Example:
        >>> import jmeta
        >>> learner = jmeta.matching(jmeta.linen(jmeta.Conv4(outputs=None, pooling="max")))

    Reference: Vinyals, Blundell, Lillicrap, Kavukcuoglu, Wierstra 2016, "Matching Networks for One Shot Learning",
    sections 2.1 and 2.2, appendix A, https://arxiv.org/abs/1606.04080.

    Differences from the paper: the temperature, of which the paper has none (τ = 1); f and g share the network, and
    their order of the support is that of the task, sorted by class, where the paper does not say which.
    """
    if violated(temperature > 0):
        raise ConfigError(f"temperature is {temperature}; give a positive number.")

    def init(key: Key[Array, ""], task: Task) -> tuple[Params, State]:
        model_key, context_key = jax.random.split(key)
        params, state = model.init(model_key, task.support.inputs)
        if not full_context:
            return {"model": params, "context": {}}, {"model": state}
        z, _ = model.apply(key, params, state, task.support.inputs, train=True)
        context = _FullContext(z.shape[-1]).init(context_key, z, task.support.targets.any(axis=1))["params"]
        return {"model": params, "context": context}, {"model": state}

    def adapt(key: Key[Array, ""], params: Params, state: State, support: Examples) -> Adapted:
        z, targets = support.inputs, support.targets
        if full_context:
            # the sequence reads what has a label first, so that what fills up the shape ends it
            order = jnp.argsort(~targets.any(axis=1), stable=True)
            z, targets = z[order], targets[order]
            context = {"params": params["context"]}
            reader = _FullContext(z.shape[-1])
            z = jnp.asarray(reader.apply(context, z, targets.any(axis=1), method="support"))
        return Adapted((params, z, targets), state, {})

    def predict(key: Key[Array, ""], adapted: Adapted, z: Float[Array, "queries features"]) -> Array:
        params, examples, targets = adapted.params
        if full_context:
            context, labelled = {"params": params["context"]}, targets.any(axis=1)
            z = jnp.asarray(_FullContext(z.shape[-1]).apply(context, z, examples, labelled, method="queries"))
        return label_attention(-distance(z, examples) / temperature, targets)

    return embedded(model, init, adapt, predict, softmax_cross_entropy)


def label_attention(scores: Float[Array, "queries n"], targets: Float[Array, "n ways"]) -> Float[Array, "queries ways"]:
    """log Σᵢ softmaxᵢ(scores) targetsᵢ: what attention to labelled examples says about a query.

    Args:
        scores: `[queries, n]`.
        targets: `[n, ways]` one-hot; a row of zeros gets no attention.

    Returns:
        `[queries, ways]` log probabilities, finite, with the least number for classes without an example.

    Example:
        >>> import jax.numpy as jnp
        >>> from jmeta.learners.matching import label_attention
        >>> jnp.exp(label_attention(jnp.zeros((1, 3)), jnp.asarray([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]]))).tolist()
        [[1.0, 0.0]]
    """
    labelled = targets.any(axis=1)
    attention = jax.nn.softmax(jnp.where(labelled[None], scores, jnp.finfo(scores.dtype).min / 2), axis=1)
    tiny = jnp.finfo(scores.dtype).tiny  # a class that gets no attention still has a finite loss, and no gradient
    return only(shots(targets) > 0, jnp.log(attention @ targets + tiny))


class _FullContext(nn.Module):
    """Section 2.1.2 and appendix A: embeddings in the context of the whole support.

    Args:
        features: width of the embeddings.
        steps: K, how often f reads the support.
    """

    features: int
    steps: int = 5

    def setup(self) -> None:
        self.ahead = nn.RNN(nn.OptimizedLSTMCell(self.features))
        self.back = nn.RNN(nn.OptimizedLSTMCell(self.features), reverse=True, keep_order=True)
        self.read = nn.OptimizedLSTMCell(self.features)

    def __call__(self, examples: Array, labelled: Array) -> Array:
        return self.queries(examples, self.support(examples, labelled), labelled)

    def support(self, examples: Array, labelled: Array) -> Array:
        """g(xᵢ) = h→ᵢ + h←ᵢ + g′(xᵢ)."""
        n = labelled.sum()[None]
        read = self.ahead(examples[None], seq_lengths=n) + self.back(examples[None], seq_lengths=n)
        return examples + read[0]

    def queries(self, queries: Array, examples: Array, labelled: Array) -> Array:
        """f(x) = h_K with hₖ = LSTM(f′(x), [hₖ₋₁, rₖ₋₁]) + f′(x), where r is what attention reads of the support."""
        h, c = queries, jnp.zeros_like(queries)
        for _ in range(self.steps):
            scores = jnp.where(labelled[None], h @ examples.T, jnp.finfo(h.dtype).min / 2)
            r = jax.nn.softmax(scores, axis=1) @ examples
            (c, h), _ = self.read((c, h), jnp.concatenate([queries, r], axis=1))
            h = h + queries
        return h
