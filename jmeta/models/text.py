"""Text as hashed n-grams, and a network that reads it."""

import itertools
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int, Num

from jmeta.errors import ConfigError, DataError, ModelError

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
        >>> from jmeta.models.text import hashed_text
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
        >>> from jmeta.models.text import hashed_text, inverse_document_frequency
        >>> inverse_document_frequency(hashed_text(["pay my bill", "pay me"])).min()
        np.float32(1.0)

    Reference: Spärck Jones 1972, "A Statistical Interpretation of Term Specificity"; smoothed as in scikit-learn.
    """
    texts = np.zeros(buckets, np.float32)
    for row in ids:
        texts[np.unique(row[row > 0])] += 1.0
    return (1.0 + np.log((1.0 + len(ids)) / (1.0 + texts))).astype(np.float32)


class TextEncoder(nn.Module):
    """The weighted sum of the embeddings of a text's tokens, scaled to one length.

    e = Σᵢ wᵢ E(tokenᵢ), z = s e / ‖e‖, with a learned vector E and a learned positive weight w of each token and a
    learned length s; with `hidden`, z + MLP(z). At first E is random, which keeps cosines between bags of tokens
    (Johnson, Lindenstrauss), so that learning starts from comparing words, as TF-IDF does, and adds what they mean.

    Args:
        outputs: width of the last layer, called `head`; None leaves it away and gives the embedding.
        features: width of the embedding.
        hidden: width of the hidden layer of the perceptron, which starts at 0; without, the default, there is none.
        buckets: number of token ids, as given to `hashed_text`.
        spread: standard deviation of E at the start; the smaller, the faster E is learned.
        weights: `[buckets]`, w at the start, as `inverse_document_frequency` gives; default: all 1.
        dropout: share of the tokens that are left away in the texts that are learned from (`train`), the support.

    Example:
        >>> import jax, jax.numpy as jnp, jmeta
        >>> ids = jnp.asarray(jmeta.hashed_text(["pay my bill", "book a flight"]))
        >>> jmeta.TextEncoder(outputs=None, features=32).init_with_output(jax.random.key(0), ids)[0].shape
        (2, 32)

    Reference: Joulin et al. 2017, "Bag of Tricks for Efficient Text Classification", section 2,
    https://arxiv.org/abs/1607.01759; Iyyer et al. 2015, "Deep Unordered Composition Rivals Syntactic Methods for Text
    Classification", section 3 (token dropout).
    """

    outputs: int | None = None
    features: int = 512
    hidden: int = 0
    buckets: int = BUCKETS
    spread: float = 0.5
    weights: Any = None
    dropout: float = 0.3

    @nn.compact
    def __call__(self, ids: Num[Array, "n width"], train: bool = False) -> Float[Array, "n outputs"]:
        """Embeds token ids, of which 0 is padding."""
        if ids.ndim != 2 or ids.shape[1] < 2:
            raise ModelError(
                f"inputs of shape {list(ids.shape)} are no token ids; jmeta.hashed_text(texts) makes them."
            )
        ids = ids.astype(jnp.int32)
        known = np.zeros(1) if isinstance(ids, jax.core.Tracer) or not ids.size else np.asarray(ids)
        if not 0 <= known.min() <= known.max() < self.buckets:
            raise ModelError(
                f"token ids go from {known.min()} to {known.max()} and the network has {self.buckets} rows for them; "
                "give hashed_text and TextEncoder the same buckets."
            )
        vectors = self.param("vectors", nn.initializers.normal(self.spread), (self.buckets, self.features))
        start = np.ones(self.buckets, np.float32) if self.weights is None else np.asarray(self.weights, np.float32)
        weights = self.param("log_weights", lambda key: jnp.log(jnp.asarray(start)))
        length = self.param("length", nn.initializers.constant(2.0), ())
        there = (ids > 0).astype(jnp.float32)
        # without a stream of random numbers the module is being initialised
        there = nn.Dropout(self.dropout, deterministic=not train or not self.has_rng("dropout"))(there)
        e = jnp.einsum(
            "nw,nwf->nf", there * jnp.exp(weights[ids]), vectors.at[ids].get(mode="fill", fill_value=jnp.nan)
        )  # compiled, an id without a row gives NaN, which stops a run, and not the last row
        z = length * e / jnp.sqrt(jnp.square(e).sum(axis=1, keepdims=True) + 1e-4)  # a text of nothing is 0
        if self.hidden:
            hidden = nn.relu(nn.Dense(self.hidden)(z))
            z = z + nn.Dense(self.features, kernel_init=nn.initializers.zeros_init())(hidden)
        return z if self.outputs is None else nn.Dense(self.outputs, name="head")(z)
