"""Images of similar classes and several kinds of descriptions together: from the arrays to the answers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jmeta
from jmeta.data.glyphs import load_glyphs, relatives
from jmeta.errors import ConfigError, DataError
from jmeta.learners.late_fusion import fold_of
from jmeta.masks import described
from jmeta.runs.shapes import from_json, to_json

LABELS = np.repeat(np.arange(6), 8)
PICTURES = np.random.default_rng(0).integers(1, 255, (48, 4, 4, 1)).astype(np.uint8)
RELATED = jmeta.Similar(PICTURES[:12].reshape(6, 2, 4, 4, 1), [0, 0, 1, 1, 2, 2])
ATTRIBUTES = np.eye(6, dtype=np.float32)


def source_of(descriptions, **options):
    size = {"ways": 4, "shots": (0, 2), "queries": 2}
    return jmeta.from_arrays(PICTURES, LABELS, descriptions=descriptions, **{**size, **options})


def task_of(descriptions, **options):
    source = source_of(descriptions, **options)
    return jax.jit(source.sample)(jax.random.key(1), source.data)


class Network(nn.Module):
    """Mean and deviation of an image, and whether it counts the rows that it sees."""

    @nn.compact
    def __call__(self, x, train=False, mask=None):
        seen = self.variable("batch_stats", "rows", lambda: jnp.zeros(()))
        if train:
            seen.value = jnp.asarray(float(len(x))) if mask is None else mask.sum().astype(jnp.float32)
        x = x.reshape(len(x), -1)
        scale = self.param("scale", nn.initializers.ones, (1, 2))
        return jnp.stack([x.mean(axis=1), x.std(axis=1)], axis=1) * scale


def test_images_of_similar_classes_are_seen_as_the_examples_are_and_of_classes_that_are_there():
    task = task_of({"horse": RELATED, "stripes": ATTRIBUTES}, ways=(2, 4), transform=lambda key, x: 1.0 - x)
    told = task.support.descriptions
    assert told["horse"].images.shape == (4, 2, 4, 4, 1) and told["horse"].images.dtype == jnp.float32
    there = np.asarray(told["stripes"].any(axis=1))
    chosen = np.asarray(told["stripes"].argmax(axis=1))[there]
    given = 1.0 - np.asarray(RELATED.images)[chosen] / 255.0
    np.testing.assert_allclose(np.asarray(told["horse"].images)[there], given, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(told["horse"].of)[there], np.asarray(RELATED.of)[chosen])
    np.testing.assert_array_equal(described(told)[: there.sum()], True)


def test_other_tasks_are_drawn_as_without_them():
    plain, told = (task_of(d) for d in (ATTRIBUTES, {"horse": RELATED, "stripes": ATTRIBUTES}))
    np.testing.assert_array_equal(plain.query.inputs, told.query.inputs)
    np.testing.assert_array_equal(plain.support.inputs, told.support.inputs)


def test_the_description_is_the_mean_embedding_and_kinds_are_averaged_where_there_are_some():
    learner = jmeta.zero_shot(jmeta.linen(Network()))
    attributes = ATTRIBUTES.copy()
    attributes[2] = 0.0  # a class that is told by its similar one alone
    task = task_of({"horse": RELATED, "stripes": attributes}, shots=0, ways=6)
    params, state = jax.jit(learner.init)(jax.random.key(0), task)
    np.testing.assert_array_equal(params["map"]["horse"], np.eye(2))
    # a reader that makes something of nothing
    params = {**params, "describe": jax.tree.map(lambda x: x + 0.1, params["describe"])}
    adapt = jax.jit(learner.adapt)
    adapted = adapt(jax.random.key(2), params, state, task.support)
    pooled = jnp.mean(task.support.descriptions["horse"].images.reshape(6, 2, 16), axis=2).mean(axis=1)
    only = adapt(
        jax.random.key(2),
        {**params, "map": {**params["map"], "horse": jnp.zeros((2, 2))}},
        state,
        task.support,
    )
    difference = adapted.params.points - only.params.points
    silent = np.asarray(~task.support.descriptions["stripes"].any(axis=1))
    np.testing.assert_allclose(difference[:, 0], np.asarray(pooled) / np.where(silent, 1, 2), rtol=1e-4)
    np.testing.assert_array_equal(only.params.points[silent], 0.0)
    assert np.abs(np.asarray(only.params.points)[~silent]).min() > 0 and adapted.params.present.all()
    # in training the moving averages see support, similar classes and queries as one batch
    _, (after, _) = jax.jit(learner.objective)(jax.random.key(3), params, state, jax.tree.map(lambda x: x[None], task))
    assert after["model"]["batch_stats"]["rows"] == 6 * 2 + len(task.query.targets)


@pytest.mark.parametrize(
    "make",
    [jmeta.tip_adapter, *(pytest.param(make, marks=pytest.mark.slow) for make in (jmeta.am3, jmeta.late_fusion))],
)
def test_learners_that_read_descriptions_take_all_kinds(make):
    learner = make(jmeta.linen(jmeta.MLP(outputs=None, hidden=(8,))))
    kinds = {
        "horse": RELATED,
        "name": jmeta.TokenIds(jmeta.hashed_text(list("abcdef"), width=4)),
        "stripes": ATTRIBUTES,
    }
    source = source_of(kinds)
    fitted = jmeta.fit(jax.random.key(0), learner, source, steps=2, tasks=1)
    assert np.isfinite(fitted.history[-1]["loss"])


def test_a_run_keeps_the_shapes_of_all_kinds():
    kinds = {
        "horse": RELATED,
        "name": jmeta.TokenIds(jmeta.hashed_text(list("abcdef"), width=4)),
        "stripes": ATTRIBUTES,
    }
    for told in (kinds, RELATED, ATTRIBUTES):
        source = source_of(told)
        task = jax.eval_shape(source.sample, jax.random.key(0), source.data)
        assert from_json(json.loads(json.dumps(to_json(task)))) == task


def test_the_fold_of_a_similar_class_is_that_of_its_number_whatever_its_images():
    parts = [fold_of(jmeta.Similar(jnp.ones((6, 2)) * i, jnp.arange(6)), 3) for i in (1, 2)]
    np.testing.assert_array_equal(*parts)
    assert len(set(np.asarray(parts[0]).tolist())) > 1


def test_descriptions_of_several_kinds_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match="there are 5 descriptions but 6 classes"):
        source_of({"horse": jmeta.Similar(RELATED.images[:5]), "stripes": ATTRIBUTES})
    with pytest.raises(DataError, match=r"images of similar classes are \[6, 4\], of the classes \[6\]; give"):
        source_of(jmeta.Similar(np.ones((6, 4))))
    silent = ATTRIBUTES * (np.arange(6) != 3)[:, None]
    with pytest.raises(DataError, match="the description of class 3 is all zeros"):
        source_of({"stripes": silent, "spots": silent * 2})
    with pytest.raises(DataError, match="classes 0 and 1 have the same description"):
        source_of({"stripes": np.ones((6, 1)), "spots": np.asarray([[1.0], [1], [2], [3], [4], [5]])})
    kept = source_of({"horse": RELATED, "stripes": ATTRIBUTES}, min_rows=8)
    assert kept.data.descriptions["horse"].of.tolist() == RELATED.of


def test_similar_characters_are_of_training_and_never_the_character_itself():
    data = load_glyphs()
    found = relatives(data)
    index = data.names.index
    known = np.flatnonzero(data.splits == 0)
    assert set(found["base"]) <= set(known) and set(found["mark"]) <= {-1, *known}
    for other in found.values():
        assert not (other == np.arange(len(data.names))).any()
    accented = index("LATIN CAPITAL LETTER E WITH CIRCUMFLEX")
    assert found["base"][accented] == index("LATIN CAPITAL LETTER E")
    assert data.names[found["mark"][accented]] == "LATIN CAPITAL LETTER O WITH CIRCUMFLEX"
    source = jmeta.glyphs(split="test", shots=0, descriptions="similar+attributes")
    assert sorted(source.data.descriptions) == ["attributes", "base", "mark"]
    with pytest.raises(ConfigError, match="descriptions is 'similar\\+sound'; choose one of attributes, text, similar"):
        jmeta.glyphs(descriptions="similar+sound")
