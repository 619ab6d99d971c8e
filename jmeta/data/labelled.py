"""Labelled rows from a path: images in folders, arrays in an archive, the columns of a table."""

import csv
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from jmeta.data.folders import read_images
from jmeta.errors import DataError

SPLITS = ("train", "validation", "test")
_SPLIT_NAMES = {"train": "train", "training": "train", "validation": "validation", "val": "validation"}
_SPLIT_NAMES |= {"valid": "validation", "dev": "validation", "test": "test", "testing": "test"}
Division = Mapping[str, Sequence[str]]


class Labelled(NamedTuple):
    """Rows of data of one's own, with a class each.

    Args:
        inputs: `[n, ...]`; of a table of sentences the texts.
        labels: `[n]`, index into `names`.
        names: the name of each class.
        division: the classes of each split, as far as the data says; none where it does not.
        descriptions: `[classes, ...]`, or None.
    """

    inputs: Any
    labels: Int[np.ndarray, "n"]
    names: Sequence[str]
    division: Division = MappingProxyType({})
    descriptions: Any = None


def read_folder(path: Path, size: int | None, channels: int | None) -> Labelled:
    """Images in sub-folders of classes, perhaps inside of folders of splits; `DataError` for what is none."""
    inside = {}
    for entry in path.iterdir():
        if entry.is_dir() and entry.name.lower() in _SPLIT_NAMES:
            inside[_SPLIT_NAMES[entry.name.lower()]] = entry
    if not {"train", "test"} <= inside.keys():
        images, labels, _, names = read_images(path, size=size, channels=channels)
        if not names:
            raise DataError(f"{path} holds images but no classes; put the images of each class into a sub-folder.")
        return Labelled(images, labels, names)
    found = {split: read_images(folder, size=size, channels=channels) for split, folder in inside.items()}
    shapes = {split: part.images.shape[1:] for split, part in found.items()}
    if len(set(shapes.values())) > 1:
        told = ", ".join(f"{' x '.join(map(str, shape))} in {split}" for split, shape in shapes.items())
        raise DataError(f"the images of {path} are {told}; give one --size and --channels for all.")
    for split, part in found.items():
        if not part.names:
            raise DataError(f"{inside[split]} holds no classes; put the images of each class into a sub-folder.")
    own: Division = {split: part.names for split, part in found.items()}
    _disjoint(path, own)
    every = [name for part in found.values() for name in part.names]
    first = np.cumsum([0, *(len(part.names) for part in found.values())])
    labels = np.concatenate([part.labels + start for part, start in zip(found.values(), first, strict=False)])
    images = np.concatenate([part.images for part in found.values()])
    return Labelled(images, labels, every, own)


def read_archive(path: Path) -> Labelled:
    """Arrays `x` and `y` of an `.npz`, perhaps `split` and `descriptions`; `DataError` for what is none."""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (ValueError, OSError, zipfile.BadZipFile, EOFError) as error:
        reason = "it holds Python objects" if "pickle" in str(error).lower() else str(error)
        raise DataError(f"{path} cannot be read ({reason}); write it by numpy.savez of plain arrays.") from error

    def first(*names: str) -> np.ndarray:
        for name in names:
            if name in arrays:
                return arrays[name]
        has = ", ".join(arrays) or "nothing"
        raise DataError(
            f"{path} has no {' or '.join(names)} (it has {has}); save it as numpy.savez(file, x=..., y=...)."
        )

    inputs, labels = first("x", "images", "inputs"), first("y", "labels")
    if labels.ndim != 1 or len(labels) != len(inputs):
        raise DataError(f"{path} has {len(inputs)} inputs and labels of shape {list(labels.shape)}; give one for each.")
    if labels.dtype.kind not in "iuUSb":
        raise DataError(
            f"the labels of {path} are {labels.dtype}; give integers or texts, or for a regression a table with "
            "--group and --target."
        )
    values, index = np.unique(labels, return_inverse=True)
    names = [value.decode() if isinstance(value, bytes) else str(value) for value in values.tolist()]
    given = _divided(path, arrays["split"].tolist(), names, index) if "split" in arrays else {}
    described = arrays.get("descriptions")
    if described is not None and len(described) != len(names):
        raise DataError(f"{path} has {len(described)} descriptions and {len(names)} classes; give one for each class.")
    if inputs.dtype == np.uint8 and inputs.ndim == 3:
        inputs = inputs[..., None]
    return Labelled(inputs, index.astype(np.int32), names, given, described)


def read_sentences(path: Path, text: str | None, label: str | None, split: str | None = None) -> Labelled:
    """Texts and classes, and perhaps splits, of the columns of a table; `DataError` where a column is not there."""
    columns = read_columns(path)
    for flag, name in (("--text", text), ("--label", label), ("--split", split)):
        if name is None and flag != "--split":
            what = "is read" if flag == "--text" else "is the class of a row"
            raise DataError(f"{path} is a table; say by {flag} COLUMN which of {', '.join(columns)} {what}.")
        if name is not None and name not in columns:
            raise DataError(f"{path} has no column {name!r} for {flag}; it has {', '.join(columns)}.")
    texts = [str(value) for value in columns[str(text)]]
    if empty := [i for i, value in enumerate(texts, start=2) if not value.strip()]:
        raise DataError(f"line {empty[0]} of {path} has no text in column {text!r}; write one, or remove the line.")
    names, index = np.unique([str(value) for value in columns[str(label)]], return_inverse=True)
    given = _divided(path, columns[split], names.tolist(), index) if split is not None else {}
    return Labelled(texts, index.astype(np.int32), names.tolist(), given)


def _divided(path: Path, words: Sequence[Any], names: Sequence[str], index: np.ndarray) -> Division:
    """The division that data says itself, by a word for each row."""
    words = [word.decode() if isinstance(word, bytes) else str(word) for word in words]
    if len(words) != len(index) or not {word.lower() for word in words} <= _SPLIT_NAMES.keys():
        raise DataError(f"split of {path} must say train, validation or test for each of its {len(index)} rows.")
    splits = np.asarray([_SPLIT_NAMES[word.lower()] for word in words])
    division = {split: [names[i] for i in np.unique(index[splits == split])] for split in SPLITS}
    if not division["train"] or not division["test"]:
        raise DataError(f"split of {path} has no rows of {'train' if not division['train'] else 'test'}; add some.")
    _disjoint(path, division)
    return {split: found for split, found in division.items() if found}


def _disjoint(path: Path, division: Division) -> None:
    for i, split in enumerate(SPLITS):
        for other in SPLITS[i + 1 :]:
            if shared := sorted(set(division.get(split, ())) & set(division.get(other, ()))):
                raise DataError(
                    f"class {shared[0]!r} of {path} is in both {split} and {other}; tests are on classes that were not "
                    "trained on, so keep each in one."
                )


def read_columns(path: Path) -> dict[str, Sequence[Any]]:
    """The columns of a `.csv` or `.parquet` table by name; `DataError` for what is none."""
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet as parquet
        except ImportError as error:
            raise DataError(f"reading {path} needs pyarrow: pip install pyarrow.") from error
        try:
            return {str(name): values for name, values in parquet.read_table(path).to_pydict().items()}
        except Exception as error:  # pyarrow raises errors of its own on a damaged file
            raise DataError(f"{path} cannot be read as a table ({error}); write it anew.") from error
    try:
        with path.open(newline="") as stream:
            rows = [row for row in csv.reader(stream) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as a table ({error}); write it anew.") from error
    if len(rows) < 2:
        raise DataError(f"{path} holds no rows below a line of names; add some.")
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != len(rows[0]):
            raise DataError(f"line {number} of {path} has {len(row)} values and {len(rows[0])} names; repair it.")
    return dict(zip(rows[0], zip(*rows[1:], strict=True), strict=True))
