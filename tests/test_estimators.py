"""Estimators in the manner of scikit-learn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jmeta

RANDOM = np.random.default_rng(0)
NEAREST = jmeta.prototypical(jmeta.identity())


def classifier(**options):
    return jmeta.FewShotClassifier(NEAREST, {}, {}, **options)


@functools.cache
def five_way(norm="group"):
    """A five-way head that was not trained, on images of 8x8."""
    learner = jmeta.maml(jmeta.linen(jmeta.Conv4(5, features=8, norm=norm, head_init="random")))
    images = jnp.zeros((5, 8, 8, 1))
    return learner, *jax.jit(learner.init)(jax.random.key(0), jmeta.Task(jmeta.Examples(images, jnp.eye(5)), ()))


@pytest.mark.parametrize(
    "labels",
    [["b", "a", "b", "c"], [7, -2, 7, 40], np.asarray([2.5, 0.5, 2.5, 9.0])],
    ids=["text", "integers", "floats"],
)
def test_labels_of_any_kind_and_uneven_classes(labels):
    x = RANDOM.normal(size=(4, 3)).astype(np.float32)
    fitted = classifier().fit(x, labels)
    np.testing.assert_array_equal(fitted.classes_, np.unique(labels))
    means = np.stack([x[np.asarray(labels) == c].mean(0) for c in fitted.classes_])
    queries = RANDOM.normal(size=(7, 3)).astype(np.float32)
    logits = -np.square(queries[:, None] - means[None]).sum(-1)
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(fitted.predict_proba(queries), expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(fitted.predict(queries), fitted.classes_[expected.argmax(1)])
    assert fitted.score(queries, fitted.predict(queries)) == 1.0


def test_a_five_way_head_never_answers_a_class_that_is_not_there():
    images = RANDOM.normal(size=(3, 8, 8, 1)).astype(np.float32)
    fitted = jmeta.FewShotClassifier(*five_way()).fit(images, ["x", "y", "z"])
    probabilities = fitted.predict_proba(RANDOM.normal(size=(40, 8, 8, 1)))
    assert probabilities.shape == (40, 3)
    np.testing.assert_allclose(probabilities.sum(1), 1.0, rtol=1e-5)
    with pytest.raises(jmeta.DataError, match="6 classes and the learner a head of 5; give fewer"):
        jmeta.FewShotClassifier(*five_way()).fit(np.zeros((6, 8, 8, 1)), range(6))


def test_one_query_has_the_answer_that_it_has_among_many():
    support, queries = (RANDOM.normal(size=(n, 8, 8, 1)).astype(np.float32) for n in (5, 20))
    fitted = jmeta.FewShotClassifier(*five_way()).fit(support, range(5))
    together = fitted.predict_proba(queries)
    for i in (0, 19):
        np.testing.assert_allclose(fitted.predict_proba(queries[i : i + 1])[0], together[i], rtol=1e-5, atol=1e-6)


def test_a_transductive_model_that_is_asked_for_less_says_so():
    support, queries = (RANDOM.normal(size=(n, 8, 8, 1)).astype(np.float32) for n in (5, 20))
    fitted = jmeta.FewShotClassifier(*five_way("transductive"), queries=20).fit(support, range(5))
    fitted.predict(queries)
    with pytest.warns(jmeta.TransductiveWarning, match="of 3 at once it is worse than of the 20"):
        fitted.predict(queries[:3])


def test_other_numbers_of_examples_and_queries_compile_nothing_new():
    traces = []

    def adapt(*args):
        traces.append(None)
        return NEAREST.adapt(*args)

    counted = jmeta.FewShotClassifier(NEAREST._replace(adapt=adapt), {}, {})
    x = RANDOM.normal(size=(20, 3))
    for n in (5, 6, 7, 8):
        counted.fit(x[:n], np.arange(n) % 2).predict(x)
    assert len(traces) <= 3  # twice for its shapes, once for the program


def test_a_regressor_predicts_in_the_shape_of_its_targets():
    learner = jmeta.maml(jmeta.linen(jmeta.MLP(1, hidden=(4,))), inner_rate=0.01, loss=jmeta.mean_squared_error)
    params, state = jax.jit(learner.init)(
        jax.random.key(0), jmeta.Task(jmeta.Examples(jnp.ones((1, 2)), jnp.ones((1, 1))), ())
    )
    x, y = RANDOM.normal(size=(6, 2)).astype(np.float32), RANDOM.normal(size=6).astype(np.float32)
    fitted = jmeta.FewShotRegressor(learner, params, state).fit(x, y)
    support = jmeta.Examples(jnp.asarray(x), jnp.asarray(y)[:, None])
    adapted = learner.adapt(jax.random.key(0), params, state, support)
    expected = learner.predict(jax.random.key(0), adapted, jnp.asarray(x))
    np.testing.assert_allclose(fitted.predict(x), expected[:, 0], rtol=1e-4, atol=1e-6)
    two_dimensional = jmeta.FewShotRegressor(learner, params, state).fit(x, y[:, None])
    assert two_dimensional.predict(x[:2]).shape == (2, 1)
    residual = np.square(y - expected[:, 0]).sum() / np.square(y - y.mean()).sum()
    np.testing.assert_allclose(fitted.score(x, y), 1 - residual, rtol=1e-3)


def test_what_cannot_be_is_told():
    x = np.zeros((4, 3))
    with pytest.raises(jmeta.NotFittedError, match=r"call fit\(X, y\) on its support first"):
        classifier().predict(x)
    with pytest.raises(jmeta.DataError, match=r"rows of shape \[2\], and the support has \[3\]"):
        classifier().fit(x, [0, 1, 0, 1]).predict(np.zeros((1, 2)))
    with pytest.raises(jmeta.DataError, match="there are 4 inputs and labels of shape"):
        classifier().fit(x, [0, 1])
    with pytest.raises(jmeta.DataError, match="X holds values that are not finite"):
        classifier().fit(x + np.nan, [0, 1, 0, 1])
    with pytest.raises(jmeta.ModelError, match="there is no parameter 'ways'; there are learner"):
        classifier().set_params(ways=3)
    assert classifier(seed=3).set_params(seed=4).get_params()["seed"] == 4


class Plain(nn.Module):
    """A network whose last layer has no name of its own."""

    outputs: int = 4

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.outputs)(nn.relu(nn.Dense(6)(x)))


def test_a_head_is_known_by_its_width_and_not_by_its_name():
    learner = jmeta.maml(jmeta.linen(Plain()))
    support = jmeta.Examples(jnp.zeros((4, 3)), jnp.eye(4))
    params, state = jax.jit(learner.init)(jax.random.key(0), jmeta.Task(support, ()))
    x = RANDOM.normal(size=(2, 3)).astype(np.float32)
    fitted = jmeta.FewShotClassifier(learner, params, state).fit(x, ["a", "b"])
    assert fitted.predict_proba(x).shape == (2, 2)
    with pytest.raises(jmeta.DataError, match="5 classes and the learner a head of 4; give fewer"):
        jmeta.FewShotClassifier(learner, params, state).fit(np.zeros((5, 3)), range(5))


def test_inputs_of_another_shape_are_told_before_the_network_meets_them():
    x, y = np.zeros((4, 8, 8, 1), np.float32), [0, 1, 0, 1]
    learner, params, state = five_way()
    with pytest.raises(jmeta.ModelError, match=r"cannot take inputs of shape \[8, 8, 3\]; give inputs of the shape"):
        jmeta.FewShotClassifier(learner, params, state).fit(np.zeros((4, 8, 8, 3)), y)
    known = jmeta.FewShotClassifier(learner, params, state, input_shape=(8, 8, 1))
    with pytest.raises(jmeta.DataError, match=r"rows of shape \[9, 9, 1\], and the run was trained on \[8, 8, 1\]"):
        known.fit(np.zeros((4, 9, 9, 1)), y)
    with pytest.raises(jmeta.DataError, match=r"X has shape \[8, 8, 1\], which is one input; give a row for it"):
        known.fit(x, y).predict(x[0])
