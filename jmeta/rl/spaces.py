"""Action spaces, each with the distribution of a policy over it."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jmeta.errors import ConfigError


@dataclass(frozen=True)
class Discrete:
    """Actions 0, ..., n − 1; the outputs of a policy are logits `[..., n]`.

    Args:
        n: number of actions.

    Raises:
        ConfigError: fewer than one action.

    Example:
        >>> import jax.numpy as jnp
        >>> from jmeta.rl import Discrete
        >>> float(Discrete(4).log_probability(jnp.zeros(4), jnp.asarray(2))).__round__(3)
        -1.386
    """

    n: int

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ConfigError(f"Discrete has {self.n} actions; give at least 1.")

    @property
    def outputs(self) -> int:
        """How many outputs a policy needs."""
        return self.n

    @property
    def features(self) -> int:
        """The width of `encode`."""
        return self.n

    def noise(self, key: Key[Array, ""], steps: int) -> Float[Array, "steps n"]:
        """Gumbel noise of `steps` actions, drawn at once because one long draw is faster than many short ones."""
        return jax.random.gumbel(key, (steps, self.n))

    def sample(self, outputs: Float[Array, "... n"], noise: Float[Array, "... n"]) -> Array:
        """The action that the noise picks, argmax(logits + Gumbel), distributed as softmax(logits)."""
        return jnp.argmax(outputs + noise.astype(outputs.dtype), axis=-1)

    def log_probability(self, outputs: Float[Array, "... n"], actions: Array) -> Float[Array, "..."]:
        """log π(a): an entry of log softmax(logits)."""
        return jnp.take_along_axis(jax.nn.log_softmax(outputs), actions[..., None], axis=-1)[..., 0]

    def entropy(self, outputs: Float[Array, "... n"]) -> Float[Array, "..."]:
        """−Σₐ π(a) log π(a)."""
        return -(jax.nn.softmax(outputs) * jax.nn.log_softmax(outputs)).sum(axis=-1)

    def kl(self, outputs: Float[Array, "... n"], others: Float[Array, "... n"]) -> Float[Array, "..."]:
        """KL(π of `outputs` ‖ π of `others`)."""
        difference = jax.nn.log_softmax(outputs) - jax.nn.log_softmax(others)
        return (jax.nn.softmax(outputs) * difference).sum(axis=-1)

    def encode(self, action: Array) -> Float[Array, "... n"]:
        """One-hot, as the input of a recurrent policy."""
        return jax.nn.one_hot(action, self.n)

    def execute(self, action: Array) -> Array:
        """What the environment gets."""
        return action


@dataclass(frozen=True)
class Box:
    """Actions in [low, high]^size; the outputs of a policy are mean and log standard deviation `[..., 2 size]`.

    The policy is a diagonal normal distribution in units in which [low, high] is [−1, 1]; an action beyond is left to
    the environment, which clips it, so that its probability is that of the normal distribution.

    Args:
        size: number of coordinates.
        low: lower bound of each coordinate.
        high: upper bound of each coordinate.

    Raises:
        ConfigError: no coordinate, or an upper bound that is not above the lower one.

    Example:
        >>> import jax.numpy as jnp
        >>> from jmeta.rl import Box
        >>> Box(2, -0.1, 0.1).execute(jnp.asarray([1.0, 0.0])).tolist()
        [0.10000000149011612, 0.0]
    """

    size: int
    low: float = -1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        check_bounds(self.low, self.high)
        if self.size < 1 or not -math.inf < self.low < self.high < math.inf:
            raise ConfigError(
                f"Box has {self.size} coordinates in [{self.low}, {self.high}]; give at least 1, between finite bounds."
            )

    @property
    def outputs(self) -> int:
        """How many outputs a policy needs."""
        return 2 * self.size

    @property
    def features(self) -> int:
        """The width of `encode`."""
        return self.size

    def noise(self, key: Key[Array, ""], steps: int) -> Float[Array, "steps size"]:
        """Normal noise of `steps` actions."""
        return jax.random.normal(key, (steps, self.size))

    def sample(self, outputs: Float[Array, "... outputs"], noise: Float[Array, "... size"]) -> Array:
        """mean + exp(log σ) · noise."""
        mean, log_σ = jnp.split(outputs, 2, axis=-1)
        return mean + jnp.exp(log_σ) * noise.astype(mean.dtype)

    def log_probability(self, outputs: Float[Array, "... outputs"], actions: Array) -> Float[Array, "..."]:
        """log of the normal density, summed over the coordinates."""
        mean, log_σ = jnp.split(outputs, 2, axis=-1)
        z = (actions - mean) * jnp.exp(-log_σ)
        return -(0.5 * jnp.square(z) + log_σ + 0.5 * math.log(2 * math.pi)).sum(axis=-1)

    def entropy(self, outputs: Float[Array, "... outputs"]) -> Float[Array, "..."]:
        """½ log(2πe σ²), summed over the coordinates."""
        _, log_σ = jnp.split(outputs, 2, axis=-1)
        return (log_σ + 0.5 * math.log(2 * math.pi * math.e)).sum(axis=-1)

    def kl(self, outputs: Float[Array, "... outputs"], others: Float[Array, "... outputs"]) -> Float[Array, "..."]:
        """KL(π of `outputs` ‖ π of `others`)."""
        (mean, log_σ), (other, other_log_σ) = (jnp.split(x, 2, axis=-1) for x in (outputs, others))
        ratio = jnp.exp(2 * (log_σ - other_log_σ))
        squares = jnp.square((mean - other) * jnp.exp(-other_log_σ))
        return (other_log_σ - log_σ + 0.5 * (ratio + squares - 1)).sum(axis=-1)

    def encode(self, action: Array) -> Float[Array, "... size"]:
        """The action itself, as the input of a recurrent policy."""
        return action

    def execute(self, action: Array) -> Array:
        """What the environment gets: the action in its own units."""
        return 0.5 * (self.high + self.low) + 0.5 * (self.high - self.low) * action


def check_bounds(low: Any, high: Any) -> None:
    """Raises `ConfigError` unless both bounds are one number for all coordinates."""
    if np.ndim(low) or np.ndim(high):
        raise ConfigError(
            f"the bounds of a Box have shapes {list(np.shape(low))} and {list(np.shape(high))}; give one number for "
            "all coordinates, and scale each in step."
        )


Space = Discrete | Box
