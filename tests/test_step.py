"""What a task draws is its own: it does not depend on how the tasks of a meta-step are divided."""

import functools

import jax
import numpy as np
import optax
import pytest
from flax import linen as nn

import jmeta
from jmeta.rl import Discrete, bandit

KEY = jax.random.key(0)
TASKS = 4


class Dropped(nn.Module):
    outputs: int | None

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dropout(0.5, deterministic=not train)(nn.relu(nn.Dense(16)(x)))
        return x if self.outputs is None else nn.Dense(self.outputs)(x)


def vectors():
    inputs = np.random.default_rng(0).normal(size=(60, 6)).astype(np.float32)
    return jmeta.from_arrays(inputs, np.repeat(np.arange(6), 10), ways=3, shots=2, queries=2)


DRAWING = {
    "reptile": lambda: (jmeta.reptile(jmeta.linen(Dropped(3)), inner_steps=2, inner_batch=2), vectors()),
    "prototypical": lambda: (jmeta.prototypical(jmeta.linen(Dropped(None))), vectors()),
    "in_context": lambda: (
        jmeta.in_context(jmeta.linen(jmeta.MLP(outputs=None, hidden=(8,))), heads=2, layers=1),
        vectors(),
    ),
    "rl2": lambda: (
        jmeta.rl2(jmeta.linen(jmeta.rl.RecurrentPolicy(Discrete(3), width=4)), inner_steps=0),
        bandit(arms=3, pulls=3),
    ),
}


@pytest.fixture(params=DRAWING, scope="module")
def drawing(request):
    return DRAWING[request.param]()


def assert_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-6), a, b)


def collected(learner, source, keys):
    """θ, the state, and what the learner saw of its tasks."""
    tasks = jax.vmap(source.sample, (0, None))(keys, source.data)
    params, state = learner.init(KEY, jax.tree.map(lambda x: x[0], tasks))
    return params, state, learner.collect(keys, params, state, tasks)


def part_of(tree, start, stop):
    return jax.tree.map(lambda x: x[start:stop], tree)


def test_a_batch_is_the_mean_of_its_parts(drawing):
    learner, source = drawing
    keys = jax.random.split(KEY, TASKS)
    params, state, tasks = jax.jit(functools.partial(collected, learner, source))(keys)
    value_and_gradient = jax.jit(jax.value_and_grad(lambda p, key, batch: learner.objective(key, p, state, batch)[0]))
    whole = value_and_gradient(params, keys, tasks)
    for size in (1, 2):
        parts = [value_and_gradient(params, *part_of((keys, tasks), i, i + size)) for i in range(0, TASKS, size)]
        assert_close(jax.tree.map(lambda *x: np.stack(x).mean(axis=0), *parts), whole)


def test_a_step_is_the_same_for_every_chunk(drawing):
    learner, source = drawing
    optimizer = optax.sgd(0.1)
    start = jmeta.init(KEY, learner, optimizer, source)
    options = [{"task_chunk": chunk} for chunk in (TASKS, 2)] + [{"skip_nonfinite": True}]
    after = [
        jax.jit(jmeta.make_step(learner, optimizer, source, tasks=TASKS, **given))(start, None) for given in options
    ]
    for other, info in after[1:]:
        assert_close(
            (other.params, other.state, info["loss"]), (after[0][0].params, after[0][0].state, after[0][1]["loss"])
        )


def test_a_learner_that_takes_one_key_is_told():
    learner, source = DRAWING["prototypical"]()

    def objective(key, params, state, tasks):
        return learner.objective(jax.random.split(key)[0], params, state, tasks)

    def collect(key, params, state, tasks):
        return jax.tree.map(lambda x: x + jax.random.normal(key, x.shape), tasks)

    for one_key in (learner._replace(objective=objective), learner._replace(collect=collect)):
        with pytest.raises(
            jmeta.ModelError, match=r"takes the keys of its tasks, \[tasks\], for a single one; write it for one"
        ):
            jmeta.fit(KEY, one_key, source, steps=1, tasks=2)


def test_one_key_is_split_for_a_batch():
    learner, source = DRAWING["reptile"]()
    keys = jax.random.split(KEY, TASKS)
    params, state, tasks = jax.jit(functools.partial(collected, learner, source))(keys)
    one, each = jax.jit(lambda: [learner.objective(key, params, state, tasks)[0] for key in (KEY, keys)])()
    assert one == each
