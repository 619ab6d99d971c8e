"""Multi-armed bandits whose arms are drawn anew for each task."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jmeta.core import TaskSource
from jmeta.errors import ConfigError
from jmeta.rl.environment import Environment, Step, environment_tasks
from jmeta.rl.spaces import Discrete


def _reset(key: Key[Array, ""], params: Float[Array, "arms"]) -> tuple[Array, Array]:
    return jnp.zeros(1), jnp.zeros(())


def _bernoulli(
    key: Key[Array, ""], state: Array, action: Array, params: Float[Array, "arms"]
) -> tuple[Array, Array, Array, Array, dict[str, Array]]:
    reward = jax.random.bernoulli(key, params[action]).astype(params.dtype)
    return jnp.zeros(1), state, reward, jnp.asarray(False), {}


def _gaussian(
    key: Key[Array, ""], state: Array, action: Array, params: Float[Array, "arms"]
) -> tuple[Array, Array, Array, Array, dict[str, Array]]:
    reward = params[action] + jax.random.normal(key, (), params.dtype)
    return jnp.zeros(1), state, reward, jnp.asarray(False), {}


def _uniform_arms(key: Key[Array, ""], arms: int) -> Float[Array, "arms"]:
    return jax.random.uniform(key, (arms,))


def _normal_arms(key: Key[Array, ""], arms: int) -> Float[Array, "arms"]:
    return jax.random.normal(key, (arms,))


def bandit(*, arms: int = 5, pulls: int = 10, queries: int = 20) -> TaskSource:
    """Bernoulli bandits: arm k pays 1 with probability pₖ and else 0; each task draws pₖ from U[0, 1].

    An episode is `pulls` pulls, and its observation says nothing: a policy with a memory knows what it did and got.

    Args:
        arms: number of arms.
        pulls: of an episode.
        queries: fresh episodes that measure the return.

    Returns:
        A source of tasks whose `support` is an `Environment` with the probabilities `[arms]` as its parameters.

    Raises:
        ConfigError: no arm, no pull or no query.

    Example:
        >>> import jax
        >>> from jmeta.rl import bandit
        >>> source = bandit(arms=3)
        >>> source.sample(jax.random.key(0), source.data).support.params.shape
        (3,)

    Reference: Duan et al. 2016, "RL²: Fast Reinforcement Learning via Slow Reinforcement Learning", section 3.1,
    https://arxiv.org/abs/1611.02779.
    """
    return _bandit(_bernoulli, _uniform_arms, arms, pulls, queries)


def gaussian_bandit(*, arms: int = 5, pulls: int = 10, queries: int = 20) -> TaskSource:
    """Gaussian bandits: arm k pays N(μₖ, 1); each task draws μₖ from N(0, 1).

    Args:
        arms: number of arms.
        pulls: of an episode.
        queries: fresh episodes that measure the return.

    Returns:
        A source of tasks whose `support` is an `Environment` with the means `[arms]` as its parameters.

    Raises:
        ConfigError: no arm, no pull or no query.

    Example:
        >>> import jax
        >>> from jmeta.rl import gaussian_bandit
        >>> source = gaussian_bandit(arms=3)
        >>> source.sample(jax.random.key(0), source.data).support.params.shape
        (3,)

    Reference: Wang et al. 2016, "Learning to Reinforcement Learn", section 3.1, https://arxiv.org/abs/1611.05763.

    Differences from the paper: independent arms with normal means, where it has Bernoulli arms, some of them dependent.
    """
    return _bandit(_gaussian, _normal_arms, arms, pulls, queries)


def _bandit(step: Step, draw: Callable[..., Array], arms: int, pulls: int, queries: int) -> TaskSource:
    if arms < 1:
        raise ConfigError(f"arms is {arms}; give at least 1.")
    environment = Environment(jnp.zeros(arms), _reset, step, Discrete(arms), pulls, finite=True)
    return environment_tasks(
        environment,
        partial(draw, arms=arms),
        queries=queries,
        protocol={"arms": arms},
    )
