"""Augmented images against the map that they should follow, and tasks of a list."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmeta

KEY, SIZE = jax.random.key(0), 21
PIXELS = np.stack(np.meshgrid(np.arange(SIZE), np.arange(SIZE), indexing="ij"), axis=-1).astype(np.float32)


def places(**settings):
    """Where 8 images take their pixels from: the image of coordinates, which bilinear interpolation keeps."""
    images = jnp.broadcast_to(jnp.asarray(PIXELS), (8, SIZE, SIZE, 2))
    return np.asarray(jax.jit(jmeta.augmentation(**settings))(KEY, images))


def inner(x):
    return x[:, 7:14, 7:14]


def test_nothing_is_changed_without_settings():
    np.testing.assert_allclose(places(), np.broadcast_to(PIXELS, (8, SIZE, SIZE, 2)), atol=1e-4)


def test_a_rotation_turns_about_the_middle():
    found = places(rotation=30.0)
    middle = (SIZE - 1) / 2
    np.testing.assert_allclose(found[:, SIZE // 2, SIZE // 2], middle, atol=1e-4)
    down, right = np.gradient(inner(found), axis=1), np.gradient(inner(found), axis=2)
    angles = np.degrees(np.arctan2(down[..., 1], down[..., 0]))
    assert np.ptp(angles, axis=(1, 2)).max() < 1e-2 and (np.abs(angles) <= 30).all() and np.ptp(angles) > 15
    np.testing.assert_allclose((down**2).sum(axis=-1), 1.0, atol=1e-4)
    np.testing.assert_allclose((down * right).sum(axis=-1), 0.0, atol=1e-4)


def test_shifts_zooms_and_bends_stay_within_their_settings():
    moved = inner(places(shift=3.0)) - inner(np.broadcast_to(PIXELS, (8, SIZE, SIZE, 2)))
    assert np.ptp(moved, axis=(1, 2)).max() < 1e-4 and 1.0 < np.abs(moved).max() <= 3.0
    factor = np.gradient(inner(places(zoom=0.25)), axis=1)[..., 0]
    assert (factor >= 1 / 1.25 - 1e-4).all() and (factor <= 1.25 + 1e-4).all() and np.ptp(factor) > 0.1
    bent = inner(places(elastic=1.0)) - inner(np.broadcast_to(PIXELS, (8, SIZE, SIZE, 2)))
    assert 0.3 < bent.std() < 1.2 and np.ptp(bent, axis=(1, 2)).max() > 0.5


def test_every_image_of_every_source_has_a_draw_of_its_own():
    images, labels = np.broadcast_to(PIXELS[..., :1], (60, SIZE, SIZE, 1)), np.repeat(np.arange(10), 6)
    plain = jmeta.from_arrays(images, labels, ways=3, shots=2, queries=2)
    source = jmeta.augmented(plain, jmeta.augmentation(rotation=20.0))
    task = jax.jit(source.sample)(KEY, source.data)
    every = np.concatenate([task.support.inputs, task.query.inputs])
    assert len(np.unique(every.round(3), axis=0)) == 12
    again = jax.jit(source.sample)(KEY, source.data)
    np.testing.assert_array_equal(task.query.inputs, again.query.inputs)
    assert source.protocol["augmented"] and "augmented" not in plain.protocol


def test_what_cannot_be_augmented():
    with pytest.raises(jmeta.ConfigError, match=r"shift is -1.0; give 0 or more"):
        jmeta.augmentation(shift=-1.0)
    with pytest.raises(jmeta.ConfigError, match="coarse is 1; give at least 2"):
        jmeta.augmentation(coarse=1)
    vectors = jmeta.from_arrays(np.ones((40, 3)), np.repeat(np.arange(10), 4), queries=2)
    with pytest.raises(jmeta.DataError, match=r"inputs have shape \[10, 3\]; images are \[n, height"):
        jmeta.augmented(vectors, jmeta.augmentation())


def given(i, rows=4):
    one = jmeta.Examples(np.full((rows, 2), i, np.float32), np.eye(rows, dtype=np.float32))
    return jmeta.Task(one, one)


def test_tasks_of_a_list_are_drawn_alike():
    source = jmeta.from_tasks([given(i) for i in range(5)])
    tasks = jax.jit(jax.vmap(source.sample, (0, None)))(jax.random.split(KEY, 2000), source.data)
    which = np.asarray(tasks.support.inputs[:, 0, 0]).astype(int)
    counts = np.bincount(which, minlength=5)
    assert (np.abs(counts - 400) < 5 * np.sqrt(2000 * 0.2 * 0.8)).all()
    np.testing.assert_array_equal(tasks.query.inputs[:, 0, 0], which)
    learner = jmeta.prototypical(jmeta.linen(jmeta.MLP(outputs=None)))
    jmeta.fit(KEY, learner, source, steps=1, tasks=2)
    assert source.protocol == {"given_tasks": 5}


def test_what_is_no_list_of_tasks():
    with pytest.raises(jmeta.DataError, match=r"there are no tasks, or some are none; give a list of jmeta\.Task"):
        jmeta.from_tasks([])
    with pytest.raises(jmeta.DataError, match=r"'support/inputs' of task 1 is float32\[3, 2\], and of task 0 float32"):
        jmeta.from_tasks([given(0), given(1, rows=3)])
