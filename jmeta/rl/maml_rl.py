"""MAML for reinforcement learning (Finn et al. 2017), with the estimators that came after it."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import optax
from jax import lax
from jaxtyping import Array, Float, Key

from jmeta.adjoint import exact
from jmeta.core import Adapted, Info, MetaLearner, Model, Params, State, Task, check_model, over_tasks
from jmeta.errors import ConfigError
from jmeta.hyperparameters import Number, violated
from jmeta.inner import Adjoint, InnerProblem, check_inner
from jmeta.rl.environment import Environment
from jmeta.rl.policies import Memoryless
from jmeta.rl.policy_gradients import Credit, Estimator, credit, ppo, promp
from jmeta.rl.rollout import Trajectory, answer_queries, collect, for_each_task, returns


class Experience(NamedTuple):
    """Episodes in an environment, and what their actions are credited with."""

    environment: Environment
    trajectories: Trajectory
    credit: Credit


def maml_rl(
    model: Model,
    *,
    inner_rate: Number = 0.1,
    later_rate: Number | None = None,
    inner_steps: int = 1,
    estimator: Estimator = promp,
    adjoint: Adjoint = exact(),
    trajectories: int = 20,
    discount: Number = 0.99,
    trace: Number = 1.0,
    normalize: bool = True,
    clip: Number = 0.2,
    entropy: Number = 0.0,
    inner_optimizer: Callable[[Number], optax.GradientTransformation] = optax.sgd,
) -> MetaLearner:
    """MAML for reinforcement learning: an initialisation θ from which policy-gradient steps learn a task from reward.

    φ₀ = θ, φₖ₊₁ = φₖ + α ∇J(φₖ), with J estimated on `trajectories` episodes that φₖ collects in the environment of
    the task; the objective is less the return of φ_K. Actions do not depend on θ differentiably, so that how the
    trajectories depend on it is the estimator's business.

    Args:
        model: the policy, `observations [n, ...] -> outputs [n, outputs]`, as
            `jmeta.linen(jmeta.rl.Policy(actions))` gives.
        inner_rate: α, on the surrogate per step of the horizon.
        later_rate: α of the updates after the first; default α. Normalised advantages make their gradients as long as
            the first, although the goal is nearer: a tenth of α suits a policy that was trained for one update.
        inner_steps: K; with 0 the policy is trained on all tasks without adaptation.
        estimator: the surrogate of the inner gradient: `vpg`, `dice`, `loaded_dice` or `promp` of
            `jmeta.rl.policy_gradients`.
        adjoint: how to differentiate through each update; `first_order()` leaves the second derivatives away.
        trajectories: episodes of each update.
        discount: γ.
        trace: λ of the generalized advantage; 1 is the sum of rewards less the linear baseline.
        normalize: whether the advantages of an update have mean 0 and standard deviation 1 over its episodes; those of
            the objective stay as they are.
        clip: ε of PPO in the outer objective; infinity leaves that of TRPO.
        entropy: weight of the entropy of the adapted policy, a mean over steps.
        inner_optimizer: any optax optimiser of a rate; it starts anew for each update.

    Returns:
        The learner. `Adapted.params` is φ_K. `predict` answers a query by an episode, a `Trajectory`. `collect` turns
        a batch of environments into trajectories of θ, φ₁, ..., φ_K, so that the objective is a function of θ on fixed
        trajectories, as TRPO (`jmeta.trust_region`) and the epochs of PPO (`jmeta.repeated`) need. `info` has
        `return_k` after k updates, `kl` and `entropy`.

    Raises:
        ConfigError: a negative K, or a rate that is not positive.
        ModelError: `model` is no `Model`; from `init` and `fit`, its outputs do not fit the action space.

    Example:
        >>> import jax, jmeta
        >>> from jmeta.rl import Box, point_navigation
        >>> learner = jmeta.maml_rl(jmeta.linen(jmeta.rl.Policy(Box(2, -0.1, 0.1))), trajectories=5)
        >>> source = point_navigation(horizon=10)
        >>> fitted = jmeta.fit(jax.random.key(0), learner, source, steps=2, tasks=2, optimizer=jmeta.trust_region())

    Reference: Finn, Abbeel, Levine 2017, "Model-Agnostic Meta-Learning", algorithm 3; the estimators: Foerster et al.
    2018 (DiCE), Farquhar et al. 2019 (Loaded DiCE), Rothfuss et al. 2019 (ProMP).

    Differences from the paper: the default estimator is ProMP's, whose second derivative is nearer to the true one than
    the paper's (`vpg`); `trace` and the outer optimiser are arguments. From the authors' code: α is the same at every
    update unless `later_rate` is given, where it halves α after the first at test.
    """
    check_model(model)
    rates = [inner_rate if k == 0 or later_rate is None else later_rate for k in range(inner_steps)]
    if inner_steps < 0 or any(violated(rate > 0) for rate in rates):
        raise ConfigError(
            f"inner_steps is {inner_steps} and the rates are {rates}; give 0 or more steps at positive rates."
        )
    for rate in rates:
        check_inner(rate, inner_steps, inner_optimizer)

    policy = Memoryless(model)

    def experience(
        key: Key[Array, ""], params: Params, state: State, environment: Environment, normalize: bool
    ) -> Experience:
        rollout_key, model_key = jax.random.split(key)
        # the estimators know how trajectories depend on θ; the environment is not differentiated
        act = policy.policy(model_key, lax.stop_gradient(params), state)
        episodes = collect(rollout_key, environment, act, trajectories)
        return Experience(environment, episodes, credit(episodes, discount, trace, normalize))

    def inner_loss(key: Key[Array, ""], params: Params, state: State, support: Experience) -> tuple[Array, State]:
        environment, episodes, signals = support
        outputs = policy.outputs(key, params, state, episodes)
        log_probabilities = environment.actions.log_probability(outputs, episodes.actions)
        return -estimator(log_probabilities, signals) / environment.horizon, state

    updates = [adjoint(InnerProblem(inner_loss, inner_optimizer(rate), num_steps=1)) for rate in rates]

    def practise(
        key: Key[Array, ""], params: Params, state: State, environment: Environment
    ) -> tuple[Params, list[Experience]]:
        supports = []
        for update, step_key in zip(updates, jax.random.split(key, inner_steps), strict=True):
            collect_key, update_key = jax.random.split(step_key)
            supports.append(experience(collect_key, params, state, environment, normalize))
            params = update(update_key, params, state, supports[-1]).params
        return params, supports

    def adapt(key: Key[Array, ""], params: Params, state: State, support: Environment) -> Adapted:
        φ, supports = practise(key, params, state, support)
        return Adapted(φ, state, _returns(supports))

    def predict(key: Key[Array, ""], adapted: Adapted, inputs: Environment) -> Trajectory:
        model_key, key = jax.random.split(key)
        return answer_queries(key, inputs, policy.policy(model_key, adapted.params, adapted.state), ())

    def one_collect(key: Key[Array, ""], params: Params, state: State, task: Task) -> Task:
        practise_key, query_key = jax.random.split(key)
        φ, supports = practise(practise_key, params, state, task.support)
        # as they are, so that a task counts by the return that is left to gain
        return Task(supports, experience(query_key, φ, state, task.support, False))

    def one_task(
        key: Key[Array, ""], params: Params, state: State, task: Task
    ) -> tuple[Float[Array, ""], tuple[State, Info]]:
        φ = params
        for update, support in zip(updates, task.support, strict=True):
            φ = update(key, φ, state, support).params
        environment, episodes, signals = task.query
        outputs = policy.outputs(key, φ, state, episodes)
        loss, info = ppo(environment.actions, outputs, episodes, signals.advantages, clip=clip, entropy=entropy)
        return loss, (state, {**_returns([*task.support, task.query]), **info})

    return MetaLearner(policy.init, adapt, predict, over_tasks(one_task), for_each_task(one_collect))


def _returns(experiences: list[Experience]) -> Info:
    """The mean return of the episodes after each number of updates."""
    return {f"return_{k}": returns(one.trajectories).mean() for k, one in enumerate(experiences)}
