"""What holds for every learner of the registry; a new learner is tested by its line there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmeta
from jmeta.learners import LEARNERS

WAYS, SHOTS, QUERIES = 3, 2, 4
KEY = jax.random.key(0)


@pytest.fixture(scope="module", params=sorted(LEARNERS))
def learner(request):
    entry = LEARNERS[request.param]
    return entry.make(jmeta.linen(jmeta.Conv4(outputs=None if entry.embedding else WAYS, features=8)))


@pytest.fixture(scope="module")
def source():
    """Six classes of noisy 16x16 images, easy to tell apart."""
    random = np.random.default_rng(0)
    means = random.normal(size=(6, 1, 16, 16, 1))
    images = (means + 0.3 * random.normal(size=(6, 10, 16, 16, 1))).reshape(60, 16, 16, 1)
    return jmeta.from_arrays(images, np.repeat(np.arange(6), 10), ways=WAYS, shots=SHOTS, queries=QUERIES)


def sampled(source, seed=0, tasks=4):
    return jax.vmap(source.sample, (0, None))(jax.random.split(jax.random.key(seed), tasks), source.data)


def task_of(tasks, i):
    return jax.tree.map(lambda x: x[i], tasks)


def assert_same(a, b):
    """Bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, a, b)


def answers(learner, params, state):
    @jax.jit
    def run(task):
        adapted = learner.adapt(KEY, params, state, task.support)
        return adapted, learner.predict(KEY, adapted, task.query.inputs)

    return run


def test_shapes_and_dtypes(learner, source):
    task = task_of(sampled(source), 0)
    params, state = learner.init(KEY, task)
    _, outputs = answers(learner, params, state)(task)
    assert outputs.shape == (WAYS * QUERIES, WAYS)
    loss, (new_state, info) = learner.objective(KEY, params, state, sampled(source))
    assert loss.shape == ()
    assert jax.tree.structure(new_state) == jax.tree.structure(state)
    assert {x.dtype for x in jax.tree.leaves((params, new_state, outputs, loss, info))} == {jnp.dtype("float32")}


def test_jit_and_vmap_over_tasks_change_nothing(learner, source):
    tasks = sampled(source)
    params, state = learner.init(KEY, task_of(tasks, 0))

    def run(task):
        return learner.predict(KEY, learner.adapt(KEY, params, state, task.support), task.query.inputs)

    together = jax.jit(jax.vmap(run))(tasks)
    for i in range(2):
        np.testing.assert_allclose(together[i], run(task_of(tasks, i)), rtol=1e-3, atol=1e-4)


def test_queries_never_reach_adapt(learner, source):
    tasks = sampled(source)
    task, other = task_of(tasks, 0), task_of(tasks, 1)
    params, state = learner.init(KEY, task)
    run = answers(learner, params, state)
    adapted, outputs = run(task)
    mixed, mixed_outputs = run(jmeta.Task(task.support, other.query))
    assert_same(adapted, mixed)
    assert not np.array_equal(outputs, mixed_outputs)


def test_tasks_never_reach_each_other(learner, source):
    tasks, others = sampled(source), sampled(source, seed=1)
    params, state = learner.init(KEY, task_of(tasks, 0))
    run = jax.jit(jax.vmap(answers(learner, params, state)))
    changed = jax.tree.map(lambda x, y: x.at[1].set(y[1]), tasks, others)
    before, after = run(tasks)[1], run(changed)[1]
    kept = jnp.asarray([0, 2, 3])
    assert_same(before[kept], after[kept])
    assert not np.array_equal(before[1], after[1])


def test_adaptation_depends_on_the_support(learner, source):
    tasks = sampled(source)
    params, state = learner.init(KEY, task_of(tasks, 0))
    run = answers(learner, params, state)
    first = run(task_of(tasks, 0))[1]
    swapped = run(jmeta.Task(task_of(tasks, 1).support, task_of(tasks, 0).query))[1]
    assert not np.array_equal(first, swapped)


def test_it_learns_in_one_compiled_program(learner, source):
    fitted = jmeta.fit(KEY, learner, source, steps=30, tasks=4, log_every=10)
    before = jmeta.fit(KEY, learner, source, steps=0, tasks=4)
    arguments = {"episodes": 50}
    accuracy = jmeta.evaluate(KEY, learner, fitted.params, fitted.state, source, **arguments)["accuracy"]
    assert accuracy > 1.5 / WAYS
    assert fitted.history[-1]["loss"] < fitted.history[0]["loss"]
    assert not np.array_equal(*(jax.flatten_util.ravel_pytree(f.params)[0] for f in (before, fitted)))


def test_a_learner_is_traced_once_for_all_chunks(learner, source):
    traces = []

    def counted(key, params, state, tasks):
        traces.append(None)
        return learner.objective(key, params, state, tasks)

    counting = learner._replace(objective=counted)
    jmeta.fit(KEY, counting, source, steps=2, tasks=2, log_every=2)
    once = len(traces)
    fitted = jmeta.fit(KEY, counting, source, steps=7, tasks=2, log_every=2)
    # A second run of four chunks, the last one shorter, traces one example for its shapes and compiles nothing.
    assert len(traces) <= once + 1
    assert fitted.history[-1]["step"] == 7


def test_a_model_that_does_not_fit_is_told_before_anything_compiles(source):
    for name, entry in LEARNERS.items():
        if not entry.embedding:
            wrong = entry.make(jmeta.linen(jmeta.MLP(outputs=WAYS + 1)))
            with pytest.raises(jmeta.ModelError, match=f"give the model {WAYS} outputs"):
                jmeta.fit(KEY, wrong, source, steps=1)
            assert name
