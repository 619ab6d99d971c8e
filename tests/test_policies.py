"""A trained policy in an environment of one's own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmeta
from jmeta import cli
from jmeta.rl import Box, Policy, RecurrentPolicy, navigation, point_navigation
from jmeta.rl.rollout import returns

ROOM = navigation.environment(jnp.asarray([0.3, -0.2]), horizon=6)


def learners():
    actions = ROOM.actions
    return {
        "maml_rl": jmeta.maml_rl(jmeta.linen(Policy(actions)), trajectories=3),
        "rl2": jmeta.rl2(jmeta.linen(RecurrentPolicy(actions))),
    }


@pytest.mark.parametrize("name", ["maml_rl", "rl2"])
def test_a_policy_adapts_to_an_environment_by_acting_there(name):
    learner, source = learners()[name], point_navigation(horizon=6, queries=2)
    fitted = jmeta.fit(jax.random.key(0), learner, source, steps=1, tasks=2)
    policy = jmeta.FewShotPolicy(learner, fitted.params, fitted.state, seed=3)
    with pytest.raises(jmeta.NotFittedError, match="not adapted; call fit"):
        policy.episodes()
    seen = policy.fit(ROOM).episodes(4, seed=5)
    adapted = learner.adapt(jax.random.key(3), fitted.params, fitted.state, ROOM)
    many = jax.tree.map(lambda x: jnp.stack([x] * 4), ROOM)
    expected = learner.predict(jax.random.key(5), adapted, many)
    np.testing.assert_allclose(seen.rewards, expected.rewards, rtol=1e-4)
    np.testing.assert_allclose(policy.score(4, seed=5), float(returns(expected).mean()), rtol=1e-4)
    distance = np.linalg.norm(np.asarray(seen.observations[:, 0]) - [0.3, -0.2], axis=1)
    assert (np.abs(-np.asarray(seen.rewards[:, 0]) - distance) < 0.15).all()  # it acted in this room


def test_a_run_gives_its_policy_and_refuses_other_robots():
    run = jmeta.Run.begin(learner="maml_rl", data="point_navigation", tasks=2)
    policy = run.policy()
    with pytest.raises(jmeta.DataError, match=r"the environment takes Box\(size=3.*, and the policy gives Box\(size=2"):
        policy.fit(dataclasses.replace(ROOM, actions=Box(3, -0.1, 0.1)))
    wide = dataclasses.replace(
        ROOM,
        reset=lambda key, params: (jnp.zeros(5), ROOM.reset(key, params)[1]),
        step=lambda *a: (jnp.zeros(5), *ROOM.step(*a)[1:]),
    )
    with pytest.raises(jmeta.DataError, match=r"shows {'observations': 'float32\[5\]'}, and the policy reads .*\[2\]"):
        policy.fit(wide)
    with pytest.raises(jmeta.ConfigError, match=r"sinusoid is no environment; take run\.classifier"):
        jmeta.Run.begin(learner="maml", data="sinusoid").policy()


@pytest.mark.slow
def test_pictures_of_other_tasks_stand_beside_those_of_the_run(tmp_path):
    run = tmp_path / "run"
    train = ["train", "--learner", "maml_rl", "--data", "point_navigation", "--steps", "2", "--tasks", "2"]
    cli.main([*train, "--out", str(run)])
    cli.main(["evaluate", str(run), "--episodes", "2"])
    before = {name: (run / name).stat().st_mtime_ns for name in ("trajectories.png", "adaptation_curve.png")}
    cli.main(["evaluate", str(run), "--episodes", "2", "--split", "train"])
    assert before == {name: (run / name).stat().st_mtime_ns for name in before}
    assert (run / "trajectories_train.png").exists() and (run / "adaptation_curve_train.png").exists()
