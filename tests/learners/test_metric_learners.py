"""Learners that compare, against NumPy and SciPy, and all of them on tasks of which a part is not there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from jax.test_util import check_grads

import jmeta
from jmeta.core import Examples
from jmeta.learners.matching import label_attention
from jmeta.learners.metaoptnet import support_vectors
from jmeta.learners.r2d2 import ridge

KEY = jax.random.key(0)
IDENTITY = jmeta.identity()
MLP = jmeta.linen(jmeta.MLP(outputs=None, hidden=(8,)))
LEARNERS = {
    "prototypical": jmeta.prototypical(MLP),
    "matching": jmeta.matching(MLP),
    "matching, full context": jmeta.matching(MLP, full_context=True),
    "relation": jmeta.relation(MLP),
    "r2d2": jmeta.r2d2(MLP),
    "metaoptnet": jmeta.metaoptnet(MLP),
    "metaoptnet, ridge": jmeta.metaoptnet(MLP, head="ridge"),
    "in_context": jmeta.in_context(MLP, layers=1),
    "in_context, described": jmeta.in_context(MLP, layers=1, descriptions=True),
    "zero_shot": jmeta.zero_shot(MLP),
    "am3": jmeta.am3(MLP),
    "late_fusion": jmeta.late_fusion(MLP, folds=2),
}


@functools.cache
def begun(name):
    """θ and state."""
    return jax.jit(LEARNERS[name].init)(KEY, task())


def arrays(rows=6, features=4, ways=3, seed=0):
    random = np.random.default_rng(seed)
    return random.normal(size=(rows, features)), np.eye(ways)[np.arange(rows) % ways]


def task(rows=6, queries=5, features=4, ways=3, seed=0):
    random = np.random.default_rng(seed)
    x, y = arrays(rows, features, ways, seed)
    told = random.normal(size=(ways, 7))
    support, query = (x, y, told), arrays(queries, features, ways, seed + 1)
    as_float32 = [[jnp.asarray(part, jnp.float32) for part in parts] for parts in (support, query)]
    return jmeta.Task(Examples(*as_float32[0]), Examples(*as_float32[1]))


def answer(learner, params, state, support, inputs):
    return answering(learner)(params, state, support, inputs)


@functools.cache
def answering(learner):
    return jax.jit(
        lambda params, state, support, inputs: learner.predict(KEY, learner.adapt(KEY, params, state, support), inputs)
    )


@pytest.mark.parametrize("rows", [6, 20])
def test_ridge_is_the_minimum(float64, rows):
    x, y = arrays(rows, features=8)
    λ = 0.7
    stacked = np.concatenate([x, np.sqrt(λ) * np.eye(8)]), np.concatenate([y, np.zeros((8, 3))])
    expected = np.linalg.lstsq(*stacked, rcond=None)[0]
    np.testing.assert_allclose(ridge(jnp.asarray(x), jnp.asarray(y), jnp.asarray(λ)), expected, atol=1e-10)
    check_grads(jax.jit(lambda x, λ: ridge(x, jnp.asarray(y), λ)), (jnp.asarray(x), jnp.asarray(λ)), order=2)


def test_r2d2_is_a_scaled_ridge_regression():
    learner, episode = jmeta.r2d2(IDENTITY, penalty=2.0, scale=3.0), task()
    params, state = jax.jit(learner.init)(KEY, episode)
    outputs = answer(learner, params, state, episode.support, episode.query.inputs)
    x, y = (np.asarray(part, np.float64) for part in episode.support[:2])
    w = np.linalg.solve(x.T @ x + 2.0 * np.eye(4), x.T @ y)
    np.testing.assert_allclose(outputs, 3.0 * np.asarray(episode.query.inputs) @ w, rtol=1e-4, atol=1e-5)


solved = jax.jit(support_vectors, static_argnums=(2, 3))


def dual(x, y, a):
    return 0.5 * np.einsum("ik,ij,jk", a, x @ x.T + np.eye(len(x)), a) - (a * y).sum()


@pytest.mark.parametrize("margin_cost", [0.1, 10.0])
def test_the_support_vector_machine_against_scipy(float64, margin_cost):
    x, y = arrays(rows=9, features=5)
    result = scipy.optimize.minimize(
        lambda a: dual(x, y, a.reshape(y.shape)),
        np.zeros(y.size),
        method="SLSQP",
        bounds=[(None, margin_cost * label) for label in y.ravel()],
        constraints={"type": "eq", "fun": lambda a: a.reshape(y.shape).sum(axis=1)},
        options={"ftol": 1e-14, "maxiter": 500},
    )
    a, residual = map(np.asarray, solved(jnp.asarray(x), jnp.asarray(y), margin_cost, 300))
    np.testing.assert_allclose(dual(x, y, np.asarray(a)), result.fun, rtol=1e-7)
    np.testing.assert_allclose(a, result.x.reshape(y.shape), atol=1e-4)
    assert residual < 1e-8
    assert np.abs(a.sum(axis=1)).max() < 1e-9
    assert (np.asarray(a) <= margin_cost * y + 1e-9).all()


def test_the_gradient_through_the_support_vector_machine(float64):
    x, y = map(jnp.asarray, arrays(rows=6, features=5))
    check_grads(jax.jit(lambda x: x.T @ support_vectors(x, y, 0.3, 300)[0]), (x,), order=1, modes=["rev"])


def test_default_steps_of_the_solver_are_enough_for_a_5_way_5_shot_task():
    random = np.random.default_rng(0)
    x, y = (
        jnp.asarray(random.normal(size=(25, 64)), jnp.float32),
        jnp.asarray(np.eye(5)[np.arange(25) % 5], jnp.float32),
    )
    (few, residual), (many, _) = (map(np.asarray, solved(x, y, 0.1, steps)) for steps in (50, 2000))
    assert residual < 1e-3
    assert np.linalg.norm(few - many) < 1e-2 * np.linalg.norm(many)


def test_matching_is_attention_over_the_labels():
    learner, episode = jmeta.matching(IDENTITY, temperature=0.5), task()
    outputs = answer(learner, *learner.init(KEY, episode), episode.support, episode.query.inputs)
    x, y = map(np.asarray, episode.support[:2])
    z = np.asarray(episode.query.inputs)
    cosines = (z / np.linalg.norm(z, axis=1)[:, None]) @ (x / np.linalg.norm(x, axis=1)[:, None]).T
    attention = np.exp(cosines / 0.5) / np.exp(cosines / 0.5).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(outputs, np.log(attention @ y), rtol=1e-4)


def test_attention_of_no_weight_has_finite_gradients():
    scores, targets = jnp.asarray([[0.0, -1e4, 3.0]]), jnp.asarray([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    gradient = jax.grad(lambda scores: jmeta.softmax_cross_entropy(label_attention(scores, targets), targets[1:2]))(
        scores
    )
    assert jnp.isfinite(gradient).all()


def test_relation_compares_each_query_with_each_class_mean():
    compare = jmeta.Model(  # −‖z − c‖ of the pair [z, c]
        init=lambda key, inputs: ({}, {}),
        apply=lambda key, params, state, pairs, *, train: (
            -jnp.linalg.norm(pairs[:, :4] - pairs[:, 4:], axis=1, keepdims=True),
            state,
        ),
    )
    learner, episode = jmeta.relation(IDENTITY, relation=compare), task()
    outputs = answer(learner, *learner.init(KEY, episode), episode.support, episode.query.inputs)
    x, y = map(np.asarray, episode.support[:2])
    distance = np.linalg.norm(np.asarray(episode.query.inputs)[:, None] - (y.T @ x / 2)[None], axis=-1)
    np.testing.assert_allclose(outputs, 1 / (1 + np.exp(distance)), rtol=1e-4)


def test_relation_takes_maps_of_features():
    maps = jmeta.Model(
        init=lambda key, inputs: ({}, {}),
        apply=lambda key, params, state, x, *, train: (x.reshape(-1, 2, 1, 2), state),
    )
    learner, episode = jmeta.relation(maps), task()
    outputs = answer(learner, *learner.init(KEY, episode), episode.support, episode.query.inputs)
    assert outputs.shape == (5, 3)


def am3_and_its_parts(episode):
    learner = jmeta.am3(MLP)
    params, state = jax.jit(learner.init)(KEY, episode)
    told = jmeta.zero_shot(MLP)
    return learner, told, params, state


def without_images(support):
    return support._replace(targets=jnp.zeros_like(support.targets))


def test_am3_without_a_shot_is_zero_shot_learning():
    episode = task()
    learner, told, params, state = am3_and_its_parts(episode)
    support, inputs = without_images(episode.support), episode.query.inputs
    expected = told.predict(KEY, told.adapt(KEY, params, state, support), inputs)
    np.testing.assert_allclose(answer(learner, params, state, support, inputs), expected, rtol=1e-5)


def test_am3_without_a_description_is_a_prototypical_network():
    episode = task()
    learner, _, params, state = am3_and_its_parts(episode)
    support = episode.support._replace(descriptions=jnp.zeros_like(episode.support.descriptions))
    expected = answer(jmeta.prototypical(MLP), params["model"], state["model"], episode.support, episode.query.inputs)
    np.testing.assert_allclose(answer(learner, params, state, support, episode.query.inputs), expected, rtol=1e-5)


def test_am3_mixes_by_the_gate():
    episode = task()
    learner, told, params, state = am3_and_its_parts(episode)
    adapted = learner.adapt(KEY, params, state, episode.support)
    w = told.adapt(KEY, params, state, episode.support).params[1]
    c = jmeta.prototypical(MLP).adapt(KEY, params["model"], state["model"], episode.support).params[1]
    λ = (adapted.params[1] - w)[:, 0] / (c - w)[:, 0]
    np.testing.assert_allclose(adapted.params[1], λ[:, None] * c + (1 - λ[:, None]) * w, rtol=1e-3, atol=1e-4)
    assert ((λ > 0) & (λ < 1)).all()
    np.testing.assert_allclose(adapted.info["image_share"], λ.mean(), rtol=1e-3)


def test_dropout_of_am3_is_of_training_alone():
    episode, learner = task(), jmeta.am3(MLP, dropout=0.7)
    params, state = jax.jit(learner.init)(KEY, episode)
    tasks, keys = jax.tree.map(lambda x: x[None], episode), jax.random.split(KEY)
    loss = jax.jit(lambda key: learner.objective(key, params, state, tasks)[0])
    losses = [loss(key) for key in keys]
    assert losses[0] != losses[1]
    plain = jmeta.am3(MLP)
    outputs = [
        one.predict(KEY, one.adapt(key, params, state, episode.support), episode.query.inputs)
        for one, key in ((learner, keys[0]), (learner, keys[1]), (plain, KEY))
    ]
    np.testing.assert_array_equal(outputs[0], outputs[1])
    np.testing.assert_array_equal(outputs[0], outputs[2])


@pytest.mark.parametrize("name", ["zero_shot", "am3", "late_fusion", "in_context, described"])
def test_a_support_without_descriptions_is_told(name):
    episode = task()
    with pytest.raises(jmeta.DataError, match="the support has no descriptions"):
        LEARNERS[name].init(KEY, episode._replace(support=Examples(*episode.support[:2])))


@pytest.mark.parametrize("name", LEARNERS)
def test_what_is_not_there_changes_nothing(name):
    """One more class without example and description, and two more examples without a label."""
    learner, episode = LEARNERS[name], task()
    params, state = begun(name)
    x, y, told, *_ = episode.support
    padded = Examples(
        jnp.concatenate([x[:1] + 3.0, x, x[2:3]]),
        jnp.pad(y, ((1, 1), (0, 1))),
        jnp.pad(told, ((0, 1), (0, 0))),
    )
    if "full context" in name:  # the LSTM reads on through the gap, though not what is in it
        padded, same = padded._replace(inputs=jnp.concatenate([x[:1], x, x[2:3]])), padded
    elif "in_context" in name:  # codes of four labels are other codes than those of three
        same, padded = (Examples(s, t, d) for s, t, d, *_ in ((padded[0] * 0.5, *padded[1:]), padded))
        padded = padded._replace(inputs=jnp.where(padded.targets.any(axis=1)[:, None], same.inputs, padded.inputs))
    else:
        same = episode.support
    expected = answer(learner, params, state, same, episode.query.inputs)
    outputs = answer(learner, params, state, padded, episode.query.inputs)
    np.testing.assert_allclose(outputs[:, :3], expected[:, :3], rtol=1e-4, atol=1e-5)
    assert (outputs.argmax(axis=1) < 3).all()
    targets = jnp.pad(episode.query.targets, ((0, 0), (0, 1)))
    assert jmeta.accuracy(outputs, targets) == jmeta.accuracy(expected[:, :3], episode.query.targets)


@pytest.mark.parametrize("name", LEARNERS)
def test_gradients_are_finite_whatever_is_not_there(name):
    learner, episode = LEARNERS[name], task()
    params, state = begun(name)
    support = episode.support
    silent = support._replace(descriptions=jnp.zeros_like(support.descriptions))
    one_way = support._replace(targets=support.targets * jnp.asarray([[1.0, 0.0, 0.0]]))
    supports = [support, without_images(support), silent, without_images(silent), one_way]
    tasks = jax.tree.map(lambda *x: jnp.stack(x), *(jmeta.Task(s, episode.query) for s in supports))
    loss, gradient = jax.jit(jax.value_and_grad(lambda p: learner.objective(KEY, p, state, tasks)[0]))(params)
    assert jnp.isfinite(loss)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))


def test_rows_without_a_label_do_not_count_in_the_losses():
    outputs, targets = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32), jnp.eye(4, 3)
    assert jmeta.softmax_cross_entropy(outputs, targets) == jmeta.softmax_cross_entropy(outputs[:3], targets[:3])
    assert jmeta.accuracy(outputs, targets) == jmeta.accuracy(outputs[:3], targets[:3])
    assert jmeta.accuracy(jnp.eye(4, 3), targets) == 1.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jmeta.r2d2(MLP, penalty=0.0), "penalty is 0.0; give a positive number"),
        (lambda: jmeta.metaoptnet(MLP, head="tree"), "head is 'tree'; give 'svm' or 'ridge'"),
        (lambda: jmeta.am3(MLP, dropout=1.0), "dropout is 1.0; give a share from 0 to below 1"),
        (lambda: jmeta.metaoptnet(MLP, margin_cost=-1.0), "margin_cost is -1.0"),
        (lambda: jmeta.in_context(MLP, layers=0), "layers is 0"),
        (lambda: jmeta.matching(MLP, temperature=0.0), "temperature is 0.0; give a positive number"),
        (lambda: jmeta.in_context(MLP, heads=3).init(KEY, task()), "3 heads do not divide 8 features"),
    ],
)
def test_options_that_cannot_work_are_told(make, message):
    with pytest.raises(jmeta.ConfigError, match=message):
        make()


@pytest.mark.parametrize("make", [jmeta.prototypical, jmeta.matching, jmeta.metaoptnet, jmeta.r2d2])
def test_a_support_without_any_example_is_an_error(make):
    learner = make(jmeta.linen(jmeta.MLP(outputs=None, hidden=(4,))))
    empty = jmeta.Examples(jnp.ones((4, 3)), jnp.zeros((4, 2)))
    key = jax.random.key(0)
    params, state = jax.jit(learner.init)(key, jmeta.Task(empty, empty))
    adapted = learner.adapt(key, params, state, empty)
    with pytest.raises(jmeta.DataError, match="no class of the task has an example or a description"):
        learner.predict(key, adapted, jnp.ones((2, 3)))


@pytest.mark.parametrize("make", [jmeta.prototypical, jmeta.matching, jmeta.r2d2])
def test_a_network_made_for_a_head_is_told(make):
    embedding = make(jmeta.linen(jmeta.MLP(outputs=4, hidden=(4,))))
    assert embedding.init(KEY, task()) is not None
    with pytest.raises(
        jmeta.ModelError, match="a head of 3 outputs for tasks of 3 ways, where embeddings are compared"
    ):
        make(jmeta.linen(jmeta.MLP(outputs=3, hidden=(4,)))).init(KEY, task())
