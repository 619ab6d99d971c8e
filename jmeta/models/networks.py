"""The two networks of the few-shot literature, and their normalisation."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Num

from jmeta.errors import ConfigError, ModelError
from jmeta.inputs import as_floats
from jmeta.models.convolution import Conv

BatchNormPolicy = Literal["per_task", "running", "transductive"]
Norm = Literal["group", "layer", "per_task", "running", "transductive"]
Pooling = Literal["stride", "max"]
Spatial = Literal["flat", "mean"]
HeadInit = Literal["zeros", "random"]
Pool = Callable[[Array], Array]


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
        _check_dtype(self.dtype)
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
            return _at_least_float32(nn.Dense(self.outputs, dtype=self.dtype, name="head")(x))
        width, zeros = x.shape[-1], nn.initializers.zeros_init()
        orthogonal = nn.initializers.orthogonal()
        linear = nn.Dense(width, use_bias=False, dtype=self.dtype, kernel_init=orthogonal, name="linear")(start)
        return _at_least_float32(linear + nn.Dense(width, dtype=self.dtype, kernel_init=zeros, name="embedding")(x))


class BatchNorm(nn.Module):
    """Batch norm whose policy, which statistics normalise what, is an argument.

    ŷ = γ (x − μ) / √(σ² + ε) + β, with μ and σ² over all axes but the last.

    * `"per_task"`: μ, σ² of the support for the support and for the queries; nothing is carried from task to task. θ is
      trained through them, and for learners with an inner loop those of the queries are those of the support at φ.
    * `"running"`: μ, σ² of the batch at hand in training, and their moving average over the batches, which counts as a
      constant, for support and queries at test. Learners that compare embeddings or pre-train see support and queries
      of a training task as one batch; in an inner loop the batch is the support, and the averages answer the queries.
    * `"transductive"`: μ, σ² of the batch at hand at all times, so that queries see each other and one query alone is
      normalised to nothing (the original MAML).

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
        >>> import jax, jax.numpy as jnp, jmeta
        >>> y, _ = jmeta.BatchNorm().init_with_output(jax.random.key(0), jnp.arange(6.0).reshape(3, 2), train=True)

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
        self,
        x: Float[Array, "n ... features"],
        *,
        train: bool,
        pool: Pool | None = None,
        mask: Bool[Array, "n"] | None = None,
    ) -> Float[Array, "n ... features"]:
        """Normalises, and pools the result by `pool`, a maximum over places; rows outside of `mask` do not count."""
        x, shape = _at_least_float32(x), (x.shape[-1],)
        γ, β = _scale_and_shift(self, self.scale, shape, x.dtype)
        if self.policy != "transductive":
            # no gradient flows through the collection of moving averages, `jmeta.linen` sees to that
            kind = "batch_stats" if self.policy == "running" else "task_stats"
            mean = self.variable(kind, "mean", jnp.zeros, shape, x.dtype)
            variance = self.variable(kind, "var", jnp.ones, shape, x.dtype)
        if train or self.policy == "transductive":
            rows = x.reshape(1, -1, *shape)
            weights = None
            if mask is not None:
                weights = jnp.repeat(mask.astype(x.dtype), rows.shape[1] // len(x))
                weights = weights / jnp.maximum(weights.sum(), 1.0)
            μ, r = (a.reshape(shape) for a in _moments(rows, weights, shape[0], self.epsilon))
            if self.policy != "transductive" and not self.is_initializing():
                kept = self.momentum if self.policy == "running" else 0.0
                σ2 = 1.0 / jnp.square(r) - jnp.asarray(self.epsilon, x.dtype)
                mean.value = kept * mean.value + (1.0 - kept) * μ
                variance.value = kept * variance.value + (1.0 - kept) * σ2
        else:
            μ, r = mean.value, lax.rsqrt(variance.value + jnp.asarray(self.epsilon, x.dtype))
        return _normalised(x, μ, r, γ, β, pool, self.dtype)


class GroupNorm(nn.Module):
    """Group norm: each example is normalised by itself, so that no answer depends on what stands beside it.

    ŷ = γ (x − μ) / √(σ² + ε) + β, with μ and σ² of one example over all places and the channels of a group.

    Args:
        groups: number of groups, of channels that lie side by side; 1 is layer norm.
        scale: whether to learn a scale γ for each channel beside the shift β.
        epsilon: ε.
        dtype: of the result; None is that of inputs and parameters. Statistics, parameters and the formula are float32
            whatever it is.

    Raises:
        ConfigError: an unknown `dtype`.
        ModelError: groups that do not divide the features.

    Example:
        >>> import jax, jax.numpy as jnp, jmeta
        >>> y, _ = jmeta.GroupNorm(groups=2).init_with_output(jax.random.key(0), jnp.arange(12.0).reshape(3, 4))
        >>> y[0].round(2).tolist()
        [-1.0, 1.0, -1.0, 1.0]

    Reference: Wu, He 2018, "Group Normalization", section 3, https://arxiv.org/abs/1803.08494; Ba, Kiros, Hinton 2016,
    "Layer Normalization".
    """

    groups: int = 8
    scale: bool = True
    epsilon: float = 1e-3
    dtype: DTypeLike | None = None

    def __post_init__(self) -> None:
        _check_dtype(self.dtype)
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "n ... features"],
        *,
        train: bool = False,
        pool: Pool | None = None,
        mask: Bool[Array, "n"] | None = None,
    ) -> Float[Array, "n ... features"]:
        """Normalises, and pools the result by `pool`, a maximum over places; `train` and `mask` change nothing."""
        x, features = _at_least_float32(x), x.shape[-1]
        if self.groups < 1 or features % self.groups:
            raise ModelError(f"{self.groups} groups do not divide {features} features; choose a divisor.")
        γ, β = _scale_and_shift(self, self.scale, (features,), x.dtype)
        moments = _moments(x.reshape(x.shape[0], -1, features), None, self.groups, self.epsilon)
        μ, r = (a.reshape(x.shape[0], *(1 for _ in x.shape[1:-1]), features) for a in moments)
        return _normalised(x, μ, r, γ, β, pool, self.dtype)


def norm_layer(
    norm: Norm, *, scale: bool = False, groups: int = 8, dtype: DTypeLike | None = None
) -> BatchNorm | GroupNorm:
    """The normalisation of a name: `"group"`, `"layer"` or a policy of `BatchNorm`.

    Args:
        norm: the name.
        scale: whether to learn a scale γ.
        groups: of `"group"`.
        dtype: of the result.

    Returns:
        A layer that is called with `(x, train=, pool=, mask=)`.

    Example:
        >>> from jmeta.models.networks import norm_layer
        >>> norm_layer("layer").groups
        1
    """
    if norm in get_args(BatchNormPolicy):
        return BatchNorm(norm, scale, dtype=dtype)  # type: ignore[arg-type]
    return GroupNorm(1 if norm == "layer" else groups, scale, dtype=dtype)


def _scale_and_shift(module: nn.Module, scale: bool, shape: tuple[int], dtype: Any) -> tuple[Array | None, Array]:
    β = module.param("bias", nn.initializers.zeros_init(), shape, dtype)
    return module.param("scale", nn.initializers.ones_init(), shape, dtype) if scale else None, β


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _moments(x: Array, weights: Array | None, groups: int, ε: float) -> tuple[Array, Array]:
    """μ and r = 1 / √(σ² + ε) of `[batches, rows, features]`, over rows and the features of a group.

    dμ = E[dx] and dr = −r³ E[(x − μ) dx], which is all that a derivative of any order needs.
    """
    # One pass over x less than the mean of (x − μ)²; any shift near μ keeps it as exact.
    near = x[:, :1]
    shifted = x - near
    first, second = _mean(shifted, weights), _mean(jnp.square(shifted), weights)
    μ = _over_groups(near + first, groups)
    away = μ - near
    σ2 = jnp.maximum(_over_groups(second - 2.0 * away * first + jnp.square(away), groups), 0.0)
    return μ, lax.rsqrt(σ2 + jnp.asarray(ε, x.dtype))


@_moments.defjvp
def _moments_jvp(groups: int, ε: float, primals: Any, tangents: Any) -> Any:
    (x, weights), (ẋ, _) = primals, tangents
    μ, r = _moments(x, weights, groups, ε)
    μ̇ = _over_groups(_mean(ẋ, weights), groups)
    return (μ, r), (μ̇, -(r**3) * _over_groups(_mean((x - μ) * ẋ, weights), groups))


def _mean(x: Array, weights: Array | None) -> Array:
    """Over the rows of `[batches, rows, features]`."""
    return x.mean(axis=1, keepdims=True) if weights is None else jnp.einsum("r,brf->bf", weights, x)[:, None]


def _over_groups(x: Array, groups: int) -> Array:
    """The mean over the features of a group, for each feature, as one product; features of their own stay."""
    features = x.shape[-1]
    if groups == features:
        return x
    group = np.arange(features) * groups // features
    average = jnp.asarray((group[:, None] == group[None]) * (groups / features), x.dtype)
    return jnp.matmul(x, average, precision=lax.Precision.HIGHEST)


def _normalised(
    x: Array, μ: Array, r: Array, γ: Array | None, β: Array, pool: Pool | None, dtype: DTypeLike | None
) -> Array:
    factor = r if γ is None else r * _last(γ, r)
    shift = _last(β, factor) - μ * factor
    if pool is not None:
        # max(a x + b) = |a| max(sign(a) x) + b. The derivative of a maximum asks which entry equals it, which is safe
        # for x, the result of a convolution, and wrong for a value that XLA computes a second time in a fusion with
        # other rounding; and a quarter of the entries is left to normalise.
        sign = jnp.where(factor < 0, -jnp.ones_like(factor), jnp.ones_like(factor))
        x, factor = pool(x * _last(sign, x) if γ is not None else x), sign * factor
    y = x * _last(factor, x) + _last(shift, x)
    return y if dtype is None else y.astype(dtype)


def _last(a: Array, x: Array) -> Array:
    """A vector of features as an array of the rank of x."""
    return a.reshape((1,) * (x.ndim - a.ndim) + a.shape)


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
        _check_dtype(self.dtype)
        _check_choice("pooling", self.pooling, Pooling)
        _check_choice("norm", self.norm, Norm)
        _check_choice("spatial", self.spatial, Spatial)
        _check_choice("head_init", self.head_init, HeadInit)
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
            pool = _max_pool if self.pooling == "max" else None
            norm = norm_layer(self.norm, scale=self.scale, groups=self.groups, dtype=self.dtype)
            x = norm(x, train=train, pool=pool, mask=mask)
            if self.context and block == 2:
                context = self.param("context", nn.initializers.zeros_init(), (self.context,), jnp.float32)
                factor, shift = nn.Dense(2 * self.features, dtype=self.dtype, name="film")(context[None]).reshape(2, -1)
                x = x * _last(1 + factor, x) + _last(shift, x)
            x = nn.relu(x)
        x = x.mean(axis=(1, 2)) if self.spatial == "mean" else x.reshape(x.shape[0], -1)
        if self.outputs is not None:
            start = nn.initializers.zeros_init() if self.head_init == "zeros" else nn.initializers.lecun_normal()
            x = nn.Dense(self.outputs, dtype=self.dtype, name="head", kernel_init=start)(x)
        return _at_least_float32(x)


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
