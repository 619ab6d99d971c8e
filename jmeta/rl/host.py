"""Environments of gymnasium, which are not written in JAX, through a callback to the host."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from jmeta.errors import ConfigError
from jmeta.rl.adapters import length_of, space_of
from jmeta.rl.environment import Environment

KEPT = 10_000  # ended episodes, whose last observation is asked for until the horizon
TASKS = 100  # whose environments wait for their next episode


def from_gymnasium(make: Callable[[PyTree], Any], params: PyTree = None, *, horizon: int | None = None) -> Environment:
    """A gymnasium environment, for those who have none in JAX; slow.

    Every step leaves the compiled program for Python, which steps one environment after the other. Learners and
    evaluation take it as any other.

    Args:
        make: `params -> gymnasium.Env`, the environment of a task; called with NumPy arrays, once for each episode that
            runs at a time.
        params: the parameters of a task; default none, `()`.
        horizon: steps of an episode; default that of the environment's `spec`.

    Returns:
        The environment. An episode ends where gymnasium's is terminated; observations are flat float32.

    Raises:
        ConfigError: an observation space that is no box, an action space that is neither discrete nor a box of one
            dimension with the same finite bounds, no horizon, or one that the environment does not have.

    Example:
        >>> import gymnasium, jax.numpy as jnp  # doctest: +SKIP
        >>> from jmeta.rl import from_gymnasium  # doctest: +SKIP
        >>> make = lambda gravity: gymnasium.make("Pendulum-v1", g=float(gravity))  # doctest: +SKIP
        >>> pendulum = from_gymnasium(make, jnp.asarray(10.0))  # doctest: +SKIP

    Reference: Towers et al. 2024, "Gymnasium: A Standard Interface for Reinforcement Learning Environments".
    """
    params = () if params is None else jax.tree.map(jnp.asarray, params)
    first = make(jax.tree.map(np.asarray, params))
    shape = getattr(first.observation_space, "shape", None)
    if not shape or hasattr(first.observation_space, "n"):
        raise ConfigError(
            f"the observation space {first.observation_space} is no box; wrap the environment in gymnasium's "
            "FlattenObservation."
        )
    longest = getattr(first.spec, "max_episode_steps", None)
    steps = length_of(horizon, longest)
    actions, host = space_of(first.action_space), _Host(make, steps)
    observed = jax.ShapeDtypeStruct((int(np.prod(shape)),), jnp.float32)
    number = jax.ShapeDtypeStruct((), jnp.int32)

    def reset(key: Key[Array, ""], params: PyTree) -> tuple[Array, Any]:
        seed = jax.random.bits(key, (), jnp.uint32)
        observation, episode = jax.pure_callback(
            host.reset, (observed, number), seed, params, vmap_method="broadcast_all"
        )
        return observation, (episode, jnp.zeros((), jnp.int32))

    def step(key: Key[Array, ""], state: Any, action: Array, params: PyTree) -> Any:
        episode, time = state
        reward, done = jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((), jnp.bool_)
        observation, reward, done = jax.pure_callback(
            host.step, (observed, reward, done), episode, time, action, vmap_method="broadcast_all"
        )
        return observation, (episode, time + 1), reward, done, {}

    return Environment(params, reset, step, actions, steps)


@dataclass
class _Episode:
    """One that runs, or has ended: then it has no environment any more."""

    environment: Any
    task: bytes
    last: Float[np.ndarray, "features"]
    time: int = 0


class _Host:
    """The environments that run, by the number of their episode, and those that are free, by their task."""

    def __init__(self, make: Callable[[PyTree], Any], horizon: int) -> None:
        self.make, self.horizon, self.count = make, horizon, 0
        self.running: OrderedDict[int, _Episode] = OrderedDict()
        self.free: OrderedDict[bytes, list[Any]] = OrderedDict()

    def reset(self, seed: Any, params: PyTree) -> Any:
        """Seeds `[*batch]` and tasks `[*batch, ...]` to observations `[*batch, features]` and numbers `[*batch]`."""
        seeds = np.asarray(seed)
        leaves, tree = jax.tree.flatten(jax.tree.map(np.asarray, params))
        observations, episodes = [], np.zeros(seeds.shape, np.int32)
        for i in np.ndindex(seeds.shape):
            mine = [leaf[i] for leaf in leaves]
            task = b"".join(np.asarray(leaf).tobytes() for leaf in mine)
            free = self.free.get(task)
            one = free.pop() if free else self.make(jax.tree.unflatten(tree, mine))
            observation = _flat(one.reset(seed=int(seeds[i]))[0])
            self.count = (self.count + 1) % 2**31
            self.running[self.count] = _Episode(one, task, observation)
            oldest = next(iter(self.running))
            if len(self.running) > KEPT and self.running[oldest].environment is None:
                del self.running[oldest]
            observations.append(observation)
            episodes[i] = self.count
        return np.stack(observations).reshape(*seeds.shape, -1), episodes

    def step(self, episode: Any, time: Any, action: Any) -> Any:
        """Numbers, times and actions, each `[*batch, ...]`, to observations, rewards and whether episodes ended."""
        episodes, times, actions = np.asarray(episode), np.asarray(time), np.asarray(action)
        observations = []
        rewards, done = np.zeros(episodes.shape, np.float32), np.zeros(episodes.shape, np.bool_)
        for i in np.ndindex(episodes.shape):
            run = self.running[int(episodes[i])]
            if run.environment is not None:
                if run.time != times[i]:
                    raise RuntimeError("two policies act in one episode, begun with one key; give each its own.")
                after, rewards[i], done[i], _, _ = run.environment.step(actions[i])
                run.time, run.last = run.time + 1, _flat(after)
                if done[i] or run.time == self.horizon:
                    self._release(run.task, run.environment)
                    run.environment = None
            observations.append(run.last)
        return np.stack(observations).reshape(*episodes.shape, -1), rewards, done

    def _release(self, task: bytes, environment: Any) -> None:
        """Keeps an environment for the next episode of its task; those of the tasks that were seen last."""
        self.free.setdefault(task, []).append(environment)
        self.free.move_to_end(task)
        if len(self.free) > TASKS:
            for old in self.free.popitem(last=False)[1]:
                old.close()


def _flat(observation: Any) -> Float[np.ndarray, "features"]:
    return np.asarray(observation, np.float32).reshape(-1)
