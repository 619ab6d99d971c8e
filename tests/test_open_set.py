"""Queries of no class, and how well they are rejected."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmeta
from jmeta.open_set import rejection_metrics, with_unknown

KEY = jax.random.key(0)
LEARNER = jmeta.prototypical(jmeta.identity())


def vectors(classes=8, spread=1.0, **options):
    """Gaussian clusters, whose centres are two apart in the mean of a feature."""
    random = np.random.default_rng(0)
    labels = np.repeat(np.arange(classes), 12)
    x = random.normal(size=(classes, 5))[labels] + spread * random.normal(size=(len(labels), 5))
    return jmeta.from_embeddings(x, labels, **{"ways": 3, "shots": 2, "queries": 4, **options})


@pytest.mark.parametrize("certainty", [jmeta.max_logit, jmeta.max_probability])
def test_auroc_and_fpr95_are_those_of_scikit_learn(certainty):
    sklearn = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(0)
    outputs = random.normal(size=(90, 3)).round(1)  # some scores are equal
    targets, there = np.eye(3)[random.integers(3, size=90)], random.uniform(size=90) < 0.8
    unknown = random.uniform(size=90) < 0.4
    targets[unknown] = 0.0
    found = {
        name: float(metric(*(jnp.asarray(x, jnp.float32) for x in (outputs, targets)), mask=jnp.asarray(there)))
        for name, metric in rejection_metrics(certainty).items()
    }
    score, known = np.asarray(certainty(jnp.asarray(outputs, jnp.float32)))[there], ~unknown[there]
    assert found["auroc"] == pytest.approx(sklearn.roc_auc_score(known, score), abs=1e-6)
    false, true, thresholds = sklearn.roc_curve(known, score, drop_intermediate=False)
    first = int(np.argmax(true >= 0.95))
    assert found["fpr95"] == pytest.approx(false[first], abs=1e-6)
    assert found["threshold"] == pytest.approx(thresholds[first], abs=1e-6)


def test_unknown_queries_are_of_other_classes_and_the_known_as_they_were():
    plain = vectors()
    source = with_unknown(plain)
    assert source.protocol == {**plain.protocol, "open_set": "other classes"}
    keys = jax.random.split(KEY, 40)
    before, after = (jax.jit(jax.vmap(s.sample, (0, None)))(keys, s.data) for s in (plain, source))
    np.testing.assert_array_equal(before.query.inputs, after.query.inputs[:, :12])
    np.testing.assert_array_equal(before.query.targets, after.query.targets[:, :12])
    assert (np.asarray(after.query.targets)[:, 12:] == 0).all()
    assert np.asarray(after.query.mask)[:, :12].all()
    inputs, labels = np.asarray(plain.data.inputs), np.repeat(np.arange(8), 12)
    for i in range(40):
        there = np.asarray(after.query.mask)[i, 12:]
        new = np.asarray(after.query.inputs)[i, 12:][there]
        drawn = labels[(new[:, None] == inputs[None]).all(axis=2).argmax(axis=1)]
        assert not set(drawn.tolist()) & set(np.asarray(after.support.classes)[i].tolist())
        assert len({row.tobytes() for row in new}) == len(new) > 0


def test_what_is_far_from_all_classes_is_rejected():
    plain = jmeta.evaluate(KEY, LEARNER, {}, {}, vectors(), episodes=30)
    far = 100.0 + np.random.default_rng(0).normal(size=(20, 5)).astype(np.float32)
    result = jmeta.evaluate(KEY, LEARNER, {}, {}, vectors(), episodes=30, open_set=far, details=True)
    assert (result["auroc"], result["auroc_ci95"], result["fpr95"]) == (1.0, 0.0, 0.0)
    assert result["accuracy"] == pytest.approx(plain["accuracy"], abs=1e-6)
    assert result["open_set"] == "inputs of no class"
    assert -100.0 < result["threshold"] < 0.0
    assert sum(map(sum, result["details"]["confusion"])) == 30 * 12  # those of no class are no mistakes
    others = jmeta.evaluate(KEY, LEARNER, {}, {}, vectors(), episodes=30, open_set=True)
    assert 0.5 < others["auroc"] < 0.99
    assert 0.0 < others["fpr95"] < 1.0
    assert others["accuracy"] == pytest.approx(result["accuracy"], abs=1e-6)


@pytest.mark.parametrize(
    ("source", "open_set", "error", "sentence"),
    [
        (vectors(classes=3), True, jmeta.ConfigError, "no episode has a query of no class"),
        (vectors(), np.zeros((20, 4)), jmeta.DataError, r"shape \[20, 4\], and an episode has queries \[12, 5\]"),
        (vectors(), np.zeros((11, 5)), jmeta.DataError, "give inputs of that shape, as many or more"),
        (jmeta.sinusoid(), True, jmeta.ConfigError, "this one does not tell the class of a query"),
    ],
)
def test_what_has_no_unknown_queries_is_refused(source, open_set, error, sentence):
    with pytest.raises(error, match=sentence):
        jmeta.evaluate(KEY, LEARNER, {}, {}, source, episodes=2, open_set=open_set)
