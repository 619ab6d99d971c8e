"""Any network as a `Model`, two pure functions: Flax Linen, Flax NNX, Equinox, Haiku.

Training is told from answering by whatever switch the network has, as an argument of its call: `train`, `training` or
`is_training`, and with the other meaning `deterministic`, `use_running_average` or `inference`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.errors import ScopeParamShapeError
from jaxtyping import Array, Key, PyTree

from jmeta.core import Mask, Model, Params, State
from jmeta.errors import ModelError
from jmeta.inputs import as_floats, check_scaled
from jmeta.models.calls import SWITCHES, Call, averages_as_constants
from jmeta.models.convolution import conv_where_it_fits
from jmeta.tree import path_name


def linen(module: nn.Module) -> Model:
    """A Flax Linen module as a `Model`.

    Args:
        module: its `__call__(inputs)` gives the outputs. A switch is passed on if it has one, an argument of the call
            or a field of the module: `train`, `training`, `is_training`, true on what the network learns from and false
            on what it answers, or `deterministic`, `use_running_average`, `inference`, the other way round; likewise a
            `mask` of the rows that are there, for `nn.BatchNorm(...)(x, mask=...)` and the like. Every stream of random
            numbers has a key. What it sows is not kept, and `perturb` changes nothing. Its `nn.Conv` computes as
            `jmeta.Conv`, which is fast when each task has its own kernel, where the form of the layer allows.

    Returns:
        The model. `params` is the collection `"params"`, `state` all the others. Moving averages, the collection
        `"batch_stats"`, count as constants; through all other collections θ is trained, as through the statistics of
        the support, `"task_stats"`, of `jmeta.BatchNorm("per_task")`.

    Raises:
        ModelError: the call needs an argument of another name; from `apply`, dropout that is on where the network
            answers, or dropout or moving averages that no switch reaches.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, jmeta
        >>> model = jmeta.linen(nn.Dense(5))
        >>> params, state = model.init(jax.random.key(0), jnp.ones((2, 3)))
        >>> model.apply(jax.random.key(1), params, state, jnp.ones((2, 3)), train=True)[0].shape
        (2, 5)
    """
    call = Call.of(type(module).__call__, type(module).__name__)
    fields = tuple(name for name in SWITCHES if isinstance(getattr(module, name, None), bool))
    # Linen takes a field or an argument of the same name, not both
    call = dataclasses.replace(call, known=tuple(name for name in call.known if name not in fields))
    switched = bool(fields or call.switches)

    def ready(train: bool) -> nn.Module:
        given: dict[str, Any] = {name: train is SWITCHES[name] for name in fields}
        return module.clone(**given) if fields else module

    def init(key: Key[Array, ""], inputs: PyTree) -> tuple[Params, State]:
        variables = ready(False).init(key, inputs, **call.options(False))
        state = {name: v for name, v in variables.items() if name not in ("params", "perturbations")}
        params = variables.get("params", {})
        after = jax.eval_shape(lambda: run(key, params, state, inputs, False)[1]) if state else {}
        # what is sown grows at each call
        return params, {name: v for name, v in state.items() if _shapes(v) == _shapes(after[name])}

    def run(
        key: Key[Array, ""], params: Params, state: State, inputs: PyTree, train: bool, mask: Mask = None
    ) -> tuple[PyTree, Any]:
        given = call.options(train, mask, state)
        # Linen takes the stream "params" in place of one that has no key
        streams = {"dropout": key, "params": jax.random.fold_in(key, 0)}
        with nn.intercept_methods(_looked_at(train, switched)):
            try:
                return ready(train).apply(
                    {"params": params, **state}, inputs, **given, mutable=list(state), rngs=streams
                )
            except ScopeParamShapeError as error:
                shapes = ", ".join(str(list(x.shape[1:])) for x in jax.tree.leaves(inputs))
                raise ModelError(
                    f"the network cannot take inputs of shape {shapes}; give inputs of the shape that it was trained "
                    f"on, or other parameters ({str(error).split(' (http')[0].rstrip('.')})."
                ) from error

    def apply(
        key: Key[Array, ""], params: Params, state: State, inputs: PyTree, *, train: bool, mask: Mask = None
    ) -> tuple[PyTree, State]:
        check_scaled(inputs)
        outputs, state = run(key, params, state, inputs, train, mask)
        return outputs, averages_as_constants(dict(state))

    return Model(init, apply)


def _looked_at(train: bool, switched: bool) -> Callable[..., Any]:
    """An interceptor of Linen's layers.

    It brings convolutions to the one that is fast when each task has its own kernel, and refuses layers that would do
    the same in training and at test unseen.
    """

    def interceptor(run: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        layer = context.module
        if isinstance(layer, nn.Conv) and layer.conv_general_dilated is layer.conv_general_dilated_cls is None:
            object.__setattr__(layer, "conv_general_dilated", conv_where_it_fits)  # of this call's copy of the layer
        if context.method_name == "__call__" and isinstance(layer, nn.Dropout | nn.BatchNorm):
            name = "deterministic" if isinstance(layer, nn.Dropout) else "use_running_average"
            resting = getattr(layer, name)
            resting = kwargs.get(name, args[1] if len(args) > 1 else None) if resting is None else resting
            acts = isinstance(layer, nn.BatchNorm) or layer.rate > 0
            if acts and isinstance(resting, bool):
                if isinstance(layer, nn.Dropout) and not train and not resting:
                    raise ModelError(
                        f"the layer {layer.name!r} drops out where the network answers; give it "
                        "deterministic=not train and let the network's __call__ take `train`."
                    )
                if train and resting and not switched:
                    raise ModelError(
                        f"the layer {layer.name!r} does nothing where the network learns: {name} is True, and the "
                        f"network has no switch; let its __call__ take `train` and give {name}=not train."
                    )
        return run(*args, **kwargs)

    return interceptor


def nnx(make: Callable[[Any], Any]) -> Model:
    """A Flax NNX module as a `Model`.

    Args:
        make: `(rngs) -> module`, so that every `init` draws new parameters. The module is put into `train()` mode on
            what it learns from and into `eval()` mode on what it answers, and a switch of its call or of a module
            inside, as `train` or `deterministic` (see `jmeta.linen`), is set likewise; its random streams start anew
            from the key of each call. It may take a `mask` of the rows that are there. Its `nnx.Conv` computes as
            `jmeta.Conv`, as in `jmeta.linen`.

    Returns:
        The model. `params` holds the `nnx.Param` variables, `state` all the others but the random streams:
        `nnx.BatchStat` variables under `"batch_stats"`, moving averages that count as constants, and the rest under
        `"others"`, through which θ is trained.

    Raises:
        ModelError: the call needs an argument of another name.

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
    call = Call.of(type(abstract).__call__, type(abstract).__name__)
    for _, part in flax_nnx.iter_modules(abstract):
        if isinstance(part, flax_nnx.Conv) and part.conv_general_dilated is jax.lax.conv_general_dilated:
            part.conv_general_dilated = conv_where_it_fits
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
        check_scaled(inputs)
        module = flax_nnx.merge(graph, params, streams(key), *state.values())
        (module.train if train else module.eval)()
        for _, part in flax_nnx.iter_modules(module):
            for name in SWITCHES:
                if isinstance(getattr(part, name, None), bool):
                    setattr(part, name, train is SWITCHES[name])
        outputs = module(inputs, **call.options(train, mask, state))
        return outputs, averages_as_constants(split(module)[-1])

    return Model(init, apply)


def equinox(make: Callable[[Key[Array, ""]], Any]) -> Model:
    """An Equinox module as a `Model`.

    Args:
        make: `(key) -> module`, so that every `init` draws new parameters; `eqx.nn.make_with_state(Net)` for a module
            with a state, as that of batch norm. The module maps one example and is vmapped over the examples under the
            name of the axis that its batch norm has; images have their channels first there. On what it answers it is
            in `eqx.nn.inference_mode`. A `key` of each example and a switch, as `inference` or `train` (see
            `jmeta.linen`), are passed on if its call takes them.

    Returns:
        The model. `params` holds the inexact arrays of the module. The state of a module with batch norm lies under
        `"batch_stats"` and counts as a constant; that of any other, under `"others"`, does not.

    Raises:
        ModelError: the call needs an argument of another name; a layer with a state or with dropout gets none or no
            key; from `apply`, a state that differs between the examples.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp, jmeta
        >>> model = jmeta.equinox(lambda key: eqx.nn.MLP(1, 1, 40, 2, key=key))
        >>> params, state = model.init(jax.random.key(0), jnp.ones((10, 1)))
        >>> model.apply(jax.random.key(1), params, state, jnp.ones((10, 1)), train=True)[0].shape
        (10, 1)
    """
    import equinox as eqx

    def made(key: Key[Array, ""]) -> tuple[Any, Any]:
        module = make(key)
        has_state = isinstance(module, tuple) and len(module) == 2 and isinstance(module[1], eqx.nn.State)
        return module if has_state else (module, None)

    module, start = made(jax.random.key(0))
    _, static = eqx.partition(module, eqx.is_inexact_array)
    layers = jax.tree.leaves(module, is_leaf=lambda x: isinstance(x, eqx.nn.BatchNorm | eqx.nn.Dropout))
    averages = [layer for layer in layers if isinstance(layer, eqx.nn.BatchNorm)]
    call = Call.of(type(module).__call__, type(module).__name__, own=("state", "key"))
    name = type(module).__name__
    if start is None and (averages or "state" in call.needed):
        raise ModelError(f"{name} has layers with a state and no state; make it by eqx.nn.make_with_state({name}).")
    if start is not None and "state" not in call.known:
        raise ModelError(f"{name} has a state and does not take it; let its __call__ take `state` and return it last.")
    if any(isinstance(layer, eqx.nn.Dropout) for layer in layers) and "key" not in call.known:
        raise ModelError(f"{name} has dropout and gets no key; let its __call__ take `key` and pass it on.")
    names = {layer.axis_name for layer in averages}
    if len(names) > 1:
        raise ModelError(f"the batch norms of the network name different axes, {sorted(map(str, names))}; name one.")
    axis = next(iter(names)) if names else "batch"
    group, tree = "batch_stats" if averages else "others", jax.tree.structure(start)

    def stored(state: Any) -> State:
        leaves = {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(state)}
        return {group: leaves} if leaves else {}

    def init(key: Key[Array, ""], inputs: PyTree) -> tuple[Params, State]:
        module, state = made(key)
        return eqx.filter(module, eqx.is_inexact_array), stored(state)

    def apply(
        key: Key[Array, ""], params: Params, state: State, inputs: PyTree, *, train: bool, mask: Mask = None
    ) -> tuple[PyTree, State]:
        check_scaled(inputs)
        module = eqx.combine(params, static)
        module = module if train else eqx.nn.inference_mode(module)
        given = call.options(train, mask, state)
        keys = jax.random.split(key, len(jax.tree.leaves(inputs)[0]))
        own = None if start is None else jax.tree.unflatten(tree, [state[group][name] for name in stored(start)[group]])

        def one(x: PyTree, key: Key[Array, ""]) -> Any:
            passed = given | ({"key": key} if "key" in call.known else {})
            return (module(x, **passed), None) if own is None else module(x, state=own, **passed)

        try:
            outputs, after = jax.vmap(one, out_axes=(0, None), axis_name=axis)(inputs, keys)
        except ValueError as error:
            if "out_axes" not in str(error):
                raise
            raise ModelError(
                "the state of the network differs between the examples of a batch; let it take their mean by "
                f"jax.lax.pmean over the axis {axis!r}."
            ) from error
        return outputs, averages_as_constants(stored(after))

    return Model(init, apply)


def haiku(function: Callable[..., Any]) -> Model:
    """A Haiku network as a `Model`.

    Args:
        function: what `hk.transform_with_state` takes: `function(inputs)` builds the network and gives its outputs. A
            switch, as `is_training` or `train` (see `jmeta.linen`), is passed on if it has one; likewise a `mask` of
            the rows that are there.

    Returns:
        The model. The state of `hk.ExponentialMovingAverage`, of which Haiku's batch norm is made, lies under
        `"batch_stats"` and counts as a constant; the rest, under `"others"`, does not.

    Raises:
        ModelError: the function needs an argument of another name.

    Example:
        >>> import haiku as hk, jax, jax.numpy as jnp, jmeta
        >>> model = jmeta.haiku(lambda inputs: hk.nets.MLP([40, 40, 1])(inputs))
        >>> params, state = model.init(jax.random.key(0), jnp.ones((10, 1)))
        >>> model.apply(jax.random.key(1), params, state, jnp.ones((10, 1)), train=True)[0].shape
        (10, 1)
    """
    import haiku as hk

    transformed = hk.transform_with_state(function)
    call = Call.of(function, getattr(function, "__name__", "the network"), method=False)

    def grouped(state: PyTree) -> State:
        averages = {module: leaves for module, leaves in state.items() if "average" in leaves}
        others = {module: leaves for module, leaves in state.items() if module not in averages}
        return {name: part for name, part in (("batch_stats", averages), ("others", others)) if part}

    def init(key: Key[Array, ""], inputs: PyTree) -> tuple[Params, State]:
        # Haiku's batch norm makes its state in training only
        params, state = transformed.init(key, inputs, **call.options(True))
        return params, grouped(state)

    def apply(
        key: Key[Array, ""], params: Params, state: State, inputs: PyTree, *, train: bool, mask: Mask = None
    ) -> tuple[PyTree, State]:
        check_scaled(inputs)
        own = {module: leaves for part in state.values() for module, leaves in part.items()}
        outputs, own = transformed.apply(params, own, key, inputs, **call.options(train, mask, state))
        return outputs, averages_as_constants(grouped(own))

    return Model(init, apply)


def _shapes(tree: PyTree) -> Any:
    return jax.tree.structure(tree), [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]


def identity() -> Model:
    """The model that gives its inputs, flattened, as floats: for precomputed embeddings and baselines on raw pixels.

    Returns:
        The model, without parameters: `[n, ...] -> [n, features]`, integers as floats.

    Example:
        >>> import jax, jax.numpy as jnp, jmeta
        >>> jmeta.identity().apply(jax.random.key(0), {}, {}, jnp.ones((2, 4, 4, 1)), train=False)[0].shape
        (2, 16)
    """

    def apply(
        key: Key[Array, ""], params: Params, state: State, inputs: PyTree, *, train: bool, mask: Mask = None
    ) -> tuple[PyTree, State]:
        check_scaled(inputs)
        return as_floats(inputs.reshape(inputs.shape[0], -1)), state

    return Model(lambda key, inputs: ({}, {}), apply)
