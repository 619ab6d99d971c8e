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
    drawn = jax.jit(jax.vmap(tasks.sample, (0, None)))(jax.random.split(jax.random.key(0), 200), tasks.data)
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
    task = jax.jit(tasks.sample)(jax.random.key(0), tasks.data)
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


@pytest.mark.parametrize(
    ("inputs", "dtype", "largest"),
    [
        (np.full((28, 2, 2, 1), 255, np.uint8), jnp.float32, 1.0),
        (np.full((28, 2), 255, np.uint8), jnp.int32, 255),
        (np.ones((28, 2), np.uint8), jnp.int32, 1),
    ],
)
def test_bytes_of_pictures_are_scaled_and_no_others(inputs, dtype, largest):
    tasks = jmeta.from_groups(inputs, ROWS[:, 0], GROUPS, shots=3, queries=4)
    task = jax.jit(tasks.sample)(jax.random.key(0), tasks.data)
    for examples in task:
        assert examples.inputs.dtype == dtype and examples.inputs.max() == largest


def drawn(tasks, count=200):
    return jax.jit(jax.vmap(tasks.sample, (0, None)))(jax.random.split(jax.random.key(0), count), tasks.data)


def test_classes_are_given_once():
    stars = np.arange(28) % 5
    for missing in (4, 2):
        rows = stars != missing
        tasks = jmeta.from_groups(ROWS[rows], stars[rows], GROUPS[rows], shots=2, queries=2, classes=5)
        found = drawn(tasks)
        assert found.query.targets.shape == (200, 2, 5) and tasks.protocol["classes"] == 5
        np.testing.assert_array_equal(found.query.targets.argmax(-1), found.query.inputs[..., 0].astype(int) % 5)
    with pytest.raises(jmeta.DataError, match="this part of the data lacks some, give classes=5 or more"):
        jmeta.from_groups(ROWS[stars != 2], stars[stars != 2], GROUPS[stars != 2], shots=2, queries=2)
    with pytest.raises(jmeta.DataError, match="there is a target 4, and classes is 4; give at least 5"):
        jmeta.from_groups(ROWS, stars, GROUPS, shots=2, queries=2, classes=4)
    with pytest.raises(jmeta.DataError, match="leave classes away"):
        jmeta.from_groups(ROWS, ROWS[:, 0], GROUPS, shots=2, queries=2, classes=4)


def test_shots_and_queries_vary_as_far_as_a_group_has_rows():
    tasks = jmeta.from_groups(ROWS[order], ROWS[order, 0] ** 2, GROUPS[order], shots=(1, 6), queries=(2, 5))
    assert tasks.protocol == {"groups": 3, "shots": [1, 6], "queries": [2, 5]}
    found = drawn(tasks, 2000)
    shots, queries = found.support.mask.sum(1), found.query.mask.sum(1)
    sizes = {"ann": 7, "bob": 9, "eve": 12}
    seen = {name: set() for name in sizes}
    for i in range(2000):
        s, q = (np.asarray(e.inputs[i])[np.asarray(e.mask[i])][:, 0].astype(int) for e in (found.support, found.query))
        owner = set(GROUPS[[*s, *q]])
        assert len(owner) == 1 and len({*s, *q}) == len(s) + len(q)  # rows of one group, none twice
        np.testing.assert_array_equal(found.support.targets[i][: len(s), 0], s**2)
        np.testing.assert_array_equal(order[np.asarray(found.query.rows[i])[: len(q)]], q)
        seen[owner.pop()].add((len(s), len(q)))
    for name, size in sizes.items():
        want = {(s, q) for s in range(1, 7) for q in range(2, 6) if s <= size - 2 and q <= size - s}
        assert seen[name] == want
    assert shots.min() == 1 and shots.max() == 6 and queries.min() == 2 and queries.max() == 5
    learner = jmeta.maml(jmeta.linen(jmeta.MLP(outputs=1, hidden=(4,))), inner_rate=1e-4, loss=jmeta.mean_squared_error)
    assert np.isfinite(jmeta.fit(jax.random.key(0), learner, tasks, steps=2, tasks=2).history[-1]["loss"])


@pytest.mark.parametrize(
    ("sizes", "least"), [({"shots": 3, "queries": 4}, 3), ({"shots": (1, 3), "queries": (1, 4)}, 1)]
)
def test_in_the_order_of_time_the_support_comes_first(sizes, least):
    tasks = jmeta.from_groups(ROWS, ROWS[:, 0], GROUPS, ordered=True, **sizes)
    found = drawn(tasks, 500)
    there = [np.ones(e.inputs.shape[:2], bool) if isinstance(e.mask, tuple) else e.mask for e in found]
    last = np.where(there[0], found.support.inputs[..., 0], -1).max(1)
    first = np.where(there[1], found.query.inputs[..., 0], 99).min(1)
    assert (last < first).all()
    never = {start + i for start in (0, 7, 16) for i in range(least)}
    assert set(np.asarray(found.query.rows)[np.asarray(there[1])]) == set(range(28)) - never


def test_small_groups_are_dropped_on_request_and_counted():
    tasks = jmeta.from_groups(ROWS[order], ROWS[order, 0], GROUPS[order], shots=4, queries=4, min_rows=8)
    assert tasks.names == ("bob", "eve") and tasks.protocol == {"groups": 2, "shots": 4, "queries": 4, "dropped": 1}
    found = drawn(tasks)
    assert set(GROUPS[found.query.inputs[..., 0].astype(int)].ravel()) == {"bob", "eve"}
    np.testing.assert_array_equal(order[found.query.rows], found.query.inputs[..., 0])
    with pytest.raises(jmeta.DataError, match=r"no group has 13 rows \(the largest has 12\)"):
        jmeta.from_groups(ROWS, ROWS[:, 0], GROUPS, min_rows=13)


@pytest.mark.parametrize("nobody", [None, float("nan")])
def test_a_row_without_a_group_is_told(nobody):
    groups = np.asarray([*GROUPS[:-2], nobody, nobody], object)
    with pytest.raises(jmeta.DataError, match=r"row 26 has no group .*, and 2 rows in all; give each one, or leave"):
        jmeta.from_groups(ROWS, ROWS[:, 0], groups, shots=3, queries=4)
    with pytest.raises(jmeta.DataError, match="groups are of several kinds"):
        jmeta.from_groups(ROWS, ROWS[:, 0], np.asarray([*GROUPS[:-1], 3], object), shots=3, queries=4)


@pytest.mark.parametrize("shots", ["3", (1, 2, 3), 2.0, (1.0, 2)])
def test_what_is_no_range_is_told(shots):
    with pytest.raises(jmeta.DataError, match=r"shots is .*; give"):
        jmeta.from_groups.__wrapped__(ROWS, ROWS[:, 0], GROUPS, shots=shots)
