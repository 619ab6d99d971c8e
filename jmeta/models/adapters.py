"""Any network as a `Model`, two pure functions: Flax Linen, Flax NNX, Equinox, Haiku."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Key, PyTree

from jmeta.core import Model, Params, State


def linen(module: nn.Module) -> Model:
    """A Flax Linen module as a `Model`.

    Args:
        module: its `__call__(inputs)` gives the outputs. A `train` argument is passed on if it has one: true on the
            support, false on the queries. A `"dropout"` stream of random numbers is provided.

    Returns:
        The model. `params` is the collection `"params"`, `state` all the others (batch statistics); no gradient flows
        through the state.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, jmeta
        >>> model = jmeta.linen(nn.Dense(5))
        >>> params, state = model.init(jax.random.key(0), jnp.ones((2, 3)))
        >>> model.apply(jax.random.key(1), params, state, jnp.ones((2, 3)), train=True)[0].shape
        (2, 5)
    """
    options = _train_option(type(module).__call__)

    def init(key: Key[Array, ""], inputs: PyTree) -> tuple[Params, State]:
        variables = module.init(key, inputs, **options(False))
        return variables.get("params", {}), {name: v for name, v in variables.items() if name != "params"}

    def apply(
        key: Key[Array, ""], params: Params, state: State, inputs: PyTree, *, train: bool
    ) -> tuple[PyTree, State]:
        variables = {"params": params, **state}
        outputs, state = module.apply(variables, inputs, **options(train), mutable=list(state), rngs={"dropout": key})
        # Statistics seen at query time are data, not a path for second-order terms.
        return outputs, jax.lax.stop_gradient(dict(state))

    return Model(init, apply)


def nnx(make: Callable[[Any], Any]) -> Model:
    """A Flax NNX module as a `Model`.

    Args:
        make: `(rngs) -> module`, so that every `init` draws new parameters. The module is put into `train()` mode on
            the support and into `eval()` mode on the queries; its random streams start anew from the key of each call.

    Returns:
        The model. `params` holds the `nnx.Param` variables, `state` all the others (batch statistics) but the random
        streams; no gradient flows through the state.

    Example:
        >>> import jax, jax.numpy as jnp, jmeta
        >>> from flax import nnx
        >>> model = jmeta.nnx(lambda rngs: nnx.Linear(3, 5, rngs=rngs))
        >>> params, state = model.init(jax.random.key(0), jnp.ones((2, 3)))
        >>> model.apply(jax.random.key(1), params, state, jnp.ones((2, 3)), train=True)[0].shape
        (2, 5)
    """
    from flax import nnx as flax_nnx

    def split(module: Any) -> Any:
        graph, *parts = flax_nnx.split(module, flax_nnx.Param, flax_nnx.RngState, ...)
        return graph, *map(flax_nnx.to_pure_dict, parts)

    graph, _, random, _ = split(flax_nnx.eval_shape(lambda: make(flax_nnx.Rngs(0))))

    def streams(key: Key[Array, ""]) -> PyTree:
        def start(i: int, leaf: Any) -> Array:
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                return jax.random.split(jax.random.fold_in(key, i), leaf.shape)
            return jnp.zeros(leaf.shape, leaf.dtype)  # how often a stream was drawn from

        leaves, tree = jax.tree.flatten(random)
        return jax.tree.unflatten(tree, map(start, range(len(leaves)), leaves))

    def init(key: Key[Array, ""], inputs: PyTree) -> tuple[Params, State]:
        _, params, _, state = split(make(flax_nnx.Rngs(key)))
        return params, state

    def apply(
        key: Key[Array, ""], params: Params, state: State, inputs: PyTree, *, train: bool
    ) -> tuple[PyTree, State]:
        module = flax_nnx.merge(graph, params, streams(key), state)
        (module.train if train else module.eval)()
        outputs = module(inputs)
        return outputs, jax.lax.stop_gradient(split(module)[-1])

    return Model(init, apply)


def equinox(make: Callable[[Key[Array, ""]], Any]) -> Model:
    """An Equinox module as a `Model`.

    Args:
        make: `(key) -> module`, so that every `init` draws new parameters. The module maps one example and is vmapped
            over the examples, as is usual in Equinox.

    Returns:
        The model. `params` holds the inexact arrays of the module; there is no state.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp, jmeta
        >>> model = jmeta.equinox(lambda key: eqx.nn.MLP(1, 1, 40, 2, key=key))
        >>> params, state = model.init(jax.random.key(0), jnp.ones((10, 1)))
        >>> model.apply(jax.random.key(1), params, state, jnp.ones((10, 1)), train=True)[0].shape
        (10, 1)
    """
    import equinox as eqx

    _, static = eqx.partition(make(jax.random.key(0)), eqx.is_inexact_array)

    def init(key: Key[Array, ""], inputs: PyTree) -> tuple[Params, State]:
        return eqx.filter(make(key), eqx.is_inexact_array), ()

    def apply(
        key: Key[Array, ""], params: Params, state: State, inputs: PyTree, *, train: bool
    ) -> tuple[PyTree, State]:
        return jax.vmap(eqx.combine(params, static))(inputs), state

    return Model(init, apply)


def haiku(function: Callable[..., Any]) -> Model:
    """A Haiku network as a `Model`.

    Args:
        function: what `hk.transform_with_state` takes: `function(inputs)` builds the network and gives its outputs. A
            `train` argument is passed on if it has one: true on the support, false on the queries.

    Returns:
        The model; no gradient flows through the state.

    Example:
        >>> import haiku as hk, jax, jax.numpy as jnp, jmeta
        >>> model = jmeta.haiku(lambda inputs: hk.nets.MLP([40, 40, 1])(inputs))
        >>> params, state = model.init(jax.random.key(0), jnp.ones((10, 1)))
        >>> model.apply(jax.random.key(1), params, state, jnp.ones((10, 1)), train=True)[0].shape
        (10, 1)
    """
    import haiku as hk

    transformed = hk.transform_with_state(function)
    options = _train_option(function)

    def init(key: Key[Array, ""], inputs: PyTree) -> tuple[Params, State]:
        return transformed.init(key, inputs, **options(True))  # Haiku's batch norm makes its state in training only

    def apply(
        key: Key[Array, ""], params: Params, state: State, inputs: PyTree, *, train: bool
    ) -> tuple[PyTree, State]:
        outputs, state = transformed.apply(params, state, key, inputs, **options(train))
        return outputs, jax.lax.stop_gradient(state)

    return Model(init, apply)


def _train_option(function: Callable[..., Any]) -> Callable[[bool], dict[str, Any]]:
    """`train` as keyword arguments of a function, none if it has no such parameter."""
    takes_train = "train" in inspect.signature(function).parameters
    return lambda train: {"train": train} if takes_train else {}


def identity() -> Model:
    """The model that gives its inputs, flattened: for precomputed embeddings, or for baselines on raw pixels.

    Returns:
        The model, without parameters: `[n, ...] -> [n, features]`.

    Example:
        >>> import jax, jax.numpy as jnp, jmeta
        >>> jmeta.identity().apply(jax.random.key(0), {}, {}, jnp.ones((2, 4, 4, 1)), train=False)[0].shape
        (2, 16)
    """

    def apply(
        key: Key[Array, ""], params: Params, state: State, inputs: PyTree, *, train: bool
    ) -> tuple[PyTree, State]:
        return inputs.reshape(inputs.shape[0], -1), state

    return Model(lambda key, inputs: ({}, {}), apply)
