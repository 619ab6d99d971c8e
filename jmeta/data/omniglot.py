"""Omniglot: 1,623 handwritten characters of 50 alphabets, each drawn by 20 people."""

import io
import zlib
from pathlib import Path

import numpy as np

from jmeta.core import TaskSource
from jmeta.data.cache import cached
from jmeta.data.episodes import from_arrays
from jmeta.data.prepared import prepared
from jmeta.errors import ConfigError, DataError

CHARACTERS = 1623
SPLITS = ("train", "validation", "test")
PROTOCOLS = ("vinyals", "lake", "maml")
# label ids are in the order of the alphabets: five alphabets of the first 1,200 characters validate, the rest test
_VINYALS_VALIDATION = ((26, 67), (131, 177), (250, 272), (465, 487), (728, 769))


def omniglot(
    *,
    split: str = "train",
    ways: int = 5,
    shots: int = 1,
    queries: int = 15,
    protocol: str = "vinyals",
    rotations: bool = True,
    folder: str | Path | None = None,
    seed: int = 0,
    batch: int | None = None,
    query_balance: float | None = None,
) -> TaskSource:
    """N-way K-shot episodes of handwritten characters, 28 x 28 pixels, ink = 1 on 0.

    Read through tensorflow-datasets without TensorFlow. The first call decodes all 32,460 images in some seconds and
    keeps them in jmeta's cache folder (`$JMETA_CACHE`, `$XDG_CACHE_HOME/jmeta` or `~/.cache/jmeta`); later calls read
    them from there.

    Args:
        split: `"train"`, `"validation"` or `"test"`; they share no character, nor rotations of one.
        ways: number of classes of an episode.
        shots: labelled support examples a class.
        queries: query examples a class; every class has 20 examples, so `shots + queries <= 20`.
        protocol: which characters are in which split. `"vinyals"`: the 1,028 / 172 / 423 characters that ProtoNet and
            MAML++ report on. `"lake"`: 964 of the background alphabets to train on and 659 of the evaluation alphabets
            to test on, no validation. `"maml"`: a random 1,100 / 100 / 423, whatever the alphabet.
        rotations: every rotation of a character by 90° is a class of its own, which makes four times as many; one
            episode may hold the same character at two rotations.
        folder: the data folder of tensorflow-datasets, the one that holds `omniglot/`. Default: the first prepared one
            of `$TFDS_DATA_DIR` and `~/tensorflow_datasets`.
        seed: of the random split; only `protocol="maml"` uses it.
        batch: instead of an episode, this many images of all classes at once, see `from_arrays`.
        query_balance: the concentration of the classes' shares of the queries, see `from_arrays`; a class has no more
            than are left of its 20. Default: all alike.

    Returns:
        A source of tasks with `support.inputs` of shape `[ways * shots, 28, 28, 1]` in `[0, 1]`, see `from_arrays`;
        `names` are those of tensorflow-datasets, as `"Greek 7"` and `"Greek 7 rotated 90"` (counter-clockwise).

    Raises:
        DataError: Omniglot is not prepared on this machine, tensorflow-datasets is not installed, the protocol has no
            such split, or a class has fewer than `shots + queries` examples.
        ConfigError: an unknown split or protocol.

    Example:
        >>> import jax, jmeta
        >>> source = jmeta.omniglot(split="test", ways=20, shots=1, queries=5)  # doctest: +SKIP
        >>> source.sample(jax.random.key(0), source.data).query.inputs.shape  # doctest: +SKIP
        (100, 28, 28, 1)

    Differences from the paper: the images are shrunk from 105 x 105 by Pillow's antialiased Lanczos filter to 256 grey
    levels. The code of MAML and of ProtoNet asks Pillow for a filter too, but gives it 1-bit images, which Pillow
    shrinks by the nearest pixel whatever the filter. MAML's split depends on the order of a folder listing and cannot
    be repeated; `"maml"` has its sizes.

    Reference: Lake, Salakhutdinov and Tenenbaum 2015, "Human-level concept learning through probabilistic program
    induction"; splits of Vinyals et al. 2016, section 4.1.1, and Finn et al. 2017, section 5.2.
    """
    characters = _characters(split, protocol, seed)
    images, labels, names = _load(_prepared(folder))
    keep = np.isin(labels, characters)
    turns = range(4 if rotations else 1)
    source = from_arrays(
        np.concatenate([np.rot90(images[keep], turn, axes=(1, 2)) for turn in turns])[..., None],
        np.concatenate([labels[keep] + turn * CHARACTERS for turn in turns]),
        ways=ways,
        shots=shots,
        queries=queries,
        names=[f"{names[i]} rotated {90 * turn}" if turn else str(names[i]) for turn in turns for i in characters],
        batch=batch,
        query_balance=query_balance,
    )
    about = {"data": "omniglot", "split": split, "protocol": protocol, "rotations": rotations}
    return source._replace(protocol={**about, **({"seed": seed} if protocol == "maml" else {}), **source.protocol})


def _characters(split: str, protocol: str, seed: int) -> np.ndarray:
    """The label ids of a split, sorted."""
    for name, value, known in (("split", split, SPLITS), ("protocol", protocol, PROTOCOLS)):
        if value not in known:
            raise ConfigError(f"Omniglot has no {name} {value!r}; choose one of {', '.join(known)}.")
    if protocol == "lake":
        if split == "validation":
            raise DataError("protocol 'lake' has no validation split; use its train or test, or protocol 'vinyals'.")
        return np.arange(0, 964) if split == "train" else np.arange(964, CHARACTERS)
    if protocol == "maml":
        shuffled = np.random.default_rng(seed).permutation(CHARACTERS)
        start, stop = {"train": (0, 1100), "validation": (1100, 1200), "test": (1200, CHARACTERS)}[split]
        return np.sort(shuffled[start:stop])
    validation = np.concatenate([np.arange(*ends) for ends in _VINYALS_VALIDATION])
    train = np.setdiff1d(np.arange(1200), validation)
    return {"train": train, "validation": validation, "test": np.arange(1200, CHARACTERS)}[split]


def _prepared(folder: str | Path | None) -> Path:
    return prepared("omniglot", folder, "Omniglot")


def _load(prepared: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    version = f"{prepared.name}-{zlib.crc32((prepared / 'dataset_info.json').read_bytes()):08x}"
    arrays = cached(f"omniglot-{version}-28-lanczos", lambda: _decode(prepared))
    return arrays["images"], arrays["labels"], arrays["names"]


def _decode(prepared: Path) -> dict[str, np.ndarray]:
    try:
        import tensorflow_datasets as tfds
        from PIL import Image

        builder = tfds.builder_from_directory(prepared)
        # the PNG files as they are: tfds decodes them to 0 and 1 or to 0 and 255, depending on what is installed
        records = builder.as_data_source(decoders={"image": tfds.decode.SkipDecoding()})
    except ImportError as error:
        raise DataError(
            f"Omniglot cannot be read ({error}); run pip install tensorflow-datasets importlib_resources pillow."
        ) from error

    def ink(png: bytes) -> np.ndarray:
        paper = Image.open(io.BytesIO(png)).convert("L")  # Pillow shrinks 1-bit images by the nearest pixel
        return 255 - np.asarray(paper.resize((28, 28), Image.Resampling.LANCZOS))

    images, labels = [], []
    for part in ("train", "test"):
        for record in records[part].__getitems__(range(len(records[part]))):
            images.append(ink(record["image"]))
            labels.append(record["label"])
    names = [name.replace("_", " ") for name in builder.info.features["label"].names]
    return {"images": np.stack(images), "labels": np.asarray(labels, np.int32), "names": np.asarray(names)}
