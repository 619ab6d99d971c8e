"""Normalisation layers: of a batch by a policy, and of each example by itself."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from jmeta.errors import ConfigError, ModelError
from jmeta.tree import widened

BatchNormPolicy = Literal["per_task", "running", "transductive"]
Norm = Literal["group", "layer", "per_task", "running", "transductive"]
Pool = Callable[[Array], Array]


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
        check_dtype(self.dtype)
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
        x, shape = widened(x), (x.shape[-1],)
        γ, β = _scale_and_shift(self, self.scale, shape, x.dtype)
        if self.policy != "transductive":
            # no gradient flows through the collection of moving averages, `jmeta.linen` sees to that
            kind = "batch_stats" if self.policy == "running" else "task_stats"
            mean = self.variable(kind, "mean", jnp.zeros, shape, x.dtype)
            variance = self.variable(kind, "var", jnp.ones, shape, x.dtype)
        if train or self.policy == "transductive":
            rows = x.reshape(1, -1, *shape, 1)
            weights = None
            if mask is not None:
                weights = jnp.repeat(mask.astype(x.dtype), rows.shape[1] // x.shape[0])
                weights = weights / jnp.maximum(weights.sum(), 1.0)
            μ, r = (a.reshape(shape) for a in _moments(rows, weights, self.epsilon))
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
        check_dtype(self.dtype)
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
        x, features = widened(x), x.shape[-1]
        if self.groups < 1 or features % self.groups:
            raise ModelError(f"{self.groups} groups do not divide {features} features; choose a divisor.")
        γ, β = _scale_and_shift(self, self.scale, (features,), x.dtype)
        grouped = x.reshape(x.shape[0], -1, self.groups, features // self.groups)
        moments = _moments(grouped, None, self.epsilon)
        each = x.shape[0], *(1 for _ in x.shape[1:-1]), features
        μ, r = (jnp.broadcast_to(a, (x.shape[0], 1, *grouped.shape[2:])).reshape(each) for a in moments)
        return _normalised(x, μ, r, γ, β, pool, self.dtype)


def norm_layer(
    norm: Norm,
    *,
    scale: bool = False,
    groups: int = 8,
    epsilon: float = 1e-3,
    dtype: DTypeLike | None = None,
    name: str | None = None,
) -> BatchNorm | GroupNorm:
    """The normalisation of a name: `"group"`, `"layer"` or a policy of `BatchNorm`.

    Args:
        norm: the name.
        scale: whether to learn a scale γ.
        groups: of `"group"`.
        epsilon: ε.
        dtype: of the result.
        name: of the layer in its module.

    Returns:
        A layer that is called with `(x, train=, pool=, mask=)`.

    Example:
        >>> from jmeta.models.norms import norm_layer
        >>> norm_layer("layer").groups
        1
    """
    if norm in get_args(BatchNormPolicy):
        return BatchNorm(norm, scale, epsilon, dtype=dtype, name=name)  # type: ignore[arg-type]
    return GroupNorm(1 if norm == "layer" else groups, scale, epsilon, dtype=dtype, name=name)


def _scale_and_shift(module: nn.Module, scale: bool, shape: tuple[int], dtype: Any) -> tuple[Array | None, Array]:
    β = module.param("bias", nn.initializers.zeros_init(), shape, dtype)
    return module.param("scale", nn.initializers.ones_init(), shape, dtype) if scale else None, β


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _moments(x: Array, weights: Array | None, ε: float) -> tuple[Array, Array]:
    """μ and r = 1 / √(σ² + ε) of `[batches, rows, groups, features]`, over the rows and the features of a group.

    dμ = E[dx] and dr = −r³ E[(x − μ) dx], which is all that a derivative of any order needs.
    """
    # One pass over x less than the mean of (x − μ)²; any shift near μ keeps it as exact.
    near = x[:, :1, :, :1]
    shifted = x - near
    first, second = _mean(shifted, weights), _mean(jnp.square(shifted), weights)
    σ2 = jnp.maximum(second - jnp.square(first), 0.0)
    return near + first, lax.rsqrt(σ2 + jnp.asarray(ε, x.dtype))


@_moments.defjvp
def _moments_jvp(ε: float, primals: Any, tangents: Any) -> Any:
    (x, weights), (ẋ, _) = primals, tangents
    μ, r = _moments(x, weights, ε)
    return (μ, r), (_mean(ẋ, weights), -(r**3) * _mean((x - μ) * ẋ, weights))


def _mean(x: Array, weights: Array | None) -> Array:
    """Over rows and features of `[batches, rows, groups, features]`; rows first, whose sums are those of vectors."""
    if weights is None and x.shape[3] == 1:  # two reductions are slow in forward over reverse
        return x.mean(axis=(1, 3), keepdims=True)
    rows = x.mean(axis=1, keepdims=True) if weights is None else jnp.einsum("r,brgf->bgf", weights, x)[:, None]
    return rows.mean(axis=3, keepdims=True)


def _normalised(
    x: Array, μ: Array, r: Array, γ: Array | None, β: Array, pool: Pool | None, dtype: DTypeLike | None
) -> Array:
    factor = r if γ is None else r * as_last(γ, r)
    shift = as_last(β, factor) - μ * factor
    if pool is not None:
        # max(a x + b) = |a| max(sign(a) x) + b, which leaves a quarter of the entries to normalise
        sign = jnp.where(factor < 0, -jnp.ones_like(factor), jnp.ones_like(factor))
        x, factor = pool(x * as_last(sign, x) if γ is not None else x), sign * factor
    y = x * as_last(factor, x) + as_last(shift, x)
    return y if dtype is None else y.astype(dtype)


def as_last(a: Array, x: Array) -> Array:
    """A vector of features as an array of the rank of x."""
    return a.reshape((1,) * (x.ndim - a.ndim) + a.shape)


def check_dtype(dtype: Any) -> None:
    """Refuses what is no float of 16 bits or more."""
    try:
        known = dtype is None or (jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits >= 16)
    except TypeError:  # no name of a dtype
        known = False
    if not known:
        name = dtype if isinstance(dtype, str) else getattr(dtype, "__name__", str(dtype))
        raise ConfigError(f"dtype is {name!r}; give 'bfloat16', 'float16' or 'float32'.")


def check_choice(name: str, value: str, choices: Any) -> None:
    """Refuses what is none of the words of a `Literal`."""
    if value not in get_args(choices):
        raise ConfigError(f"{name} is {value!r}; give {' or '.join(map(repr, get_args(choices)))}.")
