import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmeta

GROUPS = np.repeat(["ann", "bob", "eve"], [7, 9, 12])
ROWS = np.arange(28.0)[:, None] * np.ones((1, 2))
order = np.random.default_rng(0).permutation(28)


def source(**options):
    return jmeta.from_groups(ROWS[order], ROWS[order, 0] ** 2, GROUPS[order], shots=3, queries=4, **options)


def test_a_task_is_disjoint_rows_of_one_group():
    tasks = source()
    drawn = jax.vmap(tasks.sample, (0, None))(jax.random.split(jax.random.key(0), 200), tasks.data)
    rows = np.concatenate([drawn.support.inputs, drawn.query.inputs], axis=1)[..., 0].astype(int)
    targets = np.concatenate([drawn.support.targets, drawn.query.targets], axis=1)
    assert rows.shape == (200, 7)
    assert all(len(set(task)) == 7 for task in rows)
    owners = GROUPS[rows]
    assert (owners == owners[:, :1]).all()
    assert set(owners[:, 0]) == {"ann", "bob", "eve"}
    assert set(rows.ravel()) == set(range(28))
    np.testing.assert_array_equal(targets[..., 0], rows**2)
    assert tasks.names == ("ann", "bob", "eve")
    assert tasks.protocol == {"groups": 3, "shots": 3, "queries": 4}


def test_integers_are_classes_of_all_groups():
    tasks = jmeta.from_groups(ROWS, np.arange(28) % 3, GROUPS, shots=3, queries=4)
    task = tasks.sample(jax.random.key(0), tasks.data)
    np.testing.assert_array_equal(task.query.targets.argmax(-1), task.query.inputs[:, 0].astype(int) % 3)


def test_a_regression_and_a_classification_train():
    model = jmeta.linen(jmeta.MLP(outputs=1, hidden=(4,)))
    learner = jmeta.maml(model, inner_rate=1e-4, loss=jmeta.mean_squared_error)
    assert len(jmeta.fit(jax.random.key(0), learner, source(), steps=2, tasks=2).history) == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((ROWS, ROWS[:5, 0], GROUPS), "there are 28 inputs, 5 targets"),
        ((ROWS, ROWS[:, 0], GROUPS[:, None]), r"groups of shape \[28, 1\]"),
        ((np.full_like(ROWS, np.nan), ROWS[:, 0], GROUPS), "input 0 is not finite"),
        ((ROWS, np.full(28, np.inf), GROUPS), "target 0 is not finite"),
        ((ROWS, np.arange(28) * 2, GROUPS), "integer targets are classes and must be numbered from 0"),
        ((ROWS, np.ones((28, 1, 1)), GROUPS), r"give \[n\] or \[n, outputs\]"),
        ((ROWS[:0], ROWS[:0, 0], GROUPS[:0]), "there are no rows"),
    ],
)
def test_bad_arrays(arguments, sentence):
    with pytest.raises(jmeta.DataError, match=sentence):
        jmeta.from_groups(*arguments, shots=3, queries=4)


def test_a_group_that_is_too_small_is_named():
    with pytest.raises(jmeta.DataError, match="group 'ann' has 7 rows, but 4 shots"):
        jmeta.from_groups(ROWS, ROWS[:, 0], GROUPS, shots=4, queries=4)
    with pytest.raises(jmeta.DataError, match="shots is 0"):
        jmeta.from_groups(ROWS, ROWS[:, 0], GROUPS, shots=0)


def test_bytes_are_scaled():
    tasks = jmeta.from_groups(np.full((28, 2), 255, np.uint8), ROWS[:, 0], GROUPS, shots=3, queries=4)
    assert tasks.sample(jax.random.key(0), tasks.data).support.inputs.dtype == jnp.float32
    assert float(tasks.sample(jax.random.key(0), tasks.data).support.inputs.max()) == 1.0
