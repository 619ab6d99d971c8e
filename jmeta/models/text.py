"""A network that reads text."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Num

from jmeta.data.text import BUCKETS
from jmeta.errors import ModelError


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
        low, high = int(np.min(known)), int(np.max(known))
        if not 0 <= low <= high < self.buckets:
            raise ModelError(
                f"token ids go from {low} to {high} and the network has {self.buckets} rows for them; "
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
