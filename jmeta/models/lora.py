"""Low-rank changes of a network's kernels, so that an inner loop adapts few numbers (Hu et al. 2022)."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Key, PyTree

from jmeta.core import Model, Params, State, check_model
from jmeta.errors import ConfigError, ModelError

_MERGED = "lora"  # also the name of the entry that holds the factors


def is_kernel(path: str) -> bool:
    """Whether a leaf is called `kernel`, as those of dense, attention and convolution layers of Linen and NNX are."""
    return path.split("/")[-1] == "kernel"


def lora(
    model: Model, rank: int = 4, *, alpha: float | None = None, kernels: Callable[[str], bool] = is_kernel
) -> Model:
    """A network whose kernels are W + (α/r) A B, with factors A and B of rank r beside each kernel W in θ.

    B starts at zero, so that the network starts as it was. `adaptable=jmeta.tree.under("lora")` lets an inner loop
    change the factors alone; W is trained by the outer loop, or by none, as a mask of optax says. Each kernel counts as
    a matrix: `[inputs, outputs]` of a dense layer, `[height · width · inputs, outputs]` of a convolution; of three axes
    where the factors are smallest, so that those of attention are `[inputs, heads · features]` and back.

    W + (α/r) A B is made where it is used, once in the forward and once in the backward pass, and not kept between;
    under `vmap` over tasks, whose kernels then differ, convolutions are those of `jmeta.Conv`.

    Args:
        model: any `Model` whose parameters are nested dictionaries: of `jmeta.linen`, `jmeta.nnx` and `jmeta.haiku`;
            `jmeta.pretrained(model, params, state)` starts at the weights of a file.
        rank: r.
        alpha: α; default r.
        kernels: a predicate on the path of a leaf (`"Dense_0/kernel"`), which kernels have factors.

    Returns:
        The network. Beside `{"kernel": W}` its parameters hold `{"lora": {"kernel": {"a": A, "b": B}}}`.

    Raises:
        ConfigError: `rank` below 1.
        ModelError: `model` is no `Model`; from `init`: no kernel is chosen, one that is no matrix, or one that is too
            small to have a change of that rank.

    Example:
        >>> import jax, jax.numpy as jnp, jmeta
        >>> model = jmeta.lora(jmeta.linen(jmeta.MLP(outputs=5, hidden=(64,))), rank=2)
        >>> learner = jmeta.maml(model, adaptable=jmeta.tree.under("lora"))
        >>> params, _ = model.init(jax.random.key(0), jnp.ones((1, 16)))
        >>> params["Dense_0"]["lora"]["kernel"]["a"].shape, params["Dense_0"]["lora"]["kernel"]["b"].shape
        ((16, 2), (2, 64))

    Reference: Hu et al. 2022, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1.

    Differences from the paper: A is drawn with the variance of a kernel, one over its inputs; all kernels have factors,
    and not those of attention alone; kernels with more than two axes have some as well.
    """
    check_model(model)
    if rank < 1:
        raise ConfigError(f"rank is {rank}; give at least 1.")
    scale = (rank if alpha is None else alpha) / rank

    def init(key: Key[Array, ""], inputs: PyTree) -> tuple[Params, State]:
        params, state = model.init(key, inputs)
        paths = _kernels(params, kernels)
        if not paths:
            raise ModelError("no leaf of the network is a kernel; let `kernels` choose some by their path.")
        keys = dict(zip(paths, jax.random.split(jax.random.fold_in(key, 1), len(paths)), strict=True))
        return _with_factors(params, keys, rank), state

    def apply(
        key: Key[Array, ""], params: Params, state: State, inputs: PyTree, *, train: bool, **mask: Any
    ) -> tuple[PyTree, State]:
        @partial(jax.checkpoint, policy=jax.checkpoint_policies.save_anything_except_these_names(_MERGED))
        def run(params: Params, state: State, inputs: PyTree) -> tuple[PyTree, State]:
            return model.apply(key, _merged(params, scale), state, inputs, train=train, **mask)

        return run(params, state, inputs)

    return Model(init, apply)


def _kernels(params: Params, chosen: Callable[[str], bool], path: str = "") -> list[str]:
    """The paths of the chosen leaves of nested dictionaries."""
    if not isinstance(params, Mapping):
        return [path] if chosen(path) else []
    if _MERGED in params:
        raise ModelError(f"the network has a part called {_MERGED!r} at {path or 'its root'}; give it another name.")
    return [
        found
        for name, part in params.items()
        for found in _kernels(part, chosen, f"{path}/{name}" if path else str(name))
    ]


def _with_factors(params: Params, keys: Mapping[str, Key[Array, ""]], rank: int, path: str = "") -> Params:
    if not isinstance(params, Mapping):
        return params
    below = {name: f"{path}/{name}" if path else str(name) for name in params}
    parts = {name: _with_factors(part, keys, rank, below[name]) for name, part in params.items()}
    own = {name: _factors(keys[at], at, params[name], rank) for name, at in below.items() if at in keys}
    return {**parts, _MERGED: own} if own else parts


def _factors(key: Key[Array, ""], path: str, kernel: Float[Array, "..."], rank: int) -> dict[str, Array]:
    """A and B of one kernel."""
    shape = kernel.shape
    if len(shape) < 2:
        raise ModelError(f"the leaf {path} has shape {list(shape)}, which is no matrix; let `kernels` leave it away.")
    # a convolution's outputs are its last axis; of three axes, those of attention's heads may be inputs or outputs
    splits = range(1, len(shape)) if len(shape) < 4 else [len(shape) - 1]
    split = min(splits, key=lambda i: math.prod(shape[:i]) + math.prod(shape[i:]))
    rows, columns = math.prod(shape[:split]), math.prod(shape[split:])
    if rank > min(rows, columns):
        raise ModelError(
            f"the rank {rank} is above that of {path}, a matrix of {rows} x {columns}; give at most "
            f"{min(rows, columns)}, or let `kernels` leave it away."
        )
    a = jax.random.normal(key, (*shape[:split], rank), kernel.dtype) * rows**-0.5
    return {"a": a, "b": jnp.zeros((rank, *shape[split:]), kernel.dtype)}


def _merged(params: Params, scale: float) -> Params:
    """The parameters of the network itself, W + (α/r) A B in place of W."""
    if not isinstance(params, Mapping):
        return params
    parts = {name: _merged(part, scale) for name, part in params.items() if name != _MERGED}
    for name, factors in params.get(_MERGED, {}).items():
        change = scale * jnp.tensordot(factors["a"], factors["b"], 1)
        parts[name] = checkpoint_name(parts[name] + change.astype(parts[name].dtype), _MERGED)
    return parts
