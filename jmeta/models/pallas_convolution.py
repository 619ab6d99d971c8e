"""The three bilinear operations of `convolution` on NVIDIA GPUs: implicit GEMM with one kernel a pair, in Pallas.

A program of the grid holds a tile of the result in float32 and adds one small matrix product for each position of the
kernel. The rows of a product are read where the image has them, so that no patches are ever written, and padding is a
mask of the read. The gradient in the input treats each phase of the strides by itself, with the positions of the
kernel that fall on it: there are no products with the zeros between strided outputs.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array

# Powers of two, as Triton has no other tiles, and 16 at least, as its matrix products have no smaller ones.
SMALLEST, ROWS, FEATURES = 16, 64, 64
DEPTH = {"float32": 32, "bfloat16": 64}  # of the sum in one product: 128 bytes
FEW = 32  # entries of a patch, up to which a tile would mostly hold zeros
FEWEST_STEPS, PROGRAMS = 8, 512  # a long sum over rows is taken in parts where few programs would leave a GPU idle
MOST_PAIRS = 2**16 - 1  # the third axis of CUDA's grid


def apply(name: str, a: Array, b: Array, window: Any, interpret: bool, otherwise: Callable[..., Array]) -> Array:
    """One of the operations by the name of its primitive.

    Args:
        name: `"task_conv"`, `"task_conv_input_gradient"` or `"task_conv_weight_gradient"`.
        a: `[pairs, ...]`, the first operand.
        b: `[pairs, ...]`, the second operand.
        window: a `convolution.Window`.
        interpret: run it without a GPU, slowly.
        otherwise: `otherwise(a, b, window=window)` is taken where the kernels do not fit: other than two spatial axes,
            dilation, cropped inputs, float64, few channels, and nothing at all.

    Returns:
        `[pairs, ...]`, the result.
    """
    operation: Callable[..., Array]
    operation, inputs = {
        "task_conv": (_conv, a.shape[-1]),
        "task_conv_input_gradient": (_input_gradient, b.shape[-2]),
        "task_conv_weight_gradient": (_weight_gradient, a.shape[-1]),
    }[name]
    fits = (
        len(window.kernel) == 2
        and set(window.dilation) == {1}
        and min(low for low, _ in window.padding) >= 0
        and a.dtype == b.dtype
        and a.dtype.name in DEPTH
        and inputs * math.prod(window.kernel) > FEW
        and a.shape[0] <= MOST_PAIRS
        and 0 not in (*a.shape, *b.shape)
    )
    return operation(a, b, window, interpret) if fits else otherwise(a, b, window=window)


class Axis(NamedTuple):
    """How a spatial axis of the result reads that of the operand.

    With q = 0, 1, … the result at `phases · u + r` takes the operand at `step · u + sign · q + base` times the kernel
    at `phases · q + first`, where `offset + r = phases · base + first`.
    """

    result: int
    operand: int
    kernel: int
    step: int
    sign: int
    offset: int
    phases: int

    @property
    def windows(self) -> int:
        """How many u there are in a phase, at most."""
        return -(-self.result // self.phases)


def _conv(x: Array, w: Array, window: Any, interpret: bool) -> Array:
    """[B, N, *I, C], [B, *K, C, F] -> [B, N, *O, F]."""
    form = zip(window.outputs, window.inputs, window.kernel, window.strides, window.padding, strict=True)
    axes = [Axis(o, n, k, s, 1, -low, 1) for o, n, k, s, (low, _) in form]
    return _gathered(x, jnp.swapaxes(w, -1, -2), axes, window.precision, interpret)


def _input_gradient(g: Array, w: Array, window: Any, interpret: bool) -> Array:
    """[B, N, *O, F], [B, *K, C, F] -> [B, N, *I, C]."""
    form = zip(window.outputs, window.inputs, window.kernel, window.strides, window.padding, strict=True)
    axes = [Axis(n, o, k, 1, -1, low, s) for o, n, k, s, (low, _) in form]
    return _gathered(g, w, axes, window.precision, interpret)


def _weight_gradient(x: Array, g: Array, window: Any, interpret: bool) -> Array:
    """[B, N, *I, C], [B, N, *O, F] -> [B, *K, C, F]."""
    pairs, channels, features = x.shape[0], x.shape[-1], g.shape[-1]
    tiles = _tile(channels, FEATURES), _tile(features, FEATURES)
    x, g = (_tiled(_rows(a), -1, tile) for a, tile in zip((x, g), tiles, strict=True))
    taps = math.prod(window.kernel)
    programs = taps * (x.shape[-1] // tiles[0]) * (g.shape[-1] // tiles[1])
    steps = -(-g.shape[1] // DEPTH[x.dtype.name])
    parts = max(1, min(steps // FEWEST_STEPS, PROGRAMS // (pairs * programs)))
    shape = (pairs, parts, taps, x.shape[-1], g.shape[-1])
    kernel = partial(_weight_gradient_kernel, window=window, tiles=tiles, steps=-(-steps // parts))
    sums = _call(kernel, (programs, parts, pairs), shape, jnp.dtype("float32"), x, g, interpret=interpret)
    w = sums.sum(1)[:, :, :channels, :features].astype(x.dtype)
    return w.reshape(pairs, *window.kernel, channels, features)


def _gathered(x: Array, w: Array, axes: Sequence[Axis], precision: Any, interpret: bool) -> Array:
    """[B, N, *operand, C], [B, *kernel, F, C] -> [B, N, *result, F]."""
    pairs, images, channels, features = *x.shape[:2], x.shape[-1], w.shape[-2]
    tiles = _tile(features, FEATURES), _tile(channels, DEPTH[x.dtype.name])
    x, w = _tiled(_rows(x), -1, tiles[1]), w.reshape(pairs, -1, features, channels)
    w = _tiled(_tiled(w, -2, tiles[0]), -1, tiles[1])
    windows = images * math.prod(axis.windows for axis in axes)
    rows = _tile(windows, ROWS)
    phases = math.prod(axis.phases for axis in axes)
    grid = (-(-windows // rows), phases * (w.shape[-2] // tiles[0]), pairs)
    shape = (pairs, images * math.prod(axis.result for axis in axes), w.shape[-2])
    kernel = partial(_gathered_kernel, axes=axes, images=images, tiles=(rows, *tiles), precision=precision)
    y = _call(kernel, grid, shape, x.dtype, x, w, interpret=interpret)
    return y[..., :features].reshape(pairs, images, *(axis.result for axis in axes), features)


def _gathered_kernel(
    x: Any, w: Any, y: Any, *, axes: Sequence[Axis], images: int, tiles: tuple[int, int, int], precision: Any
) -> None:
    rows, features, depth = tiles
    phase, feature = _divmod(pl.program_id(1), w.shape[-2] // features)
    phase = _divmod(phase, axes[1].phases)
    image, *u = _position(pl.program_id(0) * rows + _range(rows), [axis.windows for axis in axes])
    base, first = zip(
        *(_divmod(r + axis.offset, axis.phases) for r, axis in zip(phase, axes, strict=True)), strict=True
    )
    taps = [_divmod(a.kernel - f + a.phases - 1, a.phases)[0] for a, f in zip(axes, first, strict=True)]
    out = [axis.phases * i + r for axis, i, r in zip(axes, u, phase, strict=True)]
    wanted = (image < images) & (out[0] < axes[0].result) & (out[1] < axes[1].result)

    def add(i: Array, total: Array) -> Array:
        tap, block = _divmod(i, x.shape[-1] // depth)
        q = _divmod(tap, taps[1])
        at = [a.step * o + (a.sign * j + b) for a, o, j, b in zip(axes, u, q, base, strict=True)]
        k = [a.phases * j + f for a, j, f in zip(axes, q, first, strict=True)]
        taken = _read(x, wanted, image, at, [axis.operand for axis in axes], block * depth + _range(depth))
        factor = w[k[0] * axes[1].kernel + k[1], pl.ds(feature * features, features), pl.ds(block * depth, depth)]
        return total + _product(taken, factor, 1, precision)

    start = jnp.zeros((rows, features), jnp.float32)
    total = lax.fori_loop(jnp.int32(0), taps[0] * taps[1] * (x.shape[-1] // depth), add, start)
    row = (image * axes[0].result + out[0]) * axes[1].result + out[1]
    row = jnp.where(wanted, row, jnp.full_like(row, y.shape[0]))  # to no row at all where it is interpreted
    column = feature * features + _range(features)
    triton.store(y.at[row[:, None], column[None]], total.astype(y.dtype), mask=wanted[:, None])


def _weight_gradient_kernel(x: Any, g: Any, w: Any, *, window: Any, tiles: tuple[int, int], steps: int) -> None:
    depth = DEPTH[x.dtype.name]
    tap, tile = _divmod(pl.program_id(0), w.shape[-2] // tiles[0] * (w.shape[-1] // tiles[1]))
    channel, feature = _divmod(tile, w.shape[-1] // tiles[1])
    q = _divmod(tap, window.kernel[1])
    part = pl.program_id(1)

    def add(i: Array, total: Array) -> Array:
        row = (part * steps + i) * depth + _range(depth)
        image, *o = _position(row, window.outputs)
        at = [s * i + (j - low) for s, i, j, (low, _) in zip(window.strides, o, q, window.padding, strict=True)]
        there = row < g.shape[0]
        taken = _read(x, there, image, at, window.inputs, channel * tiles[0] + _range(tiles[0]))
        column = feature * tiles[1] + _range(tiles[1])
        factor = _load(g, row, column, there)
        return total + _product(taken, factor, 0, window.precision)

    total = lax.fori_loop(jnp.int32(0), jnp.int32(steps), add, jnp.zeros(tiles, jnp.float32))
    place = pl.ds(channel * tiles[0], tiles[0]), pl.ds(feature * tiles[1], tiles[1])
    w[part, tap, *place] = total


def _read(x: Any, wanted: Array, image: Array, at: Sequence[Array], sizes: Sequence[int], column: Array) -> Array:
    """Rows of pixels of x; zeros outside of the image."""
    inside = wanted & (at[0] >= 0) & (at[0] < sizes[0]) & (at[1] >= 0) & (at[1] < sizes[1])
    return _load(x, (image * sizes[0] + at[0]) * sizes[1] + at[1], column, inside)


def _load(x: Any, row: Array, column: Array, mask: Array) -> Array:
    return triton.load(x.at[row[:, None], column[None]], mask=mask[:, None], other=jnp.zeros((), x.dtype))


def _product(a: Array, b: Array, over: int, precision: Any) -> Array:
    dimensions = (((over,), (over,)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _range(size: int) -> Array:
    return lax.iota(jnp.int32, size)


def _divmod(a: Any, b: Any) -> tuple[Any, Any]:
    """Of numbers that are not negative, unless b is 1; Triton has no other division."""
    if isinstance(b, int) and b == 1:
        return a, jnp.zeros_like(a)
    quotient = lax.div(a, jnp.full_like(a, b) if isinstance(b, int) else b)
    return quotient, a - quotient * b


def _position(row: Array, sizes: Sequence[int]) -> tuple[Array, Array, Array]:
    """Image and both spatial indices of a row."""
    rest, j = _divmod(row, sizes[1])
    image, i = _divmod(rest, sizes[0])
    return image, i, j


def _tile(size: int, most: int) -> int:
    return min(most, max(SMALLEST, 1 << (size - 1).bit_length()))


def _rows(x: Array) -> Array:
    """[B, N, *S, C] -> [B, N * S, C]."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


def _tiled(x: Array, axis: int, tile: int) -> Array:
    """Zeros up to a whole number of tiles."""
    missing = -x.shape[axis] % tile
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, missing)
    return jnp.pad(x, pad) if missing else x


def _call(
    kernel: Callable[..., None],
    grid: tuple[int, int, int],
    shape: tuple[int, ...],
    dtype: Any,
    *operands: Array,
    interpret: bool,
) -> Array:
    """The last axis of the grid is the pair; a program sees the whole of it, and reads and writes parts."""

    def whole(shape: tuple[int, ...]) -> pl.BlockSpec:
        return pl.BlockSpec((None, *shape[1:]), lambda _, __, pair: (pair, *(0 for _ in shape[1:])))

    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[whole(a.shape) for a in operands],
        out_specs=whole(shape),
        out_shape=jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(operands[0]).manual_axis_type),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
    )(*operands)
