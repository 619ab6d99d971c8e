"""Text as hashed n-grams: token ids without a vocabulary."""

import itertools
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jmeta.errors import ConfigError, DataError

BUCKETS = 2**14


class TokenIds(NamedTuple):
    """Descriptions of classes that are token ids: the type says so, since attributes may be integers as well.

    Args:
        ids: a row for each class, as `hashed_text` gives; 0 is padding, and a row of zeros says nothing. For
            `jmeta.from_arrays` it may be a mapping from each label to its row.

    Example:
        >>> import jmeta
        >>> jmeta.TokenIds(jmeta.hashed_text(["a dot", "a comma"], width=4)).ids.shape
        (2, 4)
    """

    ids: Any


def hashed_text(
    texts: Sequence[str],
    *,
    width: int | None = None,
    buckets: int = BUCKETS,
    ngrams: tuple[int, ...] = (3, 4, 5),
) -> Int[np.ndarray, "n width"]:
    """Texts as rows of token ids: words, pairs of words and the n-grams of characters of each word, hashed.

    `"a dot"` gives `<a>`, `<dot>`, `<a> <dot>`, and of `<dot>` also `<do`, `dot`, `ot>`, ... A token is the CRC-32 of
    its bytes modulo the buckets, so that there is no vocabulary to fit, and a word never seen shares n-grams with seen
    ones.

    Args:
        texts: any texts; lower and upper case are the same.
        width: ids a row; longer texts are cut, words first. Default: that of the longest text.
        buckets: number of ids in all.
        ngrams: lengths of the n-grams of characters, in bytes of UTF-8.

    Returns:
        `[n, width]`, int32, ids from 1 to `buckets - 1`; 0 is padding.

    Raises:
        DataError: a text without any word.
        ConfigError: fewer than two buckets, or a width below 1.

    Example:
        >>> from jmeta.data.text import hashed_text
        >>> hashed_text(["a", "pay my bill"], width=8).shape
        (2, 8)

    Reference: Bojanowski et al. 2017, "Enriching Word Vectors with Subword Information", section 3.2,
    https://arxiv.org/abs/1607.04606; Joulin et al. 2017, "Bag of Tricks for Efficient Text Classification".
    """
    if buckets < 2 or (width is not None and width < 1):
        raise ConfigError(f"buckets is {buckets} and width {width}; give at least 2 buckets and a width of 1.")
    rows = []
    for i, text in enumerate(texts):
        tokens = list(_tokens(text, ngrams))
        if not tokens:
            raise DataError(f"text {i} has no words; describe it or drop it.")
        rows.append([1 + zlib.crc32(token) % (buckets - 1) for token in tokens])
    width = width or max(map(len, rows))
    ids = np.zeros((len(rows), width), np.int32)
    for row, tokens_of_row in zip(ids, rows, strict=True):
        row[: len(tokens_of_row)] = tokens_of_row[:width]
    return ids


def _tokens(text: str, ngrams: tuple[int, ...]) -> Iterator[bytes]:
    words = [f"<{word}>".encode() for word in "".join(c if c.isalnum() else " " for c in text.lower()).split()]
    yield from words
    yield from (first + b" " + second for first, second in itertools.pairwise(words))
    for word in words:
        for n in ngrams:
            yield from (word[i : i + n] for i in range(len(word) - n + 1) if n < len(word))


def inverse_document_frequency(ids: Int[np.ndarray, "n width"], buckets: int = BUCKETS) -> Float[np.ndarray, "buckets"]:
    """1 + log((1 + n) / (1 + texts with the token)): how telling each token is, from texts to train on.

    Args:
        ids: `[n, width]`, as `hashed_text` gives.
        buckets: number of ids in all.

    Returns:
        `[buckets]`, float32, at least 1; a token that is in no text has the most.

    Example:
        >>> from jmeta.data.text import hashed_text, inverse_document_frequency
        >>> inverse_document_frequency(hashed_text(["pay my bill", "pay me"])).min()
        np.float32(1.0)

    Reference: Spärck Jones 1972, "A Statistical Interpretation of Term Specificity"; smoothed as in scikit-learn.
    """
    texts = np.zeros(buckets, np.float32)
    for row in ids:
        texts[np.unique(row[row > 0])] += 1.0
    return (1.0 + np.log((1.0 + len(ids)) / (1.0 + texts))).astype(np.float32)
