"""What holds for every learner of the registry; a new learner is tested by its line there."""

import functools
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jmeta
from jmeta.models.norms import norm_layer
from jmeta.rl import Box, Discrete, Trajectory, point_navigation, returns
from jmeta.runs import settings
from jmeta.runs.registry import LEARNERS, MODELS
from jmeta.runs.registry import LearnerEntry as Entry

WAYS, SHOTS, QUERIES = 3, 2, 4
KEY = jax.random.key(0)
SAMPLED = {}  # tasks, drawn once for all learners
QUICK = ("maml", "prototypical", "late_fusion", "linear_probe")  # one of each family; the others are slow
QUICK_ENTRIES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in sorted(LEARNERS)]


@pytest.fixture(scope="module", params=sorted(LEARNERS))
def entry(request, free_programs):
    yield LEARNERS[request.param]
    free_programs()


# iMAML's inner loop ends near its minimum in most tasks, and fit says so of the others.
pytestmark = pytest.mark.filterwarnings("ignore::jmeta.ConvergenceWarning")


class Network(nn.Module):
    """A convolution, a normalisation, and a head: the smallest model with all that learners treat apart."""

    outputs: int | None
    norm: str = "group"
    context: int = 0

    @nn.compact
    def __call__(self, images, train, mask=None):
        x = jmeta.Conv(8, (3, 3), strides=2, use_bias=False)(images)
        norm = norm_layer(self.norm, scale=True, groups=4)
        x = nn.relu(norm(x, train=train, mask=mask)).mean(axis=(1, 2))
        if self.context:
            context = self.param("context", nn.initializers.zeros_init(), (self.context,), jnp.float32)
            x = x * (1 + nn.Dense(8)(context[None]))
        return x if self.outputs is None else nn.Dense(self.outputs, name="head")(x)


class Kind(NamedTuple):
    """What a learner of one kind of support is tested with."""

    network: Any  # (entry, fits) -> module; one that does not fit the tasks where `fits` is false
    source: Any  # batch -> tasks
    answers: tuple[int, ...]
    metric: Any
    misfit: str
    learned: Any  # (metric before, metric after) -> whether it learned


def make(entry: Entry, fits: bool = True, norm: str | None = None, **options: int) -> jmeta.MetaLearner:
    """The learner with the normalisation that is its default, or another."""
    network = MODELS[entry.defaults["model"]].make
    default = getattr(network, "keywords", {}).get("norm", "group")
    return entry.make(jmeta.linen(KINDS[entry.acts].network(entry, fits, norm or default)), **options)


def image_network(entry, fits, norm):
    context = {name: value for name, value in entry.network.items() if name == "context"}
    return Network(None if entry.embedding else WAYS + 1 - fits, norm, **context)


def acting_network(entry, fits, norm):
    return MODELS[entry.defaults["model"]].make(actions=Box(2) if fits else Discrete(7))


@pytest.fixture(scope="module")
def learner(entry):
    return make(entry)


@functools.cache
def episodes(batch=None, **size):
    """Six described classes of noisy 8x8 images, easy to tell apart by their stripes."""
    random = np.random.default_rng(0)
    means = random.normal(size=(6, 1, 2, 2, 1)).repeat(4, axis=2).repeat(4, axis=3)
    images = (means + 0.3 * random.normal(size=(6, 10, 8, 8, 1))).reshape(60, 8, 8, 1)
    labels = np.repeat(np.arange(6), 10)
    size = {"ways": WAYS, "shots": SHOTS, **size}
    return jmeta.from_arrays(images, labels, queries=QUERIES, batch=batch, descriptions=np.eye(6), **size)


@functools.cache
def navigation(batch=None):
    """Short walks to a goal."""
    return point_navigation(horizon=8, queries=QUERIES)


KINDS = {
    False: Kind(
        image_network,
        episodes,
        (WAYS * QUERIES, WAYS),
        jmeta.accuracy,
        f"give the model {WAYS} outputs",
        lambda before, after: after > 1.5 / WAYS,
    ),
    True: Kind(
        acting_network,
        navigation,
        (QUERIES,),
        jmeta.mean_return,
        r"the policy gives . outputs where Box\(",
        lambda before, after: after > 0.95 * before,  # nearer to the goal by a twentieth of the way
    ),
}


@pytest.fixture(scope="module")
def kind(entry):
    return KINDS[entry.acts]


@pytest.fixture(scope="module")
def source(kind):
    return kind.source()


@pytest.fixture(scope="module")
def training(entry, kind):
    return kind.source(batch=16 if entry.pretrains else None)


@pytest.fixture(scope="module")
def initial(learner, training):
    """θ and state."""
    return jax.jit(learner.init)(KEY, task_of(sampled(training), 0))


def sampled(source, seed=0, tasks=4):
    key = id(source), seed, tasks
    if key not in SAMPLED:  # the sources of this file live as long as it does
        draw = jax.jit(jax.vmap(source.sample, (0, None)))
        # in NumPy, of which a part or a sum is no program of its own
        SAMPLED[key] = jax.device_get(draw(jax.random.split(jax.random.key(seed), tasks), source.data))
    return SAMPLED[key]


def task_of(tasks, i):
    return jax.tree.map(lambda x: x[i], tasks)


def assert_same(a, b):
    """Bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, a, b)


def answer(learner, adapted, inputs):
    """An array: of an episode its return."""
    outputs = learner.predict(KEY, adapted, inputs)
    return returns(outputs) if isinstance(outputs, Trajectory) else outputs


def answers(learner):
    def run(params, state, task):
        adapted = learner.adapt(KEY, params, state, task.support)
        return adapted, answer(learner, adapted, task.query.inputs)

    return run


@pytest.fixture(scope="module")
def run(learner, initial):
    """A task -> what is adapted to it, and its answers; one program for all tests of a learner."""
    return functools.partial(jax.jit(answers(learner)), *initial)


@pytest.fixture(scope="module")
def run_together(learner, initial):
    """As `run`, of several tasks."""
    return functools.partial(jax.jit(jax.vmap(answers(learner), (None, None, 0))), *initial)


def test_shapes_and_dtypes(learner, source, training, initial, run, kind):
    params, state = initial
    _, outputs = run(task_of(sampled(source), 0))
    assert outputs.shape == kind.answers
    batch = jax.eval_shape(learner.collect, KEY, params, state, jax.tree.map(jnp.asarray, sampled(training)))
    loss, (new_state, info) = jax.eval_shape(learner.objective, KEY, params, state, batch)
    assert loss.shape == ()
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new_state) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert {x.dtype for x in jax.tree.leaves((params, outputs, loss, info))} == {jnp.dtype("float32")}


def test_vmap_over_tasks_changes_nothing(source, run, run_together):
    tasks = sampled(source)
    together = run_together(tasks)[1]
    for i in range(2):
        np.testing.assert_allclose(together[i], run(task_of(tasks, i))[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("entry", QUICK_ENTRIES, indirect=True, scope="module")
def test_jit_changes_nothing(entry, learner, source, initial, run):
    tasks = sampled(source)
    for i in range(2):
        task = jax.tree.map(jnp.asarray, task_of(tasks, i))
        np.testing.assert_allclose(run(task)[1], answers(learner)(*initial, task)[1], rtol=1e-3, atol=1e-4)


def test_queries_never_reach_adapt(source, run):
    tasks = sampled(source)
    task, other = task_of(tasks, 0), task_of(tasks, 1)
    adapted, outputs = run(task)
    mixed, mixed_outputs = run(jmeta.Task(task.support, other.query))
    assert_same(adapted, mixed)
    assert not np.array_equal(outputs, mixed_outputs)


def test_a_query_alone_has_the_answer_that_it_has_among_others(entry, learner, source, run):
    """With the normalisation that is the learner's default, unless its line says that it is transductive."""
    if entry.acts:
        pytest.skip("an episode draws by its place among the others")
    task = task_of(sampled(source), 0)
    adapted, together = run(task)
    ask = jax.jit(lambda inputs: answer(learner, adapted, inputs))
    alone = [ask(jax.tree.map(lambda x, i=i: x[i : i + 1], task.query.inputs))[0] for i in (0, len(together) - 1)]
    alone, together = np.stack(alone), np.asarray(together)[[0, -1]]
    if entry.transductive:
        assert np.abs(alone - together).max() > 1e-3
    else:
        np.testing.assert_allclose(alone, together, rtol=1e-5, atol=1e-5)


def test_defaults_hold_for_one_query():
    for name, entry in LEARNERS.items():
        data = "point_navigation" if entry.acts else "glyphs"
        assert settings.resolve(name, data).norm in (None, "group", "layer", "running")


NORMED = [
    pytest.param(name, norm, marks=() if name in QUICK else pytest.mark.slow)
    for name in sorted(LEARNERS)
    for norm in ("group", "per_task", "running")
]


@pytest.mark.parametrize(("entry", "norm"), NORMED, indirect=["entry"], scope="module")
def test_rows_that_are_not_there_change_no_answer(entry, source, training, norm):
    if entry.acts:
        pytest.skip("an environment has no rows")
    learner = make(entry, norm=norm)
    task, other = (task_of(sampled(source), i) for i in (0, 1))
    support, n = task.support, len(task.support.targets)
    padded = jmeta.Examples(
        np.concatenate([support.inputs, 50.0 * other.support.inputs]),
        np.concatenate([support.targets, np.zeros_like(other.support.targets)]),
        support.descriptions,
        np.arange(2 * n) < n,
    )

    @jax.jit
    def both(example, tasks):
        initial = jax.jit(learner.init)(KEY, example)
        return [answers(learner)(*initial, task)[1] for task in tasks]

    expected, outputs = both(task_of(sampled(training), 0), (task, task._replace(support=padded)))
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5)


def test_tasks_never_reach_each_other(source, run_together):
    tasks, others = sampled(source), sampled(source, seed=1)
    changed = jax.tree.map(lambda x, y: np.stack([x[0], y[1], *x[2:]]), tasks, others)
    before, after = (np.asarray(run_together(some)[1]) for some in (tasks, changed))
    kept = [0, 2, 3]
    assert_same(before[kept], after[kept])
    assert not np.array_equal(before[1], after[1])


def test_adaptation_depends_on_the_support(source, run):
    tasks = sampled(source)
    first = run(task_of(tasks, 0))[1]
    swapped = run(jmeta.Task(task_of(tasks, 1).support, task_of(tasks, 0).query))[1]
    assert not np.array_equal(first, swapped)


@pytest.mark.parametrize("entry", QUICK_ENTRIES, indirect=True, scope="module")
def test_it_learns_in_one_compiled_program(entry, learner, source, training, kind):
    traces = []

    def counted(key, params, state, tasks):
        traces.append(None)
        return learner.objective(key, params, state, tasks)

    counting = learner._replace(objective=counted)
    optimizer = entry.optimizer(entry.defaults.get("outer_rate", 3e-3), 400)
    fit = {"optimizer": optimizer, "tasks": 4, "log_every": 100}
    before = jmeta.fit(KEY, counting, training, steps=0, **fit)
    traces.clear()
    fitted = jmeta.fit(KEY, counting, training, steps=350, **fit)
    once = len(traces)
    # A second run traces one example for its shapes and compiles nothing; the last scan is longer than what is left.
    jmeta.fit(KEY, counting, training, steps=101, **fit)
    assert len(traces) <= once + 1
    assert fitted.history[-1]["step"] == 350
    assert not np.array_equal(*(jax.flatten_util.ravel_pytree(f.params)[0] for f in (before, fitted)))
    steps = entry.defaults.get("test_inner_steps")
    tester = learner if steps is None else make(entry, inner_steps=steps)
    first, last = (
        jmeta.evaluate(KEY, tester, f.params, f.state, source, episodes=50, metric=kind.metric)[kind.metric.__name__]
        for f in (before, fitted)
    )
    assert kind.learned(first, last)


@pytest.mark.parametrize("entry", QUICK_ENTRIES, indirect=True, scope="module")
def test_tasks_of_which_a_part_is_not_there(entry, learner, initial):
    """Ways and shots vary in one shape: values and gradients are finite, and no answer is a class that is not there."""
    if entry.acts:
        pytest.skip("an environment has no classes")
    masked = episodes(ways=(2, WAYS), shots=(1, SHOTS))
    training = episodes(batch=16) if entry.pretrains else masked
    tasks = sampled(training)
    params, state = initial
    assert jax.tree.map(lambda x: (x.shape, x.dtype), jax.eval_shape(learner.init, KEY, task_of(tasks, 0))) == (
        jax.tree.map(lambda x: (x.shape, x.dtype), initial)
    )
    loss = jax.jit(jax.value_and_grad(lambda p, tasks: learner.objective(KEY, p, state, tasks)[0]))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(loss(params, tasks)))
    episode = sampled(masked, tasks=8)
    outputs = np.asarray(jax.jit(jax.vmap(answers(learner), (None, None, 0)))(params, state, episode)[1])
    assert np.isfinite(outputs).all()
    if entry.embedding and not entry.pretrains:  # a head has an output for each way that it was made for
        present = episode.support.targets.any(axis=1)
        assert not present.all()
        assert np.take_along_axis(present, outputs.argmax(axis=2), axis=1).all()


@pytest.mark.parametrize("entry", QUICK_ENTRIES, indirect=True, scope="module")
def test_without_inner_steps_a_learner_is_a_baseline(entry, source, initial, kind):
    if "inner_steps" not in inspect.signature(entry.make).parameters or entry.pretrains:
        pytest.skip("has no inner loop in training")
    learner = make(entry, inner_steps=0)
    _, outputs = jax.jit(answers(learner))(*initial, task_of(sampled(source), 0))
    assert outputs.shape == kind.answers
    if entry.make in (jmeta.reptile, jmeta.maml_plus_plus):  # whose objectives say nothing without a step
        with pytest.raises(jmeta.ConfigError, match="inner_steps is 0; give at least 1"):
            jmeta.fit(KEY, learner, source, steps=1)
    else:
        assert np.isfinite(jmeta.fit(KEY, learner, source, steps=1, tasks=2).history[0]["loss"])


def test_a_model_that_does_not_fit_is_told_before_anything_compiles():
    for entry in LEARNERS.values():
        if not entry.embedding:
            kind = KINDS[entry.acts]
            with pytest.raises(jmeta.ModelError, match=kind.misfit):
                jmeta.fit(KEY, make(entry, fits=False), kind.source(), steps=1)
