"""The vision transformer in the layout of DINO and DINOv2."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Num

from jmeta.errors import ConfigError, ModelError
from jmeta.models.attention import attend
from jmeta.models.convolution import Conv
from jmeta.models.efficientnet import as_colours
from jmeta.models.norms import as_last, check_dtype
from jmeta.tree import widened


class ViT(nn.Module):
    """A transformer over the patches of an image, which gives the token of the class.

    Its parts are named as in the code of DINO and DINOv2 (and timm), so that `jmeta.load_params` reads their files.
    ViT-S/16 of DINO is the default; DINOv2's ViT-S/14 is `ViT(patch=14, image=518, layer_scale=True)`, with
    `registers=4` where it has them; ViT-B has `width=768, heads=12`, ViT-L `width=1024, depth=24, heads=16`.

    Args:
        outputs: width of the last layer, called `head`; None leaves it away and gives the embedding.
        patch: sides of a patch in pixels; those of the images are multiples of it.
        image: sides of the images that the embeddings of places are of; for others they are interpolated.
        width: of the tokens.
        depth: number of blocks.
        heads: of the attention.
        layer_scale: whether each block has a learned scale of what it adds (DINOv2).
        registers: tokens beside those of patches and class.
        mean: of the colours of pictures from 0 to 1, which is taken away first; that of ImageNet.
        std: of the colours, by which they are divided.
        dtype: of the computation, `"bfloat16"` or another float of 16 bits or more; None is that of inputs and
            parameters. Parameters and outputs are float32 whatever it is.

    Raises:
        ConfigError: heads that do not divide the width, a patch that does not divide the image, an unknown `dtype`.
        ModelError: images whose sides are no multiples of the patch.

    Example:
        >>> import jax, jax.numpy as jnp, jmeta
        >>> network = jmeta.ViT(outputs=None, patch=8, image=32, width=16, depth=2, heads=2)
        >>> network.init_with_output(jax.random.key(0), jnp.ones((2, 32, 32, 3)))[0].shape
        (2, 16)

    Reference: Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words"; Caron et al. 2021, "Emerging Properties in
    Self-Supervised Vision Transformers"; Oquab et al. 2023, "DINOv2"; Darcet et al. 2024, "Vision Transformers Need
    Registers".

    Differences from the original: no dropout and no stochastic depth; embeddings of places are interpolated to the size
    itself, where DINO's code adds 0.1 to it.
    """

    outputs: int | None = 5
    patch: int = 16
    image: int = 224
    width: int = 384
    depth: int = 12
    heads: int = 6
    layer_scale: bool = False
    registers: int = 0
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    dtype: DTypeLike | None = None

    def __post_init__(self) -> None:
        check_dtype(self.dtype)
        if self.width % self.heads:
            raise ConfigError(f"{self.heads} heads do not divide a width of {self.width}; choose a divisor.")
        if self.image % self.patch:
            raise ConfigError(f"patches of {self.patch} do not divide an image of {self.image}; choose a divisor.")
        super().__post_init__()

    @nn.compact
    def __call__(self, images: Num[Array, "n height width channels"]) -> Float[Array, "n outputs"]:
        x = as_colours(images, self.mean, self.std)
        if x.shape[1] % self.patch or x.shape[2] % self.patch:
            raise ModelError(
                f"images of {x.shape[1]} x {x.shape[2]} are no whole patches of {self.patch}; give them another size."
            )
        n, side, start = len(x), self.image // self.patch, nn.initializers.truncated_normal(0.02)
        window = (self.patch, self.patch)
        x = Conv(self.width, window, strides=window, padding="VALID", dtype=self.dtype, name="patch_embed.proj")(x)
        first = self.param("cls_token", start, (1, 1, self.width))
        places = self.param("pos_embed", start, (1, 1 + side**2, self.width))
        patches = places[0, 1:].reshape(side, side, self.width)
        for axis, size in enumerate(x.shape[1:3]):
            if size != side:
                patches = jnp.moveaxis(jnp.tensordot(bicubic(side, size), patches, (1, axis)), 0, axis)
        x = x.reshape(n, -1, self.width) + patches.reshape(1, -1, self.width).astype(x.dtype)
        tokens = [first + places[:, :1]]
        if self.registers:
            tokens.append(self.param("register_tokens", start, (1, self.registers, self.width)))
        added = jnp.concatenate(tokens, axis=1).astype(x.dtype)
        x = jnp.concatenate([jnp.broadcast_to(added, (n, *added.shape[1:])), x], axis=1)
        for i in range(self.depth):
            x = _Block(self.heads, self.layer_scale, self.dtype, name=f"blocks.{i}")(x)
        x = _layer_norm("norm", self.dtype)(x[:, 0])
        if self.outputs is not None:
            x = nn.Dense(self.outputs, dtype=self.dtype, name="head", kernel_init=nn.initializers.zeros_init())(x)
        return widened(x)


class _Block(nn.Module):
    """Attention, then a perceptron for each token; each adds to what comes in."""

    heads: int
    layer_scale: bool
    dtype: DTypeLike | None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, dtype=self.dtype, name=name)

        def scaled(x: Array, name: str) -> Array:
            if not self.layer_scale:
                return x
            γ = self.param(f"{name}.gamma", nn.initializers.constant(1e-5), (width,))
            return x * as_last(γ.astype(x.dtype), x)

        width = x.shape[-1]
        q, k, v = jnp.split(dense(3 * width, "attn.qkv")(_layer_norm("norm1", self.dtype)(x)), 3, axis=-1)
        x = x + scaled(dense(width, "attn.proj")(attend(q, k, v, self.heads)), "ls1")
        hidden = dense(4 * width, "mlp.fc1")(_layer_norm("norm2", self.dtype)(x))
        return x + scaled(dense(width, "mlp.fc2")(jax.nn.gelu(hidden, approximate=False)), "ls2")


def _layer_norm(name: str, dtype: DTypeLike | None) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=1e-6, dtype=dtype, use_fast_variance=False, name=name)


def bicubic(old: int, new: int) -> Float[Array, "new old"]:
    """The matrix that interpolates a row of `old` numbers to `new`, by PyTorch's cubic (a = −0.75).

    Example:
        >>> from jmeta.models.vit import bicubic
        >>> bicubic(3, 5).sum(axis=1).round(5).tolist()
        [1.0, 1.0, 1.0, 1.0, 1.0]
    """
    a, matrix = -0.75, np.zeros((new, old))
    for i in range(new):
        place = (i + 0.5) * old / new - 0.5
        for j in range(int(np.floor(place)) - 1, int(np.floor(place)) + 3):
            d = abs(place - j)
            near, far = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
            matrix[i, min(max(j, 0), old - 1)] += near if d <= 1 else far if d < 2 else 0.0
    return jnp.asarray(matrix, jnp.float32)
