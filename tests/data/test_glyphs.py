"""The embedded characters: classes, splits, the cache on disk and the warp."""

import importlib
import unicodedata

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmeta.core import TaskSource
from jmeta.data.glyphs import SPLITS, Glyphs, _affine, glyphs, load_glyphs, warp
from jmeta.errors import ConfigError, DataError

affine = jax.jit(_affine)
module = importlib.import_module("jmeta.data.glyphs")  # a package may export the function under the module's name


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JMETA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def data(cache) -> Glyphs:
    return load_glyphs()


def same(a: Glyphs, b: Glyphs) -> bool:
    return all(np.array_equal(x, y) and np.asarray(x).dtype == np.asarray(y).dtype for x, y in zip(a, b, strict=True))


def test_classes_rows_and_names(data):
    classes, faces = len(data.names), np.bincount(data.labels)
    assert classes >= 1300
    assert data.images.shape == (len(data.labels), 28, 28, 1)
    assert data.images.dtype == np.uint8
    assert len(faces) == classes
    assert faces.min() >= 12
    assert (np.diff(data.labels) >= 0).all()
    assert data.families.shape == data.splits.shape == (classes,)
    assert len(set(data.names)) == classes
    assert "LATIN SMALL LETTER A WITH ACUTE" in data.names
    assert all(unicodedata.category(unicodedata.lookup(name)).startswith("L") for name in data.names)


def test_every_glyph_has_ink_and_none_touches_the_border(data):
    ink = data.images[..., 0] > 0
    assert ink.any(axis=(1, 2)).all()
    assert not ink[:, [0, -1]].any()
    assert not ink[:, :, [0, -1]].any()


def test_look_alikes_are_one_class(data):
    assert "LATIN CAPITAL LETTER A" in data.names
    assert "GREEK CAPITAL LETTER ALPHA" not in data.names
    assert "GREEK CAPITAL LETTER BETA" not in data.names
    assert {"LATIN CAPITAL LETTER U WITH BREVE", "LATIN CAPITAL LETTER U WITH CARON"} <= set(data.names)
    assert {"LATIN CAPITAL LETTER C", "LATIN SMALL LETTER C", "CYRILLIC CAPITAL LETTER A"} <= set(data.names)


def test_a_family_is_one_base_letter(data):
    family = dict(zip(data.names, data.families.tolist(), strict=True))
    assert family["LATIN SMALL LETTER O WITH STROKE"] == family["LATIN SMALL LETTER O"]
    assert family["LATIN SMALL LETTER O WITH ACUTE"] == family["LATIN SMALL LETTER O"]
    assert family["LATIN SMALL LETTER O"] != family["LATIN CAPITAL LETTER O"]
    assert (np.bincount(data.families) >= 5).sum() >= 50


def test_splits_share_no_class_but_diacritics(data):
    share = np.bincount(data.splits, minlength=3) / len(data.splits)
    np.testing.assert_allclose(share, [0.61, 0.18, 0.21], atol=0.03)
    names = [set(glyphs(split=split).names) for split in SPLITS]
    assert sum(map(len, names)) == len(set.union(*names)) == len(data.names)
    marks = [{name.partition(" WITH ")[2] for name in part} for part in names]
    assert len(marks[2] & marks[0]) > 0.8 * len(marks[2])


@pytest.mark.parametrize("split", SPLITS)
def test_confusable_episodes_draw_one_family(data, split):
    source = glyphs(split=split, queries=1, confusable=True)
    assert len(source.data.families) >= 20
    mine = data.splits == SPLITS.index(split)
    assert source.names == tuple(np.array(data.names)[mine])
    np.testing.assert_array_equal(source.data.family, data.families[mine])


def test_rendering_is_the_same_each_time_and_is_cached(data, tmp_path, monkeypatch):
    monkeypatch.setenv("JMETA_CACHE", str(tmp_path))
    assert same(load_glyphs(), data)
    monkeypatch.setattr(module, "_render", lambda: pytest.fail("rendered again"))
    assert same(load_glyphs(), data)


def test_a_damaged_cache_file_is_replaced(data, tmp_path, monkeypatch):
    monkeypatch.setenv("JMETA_CACHE", str(tmp_path))
    monkeypatch.setattr(module, "_render", lambda: {**data._asdict(), "names": np.array(data.names)})
    load_glyphs()
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert same(load_glyphs(), data)
    assert file.stat().st_size == len(whole)


def test_without_a_folder_to_write_to_it_renders_in_memory(data, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("JMETA_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(module, "_render", lambda: {**data._asdict(), "names": np.array(data.names)})
    assert same(load_glyphs(), data)


def test_an_episode_has_the_shapes_and_range_it_promises(data):
    source = glyphs(ways=5, shots=1, queries=15)
    task = jax.jit(source.sample)(jax.random.key(0), source.data)
    assert task.support.inputs.shape == (5, 28, 28, 1)
    assert task.query.inputs.shape == (75, 28, 28, 1)
    assert task.query.inputs.dtype == jnp.float32
    assert task.query.inputs.min() >= 0.0
    assert 0.5 < task.query.inputs.max() <= 1.0 + 1e-6


@pytest.mark.parametrize(("shots", "queries"), [(1, 1), (1, 15), (5, 30)])
def test_faces_recur_only_as_often_as_needed(data, shots, queries):
    source = glyphs(split="test", shots=shots, queries=queries)
    faces = np.bincount(data.labels)[data.splits == 2]
    assert len(source.names) == len(faces)
    np.testing.assert_array_equal(source.data.count, faces * np.ceil((shots + queries) / faces))


def test_options_that_cannot_work_are_named(data):
    with pytest.raises(ConfigError, match="'dev'; choose one of train, validation, test"):
        glyphs(split="dev")
    with pytest.raises(DataError, match="no family has 20 classes"):
        glyphs(split="test", ways=20, confusable=True)
    with pytest.raises(DataError, match="shots is 0"):
        glyphs(shots=0)


def nearest_mean(source: TaskSource) -> float:
    def accuracy(key):
        task = source.sample(key, source.data)
        support, query = (part.inputs.reshape(-1, 28 * 28) for part in task)
        distance = ((query[:, None] - support[None]) ** 2).sum(axis=-1)
        return (distance.argmin(axis=1) == task.query.targets.argmax(axis=1)).mean()

    return float(jax.jit(jax.vmap(accuracy))(jax.random.split(jax.random.key(0), 100)).mean())


def test_nearest_mean_on_raw_pixels_knows_the_faces_but_not_the_warps(data, monkeypatch):
    warped = nearest_mean(glyphs(split="test", queries=11))
    monkeypatch.setattr(module, "warp", lambda key, images: images)
    plain = nearest_mean(glyphs(split="test", queries=11))
    assert plain > 0.75
    assert 0.28 < warped < 0.45


def test_affine_identity_shift_and_quarter_turn():
    images = jax.random.uniform(jax.random.key(0), (2, 6, 6, 3))
    eye = jnp.broadcast_to(jnp.eye(2), (2, 2, 2))
    np.testing.assert_array_equal(affine(images, eye, jnp.zeros((2, 2))), images)
    down = affine(images, eye, jnp.broadcast_to(jnp.array([1.0, 0.0]), (2, 2)))
    np.testing.assert_allclose(down[:, 1:], images[:, :-1], atol=1e-6)
    np.testing.assert_array_equal(down[:, 0], 0.0)
    turn = jnp.broadcast_to(jnp.array([[0.0, 1.0], [-1.0, 0.0]]), (2, 2, 2))
    np.testing.assert_allclose(affine(images, turn, jnp.zeros((2, 2))), jnp.rot90(images, axes=(1, 2)), atol=1e-5)


def test_affine_interpolates_linearly():
    ramp = jnp.broadcast_to(jnp.arange(8.0).reshape(1, 1, 8, 1), (1, 8, 8, 1))
    halved = affine(ramp, 0.5 * jnp.eye(2)[None], jnp.zeros((1, 2)))
    np.testing.assert_allclose(halved[0, :, :, 0], np.broadcast_to(3.5 + 0.5 * (np.arange(8) - 3.5), (8, 8)), atol=1e-5)


def test_warp_keeps_shape_dtype_and_range(data):
    images = jnp.asarray(data.images[:20], jnp.float32) / 255.0
    out = jax.jit(warp)(jax.random.key(0), images)
    assert out.shape == images.shape
    assert out.dtype == images.dtype
    assert out.min() >= 0.0
    assert out.max() <= 1.0 + 1e-6
    assert jax.eval_shape(warp, jax.random.key(0), images.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    assert np.abs(out - jax.jit(warp)(jax.random.key(1), images)).max() > 0.5
    assert np.abs(out[0] - jax.jit(warp)(jax.random.key(0), jnp.broadcast_to(images[:1], images.shape))[1]).max() > 0.1
    keys = jax.random.split(jax.random.key(0), 3)
    stacked = jax.jit(jax.vmap(warp, in_axes=(0, None)))(keys, images)
    np.testing.assert_allclose(stacked[2], jax.jit(warp)(keys[2], images), atol=1e-5)


def test_warp_moves_a_point_within_the_stated_bounds():
    images = jnp.zeros((500, 29, 29, 1)).at[:, 14, 14].set(1.0)
    out = np.asarray(jax.jit(warp)(jax.random.key(0), images))[..., 0]
    grid = np.arange(29) - 14
    shift = np.stack([(out * grid[:, None]).sum((1, 2)), (out * grid).sum((1, 2))]) / out.sum((1, 2))
    assert 2.5 < np.abs(shift).max() <= 3.5
