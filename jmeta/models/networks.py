"""The two networks of the few-shot literature, and their batch norm."""

from typing import Any, Literal, get_args

import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float

from jmeta.errors import ConfigError, ModelError
from jmeta.models.convolution import Conv

BatchNormPolicy = Literal["transductive", "per_task"]
Pooling = Literal["stride", "max"]


class MLP(nn.Module):
    """A multi-layer perceptron with ReLU; 40-40 is the network of the sinusoid experiments.

    Args:
        outputs: width of the last layer, called `head`; None leaves it away and gives the embedding.
        hidden: widths of the hidden layers.

    Example:
        >>> import jax, jax.numpy as jnp, jmeta
        >>> jmeta.MLP(outputs=1).init_with_output(jax.random.key(0), jnp.ones((10, 1)))[0].shape
        (10, 1)

    Reference: Finn et al. 2017, "Model-Agnostic Meta-Learning", section 5.1.
    """

    outputs: int | None
    hidden: tuple[int, ...] = (40, 40)

    @nn.compact
    def __call__(self, inputs: Float[Array, "n ..."]) -> Float[Array, "n outputs"]:
        x = inputs.reshape(inputs.shape[0], -1)
        for width in self.hidden:
            x = nn.relu(nn.Dense(width)(x))
        return x if self.outputs is None else nn.Dense(self.outputs, name="head")(x)


class BatchNorm(nn.Module):
    """Batch norm whose policy, which statistics normalise what, is an argument.

    ŷ = (x − μ) / √(σ² + ε) + β, with μ and σ² over all axes but the last.

    * `"transductive"`: μ, σ² of the batch at hand at all times, so that queries see each other (the original MAML).
    * `"per_task"`: μ, σ² of the support for the support and for the queries; nothing is carried from task to task. For
      the queries they are those of the last pass over the support, and count as constants in the meta-gradient.

    Args:
        policy: see above.
        scale: whether to learn a scale γ as well; the original MAML does not.
        epsilon: ε.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jmeta.models.networks import BatchNorm
        >>> y, _ = BatchNorm().init_with_output(jax.random.key(0), jnp.arange(6.0).reshape(3, 2), train=True)

    Reference: Ioffe, Szegedy 2015; the policies: Bronskill et al. 2020, "TaskNorm", section 3.
    """

    policy: BatchNormPolicy = "transductive"
    scale: bool = False
    epsilon: float = 1e-3

    @nn.compact
    def __call__(self, x: Float[Array, "n ... features"], *, train: bool) -> Float[Array, "n ... features"]:
        shape = (x.shape[-1],)
        β = self.param("bias", nn.initializers.zeros_init(), shape, x.dtype)
        if self.policy == "per_task":
            mean = self.variable("batch_stats", "mean", jnp.zeros, shape, x.dtype)
            variance = self.variable("batch_stats", "var", jnp.ones, shape, x.dtype)
        if train or self.policy == "transductive":
            axes = tuple(range(x.ndim - 1))
            μ = x.mean(axes)
            σ2 = jnp.square(x - _last(μ, x)).mean(axes)
            if self.policy == "per_task" and not self.is_initializing():
                mean.value, variance.value = μ, σ2
        else:
            μ, σ2 = mean.value, variance.value
        factor = lax.rsqrt(σ2 + jnp.asarray(self.epsilon, x.dtype))
        if self.scale:
            factor = factor * self.param("scale", nn.initializers.ones_init(), shape, x.dtype)
        return x * _last(factor, x) + _last(β - μ * factor, x)


def _last(vector: Array, x: Array) -> Array:
    return vector.reshape((1,) * (x.ndim - 1) + vector.shape)


class Conv4(nn.Module):
    """Four blocks of convolution 3x3, batch norm and ReLU: the network of most few-shot papers.

    Args:
        outputs: width of the last layer, called `head`; None leaves it away and gives the embedding.
        features: channels of each block.
        pooling: `"stride"`, convolutions of stride 2 and a spatial mean (MAML on Omniglot), or `"max"`, 2x2 max-pooling
            and all that is left as features (MAML on mini-ImageNet, prototypical networks).
        batch_norm: `"transductive"` or `"per_task"`, see `BatchNorm`.
        scale: whether batch norm learns a scale γ.

    Raises:
        ConfigError: an unknown `pooling` or `batch_norm`.
        ModelError: an image vanishes under four max-poolings.

    Example:
        >>> import jax, jax.numpy as jnp, jmeta
        >>> images = jnp.ones((2, 28, 28, 1))
        >>> jmeta.Conv4(outputs=None, pooling="max").init_with_output(jax.random.key(0), images)[0].shape
        (2, 64)

    Reference: Vinyals et al. 2016, "Matching Networks", section 4.1; Finn et al. 2017, section 5.2 and its code.
    """

    outputs: int | None = 5
    features: int = 64
    pooling: Pooling = "stride"
    batch_norm: BatchNormPolicy = "transductive"
    scale: bool = False

    def __post_init__(self) -> None:
        _check_choice("pooling", self.pooling, Pooling)
        _check_choice("batch_norm", self.batch_norm, BatchNormPolicy)
        super().__post_init__()

    @nn.compact
    def __call__(
        self, images: Float[Array, "n height width channels"], train: bool = True
    ) -> Float[Array, "n outputs"]:
        if self.pooling == "max" and min(images.shape[1:3]) < 16:
            raise ModelError(f"images of {images.shape[1:3]} vanish under four 2x2 max-poolings; give 16x16 or larger.")
        x = images
        for _ in range(4):
            x = Conv(self.features, (3, 3), strides=2 if self.pooling == "stride" else 1, use_bias=False)(x)
            x = BatchNorm(self.batch_norm, self.scale)(x, train=train)
            x = nn.relu(max_pool(x) if self.pooling == "max" else x)
        x = x.mean(axis=(1, 2)) if self.pooling == "stride" else x.reshape(x.shape[0], -1)
        return x if self.outputs is None else nn.Dense(self.outputs, name="head")(x)


def _check_choice(name: str, value: str, choices: Any) -> None:
    if value not in get_args(choices):
        raise ConfigError(f"{name} is {value!r}; give {' or '.join(map(repr, get_args(choices)))}.")


def max_pool(x: Float[Array, "n height width channels"]) -> Float[Array, "n height//2 width//2 channels"]:
    """2x2 max-pooling of stride 2 as reshape and max, whose second derivative is fast where `reduce_window`'s is not.

    Args:
        x: `[n, height, width, channels]`; an odd last row or column is left away, as by VALID padding.

    Returns:
        `[n, height // 2, width // 2, channels]`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jmeta.models.networks import max_pool
        >>> float(max_pool(jnp.arange(4.0).reshape(1, 2, 2, 1))[0, 0, 0, 0])
        3.0
    """
    n, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return x.reshape(n, height // 2, 2, width // 2, 2, channels).max(axis=(2, 4))
