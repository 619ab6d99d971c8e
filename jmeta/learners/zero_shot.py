"""Zero-shot learning: classes known by their descriptions alone (Snell et al. 2017, section 2.7)."""

from collections.abc import Mapping
from typing import TypeAlias, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Key

from jmeta.core import Adapted, Examples, MetaLearner, Model, Params, State, Task, check_model
from jmeta.data.text import TokenIds
from jmeta.distances import squared_euclidean
from jmeta.embedding import embedded
from jmeta.errors import DataError
from jmeta.kinds import is_similar, kinds_of
from jmeta.learners.prototypical import Classes, Distance, nearest
from jmeta.losses import softmax_cross_entropy
from jmeta.masks import described, masked
from jmeta.models.adapters import identity, linen
from jmeta.models.text import TextEncoder

Describe: TypeAlias = Model | Mapping[str, Model] | None


def zero_shot(model: Model, *, describe: Describe = None, distance: Distance = squared_euclidean) -> MetaLearner:
    """Zero-shot learning: the description of a class becomes its prototype in the space of the images.

    wₖ = g_θ(description of class k); p(y = k | x) = softmaxₖ(−d(f_θ(x), wₖ)).

    Descriptions of several kinds (attributes, text, images of similar classes) work together, "this known class, with
    these attributes": wₖ is the mean of g of each kind that class k has, each with a linear map of its own. Images of
    similar classes, `jmeta.Similar`, are read by f_θ itself; the linear map of their mean starts at the identity.

    Args:
        model: the embedding f_θ of the queries, whose outputs `[n, features]` have any width.
        describe: g_θ before its last linear map, which the learner adds to reach the width of f_θ. Default: for
            descriptions that are vectors a perceptron with one hidden layer of 256, for `jmeta.TokenIds` a
            `jmeta.TextEncoder` with one too. For several kinds of descriptions a dictionary by their names.
        distance: d, `([queries, features], [classes, features]) -> [queries, classes]`.

    Returns:
        The learner. It looks at the descriptions in the support and not at its images; any number of ways.
        `Adapted.params` is `Classes(θ, prototypes [ways, features], present [ways])`; a class whose description is all
        zeros is not present and never the answer.

    Raises:
        ModelError: `model` or `describe` is no `Model`.
        DataError: from `init` and `fit`: the support has no descriptions.

    Example:
        >>> import jmeta
        >>> learner = jmeta.zero_shot(jmeta.linen(jmeta.Conv4(outputs=None, pooling="max")))
        >>> unseen = jmeta.glyphs(split="test", shots=0, descriptions="attributes")

    Reference: Snell, Swersky, Zemel 2017, "Prototypical Networks for Few-shot Learning", sections 2.7 and 3.3,
    https://arxiv.org/abs/1703.05175; the task: Lampert, Nickisch, Harmeling 2009, "Learning To Detect Unseen Object
    Classes by Between-Class Attribute Transfer".

    Differences from the paper: the paper's f and g are linear maps, on features of a network trained on ImageNet and on
    attributes, and its prototypes have unit length; here both are learned networks, and prototypes have any length.
    """
    check_model(model)

    def init(key: Key[Array, ""], task: Task) -> tuple[Params, State]:
        return init_towers(model, describe, key, task)

    def adapt(key: Key[Array, ""], params: Params, state: State, support: Examples) -> Adapted:
        prototypes, state = read_descriptions(describe, key, params, state, support, train=True)
        return Adapted(Classes(params, prototypes, described(support.descriptions)), state, {})

    return embedded(model, init, adapt, nearest(distance), softmax_cross_entropy)


def init_towers(model: Model, describe: Describe, key: Key[Array, ""], task: Task) -> tuple[Params, State]:
    """θ and state of f (`"model"`) and g (`"describe"`, and `"map"` to the width of f)."""
    model_key, reader_key = jax.random.split(key)
    params, state = model.init(model_key, task.query.inputs)
    z, _ = jax.eval_shape(lambda: model.apply(key, params, state, task.query.inputs, train=False))
    reader_params, reader_state = init_reader(describe, reader_key, task.support, z.shape[-1])
    return {"model": params, **reader_params}, {"model": state, **reader_state}


def init_reader(describe: Describe, key: Key[Array, ""], support: Examples, width: int) -> tuple[Params, State]:
    """θ and state of g alone, for an f of that width; of several kinds of descriptions by their names."""
    if kinds := kinds_of(support.descriptions):
        keys = jax.random.split(key, len(kinds))
        parts = {
            name: init_reader(_own(describe, name), own, support._replace(descriptions=kind), width)
            for own, (name, kind) in zip(keys, sorted(kinds.items()), strict=True)
        }
        params = {entry: {name: part[0][entry] for name, part in parts.items()} for entry in ("describe", "map")}
        return params, {"describe": {name: part[1]["describe"] for name, part in parts.items()}}
    if is_similar(support.descriptions):  # which are where f puts them
        return {"describe": {}, "map": jnp.eye(width)}, {"describe": {}}
    reader, descriptions = _reader(describe, support)
    describe_key, map_key = jax.random.split(key)
    params, state = reader.init(describe_key, descriptions)
    features, _ = jax.eval_shape(lambda: reader.apply(key, params, state, descriptions, train=False))
    linear = jax.nn.initializers.lecun_normal()(map_key, (features.shape[-1], width), jax.tree.leaves(params)[0].dtype)
    return {"describe": params, "map": linear}, {"describe": state}


def read_descriptions(
    describe: Describe,
    key: Key[Array, ""],
    params: Params,
    state: State,
    support: Examples,
    *,
    train: bool,
    dropout: float = 0.0,
) -> tuple[Float[Array, "ways features"], State]:
    """wₖ = g(description of class k) in the space of f, and the state after it; dropout is of the default g.

    Of several kinds of descriptions it is the mean, over those that class k has.
    """
    if kinds := kinds_of(support.descriptions):
        w, told, states, keys = [], [], {}, jax.random.split(key, len(kinds))
        for own, (name, kind) in zip(keys, sorted(kinds.items()), strict=True):
            of_kind = {entry: params[entry][name] for entry in ("describe", "map")}
            read, new = read_descriptions(
                _own(describe, name),
                own,
                of_kind,
                {"describe": state["describe"][name]},
                support._replace(descriptions=kind),
                train=train,
                dropout=dropout,
            )
            told.append(described(kind).astype(read.dtype))
            w.append(masked(read, described(kind)))
            states[name] = new["describe"]
        known = jnp.maximum(jnp.stack(told).sum(axis=0), 1.0)
        return jnp.stack(w).sum(axis=0) / known[:, None], {**state, "describe": states}
    reader, descriptions = _reader(describe, support, dropout)
    features, new = reader.apply(key, params["describe"], state["describe"], descriptions, train=train)
    return features @ params["map"], {**state, "describe": new}


def init_aligned(model: Model, key: Key[Array, ""], task: Task) -> tuple[Params, State]:
    """θ and state of f (`"model"`), which reads descriptions too; `DataError` unless they are what it takes."""
    given, inputs = task.support.descriptions, task.query.inputs
    is_text, shape = isinstance(given, TokenIds), jnp.shape(inputs)[1:]
    reads = len(shape) == 1 and jnp.issubdtype(jnp.result_type(inputs), jnp.integer)  # token ids, of any width
    if not (reads if is_text else getattr(given, "shape", ())[1:] == shape):
        told = "token ids" if is_text else f"of shape {list(getattr(given, 'shape', ()))}"
        raise DataError(
            f"descriptions are {told} and inputs [n, {', '.join(map(str, shape))}]; give such as the network takes, as "
            "jmeta.from_embeddings(x, labels, names) does, or leave aligned away."
        )
    params, state = model.init(key, task.query.inputs)
    return {"model": params}, {"model": state}


def read_aligned(
    model: Model, key: Key[Array, ""], params: Params, state: State, support: Examples
) -> Float[Array, "ways features"]:
    """wₖ = f(description of class k)."""
    given = support.descriptions
    seen = jnp.asarray(given.ids if isinstance(given, TokenIds) else given)
    return jnp.asarray(model.apply(key, params["model"], state["model"], seen, train=False)[0])


def _own(describe: Describe, name: str) -> Model | None:
    """g of one kind."""
    return describe.get(name) if isinstance(describe, Mapping) else describe


def _reader(describe: Describe, support: Examples, dropout: float = 0.0) -> tuple[Model, Array]:
    """g before its last linear map, and what it reads; `DataError` where the support has no descriptions."""
    given = support.descriptions
    if not jax.tree.leaves(given):
        raise DataError(
            "the support has no descriptions of its classes; give from_arrays(..., descriptions=...), or glyphs("
            "descriptions='attributes')."
        )
    if is_similar(given):
        return identity(), given.images
    text = isinstance(given, TokenIds)
    descriptions = given.ids if text else given
    if describe is not None:
        check_model(describe)
        return cast(Model, describe), descriptions
    if text:
        return linen(TextEncoder(features=128, hidden=256, spread=0.05, dropout=dropout)), descriptions
    return linen(Hidden(256, dropout)), descriptions


class Hidden(nn.Module):
    """A perceptron's hidden layer, with dropout in training, and its head unless the map to the width of f is that."""

    width: int
    dropout: float = 0.0
    outputs: int | None = None

    @nn.compact
    def __call__(self, inputs: Float[Array, "n ..."], train: bool = False) -> Float[Array, "n outputs"]:
        hidden = nn.relu(nn.Dense(self.width)(inputs.reshape(len(inputs), -1)))
        hidden = nn.Dropout(self.dropout, deterministic=not train)(hidden)
        return hidden if self.outputs is None else nn.Dense(self.outputs, name="head")(hidden)
