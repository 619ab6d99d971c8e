"""Few-shot episodes from features that another model computed."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Array

from jmeta.core import TaskSource
from jmeta.data.descriptions import Descriptions, of_classes
from jmeta.data.episodes import Size, from_arrays
from jmeta.data.labelled import read_archive
from jmeta.errors import DataError


def from_embeddings(
    embeddings: np.ndarray | Array | str | Path,
    labels: np.ndarray | Array | Sequence[int] | None = None,
    descriptions: Descriptions | None = None,
    *,
    split: str | None = None,
    ways: Size = 5,
    shots: Size = 1,
    queries: Size = 15,
    names: Sequence[str] = (),
    batch: int | None = None,
    min_rows: int | None = None,
    query_balance: float | None = None,
    unlabelled: int = 0,
    distractors: int = 0,
) -> TaskSource:
    """N-way K-shot episodes from precomputed embeddings (CLIP, sentence-transformers, a network of your own).

    Args:
        embeddings: `[n, features]`, of images, texts, molecules; no row of zeros, which has no direction for a cosine.
            Or the file of `jmeta embed`, an `.npz` with `x`, `y` and perhaps `descriptions` and `split`, which has
            labels, names and descriptions as well.
        labels: `[n]`, any integers, in any order.
        descriptions: `[classes, width]` in the order of the sorted distinct labels, or a mapping from each label to its
            description: embeddings of the classes' names, or attributes.
        split: of a file that is divided, `"train"`, `"validation"` or `"test"`; default: all of it.
        ways: number of classes of an episode, or `(least, most)`.
        shots: labelled support examples a class, or `(least, most)`; 0 with descriptions.
        queries: query examples a class, or `(least, most)`.
        names: the name of each class, in the order of the sorted distinct labels.
        batch: instead of an episode, this many embeddings of all classes at once, see `jmeta.from_arrays`.
        min_rows: classes with fewer rows are dropped, see there.
        query_balance: the concentration of the classes' shares of the queries, see there. Default: all alike.
        unlabelled: examples a class without a label in the support, see there.
        distractors: further classes that have some, see there.

    Returns:
        A source of tasks, see `jmeta.from_arrays`. `jmeta.linen(jmeta.MLP(outputs=None, hidden=(256,)))` is a model for
        them, and `jmeta.identity()` one that takes them as they are.

    Raises:
        DataError: embeddings that are no matrix or have a row of zeros, a file that cannot be read or has no such
            split, arrays without labels or a file with labels beside, and all that `jmeta.from_arrays` refuses.

    Example:
        >>> import jax, jmeta, numpy as np
        >>> random = np.random.default_rng(0)
        >>> names = random.normal(size=(6, 32))  # one embedding a class
        >>> source = jmeta.from_embeddings(random.normal(size=(120, 64)), np.repeat(np.arange(6), 20), names)
        >>> task = source.sample(jax.random.key(0), source.data)
        >>> task.support.inputs.shape, task.support.descriptions.shape
        ((5, 64), (5, 32))
    """
    if isinstance(embeddings, str | Path):
        if labels is not None:
            raise DataError(f"{embeddings} is a file, which has its labels; leave labels= away.")
        embeddings, labels, descriptions, names = _of_file(Path(embeddings).expanduser(), split, descriptions, names)
    elif labels is None or split is not None:
        raise DataError("arrays need labels and have no split; give labels [n], or the file of `jmeta embed`.")
    embeddings = np.asarray(embeddings)
    if embeddings.ndim != 2:
        raise DataError(f"embeddings have shape {list(embeddings.shape)}; give a matrix [n, features].")
    zero = np.flatnonzero(~embeddings.any(axis=1))
    if len(zero):
        raise DataError(
            f"embedding {zero[0]} is all zeros, which has no direction for a cosine; drop the row, or use from_arrays "
            "with a Euclidean distance."
        )
    return from_arrays(
        embeddings.astype(np.float32),
        labels,
        ways=ways,
        shots=shots,
        queries=queries,
        names=names,
        descriptions=descriptions,
        batch=batch,
        min_rows=min_rows,
        query_balance=query_balance,
        unlabelled=unlabelled,
        distractors=distractors,
    )


def _of_file(
    path: Path, split: str | None, descriptions: Descriptions | None, names: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, Descriptions | None, Sequence[str]]:
    """Rows, labels, descriptions and names of one split of a file; given descriptions and names are of all classes."""
    found = read_archive(path)
    names, described = names or found.names, found.descriptions if descriptions is None else descriptions
    if split is None:
        return found.inputs, found.labels, described, names
    if split not in found.division:
        there = f"it has {', '.join(found.division)}" if found.division else "it has none"
        raise DataError(f"{path} has no split {split!r}: {there}; choose another, or leave it away.")
    kept = np.isin(found.names, list(found.division[split]))
    chosen = np.flatnonzero(kept).tolist()
    rows, described = np.isin(found.labels, chosen), of_classes(kept, described)
    return found.inputs[rows], found.labels[rows], described, [names[i] for i in chosen]
