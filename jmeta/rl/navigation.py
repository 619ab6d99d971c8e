"""Point navigation in the plane, the first reinforcement learning experiment of MAML."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jmeta.core import TaskSource
from jmeta.rl.environment import Environment, environment_tasks
from jmeta.rl.spaces import Box


def _reset(key: Key[Array, ""], params: Float[Array, "2"]) -> tuple[Array, Array]:
    origin = jnp.zeros_like(params)
    return origin, origin


def _step(
    key: Key[Array, ""], state: Float[Array, "2"], action: Float[Array, "2"], params: Float[Array, "2"]
) -> tuple[Array, Array, Array, Array, dict[str, Array]]:
    position = state + jnp.clip(action, -0.1, 0.1)
    distance = jnp.linalg.norm(position - params)
    return position, position, -distance, distance < 0.01, {}


def environment(goal: Float[Array, "2"] | None = None, horizon: int = 100) -> Environment:
    """A point in the plane that starts at the origin and shall find a goal.

    Args:
        goal: `[2]`; default the origin.
        horizon: steps of an episode.

    Returns:
        The environment: the observation is the position, an action moves by at most 0.1 in each coordinate, the reward
        is minus the distance to the goal, and an episode ends within 0.01 of it.

    Example:
        >>> import jax.numpy as jnp
        >>> from jmeta.rl import navigation
        >>> navigation.environment(jnp.asarray([0.3, -0.2])).horizon
        100
    """
    goal = jnp.zeros(2) if goal is None else goal
    return Environment(goal, _reset, _step, Box(2, -0.1, 0.1), horizon, finite=True)


def _goal(key: Key[Array, ""]) -> Float[Array, "2"]:
    return jax.random.uniform(key, (2,), minval=-0.5, maxval=0.5)


def point_navigation(*, horizon: int = 100, queries: int = 20) -> TaskSource:
    """Two-dimensional navigation to a goal that is told by the reward alone.

    Each task draws its goal from U[−0.5, 0.5]². The observation is the position, an action moves by at most 0.1 in each
    coordinate, the reward is minus the distance to the goal, an episode ends within 0.01 of it or after 100 steps.

    Args:
        horizon: steps of an episode.
        queries: fresh episodes that measure the return of an adapted policy.

    Returns:
        A source of tasks whose `support` is an `Environment` with the goal `[2]` as its parameters.

    Raises:
        ConfigError: a horizon or queries below 1.

    Example:
        >>> import jax
        >>> from jmeta.rl import point_navigation
        >>> source = point_navigation()
        >>> source.sample(jax.random.key(0), source.data).support.params.shape
        (2,)

    Reference: Finn et al. 2017, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks", section 5.3.

    Differences from the authors' code: the goal is reached within a distance of 0.01, as the paper says, and not within
    0.01 in each coordinate.
    """
    return environment_tasks(environment(horizon=horizon), _goal, queries=queries)
