"""Any network as a `Model`, two pure functions: Flax Linen, Flax NNX, Equinox, Haiku."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Key, PyTree

from jmeta.core import Mask, Model, Params, State
from jmeta.errors import ModelError


def linen(module: nn.Module) -> Model:
    """A Flax Linen module as a `Model`.

    Args:
        module: its `__call__(inputs)` gives the outputs. A `train` argument is passed on if it has one: true on what
            the network learns from, false on what it answers; likewise a `mask` of the rows that are there, for
            `nn.BatchNorm(...)(x, mask=...)` and the like. A `"dropout"` stream of random numbers is provided.

    Returns:
        The model. `params` is the collection `"params"`, `state` all the others. Moving averages, the collection
        `"batch_stats"`, count as constants; through all other collections θ is trained, as through the statistics of
        the support, `"task_stats"`, of `jmeta.BatchNorm("per_task")`.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, jmeta
        >>> model = jmeta.linen(nn.Dense(5))
        >>> params, state = model.init(jax.random.key(0), jnp.ones((2, 3)))
        >>> model.apply(jax.random.key(1), params, state, jnp.ones((2, 3)), train=True)[0].shape
        (2, 5)
    """
    options = _options(type(module).__call__)

    def init(key: Key[Array, ""], inputs: PyTree) -> tuple[Params, State]:
        variables = module.init(key, inputs, **options(False))
        return variables.get("params", {}), {name: v for name, v in variables.items() if name != "params"}

    def apply(
        key: Key[Array, ""], params: Params, state: State, inputs: PyTree, *, train: bool, mask: Mask = None
    ) -> tuple[PyTree, State]:
        variables, given = {"params": params, **state}, options(train, mask, state)
        outputs, state = module.apply(variables, inputs, **given, mutable=list(state), rngs={"dropout": key})
        return outputs, _averages_as_constants(dict(state))

    return Model(init, apply)


def nnx(make: Callable[[Any], Any]) -> Model:
    """A Flax NNX module as a `Model`.

    Args:
        make: `(rngs) -> module`, so that every `init` draws new parameters. The module is put into `train()` mode on
            what it learns from and into `eval()` mode on what it answers; its random streams start anew from the key of
            each call. It may take a `mask` of the rows that are there.

    Returns:
        The model. `params` holds the `nnx.Param` variables, `state` all the others but the random streams:
        `nnx.BatchStat` variables under `"batch_stats"`, moving averages that count as constants, and the rest under
        `"others"`, through which θ is trained.

    Example:
        >>> import jax, jax.numpy as jnp, jmeta
        >>> from flax import nnx
        >>> model = jmeta.nnx(lambda rngs: nnx.Linear(3, 5, rngs=rngs))
        >>> params, state = model.init(jax.random.key(0), jnp.ones((2, 3)))
        >>> model.apply(jax.random.key(1), params, state, jnp.ones((2, 3)), train=True)[0].shape
        (2, 5)
    """
    from flax import nnx as flax_nnx

    kinds = flax_nnx.Param, flax_nnx.RngState, flax_nnx.BatchStat

    def split(module: Any) -> Any:
        graph, *parts = flax_nnx.split(module, *kinds, ...)
        params, random, averages, others = map(flax_nnx.to_pure_dict, parts)
        state = {"batch_stats": averages, "others": others}
        return graph, params, random, {name: part for name, part in state.items() if part}

    abstract = flax_nnx.eval_shape(lambda: make(flax_nnx.Rngs(0)))
    options = _options(type(abstract).__call__, takes=("mask",))
    graph, _, random, _ = split(abstract)

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
        key: Key[Array, ""], params: Params, state: State, inputs: PyTree, *, train: bool, mask: Mask = None
    ) -> tuple[PyTree, State]:
        module = flax_nnx.merge(graph, params, streams(key), *state.values())
        (module.train if train else module.eval)()
        outputs = module(inputs, **options(train, mask, state))
        return outputs, _averages_as_constants(split(module)[-1])

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
        key: Key[Array, ""], params: Params, state: State, inputs: PyTree, *, train: bool, mask: Mask = None
    ) -> tuple[PyTree, State]:
        return jax.vmap(eqx.combine(params, static))(inputs), state  # one example at a time needs no mask

    return Model(init, apply)


def haiku(function: Callable[..., Any]) -> Model:
    """A Haiku network as a `Model`.

    Args:
        function: what `hk.transform_with_state` takes: `function(inputs)` builds the network and gives its outputs. A
            `train` argument is passed on if it has one: true on what the network learns from, false on what it answers;
            likewise a `mask` of the rows that are there.

    Returns:
        The model. The state of `hk.ExponentialMovingAverage`, of which Haiku's batch norm is made, lies under
        `"batch_stats"` and counts as a constant; the rest, under `"others"`, does not.

    Example:
        >>> import haiku as hk, jax, jax.numpy as jnp, jmeta
        >>> model = jmeta.haiku(lambda inputs: hk.nets.MLP([40, 40, 1])(inputs))
        >>> params, state = model.init(jax.random.key(0), jnp.ones((10, 1)))
        >>> model.apply(jax.random.key(1), params, state, jnp.ones((10, 1)), train=True)[0].shape
        (10, 1)
    """
    import haiku as hk

    transformed = hk.transform_with_state(function)
    options = _options(function)

    def grouped(state: PyTree) -> State:
        averages = {module: leaves for module, leaves in state.items() if "average" in leaves}
        others = {module: leaves for module, leaves in state.items() if module not in averages}
        return {name: part for name, part in (("batch_stats", averages), ("others", others)) if part}

    def init(key: Key[Array, ""], inputs: PyTree) -> tuple[Params, State]:
        # Haiku's batch norm makes its state in training only
        params, state = transformed.init(key, inputs, **options(True))
        return params, grouped(state)

    def apply(
        key: Key[Array, ""], params: Params, state: State, inputs: PyTree, *, train: bool, mask: Mask = None
    ) -> tuple[PyTree, State]:
        own = {module: leaves for part in state.values() for module, leaves in part.items()}
        outputs, own = transformed.apply(params, own, key, inputs, **options(train, mask, state))
        return outputs, _averages_as_constants(grouped(own))

    return Model(init, apply)


def _averages_as_constants(state: dict[str, Any]) -> State:
    """Moving averages are data of former batches, not a path for the meta-gradient; NNX itself has it so."""
    return {name: jax.lax.stop_gradient(part) if name == "batch_stats" else part for name, part in state.items()}


def _options(function: Callable[..., Any], takes: tuple[str, ...] = ("train", "mask")) -> Callable[..., dict[str, Any]]:
    """`train` and `mask` as keyword arguments of a function, as far as it has such parameters."""
    known = tuple(name for name in takes if name in inspect.signature(function).parameters)

    def options(train: bool, mask: Mask = None, state: State = ()) -> dict[str, Any]:
        if mask is not None and "mask" not in known and state:
            raise ModelError(
                "the tasks have rows that are not there, which would enter the statistics of the network; let it take "
                "`mask`, `[n]`, and give it to its normalisation, or use one without statistics over rows."
            )
        given = {"train": train, "mask": mask}
        return {name: given[name] for name in known if given[name] is not None}

    return options


def identity() -> Model:
    """The model that gives its inputs, flattened, as floats: for precomputed embeddings and baselines on raw pixels.

    Returns:
        The model, without parameters: `[n, ...] -> [n, features]`.

    Example:
        >>> import jax, jax.numpy as jnp, jmeta
        >>> jmeta.identity().apply(jax.random.key(0), {}, {}, jnp.ones((2, 4, 4, 1)), train=False)[0].shape
        (2, 16)
    """

    def apply(
        key: Key[Array, ""], params: Params, state: State, inputs: PyTree, *, train: bool, mask: Mask = None
    ) -> tuple[PyTree, State]:
        x = inputs.reshape(inputs.shape[0], -1)
        return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.float32), state

    return Model(lambda key, inputs: ({}, {}), apply)
