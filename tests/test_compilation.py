"""Which static arguments are one, and how many programs are kept."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jmeta
from jmeta.compilation import Compiled, compiled, made_of
from jmeta.evaluate import _evaluate
from jmeta.rl import Box, Environment, bandit, environment_tasks, reveal
from jmeta.train import _init, _run

KEY = jax.random.key(0)


def arrays(shift=0.0, **options):
    x = np.random.default_rng(0).normal(size=(40, 3)) + shift
    return jmeta.from_arrays(x, np.repeat(np.arange(4), 10), **{"ways": 3, "shots": 1, "queries": 2} | options)


def groups(shift=0.0, **options):
    x = np.random.default_rng(0).normal(size=(40, 3)) + shift
    return jmeta.from_groups(x, x[:, 0], np.repeat(np.arange(4), 10), **{"shots": 2, "queries": 2} | options)


def assays(shift=0.0, **options):
    random = np.random.default_rng(0)
    labels = random.integers(0, 2, size=(40, 4))
    return jmeta.from_assays(random.normal(size=(40, 3)) + shift, labels, **{"shots": 4, "queries": 4} | options)


def described(shift=0.0, **options):
    return arrays(shift, descriptions=np.eye(4) + shift, **options)


def searched(shift=0.0, **options):
    return jmeta.search_tasks(arrays(shift, **options), arrays(shift + 1.0, **options))


MAKERS = {
    "arrays": (arrays, {"queries": 3}),
    "batches": (functools.partial(arrays, batch=8), {"batch": 9}),
    "descriptions": (described, {"queries": 3}),
    "groups": (groups, {"queries": 3}),
    "assays": (assays, {"queries": 5}),
    "sinusoid": (lambda shift=0.0, **options: jmeta.sinusoid(**options), {"queries": 3}),
    "search": (searched, {"queries": 3}),
    "bandit": (lambda shift=0.0, **options: bandit(**options), {"queries": 3}),
    "oracle": (lambda shift=0.0, **options: reveal(bandit(**options)), {"queries": 3}),
}


@pytest.mark.parametrize("name", MAKERS)
def test_sources_of_the_same_sizes_share_a_program(name):
    make, other = MAKERS[name]
    assert made_of(make(0.0).sample) == made_of(make(1.0).sample)
    assert made_of(make().sample) != made_of(make(**other).sample)


def linen(outputs=3, **options):
    return jmeta.linen(jmeta.MLP(outputs=outputs, hidden=(4,), **options))


LEARNERS = [
    lambda: jmeta.maml(linen()),
    lambda: jmeta.maml(linen(), inner_rate=0.5),
    lambda: jmeta.maml(linen(), inner_steps=2),
    lambda: jmeta.maml(linen(dtype="bfloat16")),
    lambda: jmeta.maml(linen(), adjoint=jmeta.first_order()),
    lambda: jmeta.maml(linen(), adjoint=jmeta.truncated(1)),
    lambda: jmeta.maml(linen(), adjoint=jmeta.implicit(jmeta.neumann(3))),
    lambda: jmeta.maml(linen(), inner_optimizer=functools.partial(optax.sgd, momentum=0.9)),
    lambda: jmeta.maml(linen(), inner_optimizer=functools.partial(optax.sgd, momentum=0.8)),
    lambda: jmeta.anil(linen()),
    lambda: jmeta.maml_plus_plus(linen(), inner_steps=2),
    lambda: jmeta.reptile(linen()),
    lambda: jmeta.prototypical(linen()),
    lambda: jmeta.prototypical(linen(), distance=jmeta.cosine),
    lambda: jmeta.transfer(linen()),
    lambda: jmeta.relation(linen()),
    lambda: optax.adam(1e-3),
    lambda: optax.adam(1e-2),
    lambda: optax.adam(optax.cosine_decay_schedule(1e-3, 10)),
    lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)),
    lambda: jmeta.repeated(optax.adam(1e-3), 2),
    lambda: jmeta.trust_region(),
]


def test_equal_calls_make_one_learner_and_others_another():
    keys, again = ([made_of(make()) for make in LEARNERS] for _ in range(2))
    for i, key in enumerate(keys):
        assert [key == other for other in again] == [i == j for j in range(len(keys))]


def test_a_function_of_the_user_is_itself():
    """It reads a global name, as in a cell of a notebook that is run again with another value."""
    code, place = "def loss(outputs, targets):\n    return scale * (outputs - targets)", {"scale": 1.0}
    exec(code, place)
    first = place["loss"]
    exec(code, place | {"scale": 2.0})
    exec(code, place)
    assert first.__code__ == place["loss"].__code__
    assert made_of(first) != made_of(place["loss"]) and made_of(first) == made_of(first)


@pytest.mark.parametrize(
    ("a", "b"), [(1, 1.0), (1, True), (0.0, -0.0), ((1,), (1.0,)), (jnp.ones(2), jnp.ones(2)), ([1], [1]), ("1", 1)]
)
def test_what_python_takes_for_equal_and_a_program_does_not(a, b):
    assert made_of(a) != made_of(b)
    assert made_of(a) == made_of(a)


def test_programs_are_shared_by_what_is_made_anew():
    sizes = []
    for shift in (0.0, 1.0):
        learner, source = jmeta.prototypical(linen(None)), arrays(shift)
        fitted = jmeta.fit(KEY, learner, source, optimizer=optax.adam(1e-3), steps=2, tasks=2)
        jmeta.evaluate(KEY, learner, fitted.params, fitted.state, source, episodes=2)
        sizes.append([len(compiled(_init, nested=True)), len(compiled(_run)), len(compiled(_evaluate))])
    assert sizes[0] == sizes[1]


def test_the_number_of_programs_is_bounded_and_the_oldest_goes():
    traced = []

    def scaled(x, *, factor):
        traced.append(factor)
        return factor * x

    program = Compiled(scaled, size=2)
    for factor in (1.0, 2.0, 1.0, 3.0, 1.0, 2.0):
        assert program(jnp.ones(()), factor=factor) == factor
    assert len(program) == 2 and traced == [1.0, 2.0, 3.0, 2.0]


def test_the_tasks_of_an_environment_do_not_depend_on_its_own_parameters():
    def make(start):
        step = lambda key, state, action, params: (state, state, params.sum(), jnp.asarray(False), {})  # noqa: E731
        environment = Environment(jnp.full(2, start), lambda key, params: (jnp.zeros(1),) * 2, step, Box(1), 2)
        return environment_tasks(environment, lambda key: jax.random.normal(key, (2,)))

    tasks = [make(start).sample(KEY, ()) for start in (0.0, 1.0)]
    jax.tree.map(np.testing.assert_array_equal, *(jax.tree.leaves(task) for task in tasks))
