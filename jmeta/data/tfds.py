"""Few-shot tasks from data sets that tensorflow-datasets prepared, and the benchmarks of the field among them."""

import json
import os
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jmeta.core import TaskSource
from jmeta.data.episodes import Size, from_arrays, split_classes
from jmeta.data.folders import SPLITS as FOLDERS
from jmeta.data.folders import read_images
from jmeta.data.prepared import Rows, prepared, read_rows
from jmeta.data.text import hashed_text
from jmeta.errors import ConfigError, DataError

SPLITS = ("train", "validation", "test")
WIDTH = 128  # token ids of a text
Classes = Sequence[str] | Mapping[str, Sequence[str]]


def tfds(
    name: str,
    *,
    classes: Classes | None = None,
    split: str | None = None,
    inputs: str | None = None,
    label: str = "label",
    size: int | None = None,
    rows: int | None = None,
    folder: str | Path | None = None,
    names: Sequence[str] = (),
    **episodes: Any,
) -> TaskSource:
    """N-way K-shot episodes of the classes of any data set that tensorflow-datasets prepared.

    Read without TensorFlow; all rows of the chosen classes, whatever the data set's own splits, which divide examples
    and not classes. The first call decodes them, and later ones read them from jmeta's cache folder.

    Args:
        name: of the data set, as `"cifar100"`, with its configuration where it has several, `"imagenet_resized/64x64"`.
        classes: the names of the classes, or a mapping from splits to them. Default: all.
        split: one of the mapping's.
        inputs: the feature that is read. Default: `"image"`, where there is one, else `"text"`, as the token ids
            `[n, 128]` of `jmeta.hashed_text`.
        label: the feature that holds the class.
        size: pixels of each side that pictures are brought to; needed where they differ.
        rows: no more than so many of each class, the first.
        folder: the data folder of tensorflow-datasets. Default: the first of `$TFDS_DATA_DIR` and
            `~/tensorflow_datasets` that has the data set.
        names: the names of the classes by number, where the data set has none.
        episodes: `ways`, `shots`, `queries` and all else that `jmeta.from_arrays` takes.

    Returns:
        A source of tasks, see `jmeta.from_arrays`.

    Raises:
        DataError: the data set is not prepared, with the command that prepares it; it has no such feature or class;
            pictures of several sizes without a `size`.
        ConfigError: a split that the mapping has not, or a mapping without a split.

    Example:
        >>> import jmeta
        >>> beetles = ("stag_beetle", "ladybug", "dung_beetle")
        >>> source = jmeta.tfds("my_insects", classes=beetles, ways=3, shots=1, size=84)  # doctest: +SKIP
    """
    if isinstance(classes, Mapping):
        if split is None or split not in classes:
            raise ConfigError(f"split is {split!r}; choose one of {', '.join(classes)}.")
        classes = classes[split]
    path = prepared(name, folder)
    found = read_rows(path, inputs=inputs, label=label, classes=classes, names=tuple(names), size=size, rows=rows)
    return _episodes(name, split, found, episodes)


class Benchmark(NamedTuple):
    """A data set of the few-shot literature by name.

    Args:
        dataset: of tensorflow-datasets; None where it lies in a folder that the variable `NAME_DIR` names.
        classes: the file of its class split in `jmeta/data/splits`; None where classes are divided at random.
        options: what `tfds` needs beside.
    """

    dataset: str | None
    classes: str | None
    options: Mapping[str, Any] = {}


BENCHMARKS: Mapping[str, Benchmark] = {
    "cifar_fs": Benchmark("cifar100", "cifar_fs"),
    "clinc_oos": Benchmark("clinc_oos", None, {"label": "intent_name"}),
    "cub": Benchmark("caltech_birds2011", "cub", {"size": 84}),
    "cub_chen": Benchmark("caltech_birds2011", "cub_chen", {"size": 84}),
    "fc100": Benchmark("cifar100", "fc100"),
    "mini_imagenet": Benchmark(None, "mini_imagenet", {"size": 84}),
    "mini_imagenet_64": Benchmark("imagenet_resized/64x64", "mini_imagenet", {"rows": 600}),
    "quickdraw": Benchmark("quickdraw_bitmap", "quickdraw", {"rows": 200}),
    "textures": Benchmark("dtd", "textures", {"size": 84}),
    "tiered_imagenet": Benchmark(None, "tiered_imagenet", {"size": 84}),
    "tiered_imagenet_64": Benchmark("imagenet_resized/64x64", "tiered_imagenet", {"rows": 600}),
    "vgg_flower": Benchmark("oxford_flowers102", "vgg_flower", {"size": 84}),
}


def benchmark(
    name: str,
    *,
    split: str = "train",
    ways: Size = 5,
    shots: Size = 1,
    queries: Size = 15,
    batch: int | None = None,
    query_balance: float | None = None,
    unlabelled: int = 0,
    distractors: int = 0,
    folder: str | Path | None = None,
    **options: Any,
) -> TaskSource:
    """N-way K-shot episodes of a data set of the few-shot literature, by the public split of its classes.

    Of each the data set of tensorflow-datasets and the number of classes to train, validate and test:

    * `cifar_fs`, 64 / 16 / 20, and `fc100`, 60 / 20 / 20 by superclass: `cifar100`.
    * `cub`, 140 / 30 / 30 of Meta-Dataset, and `cub_chen`, 100 / 50 / 50 of Chen et al. 2019: `caltech_birds2011`.
    * `textures`, 33 / 7 / 7, and `vgg_flower`, 71 / 15 / 16, of Meta-Dataset: `dtd`, `oxford_flowers102`.
    * `quickdraw`, 241 / 52 / 52 of Meta-Dataset, the first 200 drawings of each: `quickdraw_bitmap`.
    * `mini_imagenet_64`, 64 / 16 / 20, and `tiered_imagenet_64`, 351 / 97 / 160 by superclass, the first 600 pictures
      of each class: `imagenet_resized/64x64`.
    * `mini_imagenet` and `tiered_imagenet`: no data set but a folder, `$MINI_IMAGENET_DIR` and `$TIERED_IMAGENET_DIR`,
      with the classes in `train`, `val` and `test`, or side by side.
    * `clinc_oos`, 90 / 30 / 30 of its intents at random: `clinc_oos`.

    Args:
        name: one of these.
        split: `"train"`, `"validation"` or `"test"`.
        ways: as in `jmeta.from_arrays`, like those below.
        shots: see there.
        queries: see there.
        batch: see there.
        query_balance: see there.
        unlabelled: see there.
        distractors: see there.
        folder: as in `jmeta.tfds`, or that of the pictures.
        options: see `jmeta.tfds`; `size` and `rows` by default as above, or 84 pixels.

    Returns:
        A source of tasks; the source of a class split is named in its file, `jmeta/data/splits`.

    Raises:
        ConfigError: an unknown name or split.
        DataError: the data are not on this machine, with what puts them there, or have not the classes of the split.

    Example:
        >>> import jmeta
        >>> source = jmeta.benchmark("cifar_fs", split="test", ways=5, shots=1)  # doctest: +SKIP

    Reference: Triantafillou et al. 2020, "Meta-Dataset: A Dataset of Datasets for Learning to Learn from Few Examples";
    others in the files.
    """
    if name not in BENCHMARKS:
        raise ConfigError(f"there is no benchmark {name!r}; choose one of {', '.join(BENCHMARKS)}.")
    if split not in SPLITS:
        raise ConfigError(f"split is {split!r}; choose one of {', '.join(SPLITS)}.")
    entry = BENCHMARKS[name]
    episodes = {"ways": ways, "shots": shots, "queries": queries, "batch": batch, "query_balance": query_balance}
    episodes |= {"unlabelled": unlabelled, "distractors": distractors}
    wanted = {**entry.options, **options}
    if entry.dataset is None:
        return _pictures(name, split, folder, wanted, episodes)
    path = prepared(entry.dataset, folder)
    if entry.classes is None:
        return _divided(name, split, read_rows(path, **wanted), episodes)
    listed = class_split(entry.classes)
    every = sorted(one for part in SPLITS for one in listed[part])
    numbered = tuple(every) if listed.get("numbered") else ()
    found = read_rows(path, classes=listed[split], names=numbered, **wanted)
    return _episodes(name, split, found, episodes)


def class_split(name: str) -> dict[str, Any]:
    """A public split of classes: names under `"train"`, `"validation"` and `"test"`, and where it is from.

    Args:
        name: of a file in `jmeta/data/splits`.

    Returns:
        What the file says: also `"source"`, `"dataset"`, and `"numbered"` where sorted names are the labels.

    Example:
        >>> from jmeta.data.tfds import class_split
        >>> class_split("fc100")["test"][:3]
        ['baby', 'beaver', 'bee']
    """
    return dict(json.loads(files("jmeta.data").joinpath("splits", f"{name}.json").read_text()))


def _episodes(name: str, split: str | None, found: Rows, episodes: Mapping[str, Any]) -> TaskSource:
    texts = found.inputs.dtype.kind == "U"
    inputs = hashed_text(found.inputs.tolist(), width=WIDTH) if texts else found.inputs
    source = from_arrays(inputs, found.labels, names=found.names, **episodes)
    return source._replace(protocol={"data": name, **({"split": split} if split else {}), **source.protocol})


def _divided(name: str, split: str, found: Rows, episodes: Mapping[str, Any]) -> TaskSource:
    """The classes of one split of a seeded division."""
    mine = split_classes(found.labels)[SPLITS.index(split)]
    kept, labels = np.unique(found.labels[mine], return_inverse=True)
    names = tuple(found.names[i] for i in kept)
    return _episodes(name, split, Rows(found.inputs[mine], labels.astype(np.int32), names), episodes)


def _pictures(
    name: str, split: str, folder: str | Path | None, options: Mapping[str, Any], episodes: Mapping[str, Any]
) -> TaskSource:
    """Pictures in folders of classes, inside of folders of splits or without them."""
    variable = f"{name.upper()}_DIR"
    given = os.environ.get(variable) if folder is None else folder
    place = Path(given).expanduser() if given else None
    if place is None or not place.is_dir():
        raise DataError(
            f"{name} is not in {place or f'{variable}, which is not set'}; ask for ImageNet at image-net.org, put "
            f"its pictures into a folder for each class inside of train, val and test, then export {variable}=FOLDER."
        )
    below = {entry.name.lower(): entry for entry in place.iterdir() if entry.is_dir()}
    inside = [below[word] for word in FOLDERS[split] if word in below]
    if not inside and any(word in below for words in FOLDERS.values() for word in words):
        raise DataError(f"{place} has no folder {split}; put folders of the classes of each split of {name} there.")
    images, labels, _, names = read_images(inside[0] if inside else place, size=options["size"], channels=3)
    wanted = names if inside else tuple(class_split(name)[split])
    if missing := sorted(set(wanted) - set(names)):
        raise DataError(
            f"{place} has no folder of the class {missing[0]!r}, which {split} has; add it, or put the classes of each "
            "split into train, val and test."
        )
    index = {names.index(one): i for i, one in enumerate(wanted)}
    mine = np.isin(labels, list(index))
    own = np.asarray([index[label] for label in labels[mine].tolist()], np.int32)
    return _episodes(name, split, Rows(images[mine], own, tuple(wanted)), episodes)
