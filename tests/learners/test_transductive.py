"""Inference that looks at all queries, or at examples without a label, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import jmeta
from jmeta.core import Examples
from jmeta.learners.label_propagation import graph, spread_labels
from jmeta.learners.laplacian_shot import affinity, energy, propagated
from jmeta.learners.pt_map import log_transport
from jmeta.learners.tim import information

KEY = jax.random.key(0)
WAYS, FEATURES = 3, 6


def task(shots=2, queries=8, seed=0):
    """Support, one-hot targets and queries of three clusters of features that are never negative, in NumPy."""
    random = np.random.default_rng(seed)
    means = random.uniform(0, 2, size=(WAYS, FEATURES))
    y = np.repeat(np.arange(WAYS), shots)
    x = np.abs(means[y] + 0.5 * random.normal(size=(len(y), FEATURES)))
    q = np.abs(means[random.integers(WAYS, size=queries)] + 0.5 * random.normal(size=(queries, FEATURES)))
    return x, np.eye(WAYS)[y], q


def answer(learner, x, y, q, mask=()):
    """What the learner, as it begins, says of the queries."""
    support = Examples(*map(jnp.asarray, (x, y)), mask=mask if isinstance(mask, tuple) else jnp.asarray(mask))

    def run(support, q):
        params, state = learner.init(KEY, jmeta.Task(support, Examples(q, ())))
        return learner.predict(KEY, learner.adapt(KEY, params, state, support), q)

    return np.asarray(jax.jit(run)(support, jnp.asarray(q)))


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def square(a, b):
    return np.square(a[:, None] - b[None]).sum(axis=2)


def softmax(x):
    p = np.exp(x - x.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)


def means(x, y):
    return y.T @ x / y.sum(axis=0)[:, None]


def test_optimal_transport_has_its_marginals_and_is_optimal(float64):
    random = np.random.default_rng(0)
    cost = 10 * random.uniform(size=(12, 4))
    rows, columns = np.ones(12), np.asarray([6.0, 1.0, 0.0, 5.0])
    log_p = np.asarray(log_transport(*map(jnp.asarray, (cost, rows, columns))))
    p = np.exp(log_p)
    np.testing.assert_allclose(p.sum(axis=1), rows, atol=1e-12)
    np.testing.assert_allclose(p.sum(axis=0), columns, atol=1e-8)
    # log P + cost = uᵢ + vₖ are the conditions of the minimum of a convex problem
    free = (log_p + cost)[:, [0, 1, 3]]
    np.testing.assert_allclose(
        free - free.mean(axis=0) - free.mean(axis=1, keepdims=True) + free.mean(), 0.0, atol=1e-10
    )


def test_pt_map_against_numpy(float64):
    x, y, q = task()
    a, b = (unit((part + 1e-6) ** 0.5) for part in (x, q))
    a, b = unit(a - a.mean(axis=0)), unit(b - b.mean(axis=0))

    def plan(c):
        p = np.exp(-10 * square(b, c))
        for _ in range(1000):
            p *= len(b) / WAYS / p.sum(axis=0)
            p /= p.sum(axis=1, keepdims=True)
        return p

    c = means(a, y)
    for _ in range(20):
        c += 0.2 * (means(np.concatenate([a, b]), np.concatenate([y, plan(c)])) - c)
    np.testing.assert_allclose(answer(jmeta.pt_map(jmeta.identity(), power=0.5), x, y, q), np.log(plan(c)), atol=1e-5)


def tim_loss(w, x, y, q):
    p, s = (softmax(-7.5 * square(part, w)) for part in (q, x))
    mean = p.mean(axis=0)
    fit = -(y * np.log(s)).sum(axis=1).mean()
    return 0.1 * fit + (mean * np.log(mean)).sum() - 0.1 * (p * np.log(p)).sum(axis=1).mean()


def test_tim_descends_by_the_gradient_of_finite_differences(float64):
    x, y, q = task()
    a, b = unit(x), unit(q)
    w, ε = means(a, y), 1e-6
    m, v = np.zeros_like(w), np.zeros_like(w)
    for step in range(1, 4):
        g = np.zeros_like(w)
        for i in np.ndindex(*w.shape):
            e = np.zeros_like(w)
            e[i] = ε
            g[i] = (tim_loss(w + e, a, y, b) - tim_loss(w - e, a, y, b)) / (2 * ε)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        w = w - 0.05 * m / (1 - 0.9**step) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
    learner = jmeta.tim(jmeta.identity(), inference_steps=3, rate=0.05)
    np.testing.assert_allclose(answer(learner, x, y, q), -7.5 * square(b, w), atol=1e-6)


def test_information_is_largest_where_all_is_sure_and_even(float64):
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)))
    check_grads(jax.jit(lambda x: information(x, 0.3)), (logits,), order=1, modes=["rev"])
    p = softmax(np.asarray(logits))
    mutual = (p * np.log(p / p.mean(axis=0))).sum(axis=1).mean()
    np.testing.assert_allclose(information(logits), mutual, atol=1e-12)


def mended(a, y, b):
    """The means of BD-CSPN and the shifted queries, by loops."""
    b = b + a.mean(axis=0) - b.mean(axis=0)
    c = means(a, y)
    nearness = unit(b) @ unit(c).T
    out = []
    for k in range(WAYS):
        mine = sorted((j for j in range(len(b)) if nearness[j].argmax() == k), key=lambda j, k=k: -nearness[j, k])[:2]
        members = np.concatenate([a[y[:, k] > 0], b[mine]])
        weights = np.exp(10 * unit(members) @ unit(c)[k])
        out.append(weights @ members / weights.sum())
    return np.stack(out), b


def test_bd_cspn_against_numpy(float64):
    x, y, q = task(queries=11)
    c, b = mended(unit(x), y, unit(q))
    np.testing.assert_allclose(
        answer(jmeta.bd_cspn(jmeta.identity(), most=2), x, y, q), 10 * unit(b) @ unit(c).T, atol=1e-9
    )


def test_laplacian_shot_against_numpy(float64):
    x, y, q = task()
    a, b = unit(x), unit(q)
    distance = square(b, b) + np.diag(np.full(len(b), np.inf))
    near = np.argsort(np.argsort(distance, axis=1), axis=1) < 3
    w = 0.7 * (near.astype(float) + near.T) / 2
    unary = square(b, means(a, y))
    p = softmax(-unary)
    for _ in range(20):
        logits = -unary + w @ p
        p = softmax(logits)
    learner = jmeta.laplacian_shot(jmeta.identity(), rectify=False)
    np.testing.assert_allclose(answer(learner, x, y, q), logits, atol=1e-9)


def test_the_updates_of_laplacian_shot_lower_its_energy_to_a_fixed_point(float64):
    random = np.random.default_rng(0)
    logits = jnp.asarray(random.normal(size=(20, WAYS)))
    w = affinity(jnp.asarray(random.normal(size=(20, 2))), 3)
    np.testing.assert_array_equal(w, w.T)
    y = softmax(np.asarray(logits))
    energies = [float(energy(jnp.asarray(y), logits, w))]
    for _ in range(12):
        y = softmax(np.asarray(logits) + np.asarray(w) @ y)
        energies.append(float(energy(jnp.asarray(y), logits, w)))
    assert energies[-1] < energies[0] - 1e-3
    assert (np.diff(energies) <= 1e-9).all()
    rest = softmax(np.asarray(propagated(logits, w, 300)))
    np.testing.assert_allclose(rest, softmax(np.asarray(logits + w @ rest)), atol=1e-9)


def test_label_propagation_against_numpy(float64):
    x, y, q = task()
    z = np.concatenate([x, q])
    distance = square(z, z)
    w = np.exp(-0.5 * distance / (distance.mean() / 10))
    far = distance + np.diag(np.full(len(z), np.inf))
    near = np.argsort(np.argsort(far, axis=1), axis=1) < 4
    w *= near | near.T
    s = w / np.sqrt(np.outer(w.sum(axis=1), w.sum(axis=0)))
    start = np.concatenate([y, np.zeros((len(q), WAYS))])
    f = start
    for _ in range(500):  # what flows until it rests
        f = 0.9 * s @ f + start
    learner = jmeta.label_propagation(jmeta.identity(), spread=0.9, neighbours=4)
    np.testing.assert_allclose(answer(learner, x, y, q), f[len(x) :], atol=1e-9)


def test_the_gradient_through_the_propagation(float64):
    x, y, _ = map(jnp.asarray, task())
    there = jnp.ones(len(x), bool)

    def flow(x):
        return spread_labels(graph(x, there, jnp.ones(()), 3), y, 0.5)

    check_grads(jax.jit(flow), (x,), order=1, modes=["rev"])


@pytest.mark.parametrize("distractor_cluster", [False, True])
def test_soft_kmeans_against_numpy(float64, distractor_cluster):
    x, y, q = task()
    free = np.random.default_rng(1).normal(size=(5, FEATURES))  # in the support, without a label
    c = means(x, y)
    logits = -square(free, c)
    if distractor_cluster:  # with r = 1, where log r is 0
        logits = np.concatenate([logits, -np.square(free).sum(axis=1, keepdims=True)], axis=1)
    c = means(np.concatenate([x, free]), np.concatenate([y, softmax(logits)[:, :WAYS]]))
    support = np.concatenate([x, free]), np.concatenate([y, np.zeros((5, WAYS))])
    learner = jmeta.soft_kmeans(jmeta.identity(), distractor_cluster=distractor_cluster)
    np.testing.assert_allclose(answer(learner, *support, q), -square(q, c), atol=1e-9)
    # outside of the mask a row is not there, and all that is left is a prototypical network
    padded = answer(learner, *support, q, mask=np.arange(len(support[0])) < len(x))
    np.testing.assert_allclose(padded, -square(q, means(x, y)), atol=1e-9)


def test_examples_without_a_label_are_part_of_the_graph():
    x, y, q = (part.astype(np.float32) for part in task())
    support = np.concatenate([x, q]), np.concatenate([y, np.zeros((len(q), WAYS), np.float32)])
    learner = jmeta.label_propagation(jmeta.identity())
    assert not np.allclose(answer(learner, *support, q), answer(learner, x, y, q), atol=1e-3)


LEARNERS = (jmeta.tim, jmeta.pt_map, jmeta.bd_cspn, jmeta.laplacian_shot, jmeta.label_propagation, jmeta.soft_kmeans)


@pytest.mark.slow
@pytest.mark.parametrize("make", LEARNERS, ids=lambda make: make.__name__)
def test_a_class_without_an_example_is_never_the_answer(make):
    x, y, q = (part.astype(np.float32) for part in task())
    wider = np.concatenate([y, np.zeros((len(y), 1), np.float32)], axis=1)
    learner = make(jmeta.identity())
    before, after = answer(learner, x, y, q), answer(learner, x, wider, q)
    np.testing.assert_allclose(after[:, :WAYS], before, rtol=1e-3, atol=1e-3)
    assert (after[:, WAYS] < after[:, :WAYS].min(axis=1) - 10).all()


@pytest.mark.parametrize(
    ("make", "options", "sentence"),
    [
        (jmeta.tim, {"temperature": 0}, "temperature is 0; give a positive number"),
        (jmeta.tim, {"inference_steps": -1}, "inference_steps is -1; give 0 or more"),
        (jmeta.pt_map, {"speed": 0.0}, "speed is 0.0; give a positive number"),
        (jmeta.pt_map, {"inference_steps": -2}, "inference_steps is -2; give 0 or more"),
        (jmeta.bd_cspn, {"scale": -1.0}, "scale is -1.0; give a positive number"),
        (jmeta.bd_cspn, {"most": -1}, "most is -1; give 0 or more"),
        (jmeta.laplacian_shot, {"smoothness": -0.1}, "smoothness is -0.1; give 0 or more"),
        (jmeta.label_propagation, {"spread": 1.0}, "spread is 1.0; give a number from 0 to below 1"),
        (jmeta.label_propagation, {"neighbours": 0}, "neighbours is 0; give at least 1"),
        (jmeta.soft_kmeans, {"refinements": -1}, "refinements is -1; give 0 or more"),
    ],
)
def test_numbers_that_cannot_work_are_refused(make, options, sentence):
    with pytest.raises(jmeta.ConfigError, match=sentence):
        make(jmeta.identity(), **options)
