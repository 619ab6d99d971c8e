"""Learning curves: each learner learns unseen characters, and MAML unseen waves. Minutes; `make test-slow`."""

import jax
import pytest

import jmeta
from jmeta.learners import LEARNERS

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("name", "dtype"), [*((name, None) for name in LEARNERS), ("maml", "bfloat16")])
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
