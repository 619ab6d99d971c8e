"""Characters of the fonts that matplotlib ships: a few-shot data set that needs no download."""

import functools
import hashlib
import math
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from jaxtyping import Array, Float, Int, Key, UInt8
from matplotlib.ft2font import FT2Font, LoadFlags

from jmeta.core import TaskSource
from jmeta.data.cache import cached
from jmeta.data.episodes import Size, from_arrays
from jmeta.data.text import TokenIds, hashed_text
from jmeta.errors import ConfigError
from jmeta.kinds import Similar

SPLITS = ("train", "validation", "test")
KINDS = ("attributes", "text", "similar")
DESCRIPTIONS = (*KINDS, "similar+attributes")

FORMAT = 1  # raise it when the code that renders changes, so that old cache files are left alone
FACES = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
)
ASCII_FACES = ("cmr10", "cmb10", "cmss10", "cmti10", "cmtt10", "cmmi10")  # their charmaps are wrong beyond ASCII
LEAST_FACES = 12
SIMILAR = 4  # faces of each similar character
SIZE, CAP_HEIGHT, BASELINE = 28, 12, 20  # pixels; every glyph then fits with a margin
LOOK_ALIKE = 0.01  # of the ink; a capital U with breve and one with caron differ by more
LARGE_FAMILY, LEAST_MEMBERS = 15, 5
SHARES = (0.64, 0.16, 0.20)

ANGLE, SCALE, SHEAR, SHIFT = math.radians(15), (0.75, 1.15), 0.25, 3.0


class Glyphs(NamedTuple):
    """The rendered characters, rows sorted by class.

    Args:
        images: `[rows, 28, 28, 1]`, ink is 255 on 0.
        labels: `[rows]`, the class of each row.
        names: the Unicode name of each class ("LATIN SMALL LETTER A WITH ACUTE").
        families: `[classes]`, the base letter of each class; a family is one letter with all of its diacritics.
        splits: `[classes]`, 0 train, 1 validation, 2 test.
    """

    images: UInt8[np.ndarray, "rows 28 28 1"]
    labels: Int[np.ndarray, "rows"]
    names: tuple[str, ...]
    families: Int[np.ndarray, "classes"]
    splits: Int[np.ndarray, "classes"]


def glyphs(
    *,
    split: str = "train",
    ways: Size = 5,
    shots: Size = 1,
    queries: int = 15,
    confusable: bool = False,
    descriptions: str | None = None,
    batch: int | None = None,
    query_balance: float | None = None,
    unlabelled: int = 0,
    distractors: int = 0,
) -> TaskSource:
    """N-way K-shot episodes of characters, each drawn from a random font face under a random affine warp.

    A class is a character, an instance is a face of it under `warp`. Classes of the three splits are disjoint, but a
    base letter and its diacritics occur in all of them, so that an unseen character can be described by seen parts.

    Args:
        split: `"train"`, `"validation"` or `"test"`.
        ways: number of classes of an episode, or `(least, most)`.
        shots: labelled support examples a class, or `(least, most)`; 0 with descriptions.
        queries: query examples a class.
        confusable: draw all classes of an episode from one family, a base letter with its diacritics.
        descriptions: what describes each class in the support, made of its Unicode name: `"attributes"`, see
            `glyph_attributes`, `"text"`, the hashed n-grams of the name, see `jmeta.hashed_text`, or `"similar"`,
            images of two characters of training, see `relatives`; several with a plus between them, as
            `"similar+attributes"`.
        batch: instead of an episode, this many images of all classes at once, see `from_arrays`.
        query_balance: the concentration of the classes' shares of the queries, see `from_arrays`. Default: all alike.
        unlabelled: examples a class without a label in the support, see `from_arrays`.
        distractors: further classes that have some, see `from_arrays`.

    Returns:
        A source of tasks with images `[n, 28, 28, 1]` in `[0, 1]`; `names` holds the Unicode name of each class.

    Raises:
        ConfigError: an unknown split or kind of descriptions.
        DataError: more ways than the split has classes, or, when confusable, than its largest family has.

    Example:
        >>> import jax, jmeta
        >>> source = jmeta.glyphs(ways=5, shots=1, queries=15)
        >>> task = source.sample(jax.random.key(0), source.data)
        >>> task.support.inputs.shape, task.query.inputs.shape
        ((5, 28, 28, 1), (75, 28, 28, 1))

    Differences: a class has 12 to 22 faces. Where an episode may take more of a class, every face of the class is
    stored as often as needed, so that a face may recur within an episode, each time under a warp of its own.
    """
    if split not in SPLITS:
        raise ConfigError(f"split is {split!r}; choose one of {', '.join(SPLITS)}.")
    if descriptions is not None and not set(descriptions.split("+")) <= set(KINDS):
        raise ConfigError(f"descriptions is {descriptions!r}; choose one of {', '.join(DESCRIPTIONS)}, or None.")

    def most(size: Size) -> int:
        return size if isinstance(size, int) else size[1]

    data = load_glyphs()
    mine = data.splits == SPLITS.index(split)
    asked = queries if query_balance is None else queries * most(ways)  # one class may have all of them
    examples = max(1, most(shots)) + unlabelled + asked
    repeats = np.maximum(1, -(-examples // np.bincount(data.labels)))
    rows = np.repeat(np.arange(len(data.labels)), np.where(mine, repeats, 0)[data.labels])
    return from_arrays(
        data.images[rows],
        data.labels[rows],
        ways=ways,
        shots=shots,
        queries=queries,
        names=[name for name, chosen in zip(data.names, mine, strict=True) if chosen],
        families=data.families[mine] if confusable else None,
        descriptions=None if descriptions is None else _described(data, descriptions.split("+"), mine),
        transform=warp,
        batch=batch,
        query_balance=query_balance,
        unlabelled=unlabelled,
        distractors=distractors,
    )


def glyph_attributes(names: Sequence[str]) -> Float[np.ndarray, "classes attributes"]:
    """What a Unicode name says about a character, as ones and zeros.

    "LATIN SMALL LETTER A WITH DIAERESIS AND MACRON" has the script LATIN, the case SMALL, the base A, the cased base
    SMALL A, the base of its script LATIN SMALL A, and the marks DIAERESIS and MACRON; every word is an attribute as
    well (BELOW in DOT BELOW). Marks recur on other letters, so that most unseen characters consist of seen attributes.

    Args:
        names: all names whose attributes are to be compared; together they decide which attributes there are.

    Returns:
        `[classes, attributes]`, float32, sorted by attribute.

    Example:
        >>> from jmeta.data.glyphs import glyph_attributes
        >>> glyph_attributes(["LATIN SMALL LETTER A", "LATIN SMALL LETTER B"]).sum(axis=1).tolist()
        [7.0, 7.0]
    """
    sets = [_attributes(name) for name in names]
    index = {attribute: i for i, attribute in enumerate(sorted(set.union(*sets)))}
    table = np.zeros((len(sets), len(index)), np.float32)
    for row, attributes in zip(table, sets, strict=True):
        row[[index[attribute] for attribute in attributes]] = 1.0
    return table


def _attributes(name: str) -> set[str]:
    before, _, after = name.partition(" WITH ")
    words = before.split()
    script, rest = words[0], [word for word in words[1:] if word not in ("CAPITAL", "SMALL", "LETTER")]
    case = next((word for word in words if word in ("CAPITAL", "SMALL")), "")
    base, marks = " ".join(rest), after.split(" AND ") if after else []
    return {
        f"script {script}",
        f"case {case}",
        f"base {base}",
        f"cased {case} {base}",
        f"whole {before}",
        *(f"mark {mark}" for mark in marks),
        *(f"word {word}" for word in (*rest, *(word for mark in marks for word in mark.split()))),
        *(f"marked {case} {mark}" for mark in marks),
    } | ({"plain"} if not marks else set())


def _described(data: Glyphs, kinds: Sequence[str], mine: np.ndarray) -> Any:
    """The descriptions of the classes of one split; a dictionary of several kinds, or of two similar characters."""
    found: dict[str, Any] = {}
    if "attributes" in kinds:
        found["attributes"] = glyph_attributes(data.names)[mine]
    if "text" in kinds:
        found["text"] = TokenIds(hashed_text(data.names)[mine])
    if "similar" in kinds:
        first, count = np.unique(data.labels, return_index=True, return_counts=True)[1:]
        for name, other in relatives(data).items():
            faces = first[other, None] + np.linspace(0, count[other] - 1, SIMILAR, axis=1).astype(int)
            images = data.images[faces] * (other >= 0)[:, None, None, None, None].astype(np.uint8)
            found[name] = Similar(images[mine], other[mine] + 1)
    return next(iter(found.values())) if len(found) == 1 else found


def relatives(data: Glyphs) -> dict[str, Int[np.ndarray, "classes"]]:
    """For each character two similar ones of training that are not itself: one of its base, and one with its marks.

    The first shares most of script, case and base letter, and has the fewest marks; the second shares most marks, has
    the fewest others, and another base.

    Args:
        data: of `load_glyphs`.

    Returns:
        The number of a class for each under `"base"` and `"mark"`, -1 where no character shares a mark.

    Example:
        >>> from jmeta.data.glyphs import load_glyphs, relatives
        >>> data = load_glyphs()
        >>> other = relatives(data)["mark"][data.names.index("LATIN CAPITAL LETTER A WITH GRAVE")]
        >>> "WITH GRAVE" in data.names[other]
        True
    """
    sets = [_attributes(name) for name in data.names]
    index = {name: i for i, name in enumerate(sorted(set.union(*sets)))}
    table = np.zeros((len(sets), len(index)), np.float32)  # counts are exact, and sums of products quick
    for row, attributes in zip(table, sets, strict=True):
        row[[index[attribute] for attribute in attributes]] = 1
    of_marks = np.asarray([name.startswith(("mark ", "marked ")) for name in index], dtype=bool)
    base, marks = table[:, ~of_marks], table[:, of_marks]
    few = marks.sum(axis=1)[None]
    unknown = np.eye(len(sets), dtype=bool) | (data.splits != 0)[None]
    alike, marked = base @ base.T, marks @ marks.T
    by_base = np.where(unknown, -1, 100 * alike - few + 100).argmax(axis=1)
    other_base = unknown | (data.families[:, None] == data.families[None])
    by_mark = np.where(other_base | (marked == 0), -1, 10_000 * marked - 100 * few + alike)
    return {"base": by_base, "mark": np.where(by_mark.max(axis=1) < 0, -1, by_mark.argmax(axis=1))}


def warp(
    key: Key[Array, ""], images: Float[Array, "n height width channels"]
) -> Float[Array, "n height width channels"]:
    """A random affine map of each image: rotation, scale, shear and shift, bilinear, zero outside.

    A point at the offset `p` from the centre moves to `s R(α) K(k) p + t`, each parameter uniform: the angle
    `|α| ≤ 15°`, the scale `0.75 ≤ s ≤ 1.15`, the shear `|k| ≤ 0.25`, and the shift `|t| ≤ 3` pixels along each axis.

    Args:
        key: draws the parameters.
        images: `[n, height, width, channels]`.

    Returns:
        The images, same shape and dtype.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jmeta.data.glyphs import warp
        >>> warp(jax.random.key(0), jnp.ones((3, 28, 28, 1))).shape
        (3, 28, 28, 1)
    """
    low = jnp.array([[-ANGLE, SCALE[0], -SHEAR, -SHIFT, -SHIFT]])
    high = jnp.array([[ANGLE, SCALE[1], SHEAR, SHIFT, SHIFT]])
    angle, scale, shear, down, right = jax.random.uniform(key, (len(images), 5), minval=low, maxval=high).T
    cos, sin = jnp.cos(angle) / scale, jnp.sin(angle) / scale
    inverse = jnp.stack([cos + shear * sin, sin - shear * cos, -sin, cos], axis=-1).reshape(-1, 2, 2)
    return _affine(images, inverse, jnp.stack([down, right], axis=-1))


def _affine(
    images: Float[Array, "n height width channels"], matrices: Float[Array, "n 2 2"], shifts: Float[Array, "n 2"]
) -> Float[Array, "n height width channels"]:
    """Each pixel at the offset `p` (row, column) from the centre becomes the image at `matrix @ (p - shift)`."""
    middle = [(size - 1) / 2 for size in images.shape[1:3]]
    rows, columns = jnp.indices(images.shape[1:3], dtype=jnp.float32)

    def one(image: Array, matrix: Array, shift: Array) -> Array:
        down, right = rows - middle[0] - shift[0], columns - middle[1] - shift[1]
        # written out, because accelerators multiply matrices in reduced precision
        source = [matrix[i, 0] * down + matrix[i, 1] * right + middle[i] for i in range(2)]
        interpolate = functools.partial(jax.scipy.ndimage.map_coordinates, coordinates=source, order=1)
        return jax.vmap(interpolate, in_axes=-1, out_axes=-1)(image)

    return jax.vmap(one)(images.astype(jnp.float32), matrices, shifts).astype(images.dtype)


def load_glyphs() -> Glyphs:
    """All characters in all faces, rendered once and then read from a file.

    Letters (Unicode category L) that at least 12 faces of DejaVu and STIX have; the letters of ASCII also in six faces
    of Computer Modern. All glyphs of a face have one scale, which makes its capital H 12 pixels high, and one baseline;
    they are centred horizontally. Characters that look the same in every face that has both (Latin A, Greek Alpha; less
    than 1 % of the squared ink differs) are one class under the name of the first; Cyrillic A, which differs in the
    serif faces, is a class of its own. About 61 % of the classes are for training, 18 % for validation and 21 % for
    testing, in an order fixed by a hash of the name; a family of 15 or more gives at least five classes to each.
    Rendering takes a few seconds, and the result is kept in the cache folder, see `jmeta.data.cache.cached`.

    Returns:
        The images with their labels, names, families and splits. The set depends on the versions of matplotlib and of
        Python's Unicode tables, which are part of the file's name.

    Example:
        >>> from jmeta.data.glyphs import load_glyphs
        >>> load_glyphs().names[0]
        'LATIN CAPITAL LETTER A'

    Source: the DejaVu, STIX and Computer Modern fonts that matplotlib ships; names from the Unicode Character Database.
    """
    choices = (FACES, ASCII_FACES, LEAST_FACES, SIZE, CAP_HEIGHT, BASELINE, LOOK_ALIKE, LARGE_FAMILY, LEAST_MEMBERS)
    digest = hashlib.sha256(repr((*choices, SHARES, unicodedata.unidata_version)).encode()).hexdigest()[:12]
    arrays = cached(f"glyphs-v{FORMAT}-matplotlib-{matplotlib.__version__}-{digest}", _render)
    names = tuple(arrays["names"].tolist())
    return Glyphs(arrays["images"], arrays["labels"], names, arrays["families"], arrays["splits"])


def _render() -> dict[str, np.ndarray]:
    bitmaps: dict[int, dict[str, np.ndarray]] = {}
    for face in (*FACES, *ASCII_FACES):
        for code, bitmap in _draw(face):
            bitmaps.setdefault(code, {})[face] = bitmap
    codes = sorted(code for code, faces in bitmaps.items() if len(faces) >= LEAST_FACES)
    classes: dict[int, dict[str, np.ndarray]] = {}
    for code, first in zip(codes, _look_alikes([bitmaps[code] for code in codes]), strict=True):
        classes[codes[first]] = bitmaps[code] | classes.get(codes[first], {})
    names = [unicodedata.name(chr(code)) for code in classes]
    families = np.unique([_base(code) for code in classes], return_inverse=True)[1].astype(np.int32)
    return dict(
        images=np.stack([bitmap for faces in classes.values() for bitmap in faces.values()])[..., None],
        labels=np.repeat(np.arange(len(classes), dtype=np.int32), [len(faces) for faces in classes.values()]),
        names=np.array(names),
        families=families,
        splits=_split(names, families),
    )


def _draw(face: str) -> Iterator[tuple[int, np.ndarray]]:
    font = FT2Font(Path(matplotlib.get_data_path(), "fonts", "ttf", f"{face}.ttf"))
    font.set_size(100, 72)
    height = font.load_char(ord("H"), flags=LoadFlags.NO_HINTING).bbox[3] / 64
    font.set_size(100 * CAP_HEIGHT / height, 72)
    for code in sorted(font.get_charmap()):
        if not unicodedata.category(chr(code)).startswith("L") or (face in ASCII_FACES and code > 127):
            continue
        glyph = font.load_char(code, flags=LoadFlags.NO_HINTING)
        left, _, right, top = (edge / 64 for edge in glyph.bbox)
        bitmap = np.zeros((SIZE, SIZE), np.uint8)
        column = (SIZE - (math.ceil(right) - math.floor(left))) // 2 - math.floor(left)
        font.draw_glyph_to_bitmap(bitmap, column, BASELINE - math.ceil(top), glyph)
        if bitmap.any():
            yield code, bitmap


def _look_alikes(bitmaps: list[dict[str, np.ndarray]]) -> list[int]:
    """For each character the first one that looks like it in every face that has both."""
    blank = np.zeros((SIZE, SIZE), np.uint8)
    alike = np.ones((len(bitmaps), len(bitmaps)), bool)
    for face in (*FACES, *ASCII_FACES):
        # float64 holds these integers exactly, so that the classes are the same on every machine
        pixels = np.stack([faces.get(face, blank).ravel() for faces in bitmaps]).astype(np.float64)
        ink = np.square(pixels).sum(axis=1)
        least = np.minimum(ink[:, None], ink)
        alike &= (least == 0) | (ink[:, None] + ink - 2 * pixels @ pixels.T <= LOOK_ALIKE * least)
    first: list[int] = alike.argmax(axis=1).tolist()
    for i, j in enumerate(first):
        first[i] = first[j]
    return first


def _base(code: int) -> str:
    return unicodedata.name(unicodedata.normalize("NFD", chr(code))[0]).split(" WITH ")[0]


def _split(names: list[str], families: Int[np.ndarray, "classes"]) -> Int[np.ndarray, "classes"]:
    """Each large family is divided on its own, all other classes together."""
    order = np.argsort([hashlib.sha256(name.encode()).hexdigest() for name in names])
    group = np.where(np.bincount(families)[families] >= LARGE_FAMILY, families, -1)
    splits = np.zeros(len(names), np.int32)
    for members in (order[group[order] == g] for g in np.unique(group)):
        validation, test = (max(LEAST_MEMBERS, round(share * len(members))) for share in SHARES[1:])
        splits[members[:validation]] = 1
        splits[members[validation : validation + test]] = 2
    return splits
