"""Data of your own from a path: a folder of images, an archive of arrays, a table."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jmeta.core import TaskSource
from jmeta.data.episodes import Size, from_arrays, split_classes
from jmeta.data.groups import from_groups
from jmeta.data.labelled import Division, Labelled, read_archive, read_columns, read_folder
from jmeta.data.text import TokenIds, hashed_text
from jmeta.errors import DataError
from jmeta.inputs import Standardisation


class Own(NamedTuple):
    """Data of your own, divided into splits.

    Args:
        kind: `"classification"`, or `"regression"` where tasks are groups of rows.
        division: the classes, or groups, of each split; no two splits share one.
        rows: the number of rows of each class or group.
        descriptions: kinds of descriptions that the classes have.
        images: whether inputs are images.
        load: `(split=, ways=, shots=, queries=, batch=, descriptions=) -> TaskSource`.
        standardisation: what the numbers of a table were standardised by.
    """

    kind: str
    division: Division
    rows: Mapping[str, int]
    descriptions: tuple[str, ...]
    images: bool
    load: Callable[..., TaskSource]
    standardisation: Standardisation | None = None


def is_path(name: str) -> bool:
    """Whether a name stands for a file or a folder, and not for built-in data."""
    return Path(name).suffix in (".npz", ".csv", ".parquet") or "/" in name or "\\" in name or Path(name).is_dir()


def read_own(
    path: str | Path,
    *,
    split_seed: int = 0,
    size: int | None = None,
    channels: int | None = None,
    group: str | None = None,
    target: str | None = None,
    division: Division | None = None,
) -> Own:
    """Reads data of your own and divides its classes, or groups, into training, validation and test.

    Args:
        path: a folder of images, one sub-folder a class, perhaps inside of `train/`, `validation/` and `test/`; an
            `.npz` with `x` (or `images`, `inputs`) `[n, ...]`, `y` (or `labels`) `[n]`, and perhaps `descriptions`
            `[classes, ...]` in the order of the sorted labels and `split` `[n]`; a `.csv` or `.parquet` table.
        split_seed: of the division of classes where the data has none.
        size: pixels of each side of an image; default: that of the images, all of one size.
        channels: 1 for greyscale, 3 for RGB; default: 3 if any image has colours.
        group: of a table, the column that says which task a row belongs to.
        target: of a table, the column to predict; all other columns are inputs.
        division: a division that was made before, instead of a new one.

    Returns:
        The data.

    Raises:
        DataError: a path that is missing or of another kind, a file that cannot be read, missing columns or arrays, a
            class in two splits, or too few classes to divide.

    Example:
        >>> import numpy as np, tempfile
        >>> from jmeta.data.own import read_own
        >>> file = tempfile.mkdtemp() + "/mine.npz"
        >>> np.savez(file, x=np.random.default_rng(0).normal(size=(90, 4)), y=np.repeat(np.arange(9), 10))
        >>> own = read_own(file)
        >>> own.kind, {split: len(classes) for split, classes in own.division.items()}
        ('classification', {'train': 3, 'validation': 3, 'test': 3})
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise DataError(f"{path} does not exist; give a folder of images, an .npz, a .csv or a .parquet file.")
    if path.suffix not in (".csv", ".parquet"):
        for flag, value in (("--group", group), ("--target", target)):
            if value is not None:
                raise DataError(f"{flag} is for a .csv or .parquet table, and {path} is none; leave it away.")
    if path.is_dir():
        return _classes(path, read_folder(path, size, channels), split_seed, division, True)
    if size is not None or channels is not None:
        raise DataError(f"--size and --channels are for folders of images, and {path} is none; leave them away.")
    if path.suffix == ".npz":
        found = read_archive(path)
        return _classes(path, found, split_seed, division, np.ndim(found.inputs) == 4)
    if path.suffix in (".csv", ".parquet"):
        return _table(path, group, target, split_seed, division)
    raise DataError(f"{path} is no folder, .npz, .csv or .parquet file; convert it into one.")


def divide(names: Sequence[str], seed: int) -> Division:
    """Classes or groups divided at random: a fifth, or five, to each of validation and test, the rest to training.

    Args:
        names: what is divided.
        seed: the same seed gives the same division.

    Returns:
        The names of each split, sorted.

    Raises:
        DataError: fewer than six names.

    Example:
        >>> from jmeta.data.own import divide
        >>> {split: len(names) for split, names in divide([str(i) for i in range(20)], 0).items()}
        {'train': 10, 'validation': 5, 'test': 5}
    """
    if len(names) < 6:
        raise DataError(
            f"there are {len(names)} classes or groups to divide into training, validation and test; give at least 6, "
            "two for each, or divide them yourself, images by folders train/, validation/ and test/, an .npz by an "
            "array split."
        )
    held = max(2, min(5, len(names) // 3), round(len(names) / 5))  # five where they are there, for five ways
    return _parts(names, {"train": len(names) - 2 * held, "validation": held, "test": held}, seed)


def _parts(names: Sequence[str], sizes: Mapping[str, int], seed: int) -> dict[str, list[str]]:
    masks = split_classes(names, [size / len(names) for size in sizes.values()], seed)
    return {split: sorted(np.asarray(names)[mask].tolist()) for split, mask in zip(sizes, masks, strict=True)}


def _classes(path: Path, found: Labelled, split_seed: int, division: Division | None, images: bool) -> Own:
    inputs, labels, names, given, described = found
    if given:
        # an archive's own division is divided further by one seed
        given = given if "validation" in given else _validating(given, split_seed if path.is_dir() else 0)
    division = (given if path.is_dir() else {}) or division or given or divide(names, split_seed)
    index = {name: i for i, name in enumerate(names)}
    # the name of a folder says what is in it; that of a number in an archive says nothing
    texts = [] if described is not None or not any(c.isalpha() for name in names for c in name) else ["text"]
    kinds = (["attributes"] if described is not None else []) + texts
    ids = hashed_text([name.replace("_", " ") for name in names]) if texts else None

    def load(
        *,
        split: str,
        ways: Size,
        shots: Size,
        queries: int,
        batch: int | None = None,
        descriptions: str | None = None,
        query_balance: float | None = None,
        unlabelled: int = 0,
        distractors: int = 0,
    ) -> TaskSource:
        chosen = [name for name in names if name in set(division[split])]
        rows = np.flatnonzero(np.isin(labels, [index[name] for name in chosen]))
        own: Any = None
        if descriptions is not None:
            wanted = [index[name] for name in chosen]
            own = TokenIds(ids[wanted]) if ids is not None else described[wanted]
        source = from_arrays(
            inputs[rows],
            labels[rows],
            ways=ways,
            shots=shots,
            queries=queries,
            batch=batch,
            names=chosen,
            descriptions=own,
            query_balance=query_balance,
            unlabelled=unlabelled,
            distractors=distractors,
        )
        return source._replace(protocol={"data": str(path), **source.protocol})

    count = {name: int((labels == i).sum()) for name, i in index.items()}
    return Own("classification", division, count, tuple(kinds), images, load)


def _validating(division: Division, seed: int) -> Division:
    """Validation classes out of those of training, where the data names none."""
    train = list(division["train"])
    if len(train) < 4:
        raise DataError(
            f"the training split has {len(train)} classes, of which two at least are needed for validation; give four "
            "or more, or a split of its own for validation."
        )
    held = max(2, round(len(train) / 5))
    return {**_parts(train, {"train": len(train) - held, "validation": held}, seed), "test": division["test"]}


def _table(path: Path, group: str | None, target: str | None, split_seed: int, division: Division | None) -> Own:
    columns = read_columns(path)
    for flag, name in (("--group", group), ("--target", target)):
        if name is None:
            what = "tells the task of a row" if flag == "--group" else "is to be predicted"
            raise DataError(f"{path} is a table; say by {flag} COLUMN which of {', '.join(columns)} {what}.")
        if name not in columns:
            raise DataError(f"{path} has no column {name!r} for {flag}; it has {', '.join(columns)}.")
    features = [name for name in columns if name not in (group, target)]
    if not features:
        raise DataError(f"{path} has no column beside {group!r} and {target!r} to predict from; add one.")
    inputs = np.stack([_numbers(path, name, columns[name]) for name in features], axis=1)
    y = _numbers(path, str(target), columns[str(target)])
    groups = np.asarray([str(value) for value in columns[str(group)]])
    names, count = np.unique(groups, return_counts=True)
    chosen = division or divide(names.tolist(), split_seed)
    training = np.isin(groups, list(chosen["train"]))
    # rates that suit numbers near 1 suit all tables; the scale is that of the training groups
    spread, spread_of_target = inputs[training].std(axis=0), float(y[training].std())
    by = Standardisation(
        inputs[training].mean(axis=0).tolist(),
        np.where(spread > 0, spread, 1.0).tolist(),
        float(y[training].mean()),
        spread_of_target or 1.0,
    )
    inputs, y = np.asarray(by.inputs(inputs)), np.asarray(by.targets(y))

    def load(*, split: str, shots: int, queries: int) -> TaskSource:
        rows = np.isin(groups, list(chosen[split]))
        source = from_groups(inputs[rows], y[rows], groups[rows], shots=shots, queries=queries)
        about = {"data": str(path), "target_spread": by.target_spread}
        return source._replace(protocol={**about, **source.protocol})

    rows = dict(zip(names.tolist(), count.tolist(), strict=True))
    return Own("regression", chosen, rows, (), False, load, by)


def _numbers(path: Path, name: str, values: Sequence[Any]) -> np.ndarray:
    try:
        numbers = np.asarray([float(value) for value in values], np.float32)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"column {name!r} of {path} holds text or nothing where numbers are read; turn it into numbers, or "
            "leave it out of the table."
        ) from error
    if not np.isfinite(numbers).all():
        row = int(np.argmin(np.isfinite(numbers))) + 2
        raise DataError(f"line {row} of {path} has no finite number in column {name!r}; repair or remove the line.")
    return numbers
