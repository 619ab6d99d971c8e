"""Tabular Markov decision processes, drawn at random for each task."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jmeta.core import TaskSource
from jmeta.errors import ConfigError
from jmeta.rl.environment import Environment, environment_tasks
from jmeta.rl.spaces import Discrete


class Tables(NamedTuple):
    """A Markov decision process as its tables.

    Args:
        transitions: p(s' | s, a), `[states, actions, states]`.
        rewards: the mean reward, `[states, actions]`.
    """

    transitions: Float[Array, "states actions states"]
    rewards: Float[Array, "states actions"]


def _observe(state: Int[Array, ""], params: Tables) -> Float[Array, "states"]:
    return jax.nn.one_hot(state, params.rewards.shape[0], dtype=params.rewards.dtype)


def _reset(key: Key[Array, ""], params: Tables) -> tuple[Array, Array]:
    state = jnp.zeros((), jnp.int32)
    return _observe(state, params), state


def _step(
    noise: float, key: Key[Array, ""], state: Int[Array, ""], action: Array, params: Tables
) -> tuple[Array, Array, Array, Array, dict[str, Array]]:
    state_key, reward_key = jax.random.split(key)
    reward = params.rewards[state, action]
    if noise:
        reward = reward + noise * jax.random.normal(reward_key, (), reward.dtype)
    state = jax.random.categorical(state_key, jnp.log(params.transitions[state, action])).astype(jnp.int32)
    return _observe(state, params), state, reward, jnp.asarray(False), {}


def tables(params: Tables, horizon: int = 10, noise: float = 0.0) -> Environment:
    """A Markov decision process from its tables; it starts in state 0, and the observation is the state, one-hot.

    Args:
        params: transitions and rewards.
        horizon: steps of an episode.
        noise: standard deviation of the normal noise of the rewards.

    Returns:
        The environment.

    Example:
        >>> import jax.numpy as jnp
        >>> from jmeta.rl import mdp
        >>> environment = mdp.tables(mdp.Tables(jnp.full((3, 2, 3), 1 / 3), jnp.zeros((3, 2))))
        >>> environment.actions.n
        2
    """
    return Environment(params, _reset, partial(_step, noise), Discrete(params.rewards.shape[1]), horizon, finite=True)


def _draw(key: Key[Array, ""], states: int, actions: int) -> Tables:
    transitions_key, rewards_key = jax.random.split(key)
    transitions = jax.random.dirichlet(transitions_key, jnp.ones(states), (states, actions))
    return Tables(transitions, 1 + jax.random.normal(rewards_key, (states, actions)))


def tabular_mdp(*, states: int = 10, actions: int = 5, horizon: int = 10, queries: int = 20) -> TaskSource:
    """Random Markov decision processes: p(· | s, a) from a flat Dirichlet, mean rewards from N(1, 1), noise N(0, 1).

    Args:
        states: number of states; an episode starts in the first.
        actions: number of actions.
        horizon: steps of an episode.
        queries: fresh episodes that measure the return.

    Returns:
        A source of tasks whose `support` is an `Environment` with `Tables` as its parameters.

    Raises:
        ConfigError: no state, action, step or query.

    Example:
        >>> import jax
        >>> from jmeta.rl import tabular_mdp
        >>> source = tabular_mdp()
        >>> source.sample(jax.random.key(0), source.data).support.params.rewards.shape
        (10, 5)

    Reference: Duan et al. 2016, "RL²", section 3.2.
    """
    if states < 1 or actions < 1:
        raise ConfigError(f"there are {states} states and {actions} actions; give at least 1 of each.")
    blank = Tables(jnp.full((states, actions, states), 1 / states), jnp.zeros((states, actions)))
    draw = partial(_draw, states=states, actions=actions)
    return environment_tasks(tables(blank, horizon, noise=1.0), draw, queries=queries)
