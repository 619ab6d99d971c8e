"""Environments of other libraries in JAX: gymnax, Craftax, Brax, MuJoCo Playground, XLand-MiniGrid and navix."""

import copy
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, PyTree

from jmeta.errors import ConfigError
from jmeta.rl.environment import Environment
from jmeta.rl.spaces import Box, Discrete, Space


def from_gymnax(environment: Any, params: PyTree = None, *, horizon: int | None = None) -> Environment:
    """Any gymnax environment, one of Craftax, or another with its `reset_env`, `step_env` and `action_space`.

    Args:
        environment: as `gymnax.make(name)[0]` gives.
        params: its parameters; default `environment.default_params`.
        horizon: steps of an episode; default, and most, `params.max_steps_in_episode` (`max_timesteps`).

    Returns:
        The environment, without gymnax's automatic reset. Its tasks differ in fields of `params`, for example
        `params.replace(length=...)`.

    Raises:
        ConfigError: an action space that is neither discrete nor a box of one dimension with the same finite bounds, or
            a horizon that the environment does not have.

    Example:
        >>> from jmeta.rl import from_gymnax  # doctest: +SKIP
        >>> environment = from_gymnax(gymnax.make("CartPole-v1")[0])  # doctest: +SKIP

    Reference: Lange 2022, gymnax, https://github.com/RobertTLange/gymnax.
    """
    params = environment.default_params if params is None else params
    longest = getattr(params, "max_steps_in_episode", getattr(params, "max_timesteps", None))
    horizon = length_of(horizon, None if longest is None else int(longest))

    def reset(key: Key[Array, ""], params: PyTree) -> tuple[Array, PyTree]:
        first: tuple[Array, PyTree] = _called(lambda: environment.reset_env(key, params))
        return first

    def step(key: Key[Array, ""], state: PyTree, action: Array, params: PyTree) -> Any:
        return _called(lambda: environment.step_env(key, state, action, params))

    return Environment(
        jax.tree.map(jnp.asarray, params), reset, step, space_of(environment.action_space(params)), horizon
    )


def from_brax(
    environment: Any,
    params: PyTree = None,
    *,
    reward: Callable[[Any, Array, PyTree], Array] | None = None,
    body: Callable[[Any, PyTree], Any] | None = None,
    horizon: int = 200,
) -> Environment:
    """A robot of Brax, whose tasks differ in what is rewarded or in its body.

    Args:
        environment: as `brax.envs.get_environment(name, backend="spring")` gives, or `load(name)` of the registry of
            MuJoCo Playground.
        params: the parameters of a task; default none.
        reward: `(state, action, params) -> reward`, with the state after the step, whose `metrics` of Brax have
            `x_velocity`; default: the reward of the environment.
        body: `(system, params) -> system`, the robot of a task, as `system.tree_replace({"opt.timestep": ...})` makes
            one; default: that of the environment.
        horizon: steps of an episode.

    Returns:
        The environment, without Brax's automatic reset; actions are in [−1, 1].

    Example:
        >>> from jmeta.rl import from_brax  # doctest: +SKIP
        >>> environment = from_brax(brax.envs.get_environment("halfcheetah", backend="spring"))  # doctest: +SKIP

    Reference: Freeman et al. 2021, "Brax - A Differentiable Physics Engine for Large Scale Rigid Body Simulation",
    https://github.com/google/brax.
    """

    def robot(params: PyTree) -> Any:
        if body is None:
            return environment
        changed = copy.copy(environment.unwrapped)
        changed.sys = body(changed.sys, params)
        return changed

    def reset(key: Key[Array, ""], params: PyTree) -> tuple[Array, PyTree]:
        state = _called(lambda: robot(params).reset(key))
        return state.obs, state

    def step(key: Key[Array, ""], state: Any, action: Array, params: PyTree) -> Any:
        before = state.replace(metrics=dict(state.metrics))  # which Brax changes in place
        action = jnp.clip(action, -1.0, 1.0)
        state = _called(lambda: robot(params).step(before, action))
        value = state.reward if reward is None else reward(state, action, params)
        return state.obs, state, value, state.done > 0, {}

    return Environment(() if params is None else params, reset, step, Box(int(environment.action_size)), horizon)


def from_xland(environment: Any, params: PyTree, *, horizon: int | None = None) -> Environment:
    """A grid world of XLand-MiniGrid, whose tasks differ in their rules and goals.

    Args:
        environment: as `xminigrid.make(name)` gives, with its parameters.
        params: those, as `params.replace(ruleset=benchmark.sample_ruleset(key))`.
        horizon: steps of an episode; default, and most, `params.max_steps`.

    Returns:
        The environment; its parameters are the arrays of `params`, the rules.

    Raises:
        ConfigError: a horizon that the environment does not have.

    Example:
        >>> import xminigrid  # doctest: +SKIP
        >>> from jmeta.rl import from_xland  # doctest: +SKIP
        >>> environment = from_xland(*xminigrid.make("XLand-MiniGrid-R1-9x9"))  # doctest: +SKIP

    Reference: Nikulin et al. 2023, "XLand-MiniGrid: Scalable Meta-Reinforcement Learning Environments in JAX".
    """

    def reset(key: Key[Array, ""], params: PyTree) -> tuple[Array, PyTree]:
        # arrays of bits, which a scan can carry past the end of an episode
        now = _called(lambda: environment.reset(params, jax.random.key_data(key)))
        return now.observation, now

    def step(key: Key[Array, ""], state: Any, action: Array, params: PyTree) -> Any:
        now = _called(lambda: environment.step(params, state, action))
        return now.observation, now, now.reward, now.last() & (now.discount == 0), {}

    return Environment(
        params, reset, step, Discrete(environment.num_actions(params)), length_of(horizon, int(params.max_steps))
    )


def from_navix(environment: Any, *, horizon: int | None = None) -> Environment:
    """A grid world of navix, whose tasks are its levels.

    Args:
        environment: as `navix.make(name)` gives (`pip install navix tfp-nightly`).
        horizon: steps of an episode; default, and most, `environment.max_steps`.

    Returns:
        The environment; its parameter is an integer, the seed of the level that every episode of a task begins in.

    Raises:
        ConfigError: a horizon that the environment does not have.

    Example:
        >>> import jax, navix  # doctest: +SKIP
        >>> from jmeta.rl import environment_tasks, from_navix  # doctest: +SKIP
        >>> maze = from_navix(navix.make("Navix-FourRooms-v0"))  # doctest: +SKIP
        >>> source = environment_tasks(maze, lambda key: jax.random.randint(key, (), 0, 1000))  # doctest: +SKIP

    Reference: Pignatelli et al. 2024, "NAVIX: Scaling MiniGrid Environments with JAX".
    """

    def reset(key: Key[Array, ""], level: Array) -> tuple[Array, PyTree]:
        now = _called(lambda: environment.reset(jax.random.PRNGKey(level)))
        return now.observation, now

    def step(key: Key[Array, ""], state: Any, action: Array, level: Array) -> Any:
        now = _called(lambda: environment.step(state, action))
        return now.observation, now, now.reward, now.is_termination(), {}

    actions, steps = Discrete(len(environment.action_set)), length_of(horizon, int(environment.max_steps))
    return Environment(jnp.zeros((), jnp.int32), reset, step, actions, steps)


def length_of(horizon: int | None, longest: int | None) -> int:
    """The steps of an episode of an environment.

    Args:
        horizon: as many are wanted; None for all.
        longest: as many as the environment has; None where it does not say.

    Returns:
        The steps.

    Raises:
        ConfigError: neither is told, or more are wanted than there are.

    Example:
        >>> from jmeta.rl.adapters import length_of
        >>> length_of(None, 200), length_of(100, 200)
        (200, 100)
    """
    steps = longest if horizon is None else horizon
    if steps is None:
        raise ConfigError("the environment does not say how long its episodes are; give horizon=.")
    if longest is not None and steps > longest:
        raise ConfigError(f"horizon is {steps}, and the environment ends after {longest} steps; give at most that.")
    return int(steps)


def _called(function: Callable[[], PyTree]) -> Any:
    """What another library gives, which may mix dtypes and ranks, as arrays of a dtype of their own.

    A scan can carry those, and no Python numbers.
    """
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return jax.tree.map(lambda x: jax.lax.convert_element_type(x, jnp.asarray(x).dtype), function())


def space_of(space: Any) -> Space:
    """The action space of gymnax or gymnasium as one of jmeta.

    Args:
        space: discrete, or a box.

    Returns:
        The space.

    Raises:
        ConfigError: it is neither discrete nor a box of one dimension with the same finite bounds.

    Example:
        >>> from types import SimpleNamespace
        >>> from jmeta.rl.adapters import space_of
        >>> space_of(SimpleNamespace(n=4))
        Discrete(n=4)
    """
    if hasattr(space, "n"):
        return Discrete(int(space.n))
    shape = getattr(space, "shape", None)
    bounds = [set(jnp.ravel(jnp.asarray(getattr(space, name, jnp.nan))).tolist()) for name in ("low", "high")]
    if shape is None or len(shape) != 1 or any(len(values) != 1 for values in bounds):
        raise ConfigError(f"the action space {space} is neither discrete nor a flat box with one pair of bounds.")
    (low,), (high,) = bounds
    return Box(int(shape[0]), low, high)
