"""A stream from real files gives the episodes of the same examples in memory."""

import functools
import io

import jax
import numpy as np
import pytest

import jmeta
from jmeta.feed import KeysOfSteps, Words

pytest.importorskip("grain")

KEY = jax.random.key(0)
SIZES = {"ways": 3, "shots": 1, "queries": 2}
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(4), 5))
IMAGES = np.random.default_rng(1).integers(0, 256, (20, 4, 4, 1)).astype(np.uint8)


@pytest.fixture(scope="module")
def expected():
    return read(jmeta.stream(IMAGES, LABELS, **SIZES))


def read(source):
    """The tasks of two steps, as `fit` reads them."""
    return list(source.feed.chunks(KeysOfSteps(Words.of(KEY), 2), range(2), 2, 2, None))


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def of_record(record):
    return np.frombuffer(record, np.uint8).reshape(4, 4, 1)


def of_file(path):
    from PIL import Image

    with Image.open(path) as picture:
        return np.asarray(picture)[..., None]


@pytest.fixture
def records(tmp_path):
    """Two files of array_record."""
    module = pytest.importorskip("array_record.python.array_record_module")
    paths = [str(tmp_path / f"{i}.array_record") for i in range(2)]
    for path, part in zip(paths, np.split(IMAGES, [7]), strict=True):
        writer = module.ArrayRecordWriter(path, "group_size:1")
        for image in part:
            writer.write(image.tobytes())
        writer.close()
    return paths


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_records_of_array_record(records, expected, workers):
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    source = jmeta.stream(ArrayRecordDataSource(records), LABELS, decode=of_record, workers=workers, **SIZES)
    assert_same(read(source), expected)


def test_records_by_grain(records, expected):
    from grain.sources import ArrayRecordDataSource

    assert_same(read(jmeta.stream(ArrayRecordDataSource(records), LABELS, decode=of_record, **SIZES)), expected)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_pictures_in_folders(tmp_path, workers):
    from PIL import Image

    for i, (image, label) in enumerate(zip(IMAGES, LABELS, strict=True)):
        (tmp_path / f"class {label}").mkdir(exist_ok=True)
        Image.fromarray(image[..., 0]).save(tmp_path / f"class {label}" / f"{i:02}.png")
    files = sorted(tmp_path.glob("*/*.png"))
    _, labels = np.unique([file.parent.name for file in files], return_inverse=True)
    order = np.asarray([int(file.stem) for file in files])
    np.testing.assert_array_equal(labels, LABELS[order])
    expected = read(jmeta.stream(IMAGES[order], labels, **SIZES))
    assert_same(read(jmeta.stream(files, labels, decode=of_file, workers=workers, **SIZES)), expected)


def png(image):
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image[..., 0]).save(file, "png")
    return file.getvalue()


@functools.cache  # tensorflow-datasets knows each by its name, and takes none twice
def builder_of(tfds):

    class Tiny(tfds.core.GeneratorBasedBuilder):
        """Twenty pictures."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {"image": tfds.features.Image(shape=(4, 4, 1)), "label": tfds.features.ClassLabel(num_classes=4)}
            return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i, (image, label) in enumerate(zip(IMAGES, LABELS, strict=True)):
                yield i, {"image": io.BytesIO(png(image)), "label": int(label)}

    return Tiny


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_data_source_of_tensorflow_datasets(tmp_path, workers):
    tfds = pytest.importorskip("tensorflow_datasets")
    builder = builder_of(tfds)(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    data = builder.as_data_source(split="train")
    images = np.stack([data[i]["image"] for i in range(20)])
    labels = np.asarray([data[i]["label"] for i in range(20)])
    assert sorted(map(bytes, images)) == sorted(map(bytes, IMAGES))
    assert_same(
        read(jmeta.stream(data, "label", workers=workers, **SIZES)), read(jmeta.stream(images, labels, **SIZES))
    )
