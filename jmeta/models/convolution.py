"""The convolution as one bilinear operation that stays fast under any nesting of grad, jvp, vmap and scan.

With ⟨g, conv(x, w)⟩ the trilinear form behind all three, the derivatives of

    conv(x, w),  input_gradient(g, w),  weight_gradient(x, g)

in either argument are again one of the three, to every order. Each is a JAX primitive over a leading axis of
independent pairs (the tasks), lowered to the form that the backend runs fast:

* CPU: one convolution after the other, in the canonical layout (NHWC input, HWIO kernel), which alone is fast there.
  What JAX derives from `lax.conv_general_dilated` under `vmap` over kernels is a grouped convolution, whose second
  derivatives are 10 to 100 times slower.
* elsewhere: patches and one batched matmul;
* on request, on NVIDIA GPUs: the kernels of `pallas_convolution`, which write no patches.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

from jmeta.models.lowerings import (
    Window,
    conv_loop,
    conv_matmul,
    conv_shape,
    input_gradient_loop,
    input_gradient_matmul,
    input_gradient_shape,
    ones,
    weight_gradient_loop,
    weight_gradient_matmul,
    weight_gradient_shape,
)

LOWERINGS = ("loop", "patches", "pallas")


def _bilinear(
    name: str, shape: Any, loop: Any, matmul: Any, free_axes: tuple[tuple[int, int], tuple[int, int]]
) -> Primitive:
    """A primitive over [pairs, ...] operands.

    `free_axes` holds, for either operand, an axis that passes unchanged into an axis of the result: a batch of one
    operand alone is folded into it, a batch of both is folded into the pairs.
    """
    primitive = Primitive(name)
    # `update` keeps what else belongs to the type, such as the axes of a `shard_map` over which it varies.
    primitive.def_abstract_eval(lambda a, b, *, window: a.update(shape=shape(a, b, window), weak_type=False))
    primitive.def_impl(jax.jit(lambda a, b, *, window: primitive.bind(a, b, window=window), static_argnames="window"))

    def lowered(a: Array, b: Array, *, window: Window, default: str, interpret: bool | None) -> Array:
        how = window.lowering or default
        if how == "pallas" and interpret is not None:
            from .pallas_convolution import apply

            return apply(name, a, b, window, interpret, otherwise=matmul)
        return (loop if how == "loop" else matmul)(a, b, window=window)

    for platform, default, interpret in ((None, "patches", None), ("cuda", "patches", False), ("cpu", "loop", True)):
        rule = mlir.lower_fun(partial(lowered, default=default, interpret=interpret), multiple_results=False)
        mlir.register_lowering(primitive, rule, platform=platform)

    def batch(operands: Sequence[Array], axes: Sequence[Any], *, window: Window) -> tuple[Array, int]:
        mapped = [axis is not None for axis in axes]
        into = ((0, 0), (0, 0)) if all(mapped) else free_axes
        size = next(x.shape[axis] for x, axis in zip(operands, axes, strict=True) if axis is not None)
        a, b = (
            _fold(x, axis, target % (x.ndim - 1)) if is_mapped else x
            for x, axis, is_mapped, (target, _) in zip(operands, axes, mapped, into, strict=True)
        )
        result = primitive.bind(a, b, window=window)
        target = into[mapped.index(True)][1] % result.ndim
        return result.reshape(*result.shape[:target], size, -1, *result.shape[target + 1 :]), target

    batching.primitive_batchers[primitive] = batch
    return primitive


def _fold(x: Array, axis: int, target: int) -> Array:
    x = jnp.moveaxis(x, axis, target)
    return x.reshape(*x.shape[:target], -1, *x.shape[target + 2 :])


conv_p = _bilinear("task_conv", conv_shape, conv_loop, conv_matmul, ((1, 1), (-1, -1)))
input_gradient_p = _bilinear(
    "task_conv_input_gradient", input_gradient_shape, input_gradient_loop, input_gradient_matmul, ((1, 1), (-2, -1))
)
weight_gradient_p = _bilinear(
    "task_conv_weight_gradient",
    weight_gradient_shape,
    weight_gradient_loop,
    weight_gradient_matmul,
    ((-1, -2), (-1, -1)),
)

ad.defbilinear(
    conv_p,
    lambda ȳ, x, w, *, window: input_gradient_p.bind(ȳ, w, window=window),
    lambda ȳ, x, w, *, window: weight_gradient_p.bind(x, ȳ, window=window),
)
ad.defbilinear(
    input_gradient_p,
    lambda ū, g, w, *, window: conv_p.bind(ū, w, window=window),
    lambda ū, g, w, *, window: weight_gradient_p.bind(ū, g, window=window),
)
ad.defbilinear(
    weight_gradient_p,
    lambda v̄, x, g, *, window: input_gradient_p.bind(g, v̄, window=window),
    lambda v̄, x, g, *, window: conv_p.bind(x, v̄, window=window),
)


def conv_general_dilated(
    lhs: Float[Array, "n ... inputs"],
    rhs: Float[Array, "... inputs_per_group features"],
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    precision: Any = None,
    lowering: str | None = None,
) -> Float[Array, "n ... features"]:
    """`jax.lax.conv_general_dilated` in the layout NHWC, HWIO, NHWC, fast under vmap over kernels and to any order.

    y[n, o, f] = Σₖ Σ_c x[n, o · stride + k · dilation − low, c] w[k, c, f].

    Args:
        lhs: `[n, *space, inputs]`, x.
        rhs: `[*kernel, inputs // groups, features]`, w.
        window_strides: one a spatial axis.
        padding: `"SAME"`, `"VALID"`, or `(low, high)` of each spatial axis.
        lhs_dilation: spacing of the input's entries; default 1.
        rhs_dilation: spacing of the kernel's entries; default 1.
        dimension_numbers: None, or the layout NHWC, HWIO, NHWC; taken so that the signature is that of `jax.lax`.
        feature_group_count: groups of channels that do not see each other.
        precision: as in `jax.lax.Precision`.
        lowering: `"loop"`, `"patches"` or `"pallas"` (kernels for NVIDIA GPUs, interpreted on a CPU and patches where
            they do not fit); default by the backend. The derivatives inherit it.

    Returns:
        `[n, *out, features]`.

    Raises:
        ValueError: another layout, a kernel larger than the padded input, or an unknown lowering.

    Example:
        >>> import jax.numpy as jnp
        >>> from jmeta.models.convolution import conv_general_dilated
        >>> conv_general_dilated(jnp.ones((2, 28, 28, 1)), jnp.ones((3, 3, 1, 8)), (2, 2), "SAME").shape
        (2, 14, 14, 8)
    """
    rank = lhs.ndim - 2
    space = tuple(range(1, rank + 1))
    layout = lax.ConvDimensionNumbers((0, rank + 1, *space), (rank + 1, rank, *range(rank)), (0, rank + 1, *space))
    if dimension_numbers is not None and lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers) != layout:
        raise ValueError("the convolution takes the layout NHWC, HWIO, NHWC; transpose the operands.")
    if lowering not in (None, *LOWERINGS):
        raise ValueError(f"there is no lowering {lowering!r}; take one of {', '.join(LOWERINGS)}.")
    if lhs_dilation is not None:
        interior = [(0, 0, d - 1) for d in lhs_dilation]
        lhs = lax.pad(lhs, jnp.zeros((), lhs.dtype), [(0, 0, 0), *interior, (0, 0, 0)])
    inputs, kernel, strides = lhs.shape[1:-1], rhs.shape[:-2], tuple(window_strides)
    dilation = tuple(rhs_dilation) if rhs_dilation is not None else ones(strides)
    if isinstance(padding, str):
        spread = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
        padding = lax.padtype_to_pads(inputs, spread, strides, padding)
    pads = tuple((int(low), int(high)) for low, high in padding)
    window = Window(tuple(inputs), tuple(kernel), strides, pads, dilation, precision, lowering)
    if 0 in window.outputs:
        raise ValueError(f"the kernel {list(kernel)} does not fit into the padded input; inputs are {list(inputs)}.")
    # Groups are independent pairs of an input and a kernel, as tasks are.
    groups = feature_group_count
    x, w = (jnp.moveaxis(a.reshape(*a.shape[:-1], groups, a.shape[-1] // groups), -2, 0) for a in (lhs, rhs))
    y = jnp.moveaxis(conv_p.bind(*_varying_together(x, w), window=window), 0, -2)
    return y.reshape(*y.shape[:-2], rhs.shape[-1])


def conv_where_it_fits(
    lhs: Array,
    rhs: Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    precision: Any = None,
    **others: Any,
) -> Array:
    """`conv_general_dilated` for the layers of other libraries, and that of `jax.lax` for forms that it does not take.

    Those are other layouts, four or more spatial axes, numbers that are not real, a kernel larger than the padded
    input, and arguments of `jax.lax` that it does not know (`preferred_element_type`, `out_sharding`).

    Args:
        lhs: x.
        rhs: w.
        window_strides: as in `jax.lax`, like all the others.
        padding: see there.
        lhs_dilation: see there.
        rhs_dilation: see there.
        dimension_numbers: see there.
        feature_group_count: see there.
        precision: see there.
        others: see there.

    Returns:
        As `jax.lax.conv_general_dilated`.
    """
    form = (window_strides, padding, lhs_dilation, rhs_dilation, dimension_numbers, feature_group_count)
    others = {name: value for name, value in others.items() if value is not None}
    real = all(jnp.issubdtype(x.dtype, jnp.floating) for x in (lhs, rhs))
    if not others and real and lhs.dtype == rhs.dtype and lhs.ndim <= 5:
        try:
            return conv_general_dilated(lhs, rhs, *form, precision=precision)
        except ValueError:  # another layout, or a kernel larger than the input
            pass
    return lax.conv_general_dilated(lhs, rhs, *form, precision=precision, **others)


def _varying_together(x: Array, w: Array) -> tuple[Array, ...]:
    """Marks both as varying over the same axes of a `shard_map`, which sums the gradient of what did not vary."""
    axes = [jax.typeof(a).manual_axis_type.varying for a in (x, w)]
    missing = [tuple((axes[0] | axes[1]) - own) for own in axes]
    return tuple(lax.pcast(a, m, to="varying") if m else a for a, m in zip((x, w), missing, strict=True))


@no_type_check  # nn.Conv's own annotations are not runtime checkable
class Conv(nn.Conv):
    """`flax.linen.Conv` with the same arguments and parameters, fast when every task has its own kernel.

    Example:
        >>> import jax, jax.numpy as jnp, jmeta
        >>> layer = jmeta.Conv(features=8, kernel_size=(3, 3), strides=2)
        >>> layer.init_with_output(jax.random.key(0), jnp.ones((2, 28, 28, 1)))[0].shape
        (2, 14, 14, 8)
    """

    conv_general_dilated: Any = conv_general_dilated
