"""The convolution of each channel by itself, as shifted products that stay fast when each task has its own kernel."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jmeta.models.norms import as_last


def depthwise(
    x: Float[Array, "n height width channels"],
    kernel: Float[Array, "rows columns 1 channels"],
    stride: int,
    padding: Sequence[tuple[int, int]],
) -> Float[Array, "n up across channels"]:
    """y[n, i, j, c] = Σ x[n, s i + k − low, s j + l − low, c] w[k, l, 0, c].

    Products and sums alone, which XLA fuses into one loop, whatever is differentiated or mapped over: a convolution of
    so many groups runs one after the other on a CPU, and slower still where tasks have kernels of their own.

    Args:
        x: images.
        kernel: a matrix for each channel.
        stride: step of the window.
        padding: `(low, high)` of height and width.

    Returns:
        `[n, up, across, channels]`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jmeta.models.depthwise import depthwise
        >>> depthwise(jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 1, 2)), 2, [(0, 1), (0, 1)])[0, :, :, 0].tolist()
        [[9.0, 6.0], [6.0, 4.0]]
    """
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *((low, high, 0) for low, high in padding), (0, 0, 0)])
    n, *space, channels = x.shape
    up, across = ((size - k) // stride + 1 for size, k in zip(space, kernel.shape[:2], strict=True))
    y = jnp.zeros((n, up, across, channels), x.dtype)
    for i, j in np.ndindex(*kernel.shape[:2]):
        end = (n, i + (up - 1) * stride + 1, j + (across - 1) * stride + 1, channels)
        y = y + lax.slice(x, (0, i, j, 0), end, (1, stride, stride, 1)) * as_last(kernel[i, j, 0], x)
    return y


class DepthwiseConv(nn.Module):
    """A convolution of each channel with a kernel of its own, with the parameters of `nn.Conv` of so many groups.

    Args:
        size: of the kernel, a square.
        stride: step of the window; the padding is `"SAME"`.
        dtype: of the computation.
    """

    size: int
    stride: int = 1
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "n height width channels"]) -> Float[Array, "n up across channels"]:
        shape = (self.size, self.size, 1, x.shape[-1])
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        x, kernel = promote_dtype(x, kernel, dtype=self.dtype)
        pads = lax.padtype_to_pads(x.shape[1:3], shape[:2], (self.stride, self.stride), "SAME")
        return depthwise(x, kernel, self.stride, pads)
