"""Trajectories, collected inside the compiled program."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Key, PyTree

from jmeta.core import Keys, Params, State, Task, keys_of
from jmeta.rl.environment import Environment
from jmeta.tree import widened


class Previous(NamedTuple):
    """What happened before an observation, for policies with a memory.

    Args:
        action: encoded, `[features]`; 0 before the first action.
        reward: of that action.
        done: 1 at the first observation of every episode but the first, 0 elsewhere.
    """

    action: Float[Array, "features"]
    reward: Float[Array, ""]
    done: Float[Array, ""]


class Trajectory(NamedTuple):
    """One episode of T = horizon steps; a batch of them has leading axes.

    Args:
        observations: `[T, ...]`, before each action; of the environment's own structure.
        actions: `[T]` or `[T, size]`.
        rewards: `[T]`, of each action; 0 after the end.
        alive: `[T]`, whether the episode had not ended before the step; the rest is padding.
        outputs: `[T, outputs]`, of the policy that acted.
        previous: `Previous` of `[T, ...]`.
        last: `[...]`, the observation after the last step. Default: none, of an episode that ended.
        ended: `[]`, whether the environment ended, so that nothing follows; false where a limit of time cut it.
    """

    observations: PyTree
    actions: Array
    rewards: Float[Array, "*batch T"]
    alive: Bool[Array, "*batch T"]
    outputs: Float[Array, "*batch T outputs"]
    previous: Previous
    last: PyTree = ()
    ended: PyTree = ()


Policy = Callable[[PyTree, PyTree, Previous], tuple[PyTree, Array]]


def rollout(
    key: Key[Array, ""], environment: Environment, policy: Policy, carry: PyTree, previous: Previous | None = None
) -> tuple[tuple[PyTree, Previous], Trajectory]:
    """One episode of a policy in an environment, as one scan over the horizon.

    Args:
        key: the same key gives the same episode.
        environment: with the parameters of one task.
        policy: `(carry, observation, previous) -> (carry, outputs)`, outputs as the action space wants them.
        carry: the policy's memory at the start, `()` for a policy without.
        previous: what happened before the episode; default: nothing.

    Returns:
        `((carry, previous), trajectory)`. After `done` nothing changes any more: state, observation and memory are
        kept, rewards are 0 and `alive` is false. Without `done`, `ended` tells what the horizon is: that of the task
        (`environment.finite`), or a limit of time.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jmeta.rl import navigation, rollout
        >>> straight = lambda carry, observation, previous: (carry, jnp.asarray([1.0, 0.0, -9.0, -9.0]))
        >>> room = navigation.environment(goal=jnp.asarray([0.5, 0.0]))
        >>> _, trajectory = rollout(jax.random.key(0), room, straight, ())
        >>> trajectory.observations[:3, 0].round(1).tolist()
        [0.0, 0.10000000149011612, 0.20000000298023224]
    """
    noise_key, reset_key, step_key = jax.random.split(key, 3)
    space, horizon = environment.actions, environment.horizon
    xs = (space.noise(noise_key, horizon), jax.random.split(step_key, horizon))
    observation, state = environment.reset(reset_key, environment.params)
    if previous is None:
        previous = nothing_before(environment)

    def step(now: Any, x: Any) -> tuple[Any, Trajectory]:
        noise, key = x
        alive, state, observation, carry, previous = now
        next_carry, outputs = policy(carry, observation, previous)
        outputs = widened(outputs)
        action = space.sample(outputs, noise)
        next_observation, next_state, reward, done, _ = environment.step(
            key, state, space.execute(action), environment.params
        )
        reward = jnp.where(alive, reward, jnp.zeros_like(reward)).astype(previous.reward.dtype)
        row = Trajectory(observation, action, reward, alive, outputs, previous)
        happened = Previous(space.encode(action).astype(previous.action.dtype), reward, jnp.zeros_like(reward))
        going = (alive & ~done, next_state, next_observation, next_carry, happened)
        # the episode stands still after its end, so that padding is finite and the memory is that of its last step
        ended = (jnp.zeros_like(alive), state, observation, carry, previous)
        return jax.tree.map(lambda a, b: jnp.where(alive, a.astype(b.dtype), b), going, ended), row

    start = (jnp.asarray(True), *jax.tree.map(jnp.asarray, (state, observation)), carry, previous)
    (alive, _, observation, carry, last), trajectory = lax.scan(step, start, xs)
    ended = jnp.ones_like(alive) if environment.finite else ~alive
    trajectory = trajectory._replace(last=observation, ended=ended)
    return (carry, last._replace(done=jnp.ones_like(last.done))), trajectory


def collect(key: Key[Array, ""], environment: Environment, policy: Policy, episodes: int) -> Trajectory:
    """Independent episodes of a policy without memory.

    Args:
        key: the same key gives the same episodes.
        environment: with the parameters of one task.
        policy: `(carry, observation, previous) -> (carry, outputs)`, with `()` as the carry.
        episodes: how many.

    Returns:
        A batch of trajectories, `[episodes, T]`.

    Example:
        >>> import jax
        >>> from jmeta.rl import collect, navigation
        >>> act = lambda carry, observation, previous: (carry, jax.numpy.zeros(4))
        >>> collect(jax.random.key(0), navigation.environment(), act, 20).rewards.shape
        (20, 100)
    """
    return jax.vmap(lambda key: rollout(key, environment, policy, ())[1])(jax.random.split(key, episodes))


def answer_queries(
    key: Key[Array, ""], environments: Environment, policy: Policy, carry: PyTree, previous: Previous | None = None
) -> Trajectory:
    """The `predict` of a learner that acts: one episode in each environment, `[queries, T]`, all from one memory."""
    keys = jax.random.split(key, len(jax.tree.leaves(environments)[0]))
    return jax.vmap(lambda key, one: rollout(key, one, policy, carry, previous)[1])(keys, environments)


def for_each_task(
    one_task: Callable[[Key[Array, ""], Params, State, Task], PyTree],
) -> Callable[[Keys, Params, State, Task], PyTree]:
    """What a learner collects for a batch of tasks, from what it collects for one: constants of the objective."""

    def collect(key: Keys, params: Params, state: State, tasks: Task) -> PyTree:
        of_each = jax.vmap(one_task, (0, None, None, 0))
        return lax.stop_gradient(of_each(keys_of(key, tasks), params, state, tasks))

    return collect


def nothing_before(environment: Environment) -> Previous:
    """`Previous` at the start of a trial: zeros."""
    return Previous(jnp.zeros(environment.actions.features), jnp.zeros(()), jnp.zeros(()))


def returns(trajectory: Trajectory) -> Float[Array, "*batch"]:
    """The sum of the rewards of each episode, without discount."""
    return trajectory.rewards.sum(axis=-1)


def mean_return(outputs: Trajectory, targets: PyTree) -> Float[Array, ""]:
    """The mean over the query episodes of their returns: the metric of reinforcement learning for `jmeta.evaluate`.

    Args:
        outputs: `[queries, T]`, an episode for each query, as `predict` of a reinforcement learner gives them.
        targets: not used.

    Returns:
        The mean return.

    Example:
        >>> import jax, jmeta
        >>> from jmeta.rl import collect, navigation
        >>> still = lambda carry, observation, previous: (carry, jax.numpy.asarray([0.0, 0.0, -99.0, -99.0]))
        >>> room = navigation.environment(goal=jax.numpy.asarray([0.5, 0.0]), horizon=10)
        >>> float(jmeta.mean_return(collect(jax.random.key(0), room, still, 2), ()))
        -5.0
    """
    return returns(outputs).mean()
