"""Learners that compare embeddings: how their network sees the examples of a task."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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
    has_statistics,
    measured,
    outputs_of,
    over_tasks,
)
from jmeta.errors import DataError, ModelError
from jmeta.inputs import as_inputs
from jmeta.kinds import Similar, is_similar
from jmeta.masks import described, masked


def embedded(
    model: Model,
    init: Callable[[Key[Array, ""], Task], tuple[Params, State]],
    adapt: Callable[[Key[Array, ""], Params, State, PyTree], Adapted],
    predict: Callable[[Key[Array, ""], Adapted, PyTree], PyTree],
    loss: Callable[[PyTree, PyTree], Float[Array, ""]],
    *,
    part: str | None = "model",
) -> MetaLearner:
    """A learner that compares embeddings, from functions of embeddings: f_θ itself is applied here alone.

    How f_θ sees the examples goes by its state:

    * without statistics, or with those of each batch by itself: support and queries one after the other; random parts
      (dropout) are on in training, off at test.
    * moving averages, `"batch_stats"`: support and queries of a training task are one batch, which moves the averages;
      at test the averages normalise both.
    * statistics of the support, `"task_stats"`: the support sets them, and the queries are normalised by them.

    Images of similar classes among the descriptions, `jmeta.Similar`, are seen as further rows of the support.

    Args:
        model: f_θ.
        init: `(key, task) -> (params, state)`.
        adapt: `(key, params, state, support) -> Adapted`, where `support.inputs` are embeddings `[n, ...]`, and those
            of similar classes the mean of their embeddings, `Similar([ways, ...])`;
            `Adapted.params` is a tuple that begins with the `params` it was given.
        predict: `(key, adapted, embeddings) -> outputs`.
        loss: `(outputs, targets) -> scalar`.
        part: the entry of parameters and state that is the network's own; None where they are nothing else.

    Returns:
        The learner.

    Raises:
        ModelError: `model` is no `Model`; from `init` and `fit`, it ends in a head of at most as many outputs as ways.

    Example:
        >>> import jax, jmeta
        >>> model = jmeta.linen(jmeta.MLP(outputs=None))
        >>> learner = jmeta.embedded(  # the nearest example
        ...     model,
        ...     init=lambda key, task: model.init(key, task.support.inputs),
        ...     adapt=lambda key, params, state, support: jmeta.Adapted((params, support.inputs), state, {}),
        ...     predict=lambda key, adapted, z: -jmeta.squared_euclidean(z, adapted.params[1]),
        ...     loss=jmeta.softmax_cross_entropy,
        ...     part=None,
        ... )

    Reference: Snell et al. 2017, "Prototypical Networks for Few-shot Learning", whose code makes one batch of support
    and queries of a training task.
    """
    check_model(model)

    def own(tree: PyTree) -> PyTree:
        return tree if part is None else tree[part]

    def embeddings(
        key: Key[Array, ""], params: Params, state: State, examples: Any, train: bool
    ) -> tuple[PyTree, State]:
        z, new = outputs_of(model, key, own(params), own(state), examples, train=train)
        return z, new if part is None else {**state, part: new}

    def checked_init(key: Key[Array, ""], task: Task) -> tuple[Params, State]:
        params, state = init(key, task)
        head, ways = own(params), task.support.targets.shape[-1]
        head = jax.tree.leaves(head.get("head", ())) if isinstance(head, Mapping) else []
        if head and head[0].shape[-1] <= ways:
            raise ModelError(
                f"the network ends in a head of {head[0].shape[-1]} outputs for tasks of {ways} ways, where embeddings "
                "are compared; make it without one: jmeta.Conv4(outputs=None)."
            )
        return params, state

    def answer(key: Key[Array, ""], params: Params, state: State, support: PyTree, train: bool) -> Adapted:
        embed_key, adapt_key = jax.random.split(key)
        z, state = embeddings(embed_key, params, state, with_similar(support), train)
        return adapt(adapt_key, params, state, with_embeddings(support, z))

    def whole_adapt(key: Key[Array, ""], params: Params, state: State, support: PyTree) -> Adapted:
        check_examples("support", support)
        return answer(key, params, state, support, train=has_statistics(own(state), "task_stats"))

    def whole_predict(key: Key[Array, ""], adapted: Adapted, inputs: PyTree) -> PyTree:
        embed_key, predict_key = jax.random.split(key)
        z, _ = model.apply(embed_key, own(adapted.params[0]), own(adapted.state), inputs, train=False)
        return predict(predict_key, adapted, z)

    def one_task(
        key: Key[Array, ""], params: Params, state: State, task: Task
    ) -> tuple[Float[Array, ""], tuple[State, Info]]:
        embed_key, adapt_key, predict_key = jax.random.split(key, 3)
        support, query = task.support, task.query
        check_examples("support", support)
        if has_statistics(own(state), "batch_stats"):
            seen = with_similar(support)
            z, state = embeddings(embed_key, params, state, _one_batch(seen, query), train=True)
            n = len(jax.tree.leaves(seen.inputs)[0])
            adapted = adapt(adapt_key, params, state, with_embeddings(support, z[:n]))
            z = z[n:]
        else:
            adapted = answer(adapt_key, params, state, support, train=True)
            by_support = has_statistics(own(state), "task_stats")
            z, _ = embeddings(embed_key, params, adapted.state, query, train=not by_support)
        outputs = predict(predict_key, adapted, z)
        return measured(loss, outputs, query), (adapted.state, adapted.info)

    return MetaLearner(checked_init, whole_adapt, whole_predict, over_tasks(one_task))


def _similar(support: Any) -> list[Similar]:
    kinds = jax.tree.leaves(getattr(support, "descriptions", ()), is_leaf=is_similar)
    return [kind for kind in kinds if is_similar(kind)]


def with_similar(support: Any) -> Any:
    """A support whose inputs, and mask, are followed by the images of similar classes, where it has some."""
    similar = _similar(support)
    if not similar:
        return support
    images = [kind.images.reshape(-1, *kind.images.shape[2:]) for kind in similar]
    inputs = jnp.concatenate([support.inputs, *images])
    if isinstance(support.mask, tuple):
        return support._replace(inputs=inputs)
    told = [jnp.repeat(described(kind), kind.images.shape[1]) for kind in similar]
    return support._replace(inputs=inputs, mask=jnp.concatenate([support.mask, *told]))


def with_embeddings(support: Any, z: PyTree) -> Any:
    """The support with the embeddings of the rows of `with_similar` in the place of its inputs and those images."""
    if not _similar(support):
        return support._replace(inputs=z)
    place = len(support.targets)
    inputs = z[:place]

    def pooled(kind: Any) -> Any:
        nonlocal place
        if not is_similar(kind):
            return kind
        ways, n = kind.images.shape[:2]
        own, place = z[place : place + ways * n], place + ways * n
        mean = own.reshape(ways, n, *own.shape[1:]).mean(axis=1)
        return kind._replace(images=masked(mean, described(kind)))

    return support._replace(inputs=inputs, descriptions=jax.tree.map(pooled, support.descriptions, is_leaf=is_similar))


def at_test(model: Model) -> Model:
    """A pre-trained network that learns nothing more: its averages normalise the support as they do the queries.

    Random parts are off; statistics of the support, `"task_stats"`, are still set by it.

    Args:
        model: the network.

    Returns:
        The network, for which `train` makes no other difference.
    """

    def apply(
        key: Key[Array, ""], params: Params, state: State, inputs: PyTree, *, train: bool, **mask: Any
    ) -> tuple[PyTree, State]:
        train = train and has_statistics(state, "task_stats")
        return model.apply(key, params, state, inputs, train=train, **mask)

    return model._replace(apply=apply)


def embed(
    model: Model, params: Params, state: State, inputs: Any, *, batch: int = 64
) -> Float[np.ndarray, "n features"]:
    """The embeddings of a network that learns nothing more, once and for all: then `jmeta.from_embeddings`.

    Args:
        model: the network, without a head.
        params: its weights, as `jmeta.load_params` gives.
        state: beside them.
        inputs: `[n, ...]`, read as by `jmeta.as_inputs`.
        batch: how many at a time.

    Returns:
        `[n, features]`.

    Raises:
        DataError: there are no inputs.

    Example:
        >>> import jax, jax.numpy as jnp, jmeta, numpy as np
        >>> images = np.zeros((100, 28, 28, 1), np.uint8)
        >>> model = jmeta.linen(jmeta.Conv4(outputs=None, features=8))
        >>> params, state = model.init(jax.random.key(0), jnp.asarray(images[:1], jnp.float32))
        >>> jmeta.embed(model, params, state, images).shape
        (100, 32)
    """
    if not len(inputs):
        raise DataError("there are no inputs to embed; give at least one.")
    parts, size = [], min(batch, len(inputs))
    for start in range(0, len(inputs), batch):
        x = as_inputs(inputs[start : start + batch])
        filled = np.concatenate([x, np.repeat(x[-1:], size - len(x), axis=0)])  # of one shape, that of one program
        parts.append(np.asarray(_outputs(model, params, state, jnp.asarray(filled)))[: len(x)])
    return np.concatenate(parts)


@partial(jax.jit, static_argnums=0)
def _outputs(model: Model, params: Params, state: State, inputs: Array) -> PyTree:
    return model.apply(jax.random.key(0), params, state, inputs, train=False)[0]


def _one_batch(support: Any, query: Any) -> Examples:
    """The inputs of both, and which of their rows are there."""
    inputs = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), support.inputs, query.inputs)
    masks = [getattr(examples, "mask", ()) for examples in (support, query)]
    if all(isinstance(mask, tuple) for mask in masks):
        return Examples(inputs, ())
    rows = [jnp.ones(len(jax.tree.leaves(examples.inputs)[0]), bool) for examples in (support, query)]
    known = [row if isinstance(mask, tuple) else mask for mask, row in zip(masks, rows, strict=True)]
    return Examples(inputs, (), mask=jnp.concatenate(known))
