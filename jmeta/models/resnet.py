"""The residual network of the few-shot literature."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Key, Num

from jmeta.errors import ModelError
from jmeta.inputs import as_floats
from jmeta.models.convolution import Conv
from jmeta.models.norms import Norm, check_choice, check_dtype, norm_layer
from jmeta.models.pooling import max_pool
from jmeta.tree import widened


class ResNet12(nn.Module):
    """Four residual blocks of three convolutions, 64-160-320-640: the larger network of few-shot papers.

    12.42 million parameters without a head. Its parts are named as in the code of RFS and LibFewShot, so that
    `jmeta.load_params` reads their files: with `norm="running"`.

    Args:
        outputs: width of the last layer, called `head`; None leaves it away and gives the embedding.
        features: channels of the four blocks.
        dropout: share of the activations that are dropped after each block in training, in the last two blocks as
            squares.
        block: sides of such a square, DropBlock; no larger than the image is there.
        norm: as of `jmeta.Conv4`.
        scale: whether the normalisation learns a scale γ beside its shift.
        groups: of the group norm.
        dtype: of the computation, `"bfloat16"` or another float of 16 bits or more; None is that of inputs and
            parameters. Parameters, statistics and outputs are float32 whatever it is.

    Raises:
        ConfigError: an unknown `norm` or `dtype`.
        ModelError: an image vanishes under four max-poolings, or groups do not divide the features.

    Example:
        >>> import jax, jax.numpy as jnp, jmeta
        >>> network = jmeta.ResNet12(outputs=None, features=(8, 8, 16, 16))
        >>> network.init_with_output(jax.random.key(0), jnp.ones((2, 32, 32, 3)))[0].shape
        (2, 16)

    Reference: Lee et al. 2019, "Meta-Learning with Differentiable Convex Optimization", section 4.1; Tian et al. 2020,
    "Rethinking Few-Shot Image Classification"; Ghiasi et al. 2018, "DropBlock".

    Differences from the code of RFS: group norm unless `norm` says otherwise; the share that is dropped does not grow
    over training; what is left is scaled up for each example by itself.
    """

    outputs: int | None = 5
    features: tuple[int, int, int, int] = (64, 160, 320, 640)
    dropout: float = 0.1
    block: int = 5
    norm: Norm = "group"
    scale: bool = True
    groups: int = 8
    dtype: DTypeLike | None = None

    def __post_init__(self) -> None:
        check_dtype(self.dtype)
        check_choice("norm", self.norm, Norm)
        super().__post_init__()

    @nn.compact
    def __call__(
        self, images: Num[Array, "n height width channels"], train: bool = True, mask: Bool[Array, "n"] | None = None
    ) -> Float[Array, "n outputs"]:
        if min(images.shape[1:3]) < 16:
            raise ModelError(f"images of {images.shape[1:3]} vanish under four 2x2 max-poolings; give 16x16 or larger.")
        x = as_floats(images)
        norm: Any = {"norm": self.norm, "scale": self.scale, "groups": self.groups}
        for i, features in enumerate(self.features, start=1):
            block = _Block(features, norm, self.dtype, name=f"layer{i}.0")
            x = max_pool(block(x, train, mask))
            if self.dropout and train and self.has_rng("dropout"):
                x = drop_block(self.make_rng("dropout"), x, self.dropout, self.block if i > 2 else 1)
        x = widened(x).mean(axis=(1, 2))
        if self.outputs is not None:
            x = nn.Dense(self.outputs, dtype=self.dtype, name="head", kernel_init=nn.initializers.zeros_init())(x)
        return widened(x)


class _Block(nn.Module):
    """Three convolutions and a way around them."""

    features: int
    norm: Any
    dtype: DTypeLike | None

    @nn.compact
    def __call__(self, x: Array, train: bool, mask: Any) -> Array:
        def normalised(x: Array, size: int, conv: str, norm: str) -> Array:
            start = nn.initializers.he_normal()
            kernel: Any = {"kernel_size": (size, size), "use_bias": False, "kernel_init": start}
            x = Conv(self.features, **kernel, dtype=self.dtype, name=conv)(x)
            layer = norm_layer(**self.norm, epsilon=1e-5, dtype=self.dtype, name=norm)
            return layer(x, train=train, mask=mask)

        y = x
        for i in (1, 2, 3):
            y = normalised(y, 3, f"conv{i}", f"bn{i}")
            y = y if i == 3 else nn.leaky_relu(y, 0.1)
        return nn.leaky_relu(y + normalised(x, 1, "downsample.0", "downsample.1"), 0.1)


def drop_block(
    key: Key[Array, ""], x: Float[Array, "n height width channels"], rate: float, size: int
) -> Float[Array, "n height width channels"]:
    """Activations without squares of each channel, and scaled up by what is left of each example.

    Args:
        key: of what is dropped.
        x: activations.
        rate: share to be dropped.
        size: sides of a square, at most those of the image; 1 is dropout.

    Returns:
        `[n, height, width, channels]`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jmeta.models.resnet import drop_block
        >>> float(drop_block(jax.random.key(0), jnp.ones((1, 8, 8, 4)), 0.1, 3).mean().round(3))
        1.0

    Reference: Ghiasi et al. 2018, "DropBlock", algorithm 1.
    """
    n, height, width, channels = x.shape
    size = min(size, height, width)
    corners = (height - size + 1, width - size + 1)
    share = rate / size**2 * height * width / (corners[0] * corners[1])
    hit = jax.random.bernoulli(key, min(share, 1.0), (n, *corners, channels)).astype(x.dtype)
    around = ((0, 0), (size - 1, size - 1), (size - 1, size - 1), (0, 0))
    zero = jnp.zeros((), x.dtype)
    kept = 1.0 - lax.reduce_window(hit, zero, lax.max, (1, size, size, 1), (1, 1, 1, 1), around)
    return x * kept / jnp.maximum(kept.mean(axis=(1, 2, 3), keepdims=True), 1e-3)
