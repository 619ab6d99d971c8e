"""Low-rank changes of a network's kernels, so that an inner loop adapts few numbers (Hu et al. 2022)."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal
from jaxtyping import Array, Float, Key, PyTree

from jmeta.core import Model, Params, State, check_model
from jmeta.errors import ConfigError, ModelError
from jmeta.models.convolution import conv_p

_NAME = "lora"  # of the entry that holds the factors


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

    Where a dense layer or a convolution applies the kernel to x, it computes x W + (α/r) (x A) B, so that nothing of
    the size of W belongs to a task: under `vmap` over tasks W is one, and the convolutions with A are those of
    `jmeta.Conv`. Whatever else a network does with a kernel it does with W + (α/r) A B.

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
        def run(params: Params) -> tuple[PyTree, State]:
            return model.apply(key, params, state, inputs, train=train, **mask)

        kernels = _with_kernels(params, scale)
        leaves, tree = jax.tree.flatten(kernels, is_leaf=lambda x: isinstance(x, _Kernel))
        plain = jax.tree.unflatten(tree, [x.w if isinstance(x, _Kernel) else x for x in leaves])
        program, shapes = jax.make_jaxpr(run, return_shape=True)(plain)
        return jax.tree.unflatten(jax.tree.structure(shapes), _computed(program.jaxpr, program.consts, leaves))

    return Model(init, apply)


def _kernels(params: Params, chosen: Callable[[str], bool], path: str = "") -> list[str]:
    """The paths of the chosen leaves of nested dictionaries."""
    if not isinstance(params, Mapping):
        return [path] if chosen(path) else []
    if _NAME in params:
        raise ModelError(f"the network has a part called {_NAME!r} at {path or 'its root'}; give it another name.")
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
    return {**parts, _NAME: own} if own else parts


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


class _Kernel(NamedTuple):
    """W + A B, of which the axes of B that are not its first are the last of W."""

    w: Array
    a: Array
    b: Array


def _with_kernels(params: Params, scale: float) -> Params:
    """The parameters of the network itself, in which a kernel with factors is a `_Kernel`."""
    if not isinstance(params, Mapping):
        return params
    parts = {name: _with_kernels(part, scale) for name, part in params.items() if name != _NAME}
    for name, factors in params.get(_NAME, {}).items():
        parts[name] = _Kernel(parts[name], factors["a"], scale * factors["b"])
    return parts


def _whole(x: Any) -> Any:
    return x.w + jnp.tensordot(x.a, x.b, 1) if isinstance(x, _Kernel) else x


def _computed(program: Any, constants: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
    """The outputs of a program of JAX, some of whose arguments are kernels."""
    values = dict(zip([*program.constvars, *program.invars], [*constants, *arguments], strict=True))
    for step in program.eqns:
        operands = [x.val if isinstance(x, Literal) else values[x] for x in step.invars]
        results = _of_factors(step, operands) if any(isinstance(x, _Kernel) for x in operands) else None
        if results is None:
            bound = step.primitive.get_bind_params(step.params)
            functions, options = bound if isinstance(bound, tuple) else ((), bound)  # by the version of JAX
            results = step.primitive.bind(*functions, *map(_whole, operands), **options)
            results = results if step.primitive.multiple_results else [results]
        values |= zip(step.outvars, results, strict=True)
    return [_whole(x.val if isinstance(x, Literal) else values[x]) for x in program.outvars]


def _of_factors(step: Any, operands: Sequence[Any]) -> list[Any] | None:
    """What an operation makes of W, A and B, each by itself; None where it needs W + A B."""
    name, kernel = step.primitive.name, operands[-1]
    if name in ("pjit", "jit"):
        return _computed(step.params["jaxpr"].jaxpr, step.params["jaxpr"].consts, operands)
    if not isinstance(kernel, _Kernel) or any(isinstance(x, _Kernel) for x in operands[:-1]):
        return None
    own = kernel.b.ndim - 1  # so many axes of W are those of B
    leading = kernel.w.ndim - own

    def applied(w: Array, **options: Any) -> Array:
        return step.primitive.bind(*operands[:-1], w, **{**step.params, **options})

    if name == "convert_element_type":
        return [_Kernel(*map(applied, kernel))]
    if name == "reshape" and step.params["new_sizes"][-own:] == kernel.w.shape[-own:]:
        shape = (*step.params["new_sizes"][:-own], kernel.a.shape[-1])
        return [_Kernel(applied(kernel.w), kernel.a.reshape(shape), kernel.b)]
    if name == "transpose" and step.params["permutation"][-own:] == tuple(range(leading, kernel.w.ndim)):
        order = (*step.params["permutation"][:-own], leading)
        return [_Kernel(applied(kernel.w), kernel.a.transpose(order), kernel.b)]
    if name == "dot_general":
        (_, summed), (_, paired) = step.params["dimension_numbers"]
        if paired or sorted(summed) != list(range(leading)):
            return None
    elif name != conv_p.name or own != 1:
        return None
    return [applied(kernel.w) + jnp.tensordot(applied(kernel.a), kernel.b, 1)]
