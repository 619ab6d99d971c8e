"""MAML for reinforcement learning (Finn et al. 2017), with the estimators that came after it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Key, PyTree

from jmeta.adjoint import exact
from jmeta.core import Adapted, Info, MetaLearner, Model, Params, State, Task, check_model, over_tasks
from jmeta.envs.environment import Environment
from jmeta.envs.rollout import Policy, Trajectory, collect, returns, rollout
from jmeta.errors import ConfigError, ModelError
from jmeta.inner import Adjoint, InnerProblem
from jmeta.policy_gradient import Credit, Estimator, clipped_surrogate, credit, promp, step_mean


class Experience(NamedTuple):
    """Episodes in an environment, and what their actions are credited with."""

    environment: Environment
    trajectories: Trajectory
    credit: Credit


def maml_rl(
    model: Model,
    *,
    inner_rate: float = 0.1,
    inner_steps: int = 1,
    estimator: Estimator = promp,
    adjoint: Adjoint = exact(),
    trajectories: int = 20,
    discount: float = 0.99,
    trace: float = 1.0,
    normalize: bool = True,
    clip: float = 0.2,
    entropy: float = 0.0,
) -> MetaLearner:
    check_model(model)
    if inner_steps < 0 or (inner_steps and not inner_rate > 0):
        raise ConfigError(f"inner_steps is {inner_steps} at an inner_rate of {inner_rate}; give 0 or more at a positive rate.")

    def policy(key: Key[Array, ""], params: Params, state: State) -> Policy:
        def act(carry: PyTree, observation: Array, previous: PyTree) -> tuple[PyTree, Array]:
            return carry, model.apply(key, params, state, observation[None], train=False)[0][0]

        return act

    def experience(key: Key[Array, ""], params: Params, state: State, environment: Environment) -> Experience:
        rollout_key, model_key = jax.random.split(key)
        # the estimators know how trajectories depend on θ; the environment is not differentiated
        params = lax.stop_gradient(params)
        episodes = collect(rollout_key, environment, policy(model_key, params, state), trajectories)
        return Experience(environment, episodes, credit(episodes, discount, trace, normalize))

    def outputs_of(key: Key[Array, ""], params: Params, state: State, episodes: Trajectory) -> Array:
        observations = episodes.observations.reshape(-1, *episodes.observations.shape[2:])
        outputs, _ = model.apply(key, params, state, observations, train=True)
        return outputs.reshape(episodes.outputs.shape)

    def inner_loss(key: Key[Array, ""], params: Params, state: State, support: Experience) -> tuple[Array, State]:
        environment, episodes, signals = support
        outputs = outputs_of(key, params, state, episodes)
        log_probabilities = environment.actions.log_probability(outputs, episodes.actions)
        return -estimator(log_probabilities, signals) / environment.horizon, state

    update = adjoint(InnerProblem(inner_loss, optax.sgd(inner_rate), num_steps=1))

    def practise(
        key: Key[Array, ""], params: Params, state: State, environment: Environment
    ) -> tuple[Params, list[Experience]]:
        supports = []
        for step_key in jax.random.split(key, inner_steps):
            collect_key, update_key = jax.random.split(step_key)
            supports.append(experience(collect_key, params, state, environment))
            params = update(update_key, params, state, supports[-1]).params
        return params, supports

    def init(key: Key[Array, ""], task: Task) -> tuple[Params, State]:
        environment = task.support
        observation = environment.reset(key, environment.params)[0][None]
        params, state = model.init(key, observation)
        outputs = jax.eval_shape(lambda: model.apply(key, params, state, observation, train=False)[0])
        if outputs.shape != (1, environment.actions.outputs):
            raise ModelError(
                f"the policy gives {outputs.shape[-1]} outputs where {environment.actions} needs "
                f"{environment.actions.outputs}; jmeta.models.Policy(actions) gives as many as its action space wants."
            )
        return params, state

    def adapt(key: Key[Array, ""], params: Params, state: State, support: Environment) -> Adapted:
        φ, supports = practise(key, params, state, support)
        info = {f"return_{k}": returns(one.trajectories).mean() for k, one in enumerate(supports)}
        return Adapted(φ, state, info)

    def predict(key: Key[Array, ""], adapted: Adapted, inputs: Environment) -> Float[Array, "queries"]:
        model_key, key = jax.random.split(key)
        act = policy(model_key, adapted.params, adapted.state)
        keys = jax.random.split(key, len(jax.tree.leaves(inputs)[0]))
        return returns(jax.vmap(lambda key, environment: rollout(key, environment, act, ())[1])(keys, inputs))

    def one_collect(key: Key[Array, ""], params: Params, state: State, task: Task) -> Task:
        practise_key, query_key = jax.random.split(key)
        φ, supports = practise(practise_key, params, state, task.support)
        return Task(supports, experience(query_key, φ, state, task.support))

    def collect_all(key: Key[Array, ""], params: Params, state: State, tasks: Task) -> Task:
        keys = jax.random.split(key, len(jax.tree.leaves(tasks)[0]))
        return lax.stop_gradient(jax.vmap(one_collect, (0, None, None, 0))(keys, params, state, tasks))

    def one_task(
        key: Key[Array, ""], params: Params, state: State, task: Task
    ) -> tuple[Float[Array, ""], tuple[State, Info]]:
        φ = params
        for support in task.support:
            φ = update(key, φ, state, support).params
        environment, episodes, signals = task.query
        outputs = outputs_of(key, φ, state, episodes)
        surrogate = clipped_surrogate(environment.actions, outputs, episodes, signals.advantages, clip)
        bonus = step_mean(environment.actions.entropy(outputs), episodes.alive)
        kl = step_mean(environment.actions.kl(episodes.outputs, outputs), episodes.alive)
        achieved = returns(episodes).mean()
        info = {f"return_{k}": returns(one.trajectories).mean() for k, one in enumerate(task.support)}
        info |= {f"return_{len(task.support)}": achieved, "kl": kl, "entropy": bonus}
        # less the return, so that the loss reads as one; the gradient is that of the surrogate
        return -achieved - surrogate - entropy * bonus, (state, info)

    return MetaLearner(init, adapt, predict, over_tasks(one_task), collect_all)
