"""Any network as a `Model`, two pure functions: Flax Linen, Flax NNX, Equinox, Haiku."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
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
    takes_train = "train" in inspect.signature(type(module).__call__).parameters

    def options(train: bool) -> dict[str, Any]:
        return {"train": train} if takes_train else {}

    def init(key: Key[Array, ""], inputs: PyTree) -> tuple[Params, State]:
        variables = module.init(key, inputs, **options(False))
        return variables.get("params", {}), {name: v for name, v in variables.items() if name != "params"}

    def apply(
        key: Key[Array, ""], params: Params, state: State, inputs: PyTree, *, train: bool
    ) -> tuple[PyTree, State]:
        outputs, state = module.apply(
            {"params": params, **state},
            inputs,
            **options(train),
            mutable=list(state),
            rngs={"dropout": key},
        )
        # Statistics seen at query time are data, not a path for second-order terms.
        return outputs, jax.lax.stop_gradient(dict(state))

    return Model(init, apply)


def nnx(make: Callable[[Any], Any]) -> Model:
    """A Flax NNX module as a `Model`.

    Args:
        make: `(rngs) -> module`, so that every `init` draws new parameters. The module is put into `train()` mode on
            the support and into `eval()` mode on the queries.

    Returns:
        The model. `params` holds the `nnx.Param` variables, `state` all the others; no gradient flows through it.

    Example:
        >>> import jax, jax.numpy as jnp, jmeta
        >>> from flax import nnx
        >>> model = jmeta.nnx(lambda rngs: nnx.Linear(3, 5, rngs=rngs))
        >>> params, state = model.init(jax.random.key(0), jnp.ones((2, 3)))
    """
    from flax import nnx as flax_nnx

    def split(module: Any) -> Any:
        return flax_nnx.split(module, flax_nnx.Param, ...)

    graph = split(flax_nnx.eval_shape(lambda: make(flax_nnx.Rngs(0))))[0]

    def init(key: Key[Array, ""], inputs: PyTree) -> tuple[Params, State]:
        _, params, state = split(make(flax_nnx.Rngs(key)))
        return flax_nnx.to_pure_dict(params), flax_nnx.to_pure_dict(state)

    def apply(
        key: Key[Array, ""], params: Params, state: State, inputs: PyTree, *, train: bool
    ) -> tuple[PyTree, State]:
        module = make_like(params, state)
        (module.train if train else module.eval)()
        outputs = module(inputs)
        _, _, new_state = split(module)
        return outputs, jax.lax.stop_gradient(flax_nnx.to_pure_dict(new_state))

    def make_like(params: Params, state: State) -> Any:
        abstract = flax_nnx.eval_shape(lambda: make(flax_nnx.Rngs(0)))
        _, abstract_params, abstract_state = split(abstract)
        flax_nnx.replace_by_pure_dict(abstract_params, params)
        flax_nnx.replace_by_pure_dict(abstract_state, state)
        return flax_nnx.merge(graph, abstract_params, abstract_state)

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
    """
    import equinox as eqx

    def init(key: Key[Array, ""], inputs: PyTree) -> tuple[Params, State]:
        return eqx.filter(make(key), eqx.is_inexact_array), ()

    _, static = eqx.partition(eqx.filter_eval_shape(make, jax.random.key(0)), _is_inexact_shape)

    def apply(
        key: Key[Array, ""], params: Params, state: State, inputs: PyTree, *, train: bool
    ) -> tuple[PyTree, State]:
        return jax.vmap(eqx.combine(params, static))(inputs), state

    return Model(init, apply)


def _is_inexact_shape(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jax.numpy.issubdtype(leaf.dtype, jax.numpy.inexact)


def haiku(transformed: Any) -> Model:
    """A transformed Haiku function as a `Model`.

    Args:
        transformed: `hk.transform_with_state(f)`, where `f(inputs)` or `f(inputs, train)` builds the network; `train`
            is true on the support.

    Returns:
        The model; no gradient flows through the state.

    Example:
        >>> import haiku as hk, jax, jax.numpy as jnp, jmeta
        >>> model = jmeta.haiku(hk.transform_with_state(lambda x: hk.nets.MLP([40, 40, 1])(x)))
        >>> params, state = model.init(jax.random.key(0), jnp.ones((10, 1)))
    """

    def call(function: Any, *args: Any, train: bool) -> Any:
        try:
            return function(*args, train)
        except TypeError:
            return function(*args)

    def init(key: Key[Array, ""], inputs: PyTree) -> tuple[Params, State]:
        return call(transformed.init, key, inputs, train=False)

    def apply(
        key: Key[Array, ""], params: Params, state: State, inputs: PyTree, *, train: bool
    ) -> tuple[PyTree, State]:
        outputs, state = call(transformed.apply, params, state, key, inputs, train=train)
        return outputs, jax.lax.stop_gradient(state)

    return Model(init, apply)
