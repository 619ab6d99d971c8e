import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmeta

random = np.random.default_rng(0)
MOLECULES = np.arange(400.0)[:, None]
LABELS = np.where(random.random((400, 4)) < [0.1, 0.3, 0.5, 0.9], 1, 0)
LABELS[random.random((400, 4)) < 0.3] = -1


def drawn(n=200, **options):
    source = jmeta.from_assays(MOLECULES, LABELS, **options)
    return source, jax.jit(jax.vmap(source.sample, (0, None)))(jax.random.split(jax.random.key(0), n), source.data)


@pytest.mark.parametrize("balanced", [False, True])
def test_a_task_is_measured_molecules_of_one_assay(balanced):
    options = {"shots": 8, "queries": 20, "balanced": balanced}
    _, tasks = drawn(**options)
    molecules = np.concatenate([tasks.support.inputs, tasks.query.inputs], axis=1)[..., 0].astype(int)
    active = np.concatenate([tasks.support.targets, tasks.query.targets], axis=1).argmax(-1)
    assert all(len(set(task)) == 28 for task in molecules)
    # Labels of enough molecules tell which assay it is.
    fits = (LABELS[molecules] == active[..., None]).all(axis=1)
    assert fits.any(axis=1).all()
    assert fits.any(axis=0).all()
    share = (LABELS == 1).sum(0) / (LABELS >= 0).sum(0)
    for assay in range(4):
        mine = active[fits.argmax(1) == assay]
        expected = 4 if balanced else np.clip(np.round(8 * share[assay]), 1, 7)
        assert (mine[:, :8].sum(1) == expected).all()
        assert (mine[:, 8:].sum(1) == np.clip(np.round(20 * share[assay]), 1, 19)).all()


def test_every_molecule_of_an_assay_is_drawn():
    source, tasks = drawn(n=600, shots=8, queries=20)
    assert set(np.asarray(tasks.query.inputs, int).ravel()) == set(np.flatnonzero((LABELS >= 0).any(axis=1)))
    assert source.protocol["assays"] == 4


def test_shots_and_queries_vary():
    source, tasks = drawn(n=300, shots=(4, 8), queries=(10, 20))
    assert source.protocol["shots"] == [4, 8] and source.protocol["queries"] == [10, 20]
    share = (LABELS == 1).sum(0) / (LABELS >= 0).sum(0)
    sizes = set()
    for i in range(300):
        support, query = (jax.tree.map(lambda x, i=i: np.asarray(x[i]), e) for e in tasks)
        rows = np.concatenate([e.rows[e.mask] for e in (support, query)])
        active = np.concatenate([e.targets[e.mask].argmax(1) for e in (support, query)])
        assert len(set(rows)) == len(rows)
        (assay,) = np.flatnonzero((LABELS[rows] == active[:, None]).all(0))[:1]
        for e in (support, query):
            n = int(e.mask.sum())
            assert e.targets[e.mask, 1].sum() == np.clip(np.round(n * share[assay]), 1, n - 1)
        sizes.add((int(support.mask.sum()), int(query.mask.sum())))
    assert {s for s, _ in sizes} == {4, 5, 6, 7, 8} and {q for _, q in sizes} == set(range(10, 21))


def test_small_assays_are_left_out():
    labels = LABELS.copy()
    labels[20:, 0] = -1
    source = jmeta.from_assays(MOLECULES, labels, shots=8, queries=20, names=list("abcd"))
    assert source.names == ("b", "c", "d")
    missing = np.where(labels < 0, np.nan, labels)
    assert jmeta.from_assays(MOLECULES, missing, shots=8, queries=20).protocol["assays"] == 3


@pytest.mark.parametrize(
    ("features", "labels", "options", "sentence"),
    [
        (MOLECULES[:5], LABELS, {}, r"features have shape \[5, 1\] and labels \[400, 4\]"),
        (np.full_like(MOLECULES, np.nan), LABELS, {}, "molecule 0 are not finite"),
        (MOLECULES, LABELS + 1, {}, "labels must be 1"),
        (MOLECULES, LABELS, {"shots": 1}, "shots is 1; give at least 2"),
        (MOLECULES, LABELS, {"queries": 399}, "no assay has enough molecules"),
        (MOLECULES, LABELS, {"names": ["a"]}, "there are 1 names but 4 assays"),
    ],
)
def test_bad_arrays(features, labels, options, sentence):
    with pytest.raises(jmeta.DataError, match=sentence):
        jmeta.from_assays(features, labels, **options)


def test_average_precision_gain():
    """Against the sum over thresholds, written out; ties share a rank."""
    scores = np.round(random.normal(size=30), 1)
    active = random.random(30) < 0.3
    expected, recall = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        taken = scores >= threshold
        found = active[taken].sum() / active.sum()
        expected += (found - recall) * active[taken].mean()
        recall = found
    outputs = jnp.asarray(np.stack([np.zeros(30), scores], axis=1), jnp.float32)
    targets = jnp.eye(2)[jnp.asarray(active, jnp.int32)]
    assert float(jmeta.average_precision_gain(outputs, targets)) == pytest.approx(expected - active.mean(), rel=1e-5)
    assert np.isnan(jmeta.average_precision_gain(outputs * jnp.nan, targets))
