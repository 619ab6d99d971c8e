"""RL² (Duan et al. 2016): a recurrent policy whose memory is what it learned about the task."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from jmeta.core import Adapted, Info, Keys, MetaLearner, Model, Params, State, Task, check_model, over_tasks
from jmeta.devices import total
from jmeta.errors import ConfigError
from jmeta.hyperparameters import Number
from jmeta.rl.environment import Environment
from jmeta.rl.policies import Recurrent
from jmeta.rl.policy_gradients import generalized_advantage, moments, ppo, step_mean
from jmeta.rl.rollout import Previous, Trajectory, answer_queries, for_each_task, returns


class Trial(NamedTuple):
    """The episodes of one trial, one after the other, and what PPO compares them with."""

    environment: Environment
    steps: Trajectory
    advantages: Float[Array, "*batch steps"]
    targets: Float[Array, "*batch steps"]


def rl2(
    model: Model,
    *,
    inner_steps: int = 1,
    discount: Number = 0.99,
    trace: Number = 0.95,
    clip: Number = 0.2,
    entropy: Number = 0.01,
    value_weight: float = 5.0,
) -> MetaLearner:
    """RL²: a recurrent policy keeps its memory over the episodes of a trial; learning a task is running it.

    A trial is `inner_steps + 1` episodes in one environment. The policy sees its last action, its reward and whether an
    episode began, and θ is trained by PPO on the rewards of whole trials, with gradients through the memory. `adapt`
    runs the first `inner_steps` episodes, and `predict` answers each query by one more episode from there, a
    `Trajectory`.

    Args:
        model: `(memory, features) -> (memory, outputs)`, as `jmeta.linen(jmeta.rl.RecurrentPolicy(actions))` gives;
            the last output is the value per step of the horizon. None as memory stands for its start.
        inner_steps: episodes before the one that counts at evaluation; with 0 that is the whole trial, as for bandits.
        discount: γ, over the whole trial.
        trace: λ of the generalized advantage.
        clip: ε of PPO.
        entropy: weight of the entropy of the policy, a mean over steps.
        value_weight: weight of ½ (V − target)², a mean over steps; V and target per step of the horizon.

    Returns:
        The learner. `Adapted.params` is `(θ, memory, previous)`. Its objective is less the return of the trial, and
        `info` has `return`, `kl` to the policy that acted, and `entropy`. For the epochs of PPO give `jmeta.fit` the
        optimiser `jmeta.repeated(optax.adam(...), times)`.

    Raises:
        ConfigError: a negative `inner_steps`.
        ModelError: `model` is no `Model`; from `init` and `fit`, its outputs do not fit the action space.

    Example:
        >>> import jax, jmeta
        >>> from jmeta.rl import Discrete, bandit
        >>> learner = jmeta.rl2(jmeta.linen(jmeta.rl.RecurrentPolicy(Discrete(5))), inner_steps=0)
        >>> fitted = jmeta.fit(jax.random.key(0), learner, bandit(), steps=2, tasks=4)

    Reference: Duan et al. 2016, "RL²: Fast Reinforcement Learning via Slow Reinforcement Learning",
    https://arxiv.org/abs/1611.02779; Wang et al. 2016, "Learning to Reinforcement Learn".

    Differences from the paper: PPO where it has TRPO, a value that is a second head of the policy, and one trial of a
    task a step.
    """
    check_model(model)
    if inner_steps < 0:
        raise ConfigError(f"inner_steps is {inner_steps}; give 0 or more episodes.")

    network = Recurrent(model)

    def adapt(key: Key[Array, ""], params: Params, state: State, support: Environment) -> Adapted:
        (memory, previous), episodes = network.trial(key, params, state, support, inner_steps)
        return Adapted((params, memory, previous), state, {"support_returns": returns(episodes)})

    def predict(key: Key[Array, ""], adapted: Adapted, inputs: Environment) -> Trajectory:
        params, memory, previous = adapted.params
        model_key, key = jax.random.split(key)
        return answer_queries(key, inputs, network.policy(model_key, params, adapted.state), memory, previous)

    def one_trial(key: Key[Array, ""], params: Params, state: State, task: Task) -> Trial:
        environment = task.support
        _, episodes = network.trial(key, params, state, environment, inner_steps + 1)
        steps = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), episodes._replace(last=(), ended=()))
        last, ended = jax.tree.map(lambda x: x[-1], (episodes.last, episodes.ended))
        longer = _extended(environment, steps, last)
        values = environment.horizon * network.outputs(key, params, state, longer)[:, -1]
        values, beyond = values[:-1], jnp.where(ended, 0.0, values[-1])
        advantages = generalized_advantage(steps.rewards, values, steps.alive, discount, trace, beyond)
        return Trial(environment, steps, advantages, advantages + values)

    def collect(key: Keys, params: Params, state: State, tasks: Task) -> Task:
        trials = for_each_task(one_trial)(key, params, state, tasks)
        mean, deviation = moments(trials.advantages, trials.steps.alive, total)
        return Task((), trials._replace(advantages=(trials.advantages - mean) / (deviation + 1e-8)))

    def one_task(
        key: Key[Array, ""], params: Params, state: State, task: Task
    ) -> tuple[Float[Array, ""], tuple[State, Info]]:
        environment, steps, advantages, targets = task.query
        both = network.outputs(key, params, state, steps)
        outputs, values = both[:, :-1], both[:, -1]
        loss, info = ppo(environment.actions, outputs, steps, advantages, clip=clip, entropy=entropy)
        # in units of the horizon, so that the size of returns does not drown the gradient of the policy
        error = step_mean(0.5 * jnp.square(values - targets / environment.horizon), steps.alive)
        return loss + value_weight * error, (state, {"return": returns(steps), "value_error": error, **info})

    return MetaLearner(network.init, adapt, predict, over_tasks(one_task), collect)


def _extended(environment: Environment, steps: Trajectory, last: PyTree) -> Trajectory:
    """A trial and the observation after it, as one step more, of which the value is asked."""
    action, reward = environment.actions.encode(steps.actions[-1]), steps.rewards[-1]
    before = Previous(action.astype(steps.previous.action.dtype), reward, jnp.zeros_like(reward))
    trial = (steps.observations, steps.previous, steps.alive)
    longer = jax.tree.map(lambda x, y: jnp.concatenate([x, y[None]]), trial, (last, before, jnp.asarray(True)))
    return steps._replace(observations=longer[0], previous=longer[1], alive=longer[2])
