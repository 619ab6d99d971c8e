"""The two networks of the few-shot literature, and their batch norm."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jmeta.errors import ConfigError, ModelError
from jmeta.models.convolution import Conv

BatchNormPolicy = Literal["transductive", "per_task", "running"]
Pooling = Literal["stride", "max"]


class MLP(nn.Module):
    """A multi-layer perceptron with ReLU between linear layers; 40-40 is the network of the sinusoid experiments.

    It ends in a linear layer in any case: behind a ReLU no embedding would have a negative part, and a distance or a
    cosine could tell classes apart on a part of the space alone.

    Args:
        outputs: width of the last layer, called `head`; None gives an embedding as wide as the last hidden layer (as
            the inputs, where there is none), whose last layer is called `embedding`.
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
        _check_dtype(self.dtype)
        super().__post_init__()

    @nn.compact
    def __call__(self, inputs: Float[Array, "n ..."]) -> Float[Array, "n outputs"]:
        x = inputs.reshape(inputs.shape[0], -1)
        if self.context:
            context = self.param("context", nn.initializers.zeros_init(), (self.context,), x.dtype)
            x = jnp.concatenate([x, jnp.broadcast_to(context[None], (len(x), self.context))], axis=1)
        for width in self.hidden:
            x = nn.relu(nn.Dense(width, dtype=self.dtype)(x))
        width, name = (x.shape[-1], "embedding") if self.outputs is None else (self.outputs, "head")
        return _at_least_float32(nn.Dense(width, dtype=self.dtype, name=name)(x))


class BatchNorm(nn.Module):
    """Batch norm whose policy, which statistics normalise what, is an argument.

    ŷ = (x − μ) / √(σ² + ε) + β, with μ and σ² over all axes but the last.

    * `"transductive"`: μ, σ² of the batch at hand at all times, so that queries see each other (the original MAML).
    * `"per_task"`: μ, σ² of the support for the support and for the queries; nothing is carried from task to task. For
      the queries they are those of the last pass over the support, and count as constants in the meta-gradient.
    * `"running"`: μ, σ² of the support for the support, and their moving average over the tasks for the queries, which
      also counts as a constant.

    Args:
        policy: see above.
        scale: whether to learn a scale γ as well; the original MAML does not.
        epsilon: ε.
        momentum: of the moving average, how much of the old one is kept.
        dtype: of the result; None is that of inputs and parameters. Statistics, parameters and the formula are float32
            whatever it is, as in `flax.linen.BatchNorm`.

    Raises:
        ConfigError: an unknown `dtype`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jmeta.models.networks import BatchNorm
        >>> y, _ = BatchNorm().init_with_output(jax.random.key(0), jnp.arange(6.0).reshape(3, 2), train=True)

    Reference: Ioffe, Szegedy 2015; the policies: Bronskill et al. 2020, "TaskNorm", section 3.
    """

    policy: BatchNormPolicy = "transductive"
    scale: bool = False
    epsilon: float = 1e-3
    momentum: float = 0.9
    dtype: DTypeLike | None = None

    def __post_init__(self) -> None:
        _check_dtype(self.dtype)
        super().__post_init__()

    @nn.compact
    def __call__(
        self, x: Float[Array, "n ... features"], *, train: bool, pool: Callable[[Array], Array] | None = None
    ) -> Float[Array, "n ... features"]:
        """Normalises, and pools the result by `pool`, a maximum over places of each feature."""
        x, shape = _at_least_float32(x), (x.shape[-1],)
        β = self.param("bias", nn.initializers.zeros_init(), shape, x.dtype)
        if self.policy != "transductive":
            mean = self.variable("batch_stats", "mean", jnp.zeros, shape, x.dtype)
            variance = self.variable("batch_stats", "var", jnp.ones, shape, x.dtype)
        if train or self.policy == "transductive":
            axes = tuple(range(x.ndim - 1))
            # One pass over x less than the mean of (x − μ)², forwards and backwards. Any shift near μ keeps it as
            # exact.
            near = lax.stop_gradient(x.reshape(-1, shape[0])[0])
            shifted = x - _last(near, x)
            offset = shifted.mean(axes)
            μ = near + offset
            σ2 = jnp.maximum(jnp.square(shifted).mean(axes) - jnp.square(offset), jnp.zeros((), x.dtype))
            if self.policy != "transductive" and not self.is_initializing():
                kept = self.momentum if self.policy == "running" else 0.0
                mean.value = kept * mean.value + (1.0 - kept) * μ
                variance.value = kept * variance.value + (1.0 - kept) * σ2
        else:
            μ, σ2 = mean.value, variance.value
        factor = lax.rsqrt(σ2 + jnp.asarray(self.epsilon, x.dtype))
        if self.scale:
            factor = factor * self.param("scale", nn.initializers.ones_init(), shape, x.dtype)
        shift = β - μ * factor
        if pool is not None:
            # max(a x + b) = |a| max(sign(a) x) + b. The derivative of a maximum asks which entry equals it, which is
            # safe for x, the result of a convolution, and wrong for a value that XLA computes a second time in a fusion
            # with other rounding; and a quarter of the entries is left to normalise.
            sign = jnp.where(factor < 0, -jnp.ones_like(factor), jnp.ones_like(factor))
            x, factor = pool(x * _last(sign, x) if self.scale else x), sign * factor
        y = x * _last(factor, x) + _last(shift, x)
        return y if self.dtype is None else y.astype(self.dtype)


def _last(vector: Array, x: Array) -> Array:
    return vector.reshape((1,) * (x.ndim - 1) + vector.shape)


class Conv4(nn.Module):
    """Four blocks of convolution 3x3, batch norm and ReLU: the network of most few-shot papers.

    Args:
        outputs: width of the last layer, called `head`; None leaves it away and gives the embedding.
        features: channels of each block.
        pooling: `"stride"`, convolutions of stride 2 and a spatial mean (MAML on Omniglot), or `"max"`, 2x2 max-pooling
            and all that is left as features (MAML on mini-ImageNet, prototypical networks).
        batch_norm: `"transductive"`, `"per_task"` or `"running"`, see `BatchNorm`.
        scale: whether batch norm learns a scale γ.
        context: context parameters, of which a scale and a shift for each channel of the third block are a linear
            function (CAVIA); they start at 0.
        dtype: of the computation, `"bfloat16"` or another float of 16 bits or more; None is that of inputs and
            parameters. Parameters, batch statistics and outputs are float32 whatever it is.

    Raises:
        ConfigError: an unknown `pooling`, `batch_norm` or `dtype`.
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
    context: int = 0
    dtype: DTypeLike | None = None

    def __post_init__(self) -> None:
        _check_dtype(self.dtype)
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
        for block in range(4):
            strides = 2 if self.pooling == "stride" else 1
            x = Conv(self.features, (3, 3), strides=strides, use_bias=False, dtype=self.dtype)(x)
            pool = _max_pool if self.pooling == "max" else None
            x = BatchNorm(self.batch_norm, self.scale, dtype=self.dtype)(x, train=train, pool=pool)
            if self.context and block == 2:
                context = self.param("context", nn.initializers.zeros_init(), (self.context,), jnp.float32)
                factor, shift = nn.Dense(2 * self.features, dtype=self.dtype, name="film")(context[None]).reshape(2, -1)
                x = x * _last(1 + factor, x) + _last(shift, x)
            x = nn.relu(x)
        x = x.mean(axis=(1, 2)) if self.pooling == "stride" else x.reshape(x.shape[0], -1)
        return _at_least_float32(
            x if self.outputs is None else nn.Dense(self.outputs, dtype=self.dtype, name="head")(x)
        )


def _at_least_float32(x: Array) -> Array:
    return x.astype(jnp.float32) if x.dtype.itemsize < 4 else x


def _check_dtype(dtype: Any) -> None:
    try:
        known = dtype is None or (jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits >= 16)
    except TypeError:  # no name of a dtype
        known = False
    if not known:
        name = dtype if isinstance(dtype, str) else getattr(dtype, "__name__", str(dtype))
        raise ConfigError(f"dtype is {name!r}; give 'bfloat16', 'float16' or 'float32'.")


def _check_choice(name: str, value: str, choices: Any) -> None:
    if value not in get_args(choices):
        raise ConfigError(f"{name} is {value!r}; give {' or '.join(map(repr, get_args(choices)))}.")


def _max_pool(x: Float[Array, "n height width channels"]) -> Float[Array, "n height//2 width//2 channels"]:
    """2x2 max-pooling as reshape and max, whose second derivative is fast where `reduce_window`'s is not.

    An odd last row or column is left away, as by VALID padding.
    """
    n, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return x.reshape(n, height // 2, 2, width // 2, 2, channels).max(axis=(2, 4))
