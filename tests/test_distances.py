"""Distance kernels against NumPy, at their edges, in bfloat16, and in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import jmeta
from jmeta.distances import DISTANCES


def arrays(queries=7, classes=5, features=6, seed=0):
    random = np.random.default_rng(seed)
    return random.normal(size=(queries, features)), random.normal(size=(classes, features))


def metric_of(features):
    random = np.random.default_rng(1)
    return random.normal(size=features), random.normal(size=(features, features))


def kernels(features, dtype=np.float64):
    """All kernels, the learned ones with some metric."""
    scale, factor = (jnp.asarray(x, dtype) for x in metric_of(features))
    return {
        **DISTANCES,
        "diagonal_mahalanobis": lambda z, c: jmeta.diagonal_mahalanobis(z, c, scale),
        "mahalanobis": lambda z, c: jmeta.mahalanobis(z, c, factor),
    }


NAMES = list(kernels(6, np.float32))


def by_hand(name, z, c):
    difference, products = z[:, None] - c[None], (z[:, None] * c[None]).sum(-1)
    scale, factor = metric_of(z.shape[1])
    return {
        "squared_euclidean": (difference**2).sum(-1),
        "euclidean": np.linalg.norm(difference, axis=-1),
        "cosine": 1 - products / np.linalg.norm(z, axis=1)[:, None] / np.linalg.norm(c, axis=1)[None],
        "dot_product": -products,
        "diagonal_mahalanobis": np.einsum("qcf,f,qcf->qc", difference, scale**2, difference),
        "mahalanobis": np.einsum("qcf,fg,qcg->qc", difference, factor @ factor.T, difference),
    }[name]


@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients(float64, name):
    z, c = map(jnp.asarray, arrays())
    kernel = kernels(6)[name]
    np.testing.assert_allclose(kernel(z, c), by_hand(name, *arrays()), rtol=1e-10, atol=1e-12)
    check_grads(jax.jit(kernel), (z, c), order=2)


def test_gradients_in_the_metric(float64):
    z, c = map(jnp.asarray, arrays())
    scale, factor = map(jnp.asarray, metric_of(6))
    check_grads(jax.jit(lambda s: jmeta.diagonal_mahalanobis(z, c, s)), (scale,), order=2)
    check_grads(jax.jit(lambda f: jmeta.mahalanobis(z, c, f)), (factor,), order=2)


def test_squared_euclidean_is_never_negative_and_precise_far_from_the_origin():
    z = (1e3 + np.random.default_rng(0).normal(size=(50, 64))).astype(np.float32)
    d = np.asarray(jmeta.squared_euclidean(jnp.asarray(z), jnp.asarray(z)))
    assert d.min() >= 0
    np.testing.assert_allclose(d, by_hand("squared_euclidean", z.astype(np.float64), z.astype(np.float64)), atol=0.05)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_finite_at_zero(name):
    zero, one = jnp.zeros((2, 3)), jnp.ones((2, 3))
    kernel = kernels(3, np.float32)[name]
    for z, c in ((zero, zero), (one, one), (zero, one)):
        gradients = jax.grad(lambda z, c: kernel(z, c).sum(), argnums=(0, 1))(z, c)
        assert all(bool(jnp.isfinite(g).all()) for g in gradients)


def test_the_distance_itself_is_flat_where_it_is_0():
    z = jnp.asarray([[1.0, 2.0], [3.0, 4.0]])
    value, gradient = jax.value_and_grad(lambda z: jmeta.euclidean(z, z[:1] * 1.0).sum())(z)
    np.testing.assert_allclose(value, np.sqrt(8), rtol=1e-6)
    np.testing.assert_allclose(gradient, np.asarray([[-1.0, -1.0], [1.0, 1.0]]) / np.sqrt(2), rtol=1e-6)
    np.testing.assert_array_equal(jax.grad(lambda z: jmeta.euclidean(z, z).sum())(z[:1]), np.zeros((1, 2)))


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_costs_no_more_than_its_own_rounding(name):
    """Far from the origin squares are a thousand times their difference: in bfloat16 itself nothing would be left."""
    z, c = (jnp.asarray(3.0 + x, jnp.bfloat16) for x in arrays(20, 5, 64))
    expected = by_hand(name, np.asarray(z, np.float64), np.asarray(c, np.float64))
    distances = kernels(64, np.float32)[name](z, c)
    assert distances.dtype == jnp.float32
    np.testing.assert_allclose(distances, expected, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_no_array_of_queries_classes_features(name):
    z, c = jnp.ones((256, 512)), jnp.ones((128, 512))
    kernel = kernels(512, np.float32)[name]
    compiled = jax.jit(jax.value_and_grad(lambda z, c: kernel(z, c).sum(), argnums=(0, 1))).lower(z, c).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 256 * 128 * 512 * 4 / 8


@pytest.mark.parametrize("metric", ["diagonal", "full"])
def test_a_learned_metric_is_a_linear_map_more(metric):
    model = jmeta.with_metric(jmeta.linen(jmeta.MLP(outputs=None, hidden=(8,))), metric)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32)
    (params, factor), state = model.init(jax.random.key(0), x)
    np.testing.assert_array_equal(factor, np.ones(8) if metric == "diagonal" else np.eye(8))  # at first no other metric
    factor = jnp.asarray(np.random.default_rng(1).normal(size=factor.shape), jnp.float32)
    z, _ = jmeta.linen(jmeta.MLP(outputs=None, hidden=(8,))).apply(jax.random.key(0), params, state, x, train=False)
    mapped, _ = model.apply(jax.random.key(0), (params, factor), state, x, train=False)
    kernel = jmeta.diagonal_mahalanobis if metric == "diagonal" else jmeta.mahalanobis
    np.testing.assert_allclose(jmeta.squared_euclidean(mapped, mapped), kernel(z, z, factor), rtol=1e-5, atol=1e-5)
    with pytest.raises(jmeta.ConfigError, match="metric is 'cubic'; give 'diagonal' or 'full'"):
        jmeta.with_metric(model, "cubic")
