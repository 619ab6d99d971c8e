"""Data of your own from a path."""

import csv

import jax
import numpy as np
import pytest
from PIL import Image

import jmeta
from jmeta.data.labelled import SPLITS
from jmeta.data.own import divide, read_own
from jmeta.runs import settings

RANDOM = np.random.default_rng(0)


def folder_of(place, classes, n=3, pixels=10):
    for name in classes:
        (place / name).mkdir(parents=True)
        for i in range(n):
            image = RANDOM.integers(0, 255, (pixels, pixels), dtype=np.uint8)
            Image.fromarray(image).save(place / name / f"{i}.png")
    return place


def archive(place, **changes):
    arrays = {"x": np.arange(90.0).reshape(30, 3), "y": np.repeat([f"class {i}" for i in range(10)], 3), **changes}
    np.savez(place / "own.npz", **{name: value for name, value in arrays.items() if value is not None})
    return place / "own.npz"


def table(place, rows=None, header=("person", "age", "dose", "effect")):
    rows = rows or [(f"p{i // 6}", i % 7, i % 3, 2.0 * i) for i in range(60)]
    with (place / "own.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([header, *rows])
    return place / "own.csv"


def sample(own, split="train", **sizes):
    source = own.load(split=split, **{"shots": 1, "queries": 1, **sizes})
    return source, jax.jit(source.sample)(jax.random.key(0), source.data)


def test_a_division_is_whole_and_that_of_its_seed():
    names = [f"class {i}" for i in range(23)]
    parts = divide(names, 3)
    assert sorted(name for split in SPLITS for name in parts[split]) == sorted(names)
    assert [len(parts[split]) for split in SPLITS] == [13, 5, 5]
    assert divide(names, 3) == parts != divide(names, 4)
    assert [len(divide(names[:7], 0)[split]) for split in SPLITS] == [3, 2, 2]


def test_a_folder_of_classes_is_divided(tmp_path):
    own = read_own(folder_of(tmp_path / "own", "abcdefgh"), size=6)
    assert (own.kind, own.images, own.descriptions, own.rows["a"]) == ("classification", True, ("text",), 3)
    source, task = sample(own, ways=2)
    assert task.support.inputs.shape == (2, 6, 6, 1) and float(task.support.inputs.max()) <= 1.0
    assert source.names == tuple(own.division["train"])
    assert source.protocol["data"] == str(tmp_path / "own")


def test_the_division_of_a_run_stays_when_a_class_comes(tmp_path):
    place = folder_of(tmp_path / "own", "abcdefgh")
    before = read_own(place).division
    folder_of(place, ("new",))
    assert read_own(place, division=before).division == before != read_own(place).division


def test_folders_that_are_splits(tmp_path):
    place = tmp_path / "own"
    folder_of(place / "train", "abcd")
    folder_of(place / "val", "ef")
    folder_of(place / "test", "gh")
    own = read_own(place, channels=3)  # the size is that of the images
    assert {split: tuple(names) for split, names in own.division.items()} == {
        "train": ("a", "b", "c", "d"),
        "validation": ("e", "f"),
        "test": ("g", "h"),
    }
    for split in SPLITS:
        source, task = sample(own, split, ways=2)
        assert set(source.names) == set(own.division[split]) and task.query.inputs.shape == (2, 10, 10, 3)


def test_validation_is_taken_from_training_where_there_is_none(tmp_path):
    folder_of(tmp_path / "train", "abcdef")
    folder_of(tmp_path / "test", "gh")
    own = read_own(tmp_path)
    assert sorted([*own.division["train"], *own.division["validation"]]) == list("abcdef")
    assert len(own.division["validation"]) == 2


def test_names_of_classes_are_descriptions(tmp_path):
    own = read_own(folder_of(tmp_path, ("red_fox", "blue_fox", "cat", "dog", "emu", "owl")))
    _, task = sample(own, ways=2, descriptions="text")
    assert isinstance(task.support.descriptions, jmeta.TokenIds)


def test_an_archive(tmp_path):
    own = read_own(archive(tmp_path))
    assert (own.kind, own.images, len(own.rows)) == ("classification", False, 10)
    _, task = sample(own, ways=2)
    assert task.support.inputs.shape == (2, 3)
    row = np.asarray(task.support.inputs[0])
    assert row[0] % 3 == 0 and np.array_equal(row, row[0] + np.arange(3))  # as it was written


def test_an_archive_with_descriptions_and_splits_of_its_own(tmp_path):
    split = np.repeat(["train"] * 6 + ["validation"] * 2 + ["test"] * 2, 3)
    own = read_own(archive(tmp_path, descriptions=np.eye(10), split=split))
    assert own.division["test"] == ["class 8", "class 9"] and own.descriptions == ("attributes",)
    _, task = sample(own, "test", ways=2, descriptions="attributes")
    assert {int(i) for i in task.support.descriptions.argmax(axis=1)} == {8, 9}


def test_a_table_of_groups(tmp_path):
    own = read_own(table(tmp_path), group="person", target="effect")
    assert own.kind == "regression" and len(own.rows) == 10 and own.rows["p0"] == 6
    source, task = sample(own, shots=2, queries=3)
    assert task.support.inputs.shape == (2, 2) and task.query.targets.shape == (3, 1)
    inputs, targets = np.asarray(source.data.inputs), np.asarray(source.data.targets)
    for values in (inputs, targets):  # the scale is that of the training groups
        np.testing.assert_allclose([values.mean(), values.std()], [0, 1], atol=1e-5)
    training = np.isin([f"p{i // 6}" for i in range(60)], list(own.division["train"]))
    effects = 2.0 * np.arange(60.0)[training]
    np.testing.assert_allclose(own.standardisation[2:], [effects.mean(), effects.std()], rtol=1e-5)
    assert source.protocol["target_spread"] == own.standardisation.target_spread


BAD = {
    "missing": (lambda place: place / "nothing", {}, "does not exist; give a folder"),
    "one class": (lambda place: folder_of(place / "o", "a"), {}, "there are 1 classes or groups to divide"),
    "few classes": (lambda place: folder_of(place / "o", "abcde"), {}, "there are 5 classes"),
    "in two splits": (
        lambda place: folder_of(folder_of(place / "o" / "train", "abcd").parent / "test", "ax").parent,
        {},
        "class 'a' of .* is in both train and test",
    ),
    "no labels": (lambda place: archive(place, y=None), {}, r"has no y or labels \(it has x\)"),
    "objects": (
        lambda place: archive(place, y=np.asarray([{}] * 30, object)),
        {},
        "it holds Python objects",
    ),
    "real labels": (lambda place: archive(place, y=np.arange(30) / 7), {}, "labels of .* are float64; give integers"),
    "lengths": (lambda place: archive(place, y=np.arange(29)), {}, "has 30 inputs and labels of shape"),
    "strange split": (lambda place: archive(place, split=np.asarray(["tset"] * 30)), {}, "must say train, validation"),
    "group of a folder": (lambda place: folder_of(place / "o", "abcdef"), {"group": "x"}, "--group is for a .csv"),
    "size of a table": (table, {"size": 3, "group": "person", "target": "dose"}, "--size and --channels are for"),
    "no group": (table, {"target": "dose"}, "say by --group COLUMN which of person, age"),
    "no column": (table, {"group": "person", "target": "dosis"}, "has no column 'dosis' for --target"),
    "text": (
        lambda place: table(place, [("p", "old", 1, 2.0)] * 8),
        {"group": "person", "target": "effect"},
        "column 'age' of .* holds text",
    ),
    "ragged": (
        lambda place: table(place, [(1, 2, 3)]),
        {"group": "age", "target": "dose"},
        "line 2 of .* has 3 values",
    ),
    "not finite": (
        lambda place: table(place, [("p", "nan", 1, 2.0)] * 8),
        {"group": "person", "target": "effect"},
        "line 2 of .* has no finite number in column 'age'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_data_are_told(name, tmp_path):
    make, options, sentence = BAD[name]
    with pytest.raises(jmeta.DataError, match=sentence):
        read_own(make(tmp_path), **options)


def test_a_file_that_is_damaged(tmp_path):
    file = archive(tmp_path)
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(jmeta.DataError, match=r"own\.npz cannot be read"):
        read_own(file)


def test_more_ways_than_a_split_has_are_told_with_the_division(tmp_path):
    place = folder_of(tmp_path, tuple("abcdefgh"))
    with pytest.raises(
        jmeta.ConfigError, match=r"--ways is 5, and of the classes there are .* for train, .* at most 2"
    ):
        settings.resolve("prototypical", str(place), ways=5)


def test_a_table_has_the_inner_rate_of_a_regression_as_in_python(tmp_path):
    file = tmp_path / "doses.csv"
    rows = [f"{i // 10},{i % 7},{i % 3}" for i in range(120)]
    file.write_text("\n".join(["person,dose,effect", *rows]))
    for learner in ("maml", "fomaml", "anil", "meta_sgd"):
        config = settings.resolve(learner, str(file), group="person", target="effect", shots=2)
        assert config.inner_rate == settings.resolve(learner, "sinusoid").inner_rate < 0.1
