"""What tensorflow-datasets prepared on this machine, found and read without TensorFlow."""

import io
import json
import os
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jmeta.data.cache import cached
from jmeta.errors import DataError

_AT_A_TIME = 4096


class Rows(NamedTuple):
    """Rows of some classes of a prepared data set, sorted by class.

    Args:
        inputs: `[n, height, width, channels]` bytes, or `[n]` texts.
        labels: `[n]`, index into `names`.
        names: the name of each class.
    """

    inputs: np.ndarray
    labels: np.ndarray
    names: tuple[str, ...]


def prepared(name: str, folder: str | Path | None, title: str | None = None) -> Path:
    """The folder of the newest version that tensorflow-datasets prepared; looking first spares minutes of retries.

    Args:
        name: of the data set, as `"cifar100"` or `"imagenet_resized/64x64"`.
        folder: the data folder of tensorflow-datasets. Default: the first of `$TFDS_DATA_DIR` and
            `~/tensorflow_datasets` that has it.
        title: what an error calls it; default its name.

    Returns:
        The folder that holds `dataset_info.json`.

    Raises:
        DataError: it is not prepared.
    """
    usual = [os.environ.get("TFDS_DATA_DIR"), "~/tensorflow_datasets"]
    folders = [Path(place).expanduser() for place in (usual if folder is None else [folder]) if place]
    for place in folders:
        found = {file.parent: json.loads(file.read_bytes()) for file in place.glob(f"{name}/*/dataset_info.json")}
        readable = [path for path, about in found.items() if about.get("fileFormat") == "array_record"]
        if readable:
            return max(readable, key=lambda path: [int(part) for part in path.name.split(".")])
    raise DataError(
        f"{title or name} is not prepared as array_record in {' or '.join(map(str, folders))}; set TFDS_DATA_DIR to "
        f"the folder that holds {name.split('/')[0]}/, or prepare it once, with TensorFlow installed, by "
        f"python -c \"import tensorflow_datasets as tfds; tfds.data_source('{name}')\"."
    )


def read_rows(
    path: Path,
    *,
    inputs: str | None = None,
    label: str = "label",
    classes: Collection[str] | None = None,
    names: tuple[str, ...] = (),
    size: int | None = None,
    rows: int | None = None,
) -> Rows:
    """The rows of some classes, decoded once and kept in jmeta's cache folder.

    Args:
        path: of `prepared`.
        inputs: the feature that is read; default `"image"`, where there is one, else `"text"`.
        label: the feature that holds the class, a number or a text.
        classes: their names; default all.
        names: the names of the classes by number, where the data holds none.
        size: pixels of each side that pictures are shrunk to. Default: as they are.
        rows: no more than so many of each class, the first.

    Returns:
        The rows.

    Raises:
        DataError: it has no such feature or class, pictures of several sizes, or tensorflow-datasets is missing.
    """
    choice = json.dumps([inputs, label, classes and sorted(classes), names, size, rows]).encode()
    digest = zlib.crc32(choice, zlib.crc32((path / "dataset_info.json").read_bytes()))
    key = f"{'-'.join(path.parts[-3:])}-{digest:08x}"
    arrays = cached(key, lambda: _decoded(path, inputs, label, classes, names, size, rows))
    return Rows(arrays["inputs"], arrays["labels"], tuple(arrays["names"].tolist()))


def _decoded(
    path: Path,
    inputs: str | None,
    label: str,
    classes: Collection[str] | None,
    names: tuple[str, ...],
    size: int | None,
    rows: int | None,
) -> dict[str, np.ndarray]:
    try:
        import tensorflow_datasets as tfds

        builder = tfds.builder_from_directory(path)
    except ImportError as error:
        raise DataError(
            f"{path} cannot be read ({error}); run pip install tensorflow-datasets importlib_resources pillow."
        ) from error
    features = builder.info.features
    inputs = inputs or ("image" if "image" in features else "text")
    for feature in (inputs, label):
        if feature not in features:
            raise DataError(f"{path} has no feature {feature!r}; it has {', '.join(sorted(features))}.")
    told = names or tuple(getattr(features[label], "names", None) or ())
    _check_classes(path, classes, told or classes or ())
    pictures = isinstance(features[inputs], tfds.features.Image)
    kept: dict[str, list[Any]] = {name: [] for name in classes or told}
    # files as they are: those of other features, as masks, are not looked at
    skipped = {name: tfds.decode.SkipDecoding() for name in features if isinstance(features[name], tfds.features.Image)}
    sources = builder.as_data_source(decoders=skipped)
    within = [
        source for split, source in sorted(sources.items()) if not split.endswith("_oos")
    ]  # no class of their own
    for record in _records(within, kept, classes, rows):
        name = _text(record[label]) if not told else told[int(record[label])]
        if name not in kept and classes is None:
            kept[name] = []
        if name in kept and (rows is None or len(kept[name]) < rows):
            kept[name].append(_picture(record[inputs], size) if pictures else _text(record[inputs]))
    _check_classes(path, classes, [name for name in kept if kept[name]])
    found = sorted(name for name in kept if kept[name])
    every = [x for name in found for x in kept[name]]
    if pictures and len({x.shape for x in every}) > 1:
        raise DataError(f"the pictures of {path} have several sizes; give one, as size=84.")
    labels = np.repeat(np.arange(len(found), dtype=np.int32), [len(kept[name]) for name in found])
    return {"inputs": np.stack(every) if pictures else np.asarray(every), "labels": labels, "names": np.asarray(found)}


def _records(
    sources: list[Any], kept: dict[str, list[Any]], classes: Collection[str] | None, rows: int | None
) -> Iterator[Any]:
    """All records, until each class that was asked for has its rows."""
    for source in sources:
        for start in range(0, len(source), _AT_A_TIME):
            if rows is not None and kept and all(len(found) >= rows for found in kept.values()):
                return
            yield from source.__getitems__(range(start, min(start + _AT_A_TIME, len(source))))


def _check_classes(path: Path, classes: Collection[str] | None, known: Collection[str]) -> None:
    if classes is None:
        return
    if missing := sorted(set(classes) - set(known)):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        some = ", ".join(sorted(known)[:5]) or "none"
        raise DataError(f"{path} has no class {missing[0]!r}{more}; it has {some}.")


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _picture(file: bytes, size: int | None) -> np.ndarray:
    from PIL import Image

    opened = Image.open(io.BytesIO(file))
    image = opened.convert("L" if opened.mode in ("1", "L", "I;16") else "RGB")
    if size is not None and image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels
