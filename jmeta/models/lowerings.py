"""A convolution of each task's own kernel and its two gradients, in the forms that the backends are fast at.

Each over a leading axis of pairs: as canonical convolutions, one pair after the other, and as one batched product.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax


class Window(NamedTuple):
    """The static side of a convolution over S spatial axes.

    Args:
        inputs: spatial size of x.
        kernel: spatial size of w.
        strides: step of the window.
        padding: `(low, high)` of each axis.
        dilation: spacing of the kernel's entries.
        precision: as in `jax.lax.Precision`; None is the backend's default.
        lowering: `"loop"`, `"patches"` or `"pallas"`; None is the backend's default.
    """

    inputs: tuple[int, ...]
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    precision: Any = None
    lowering: str | None = None

    @property
    def outputs(self) -> tuple[int, ...]:
        """Spatial size of conv(x, w)."""
        return tuple(
            max(0, (n + lo + hi - (k - 1) * d - 1) // s + 1) for n, k, s, (lo, hi), d in zip(*self[:5], strict=True)
        )

    @property
    def input_gradient_padding(self) -> tuple[tuple[int, int], ...]:
        """Padding that makes the dilated output, convolved with the flipped kernel, as large as the input."""
        return tuple(
            ((k - 1) * d - lo, n - (o - 1) * s - 1 + lo)
            for (n, k, s, (lo, _), d), o in zip(zip(*self[:5], strict=True), self.outputs, strict=True)
        )

    @property
    def weight_gradient_padding(self) -> tuple[tuple[int, int], ...]:
        """Padding that makes the input, convolved with the dilated output, as large as the kernel."""
        return tuple(
            (lo, (k - 1) * d + (o - 1) * s + 1 - n - lo)
            for (n, k, s, (lo, _), d), o in zip(zip(*self[:5], strict=True), self.outputs, strict=True)
        )


Sizes = Sequence[int]
Padding = Sequence[tuple[int, int]]


def _canonical(
    x: Array, w: Array, strides: Sizes, padding: Padding, x_dilation: Sizes, w_dilation: Sizes, precision: Any
) -> Array:
    if math.prod(x.shape[1:-1]) < math.prod(w.shape[:-2]):
        # XLA would exchange an input with a kernel that is larger, and the exchanged convolution runs in a scalar loop.
        patches = _patches(x[None], w.shape[:-2], strides, padding, x_dilation, w_dilation)[0]
        return jnp.matmul(patches, w.reshape(-1, w.shape[-1]), precision=precision)
    space = "HWD"[: len(strides)]
    layout = (f"N{space}C", f"{space}IO", f"N{space}C")
    return lax.conv_general_dilated(x, w, strides, padding, x_dilation, w_dilation, layout, precision=precision)


def _patches(x: Array, kernel: Sizes, strides: Sizes, padding: Padding, x_dilation: Sizes, w_dilation: Sizes) -> Array:
    """[B, N, *S, C] -> [B, N, *O, kernel * C]: strided slices of the padded input, kernel position first."""
    interior = [(lo, hi, d - 1) for (lo, hi), d in zip(padding, x_dilation, strict=True)]
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), (0, 0, 0), *interior, (0, 0, 0)])
    sizes = [
        (n - (k - 1) * d - 1) // s + 1 for n, k, s, d in zip(x.shape[2:-1], kernel, strides, w_dilation, strict=True)
    ]

    def window(position: tuple[int, ...]) -> Array:
        start = [p * d for p, d in zip(position, w_dilation, strict=True)]
        limit = [a + (o - 1) * s + 1 for a, o, s in zip(start, sizes, strides, strict=True)]
        return lax.slice(x, (0, 0, *start, 0), (*x.shape[:2], *limit, x.shape[-1]), (1, 1, *strides, 1))

    return jnp.concatenate([window(position) for position in np.ndindex(*kernel)], axis=-1)


def ones(axes: Sequence[int]) -> tuple[int, ...]:
    """1 for each axis."""
    return (1,) * len(axes)


def _flipped(w: Array) -> Array:
    """[B, *K, C, F] -> [B, *K, F, C] with the spatial axes reversed."""
    return jnp.swapaxes(lax.rev(w, tuple(range(1, w.ndim - 2))), -1, -2)


def _spatial(x: Array) -> tuple[int, ...]:
    return tuple(range(1, x.ndim - 1))


def _over_pairs(function: Any, a: Array, b: Array) -> Array:
    """Applies a function of one pair to each in turn; a single pair needs no loop."""
    if a.shape[0] == 1:
        return function(a[0], b[0])[None]
    return lax.map(lambda pair: function(*pair), (a, b))


BLOCK_BYTES, BLOCKS = 2**20, 16


def _blocks(x: Array, g: Array) -> int:
    """In how many blocks of examples a weight gradient is summed up, so that each fits the cache.

    Its operands are transposed, examples last; a sum over more of them than fit takes far longer.
    """
    if not all(isinstance(n, int) for n in (*x.shape, *g.shape)):  # in an exported program, for any number
        return 1
    size = max(math.prod(a.shape) for a in (x, g)) * x.dtype.itemsize
    return max(1, min(BLOCKS, x.shape[0], math.ceil(size / BLOCK_BYTES)))


def conv_loop(x: Array, w: Array, *, window: Window) -> Array:
    """conv(x, w), one pair after the other."""
    one = ones(window.kernel)
    return _over_pairs(
        lambda x, w: _canonical(x, w, window.strides, window.padding, one, window.dilation, window.precision), x, w
    )


def conv_matmul(x: Array, w: Array, *, window: Window) -> Array:
    """conv(x, w) as a product of patches."""
    patches = _patches(x, window.kernel, window.strides, window.padding, ones(window.kernel), window.dilation)
    return jnp.einsum("b...k,bkf->b...f", patches, w.reshape(w.shape[0], -1, w.shape[-1]), precision=window.precision)


def input_gradient_loop(g: Array, w: Array, *, window: Window) -> Array:
    """The gradient in the input, one pair after the other."""
    one = ones(window.kernel)
    return _over_pairs(
        lambda g, w: _canonical(
            g, w, one, window.input_gradient_padding, window.strides, window.dilation, window.precision
        ),
        g,
        _flipped(w),
    )


def input_gradient_matmul(g: Array, w: Array, *, window: Window) -> Array:
    """The gradient in the input as a product of patches."""
    patches = _patches(
        g, window.kernel, ones(window.kernel), window.input_gradient_padding, window.strides, window.dilation
    )
    return jnp.einsum(
        "b...k,bkc->b...c", patches, _flipped(w).reshape(w.shape[0], -1, w.shape[-2]), precision=window.precision
    )


def weight_gradient_loop(x: Array, g: Array, *, window: Window) -> Array:
    """The gradient in the kernel, one pair after the other, in blocks of examples."""
    one = ones(window.kernel)

    def block(x: Array, g: Array) -> Array:
        space = _spatial(x)
        x, g = x.transpose(x.ndim - 1, *space, 0), g.transpose(*space, 0, g.ndim - 1)
        w = _canonical(x, g, window.dilation, window.weight_gradient_padding, one, window.strides, window.precision)
        return w.transpose(*space, 0, w.ndim - 1)

    def pair(x: Array, g: Array) -> Array:
        n = _blocks(x, g)
        if n == 1:
            return block(x, g)
        ends = [i * x.shape[0] // n for i in range(n + 1)]
        parts = [block(x[i:j], g[i:j]) for i, j in pairwise(ends)]
        return sum(parts[1:], start=parts[0])

    return _over_pairs(pair, x, g)


def weight_gradient_matmul(x: Array, g: Array, *, window: Window) -> Array:
    """The gradient in the kernel as a product of patches."""
    patches = _patches(x, window.kernel, window.strides, window.padding, ones(window.kernel), window.dilation)
    flat = patches.reshape(x.shape[0], -1, patches.shape[-1])
    w = jnp.einsum("bpk,bpf->bkf", flat, g.reshape(g.shape[0], -1, g.shape[-1]), precision=window.precision)
    return w.reshape(x.shape[0], *window.kernel, x.shape[-1], g.shape[-1])


def conv_shape(x: Any, w: Any, window: Window) -> tuple[Any, ...]:
    """Of conv(x, w)."""
    return (*x.shape[:2], *window.outputs, w.shape[-1])


def input_gradient_shape(g: Any, w: Any, window: Window) -> tuple[Any, ...]:
    """Of x."""
    return (*g.shape[:2], *window.inputs, w.shape[-2])


def weight_gradient_shape(x: Any, g: Any, window: Window) -> tuple[Any, ...]:
    """Of w."""
    return (x.shape[0], *window.kernel, x.shape[-1], g.shape[-1])
