"""Descriptions of classes in the support, and episodes of varying ways and shots in one shape."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmeta
from jmeta.core import Examples
from jmeta.data.glyphs import glyph_attributes, load_glyphs
from jmeta.errors import ConfigError, DataError

LABELS = np.repeat(np.arange(8), 10)


def numbered(**options):
    return jmeta.from_arrays(np.arange(1.0, 81.0), LABELS, **{"queries": 2, **options})


def episodes(source, count=200):
    return jax.jit(jax.vmap(source.sample, (0, None)))(jax.random.split(jax.random.key(0), count), source.data)


def test_a_support_holds_the_description_of_each_of_its_classes():
    batch = episodes(numbered(ways=4, shots=2, descriptions=np.arange(1, 9)[:, None] * np.ones((1, 3))))
    assert isinstance(batch.support, Examples)
    assert batch.support.descriptions.shape == (200, 4, 3)
    label = (np.asarray(batch.support.inputs).astype(int) - 1) // 10
    np.testing.assert_array_equal(np.repeat(batch.support.descriptions[..., 0], 2, axis=1), label + 1)
    assert batch.query.descriptions == ()


def test_descriptions_change_nothing_else():
    plain, told = (episodes(numbered(ways=3, descriptions=d), 5) for d in (None, np.eye(8)))
    np.testing.assert_array_equal(plain.support.inputs, told.support.inputs)
    np.testing.assert_array_equal(plain.query.inputs, told.query.inputs)


def test_token_ids_stay_integers_and_a_mapping_is_by_label():
    ids = {label: [label + 1, 0] for label in reversed(range(8))}
    source = numbered(ways=(2, 3), descriptions=jmeta.TokenIds(ids))
    (stored,) = source.data.descriptions
    assert stored.dtype == jnp.int32
    np.testing.assert_array_equal(stored[:, 0], np.arange(1, 9))
    told = episodes(source).support.descriptions
    assert isinstance(told, jmeta.TokenIds)
    assert set(np.asarray(told.ids.any(axis=2).sum(axis=1))) == {2, 3}


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, bool, np.float64])
def test_ones_and_zeros_are_attributes_whatever_their_dtype(dtype):
    attributes = np.eye(8, 20, dtype=dtype) + np.eye(8, 20, k=3, dtype=dtype)
    source = numbered(ways=2, shots=0, descriptions=attributes)
    assert source.data.descriptions.dtype == jnp.float32
    learner = jmeta.zero_shot(jmeta.linen(jmeta.MLP(outputs=None, hidden=(4,))))
    params, _ = learner.init(jax.random.key(0), jax.jit(source.sample)(jax.random.key(0), source.data))
    assert set(params["describe"]) == {"Dense_0"}  # a perceptron, no reader of text


def test_token_ids_are_read_as_text():
    names = jmeta.hashed_text([f"class number {i}" for i in range(8)])
    source = numbered(ways=2, shots=0, descriptions=jmeta.TokenIds(names))
    learner = jmeta.zero_shot(jmeta.linen(jmeta.MLP(outputs=None, hidden=(4,))))
    params, _ = learner.init(jax.random.key(0), jax.jit(source.sample)(jax.random.key(0), source.data))
    assert "vectors" in params["describe"]


def test_ways_and_shots_vary_in_one_shape():
    batch = episodes(numbered(ways=(2, 5), shots=(1, 4)), 2000)
    assert batch.support.targets.shape == (2000, 20, 5)
    shots = np.asarray(batch.support.targets.sum(axis=1))
    ways = (shots > 0).sum(axis=1)
    assert set(ways) == {2, 3, 4, 5}
    np.testing.assert_allclose(np.bincount(ways)[2:] / 2000, 0.25, atol=0.04)
    np.testing.assert_allclose(np.bincount(shots[shots > 0].astype(int))[1:] / (shots > 0).sum(), 0.25, atol=0.02)
    assert (shots[np.arange(5)[None] >= ways[:, None]] == 0).all()
    np.testing.assert_array_equal(batch.query.targets.sum(axis=1), 2.0 * (shots > 0))
    assert dict(numbered(ways=(2, 5), shots=(1, 4)).protocol) == {"ways": [2, 5], "shots": [1, 4], "queries": 2}


def test_rows_without_a_label_repeat_rows_with_one():
    """So that neither a class that is not there nor a shot too many can be learned from, batch norm included."""
    batch = episodes(numbered(ways=(2, 5), shots=(1, 4)))
    for part in batch:
        for inputs, targets in zip(np.asarray(part.inputs), np.asarray(part.targets), strict=True):
            labelled = targets.any(axis=1)
            assert set(inputs) == set(inputs[labelled])
            assert len(set(inputs[labelled])) == labelled.sum()  # those with a label are distinct, as ever


def test_without_a_shot_the_support_holds_descriptions_alone():
    batch = episodes(numbered(ways=3, shots=0, descriptions=np.eye(8)))
    assert batch.support.targets.shape == (200, 3, 3)
    assert not batch.support.targets.any()
    assert not batch.support.inputs.any()
    assert batch.support.descriptions.any(axis=2).all()


def test_classes_that_are_not_there_have_no_description():
    support = episodes(numbered(ways=(2, 5), shots=(0, 2), descriptions=np.eye(8))).support
    ways = np.asarray(support.descriptions.any(axis=2).sum(axis=1))
    assert set(ways) == {2, 3, 4, 5}
    shots = np.asarray(support.targets.sum(axis=1))
    assert (shots[np.arange(5)[None] >= ways[:, None]] == 0).all()
    assert (shots[np.arange(5)[None] < ways[:, None]] == 0).any()


def refuses(match, **options):
    with pytest.raises(DataError, match=match):
        numbered(**options)


def test_bad_descriptions_are_told():
    eye = np.eye(8)
    refuses("there are 7 descriptions but 8 classes; give one for each class", descriptions=eye[:7])
    refuses("class 3 has no description; give one for each class", descriptions={i: eye[i] for i in range(8) if i != 3})
    refuses(
        r"description of class 2 has shape \[3\], that of 0 \[2\]",
        descriptions=[[1, 0], [2, 0], [1, 2, 3], *[[4, 4]] * 5],
    )
    refuses(
        "the description of class 5 is not finite", descriptions=np.where(eye * np.arange(8)[:, None] == 5, np.nan, eye)
    )
    refuses("the description of class 4 is all zeros", descriptions=eye * (np.arange(8) != 4)[:, None])
    refuses("classes 1 and 6 have the same description; describe", descriptions=eye[[0, 1, 2, 3, 4, 5, 1, 7]])
    refuses("classes 'b' and 'g' have the same", descriptions=eye[[0, 1, 2, 3, 4, 5, 1, 7]], names=list("abcdefgh"))
    refuses(
        r"descriptions are <U3; make numbers of them: jmeta.TokenIds\(jmeta.hashed_text",
        descriptions=[[f"{i:03}"] for i in range(8)],
    )


def test_tasks_without_support_are_told():
    refuses("shots is 0; give at least 1, or descriptions: a task would have no support", shots=0)
    refuses("shots is 0; give at least 1, or descriptions", shots=(0, 3))
    refuses(r"ways is \(5, 2\); give \(least, most\)", ways=(5, 2))


def test_embeddings_are_checked():
    x = np.random.default_rng(0).normal(size=(80, 6))
    source = jmeta.from_embeddings(x, LABELS, np.eye(8), shots=(0, 2), queries=2)
    assert jax.jit(source.sample)(jax.random.key(0), source.data).support.inputs.shape == (10, 6)
    x[7] = 0
    with pytest.raises(DataError, match="embedding 7 is all zeros, which has no direction for a cosine"):
        jmeta.from_embeddings(x, LABELS)
    with pytest.raises(DataError, match=r"embeddings have shape \[80, 2, 3\]; give a matrix"):
        jmeta.from_embeddings(x.reshape(80, 2, 3), LABELS)


def test_glyphs_are_described_by_their_names():
    names = [
        "LATIN SMALL LETTER A WITH DIAERESIS AND MACRON",
        "LATIN SMALL LETTER E WITH MACRON",
        "GREEK CAPITAL LETTER PI",
    ]
    a, e, pi = glyph_attributes(names)
    assert a @ e == 5  # script, case, mark, its word, and mark and case together
    assert a @ pi == 0
    for kind in ("attributes", "text"):
        source = jmeta.glyphs(split="test", ways=3, shots=0, queries=1, descriptions=kind)
        assert jax.tree.leaves(source.data.descriptions)[0].shape[0] == len(source.names)
        task = jax.jit(source.sample)(jax.random.key(0), source.data)
        assert task.support.inputs.shape == (3, 28, 28, 1)
    with pytest.raises(
        ConfigError,
        match=r"descriptions is 'pictures'; choose one of attributes, text, similar, similar[+]attributes, or None",
    ):
        jmeta.glyphs(descriptions="pictures")


def test_integers_that_may_be_either_are_told():
    with pytest.raises(
        DataError, match=r"integers up to 8, which may be token ids or numbers; give token ids as jmeta.Tok"
    ):
        numbered(descriptions=np.arange(1, 9)[:, None])
    with pytest.raises(DataError, match=r"token ids are float64 from 0.0; jmeta.hashed_text"):
        numbered(descriptions=jmeta.TokenIds(np.eye(8)))
    with pytest.raises(DataError, match="the description of class 0 is all zeros"):
        numbered(descriptions=jmeta.TokenIds(np.arange(8)[:, None]))


def test_attributes_of_unseen_glyphs_are_mostly_seen():
    data = load_glyphs()
    table = glyph_attributes(data.names)
    seen = table[data.splits == 0].any(axis=0)
    assert (table[data.splits == 2] * seen).sum() > 0.8 * table[data.splits == 2].sum()
