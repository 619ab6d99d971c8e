"""Environments, the collector, and bad input."""

import dataclasses
import re
import sys
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmeta
from jmeta.rl import (
    Box,
    Discrete,
    Environment,
    ant_direction,
    ant_velocity,
    bandit,
    cartpole,
    cheetah_direction,
    cheetah_velocity,
    collect,
    environment_tasks,
    from_brax,
    from_gymnasium,
    from_gymnax,
    from_navix,
    from_xland,
    hidden_cartpole,
    host,
    navigation,
    point_navigation,
    reveal,
    robots,
    rollout,
    walker_body,
)
from jmeta.rl.spaces import check_bounds

KEY = jax.random.key(0)


def still(outputs):
    return lambda carry, observation, previous: (carry, jnp.asarray(outputs, jnp.float32))


def test_navigation_by_numpy():
    goal = np.asarray([0.25, -0.1])
    environment = navigation.environment(jnp.asarray(goal, jnp.float32), horizon=12)
    trajectory = rollout(KEY, environment, still([0.3, -0.5, 0.0, 0.0]), ())[1]
    position, alive = np.zeros(2), True
    for t in range(12):
        np.testing.assert_allclose(trajectory.observations[t], position, atol=1e-5)
        assert bool(trajectory.alive[t]) == alive
        after = position + np.clip(0.1 * np.asarray(trajectory.actions[t]), -0.1, 0.1)
        distance = np.linalg.norm(after - goal)
        np.testing.assert_allclose(trajectory.rewards[t], -distance if alive else 0.0, rtol=1e-4)
        alive = alive and distance >= 0.01
        position = after if alive else position


def test_nothing_happens_after_done():
    """An environment that gives NaN once it has ended."""

    def step(key, state, action, params):
        state = state + 1
        value = jnp.where(state > 3, jnp.nan, state.astype(jnp.float32))
        return value[None], state, value, state >= 3, {}

    environment = Environment(
        jnp.zeros(()), lambda key, params: (jnp.zeros(1), jnp.zeros((), jnp.int32)), step, Discrete(2), 6
    )
    (memory, previous), trajectory = rollout(
        KEY, environment, lambda m, observation, previous: (m + 1.0, jnp.zeros(2)), jnp.zeros(())
    )
    assert trajectory.alive.tolist() == [True] * 3 + [False] * 3
    assert trajectory.rewards.tolist() == [1, 2, 3, 0, 0, 0]
    assert jnp.isfinite(trajectory.observations).all()
    assert float(memory) == 3 and float(previous.reward) == 3 and float(previous.done) == 1


def test_the_same_key_gives_the_same_episodes_and_tasks_keep_apart():
    goals = jnp.asarray([[0.3, 0.1], [-0.2, 0.4], [0.1, -0.5]])
    room = navigation.environment(horizon=5)

    def run(goals):
        keys = jax.random.split(KEY, len(goals))
        act = still([0.0, 0.0, 0.0, 0.0])
        return jax.vmap(lambda key, goal: collect(key, room.with_params(goal), act, 4))(keys, goals)

    first, again, changed = run(goals), run(goals), run(goals.at[1].set(0.0))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    kept = jnp.asarray([0, 2])
    np.testing.assert_array_equal(first.rewards[kept], changed.rewards[kept])
    assert not np.array_equal(first.rewards[1], changed.rewards[1])


@pytest.mark.parametrize("space", [Discrete(3), Box(2, -0.1, 0.1)])
def test_distributions_by_sampling(space, float64):
    random = np.random.default_rng(0)
    outputs, others = (jnp.asarray(0.5 * random.normal(size=space.outputs)) for _ in range(2))
    noise = space.noise(KEY, 200_000)
    actions = space.sample(jnp.broadcast_to(outputs, (len(noise), space.outputs)), noise)
    p, q = (space.log_probability(jnp.broadcast_to(x, (len(noise), space.outputs)), actions) for x in (outputs, others))
    np.testing.assert_allclose(jnp.exp(q - p).mean(), 1.0, atol=0.02)
    np.testing.assert_allclose(space.entropy(outputs), -p.mean(), atol=0.02)
    np.testing.assert_allclose(space.kl(outputs, others), (p - q).mean(), atol=0.02)


def test_bandits_pay_what_their_arms_pay():
    source = bandit(arms=3, pulls=2000)
    task = jax.jit(source.sample)(KEY, source.data)
    assert dataclasses.asdict(task.support)["horizon"] == 2000
    for arm in range(3):
        logits = jnp.zeros(3).at[arm].set(100.0)
        mean = rollout(KEY, task.support, still(logits), ())[1].rewards.mean()
        np.testing.assert_allclose(mean, task.support.params[arm], atol=0.05)


def test_the_oracle_sees_the_parameters():
    source = reveal(point_navigation(horizon=3, queries=2))
    task = jax.jit(source.sample)(KEY, source.data)
    observations = rollout(KEY, task.support, still([0.0] * 4), ())[1].observations
    np.testing.assert_array_equal(observations[:, 2:], np.broadcast_to(task.support.params, (3, 2)))
    jax.jit(jax.vmap(source.sample, (0, None)))(jax.random.split(KEY, 2), source.data)


def broken(observation=0.0, reward=0.0):
    return Environment(
        jnp.zeros(2),
        lambda key, params: (jnp.full(1, observation), jnp.zeros(())),
        lambda key, state, action, params: (jnp.zeros(1), state, jnp.asarray(reward), jnp.asarray(False), {}),
        Discrete(2),
        4,
    )


def no_params(key):
    return jnp.zeros(2)


def test_bad_environments_are_told_in_one_sentence():
    with pytest.raises(jmeta.DataError, match=r"a reward that is not finite in the task \[0. 0.\] at step 0"):
        environment_tasks(broken(reward=np.nan), no_params)
    with pytest.raises(jmeta.DataError, match="observations that are not finite"):
        environment_tasks(broken(observation=np.inf), no_params)
    with pytest.raises(jmeta.ConfigError, match="horizon of 0; give at least 1"):
        point_navigation(horizon=0)
    with pytest.raises(jmeta.ConfigError, match="queries is 0"):
        point_navigation(queries=0)

    def step(key, state, action, params):
        return jnp.zeros(1), state, jnp.zeros(()), jnp.asarray(False), {"up": 1} if action > 0 else {}

    untraceable = dataclasses.replace(broken(), step=step)
    with pytest.raises(jmeta.DataError, match="the environment cannot be compiled"):
        environment_tasks(untraceable, no_params)


def test_a_limit_of_time_is_told_from_an_end():
    """The environment ends after 3 steps; a horizon of 2 cuts it, one of 3 or 4 does not."""

    def step(key, state, action, params):
        return state[None] + 1.0, state + 1.0, jnp.ones(()), state >= 2.0, {}

    for horizon, finite, ended in ((2, False, False), (2, True, True), (3, False, True), (4, False, True)):
        counter = Environment(
            jnp.zeros(()), lambda key, params: (jnp.zeros(1), jnp.zeros(())), step, Discrete(2), horizon, finite
        )
        trajectory = rollout(KEY, counter, still([0.0, 0.0]), ())[1]
        assert bool(trajectory.ended) == ended
        assert trajectory.last.tolist() == [min(horizon, 3)]


def point(reward=lambda r: r, done=lambda d: d, observation=lambda s: s, after=lambda s: s, horizon=5):
    def step(key, state, action, goal):
        state = state + 0.1 * action
        now = after(observation(state))
        return now, state, reward(-jnp.abs(state - goal).sum()), done(jnp.asarray(False)), {}

    return Environment(
        jnp.zeros(2), lambda key, goal: (observation(jnp.zeros(2)), jnp.zeros(2)), step, Box(2), horizon=horizon
    )


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        (point(reward=lambda r: r[None]), r"^the reward has shape \[1\]; give a scalar\."),
        (
            point(done=lambda d: d.astype(jnp.float32)),
            r"^done is float32 of shape \[\]; give a single bool, as done > 0\.",
        ),
        (point(done=lambda d: d[None]), r"^done is bool of shape \[1\]; give a single bool"),
        (point(after=lambda s: s[:1]), r"^the observation is \[2\] from reset and \[1\] from step; let both"),
        (
            point(observation=lambda s: {"speed": s}, after=lambda s: {"velocity": s["speed"]}),
            r"^the observation 'speed' is \[2\] from reset and nothing from step",
        ),
        (
            dataclasses.replace(point(), reset=lambda key, goal: jnp.zeros(2)),
            r"^reset returns 1 values; let it return \(obs",
        ),
        (
            dataclasses.replace(point(), step=lambda key, state, action, goal: (state, state, 0.0, False)),
            r"^step returns 4 values; let it return \(observation, state, reward, done, info\)\.",
        ),
    ],
)
def test_what_an_environment_returns_is_checked_leaf_by_leaf(environment, sentence):
    with pytest.raises(jmeta.DataError, match=sentence):
        environment_tasks(environment, lambda key: jax.random.uniform(key, (2,)))


def test_box_takes_one_pair_of_bounds():
    with pytest.raises(jmeta.ConfigError, match="one number for all coordinates"):
        check_bounds(np.zeros(2), np.ones(2))


@pytest.mark.parametrize("name", ["maml_rl", "rl2"])
@pytest.mark.parametrize("finite", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_dict_of_observations_is_as_good_as_a_vector(name, finite):
    """Names in the order of the alphabet, so that both have the same features in the same places."""
    results = []
    for observation in (lambda s: s, lambda s: {"x": s[0], "y": s[1:]}):
        environment = dataclasses.replace(point(observation=observation), finite=finite)
        source = environment_tasks(environment, lambda key: jax.random.uniform(key, (2,)), queries=2)
        if name == "rl2":
            learner = jmeta.rl2(jmeta.linen(jmeta.rl.RecurrentPolicy(Box(2), width=4)))
        else:
            learner = jmeta.maml_rl(jmeta.linen(jmeta.rl.Policy(Box(2), hidden=(4,))), trajectories=3)
        task = jax.jit(source.sample)(KEY, source.data)
        params, state = jax.jit(learner.init)(KEY, task)
        tasks = jax.tree.map(lambda x: x[None], task)
        value = jax.jit(learner.collect)(KEY, params, state, tasks)
        gradient = jax.jit(jax.grad(lambda p: learner.objective(KEY, p, state, value)[0]))(params)  # noqa: B023
        results.append(jax.tree.leaves(gradient))
        oracle = reveal(source).sample(KEY, source.data).support
        assert oracle.reset(KEY, oracle.params)[0].shape == (4,)
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


class Gymnaxlike:
    """An object with gymnax's interface, Python numbers in its state included."""

    class Params(NamedTuple):
        max_steps_in_episode: int = 4
        gain: float = 2.0

    default_params = Params()

    def action_space(self, params):
        return SimpleNamespace(low=-2.0, high=2.0, shape=(1,))

    def reset_env(self, key, params):
        return jnp.zeros(1), {"time": 0}

    def step_env(self, key, state, action, params):
        state = {"time": state["time"] + 1}
        return jnp.zeros(1) + state["time"], state, params.gain * action[0], state["time"] >= 3, {}


def test_the_adapter_takes_the_interface_of_gymnax():
    environment = from_gymnax(Gymnaxlike())
    trajectory = rollout(KEY, environment, still([0.5, -20.0]), ())[1]
    np.testing.assert_allclose(trajectory.rewards, [2.0, 2.0, 2.0, 0.0], rtol=1e-4)
    assert environment.actions == Box(1, -2.0, 2.0)


def test_any_gymnax_environment_works():
    gymnax = pytest.importorskip("gymnax", reason="pip install jmeta[rl]")
    environment = from_gymnax(gymnax.make("CartPole-v1")[0], horizon=30)
    trajectory = rollout(KEY, environment, still([9.0, -9.0]), ())[1]
    fell = int(trajectory.alive.sum())
    assert 5 < fell < 30
    assert trajectory.rewards.sum() == fell


def test_a_horizon_that_a_gymnax_environment_does_not_have():
    with pytest.raises(jmeta.ConfigError, match="horizon is 9, and the environment ends after 4 steps; give at most"):
        from_gymnax(Gymnaxlike(), horizon=9)


def test_robots_without_brax_name_the_line_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "brax", None)
    robots._brax.cache_clear()
    with pytest.raises(jmeta.ConfigError, match=re.escape("robots need Brax: pip install 'jmeta[robotics]'.")):
        cheetah_velocity(horizon=3)
    robots._brax.cache_clear()


def test_grids_of_xland_differ_in_their_rules():
    """With the goal to stand on the floor, which the agent does, the first step is paid and the last; without, none."""
    xminigrid = pytest.importorskip("xminigrid", reason="pip install xminigrid")
    from xminigrid.core.constants import Colors, Tiles
    from xminigrid.core.goals import AgentOnTileGoal

    made, params = xminigrid.make("XLand-MiniGrid-R1-9x9", max_steps=60)
    goal = AgentOnTileGoal(tile=jnp.asarray([Tiles.FLOOR, Colors.BLACK], jnp.uint8)).encode()
    reached = params.replace(ruleset=params.ruleset.replace(goal=goal))
    environment = from_xland(made, params)
    assert environment.actions == Discrete(6) and environment.horizon == 60
    both = jax.tree.map(lambda a, b: jnp.stack([a, b]), params, reached)
    walking = still([99.0, 0.0, 0.0, 0.0, 0.0, 0.0])  # a step forward, after which goals are looked at
    seen = jax.jit(jax.vmap(lambda params: collect(KEY, environment.with_params(params), walking, 8)))(both)
    assert seen.observations.shape == (2, 8, 60, 5, 5, 2)
    assert (seen.rewards[0] == 0).all() and seen.alive[0].all() and not seen.ended[0].any()
    paid = np.asarray(seen.rewards[1])
    np.testing.assert_allclose(paid.max(axis=1), 1 - 0.9 / 60, rtol=1e-5)
    assert (np.asarray(seen.alive[1]).sum(axis=1) == 1).all() and seen.ended[1].all()


def test_levels_of_navix_are_tasks():
    navix = pytest.importorskip("navix", reason="pip install navix tfp-nightly")
    environment = from_navix(navix.make("Navix-FourRooms-v0"), horizon=20)
    tasks = jax.jit(jax.vmap(lambda level: collect(KEY, environment.with_params(level), still([0.0] * 7), 3)))
    seen = tasks(jnp.asarray([4, 4, 5]))
    first = np.asarray(seen.observations[:, :, 0])
    assert (first[0] == first[1]).all() and (first[0, 0] == first[0, 1]).all() and (first[0] != first[2]).any()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_playground_has_the_interface_of_brax():
    registry = pytest.importorskip("mujoco_playground", reason="pip install playground").registry
    made = registry.load("CartpoleBalance", config_overrides={"impl": "jax"})
    trajectory = jax.jit(lambda key: collect(key, from_brax(made, horizon=5), still([0.0, -9.0]), 2))(KEY)
    assert trajectory.observations.shape == (2, 5, 5)
    assert ((trajectory.rewards > 0.5) & (trajectory.rewards <= 1)).all()  # begins nearly upright


def test_craftax_has_the_interface_of_gymnax():
    craftax = pytest.importorskip("craftax.craftax_env", reason="pip install craftax")
    made = craftax.make_craftax_env_from_name("Craftax-Classic-Symbolic-v1", auto_reset=False)
    trajectory = jax.jit(lambda key: collect(key, from_gymnax(made, horizon=5), still([0.0] * 17), 2))(KEY)
    assert trajectory.observations.shape == (2, 5, 1345) and np.isfinite(trajectory.rewards).all()


def pendulums(**settings):
    gymnasium = pytest.importorskip("gymnasium", reason="pip install gymnasium")
    return from_gymnasium(lambda g: gymnasium.make("Pendulum-v1", g=float(g)), jnp.asarray(10.0), **settings)


def test_episodes_in_gymnasium_are_those_that_gymnasium_has():
    """Six episodes of two tasks in one compiled program against the same actions step by step."""
    environment, gravity = pendulums(horizon=12), jnp.asarray([9.0, 3.0])
    keys = jax.random.split(KEY, (2, 3))

    def episode(key, g):
        return rollout(key, environment.with_params(g), still([0.5, 0.0]), ())[1]

    seen = jax.jit(jax.vmap(jax.vmap(episode, (0, None))))(keys, gravity)
    import gymnasium

    for task in range(2):
        for i in range(3):
            one = gymnasium.make("Pendulum-v1", g=float(gravity[task])).unwrapped
            seed = jax.random.bits(jax.random.split(keys[task, i], 3)[1], (), jnp.uint32)
            observation, _ = one.reset(seed=int(seed))
            for t in range(12):
                np.testing.assert_allclose(seen.observations[task, i, t], observation, rtol=1e-5)
                action = np.asarray(environment.actions.execute(seen.actions[task, i, t]))
                observation, reward, *_ = one.step(action)
                np.testing.assert_allclose(seen.rewards[task, i, t], reward, rtol=1e-4)


def test_an_episode_in_gymnasium_ends_where_it_is_terminated():
    gymnasium = pytest.importorskip("gymnasium", reason="pip install gymnasium")
    environment = from_gymnasium(lambda _: gymnasium.make("CartPole-v1"), horizon=60)
    trajectory = jax.jit(lambda key: collect(key, environment, still([9.0, -9.0]), 4))(KEY)
    fell = np.asarray(trajectory.alive.sum(axis=1))
    assert ((fell > 5) & (fell < 20)).all() and trajectory.ended.all()
    np.testing.assert_array_equal(trajectory.rewards.sum(axis=1), fell)


def test_environments_of_gymnasium_are_used_again_and_let_go(monkeypatch):
    gymnasium = pytest.importorskip("gymnasium", reason="pip install gymnasium")
    monkeypatch.setattr(host, "TASKS", 2)
    made, closed = [], []

    class Counted(gymnasium.Wrapper):
        def close(self):
            closed.append(self)
            super().close()

    def make(gravity):
        made.append(Counted(gymnasium.make("Pendulum-v1", g=float(gravity))))
        return made[-1]

    environment = from_gymnasium(make, jnp.asarray(10.0), horizon=3)
    episodes = jax.jit(lambda key, g: collect(key, environment.with_params(g), still([0.0, 0.0]), 2).rewards)
    for gravity, expected in ((9.0, 3), (9.0, 3), (8.0, 5), (7.0, 7), (8.0, 7), (9.0, 9)):  # one to look at first
        jax.block_until_ready(episodes(KEY, jnp.asarray(gravity)))
        assert len(made) == expected
    assert len(closed) == 4


def test_learners_learn_in_gymnasium():
    source = environment_tasks(pendulums(horizon=5), lambda key: jax.random.uniform(key, (), minval=8.0, maxval=12.0))
    learner = jmeta.maml_rl(jmeta.linen(jmeta.rl.Policy(source.sample(KEY, ()).support.actions)), trajectories=3)
    fitted = jmeta.fit(KEY, learner, source, steps=2, tasks=2)
    result = jmeta.evaluate(KEY, learner, fitted.params, fitted.state, source, episodes=4, metric=jmeta.mean_return)
    assert np.isfinite(result["mean_return"])


def test_what_gymnasium_cannot_give():
    gymnasium = pytest.importorskip("gymnasium", reason="pip install gymnasium")
    with pytest.raises(jmeta.ConfigError, match="horizon is 900, and the environment ends after 200 steps; give at"):
        pendulums(horizon=900)
    with pytest.raises(jmeta.ConfigError, match=r"the observation space Discrete.* is no box; wrap the environment in"):
        from_gymnasium(lambda _: gymnasium.make("FrozenLake-v1"))
    twice = pendulums(horizon=4)

    def both(key):
        _, (episode, time) = twice.reset(key, twice.params)
        action = jnp.ones(1)
        first = twice.step(key, (episode, time), action, twice.params)
        return first[2] + twice.step(key, (episode, time), -action, twice.params)[2]

    with pytest.raises(Exception, match="two policies act in one episode"):
        jax.block_until_ready(jax.jit(both)(KEY))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Accessing:DeprecationWarning")  # Brax reads what MuJoCo has moved
@pytest.mark.parametrize("make", [cheetah_velocity, cheetah_direction, ant_velocity, ant_direction, walker_body])
def test_robots_have_the_reward_of_their_task(make):
    """Episodes in two tasks with the same keys: the robot is one, and the rewards are those of the formula."""
    pytest.importorskip("brax.envs", reason="pip install jmeta[robotics]")
    source = make(horizon=5, queries=1)
    keys = jax.random.split(KEY, 6)
    tasks = jax.vmap(source.sample, (0, None))(keys, source.data)
    environment = jax.tree.map(lambda x: x[0], tasks.support)
    policy = still([0.5] * environment.actions.outputs)

    def episode(params):
        return rollout(KEY, environment.with_params(params), policy, ())[1]

    seen = jax.jit(jax.vmap(episode))(tasks.support.params)
    assert np.isfinite(seen.rewards).all() and np.ptp(np.asarray(seen.rewards.sum(axis=1))) > 1e-3
    actions = np.clip(np.asarray(seen.actions, np.float64), -1, 1)
    if make is walker_body:  # bodies differ, and so do their ways
        assert np.ptp(np.asarray(seen.observations[:, -1]), axis=0).max() > 1e-3
        return
    np.testing.assert_allclose(seen.observations - seen.observations[:1], 0.0, atol=1e-5)
    robot = "halfcheetah" if "cheetah" in make.__name__ else "ant"
    gained = np.asarray(seen.rewards) + robots.EFFORT[robot] * np.square(actions).sum(axis=-1) - robots.ALIVE[robot]
    told = np.asarray(tasks.support.params, np.float64)
    if "direction" in make.__name__:
        np.testing.assert_allclose(gained * told[:, None] - gained[:1] * told[0], 0.0, atol=1e-4)
    else:  # |ẋ − v|: two targets on one side of ẋ differ by as much as they do
        slower = np.argsort(told)[:2]
        velocity = told[slower[0]] - gained[slower[0]], told[slower[0]] + gained[slower[0]]
        other = -np.abs(np.stack(velocity) - told[slower[1]])
        assert (np.abs(other - gained[slower[1]]).min(axis=0) < 1e-4).all()


def test_the_cartpole_by_numpy():
    params = cartpole.Physics(*map(jnp.float32, (0.3, 0.7, 0.4, -1.2)))
    environment = cartpole.environment(params, horizon=40)
    trajectory = rollout(KEY, environment, still([0.6, -9.0]), ())[1]
    x, v, angle, ω = np.asarray(trajectory.observations[0], np.float64)
    mass, length, friction, gear = (float(p) for p in params)
    alive = True
    for t in range(40):
        assert bool(trajectory.alive[t]) == alive
        if not alive:
            break
        np.testing.assert_allclose(trajectory.observations[t], [x, v, angle, ω], atol=1e-3)
        force = 10 * gear * float(np.clip(trajectory.actions[t][0], -1, 1)) - friction * v
        # Newton's equations of the cart and of a uniform pole, solved as a system for both accelerations
        matrix = [
            [1 + mass, mass * length * np.cos(angle)],
            [mass * length * np.cos(angle), mass * length**2 * 4 / 3],
        ]
        right = [force + mass * length * ω**2 * np.sin(angle), mass * 9.8 * length * np.sin(angle)]
        a, turn = np.linalg.solve(matrix, right)
        x, v, angle, ω = x + 0.02 * v, v + 0.02 * a, angle + 0.02 * ω, ω + 0.02 * turn
        alive = abs(x) <= 2.4 and abs(angle) <= np.deg2rad(12)
        reward = (1 - abs(x) / 2.4) * (1 - abs(angle) / np.deg2rad(12)) if alive else 0.0
        np.testing.assert_allclose(trajectory.rewards[t], reward, atol=1e-3)
    assert not alive  # a constant push lets it fall
    assert float(trajectory.rewards.max()) > 0.5


def test_tasks_of_the_cartpole_differ_in_all_that_is_hidden():
    source = hidden_cartpole(queries=1)
    physics = jax.vmap(lambda key: source.sample(key, source.data).support.params)(jax.random.split(KEY, 200))
    for values, low, high in zip(physics, (0.05, 0.25, 0.0, -1.5), (0.5, 1.0, 1.0, 1.5), strict=True):
        assert low <= values.min() < values.max() <= high
        assert np.ptp(values) > 0.8 * (high - low)
    assert 0.35 < (physics.gear > 0).mean() < 0.65 and np.abs(physics.gear).min() >= 0.5
    oracle = reveal(source).sample(KEY, ()).support
    assert oracle.reset(KEY, oracle.params)[0].shape == (8,)
