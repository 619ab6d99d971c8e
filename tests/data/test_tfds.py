"""Data sets that tensorflow-datasets prepared, and the benchmarks among them by their class splits."""

import io
import json
import time
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import jmeta
from jmeta.data.tfds import BENCHMARKS, class_split
from jmeta.data.varying import shots_of
from jmeta.errors import ConfigError, DataError

SIZES = {
    "cifar_fs": (64, 16, 20),
    "cub": (140, 30, 30),
    "cub_chen": (100, 50, 50),
    "fc100": (60, 20, 20),
    "mini_imagenet": (64, 16, 20),
    "quickdraw": (241, 52, 52),
    "textures": (33, 7, 7),
    "tiered_imagenet": (351, 97, 160),
    "vgg_flower": (71, 15, 16),
}


def classes_of(name):
    """The classes of all three splits."""
    return [one for split in ("train", "validation", "test") for one in class_split(name)[split]]


def png(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """Writes rows as tensorflow-datasets prepares them."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    monkeypatch.setenv("JMETA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    picture, text = tfds.features.Image(shape=(None, None, None)), tfds.features.Text()
    kinds = {"image": picture, "mask": picture, "text": text, "intent_name": text}

    def write(name, names, **splits):
        folder = tmp_path / name / "1.0.0"
        folder.mkdir(parents=True)
        label = tfds.features.ClassLabel(**({"num_classes": names} if isinstance(names, int) else {"names": names}))
        found = next(iter(splits.values()))[0]
        features = tfds.features.FeaturesDict({key: label if key == "label" else kinds[key] for key in found})
        features.save_config(folder)
        serializer = ExampleSerializer(features.get_serialized_info())
        about = []
        for split, rows in splits.items():
            writer = ArrayRecordWriter(
                str(folder / f"{name.split('/')[0]}-{split}.array_record-00000-of-00001"), "group_size:1"
            )
            for row in rows:
                writer.write(serializer.serialize_example(row))
            writer.close()
            about.append({"name": split, "shardLengths": [str(len(rows))], "numBytes": "1"})
            about[-1]["filepathTemplate"] = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
        told = {"name": name.split("/")[0], "version": "1.0.0", "fileFormat": "array_record", "moduleName": "none"}
        (folder / "dataset_info.json").write_text(json.dumps({**told, "splits": about}))
        return folder

    return write


def pictures(classes, each, *, side=8, names=None):
    """Of each class pictures whose grey says which it is."""
    return [
        {"image": png(np.full((side + i % 2, side, 3), 40 * label, np.uint8)), "label": label, "mask": b"no picture"}
        for i in range(each)
        for label in range(classes)
    ]


def test_rows_of_all_splits_are_read_by_class_and_later_from_the_cache(prepare, monkeypatch):
    prepare("insects", ["ant", "bee", "cicada", "dor"], train=pictures(4, 4), test=pictures(4, 2))
    options = {"ways": 2, "shots": 2, "queries": 3, "size": 8}
    source = jmeta.tfds("insects", classes={"train": ["dor", "bee"], "test": ["ant"]}, split="train", **options)
    assert source.names == ("bee", "dor") and np.asarray(source.data.count).tolist() == [6, 6]
    assert np.asarray(source.data.inputs)[:, 0, 0, 0].tolist() == [40] * 6 + [120] * 6
    task = source.sample(jax.random.key(0), source.data)
    assert task.support.inputs.shape == (4, 8, 8, 3) and task.query.targets.shape == (6, 2)
    assert dict(source.protocol) == {"data": "insects", "split": "train", "ways": 2, "shots": 2, "queries": 3}
    assert jmeta.tfds("insects", rows=5, **options).data.count.tolist() == [5] * 4
    monkeypatch.setattr("jmeta.data.prepared._decoded", None)
    assert jmeta.tfds("insects", classes=["bee", "dor"], **options).names == ("bee", "dor")


def test_what_the_data_has_not_is_told(prepare):
    folder = prepare("insects", ["ant", "bee"], train=pictures(2, 6))
    with pytest.raises(DataError, match=r"insects/1.0.0 has no class 'elk' and 1 more; it has ant, bee"):
        jmeta.tfds("insects", classes=["ant", "elk", "fly"], size=8)
    with pytest.raises(DataError, match=r"the pictures of .* have several sizes; give one, as size=84"):
        jmeta.tfds("insects")
    with pytest.raises(DataError, match=f"{folder} has no feature 'sound'; it has image, label, mask"):
        jmeta.tfds("insects", inputs="sound")
    with pytest.raises(ConfigError, match="split is None; choose one of train"):
        jmeta.tfds("insects", classes={"train": ["ant"]})


def test_a_benchmark_that_is_not_prepared_says_at_once_what_prepares_it(tmp_path):
    begin = time.monotonic()
    for name, entry in BENCHMARKS.items():
        told = f"tfds.data_source..{entry.dataset}" if entry.dataset else f"export {name.upper()}_DIR=FOLDER"
        with pytest.raises(DataError, match=told):
            jmeta.benchmark(name, folder=tmp_path / "nowhere")
    assert time.monotonic() - begin < 1
    with pytest.raises(ConfigError, match="there is no benchmark 'cub200'; choose one of cifar_fs"):
        jmeta.benchmark("cub200")
    with pytest.raises(ConfigError, match="split is 'val'; choose one of train, validation, test"):
        jmeta.benchmark("cub", split="val")


@pytest.mark.parametrize("name", SIZES)
def test_class_splits_have_the_published_sizes_and_share_no_class(name):
    parts = [class_split(name)[split] for split in ("train", "validation", "test")]
    assert tuple(map(len, parts)) == SIZES[name] and class_split(name)["source"]
    assert max(Counter(classes_of(name)).values()) == 1


def test_class_splits_are_of_the_classes_of_tensorflow_datasets():
    from tensorflow_datasets.core.utils.resource_utils import tfds_path

    files = {
        "mini_imagenet": "image_classification/imagenet_resized_labels.txt",
        "tiered_imagenet": "image_classification/imagenet_resized_labels.txt",
        "quickdraw": "datasets/quickdraw_bitmap/labels.txt",
        "textures": "image_classification/dtd_key_attributes.txt",
    }
    for name, file in files.items():
        known = [line for line in tfds_path(file).read_text().split("\n") if line]
        listed = classes_of(name)
        assert set(listed) <= set(known) and ("imagenet" in name or len(listed) == len(known))
    assert sorted(int(name[:3]) for name in classes_of("cub")) == list(range(1, 201))
    assert set(classes_of("cub")) == set(classes_of("cub_chen"))
    assert set(classes_of("cifar_fs")) == set(classes_of("fc100")) and len(classes_of("fc100")) == 100


def test_benchmarks_are_read_by_names_by_numbers_from_folders_and_from_texts(prepare, tmp_path, monkeypatch):
    textures = sorted(classes_of("textures"))
    labels = [textures.index(name) for name in class_split("textures")["test"]]
    rows = [{"image": png(np.full((9, 9, 3), i, np.uint8)), "label": label} for label in labels for i in range(3)]
    prepare("dtd", textures, train=rows)
    source = jmeta.benchmark("textures", split="test", ways=5, shots=1, queries=2)
    assert list(source.names) == class_split("textures")["test"] and source.data.inputs.shape == (21, 84, 84, 3)
    with pytest.raises(DataError, match=r"dtd/1.0.0 has no class 'gauzy' and 6 more"):
        jmeta.benchmark("textures", split="validation")

    rows = [{"image": png(np.zeros((9, 9, 3), np.uint8)), "label": int(n[:3]) - 1} for n in class_split("cub")["test"]]
    prepare("caltech_birds2011", 200, train=rows * 2)
    source = jmeta.benchmark("cub", split="test", ways=5, shots=1, queries=1)
    assert source.names[:2] == ("008.Rhinoceros_Auklet", "009.Brewer_Blackbird") and len(source.names) == 30

    said = [
        {"text": f"say {i} {j}".encode(), "intent_name": f"intent {i}".encode()} for i in range(10) for j in range(3)
    ]
    prepare("clinc_oos", 2, train=said, train_oos=[{"text": b"odd", "intent_name": b"oos"}])
    sources = [jmeta.benchmark("clinc_oos", split=split, ways=2, shots=1, queries=2) for split in ("train", "test")]
    assert [len(source.names) for source in sources] == [6, 2] and sources[0].data.inputs.shape == (18, 128)
    assert not set(sources[0].names) & set(sources[1].names)

    monkeypatch.setenv("TIERED_IMAGENET_DIR", str(tmp_path / "tiered"))
    monkeypatch.setenv("MINI_IMAGENET_DIR", str(tmp_path / "mini"))
    for place in ("tiered/val/n1", "tiered/val/n2", *(f"mini/{name}" for name in class_split("mini_imagenet")["test"])):
        (tmp_path / place).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(np.zeros((9, 9), np.uint8)).save(tmp_path / place / f"{i}.png")
    source = jmeta.benchmark("tiered_imagenet", split="validation", ways=2, shots=1, queries=1)
    assert source.names == ("n1", "n2") and source.data.inputs.shape == (4, 84, 84, 3)
    with pytest.raises(DataError, match="tiered has no folder test; put folders of the classes"):
        jmeta.benchmark("tiered_imagenet", split="test")
    assert len(jmeta.benchmark("mini_imagenet", split="test", shots=1, queries=1).names) == 20
    with pytest.raises(DataError, match="mini has no folder of the class 'n01532829', which train has; add it"):
        jmeta.benchmark("mini_imagenet")


def test_episodes_of_meta_dataset_have_many_ways_and_unequal_shots():
    labels = np.repeat(np.arange(8), [4, 6, 10, 20, 20, 30, 40, 60])
    inputs = np.stack([labels, np.arange(len(labels))], axis=1).astype(np.float32)
    source = jmeta.varying(jmeta.from_arrays(inputs, labels, queries=2), queries=3, support=60)
    tasks = jax.jit(jax.vmap(source.sample, (0, None)))(jax.random.split(jax.random.key(0), 200), source.data)
    shots, asked = (np.asarray(part.targets.sum(axis=1)) for part in (tasks.support, tasks.query))
    ways = (shots > 0).sum(axis=1)
    assert set(ways) == {5, 6, 7, 8} and ((shots > 0) == (asked > 0)).all()
    assert (shots.sum(axis=1) == np.asarray(tasks.support.mask).sum(axis=1)).all() and shots.sum(axis=1).max() <= 60
    assert set(np.unique(asked)) == {0, 2, 3} and (asked.max(axis=1) == np.where(asked > 0, asked, 9).min(axis=1)).all()
    assert len(np.unique(shots)) > 15
    for part in (tasks.support, tasks.query):
        there = np.asarray(part.mask)
        np.testing.assert_array_equal(np.asarray(part.inputs)[there][:, 0], labels[np.asarray(part.rows)[there]])
        np.testing.assert_array_equal(np.asarray(part.classes)[there], labels[np.asarray(part.rows)[there]])
    for i in range(200):  # no row twice in one episode
        rows = np.concatenate(
            [np.asarray(part.rows)[i][np.asarray(part.mask)[i]] for part in (tasks.support, tasks.query)]
        )
        assert len(rows) == len(set(rows))
    assert dict(source.protocol) == {"ways": [5, 8], "shots": "varying", "queries": 3, "support": 60}
    drawn = shots_of(jax.random.key(1), jnp.asarray([20, 40, 9]), jnp.asarray([True, True, False]), jnp.asarray(5), 30)
    assert drawn[:2].min() >= 1 and drawn[:2].sum() <= 30
    with pytest.raises(DataError, match=r"ways is \(9, 12\), and the source has 8 classes; give from 2 to 8"):
        jmeta.varying(source, ways=(9, 12))
    with pytest.raises(DataError, match="the episodes of varying are cut from arrays"):
        jmeta.varying(jmeta.sinusoid())
    with pytest.raises(DataError, match="support is 4, and each of 8 ways has an example"):
        jmeta.varying(source, support=4)
