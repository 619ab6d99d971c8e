"""Omniglot in one file, for a machine without tensorflow-datasets."""

from pathlib import Path

import jax
import numpy as np

import jmeta
from jmeta.data.omniglot import SPLITS


def pack(file: Path) -> None:
    """Omniglot in one file, from where tensorflow-datasets has it: the classes of `jmeta.omniglot`, not rotated."""
    parts = {}
    for split in SPLITS:
        source = jmeta.omniglot(split=split, rotations=False)
        shapes = [(x.shape, x.dtype) for x in jax.tree.leaves(source.data)]
        images = next(x for x in jax.tree.leaves(source.data) if x.ndim == 4)
        if len(images) % 20:
            raise SystemExit(f"Omniglot has 20 drawings a character, these arrays are {shapes}")
        parts[split] = np.packbits(np.asarray(images)[..., 0] > 127, axis=-1)
    np.savez_compressed(file, **parts)  # type: ignore[arg-type]


def packed(file: Path, split: str, *, ways: int = 5, shots: int = 1, queries: int = 15) -> jmeta.TaskSource:
    """The episodes of a file of `pack`, rotations as classes of their own.

    Args:
        file: of `pack`.
        split: train, validation or test.
        ways: classes of an episode.
        shots: support examples a class.
        queries: query examples a class.

    Returns:
        As `jmeta.omniglot`, with ink of 0 or 1.
    """
    images = np.unpackbits(np.load(file)[split], axis=-1)[..., :28] * np.uint8(255)
    turned = np.concatenate([np.rot90(images, turn, axes=(1, 2)) for turn in range(4)])[..., None]
    labels = np.repeat(np.arange(len(turned) // 20), 20)
    source = jmeta.from_arrays(turned, labels, ways=ways, shots=shots, queries=queries)
    about = {"data": "omniglot", "split": split, "protocol": "vinyals", "rotations": True, "ink": "0 or 1"}
    return source._replace(protocol={**about, **source.protocol})
