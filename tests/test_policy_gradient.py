"""The estimators against a Markov decision process small enough to sum over all its trajectories."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmeta
from jmeta.core import Task
from jmeta.rl import Discrete, Environment, Policy, RecurrentPolicy, Trajectory, collect, mdp, navigation
from jmeta.rl.policy_gradients import (
    ESTIMATORS,
    Credit,
    clipped_surrogate,
    credit,
    discounted_sum,
    generalized_advantage,
    linear_baseline,
    loaded_dice,
)
from jmeta.rl.rollout import Previous

KEY = jax.random.key(0)
STATES, ACTIONS, HORIZON, DISCOUNT = 2, 2, 3, 0.9


@pytest.fixture
def process(float64):
    """Tables of two states, a policy table θ, and a baseline of state and time."""
    random = np.random.default_rng(0)
    transitions = random.dirichlet(np.ones(STATES), size=(STATES, ACTIONS))
    params = mdp.Tables(jnp.asarray(transitions), jnp.asarray(random.normal(size=(STATES, ACTIONS))))
    return params, jnp.asarray(random.normal(size=(STATES, ACTIONS))), random.normal(size=(HORIZON, STATES))


def every_trajectory(params, baseline):
    """States, actions, p(states | actions) and the credit of all trajectories, by NumPy."""
    rows = []
    for actions in itertools.product(range(ACTIONS), repeat=HORIZON):
        for later in itertools.product(range(STATES), repeat=HORIZON - 1):
            states = (0, *later)
            chance = np.prod([params.transitions[states[t], actions[t], states[t + 1]] for t in range(HORIZON - 1)])
            rewards = [DISCOUNT**t * params.rewards[states[t], actions[t]] for t in range(HORIZON)]
            values = [DISCOUNT**t * baseline[t, states[t]] for t in range(HORIZON)]
            rows.append((states, actions, chance, rewards, values, np.cumsum(rewards[::-1])[::-1] - values))
    states, actions, chance, rewards, values, advantages = (jnp.asarray(np.asarray(x)) for x in zip(*rows, strict=True))
    return states, actions, chance, Credit(rewards, values, advantages, jnp.ones(rewards.shape, bool))


def log_probabilities(θ, states, actions):
    return jax.nn.log_softmax(θ)[states, actions]


def expected(process):
    """θ -> the exact expected discounted return, and (estimator, θ) -> its expectation at fixed trajectories."""
    params, θ, baseline = process
    states, actions, chance, signals = every_trajectory(params, baseline)

    def exact(θ):
        return (chance * jnp.exp(log_probabilities(θ, states, actions).sum(1)) * signals.rewards.sum(1)).sum()

    weights = chance * jnp.exp(log_probabilities(θ, states, actions).sum(1))
    np.testing.assert_allclose(weights.sum(), 1.0)

    def estimated(estimator, θ):
        each = jax.vmap(lambda s, a, c: estimator(log_probabilities(θ, s[None], a[None]), c))(
            states, actions, jax.tree.map(lambda x: x[:, None], signals)
        )
        return (weights * each).sum()

    return exact, estimated


@pytest.mark.parametrize("name", ESTIMATORS)
def test_first_derivatives_are_unbiased(name, process):
    exact, estimated = expected(process)
    θ = process[1]
    gradient = jax.grad(lambda θ: estimated(ESTIMATORS[name], θ))(θ)
    np.testing.assert_allclose(gradient, jax.grad(exact)(θ), rtol=1e-9)


@pytest.mark.parametrize("name", ["dice", "loaded_dice"])
def test_second_derivatives_of_dice_are_unbiased(name, process):
    exact, estimated = expected(process)
    θ = process[1]
    hessian = jax.hessian(lambda θ: estimated(ESTIMATORS[name], θ))(θ)
    np.testing.assert_allclose(hessian, jax.hessian(exact)(θ), rtol=1e-9, atol=1e-12)


def test_second_derivatives_of_promp_are_the_diagonal_terms(process):
    exact, estimated = expected(process)
    params, θ, baseline = process
    states, actions, chance, signals = every_trajectory(params, baseline)
    weights = chance * jnp.exp(log_probabilities(θ, states, actions).sum(1))

    def diagonal(x):  # Σ p Σₜ ∇²π(aₜ)/π(aₜ) Aₜ
        ratio = jax.nn.softmax(x)[states, actions] / jax.nn.softmax(θ)[states, actions]
        return (weights[:, None] * ratio * signals.advantages).sum()

    curvature = jax.hessian(lambda θ: estimated(ESTIMATORS["promp"], θ))(θ)
    np.testing.assert_allclose(curvature, jax.hessian(diagonal)(θ), rtol=1e-9, atol=1e-12)
    forgetful = jax.hessian(lambda θ: estimated(lambda p, c: loaded_dice(p, c, decay=0.0), θ))(θ)
    np.testing.assert_allclose(forgetful, curvature, rtol=1e-9, atol=1e-12)
    distance = {
        name: np.linalg.norm(jax.hessian(lambda θ: estimated(ESTIMATORS[name], θ))(θ) - jax.hessian(exact)(θ))  # noqa: B023
        for name in ("vpg", "promp")
    }
    assert 0.01 < distance["promp"] < distance["vpg"]


@pytest.mark.parametrize("name", ESTIMATORS)
def test_sampled_trajectories_give_the_derivatives_within_monte_carlo_error(name, process):
    params, θ, _ = process
    exact, _ = expected(process)
    environment = mdp.tables(params, HORIZON)

    def policy(carry, observation, previous):
        return carry, observation @ θ

    @jax.jit
    def estimate(key):
        episodes = collect(key, environment, policy, 2000)
        powers = DISCOUNT ** jnp.arange(HORIZON, dtype=jnp.float64)[None]
        rewards = episodes.rewards * powers
        signals = Credit(rewards, 0 * rewards, discounted_sum(rewards, 1.0), episodes.alive)

        def surrogate(θ):
            outputs = episodes.observations @ θ
            return ESTIMATORS[name](environment.actions.log_probability(outputs, episodes.actions), signals)

        return jax.grad(surrogate)(θ), jax.hessian(surrogate)(θ)

    gradients, hessians = jax.lax.map(estimate, jax.random.split(jax.random.key(0), 20))
    assert_within_error(gradients, jax.grad(exact)(θ))
    if "dice" in name:
        assert_within_error(hessians, jax.hessian(exact)(θ))


def assert_within_error(samples, exact):
    error = samples.std(axis=0, ddof=1) / np.sqrt(len(samples))
    assert error.max() < 0.05
    np.testing.assert_array_less(abs(samples.mean(axis=0) - exact), 5 * error + 1e-9)


def test_advantages_by_hand():
    random = np.random.default_rng(0)
    rewards, values = random.normal(size=(2, 4, 5))
    lengths, γ, λ = [5, 3, 1, 4], 0.9, 0.7
    alive = np.arange(5)[None] < np.asarray(lengths)[:, None]
    rewards = rewards * alive
    expected = np.zeros((4, 5))
    for i, length in enumerate(lengths):
        following = 0.0
        for t in reversed(range(length)):
            v = values[i, t + 1] if t + 1 < length else 0.0
            following = rewards[i, t] + γ * v - values[i, t] + γ * λ * following
            expected[i, t] = following
    arrays = [jnp.asarray(x, jnp.float32) for x in (rewards, values)]
    np.testing.assert_allclose(generalized_advantage(*arrays, jnp.asarray(alive), γ, λ), expected, rtol=1e-4, atol=1e-5)


def test_the_advantage_of_an_episode_that_a_limit_of_time_cut():
    """Reward 1 for ever and discount 0.9 are worth 10 everywhere: no action is better than expected."""
    reward, value = jnp.ones((2, 4)), jnp.full((2, 4), 10.0)
    advantages = generalized_advantage(reward, value, reward > 0, 0.9, 0.95, jnp.asarray([10.0, 0.0]))
    np.testing.assert_allclose(advantages[0], 0.0, atol=1e-5)
    np.testing.assert_allclose(advantages[1], [-9 * 0.855**k for k in (3, 2, 1, 0)], rtol=1e-4)


def test_the_baseline_of_a_cut_episode_is_the_value_of_going_on():
    """Observation o pays o for ever, and is kept: V = 10 o, of which an end after 5 steps leaves 10 o (1 − 0.9ᵏ)."""
    o = jnp.asarray([0.5, 1.0, 2.0])
    rewards = jnp.broadcast_to(o[:, None], (3, 5))
    cut = episodes_of(rewards, rewards > 0, rewards[..., None])._replace(last=o[:, None], ended=jnp.zeros(3, bool))
    np.testing.assert_allclose(linear_baseline(cut, 0.9), 10 * rewards, rtol=0.01)
    signals = credit(cut, 0.9, 0.95, normalize=False)
    np.testing.assert_allclose(signals.advantages, 0.0, atol=0.05)
    np.testing.assert_allclose(signals.rewards.sum(axis=1), 10 * o, rtol=0.01)  # what DiCE sums
    ended = credit(cut._replace(ended=jnp.ones(3, bool)), 0.9, 1.0, normalize=False)
    np.testing.assert_allclose(ended.rewards.sum(axis=1), 10 * o * (1 - 0.9**5), rtol=1e-4)


def episodes_of(rewards, alive, observations):
    shape = rewards.shape
    previous = Previous(jnp.zeros((*shape, 1)), jnp.zeros(shape), jnp.zeros(shape))
    return Trajectory(observations, jnp.zeros(shape, jnp.int32), rewards, alive, jnp.zeros((*shape, 2)), previous)


def test_the_linear_baseline_is_the_ridge_regression_of_numpy(float64):
    random = np.random.default_rng(0)
    rewards, observations = random.normal(size=(6, 4)), random.normal(size=(6, 4, 2))
    alive = np.arange(4)[None] < random.integers(1, 5, size=(6, 1))
    rewards = rewards * alive
    togo = np.zeros((6, 4))
    for t in range(4):
        togo[:, t] = sum(0.9 ** (k - t) * rewards[:, k] for k in range(t, 4))
    t = np.broadcast_to(np.arange(4)[None, :, None] / 100, (6, 4, 1))
    x = np.concatenate([observations, observations**2, t, t**2, t**3, np.ones_like(t)], axis=-1)
    penalty = np.sqrt(1e-5 * alive.sum()) * np.eye(x.shape[-1])
    rows = np.concatenate([x[alive], penalty])
    weights = np.linalg.lstsq(rows, np.concatenate([togo[alive], np.zeros(x.shape[-1])]), rcond=None)[0]
    episodes = episodes_of(jnp.asarray(rewards), jnp.asarray(alive), jnp.asarray(observations))
    np.testing.assert_allclose(linear_baseline(episodes, 0.9), x @ weights, rtol=1e-6, atol=1e-8)


def test_normalized_advantages_have_mean_0_and_deviation_1_over_the_living():
    random = np.random.default_rng(0)
    alive = np.arange(6)[None] < np.asarray([[6], [2], [4]])
    rewards = jnp.asarray(random.normal(size=(3, 6)) * alive, jnp.float32)
    observations = jnp.asarray(random.normal(size=(3, 6, 2)), jnp.float32)
    signals = credit(episodes_of(rewards, jnp.asarray(alive), observations), 0.9, 0.8, normalize=True)
    living = np.asarray(signals.advantages)[alive]
    np.testing.assert_allclose([living.mean(), living.std()], [0, 1], atol=1e-3)
    assert not np.asarray(signals.advantages)[~alive].any()


def test_the_clipped_surrogate_by_hand():
    actions = navigation.environment().actions
    random = np.random.default_rng(0)
    outputs, old = (jnp.asarray(0.5 * random.normal(size=(3, 4, 4)), jnp.float32) for _ in range(2))
    taken, advantages = random.normal(size=(3, 4, 2)), random.normal(size=(3, 4))
    alive = np.arange(4)[None] < np.asarray([[4], [2], [3]])
    shape = advantages.shape
    previous = Previous(jnp.zeros((*shape, 2)), jnp.zeros(shape), jnp.zeros(shape))
    episodes = Trajectory(
        jnp.zeros((*shape, 2)), jnp.asarray(taken, jnp.float32), jnp.zeros(shape), jnp.asarray(alive), old, previous
    )

    def density(x):
        mean, log_σ = np.split(np.asarray(x, np.float64), 2, axis=-1)
        return np.prod(np.exp(-0.5 * ((taken - mean) / np.exp(log_σ)) ** 2) / np.exp(log_σ) / np.sqrt(2 * np.pi), -1)

    ratio = density(outputs) / density(old)
    least = np.minimum(ratio * advantages, np.clip(ratio, 0.8, 1.2) * advantages) - advantages
    given = clipped_surrogate(actions, outputs, episodes, jnp.asarray(advantages, jnp.float32), 0.2)
    np.testing.assert_allclose(given, least[alive].mean(), rtol=1e-4)


@pytest.mark.parametrize("finite", [True, False])
def test_the_value_of_rl2_is_per_step_of_the_horizon(finite):
    """With an output v, λ = 0 and rewards c the error is ½ mean(((c + T v) / T − v)²), and T v = 0 at an end."""
    horizon, reward = 5, 3.0
    always = Environment(
        jnp.asarray(reward),
        lambda key, params: (jnp.ones(1), jnp.ones(())),
        lambda key, state, action, params: (jnp.ones(1), state, params, jnp.zeros((), bool), {}),
        Discrete(2),
        horizon,
        finite,
    )
    learner = jmeta.rl2(jmeta.linen(RecurrentPolicy(Discrete(2), width=4)), inner_steps=0, discount=1.0, trace=0.0)
    tasks = jax.tree.map(lambda x: x[None], Task(always, ()))
    params, state = jax.jit(learner.init)(KEY, Task(always, ()))

    @jax.jit
    def error(params):
        batch = learner.collect(KEY, params, state, tasks)
        return learner.objective(KEY, params, state, batch)[1][1]["value_error"]

    for v in (0.0, 0.25):
        params["value"] = {"kernel": jnp.zeros_like(params["value"]["kernel"]), "bias": jnp.full(1, v)}
        targets = reward + horizon * v * np.array([1, 1, 1, 1, 1 - finite])
        np.testing.assert_allclose(error(params), 0.5 * np.mean((targets / horizon - v) ** 2), rtol=1e-5)


def test_only_the_advantages_of_updates_are_normalized():
    room = jmeta.rl.point_navigation(horizon=5, queries=1).sample(KEY, ()).support
    learner = jmeta.maml_rl(jmeta.linen(Policy(room.actions, hidden=(4,))), trajectories=4, discount=0.9, trace=0.8)
    params, state = jax.jit(learner.init)(KEY, Task(room, ()))
    batch = jax.jit(learner.collect)(KEY, params, state, jax.tree.map(lambda x: x[None], Task(room, ())))
    for experience, normalize in ((batch.support[0], True), (batch.query, False)):
        given = jax.tree.map(lambda x: x[0], experience)
        expected = credit(given.trajectories, 0.9, 0.8, normalize)
        np.testing.assert_allclose(given.credit.advantages, expected.advantages, rtol=1e-4, atol=1e-4)


def test_a_later_rate_scales_the_second_update_alone():
    """Of the same key and α, φ₂ = φ₁ + r g for a later rate r, with φ₁ and g the same: a line through φ₁."""
    room = jmeta.rl.point_navigation(horizon=5, queries=1).sample(KEY, ()).support
    model = jmeta.linen(Policy(room.actions, hidden=(4,)))
    params, state = jax.jit(jmeta.maml_rl(model).init)(KEY, Task(room, ()))

    def adapted(rate):
        learner = jmeta.maml_rl(model, later_rate=rate, inner_steps=2, trajectories=4)
        return jax.jit(learner.adapt)(KEY, params, state, room).params

    once, same, thrice = (adapted(rate) for rate in (1e-9, None, 0.3))
    step = jax.tree.map(jnp.subtract, same, once)
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(step)) > 1e-3
    jax.tree.map(lambda a, b, d: np.testing.assert_allclose(a - b, 3 * d, rtol=1e-3, atol=1e-6), thrice, once, step)
    with pytest.raises(jmeta.ConfigError, match="positive rates"):
        jmeta.maml_rl(model, later_rate=0.0, inner_steps=2)
