"""Numbers beside accuracy, against their definitions."""

import jax
import numpy as np
import pytest
from scipy import stats

import jmeta
from jmeta.metrics import auroc, harmonic_mean, interquartile_mean, stratified_interval, wilson_interval


def test_auroc_counts_pairs():
    random = np.random.default_rng(0)
    positive, negative = random.integers(0, 9, 40).astype(float), random.integers(0, 6, 30).astype(float)
    pairs = positive[:, None] - negative[None]
    assert auroc(positive, negative) == pytest.approx(((pairs > 0) + 0.5 * (pairs == 0)).mean())
    assert auroc(negative, positive) == pytest.approx(1 - auroc(positive, negative))
    with pytest.raises(jmeta.ConfigError, match="0 negatives; give some of each"):
        auroc(positive, np.zeros(0))


def test_the_harmonic_mean():
    assert harmonic_mean(0.5, 0.5) == 0.5
    assert harmonic_mean(1.0, 0.0) == harmonic_mean(0.0, 0.0) == 0.0


@pytest.mark.parametrize(("right", "n"), [(0, 1), (1, 1), (3, 7), (90, 100), (100, 100)])
def test_the_ends_of_an_interval_are_shares_that_are_just_not_refused(right, n):
    """The share p at an end is 1.96 of its own standard errors away: (right / n − p)² = 1.96² p (1 − p) / n."""
    low, high = wilson_interval(right, n)
    assert 0.0 <= low < high <= 1.0 and low - 1e-12 <= right / n <= high + 1e-12
    for p in (low, high):
        assert (right / n - p) ** 2 == pytest.approx(1.96**2 * p * (1 - p) / n, abs=1e-12)


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (5, 3), (10, 7)])
def test_the_interquartile_mean_is_a_mean_of_the_middle(shape):
    values = np.random.default_rng(0).normal(size=shape)
    assert interquartile_mean(values) == pytest.approx(stats.trim_mean(values, 0.25, axis=None))


def test_the_stratified_interval_is_that_of_the_mean_where_that_is_known():
    """The mean of resampled seeds has the variance Σ sₜ² / (seeds · tasks²), with sₜ² that of a task over the seeds."""
    values = np.random.default_rng(1).normal(size=(20, 4)) * np.asarray([1.0, 2.0, 3.0, 4.0]) + np.arange(4) * 100
    low, high = stratified_interval(jax.random.key(0), values, np.mean, resamples=4000)
    half = 1.96 * np.sqrt(values.var(axis=0).sum() / 20) / 4
    np.testing.assert_allclose([low, high], [values.mean() - half, values.mean() + half], atol=0.08 * half)
    with pytest.raises(jmeta.ConfigError, match=r"shape \[1, 3\]; give \[seeds, tasks\] of at least two seeds"):
        stratified_interval(jax.random.key(0), np.ones((1, 3)))


def test_the_interquartile_mean_is_that_of_rliable():
    metrics = pytest.importorskip("rliable.metrics", reason="pip install --no-deps rliable")
    values = np.random.default_rng(2).normal(size=(10, 5))
    assert interquartile_mean(values) == pytest.approx(float(metrics.aggregate_iqm(values)))
