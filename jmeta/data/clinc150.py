"""CLINC150: 150 intents of what people ask an assistant, for few-shot classification of text."""

import functools
import json
import lzma
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from jmeta.core import TaskSource
from jmeta.data.episodes import Size, from_arrays
from jmeta.data.text import TokenIds, hashed_text
from jmeta.errors import ConfigError, DataError

SPLITS = {"train": "train", "validation": "valid", "test": "test"}
FOLDS = ("01", "02", "03", "04", "05")
WIDTH, NAME_WIDTH = 128, 64  # token ids a row; longer utterances (1 % of them) are cut, n-grams first


class Clinc150(NamedTuple):
    """The utterances of one class split.

    Args:
        texts: what people say.
        labels: `[rows]`, the intent of each text.
        intents: the names of the intents in words, "pay bill".
        out_of_scope: texts that belong to no intent.
    """

    texts: tuple[str, ...]
    labels: Int[np.ndarray, "rows"]
    intents: tuple[str, ...]
    out_of_scope: tuple[str, ...]


def clinc150(
    *,
    split: str = "train",
    ways: Size = 5,
    shots: Size = 1,
    queries: int = 15,
    fold: int = 1,
    descriptions: str | None = None,
    folder: str | Path | None = None,
    batch: int | None = None,
    query_balance: float | None = None,
    unlabelled: int = 0,
    distractors: int = 0,
) -> TaskSource:
    """N-way K-shot episodes of utterances: which of some intents does a person mean?

    150 intents of 10 domains with 150 utterances each; 50 of the intents are to train on, 50 to validate, 50 to test,
    divided in five ways.

    Args:
        split: `"train"`, `"validation"` or `"test"`; they share no intent.
        ways: number of intents of an episode, or `(least, most)`.
        shots: labelled support utterances an intent, or `(least, most)`; 0 with descriptions.
        queries: query utterances an intent.
        fold: which division of the intents, 1 to 5.
        descriptions: `"text"` puts the name of each intent into the support.
        folder: where `data_full.json.xz` (or `data_full.json`) and `few_shot_class_splits.json` lie. Default:
            `$CLINC150_DIR`.
        batch: instead of an episode, this many utterances of all intents at once, see `jmeta.from_arrays`.
        query_balance: the concentration of the intents' shares of the queries, see there. Default: all alike.
        unlabelled: utterances an intent without a label in the support, see there.
        distractors: further intents that have some, see there.

    Returns:
        A source of tasks whose inputs are token ids `[n, 128]` of `jmeta.hashed_text`, and whose descriptions are those
        of the intents' names `[ways, 64]`; `names` holds the names.

    Raises:
        DataError: the data are not on this machine.
        ConfigError: an unknown split, fold or kind of descriptions.

    Example:
        >>> import jax, jmeta
        >>> source = jmeta.clinc150(split="test", ways=5, shots=1)  # doctest: +SKIP
        >>> source.sample(jax.random.key(0), source.data).query.inputs.shape  # doctest: +SKIP
        (75, 128)

    Reference: Larson et al. 2019, "An Evaluation Dataset for Intent Classification and Out-of-Scope Prediction",
    https://aclanthology.org/D19-1131. The division of the intents for few-shot learning comes with the data folder.
    """
    if descriptions not in ("text", None):
        raise ConfigError(f"descriptions is {descriptions!r}; give 'text' or None.")
    data = load_clinc150(split=split, fold=fold, folder=folder)
    return from_arrays(
        hashed_text(data.texts, width=WIDTH),
        data.labels,
        ways=ways,
        shots=shots,
        queries=queries,
        names=data.intents,
        descriptions=TokenIds(hashed_text(data.intents, width=NAME_WIDTH)) if descriptions else None,
        batch=batch,
        query_balance=query_balance,
        unlabelled=unlabelled,
        distractors=distractors,
    )


def load_clinc150(*, split: str = "train", fold: int = 1, folder: str | Path | None = None) -> Clinc150:
    """The texts of one split of the intents, and those out of scope; arguments as in `clinc150`.

    Out of scope are the utterances that the data keep for the same purpose: 100 to train, 100 to validate, 1,000 to
    test.
    """
    if split not in SPLITS:
        raise ConfigError(f"split is {split!r}; choose one of {', '.join(SPLITS)}.")
    if not 1 <= fold <= len(FOLDS):
        raise ConfigError(f"fold is {fold}; give 1 to {len(FOLDS)}.")
    texts, folds = _read(_folder(folder))
    intents = sorted(folds[FOLDS[fold - 1]][SPLITS[split]])
    index = {intent: i for i, intent in enumerate(intents)}
    rows = [
        (text, index[intent]) for part in ("train", "val", "test") for text, intent in texts[part] if intent in index
    ]
    outside = texts[{"train": "oos_train", "validation": "oos_val", "test": "oos_test"}[split]]
    return Clinc150(
        tuple(text for text, _ in rows),
        np.asarray([label for _, label in rows], np.int32),
        tuple(intent.replace("_", " ") for intent in intents),
        tuple(text for text, _ in outside),
    )


def out_of_scope(*, split: str = "test", folder: str | Path | None = None) -> Int[np.ndarray, "rows 128"]:
    """Utterances that belong to no intent, for `jmeta.evaluate(..., open_set=)`.

    Args:
        split: `"train"`, `"validation"` or `"test"`; they have 100, 100 and 1,000.
        folder: as in `clinc150`.

    Returns:
        Token ids as the inputs of `clinc150`.

    Raises:
        DataError: the data are not on this machine.
        ConfigError: an unknown split.

    Example:
        >>> from jmeta.data.clinc150 import out_of_scope
        >>> out_of_scope(split="validation").shape  # doctest: +SKIP
        (100, 128)
    """
    return hashed_text(load_clinc150(split=split, folder=folder).out_of_scope, width=WIDTH)


def _folder(folder: str | Path | None) -> Path:
    given = os.environ.get("CLINC150_DIR") if folder is None else folder
    place = Path(given).expanduser() if given else None
    if place and any(place.glob("data_full.json*")) and (place / "few_shot_class_splits.json").exists():
        return place
    raise DataError(
        f"CLINC150 is not in {place or 'CLINC150_DIR, which is not set'}; put few_shot_class_splits.json into a "
        "folder, get the data there by "
        "curl -LO https://raw.githubusercontent.com/clinc/oos-eval/master/data/data_full.json, then set CLINC150_DIR."
    )


@functools.cache
def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    packed = folder / "data_full.json.xz"
    text = lzma.decompress(packed.read_bytes()) if packed.exists() else (folder / "data_full.json").read_bytes()
    return json.loads(text), json.loads((folder / "few_shot_class_splits.json").read_text())
