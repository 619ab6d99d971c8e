"""What policy-gradient learners are made of: returns, advantages, a baseline, and the estimators."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, PyTree

from jmeta.core import Info
from jmeta.hyperparameters import Number
from jmeta.rl.environment import flat_observation
from jmeta.rl.rollout import Trajectory, returns
from jmeta.rl.spaces import Space
from jmeta.tree import widened

Steps = Float[Array, "*episodes T"]
Alive = Bool[Array, "*episodes T"]


def discounted_sum(x: Steps, discount: Number) -> Steps:
    """Σ_{k ≥ t} discount^{k − t} xₖ along the last axis.

    Args:
        x: `[episodes, T]`.
        discount: γ.

    Returns:
        `[episodes, T]`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jmeta.rl.policy_gradients import discounted_sum
        >>> discounted_sum(jnp.ones((1, 3)), 0.5)[0].tolist()
        [1.75, 1.5, 1.0]
    """

    def step(total: Array, x: Array) -> tuple[Array, Array]:
        total = x + discount * total
        return total, total

    sums = lax.scan(step, jnp.zeros_like(x[..., 0]), jnp.moveaxis(x, -1, 0), reverse=True)[1]
    return jnp.moveaxis(sums, 0, -1)


def generalized_advantage(
    rewards: Steps,
    values: Steps,
    alive: Alive,
    discount: Number,
    trace: Number,
    last_value: Float[Array, "*episodes"] | None = None,
) -> Steps:
    """Aₜ = Σₖ (γλ)ᵏ δₜ₊ₖ with δₜ = rₜ + γ V(sₜ₊₁) − V(sₜ), and V = 0 beyond the end.

    Args:
        rewards: `[episodes, T]`, 0 after the end of an episode.
        values: V, `[episodes, T]`.
        alive: `[episodes, T]`.
        discount: γ.
        trace: λ; 1 is the sum of rewards less the baseline, 0 one step.
        last_value: V(s_T), `[episodes]`, of the states in which a limit of time cut the episodes, and 0 for episodes
            that ended. Default: all ended.

    Returns:
        A, `[episodes, T]`, 0 after the end.

    Example:
        >>> import jax.numpy as jnp
        >>> from jmeta.rl.policy_gradients import generalized_advantage
        >>> ones = jnp.ones((1, 3))
        >>> generalized_advantage(ones, 0 * ones, ones > 0, 1.0, 1.0)[0].tolist()
        [3.0, 2.0, 1.0]
        >>> generalized_advantage(ones, 2 * ones, ones > 0, 0.5, 0.9, 2 * ones[:, 0])[0].tolist()  # 1 for ever
        [0.0, 0.0, 0.0]

    Reference: Schulman et al. 2016, "High-Dimensional Continuous Control Using Generalized Advantage Estimation",
    equation 16, https://arxiv.org/abs/1506.02438.
    """

    def step(after: tuple[Array, Array], now: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], Array]:
        reward, value, alive = now
        advantage = reward + discount * after[1] - value + discount * trace * after[0]
        # padding is skipped, so that the value after the last step of an episode is that of the next in a trial
        after = (jnp.where(alive, advantage, after[0]), jnp.where(alive, value, after[1]))
        return after, jnp.where(alive, advantage, jnp.zeros_like(advantage))

    zero = jnp.zeros_like(rewards[..., 0])
    beyond = zero if last_value is None else last_value.astype(values.dtype)
    steps = (jnp.moveaxis(rewards, -1, 0), jnp.moveaxis(values, -1, 0), jnp.moveaxis(alive, -1, 0))
    return jnp.moveaxis(lax.scan(step, (zero, beyond), steps, reverse=True)[1], 0, -1)


def linear_baseline(trajectories: Trajectory, discount: Number, penalty: float = 1e-5) -> Steps:
    """A ridge regression of the rewards to go on features of observation and time, fitted to the episodes it is for.

    V(sₜ, t) = w · (o, o², t/100, (t/100)², (t/100)³, 1), w = argmin Σ (V − Σ_{k ≥ t} γᵏ⁻ᵗ rₖ)² + penalty ‖w‖². To the
    rewards to go of an episode that a limit of time cut belongs γᵀ⁻ᵗ V(s_T, T), of the same w.

    Args:
        trajectories: of one task, `[episodes, T]`.
        discount: γ.
        penalty: of the ridge, per step.

    Returns:
        V, `[episodes, T]`.

    Example:
        >>> import jax
        >>> from jmeta.rl import collect, navigation
        >>> from jmeta.rl.policy_gradients import linear_baseline
        >>> act = lambda carry, observation, previous: (carry, jax.numpy.zeros(4))
        >>> trajectories = collect(jax.random.key(0), navigation.environment(horizon=5), act, 3)
        >>> linear_baseline(trajectories, 0.99).shape
        (3, 5)

    Reference: Duan et al. 2016, "Benchmarking Deep Reinforcement Learning for Continuous Control", section 4.2 of the
    appendix; rllab's `LinearFeatureBaseline`, which the authors of MAML use.

    Differences from rllab: the weights are of the normal equations with the penalty times the number of steps; rllab
    takes every limit of time for an end.
    """
    return _fitted_values(trajectories, discount, penalty)[0]


def _fitted_values(
    trajectories: Trajectory, discount: Number, penalty: float = 1e-5
) -> tuple[Steps, Float[Array, "*episodes"]]:
    """`linear_baseline` and its V(s_T, T), `[episodes]`, 0 where the episode ended."""
    episodes, horizon = trajectories.rewards.shape

    def features(observations: PyTree, times: range) -> Float[Array, "episodes times features"]:
        o = jnp.clip(widened(flat_observation(observations, axes=2)), -10.0, 10.0)
        t = jnp.broadcast_to(jnp.asarray(times, o.dtype)[None, :, None] / 100, (episodes, len(times), 1))
        return jnp.concatenate([o, o**2, t, t**2, t**3, jnp.ones_like(t)], axis=-1)

    now = features(trajectories.observations, range(horizon))
    if jax.tree.leaves(trajectories.last):
        last = jax.tree.map(lambda x: x[:, None], trajectories.last)
        beyond = jnp.where(trajectories.ended[:, None, None], 0.0, features(last, range(horizon, horizon + 1)))
    else:
        beyond = jnp.zeros_like(now[:, :1])
    weights = trajectories.alive.astype(now.dtype)
    powers = discount ** jnp.arange(horizon, 0, -1, dtype=now.dtype)[None, :, None]
    x = ((now - powers * beyond) * weights[..., None]).reshape(episodes * horizon, -1)
    y = (discounted_sum(trajectories.rewards, discount) * weights).reshape(-1)
    ridge = penalty * weights.sum() * jnp.eye(x.shape[-1], dtype=x.dtype)
    w = jnp.linalg.solve(x.T @ x + ridge, x.T @ y)
    return now @ w, (beyond @ w)[:, 0]


def moments(
    x: Float[Array, "..."], alive: Bool[Array, "..."], total: Callable[[Array], Array] = lambda x: x
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mean and standard deviation over the steps before the end; with `jmeta.devices.total` of all devices' steps."""
    x = widened(x)
    weights = alive.astype(x.dtype) / jnp.maximum(total(alive.sum()), 1).astype(x.dtype)
    mean = total((x * weights).sum())
    return mean, jnp.sqrt(total((jnp.square(x - mean) * weights).sum()))


class Credit(NamedTuple):
    """What the actions of a batch of episodes are credited with; constants of the surrogates.

    Args:
        rewards: γᵗ rₜ, `[episodes, T]`; that of a last step that a limit of time made holds γᵀ V(s_T) as well.
        values: γᵗ b(sₜ), a baseline, `[episodes, T]`.
        advantages: A, `[episodes, T]`.
        alive: which steps count, `[episodes, T]`.
    """

    rewards: Steps
    values: Steps
    advantages: Steps
    alive: Alive


def credit(trajectories: Trajectory, discount: Number, trace: Number, normalize: bool) -> Credit:
    """Rewards, a linear baseline and the advantages of a batch of episodes of one task.

    Args:
        trajectories: `[episodes, T]`.
        discount: γ.
        trace: λ of the generalized advantage.
        normalize: whether advantages have mean 0 and standard deviation 1 over the batch; rewards and values are
            divided by the same standard deviation.

    Returns:
        The credit.

    Example:
        >>> import jax
        >>> from jmeta.rl import collect, navigation
        >>> from jmeta.rl.policy_gradients import credit
        >>> act = lambda carry, observation, previous: (carry, jax.numpy.zeros(4))
        >>> trajectories = collect(jax.random.key(0), navigation.environment(horizon=5), act, 3)
        >>> credit(trajectories, 0.99, 1.0, normalize=True).advantages.shape
        (3, 5)
    """
    alive = trajectories.alive
    values, beyond = _fitted_values(trajectories, discount)
    advantages = generalized_advantage(trajectories.rewards, values, alive, discount, trace, beyond)
    rewards = trajectories.rewards.at[:, -1].add(discount * beyond)
    powers = discount ** jnp.arange(alive.shape[-1], dtype=values.dtype)[None]
    rewards, values = (jnp.where(alive, x * powers, jnp.zeros_like(x)) for x in (rewards, values))
    if normalize:
        mean, deviation = moments(advantages, alive)
        scale = 1 / (deviation + 1e-8)
        rewards, values = rewards * scale, values * scale
        advantages = jnp.where(alive, (advantages - mean) * scale, jnp.zeros_like(advantages))
    return Credit(rewards, values, advantages, alive)


def step_mean(x: Float[Array, "..."], alive: Bool[Array, "..."]) -> Float[Array, ""]:
    """The mean over the steps before the end."""
    x = widened(x)
    return jnp.where(alive, x, jnp.zeros_like(x)).sum() / jnp.maximum(alive.sum(), 1).astype(x.dtype)


def clipped_surrogate(
    actions: Space, outputs: Float[Array, "*batch T outputs"], trajectories: Trajectory, advantages: Array, clip: Number
) -> Float[Array, ""]:
    """PPO's surrogate: the mean over steps of min(ρ A, clip(ρ, 1 − ε, 1 + ε) A) − A, ρ = π(a|s) / π_old(a|s).

    Args:
        actions: the action space.
        outputs: of the policy π, which is differentiated.
        trajectories: of the policy π_old.
        advantages: A.
        clip: ε; infinity leaves the surrogate of TRPO.

    Returns:
        The surrogate, to be maximised; 0 at π = π_old.

    Reference: Schulman et al. 2017, "Proximal Policy Optimization Algorithms", equation 7,
    https://arxiv.org/abs/1707.06347.
    """
    old = actions.log_probability(trajectories.outputs, trajectories.actions)
    ratio = jnp.exp(actions.log_probability(outputs, trajectories.actions) - old)
    least = jnp.minimum(ratio * advantages, jnp.clip(ratio, 1 - clip, 1 + clip) * advantages)
    return step_mean(least - advantages, trajectories.alive)


def ppo(
    actions: Space, outputs: Array, trajectories: Trajectory, advantages: Array, *, clip: Number, entropy: Number
) -> tuple[Float[Array, ""], Info]:
    """The outer objective of a policy: less its return, the clipped surrogate, and a bonus for its entropy.

    Args:
        actions: the action space.
        outputs: `[..., T, outputs]`, of the policy, which is differentiated.
        trajectories: of the policy before the update.
        advantages: A.
        clip: ε.
        entropy: weight of the entropy.

    Returns:
        The objective, whose value reads as a loss and whose gradient is that of the surrogate and the bonus; and `kl`
        to the policy before the update and `entropy`, means over steps.
    """
    surrogate = clipped_surrogate(actions, outputs, trajectories, advantages, clip)
    bonus = step_mean(actions.entropy(outputs), trajectories.alive)
    kl = step_mean(actions.kl(trajectories.outputs, outputs), trajectories.alive)
    return -returns(trajectories).mean() - surrogate - entropy * bonus, {"kl": kl, "entropy": bonus}


Estimator = Callable[[Steps, Credit], Float[Array, ""]]


def _box(x: Array) -> Array:
    """The magic box □: its value is 1, its derivatives are those of e^x."""
    return jnp.exp(x - lax.stop_gradient(x))


def vpg(log_probabilities: Steps, credit: Credit) -> Float[Array, ""]:
    """The surrogate of the vanilla policy gradient: mean over episodes of Σₜ log π(aₜ) Aₜ.

    Its first derivative is unbiased. Its second lacks how the distribution of the trajectories changes with θ.

    Args:
        log_probabilities: log π(aₜ|sₜ), `[episodes, T]`; what is differentiated.
        credit: of the actions; its advantages are used.

    Returns:
        The surrogate, to be maximised.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jmeta.rl.policy_gradients import Credit, vpg
        >>> advantages = jnp.asarray([[3.0, 1.0]])
        >>> credit = Credit(advantages, advantages, advantages, advantages > 0)
        >>> jax.grad(vpg)(jnp.zeros((1, 2)), credit).tolist()
        [[3.0, 1.0]]

    Reference: Finn et al. 2017, "Model-Agnostic Meta-Learning", section 4.2 and algorithm 3.
    """
    terms = jnp.where(credit.alive, log_probabilities * credit.advantages, jnp.zeros_like(credit.advantages))
    return terms.sum(axis=-1).mean()


def promp(log_probabilities: Steps, credit: Credit) -> Float[Array, ""]:
    """The low-variance curvature surrogate: mean over episodes of Σₜ □(log π(aₜ)) Aₜ.

    Its first derivative is that of `vpg`; its second adds ∇log π ∇log πᵀ of the same step, and leaves away the products
    of different steps, which have most of the variance.

    Args:
        log_probabilities: `[episodes, T]`.
        credit: of the actions; its advantages are used.

    Returns:
        The surrogate, to be maximised.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jmeta.rl.policy_gradients import Credit, promp
        >>> advantages = jnp.asarray([[3.0, 1.0]])
        >>> credit = Credit(advantages, advantages, advantages, advantages > 0)
        >>> jax.grad(promp)(jnp.zeros((1, 2)), credit).tolist()
        [[3.0, 1.0]]

    Reference: Rothfuss et al. 2019, "ProMP: Proximal Meta-Policy Search", section 5 (LVC),
    https://arxiv.org/abs/1810.06784.

    Differences from the paper: none in the curvature; its clipping and KL penalty belong to the outer step.
    """
    terms = jnp.where(credit.alive, _box(log_probabilities) * credit.advantages, jnp.zeros_like(credit.advantages))
    return terms.sum(axis=-1).mean()


def loaded_dice(log_probabilities: Steps, credit: Credit, *, decay: float = 1.0) -> Float[Array, ""]:
    """Loaded DiCE: mean over episodes of Σₜ (□(wₜ) − □(wₜ − log π(aₜ))) Aₜ, wₜ = decay · wₜ₋₁ + log π(aₜ).

    With `decay = 1` its derivatives of every order are unbiased; less forgets how earlier actions led to a state, for
    less variance.

    Args:
        log_probabilities: `[episodes, T]`.
        credit: of the actions; its advantages are used.
        decay: λ of the paper, in [0, 1]; 0 is `promp`.

    Returns:
        The surrogate, to be maximised; its value is 0.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jmeta.rl.policy_gradients import Credit, loaded_dice
        >>> advantages = jnp.asarray([[3.0, 1.0]])
        >>> credit = Credit(advantages, advantages, advantages, advantages > 0)
        >>> jax.grad(loaded_dice)(jnp.zeros((1, 2)), credit).tolist()
        [[3.0, 1.0]]

    Reference: Farquhar, Whiteson, Foerster 2019, "Loaded DiCE: Trading off Bias and Variance in Any-Order Score
    Function Gradient Estimators for Reinforcement Learning", algorithm 1, https://arxiv.org/abs/1909.10549.

    Differences from the paper: none.
    """
    masked = jnp.where(credit.alive, log_probabilities, jnp.zeros_like(log_probabilities))
    # wₜ is a discounted sum of the steps before t instead of those after it
    w = discounted_sum(masked[..., ::-1], decay)[..., ::-1]
    terms = (_box(w) - _box(w - masked)) * credit.advantages
    return terms.sum(axis=-1).mean()


def dice(log_probabilities: Steps, credit: Credit) -> Float[Array, ""]:
    """DiCE: mean over episodes of Σₜ □(Σ_{k ≤ t} log π(aₖ)) γᵗrₜ + Σₜ (1 − □(log π(aₜ))) γᵗb(sₜ).

    Its derivatives of every order are unbiased; the baseline lowers the variance of the first.

    Args:
        log_probabilities: log π(aₜ|sₜ), `[episodes, T]`; what is differentiated.
        credit: of the actions; its rewards and values are used.

    Returns:
        The surrogate, to be maximised; its value is the mean discounted return.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jmeta.rl.policy_gradients import Credit, dice
        >>> rewards = jnp.asarray([[2.0, 1.0]])
        >>> credit = Credit(rewards, 0 * rewards, rewards, rewards > 0)
        >>> jax.grad(dice)(jnp.zeros((1, 2)), credit).tolist()
        [[3.0, 1.0]]

    Reference: Foerster et al. 2018, "DiCE: The Infinitely Differentiable Monte-Carlo Estimator",
    https://arxiv.org/abs/1802.05098; the baseline: Mao et al. 2019, "A Baseline for Any Order Gradient Estimation in
    Stochastic Computation Graphs", whose first-order form this is.

    Differences from the paper: none.
    """
    masked = jnp.where(credit.alive, log_probabilities, jnp.zeros_like(log_probabilities))
    returns = (_box(jnp.cumsum(masked, axis=-1)) * credit.rewards).sum(axis=-1)
    baseline = ((1 - _box(masked)) * credit.values).sum(axis=-1)
    return (returns + baseline).mean()


ESTIMATORS: Mapping[str, Estimator] = {"vpg": vpg, "dice": dice, "loaded_dice": loaded_dice, "promp": promp}
