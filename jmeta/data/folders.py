"""Images in folders, one sub-folder a class."""

import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from jmeta.core import TaskSource
from jmeta.data.episodes import Size, from_arrays
from jmeta.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
_MOST_PIXELS = 2**26  # 8192 x 8192, 200 MB as colours; a file of a few kB may claim more
_OF_SYSTEMS = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")  # hold no classes


class Images(NamedTuple):
    """The images of a folder, rows sorted by class, then by file name.

    Args:
        images: `[n, height, width, channels]`.
        labels: `[n]`, index into `names`; -1 where the folder has no classes.
        files: the file of each image.
        names: the name of each class; empty where the folder has no classes.
    """

    images: UInt8[np.ndarray, "n height width channels"]
    labels: Int[np.ndarray, "n"]
    files: tuple[Path, ...]
    names: tuple[str, ...]


def from_folder(
    folder: str | Path,
    *,
    split: str | None = None,
    ways: Size = 5,
    shots: Size = 1,
    queries: Size = 15,
    size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    invert: bool = False,
    batch: int | None = None,
    min_rows: int | None = None,
    query_balance: float | None = None,
) -> TaskSource:
    """N-way K-shot episodes from images on disk, one sub-folder a class.

    Args:
        folder: holds one sub-folder a class, with the images of that class directly inside; or `train/`,
            `validation/` and `test/`, of which each holds such sub-folders.
        split: which of those three.
        ways: number of classes of an episode, or `(least, most)`.
        shots: labelled support examples a class, or `(least, most)`.
        queries: query examples a class, or `(least, most)`.
        size: pixels, one number or `(height, width)`, see `read_images`. Default: that of the images.
        channels: 1 for greyscale, 3 for RGB. Default: 3 if any image has colours.
        invert: turns black on white into ink = 1 on 0.
        batch: instead of an episode, this many images of all classes at once, see `jmeta.from_arrays`.
        min_rows: classes with fewer images are dropped; `protocol["dropped"]` says how many.
        query_balance: the concentration of the classes' shares of the queries, see `jmeta.from_arrays`. Default: all
            alike.

    Returns:
        A source of tasks with `support.inputs` of shape `[ways * shots, height, width, channels]` in `[0, 1]`, see
        `from_arrays`; `names` are the names of the sub-folders, sorted, and `rows` of the examples index the files of
        `read_images`.

    Raises:
        DataError: the folder has no classes or no such split, an image cannot be read, images of several sizes without
            a `size`, fewer classes than ways, or a class with fewer images than `shots + queries`.

    Example:
        >>> import jax, jmeta, numpy as np, tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> folder = Path(tempfile.mkdtemp())
        >>> for name in ("cat", "dog"):
        ...     (folder / name).mkdir()
        ...     for i in range(2):
        ...         Image.fromarray(np.zeros((40, 40), np.uint8)).save(folder / name / f"{i}.png")
        >>> source = jmeta.from_folder(folder, ways=2, shots=1, queries=1)
        >>> source.names, source.sample(jax.random.key(0), source.data).support.inputs.shape
        (('cat', 'dog'), (2, 40, 40, 1))
    """
    inside = _split_folder(Path(folder).expanduser(), split)
    images, labels, _, names = read_images(
        inside, size=size, channels=channels, invert=invert, empty_classes=min_rows is not None
    )
    if not names:
        raise DataError(f"{folder} holds images but no classes; put the images of each class into a sub-folder.")
    kept = sorted(set(labels.tolist()))
    source = from_arrays(
        images,
        labels,
        ways=ways,
        shots=shots,
        queries=queries,
        names=[names[label] for label in kept],
        batch=batch,
        min_rows=min_rows,
        query_balance=query_balance,
    )
    told = {"data": str(folder), **({"split": split} if split else {}), **source.protocol}
    if len(kept) < len(names):
        told["dropped"] += len(names) - len(kept)
    if min_rows is not None:
        names = tuple(names[label] for label in kept if (labels == label).sum() >= min_rows)
    return source._replace(protocol=told, names=names)


def _split_folder(folder: Path, split: str | None) -> Path:
    """The folder of a split, where there are folders of splits."""
    below = {path.name.lower(): path for path in _entries(folder)[0]}
    known = {name: below[word] for name, words in SPLITS.items() for word in words if word in below}
    if split is not None and split not in known:
        there = f"it has {', '.join(known)}" if known else "it has none"
        raise DataError(f"{folder} has no folder of the split {split!r}: {there}; choose another, or leave it away.")
    if split is not None:
        return known[split]
    if known and len(known) == len(below) and any(_entries(path)[0] for path in below.values()):
        raise DataError(f"{folder} holds the splits {', '.join(known)}; give split={next(iter(known))!r}.")
    return folder


def read_images(
    folder: str | Path,
    *,
    size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    invert: bool = False,
    empty_classes: bool = False,
) -> Images:
    """The images of a folder: with one sub-folder a class, or flat, without classes.

    Files are known by their suffix (png, jpg, jpeg, bmp, gif, webp, tif, tiff); other files and hidden ones are passed
    over. Transparent pixels become white, photographs are turned upright, the first frame of an animation is taken.

    Args:
        folder: holds either sub-folders with images or images.
        size: pixels, one number or `(height, width)`; images of other proportions are stretched. Default: that of the
            images, all of one size.
        channels: 1 for greyscale, 3 for RGB. Default: 3 if any image has colours.
        invert: turns black on white into ink = 255 on 0.
        empty_classes: whether a class may hold no image.

    Returns:
        The images, their labels and files, and the names of the classes.

    Raises:
        DataError: the folder is missing, empty or holds both images and sub-folders, a class holds no image, a file
            cannot be read as an image or claims more than 8192 x 8192 pixels, a link leads out of the folder, or images
            of several sizes without a `size`.

    Example:
        >>> import numpy as np, tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from jmeta.data.folders import read_images
        >>> folder = Path(tempfile.mkdtemp())
        >>> Image.fromarray(np.full((40, 40), 255, np.uint8)).save(folder / "white.png")
        >>> found = read_images(folder, size=8, invert=True)
        >>> found.images.shape, int(found.images.max()), found.labels.tolist(), found.names
        ((1, 8, 8, 1), 0, [-1], ())
    """
    shape = (size, size) if isinstance(size, int) else size
    if channels not in (None, 1, 3) or (shape is not None and min(shape) < 1):
        raise DataError(
            f"images of size {size} and {channels} channels cannot be made; give a size of at least 1, and 1 channel "
            "for greyscale or 3 for RGB."
        )
    folder = Path(folder).expanduser()
    classes, files = _entries(folder)
    if classes and files:
        raise DataError(f"{folder} holds both images and sub-folders; move the images into the folders of a class.")
    if not classes and not files:
        raise DataError(f"{folder} holds no images; give a folder of images or of sub-folders, one a class.")
    labels = [-1] * len(files)
    for label, path in enumerate(classes):
        inside = _entries(path, folder)[1]
        if not inside and not empty_classes:
            raise DataError(f"class folder {path} holds no images ({', '.join(SUFFIXES)}); add some or remove it.")
        files += inside
        labels += [label] * len(inside)
    if not files:
        raise DataError(f"no class folder of {folder} holds images ({', '.join(SUFFIXES)}); add some.")
    read = [_read(file, shape, channels) for file in files]
    if channels is None and any(image.shape[2] == 3 for image in read):
        read = [np.broadcast_to(image, (*image.shape[:2], 3)) for image in read]
    other = next((i for i, image in enumerate(read) if image.shape != read[0].shape), None)
    if other is not None:
        one, two = ("{} x {}".format(*read[i].shape[:2]) for i in (0, other))
        raise DataError(
            f"{files[0]} is {one} pixels and {files[other]} is {two}; give one size for all, as size=84 or --size 84."
        )
    images = np.stack(read)
    return Images(
        255 - images if invert else images,
        np.asarray(labels, np.int32),
        tuple(files),
        tuple(path.name for path in classes),
    )


def _entries(folder: Path, root: Path | None = None) -> tuple[list[Path], list[Path]]:
    """The sub-folders and the image files of a folder, both sorted by name; none of them leads out of the root."""
    if not folder.is_dir():
        raise DataError(f"{folder} is {'not a folder' if folder.exists() else 'missing'}; give a folder of images.")
    shown = sorted(path for path in folder.iterdir() if path.name[0] != "." and path.name not in _OF_SYSTEMS)
    files = [path for path in shown if path.suffix.lower() in SUFFIXES and path.is_file()]
    inside = (root or folder).resolve()
    for path in shown:
        if path.is_symlink() and path.exists() and not path.resolve().is_relative_to(inside):
            raise DataError(f"{path} is a link to {path.resolve()}, out of {root or folder}; put a copy there instead.")
    return [path for path in shown if path.is_dir()], files


def _read(file: Path, shape: tuple[int, int] | None, channels: int | None) -> np.ndarray:
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # told below, with what to do
            opened = Image.open(file)
        with opened:
            if opened.width * opened.height > _MOST_PIXELS:
                raise DataError(
                    f"{file} claims {opened.width} x {opened.height} pixels, more than are read ({_MOST_PIXELS:,}); "
                    "make it smaller or remove it."
                )
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I"):  # 16 bits, which Pillow would clip at 255 instead of scaling
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            mode = image.mode  # that of the picture, before it is laid on white
            if image.has_transparency_data:  # what is under a transparent pixel is as a rule black
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            grey = _is_grey(image, mode) if channels is None else channels == 1
            image = image.convert("L" if grey else "RGB")
            if shape is not None:
                image = image.resize(shape[::-1], Image.Resampling.LANCZOS)
    except DataError:
        raise
    except Exception as error:  # the decoders of Pillow raise nearly anything on a damaged file
        raise DataError(f"{file} cannot be read as an image ({error}); repair or remove it.") from error
    return np.asarray(image).reshape(image.height, image.width, 1 if grey else 3)


def _is_grey(image: Any, mode: str) -> bool:
    """Whether a picture was stored without colours; a palette may hold greys alone."""
    if mode == "P":
        pixels = np.asarray(image.convert("RGB"))
        return bool((pixels == pixels[..., :1]).all())
    return mode in ("1", "L", "LA", "F")
