"""Environments of other libraries as `Environment`: gymnax and Brax."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, PyTree

from jmeta.errors import ConfigError
from jmeta.rl.environment import Environment
from jmeta.rl.spaces import Box, Discrete, Space


def from_gymnax(environment: Any, params: PyTree = None, *, horizon: int | None = None) -> Environment:
    """Any gymnax environment, or another object with its `reset_env`, `step_env` and `action_space`.

    Args:
        environment: as `gymnax.make(name)[0]` gives.
        params: its parameters; default `environment.default_params`.
        horizon: steps of an episode; default `params.max_steps_in_episode`.

    Returns:
        The environment, without gymnax's automatic reset. Its tasks differ in fields of `params`, for example
        `params.replace(length=...)`.

    Raises:
        ConfigError: an action space that is neither discrete nor a box of one dimension with the same finite bounds.

    Example:
        >>> from jmeta.rl import from_gymnax  # doctest: +SKIP
        >>> environment = from_gymnax(gymnax.make("CartPole-v1")[0])  # doctest: +SKIP

    Reference: Lange 2022, gymnax, https://github.com/RobertTLange/gymnax.
    """
    params = environment.default_params if params is None else params
    horizon = int(params.max_steps_in_episode) if horizon is None else horizon

    def reset(key: Key[Array, ""], params: PyTree) -> tuple[Array, PyTree]:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return _strong(environment.reset_env(key, params))

    def step(key: Key[Array, ""], state: PyTree, action: Array, params: PyTree) -> Any:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return _strong(environment.step_env(key, state, action, params))

    return Environment(
        jax.tree.map(jnp.asarray, params), reset, step, _space(environment.action_space(params)), horizon
    )


def from_brax(environment: Any, *, horizon: int = 200) -> Environment:
    """A Brax environment whose task is a target velocity: forward, backward, or as fast as the task says.

    Args:
        environment: as `brax.envs.get_environment(name)` gives, whose state's metrics have `x_velocity`.
        horizon: steps of an episode.

    Returns:
        The environment. Its parameter is the target velocity, a scalar; the reward is minus the absolute difference to
        it, less 0.05 times the squared action. Negative targets are backward.

    Example:
        >>> from jmeta.rl import from_brax  # doctest: +SKIP
        >>> environment = from_brax(brax.envs.get_environment("halfcheetah"))  # doctest: +SKIP

    Reference: Finn et al. 2017, section 5.3 (half-cheetah, goal velocity).
    """

    def reset(key: Key[Array, ""], params: Array) -> tuple[Array, PyTree]:
        state = environment.reset(key)
        return state.obs, state

    def step(key: Key[Array, ""], state: Any, action: Array, params: Array) -> Any:
        state = environment.step(state, jnp.clip(action, -1.0, 1.0))
        reward = -jnp.abs(state.metrics["x_velocity"] - params) - 0.05 * jnp.square(action).sum()
        return state.obs, state, reward, state.done > 0, {}

    return Environment(jnp.zeros(()), reset, step, Box(int(environment.action_size)), horizon)


def _strong(tree: PyTree) -> PyTree:
    """Leaves as arrays of a dtype of their own, which a scan can carry; Python numbers have none."""
    return jax.tree.map(lambda x: jax.lax.convert_element_type(x, jnp.asarray(x).dtype), tree)


def _space(space: Any) -> Space:
    if hasattr(space, "n"):
        return Discrete(int(space.n))
    shape = getattr(space, "shape", None)
    bounds = [set(jnp.ravel(jnp.asarray(getattr(space, name, jnp.nan))).tolist()) for name in ("low", "high")]
    if shape is None or len(shape) != 1 or any(len(values) != 1 for values in bounds):
        raise ConfigError(f"the action space {space} is neither discrete nor a flat box with one pair of bounds.")
    (low,), (high,) = bounds
    return Box(int(shape[0]), low, high)
