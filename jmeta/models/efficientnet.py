"""A small network that is often had pretrained on ImageNet."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Num

from jmeta.errors import ModelError
from jmeta.inputs import as_floats
from jmeta.models.convolution import Conv
from jmeta.models.depthwise import DepthwiseConv
from jmeta.models.norms import Norm, as_last, check_choice, check_dtype, norm_layer
from jmeta.tree import widened

Stage = tuple[int, int, int, int, int]
LITE0: tuple[Stage, ...] = (  # blocks, size of the kernel, stride, by what the channels are expanded, channels
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


def as_colours(
    images: Num[Array, "n height width channels"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Array, "n height width 3"]:
    """(x − mean) / std of pictures from 0 to 1, as a network was trained with; grey becomes three equal colours."""
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ModelError(f"inputs of shape {list(images.shape)} are no pictures; give [n, height, width, 1 or 3].")
    x = as_floats(images)
    x = jnp.broadcast_to(x, (*x.shape[:3], 3))
    return (x - as_last(jnp.asarray(mean, x.dtype), x)) / as_last(jnp.asarray(std, x.dtype), x)


class EfficientNetLite0(nn.Module):
    """Inverted residual blocks with depthwise convolutions: 3.4 million parameters without a head.

    Its parts are named as in the code of `efficientnet-lite-pytorch`, so that `jmeta.load_params` reads its files; the
    classifier of ImageNet is `_fc` there, `names={"_fc": "head"}` for a network with `outputs=1000`.

    Args:
        outputs: width of the last layer, called `head`; None leaves it away and gives the embedding.
        norm: as of `jmeta.Conv4`; weights of a file need `"running"`.
        groups: of the group norm.
        mean: of the colours of pictures from 0 to 1, which is taken away first.
        std: of the colours, by which they are divided.
        stem: channels of the first convolution.
        stages: blocks, size of the kernel, stride, expansion and channels of each stage.
        width: of the embedding.
        dtype: of the computation, `"bfloat16"` or another float of 16 bits or more; None is that of inputs and
            parameters. Parameters, statistics and outputs are float32 whatever it is.

    Raises:
        ConfigError: an unknown `norm` or `dtype`.
        ModelError: inputs that are no pictures, or groups that do not divide the features.

    Example:
        >>> import jax, jax.numpy as jnp, jmeta
        >>> network = jmeta.EfficientNetLite0(outputs=None, stem=8, stages=((1, 3, 2, 2, 8),), width=32)
        >>> network.init_with_output(jax.random.key(0), jnp.ones((2, 32, 32, 3)))[0].shape
        (2, 32)

    Reference: Tan, Le 2019, "EfficientNet", https://arxiv.org/abs/1905.11946; Liu 2020, "Higher accuracy on vision
    models with EfficientNet-Lite".

    Differences from the original: no stochastic depth and no dropout before the head.
    """

    outputs: int | None = 5
    norm: Norm = "running"
    groups: int = 8
    mean: tuple[float, ...] = (0.498, 0.498, 0.498)
    std: tuple[float, ...] = (0.502, 0.502, 0.502)
    stem: int = 32
    stages: tuple[Stage, ...] = LITE0
    width: int = 1280
    dtype: DTypeLike | None = None

    def __post_init__(self) -> None:
        check_dtype(self.dtype)
        check_choice("norm", self.norm, Norm)
        super().__post_init__()

    @nn.compact
    def __call__(
        self, images: Num[Array, "n height width channels"], train: bool = True, mask: Bool[Array, "n"] | None = None
    ) -> Float[Array, "n outputs"]:
        given: Any = {"norm": {"norm": self.norm, "groups": self.groups}, "dtype": self.dtype}
        x = as_colours(images, self.mean, self.std)
        x = Conv(self.stem, (3, 3), strides=2, use_bias=False, dtype=self.dtype, name="_conv_stem")(x)
        x = jax.nn.relu6(_norm("_bn0", **given)(x, train=train, mask=mask))
        blocks = 0
        for repeats, size, stride, expand, features in self.stages:
            for i in range(repeats):
                block = _Block(features, size, 1 if i else stride, expand, given, name=f"_blocks.{blocks}")
                x, blocks = block(x, train, mask), blocks + 1
        x = Conv(self.width, (1, 1), use_bias=False, dtype=self.dtype, name="_conv_head")(x)
        x = widened(jax.nn.relu6(_norm("_bn1", **given)(x, train=train, mask=mask))).mean(axis=(1, 2))
        if self.outputs is not None:
            x = nn.Dense(self.outputs, dtype=self.dtype, name="head", kernel_init=nn.initializers.zeros_init())(x)
        return widened(x)


class _Block(nn.Module):
    """Few channels, more, each convolved by itself, few again; and a way around where the shape stays."""

    features: int
    size: int
    stride: int
    expand: int
    given: Any

    @nn.compact
    def __call__(self, x: Array, train: bool, mask: Any) -> Array:
        dtype, start, channels = self.given["dtype"], x, self.expand * x.shape[-1]
        if self.expand > 1:
            x = Conv(channels, (1, 1), use_bias=False, dtype=dtype, name="_expand_conv")(x)
            x = jax.nn.relu6(_norm("_bn0", **self.given)(x, train=train, mask=mask))
        x = DepthwiseConv(self.size, self.stride, dtype, name="_depthwise_conv")(x)
        x = jax.nn.relu6(_norm("_bn1", **self.given)(x, train=train, mask=mask))
        x = Conv(self.features, (1, 1), use_bias=False, dtype=dtype, name="_project_conv")(x)
        x = _norm("_bn2", **self.given)(x, train=train, mask=mask)
        return x + start if x.shape == start.shape and self.stride == 1 else x


def _norm(name: str, *, norm: Any, dtype: DTypeLike | None) -> Any:
    return norm_layer(**norm, scale=True, dtype=dtype, name=name)
