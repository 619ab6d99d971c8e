"""The two networks of the few-shot literature."""

import warnings
from typing import Literal

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Num

from jmeta.errors import ModelError
from jmeta.inputs import as_floats
from jmeta.models.convolution import Conv
from jmeta.models.norms import BatchNorm as BatchNorm
from jmeta.models.norms import GroupNorm as GroupNorm
from jmeta.models.norms import Norm, as_last, check_choice, check_dtype, norm_layer
from jmeta.models.pooling import max_pool
from jmeta.tree import widened

Pooling = Literal["stride", "max"]
Spatial = Literal["flat", "mean"]
HeadInit = Literal["zeros", "random"]


class MLP(nn.Module):
    """A multi-layer perceptron with ReLU between linear layers; 40-40 is the network of the sinusoid experiments.

    An embedding (`outputs=None`) is a linear map of the inputs plus what the hidden layers add to it, z = A x + B h(x).
    A starts orthogonal and B at zero, so that distances start as those of the inputs, which random hidden layers would
    have mixed up; and with a negative part, which nothing behind a ReLU has.

    Args:
        outputs: width of the last layer, called `head`; None gives an embedding as wide as the last hidden layer (as
            the inputs, where there is none), whose B is called `embedding` and whose A is called `linear`.
        hidden: widths of the hidden layers.
        context: context parameters, which are inputs beside those of every example (CAVIA); they start at 0.
        dtype: of the computation, `"bfloat16"` or another float of 16 bits or more; None is that of inputs and
            parameters. Parameters and outputs are float32 whatever it is.

    Raises:
        ConfigError: an unknown `dtype`.

    Example:
        >>> import jax, jax.numpy as jnp, jmeta
        >>> jmeta.MLP(outputs=1).init_with_output(jax.random.key(0), jnp.ones((10, 1)))[0].shape
        (10, 1)

    Reference: Finn et al. 2017, "Model-Agnostic Meta-Learning", section 5.1.
    """

    outputs: int | None
    hidden: tuple[int, ...] = (40, 40)
    context: int = 0
    dtype: DTypeLike | None = None

    def __post_init__(self) -> None:
        check_dtype(self.dtype)
        super().__post_init__()

    @nn.compact
    def __call__(self, inputs: Num[Array, "n ..."]) -> Float[Array, "n outputs"]:
        x = as_floats(inputs.reshape(inputs.shape[0], -1))
        if self.context:
            context = self.param("context", nn.initializers.zeros_init(), (self.context,), x.dtype)
            x = jnp.concatenate([x, jnp.broadcast_to(context[None], (x.shape[0], self.context))], axis=1)
        start = x
        for width in self.hidden:
            x = nn.relu(nn.Dense(width, dtype=self.dtype)(x))
        if self.outputs is not None:
            return widened(nn.Dense(self.outputs, dtype=self.dtype, name="head")(x))
        width, zeros = x.shape[-1], nn.initializers.zeros_init()
        orthogonal = nn.initializers.orthogonal()
        linear = nn.Dense(width, use_bias=False, dtype=self.dtype, kernel_init=orthogonal, name="linear")(start)
        return widened(linear + nn.Dense(width, dtype=self.dtype, kernel_init=zeros, name="embedding")(x))


class Conv4(nn.Module):
    """Four blocks of convolution 3x3, normalisation and ReLU: the network of most few-shot papers.

    Args:
        outputs: width of the last layer, called `head`; None leaves it away and gives the embedding.
        features: channels of each block.
        pooling: `"stride"`, convolutions of stride 2 (MAML on Omniglot), or `"max"`, 2x2 max-pooling (MAML on
            mini-ImageNet, prototypical networks).
        norm: `"group"` or `"layer"`, which normalise each example by itself, or the policy of a batch norm,
            `"per_task"`, `"running"` or `"transductive"`, see `jmeta.BatchNorm`. Only with `"transductive"` do queries
            see each other.
        scale: whether the normalisation learns a scale γ beside its shift.
        groups: of the group norm.
        spatial: how the features of the places that are left leave the network: `"flat"`, all side by side, or
            `"mean"`.
        head_init: how the head starts: `"zeros"`, all classes alike, or `"random"`.
        context: context parameters, of which a scale and a shift for each channel of the third block are a linear
            function (CAVIA); they start at 0.
        dtype: of the computation, `"bfloat16"` or another float of 16 bits or more; None is that of inputs and
            parameters. Parameters, statistics and outputs are float32 whatever it is.

    Raises:
        ConfigError: an unknown `pooling`, `norm`, `spatial`, `head_init` or `dtype`.
        ModelError: an image vanishes under four max-poolings, or groups do not divide the features.

    Example:
        >>> import jax, jax.numpy as jnp, jmeta
        >>> images = jnp.ones((2, 28, 28, 1))
        >>> jmeta.Conv4(outputs=None, pooling="max").init_with_output(jax.random.key(0), images)[0].shape
        (2, 64)

    Reference: Vinyals et al. 2016, "Matching Networks", section 4.1; Finn et al. 2017, section 5.2 and its code.

    Differences from the papers: their networks have batch norm; that of MAML on Omniglot is `Conv4(norm="transductive",
    scale=False, spatial="mean", head_init="random")`, of prototypical networks `Conv4(outputs=None, pooling="max",
    norm="running")`.
    """

    outputs: int | None = 5
    features: int = 64
    pooling: Pooling = "stride"
    norm: Norm = "group"
    scale: bool = True
    groups: int = 8
    spatial: Spatial = "flat"
    head_init: HeadInit = "zeros"
    context: int = 0
    dtype: DTypeLike | None = None
    batch_norm: Norm | None = None  # the name of `norm` in version 0.1

    def __post_init__(self) -> None:
        if self.batch_norm is not None:
            warnings.warn("batch_norm= of Conv4 is norm= now; give that.", DeprecationWarning, stacklevel=3)
            self.norm, self.batch_norm = self.batch_norm, None
        check_dtype(self.dtype)
        check_choice("pooling", self.pooling, Pooling)
        check_choice("norm", self.norm, Norm)
        check_choice("spatial", self.spatial, Spatial)
        check_choice("head_init", self.head_init, HeadInit)
        super().__post_init__()

    @nn.compact
    def __call__(
        self, images: Num[Array, "n height width channels"], train: bool = True, mask: Bool[Array, "n"] | None = None
    ) -> Float[Array, "n outputs"]:
        if self.pooling == "max" and min(images.shape[1:3]) < 16:
            raise ModelError(f"images of {images.shape[1:3]} vanish under four 2x2 max-poolings; give 16x16 or larger.")
        x = as_floats(images)
        for block in range(4):
            strides = 2 if self.pooling == "stride" else 1
            x = Conv(self.features, (3, 3), strides=strides, use_bias=False, dtype=self.dtype)(x)
            pool = max_pool if self.pooling == "max" else None
            norm = norm_layer(self.norm, scale=self.scale, groups=self.groups, dtype=self.dtype)
            x = norm(x, train=train, pool=pool, mask=mask)
            if self.context and block == 2:
                context = self.param("context", nn.initializers.zeros_init(), (self.context,), jnp.float32)
                factor, shift = nn.Dense(2 * self.features, dtype=self.dtype, name="film")(context[None]).reshape(2, -1)
                x = x * as_last(1 + factor, x) + as_last(shift, x)
            x = nn.relu(x)
        x = x.mean(axis=(1, 2)) if self.spatial == "mean" else x.reshape(x.shape[0], -1)
        if self.outputs is not None:
            start = nn.initializers.zeros_init() if self.head_init == "zeros" else nn.initializers.lecun_normal()
            x = nn.Dense(self.outputs, dtype=self.dtype, name="head", kernel_init=start)(x)
        return widened(x)
