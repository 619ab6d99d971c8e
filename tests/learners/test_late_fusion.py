"""Late fusion against NumPy, and at each of its ends against the learner that it is there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import jmeta
from jmeta.core import Examples
from jmeta.learners.late_fusion import Evidence, _loss, fold_of, fused

KEY = jax.random.key(0)
MLP = jmeta.linen(jmeta.MLP(outputs=None, hidden=(8,)))
LEARNER = jmeta.late_fusion(MLP, folds=3)


def task(shots=(2, 2, 2), told=(1, 1, 1), queries=5, seed=0):
    """Classes of so many shots, with and without a description."""
    random = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(shots)), shots)
    names = random.normal(size=(len(shots), 7)) * np.asarray(told)[:, None]
    y = np.eye(len(shots))
    query = y[np.arange(queries) % len(shots)]
    parts = random.normal(size=(max(len(labels), 1), 4)), y[labels] if len(labels) else 0 * y[:1], names
    x, targets, names = (jnp.asarray(part, jnp.float32) for part in parts)
    queries = Examples(jnp.asarray(random.normal(size=(queries, 4)), jnp.float32), jnp.asarray(query, jnp.float32))
    return jmeta.Task(Examples(x, targets, names), queries)


@functools.cache
def initial():
    return jax.jit(LEARNER.init)(KEY, task())


def start(worth=0.5):
    params, state = initial()
    return {**params, "worth": jnp.log(jnp.asarray(worth, jnp.float32)) / 20}, state


def answer(learner, params, state, episode):
    return learner.predict(KEY, learner.adapt(KEY, params, state, episode.support), episode.query.inputs)


def by_hand(d, e, shots, told, worth):
    """The formula, class by class."""
    both = [k for k in range(len(shots)) if shots[k] and told[k]]
    result = np.zeros_like(d)
    for q in range(len(d)):
        offset = np.mean([e[q, k] - d[q, k] for k in both]) if both else 0.0
        for k in range(len(shots)):
            if shots[k] and told[k]:
                result[q, k] = (shots[k] * d[q, k] + worth * (e[q, k] - offset)) / (shots[k] + worth)
            else:
                result[q, k] = d[q, k] if shots[k] else e[q, k] - offset
    return result


CASES = {
    "even": ((2, 2, 2), (1, 1, 1)),
    "uneven": ((1, 3, 2), (1, 1, 1)),
    "without a shot": ((0, 3, 2), (1, 1, 1)),
    "without a description": ((1, 3, 2), (1, 0, 1)),
    "one kind each": ((0, 3, 0), (1, 0, 1)),
    "no shots": ((0, 0, 0), (1, 1, 1)),
    "no descriptions": ((1, 3, 2), (0, 0, 0)),
}


@pytest.mark.parametrize("case", CASES)
def test_fused_distances(case, float64):
    shots, told = map(np.asarray, CASES[case])
    random = np.random.default_rng(0)
    d, e = 3 * random.random((4, 3)), 2 + 5 * random.random((4, 3))
    expected = by_hand(d, e, shots, told, 0.7)
    count, there, worth = jnp.asarray(shots, float), jnp.asarray(told, bool), jnp.asarray(0.7)
    np.testing.assert_allclose(fused(jnp.asarray(d), jnp.asarray(e), count, there, worth), expected, rtol=1e-12)
    check_grads(
        jax.jit(lambda d, e, worth: fused(d, e, count, there, worth)), (jnp.asarray(d), jnp.asarray(e), worth), order=1
    )


@pytest.mark.parametrize("case", CASES)
def test_the_answer_is_the_fused_distance_to_means_of_images_and_of_readings(case):
    episode, (params, state) = task(*CASES[case]), start()
    z, w = embeddings(params, state, episode)
    x, y, *_ = episode.support
    means = np.asarray(y).T @ z(x) / np.maximum(np.asarray(y).sum(0), 1)[:, None]
    q = z(episode.query.inputs)
    d = np.square(q[:, None] - means[None]).sum(-1)
    e = np.square((q @ np.asarray(params["map"]))[None, :, None] - w[:, None]).sum(-1).mean(0)
    expected = -by_hand(d, e, *CASES[case], 0.5)
    np.testing.assert_allclose(answer(LEARNER, params, state, episode), expected, rtol=1e-3, atol=1e-4)


def embeddings(params, state, episode):
    """f as a function, and what each reader makes of the descriptions, by hand."""
    f = lambda x: np.asarray(MLP.apply(KEY, params["model"], state["model"], x, train=False)[0], np.float64)  # noqa: E731
    readers = jax.tree.map(np.asarray, params["readers"])
    dense, names = readers["describe"]["Dense_0"], np.asarray(episode.support.descriptions)
    w = [
        np.maximum(names @ k + b, 0) @ m for k, b, m in zip(dense["kernel"], dense["bias"], readers["map"], strict=True)
    ]
    return f, np.stack(w)


def test_without_descriptions_it_is_a_prototypical_network_and_images_of_no_label_change_nothing():
    params, state = start()
    silent = task((1, 3, 2), (0, 0, 0))
    expected = answer(jmeta.prototypical(MLP), params["model"], state["model"], silent)
    np.testing.assert_array_equal(answer(LEARNER, params, state, silent), expected)
    alone = task((0, 0, 0))
    other = alone._replace(support=alone.support._replace(inputs=alone.support.inputs + 1))
    np.testing.assert_array_equal(answer(LEARNER, params, state, alone), answer(LEARNER, params, state, other))


def test_a_description_that_is_worth_nothing_changes_nothing_where_there_are_images():
    params, state = start(worth=1e-12)
    np.testing.assert_allclose(
        answer(LEARNER, params, state, task((1, 3, 2))),
        answer(LEARNER, params, state, task((1, 3, 2), (0, 0, 0))),
        rtol=1e-5,
    )


def test_the_objective_is_three_cross_entropies_of_which_the_last_reaches_the_worth_alone(float64):
    random = np.random.default_rng(0)
    d, e = random.random((4, 3)), random.random((3, 4, 3))
    shots, told, fold, y = np.asarray([1, 2, 0]), np.asarray([1, 1, 1]), np.asarray([0, 1, 0]), np.eye(3)[[0, 1, 2, 1]]

    def cross_entropy(known, distances):
        known = np.flatnonzero(known)
        rows = y[:, known].any(1)
        logits, targets = -distances[rows][:, known], y[rows][:, known]
        return -(targets * (logits - np.log(np.exp(logits).sum(1, keepdims=True)))).sum(1).mean()

    new = np.stack([e[fold[k], :, k] for k in range(3)], axis=1)
    images = cross_entropy([1, 1, 0], d)
    texts = cross_entropy([0, 1, 0], e[0]) + cross_entropy([1, 0, 1], e[1]) + cross_entropy([1, 1, 1], e[2])

    def fusion(worth):
        distances = by_hand(d, new, shots, told, worth)[:, :2]
        distances = distances - distances.mean(1, keepdims=True)
        return cross_entropy([1, 1, 0], distances / np.sqrt(np.mean(distances**2)))

    arrays = [jnp.asarray(a) for a in (d, e, shots.astype(float), told.astype(bool), fold)]

    def objective(d, e, worth):
        return _loss(Evidence(d, e, *arrays[2:], worth), jnp.asarray(y))

    value, gradients = jax.jit(jax.value_and_grad(objective, argnums=(0, 1, 2)))(*arrays[:2], jnp.asarray(0.3))
    np.testing.assert_allclose(value, images + texts + fusion(0.3), rtol=1e-12)
    np.testing.assert_allclose(gradients[2], (fusion(0.3 + 1e-6) - fusion(0.3 - 1e-6)) / 2e-6, rtol=1e-5)
    # a reader learns nothing of the classes of its own fold, the last one all
    assert not gradients[1][fold, :, np.arange(3)].any()
    assert gradients[1].any()


def test_folds_are_of_descriptions_alone_and_even():
    x = jnp.asarray(np.random.default_rng(0).integers(0, 2, size=(4000, 30)), jnp.float32)
    folds = np.asarray(fold_of(x, 4))
    np.testing.assert_array_equal(fold_of(x[::-1], 4), folds[::-1])
    np.testing.assert_array_equal(fold_of(-0.0 * x, 4), fold_of(0.0 * x, 4))
    np.testing.assert_allclose(np.bincount(folds) / len(x), 0.25, atol=0.03)
    ids = jmeta.TokenIds(jnp.asarray(jmeta.hashed_text([f"intent {i}" for i in range(400)], width=32)))
    np.testing.assert_allclose(np.bincount(fold_of(ids, 2)) / 400, 0.5, atol=0.1)
    neighbours = np.asarray(fold_of(jnp.eye(400), 4))  # descriptions that differ in two places
    np.testing.assert_allclose(np.bincount(neighbours) / 400, 0.25, atol=0.1)


@pytest.mark.slow
def test_what_a_description_is_worth_is_learned_from_descriptions_that_were_not():
    """Names that say nothing are learned by heart all the same, and are worth nothing; attributes are not."""
    random = np.random.default_rng(0)
    labels, attributes = np.repeat(np.arange(40), 12), random.integers(0, 2, size=(40, 8))
    centres = attributes @ random.normal(size=(8, 8))
    x = centres[labels] + 1.5 * random.normal(size=(480, 8))
    worths = []
    for descriptions in (attributes + 0.1 * random.normal(size=(40, 8)), random.normal(size=(40, 8))):
        source = jmeta.from_arrays(x, labels, ways=5, shots=(0, 3), queries=3, descriptions=descriptions)
        learner = jmeta.late_fusion(jmeta.linen(jmeta.MLP(outputs=8, hidden=(16,))), folds=2)
        fitted = jmeta.fit(KEY, learner, source, steps=300, tasks=4, log_every=100)
        worths.append(float(jnp.exp(20 * fitted.params["worth"])))
    assert worths[0] > 1.0
    assert worths[1] < 0.25


def test_one_fold_is_refused():
    with pytest.raises(jmeta.ConfigError, match="folds is 1; give at least 2"):
        jmeta.late_fusion(MLP, folds=1)


@pytest.mark.slow
def test_descriptions_teach_the_network_as_much_as_they_are_worth():
    params, state = start()
    batch = jax.tree.map(lambda x: x[None], task((2, 1, 3)))

    def gradients(worth):
        start = {**params, "worth": jnp.log(jnp.asarray(worth, jnp.float32)) / 20}
        return jax.grad(lambda params: LEARNER.objective(KEY, params, state, batch)[0])(start)

    none, one, two = map(gradients, (1e-9, 1.0, 2.0))
    moved = jax.tree.map(lambda a, b: float(abs(b - a).max()), none["model"], one["model"])
    assert max(jax.tree.leaves(moved)) > 1e-3
    for a, b, c in zip(*(jax.tree.leaves(g["model"]) for g in (none, one, two)), strict=True):
        np.testing.assert_allclose(c - a, 2 * (b - a), rtol=1e-3, atol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), one["readers"], two["readers"])
