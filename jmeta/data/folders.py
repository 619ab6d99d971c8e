"""Images in folders, one sub-folder a class."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from jmeta.core import TaskSource
from jmeta.data.episodes import from_arrays
from jmeta.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")


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
    ways: int = 5,
    shots: int = 1,
    queries: int = 15,
    size: int | tuple[int, int] = 28,
    channels: int = 1,
    invert: bool = False,
) -> TaskSource:
    """N-way K-shot episodes from images on disk, one sub-folder a class.

    Args:
        folder: holds one sub-folder a class, with the images of that class directly inside.
        ways: number of classes of an episode.
        shots: labelled support examples a class.
        queries: query examples a class.
        size: pixels, one number or `(height, width)`, see `read_images`.
        channels: 1 for greyscale, 3 for RGB.
        invert: turns black on white into ink = 1 on 0.

    Returns:
        A source of tasks with `support.inputs` of shape `[ways * shots, height, width, channels]` in `[0, 1]`, see
        `from_arrays`; `names` are the names of the sub-folders, sorted.

    Raises:
        DataError: the folder has no classes, an image cannot be read, fewer classes than ways, or a class with fewer
            images than `shots + queries`.

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
        (('cat', 'dog'), (2, 28, 28, 1))
    """
    images, labels, _, names = read_images(folder, size=size, channels=channels, invert=invert)
    if not names:
        raise DataError(f"{folder} holds images but no classes; put the images of each class into a sub-folder.")
    source = from_arrays(images, labels, ways=ways, shots=shots, queries=queries, names=names)
    return source._replace(protocol={"data": str(folder), **source.protocol})


def read_images(
    folder: str | Path, *, size: int | tuple[int, int] = 28, channels: int = 1, invert: bool = False
) -> Images:
    """The images of a folder: with one sub-folder a class, or flat, without classes.

    Files are known by their suffix (png, jpg, jpeg, bmp, gif, webp, tif, tiff); other files and hidden ones are passed
    over. Transparent pixels become white, photographs are turned upright, the first frame of an animation is taken.

    Args:
        folder: holds either sub-folders with images or images.
        size: pixels, one number or `(height, width)`; images of other proportions are stretched.
        channels: 1 for greyscale, 3 for RGB.
        invert: turns black on white into ink = 255 on 0.

    Returns:
        The images, their labels and files, and the names of the classes.

    Raises:
        DataError: the folder is missing, empty or holds both images and sub-folders, a class holds no image, or a file
            cannot be read as an image.

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
    height, width = (size, size) if isinstance(size, int) else size
    if channels not in (1, 3) or min(height, width) < 1:
        raise DataError(
            f"images of {height} x {width} pixels and {channels} channels cannot be made; give a size of at least 1, "
            "and 1 channel for greyscale or 3 for RGB."
        )
    folder = Path(folder).expanduser()
    classes, files = _entries(folder)
    if classes and files:
        raise DataError(f"{folder} holds both images and sub-folders; move the images into the folders of a class.")
    if not classes and not files:
        raise DataError(f"{folder} holds no images; give a folder of images or of sub-folders, one a class.")
    labels = [-1] * len(files)
    for label, path in enumerate(classes):
        inside = _entries(path)[1]
        if not inside:
            raise DataError(f"class folder {path} holds no images ({', '.join(SUFFIXES)}); add some or remove it.")
        files += inside
        labels += [label] * len(inside)
    images = np.stack([_read(file, height, width, channels) for file in files])
    return Images(
        255 - images if invert else images,
        np.asarray(labels, np.int32),
        tuple(files),
        tuple(path.name for path in classes),
    )


def _entries(folder: Path) -> tuple[list[Path], list[Path]]:
    """The sub-folders and the image files of a folder, both sorted by name."""
    if not folder.is_dir():
        raise DataError(f"{folder} is {'not a folder' if folder.exists() else 'missing'}; give a folder of images.")
    shown = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    files = [path for path in shown if path.suffix.lower() in SUFFIXES and path.is_file()]
    return [path for path in shown if path.is_dir()], files


def _read(file: Path, height: int, width: int, channels: int) -> np.ndarray:
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I"):  # 16 bits, which Pillow would clip at 255 instead of scaling
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.has_transparency_data:  # what is under a transparent pixel is as a rule black
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            image = image.convert("L" if channels == 1 else "RGB")
            image = image.resize((width, height), Image.Resampling.LANCZOS)
    except Exception as error:  # the decoders of Pillow raise nearly anything on a damaged file
        raise DataError(f"{file} cannot be read as an image ({error}); repair or remove it.") from error
    return np.asarray(image).reshape(height, width, channels)
