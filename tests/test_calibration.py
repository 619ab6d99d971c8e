"""How sure a learner is of its answers: measured over all queries, and set right by a temperature."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.special import logsumexp

import jmeta
from jmeta.calibration import temperature_of
from jmeta.evaluate import per_episode

KEY = jax.random.key(0)
LEARNER = jmeta.prototypical(jmeta.identity())


def source(**size):
    """Classes that overlap: distances are far too sure of themselves."""
    random = np.random.default_rng(0)
    means = random.normal(size=(8, 1, 6))
    x = (means + 2.0 * random.normal(size=(8, 30, 6))).reshape(240, 6)
    return jmeta.from_arrays(x, np.repeat(np.arange(8), 30), queries=5, **{"ways": 4, "shots": 2, **size})


SOURCE = source()


def answers(source, episodes):
    """Logits and targets of all queries, one after the other."""

    def kept(outputs, targets, mask=None):
        return {"outputs": outputs, "targets": targets}

    both = jmeta.Pooled(kept, lambda mean: mean)
    values = per_episode(KEY, LEARNER, {}, {}, source, {"both": both}, episodes=episodes)["both"]
    return (np.asarray(values[name], np.float64).reshape(-1, 4) for name in ("outputs", "targets"))


def likelihood(logits, targets, temperature):
    logits = logits / temperature
    shifted = logits - logits.max(1, keepdims=True)
    return (np.log(np.exp(shifted).sum(1)) - (shifted * targets).sum(1)).mean()


def calibration_error(logits, targets):
    """By the definition, bin after bin."""
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    confidence, right = p.max(1), p.argmax(1) == targets.argmax(1)
    error = 0.0
    for i in range(15):
        inside = (confidence > i / 15) & (confidence <= (i + 1) / 15)
        if inside.any():
            error += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
    return error


def test_evaluate_says_how_sure_a_classifier_is_over_all_queries_of_all_episodes():
    result = jmeta.evaluate(KEY, LEARNER, {}, {}, SOURCE, episodes=30)
    logits, targets = answers(SOURCE, 30)
    np.testing.assert_allclose(result["negative_log_likelihood"], likelihood(logits, targets, 1.0), rtol=1e-5)
    np.testing.assert_allclose(result["expected_calibration_error"], calibration_error(logits, targets), rtol=1e-4)
    single = [
        calibration_error(*part) for part in zip(logits.reshape(30, 20, 4), targets.reshape(30, 20, 4), strict=True)
    ]
    assert np.mean(single) > result["expected_calibration_error"] + 0.01  # few queries never look calibrated
    np.testing.assert_allclose(
        jmeta.expected_calibration_error(jnp.asarray(logits, jnp.float32), jnp.asarray(targets, jnp.float32)),
        calibration_error(logits, targets),
        rtol=1e-4,
    )


def test_the_interval_leaves_one_episode_out_at_a_time():
    result = jmeta.evaluate(KEY, LEARNER, {}, {}, SOURCE, episodes=12)
    logits, targets = (x.reshape(12, 20, 4) for x in answers(SOURCE, 12))
    left = [calibration_error(*(np.delete(x, i, axis=0).reshape(-1, 4) for x in (logits, targets))) for i in range(12)]
    error = np.sqrt(11 / 12 * np.square(left - np.mean(left)).sum())
    np.testing.assert_allclose(result["expected_calibration_error_ci95"], 1.96 * error, rtol=1e-3)


def test_an_episode_counts_by_the_queries_that_it_has():
    def counted(outputs, targets, mask=None):
        there = jnp.ones(len(outputs)) if mask is None else mask.astype(outputs.dtype)
        return {"sum": there @ outputs[:, 0], "n": there.sum()}

    mean = jmeta.Pooled(counted, lambda s: s["sum"] / s["n"])
    outputs, targets = jnp.arange(8.0).reshape(4, 2), jnp.eye(4, 2)
    assert float(mean(outputs, targets)) == 3.0
    assert float(mean(outputs, targets, jnp.asarray([True, False, False, True]))) == 3.0
    masked = source(ways=(2, 4))
    result = jmeta.evaluate(KEY, LEARNER, {}, {}, masked, episodes=20, metric={"mean": mean})
    values = per_episode(KEY, LEARNER, {}, {}, masked, {"mean": mean}, episodes=20)["mean"]
    assert len(set(np.asarray(values["n"]).tolist())) > 1
    np.testing.assert_allclose(result["mean"], values["sum"].sum() / values["n"].sum(), rtol=1e-5)


def test_answers_of_different_bins_do_not_make_up_for_each_other():
    """In bins of a fifteenth, 0.62 and 0.66 lie in one, 0.68 in the next."""
    confidence, right = np.asarray([0.62, 0.66, 0.68]), [True, False, True]
    outputs = jnp.log(jnp.asarray(np.stack([confidence, 1 - confidence], axis=1), jnp.float32))
    targets = jnp.asarray([[1.0, 0.0] if r else [0.0, 1.0] for r in right])
    expected = (abs(0.62 - 1 + 0.66) + abs(0.68 - 1)) / 3
    np.testing.assert_allclose(jmeta.expected_calibration_error(outputs, targets), expected, rtol=1e-5)


def test_rows_that_are_not_there_do_not_count():
    outputs = jnp.asarray([[2.0, 0.0], [0.0, 1.0], [9.0, 0.0]])
    targets, mask = jnp.asarray([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), jnp.asarray([True, True, False])
    for metric in (jmeta.expected_calibration_error, jmeta.negative_log_likelihood):
        np.testing.assert_allclose(metric(outputs, targets, mask), metric(outputs[:2], targets[:2]), rtol=1e-6)


def test_the_temperature_is_that_of_a_search_over_a_grid():
    temperature = jmeta.calibrate(KEY, LEARNER, {}, {}, SOURCE, episodes=40)
    logits, targets = answers(SOURCE, 40)
    grid = np.exp(np.linspace(np.log(0.01), np.log(100.0), 20001))
    best = grid[np.argmin([likelihood(logits, targets, t) for t in grid[::20]]) * 20]
    near = grid[np.abs(np.log(grid / best)) < 0.05]
    assert temperature == pytest.approx(near[np.argmin([likelihood(logits, targets, t) for t in near])], rel=1e-3)


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
def test_the_temperature_is_the_same_on_a_mesh():
    mesh = jax.make_mesh((2,), ("tasks",), devices=jax.devices()[:2])
    one, two = (jmeta.calibrate(KEY, LEARNER, {}, {}, SOURCE, episodes=9, mesh=each) for each in (None, mesh))
    assert two == pytest.approx(one, rel=1e-4)
    with pytest.raises(jmeta.ConfigError, match="none is 'tasks'"):
        jmeta.calibrate(KEY, LEARNER, {}, {}, SOURCE, episodes=9, mesh=jax.make_mesh((1,), ("data",)))


def test_temperatures_of_answers_that_tell_all_or_nothing_are_at_the_ends():
    right = np.eye(3)
    assert temperature_of(right, right) == pytest.approx(0.01)
    assert temperature_of(right, right[[1, 2, 0]]) == pytest.approx(100.0)


def test_probabilities_of_a_calibrated_classifier_are_as_sure_as_they_are_right():
    temperature = jmeta.calibrate(KEY, LEARNER, {}, {}, SOURCE, episodes=40)
    cooled = LEARNER._replace(predict=lambda *args: LEARNER.predict(*args) / jnp.float32(temperature))
    before, after = (
        jmeta.evaluate(jax.random.key(1), learner, {}, {}, SOURCE, episodes=40) for learner in (LEARNER, cooled)
    )
    assert after["accuracy"] == pytest.approx(before["accuracy"])
    assert after["expected_calibration_error"] < 0.25 * before["expected_calibration_error"]
    assert after["negative_log_likelihood"] < before["negative_log_likelihood"]
    x, y = np.eye(6, dtype=np.float32)[:2], [0, 1]
    logits = np.asarray(jmeta.FewShotClassifier(LEARNER, {}, {}).fit(x, y).predict_proba(x), np.float64)
    cooler = jmeta.FewShotClassifier(LEARNER, {}, {}, temperature=temperature).fit(x, y).predict_proba(x)
    expected = np.log(logits) / temperature
    np.testing.assert_allclose(cooler, np.exp(expected - np.asarray(logsumexp(expected, 1))[:, None]), rtol=1e-4)


def test_what_cannot_be_calibrated_is_told():
    broken = LEARNER._replace(predict=lambda *args: LEARNER.predict(*args) * jnp.nan)
    with pytest.raises(jmeta.DataError, match="no query with a label and finite outputs"):
        jmeta.calibrate(KEY, broken, {}, {}, SOURCE, episodes=2)
    for temperature in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(jmeta.ConfigError, match=r"temperature is \S+; give a positive number"):
            jmeta.FewShotClassifier(LEARNER, {}, {}, temperature=temperature).fit(np.eye(2), [0, 1])


def test_a_run_is_calibrated_on_its_validation_tasks(monkeypatch):
    run = jmeta.Run.begin(learner="prototypical", data="glyphs", model="mlp", ways=3, train_ways=3, queries=2)
    calls = []
    monkeypatch.setattr("jmeta.runs.run.calibrate", lambda *args, **options: calls.append(args[4]) or 3.0)
    assert run.classifier().temperature == run.classifier().temperature == 3.0
    assert calls == [run.source("validation")]
