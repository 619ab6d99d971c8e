"""scikit-learn takes the estimators as its own, and jmeta does not need it."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmeta

pytest.importorskip("sklearn")
from sklearn.base import clone, is_classifier, is_regressor
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.neighbors import NearestCentroid
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator
from sklearn.utils.validation import check_is_fitted

RANDOM = np.random.default_rng(0)
LABELS = np.asarray(["low", "high"])[RANDOM.integers(2, size=30)]
X = RANDOM.normal(size=(30, 3)) + 1.5 * (LABELS == "high")[:, None]
NEAREST = jmeta.prototypical(jmeta.identity())


def nearest(**options):
    return jmeta.FewShotClassifier(NEAREST, {}, {}, **options)


def regressor():
    learner = jmeta.maml(jmeta.linen(jmeta.MLP(1, hidden=())), inner_rate=0.1, loss=jmeta.mean_squared_error)
    support = jmeta.Examples(jnp.ones((2, 3)), jnp.ones((2, 1)))
    return jmeta.FewShotRegressor(learner, *learner.init(jax.random.key(0), jmeta.Task(support, ())))


def test_scores_of_folds_are_those_of_the_nearest_centroid():
    np.testing.assert_allclose(
        cross_val_score(nearest(), X, LABELS, cv=5), cross_val_score(NearestCentroid(), X, LABELS, cv=5)
    )


def test_a_clone_has_the_parameters_and_no_task():
    fitted = nearest(seed=3, temperature=2.0).fit(X, LABELS)
    check_is_fitted(fitted)
    other = clone(fitted)
    assert (other.seed, other.temperature, other.learner) == (3, 2.0, NEAREST)
    with pytest.raises(NotFittedError):
        check_is_fitted(other)


def test_it_stands_in_a_pipeline_and_in_a_search():
    pipeline = make_pipeline(StandardScaler(), nearest())
    search = GridSearchCV(pipeline, {"fewshotclassifier__temperature": [0.1, 1.0]}, scoring="neg_log_loss", cv=3)
    search.fit(X, LABELS)
    assert search.best_params_["fewshotclassifier__temperature"] == 1.0  # at 0.1 it is too sure
    assert search.best_estimator_.predict(X).shape == (30,)


def test_what_is_loaded_scores_too(tmp_path):
    nearest().fit(X, LABELS).save(tmp_path / "x")
    pipeline = make_pipeline(jmeta.FewShotClassifier.load(tmp_path / "x"))
    assert pipeline.score(X, LABELS) == nearest().fit(X, LABELS).score(X, LABELS)


def test_kinds_are_told_apart():
    assert is_classifier(nearest()) and not is_regressor(nearest())
    assert is_regressor(regressor()) and not is_classifier(regressor())
    assert len(cross_val_score(regressor(), X, X[:, 0], cv=3)) == 3


OWN_SENTENCE = "refused by a sentence of jmeta's own"
ANY_LABEL = "labels of any kind are classes"
CHECKED = "annotations are checked in tests, and -1 is no learner"
FUNCTIONS = "a learner is functions, which pickle does not take; `save` and `load` do"
EXPECTED = {
    "check_estimators_unfitted": "the error is jmeta.NotFittedError, which does not need scikit-learn",
    "check_n_features_in_after_fitting": OWN_SENTENCE,
    "check_complex_data": OWN_SENTENCE,
    "check_estimator_sparse_tag": OWN_SENTENCE,
    "check_estimator_sparse_array": OWN_SENTENCE,
    "check_estimator_sparse_matrix": OWN_SENTENCE,
    "check_dtype_object": OWN_SENTENCE,
    "check_estimators_empty_data_messages": OWN_SENTENCE,
    "check_fit2d_predict1d": OWN_SENTENCE,
    "check_requires_y_none": OWN_SENTENCE,
    "check_supervised_y_2d": "a column of labels is refused, not flattened with a warning",
    "check_classifiers_regression_target": ANY_LABEL,
    "check_do_not_raise_errors_in_init_or_set_params": CHECKED,
    "check_estimators_overwrite_params": FUNCTIONS,
    "check_estimators_pickle": FUNCTIONS,
}


@pytest.mark.filterwarnings("ignore:Estimator FewShotClassifier does not inherit")
def test_estimator_checks():
    """Those of scikit-learn on a learner that takes inputs of any width."""
    results = check_estimator(nearest(), expected_failed_checks=EXPECTED, on_fail=None, on_skip=None)
    assert [(r["check_name"], repr(r["exception"])[:600]) for r in results if r["status"] == "failed"] == []
    refused = {r["check_name"] for r in results if r["status"] == "xfail"}
    assert refused == set(EXPECTED), "a check that passes now is expected to fail"
    assert sum(r["status"] == "passed" for r in results) > 30


def test_jmeta_does_not_import_it():
    code = "import sys, jmeta; jmeta.FewShotClassifier; sys.exit('sklearn' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
