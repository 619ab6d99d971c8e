"""Distance kernels against NumPy, at their edges, and in memory."""

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


def by_hand(name, z, c):
    if name == "squared_euclidean":
        return ((z[:, None] - c[None]) ** 2).sum(-1)
    return 1 - (z[:, None] * c[None]).sum(-1) / np.linalg.norm(z, axis=1)[:, None] / np.linalg.norm(c, axis=1)[None]


@pytest.mark.parametrize("name", DISTANCES)
def test_values_and_gradients(float64, name):
    z, c = map(jnp.asarray, arrays())
    np.testing.assert_allclose(DISTANCES[name](z, c), by_hand(name, *arrays()), rtol=1e-10, atol=1e-12)
    check_grads(jax.jit(DISTANCES[name]), (z, c), order=2)


def test_squared_euclidean_is_never_negative_and_precise_far_from_the_origin():
    z = (1e3 + np.random.default_rng(0).normal(size=(50, 64))).astype(np.float32)
    d = np.asarray(jmeta.squared_euclidean(jnp.asarray(z), jnp.asarray(z)))
    assert d.min() >= 0
    np.testing.assert_allclose(d, by_hand("squared_euclidean", z.astype(np.float64), z.astype(np.float64)), atol=0.05)


@pytest.mark.parametrize("name", DISTANCES)
def test_gradients_are_finite_at_zero(name):
    zero, one = jnp.zeros((2, 3)), jnp.ones((2, 3))
    for z, c in ((zero, zero), (one, one), (zero, one)):
        gradients = jax.grad(lambda z, c: DISTANCES[name](z, c).sum(), argnums=(0, 1))(z, c)
        assert all(bool(jnp.isfinite(g).all()) for g in gradients)


@pytest.mark.parametrize("name", DISTANCES)
def test_no_array_of_queries_classes_features(name):
    z, c = jnp.ones((256, 512)), jnp.ones((128, 512))

    def loss(z, c):
        return DISTANCES[name](z, c).sum()

    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(z, c).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 256 * 128 * 512 * 4 / 8
