"""Omniglot has the sizes, the splits, the polarity and the rotations of the literature."""

import json
import logging
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jmeta.data.omniglot import _characters, _prepared, omniglot
from jmeta.errors import ConfigError, DataError

try:
    PREPARED, REASON = _prepared(None), ""
except DataError as error:
    PREPARED, REASON = None, str(error)
needs_data = pytest.mark.skipif(PREPARED is None, reason=REASON)
SIZES = {"train": 1028, "validation": 172, "test": 423}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """An own cache, so that a stale one hides nothing, and what loading said and imported."""
    messages, handler = [], logging.Handler()
    handler.emit = messages.append
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("JMETA_CACHE", str(folder))
        logging.getLogger().addHandler(handler)
        omniglot()
        logging.getLogger().removeHandler(handler)
        yield SimpleNamespace(folder=folder, messages=messages, modules=set(sys.modules) - before)


@pytest.fixture(scope="module")
def sources(cache):
    return {split: omniglot(split=split) for split in SIZES}


@needs_data
@pytest.mark.parametrize("split", SIZES)
def test_sizes_and_polarity(sources, split):
    source = sources[split]
    images = np.asarray(source.data.inputs)
    assert images.shape == (4 * SIZES[split] * 20, 28, 28, 1) and images.dtype == np.uint8
    assert (np.asarray(source.data.count) == 20).all()
    assert len(source.names) == len(set(source.names)) == 4 * SIZES[split]
    assert images.max() == 255 and 15 < images.mean() < 25  # little ink on much paper
    assert np.median(images.max(axis=(1, 2, 3))) == 255
    assert np.mean(images[:, [0, -1]] == 0) > 0.9  # the margin is paper


@needs_data
def test_splits_share_no_character(sources):
    plain = {split: {name.split(" rotated")[0] for name in source.names} for split, source in sources.items()}
    assert [len(names) for names in plain.values()] == list(SIZES.values())
    assert len(set.union(*plain.values())) == 1623


@needs_data
def test_rotations_are_classes_of_their_own(sources):
    source, plain = sources["validation"], omniglot(split="validation", rotations=False)
    images = np.asarray(source.data.inputs).reshape(4, 172, 20, 28, 28)
    np.testing.assert_array_equal(images[0].reshape(-1, 28, 28, 1), plain.data.inputs)
    for turn in (1, 2, 3):
        np.testing.assert_array_equal(images[turn], np.rot90(images[0], turn, axes=(2, 3)))
        assert source.names[turn * 172 + 5] == f"{plain.names[5]} rotated {90 * turn}"
    assert source.names[:172] == plain.names


@needs_data
def test_images_and_names_are_those_of_tensorflow_datasets(cache):
    import tensorflow_datasets as tfds

    builder = tfds.builder("omniglot", data_dir=PREPARED.parents[1])
    sources = {split: omniglot(split=split, rotations=False, protocol="lake") for split in ("train", "test")}
    assert [len(source.names) for source in sources.values()] == [964, 659]
    for split, source in sources.items():
        records = builder.as_data_source(split=split)
        for index in (0, 77, 5000):
            record = records[index]
            label = builder.info.features["label"].int2str(record["label"]).replace("_", " ")
            images = np.asarray(source.data.inputs).reshape(-1, 20, 28, 28)[source.names.index(label)]
            ink = 1 - record["image"][..., 0] / record["image"].max()  # 1 or 255, as OpenCV is there or not
            areas = 255 * np.kron(ink, np.ones((4, 4))).reshape(28, 15, 28, 15).mean(axis=(1, 3))
            alike = [np.corrcoef(areas.ravel(), image.ravel())[0, 1] for image in images]
            assert max(alike) > 0.98 and sorted(alike)[-2] < 0.9  # one of the twenty is this drawing
            assert np.abs(images[np.argmax(alike)] - areas).mean() < 5


@needs_data
def test_episodes_and_protocol(cache):
    source = omniglot(split="validation", ways=20, shots=1, queries=5, protocol="maml", seed=3, rotations=False)
    task = jax.jit(source.sample)(jax.random.key(0), source.data)
    assert task.support.inputs.shape == (20, 28, 28, 1) and task.query.inputs.shape == (100, 28, 28, 1)
    assert 0.9 < float(task.query.inputs.max()) <= 1
    assert dict(source.protocol) == {
        "data": "omniglot",
        "split": "validation",
        "protocol": "maml",
        "rotations": False,
        "seed": 3,
        "ways": 20,
        "shots": 1,
        "queries": 5,
    }


@needs_data
def test_decodes_once_in_silence_and_without_tensorflow(sources, cache, monkeypatch):
    assert cache.messages == [] and "tensorflow" not in cache.modules
    assert [file.name.startswith("omniglot-3.0.0-") for file in cache.folder.iterdir()] == [True]
    monkeypatch.setattr(sys.modules["jmeta.data.omniglot"], "_decode", None)
    again = omniglot(split="validation")
    np.testing.assert_array_equal(sources["validation"].data.inputs, again.data.inputs)
    assert sources["validation"].names == again.names


@needs_data
def test_too_many_examples_are_refused(cache):
    with pytest.raises(DataError, match=r"has 20 examples, but 6 shots [+] 15 queries need 21"):
        omniglot(split="validation", shots=6)


def test_the_split_of_vinyals_is_the_published_list():
    published = json.loads(Path(__file__).with_name("omniglot_vinyals_split.json").read_text())
    for split, name in (("train", "train"), ("validation", "val"), ("test", "test")):
        assert _characters(split, "vinyals", 0).tolist() == sorted(published[name])


@pytest.mark.parametrize(("protocol", "sizes"), [("vinyals", (1028, 172, 423)), ("maml", (1100, 100, 423))])
def test_every_character_is_in_one_split(protocol, sizes):
    parts = [_characters(split, protocol, 0) for split in SIZES]
    assert tuple(map(len, parts)) == sizes
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(1623))
    assert all((np.diff(part) > 0).all() for part in parts)


def test_the_seed_decides_the_random_split_only():
    same, other = (_characters("test", "maml", seed) for seed in (0, 1))
    assert not np.array_equal(same, other) and np.array_equal(same, _characters("test", "maml", 0))
    assert np.array_equal(_characters("test", "vinyals", 0), _characters("test", "vinyals", 1))


def test_lake_has_no_validation_split():
    with pytest.raises(DataError, match="protocol 'lake' has no validation split; use its train or test"):
        omniglot(split="validation", protocol="lake")


@pytest.mark.parametrize(("name", "known"), [("split", "train, validation, test"), ("protocol", "vinyals, lake, maml")])
def test_unknown_names_are_refused_with_the_known_ones(name, known):
    with pytest.raises(ConfigError, match=f"Omniglot has no {name} 'valid'; choose one of {known}"):
        omniglot(**{name: "valid"})


def prepare(folder, version="3.0.0", kind="array_record"):
    path = folder / "omniglot" / version
    path.mkdir(parents=True)
    (path / "dataset_info.json").write_text(json.dumps({"fileFormat": kind}))
    return path


def test_a_missing_folder_is_an_error_at_once_that_says_what_to_do(tmp_path):
    start = time.monotonic()
    with pytest.raises(DataError, match=r"not prepared .*set TFDS_DATA_DIR .*tfds\.data_source.'omniglot'") as caught:
        omniglot(folder=tmp_path)
    assert time.monotonic() - start < 1
    assert str(tmp_path) in str(caught.value) and "~" not in str(caught.value)


def test_the_folder_is_searched_in_order(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "env"))
    home = prepare(tmp_path / "home/tensorflow_datasets")
    assert _prepared(None) == home
    env = prepare(tmp_path / "env")
    assert _prepared(None) == env
    given = prepare(tmp_path / "given")
    assert _prepared(tmp_path / "given") == _prepared(str(tmp_path / "given")) == given
    with pytest.raises(DataError):  # a folder that was asked for is not replaced by another
        _prepared(tmp_path / "nowhere")


def test_the_newest_readable_version_is_taken(tmp_path):
    prepare(tmp_path, "11.0.0", "tfrecord")
    with pytest.raises(DataError, match="not prepared as array_record"):
        _prepared(tmp_path)
    prepare(tmp_path, "9.0.0")
    newest = prepare(tmp_path, "10.0.0")
    assert _prepared(tmp_path) == newest


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    prepare(tmp_path)
    monkeypatch.setenv("JMETA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(DataError, match=r"tensorflow_datasets.*pip install tensorflow-datasets importlib_resources"):
        omniglot(folder=tmp_path)
