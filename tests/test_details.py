"""What `evaluate` tells beside a number, and tasks that are not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jmeta

KEY = jax.random.key(0)
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(6), 8))
# the nearest prototype is wrong for class 5, which looks like class 4, and for row 0 alone
X = np.eye(6, dtype=np.float32)[np.where(LABELS == 5, 4, LABELS)] + 1e-3 * np.random.default_rng(1).normal(size=(48, 6))
X[LABELS == 5] += 1e-2 * np.eye(6)[5]
ODD = int(np.flatnonzero(LABELS == 0)[0])
X[ODD] = np.eye(6)[1] * 3
LEARNER = jmeta.prototypical(jmeta.identity())


def evaluate(source, learner=LEARNER, **options):
    return jmeta.evaluate(KEY, learner, {}, {}, source, episodes=40, **options)


def test_details_are_those_counted_by_hand():
    source = jmeta.from_arrays(X, LABELS, ways=4, shots=2, queries=3, names=list("abcdef"))
    result = evaluate(source, details=True)
    confusion, each, wrong = np.zeros((6, 6), int), np.zeros(48, int), np.zeros(48, int)
    sample = jax.jit(lambda key: source.sample(jax.random.split(key, 3)[0], source.data))
    for key in jax.random.split(KEY, 40):
        task = sample(key)
        x, shown = np.asarray(task.support.inputs), np.asarray(task.support.classes)
        means = {c: x[shown == c].mean(0) for c in set(shown.tolist())}
        for query, row, true in zip(
            *map(np.asarray, (task.query.inputs, task.query.rows, task.query.classes)), strict=True
        ):
            assert LABELS[row] == true
            answer = min(means, key=lambda c: ((query - means[c]) ** 2).sum())
            confusion[true, answer] += 1
            each[row] += 1
            wrong[row] += answer != true
    told = result["details"]
    np.testing.assert_array_equal(told["confusion"], confusion)
    np.testing.assert_allclose(told["accuracy_by_class"], np.diag(confusion) / confusion.sum(1))
    assert {m["row"]: (m["class"], m["asked"], m["wrong"]) for m in told["mistaken"]} == {
        r: (LABELS[r], each[r], wrong[r]) for r in np.flatnonzero(wrong)
    }
    shares = [m["wrong"] / m["asked"] for m in told["mistaken"]]
    assert shares == sorted(shares, reverse=True) and ODD in {m["row"] for m in told["mistaken"]}
    assert result["accuracy"] == pytest.approx(np.diag(confusion).sum() / confusion.sum())
    assert evaluate(source) == {name: value for name, value in result.items() if name != "details"}


def test_details_of_groups_are_by_the_classes_of_all_groups():
    labels = np.random.default_rng(2).integers(0, 3, 60)
    source = jmeta.from_groups(np.eye(4)[labels], labels, np.repeat(np.arange(3), 20), shots=6, queries=4, classes=4)
    always_two = jmeta.episodic(
        lambda key, task: ({}, {}),
        lambda key, params, state, support: jmeta.Adapted({}, {}, {}),
        lambda key, adapted, inputs: jnp.eye(4)[jnp.full(len(inputs), 3)],
        jmeta.softmax_cross_entropy,
    )
    told = evaluate(source, always_two, details=True)["details"]
    assert np.asarray(told["confusion"]).shape == (4, 4) and np.asarray(told["confusion"])[:, :3].sum() == 0
    assert told["accuracy_by_class"] == [0.0, 0.0, 0.0, None]


def test_rows_outside_of_the_mask_are_not_counted():
    source = jmeta.from_arrays(X, LABELS, ways=(2, 4), shots=(1, 2), queries=(1, 3))
    told = evaluate(source, details=True)["details"]
    sample = jax.jit(lambda key: source.sample(jax.random.split(key, 3)[0], source.data))
    there = [int(sample(key).query.mask.sum()) for key in jax.random.split(KEY, 40)]
    assert np.asarray(told["confusion"]).sum() == sum(there)


def test_details_of_a_source_that_tells_no_classes():
    source = jmeta.from_arrays(X, LABELS, ways=4, shots=2, queries=3)
    silent = lambda e: e._replace(classes=(), rows=())  # noqa: E731
    source = source._replace(sample=lambda key, data, of=source.sample: jmeta.Task(*map(silent, of(key, data))))
    with pytest.raises(jmeta.ConfigError, match=r"details need the class and the row of each query.*classes=, rows="):
        evaluate(source, details=True)


SINUSOID = jmeta.sinusoid(shots=5, queries=5)
MAML = jmeta.maml(jmeta.linen(jmeta.MLP(outputs=1, hidden=(4,))), inner_rate=0.01, loss=jmeta.mean_squared_error)


def broken(share, value=jnp.nan):
    """Sinusoids of which some have a target that is not finite."""

    def sample(key, data):
        task = SINUSOID.sample(key, data)
        bad = jax.random.bernoulli(jax.random.fold_in(key, 7), share)
        targets = task.query.targets.at[2, 0].add(jnp.where(bad, value, 0.0))
        return task._replace(query=task.query._replace(targets=targets, rows=jnp.arange(100, 105)))

    return SINUSOID._replace(sample=sample)


def is_bad(task):
    return not np.isfinite(np.asarray(task.query.targets)).all()


@pytest.mark.slow
def test_episodes_that_are_not_finite_are_named_or_left_out_and_counted():
    params, state = jmeta.init(KEY, MAML, optax.adam(1e-3), SINUSOID)[2:4]
    options = {"metric": jmeta.mean_squared_error, "episodes": 40}
    source = broken(0.1)
    sample = jax.jit(lambda key: source.sample(jax.random.split(key, 3)[0], ()))
    bad = [is_bad(sample(key)) for key in jax.random.split(KEY, 40)]
    assert 0 < sum(bad) < 40
    with pytest.warns(UserWarning, match="episodes are not finite") as caught:
        result = jmeta.evaluate(KEY, MAML, params, state, source, **options)
    assert np.isnan(result["mean_squared_error"])
    assert f"{sum(bad)} of 40 episodes are not finite, the first of them episode {bad.index(True)}" in str(
        caught[0].message
    )
    assert "'query/targets' of task 0 is not finite: entry [0, 2, 0], row 102; look at" in str(caught[0].message)
    result = jmeta.evaluate(KEY, MAML, params, state, source, skip_nonfinite=True, **options)
    assert result["skipped"] == sum(bad) and result["episodes"] == 40 - sum(bad)
    whole, losses = jmeta.evaluate(KEY, MAML, params, state, SINUSOID, **options), []

    @jax.jit
    def loss(key):
        sample, adapt, predict = jax.random.split(key, 3)
        task = SINUSOID.sample(sample, ())
        outputs = MAML.predict(predict, MAML.adapt(adapt, params, state, task.support), task.query.inputs)
        return jmeta.mean_squared_error(outputs, task.query.targets)

    for key, skip in zip(jax.random.split(KEY, 40), bad, strict=True):
        losses += [] if skip else [float(loss(key))]
    assert result["mean_squared_error"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert "skipped" not in whole
    with pytest.raises(jmeta.NonFiniteError, match="40 of 40 episodes are not finite"):
        jmeta.evaluate(KEY, MAML, params, state, broken(1.0), skip_nonfinite=True, **options)


@pytest.mark.parametrize(
    "optimizer", [optax.sgd(0.01), pytest.param(optax.lbfgs(), marks=pytest.mark.slow)], ids=["sgd", "lbfgs"]
)
def test_a_step_leaves_out_tasks_that_are_not_finite(optimizer):
    """The update is that of the other tasks, also for an optimiser that asks for the objective again."""
    source, tasks = broken(0.3), 8
    train_state = jmeta.init(KEY, MAML, optimizer, SINUSOID)
    new, info = jax.jit(jmeta.make_step(MAML, optimizer, source, tasks=tasks, skip_nonfinite=True))(train_state, None)
    sample_key, objective_key = jax.random.split(jax.random.fold_in(train_state.key, 0))
    batch = jax.jit(jax.vmap(source.sample, (0, None)))(jax.random.split(sample_key, tasks), ())
    bad = np.asarray([is_bad(jax.tree.map(lambda x, i=i: x[i], batch)) for i in range(tasks)])
    assert 0 < bad.sum() < tasks and float(info["skipped"]) == bad.sum()
    good = jax.tree.map(lambda x: x[~bad], batch)

    def objective(params):
        return MAML.objective(objective_key, params, {}, good)[0]

    value, gradient = jax.value_and_grad(objective)(train_state.params)
    np.testing.assert_allclose(info["loss"], value, rtol=1e-5)
    extra = {} if optimizer.update.__name__ == "sgd" else {"value": value, "grad": gradient, "value_fn": objective}
    update = optax.with_extra_args_support(optimizer).update
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        updates, _ = update(gradient, train_state.optimizer_state, train_state.params, **extra)
        wanted = optax.apply_updates(train_state.params, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6), new.params, wanted)


@pytest.mark.slow
def test_a_run_leaves_out_tasks_that_are_not_finite_and_counts_them():
    fitted = jmeta.fit(KEY, MAML, broken(0.1), steps=20, tasks=4, log_every=20, skip_nonfinite=True)
    assert int(fitted.train_state.step) == 20
    assert 0.0 < fitted.history[0]["skipped"] < 2.0 and np.isfinite(fitted.history[0]["loss"])
    whole = jmeta.fit(KEY, MAML, SINUSOID, steps=20, tasks=4, log_every=20, skip_nonfinite=True)
    plain = jmeta.fit(KEY, MAML, SINUSOID, steps=20, tasks=4, log_every=20)
    assert whole.history[0]["skipped"] == 0.0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), whole.params, plain.params)
    with pytest.raises(
        jmeta.NonFiniteError, match="row 102; repair the data, or leave such tasks out by skip_nonfinite"
    ):
        jmeta.fit(KEY, MAML, broken(0.1), steps=20, tasks=4, log_every=20)
    with pytest.raises(jmeta.NonFiniteError, match="at step 0"):
        jmeta.fit(KEY, MAML, broken(1.0), steps=2, tasks=4, log_every=2, skip_nonfinite=True)
