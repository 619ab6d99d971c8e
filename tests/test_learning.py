"""Learning curves: each learner learns unseen characters, and MAML unseen waves. Minutes; `make test-slow`."""

import jax
import optax
import pytest

import jmeta
from jmeta.rl import Box, Discrete, Policy, RecurrentPolicy, bandit, point_navigation
from jmeta.runs.registry import LEARNERS

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, None) for name in LEARNERS if not LEARNERS[name].acts), ("maml", "bfloat16")]
)
def test_unseen_glyphs(name, dtype):
    entry = LEARNERS[name]
    learner = entry.make(jmeta.linen(jmeta.Conv4(outputs=None if entry.embedding else 5, dtype=dtype)))
    train, test = jmeta.glyphs(split="train", queries=5), jmeta.glyphs(split="test")
    fitted = jmeta.fit(jax.random.key(0), learner, train, steps=1500, tasks=4)
    result = jmeta.evaluate(jax.random.key(1), learner, fitted.params, fitted.state, test, episodes=200)
    assert result["accuracy"] - result["ci95"] > 0.6  # nearest mean on raw pixels has 0.32


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_unseen_waves(dtype):
    model = jmeta.linen(jmeta.MLP(outputs=1, dtype=dtype))
    learner = jmeta.maml(model, inner_rate=0.01, loss=jmeta.mean_squared_error)
    fitted = jmeta.fit(jax.random.key(0), learner, jmeta.sinusoid(), steps=10_000, tasks=25, log_every=500)
    result = jmeta.evaluate(
        jax.random.key(1),
        learner,
        fitted.params,
        fitted.state,
        jmeta.sinusoid(queries=100),
        metric=jmeta.mean_squared_error,
    )
    assert result["mean_squared_error"] + result["ci95"] < 1.0


def test_unseen_goals():
    learner = jmeta.maml_rl(jmeta.linen(Policy(Box(2, -0.1, 0.1))), trace=0.9)
    source = point_navigation()
    fitted = jmeta.fit(jax.random.key(0), learner, source, steps=200, tasks=20, optimizer=optax.adam(3e-3))
    after = jmeta.evaluate(
        jax.random.key(1), learner, fitted.params, fitted.state, source, episodes=200, metric=jmeta.mean_return
    )
    assert after["mean_return"] - after["ci95"] > -18  # before the update it is -38


def test_unseen_bandits():
    learner = jmeta.rl2(jmeta.linen(RecurrentPolicy(Discrete(5), width=64)), inner_steps=0)
    source = bandit()
    optimizer = LEARNERS["rl2"].optimizer(3e-3, 1000)
    fitted = jmeta.fit(jax.random.key(0), learner, source, steps=1000, tasks=512, task_chunk=512, optimizer=optimizer)
    result = jmeta.evaluate(
        jax.random.key(1), learner, fitted.params, fitted.state, source, episodes=2000, metric=jmeta.mean_return
    )
    assert result["mean_return"] - result["ci95"] > 6.3  # chance is 5
