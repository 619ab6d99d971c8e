"""Episodes hold distinct classes, disjoint support and query, and the right labels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmeta.data.episodes import from_arrays, split_classes
from jmeta.errors import ConfigError, DataError


def episodes(source, count=300, seed=0):
    keys = jax.random.split(jax.random.key(seed), count)
    return jax.jit(jax.vmap(source.sample, in_axes=(0, None)))(keys, source.data)


def numbered(labels, **options):
    """A source whose input is the row number, so that an episode shows which rows it took."""
    return from_arrays(np.arange(len(labels), dtype=np.float32), labels, **options)


def rows(examples):
    return np.asarray(examples.inputs).astype(int)


@pytest.fixture
def labels():
    """Seven classes of 4 to 10 rows, unordered, with gaps and a negative label."""
    sizes = {-3: 4, 0: 10, 1: 5, 7: 6, 8: 7, 20: 8, 21: 9}
    return np.random.default_rng(0).permutation(np.repeat(list(sizes), list(sizes.values())))


def original(labels):
    """The label of each row after the source sorted the rows by class."""
    return labels[np.argsort(labels, kind="stable")]


def test_shapes_types_protocol_and_names(labels):
    source = from_arrays(np.zeros((len(labels), 3, 2)), labels, ways=4, shots=1, queries=3, names=list("abcdefg"))
    task = jax.jit(source.sample)(jax.random.key(0), source.data)
    shapes = [x.shape for x in jax.tree.leaves(task)]
    assert shapes == [(4, 3, 2), (4, 4), (4,), (4,), (12, 3, 2), (12, 4), (12,), (12,)]
    assert [x.dtype for x in jax.tree.leaves(task)] == [*2 * ["float32"], *2 * ["int32"]] * 2
    assert dict(source.protocol) == {"ways": 4, "shots": 1, "queries": 3}
    assert source.names == tuple("abcdefg")


def test_rows_belong_to_distinct_classes_and_never_repeat(labels):
    batch = episodes(numbered(labels, ways=5, shots=2, queries=2))
    for support, query in zip(rows(batch.support), rows(batch.query), strict=True):
        assert len({*support, *query}) == 5 * 4  # no row twice, neither within a set nor between the two
        classes = labels[support].reshape(5, 2)
        assert (classes == classes[:, :1]).all()
        assert len(set(classes[:, 0])) == 5
        np.testing.assert_array_equal(labels[query].reshape(5, 2), classes)


def test_targets_are_one_hot_and_sorted_by_class(labels):
    task = episodes(numbered(labels, ways=3, shots=2, queries=1), 4)
    np.testing.assert_array_equal(task.support.targets[0], np.repeat(np.eye(3), 2, axis=0))
    np.testing.assert_array_equal(task.query.targets[3], np.eye(3))


def test_every_row_of_unequal_classes_is_drawn_and_none_outside(labels):
    batch = episodes(numbered(labels, ways=7, shots=1, queries=3), 200)
    taken = np.concatenate([rows(batch.support), rows(batch.query)], axis=1)
    assert set(taken.ravel()) == set(range(len(labels)))
    drawn = np.bincount(taken.ravel(), minlength=len(labels))
    expected = 200 * 4 / np.array([np.sum(labels == label) for label in labels])
    spread = np.sqrt(expected * (1 - expected / 200))
    assert (np.abs(drawn - expected) <= 4.5 * spread + 1e-6).all()


def test_a_class_with_just_enough_rows_gives_all_of_them():
    labels = np.repeat([0, 1], [3, 50])
    batch = episodes(numbered(labels, ways=2, shots=1, queries=2), 50)
    taken = np.concatenate([rows(batch.support), rows(batch.query)], axis=1)
    assert all({0, 1, 2} <= set(episode) for episode in taken)


def test_classes_are_chosen_uniformly():
    classes, ways, count = 20, 5, 4000
    source = numbered(np.repeat(np.arange(classes), 2), ways=ways, shots=1, queries=1)
    chosen = rows(episodes(source, count).support) // 2
    for drawn, probability in ((chosen, ways / classes), (chosen[:, 0], 1 / classes), (chosen[:, -1], 1 / classes)):
        seen = np.bincount(drawn.ravel(), minlength=classes)
        variance = count * probability * (1 - probability)
        chi_square = np.sum((seen - count * probability) ** 2) / variance * (classes - 1) / classes
        assert chi_square < 50.8  # 99.99 % of chi-square with 19 degrees of freedom


def test_an_episode_draws_from_one_family_and_small_families_never_come():
    family = np.array([4, 4, 9, 4, 9, 9, 2, 9])  # family 2 has one class
    source = numbered(np.repeat(np.arange(8), 2), ways=3, shots=1, queries=1, families=family)
    families = family[rows(episodes(source, 600).support) // 2]
    assert (families == families[:, :1]).all()
    seen = np.bincount(families[:, 0], minlength=10)
    assert seen[2] == 0 and abs(seen[4] - 300) < 4 * np.sqrt(150)  # uniform over families, not over classes


def test_the_key_decides_the_task(labels):
    source = numbered(labels, ways=5, shots=1, queries=3)
    first, again, other = (jax.jit(source.sample)(jax.random.key(seed), source.data) for seed in (0, 0, 1))
    assert all(map(np.array_equal, jax.tree.leaves(first), jax.tree.leaves(again)))
    assert not np.array_equal(first.support.inputs, other.support.inputs)


def test_jit_and_vmap_change_nothing(labels):
    source = numbered(labels, ways=5, shots=1, queries=3)
    keys = jax.random.split(jax.random.key(3), 4)
    batch = jax.jit(jax.vmap(source.sample, in_axes=(0, None)))(keys, source.data)
    for i, key in enumerate(keys):
        task = source.sample(key, source.data)
        jax.tree.map(lambda one, many, i=i: np.testing.assert_array_equal(one, many[i]), task, batch)


def test_pictures_of_bytes_are_stored_as_such_and_scaled():
    images = np.array([0, 51, 255, 102], np.uint8)[:, None, None, None]
    source = from_arrays(images, [0, 0, 1, 1], ways=2, shots=1, queries=1)
    assert source.data.inputs.dtype == jnp.uint8
    batch = episodes(source, 20)
    assert batch.query.inputs.dtype == jnp.float32
    np.testing.assert_allclose(np.unique(batch.query.inputs), [0, 0.2, 0.4, 1], rtol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [(t, "int32") for t in (np.int64, np.int8, np.uint8, np.uint16)]
    + [(t, "float32") for t in (float, "float32", bool)],
)
def test_everything_else_keeps_its_kind_and_its_values(dtype, kept):
    inputs = np.array([0, 1, 100, 7]).astype(dtype)
    source = from_arrays(inputs, np.array([0, 0, 1, 1]), ways=2, shots=1, queries=1)
    found = episodes(source, 20).support.inputs
    assert found.dtype == kept
    assert set(np.unique(found)) == set(inputs.astype(kept))


def test_integers_that_do_not_fit_and_bytes_that_may_be_either_are_told():
    labels = np.arange(8) // 2
    with pytest.raises(DataError, match="integers beyond 2147483647, which int32 cannot hold; give them as floats"):
        from_arrays(np.full(8, 2**31), labels, ways=2, shots=1, queries=1)
    with pytest.raises(
        DataError, match=r"bytes of shape \[8, 4, 4\], which may be pictures or numbers; .*\[..., None\]"
    ):
        from_arrays(np.full((8, 4, 4), 200, np.uint8), labels, ways=2, shots=1, queries=1)
    one_hot = from_arrays(np.full((8, 4, 4), 1, np.uint8), labels, ways=2, shots=1, queries=1)
    assert episodes(one_hot, 2).support.inputs.max() == 1


def test_examples_tell_their_class_and_their_row(labels):
    found = episodes(numbered(labels, ways=4, shots=2, queries=2), 50)
    classes = np.unique(labels)
    for examples in found:
        np.testing.assert_array_equal(labels[examples.rows], classes[examples.classes])
    inputs = np.arange(len(labels), dtype=np.float32)
    found = episodes(from_arrays(inputs, labels, batch=9), 5).query
    np.testing.assert_array_equal(found.rows, rows(found))
    np.testing.assert_array_equal(classes[found.classes], labels[rows(found)])


def test_queries_may_be_a_range(labels):
    found = episodes(numbered(labels, ways=3, shots=1, queries=(1, 3)), 300)
    fixed = episodes(numbered(labels, ways=3, shots=1, queries=3), 300)
    np.testing.assert_array_equal(found.support.inputs, fixed.support.inputs)
    counts = np.asarray(found.query.mask).reshape(300, 3, 3).sum(2)
    assert set(counts.ravel()) == {1, 2, 3} and (counts.min(1) < counts.max(1)).any()
    there = np.asarray(found.query.mask)
    np.testing.assert_array_equal(rows(found.query)[there], rows(fixed.query)[there])
    assert not np.asarray(found.query.targets)[~there].any()


def test_small_classes_are_dropped_on_request_with_all_that_is_theirs(labels):
    classes, count = np.unique(labels, return_counts=True)
    described = np.eye(7, dtype=np.float32)
    options = {"ways": 4, "shots": 2, "queries": 4, "names": list("abcdefg"), "descriptions": described}
    with pytest.raises(DataError, match=r"class 'a' has 4 examples, but 2 shots .* or drop such classes by min_rows=6"):
        numbered(labels, **options)
    source = numbered(labels, **options, min_rows=6, families=[0, 0, 1, 1, 1, 1, 1])
    kept = classes[count >= 6]
    assert source.names == tuple(np.asarray(list("abcdefg"))[count >= 6])
    assert source.protocol["dropped"] == 2 and source.protocol["ways"] == 4
    found = episodes(source, 100)
    assert set(labels[found.query.rows].ravel()) == set(kept[1:])  # of the one family that is large enough
    np.testing.assert_array_equal(described[count >= 6][found.support.classes[:, ::2]], found.support.descriptions)
    with pytest.raises(DataError, match="no class has 11 rows"):
        numbered(labels, min_rows=11)


def test_in_the_order_of_time_the_support_of_a_class_comes_first(labels):
    found = episodes(numbered(labels, ways=4, shots=2, queries=2, ordered=True), 100)
    support, query = (np.asarray(e.rows).reshape(100, 4, 2) for e in found)
    assert (support.max(2) < query.min(2)).all()


def test_a_split_of_classes_is_by_the_seed_and_the_classes_alone():
    labels = np.repeat(["ant", "bee", "cat", "dog", "elk"], 4)
    parts = split_classes(labels, (0.4, 0.2, 0.4), seed=3)
    assert [len(set(labels[part])) for part in parts] == [2, 1, 2] and np.stack(parts).sum(0).tolist() == [1] * 20
    order = np.random.default_rng(0).permutation(20)
    np.testing.assert_array_equal(
        np.stack(split_classes(labels[order], (0.4, 0.2, 0.4), seed=3)), np.stack(parts)[:, order]
    )
    assert any((np.stack(split_classes(labels, (0.4, 0.2, 0.4), seed=s)) != np.stack(parts)).any() for s in range(3))
    for shares, sentence in (((0.9, 0.2), "add up to at most 1"), ((0.0, 1.0), "positive"), ((0.05, 0.9), "without a")):
        with pytest.raises(ConfigError, match=sentence):
            split_classes(labels, shares)


def test_jax_arrays_are_taken_as_numpy_arrays_are():
    source = from_arrays(jnp.arange(8.0), jnp.arange(8) // 2, ways=2, shots=1, queries=1)
    np.testing.assert_array_equal(source.data.first, [0, 2, 4, 6])


def test_transform_gets_a_key_and_the_rows_of_the_episode(labels):
    def shifted(key, inputs):
        return inputs + jax.random.randint(key, (), 1, 1000).astype(jnp.float32) * 1000.0

    batch = episodes(numbered(labels, ways=2, shots=1, queries=1, transform=shifted), 50)
    shift = rows(batch.support) // 1000
    assert shift.min() >= 1 and len(set(shift[:, 0])) > 10
    np.testing.assert_array_equal(shift, rows(batch.query) // 1000)


def refuses(match, inputs=None, labels=(0, 0, 1, 1), **options):
    inputs = np.zeros((4, 2)) if inputs is None else inputs
    with pytest.raises(DataError, match=match):
        from_arrays(inputs, np.asarray(labels), **{"ways": 2, "shots": 1, "queries": 1, **options})


@pytest.mark.parametrize(("name", "least"), [("ways", 2), ("shots", 1), ("queries", 1)])
def test_refuses_too_small_an_episode(name, least):
    refuses(f"{name} is {least - 1}; give at least {least}", **{name: least - 1})


def test_refuses_labels_that_are_no_vector_of_integers():
    refuses("labels must be a vector of integers, but are float64", labels=[0.0, 0.0, 1.0, 1.0])
    refuses(r"of shape \(4, 1\)", labels=[[0], [0], [1], [1]])


def test_refuses_arrays_of_different_length():
    refuses("there are 4 inputs but 3 labels; give one label for each input", labels=[0, 0, 1])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_refuses_inputs_that_are_not_finite(bad):
    inputs = np.zeros((4, 2))
    inputs[2, 1] = bad
    refuses("input 2 is not finite; remove or repair", inputs=inputs)


def test_refuses_names_that_do_not_match_the_classes():
    refuses("there are 3 names but 2 classes; give one name for each class", names=list("abc"))


def test_refuses_more_ways_than_classes():
    refuses("3 ways need 3 classes, but there are 2; ask for fewer ways", ways=3)


def test_refuses_classes_that_are_too_small_and_names_the_smallest():
    refuses("class 5 has 1 examples, but 1 shots [+] 1 queries need 2; ask for fewer", labels=[3, 3, 3, 5])
    refuses("class 'rare' has 1 examples", labels=[3, 3, 3, 5], names=["common", "rare"])


def test_refuses_families_that_are_too_small_or_do_not_match():
    refuses(r"no family has 2 classes \(the largest has 1\); ask for fewer ways", families=[0, 1])
    refuses("there are 3 families but 2 classes; give one family for each class", families=[0, 0, 0])


@pytest.mark.parametrize("value", [1e300, -1e300])
def test_what_float32_cannot_hold_is_refused(value):
    with pytest.raises(DataError, match="is not finite"):
        from_arrays(np.full((20, 2), value), np.repeat(np.arange(2), 10), ways=2, shots=1, queries=1)


def test_complex_inputs_are_refused():
    with pytest.raises(DataError, match="give real numbers"):
        from_arrays(np.ones((20, 2), complex), np.repeat(np.arange(2), 10), ways=2, shots=1, queries=1)


def test_labels_of_text_are_told_what_to_do():
    with pytest.raises(DataError, match=r"np\.unique\(labels, return_inverse=True\)"):
        from_arrays(np.ones((20, 2)), np.repeat(["a", "b"], 10), ways=2, shots=1, queries=1)


def counts_of(tasks, ways):
    """`[episodes, ways]`, how many queries each class has."""
    return np.asarray(tasks.query.targets).reshape(len(tasks.query.targets), -1, ways).sum(axis=1).astype(int)


def test_unbalanced_queries_are_as_many_and_in_proportion_to_a_dirichlet_distribution():
    labels = np.repeat(np.arange(8), 60)
    source = numbered(labels, ways=4, shots=2, queries=10, query_balance=2.0)
    assert source.protocol == {"ways": 4, "shots": 2, "queries": 10, "query_balance": 2.0}
    tasks = episodes(source, count=2000)
    count = counts_of(tasks, 4)
    assert (count.sum(axis=1) == 40).all()
    # of a Dirichlet distribution of 4 times 2: mean 1/4, variance (1/4)(3/4)/9
    np.testing.assert_allclose(count.mean(axis=0) / 40, 0.25, atol=0.02)
    np.testing.assert_allclose((count / 40).var(axis=0), 1 / 48, rtol=0.15)
    for i in range(20):
        task = jax.tree.map(lambda x, i=i: np.asarray(x)[i], tasks)
        asked, seen = rows(task.query), rows(task.support)
        assert len({*asked.tolist(), *seen.tolist()}) == 48
        np.testing.assert_array_equal(labels[asked], task.query.classes)
        np.testing.assert_array_equal(task.query.rows, asked)
        classes = labels[seen].reshape(4, 2)[:, 0]
        np.testing.assert_array_equal(classes[task.query.targets.argmax(axis=1)], labels[asked])
        np.testing.assert_array_equal(task.query.targets.argmax(axis=1), np.sort(task.query.targets.argmax(axis=1)))


def test_unbalanced_episodes_have_the_support_of_balanced_ones():
    size = {"ways": 4, "shots": 2, "queries": 3}
    labels = np.repeat(np.arange(8), 20)
    one, other = (episodes(numbered(labels, **size, query_balance=b), count=20) for b in (None, 0.5))
    np.testing.assert_array_equal(one.support.inputs, other.support.inputs)
    assert not np.array_equal(one.query.inputs, other.query.inputs)


def test_no_class_has_more_queries_than_it_has_rows(labels):
    """The smallest class has 4 rows, of which 3 are left, and the shares are extreme."""
    tasks = episodes(numbered(labels, ways=3, shots=1, queries=3, query_balance=0.1))
    count = counts_of(tasks, 3)
    classes = np.asarray(tasks.support.classes)
    size = {k: int((labels == value).sum()) for k, value in enumerate(np.unique(labels))}
    room = np.vectorize(size.get)(classes) - 1
    assert (count.sum(axis=1) == 9).all()
    assert (count <= room).all()
    assert (count == room).any()
    drawn = np.concatenate([rows(tasks.support), rows(tasks.query)], axis=1)
    assert all(len(set(episode.tolist())) == 12 for episode in drawn)


def test_classes_that_are_not_there_have_no_unbalanced_query(labels):
    tasks = episodes(numbered(labels, ways=(2, 4), shots=1, queries=2, query_balance=2.0))
    there = np.asarray(tasks.support.targets).sum(axis=1) > 0
    count = counts_of(tasks, 4)
    assert (count.sum(axis=1) == 2 * there.sum(axis=1)).all()
    assert (count[~there] == 0).all()
    np.testing.assert_array_equal(np.asarray(tasks.query.mask).sum(axis=1), count.sum(axis=1))


def test_unlabelled_examples_come_after_the_labelled_and_distractors_are_of_other_classes(labels):
    source = numbered(labels, ways=3, shots=1, queries=2, unlabelled=1, distractors=2)
    assert source.protocol == {"ways": 3, "shots": 1, "queries": 2, "unlabelled": 1, "distractors": 2}
    tasks = episodes(source, count=50)
    assert tasks.support.targets.shape == (50, 3 + 5, 3)
    assert (np.asarray(tasks.support.targets)[:, 3:] == 0).all()
    assert isinstance(tasks.support.mask, tuple)
    classes = np.asarray(tasks.support.classes)
    np.testing.assert_array_equal(np.unique(labels)[classes], labels[rows(tasks.support)])
    np.testing.assert_array_equal(classes[:, :3], classes[:, 3:6])
    assert all(len(set(episode.tolist())) == 5 for episode in classes)
    drawn = np.concatenate([rows(tasks.support), rows(tasks.query)], axis=1)
    assert all(len(set(episode.tolist())) == 3 * 4 + 2 for episode in drawn)
    plain = episodes(numbered(labels, ways=3, shots=1, queries=2), count=50)
    np.testing.assert_array_equal(plain.support.classes, classes[:, :3])


def test_a_mask_tells_unlabelled_examples_from_those_that_are_not_there(labels):
    tasks = episodes(numbered(labels, ways=(2, 3), shots=(0, 1), queries=1, unlabelled=1, descriptions=np.eye(7)))
    mask, targets = np.asarray(tasks.support.mask), np.asarray(tasks.support.targets).any(axis=2)
    assert not targets[:, 3:].any()
    np.testing.assert_array_equal(mask[:, :3], targets[:, :3])
    there = np.asarray(tasks.support.descriptions).any(axis=2)
    np.testing.assert_array_equal(mask[:, 3:], there)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"query_balance": 0.0}, "query_balance is 0.0; give a positive concentration, as 2.0"),
        ({"query_balance": 2.0, "queries": (1, 2)}, r"queries is \(1, 2\), and query_balance divides a fixed number"),
        ({"unlabelled": -1}, "unlabelled is -1; give a whole number, 0 or more"),
        ({"distractors": 1}, "distractors is 1, and unlabelled 0, so that they have no example; give both"),
        ({"unlabelled": 1, "distractors": 5}, "8 ways need 8 classes, but there are 7"),
        ({"unlabelled": 2}, r"class -3 has 4 examples, but 1 shots \+ 2 queries \+ 2 unlabelled need 5"),
    ],
)
def test_queries_and_unlabelled_examples_that_cannot_be_are_refused(labels, options, sentence):
    with pytest.raises(DataError, match=sentence):
        numbered(labels, **{"ways": 3, "shots": 1, "queries": 2, **options})
