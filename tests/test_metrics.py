"""Numbers beside accuracy, against their definitions."""

import numpy as np
import pytest

import jmeta
from jmeta.metrics import auroc, harmonic_mean, wilson_interval


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
