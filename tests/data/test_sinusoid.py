"""The sine waves have the amplitudes, phases and inputs of the paper."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmeta.data.sinusoid import sinusoid
from jmeta.errors import DataError


def tasks(count, **options):
    source = sinusoid(**options)
    return jax.jit(jax.vmap(source.sample, in_axes=(0, None)))(jax.random.split(jax.random.key(0), count), source.data)


def fitted(inputs, targets):
    """Amplitude and phase by least squares: A sin(x - φ) = (A cos φ) sin x - (A sin φ) cos x."""
    x, y = np.asarray(inputs, np.float64)[:, 0], np.asarray(targets, np.float64)[:, 0]
    (p, q), *_ = np.linalg.lstsq(np.stack([np.sin(x), -np.cos(x)], axis=1), y, rcond=None)
    return np.hypot(p, q), np.arctan2(q, p), np.abs(np.hypot(p, q) * np.sin(x - np.arctan2(q, p)) - y).max()


def test_every_task_is_one_sine_wave_with_amplitude_and_phase_of_the_paper():
    batch = tasks(500, shots=10, queries=10)
    waves = np.array([fitted(*examples) for examples in zip(batch.support.inputs, batch.support.targets, strict=True)])
    amplitude, phase, residual = waves.T
    assert residual.max() < 1e-5
    assert 0.1 <= amplitude.min() < 0.2 and 4.9 < amplitude.max() <= 5.0
    assert -1e-4 <= phase.min() < 0.05 and np.pi - 0.05 < phase.max() <= np.pi + 1e-4
    assert abs(amplitude.mean() - 2.55) < 4 * 4.9 / np.sqrt(12 * 500)  # four standard errors
    assert abs(phase.mean() - np.pi / 2) < 4 * np.pi / np.sqrt(12 * 500)
    queries = np.array([fitted(*examples) for examples in zip(batch.query.inputs, batch.query.targets, strict=True)])
    np.testing.assert_allclose(waves[:, :2], queries[:, :2], atol=2e-4)


def test_inputs_are_uniform_on_the_interval_of_the_paper():
    x = np.asarray(tasks(500).support.inputs).ravel()
    assert -5 <= x.min() < -4.9 and 4.9 < x.max() <= 5
    assert abs(x.mean()) < 4 * 10 / np.sqrt(12 * x.size)


def test_shapes_types_and_protocol():
    source = sinusoid(shots=3, queries=7)
    task = jax.jit(source.sample)(jax.random.key(0), source.data)
    assert [x.shape for x in jax.tree.leaves(task)] == [(3, 1), (3, 1), (7, 1), (7, 1)]
    assert {x.dtype for x in jax.tree.leaves(task)} == {jnp.dtype("float32")}
    assert source.protocol == {"shots": 3, "queries": 7} and source.names == ()


def test_the_key_decides_the_task():
    source = sinusoid()
    first, again, other = (jax.jit(source.sample)(jax.random.key(seed), source.data) for seed in (0, 0, 1))
    assert all(map(np.array_equal, jax.tree.leaves(first), jax.tree.leaves(again)))
    assert not any(map(np.array_equal, jax.tree.leaves(first), jax.tree.leaves(other)))


def test_support_and_query_are_different_points():
    task = jax.jit(sinusoid().sample)(jax.random.key(0), ())
    assert not set(np.asarray(task.support.inputs).ravel()) & set(np.asarray(task.query.inputs).ravel())


@pytest.mark.parametrize("name", ["shots", "queries"])
def test_refuses_empty_sets(name):
    with pytest.raises(DataError, match=f"{name} is 0; give at least 1"):
        sinusoid(**{name: 0})
