"""Numbers beside accuracy, against their definitions."""

import numpy as np
import pytest

import jmeta
from jmeta.metrics import auroc, harmonic_mean


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
