"""Hashed n-grams, and the network that reads them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmeta
from jmeta.errors import ConfigError, DataError


def tokens(text, **options):
    return set(jmeta.hashed_text([text], **options)[0]) - {0}


def test_texts_share_the_tokens_of_words_and_of_parts_of_words():
    assert tokens("Pay, my BILL!") == tokens("pay my bill")
    assert tokens("bill") < tokens("my bill")
    assert tokens("bills") & tokens("bill")
    assert not tokens("bill") & tokens("xyz")
    assert tokens("my bill") != tokens("bill my")  # pairs of words


def test_the_tokens_are_those_of_the_definition():
    import zlib

    expected = {
        1 + zlib.crc32(t) % 99 for t in (b"<a>", b"<dot>", b"<a> <dot>", b"<do", b"dot", b"ot>", b"<dot", b"dot>")
    }
    assert tokens("a dot", buckets=100) == expected


def test_rows_have_one_width_words_first():
    ids = jmeta.hashed_text(["a", "one two three four"], width=4)
    assert ids.shape == (2, 4)
    assert (ids[0] > 0).sum() == 1
    assert set(ids[1]) == {jmeta.hashed_text([word])[0, 0] for word in ("one", "two", "three", "four")}


def test_texts_that_say_nothing_are_told():
    with pytest.raises(DataError, match="text 1 has no words"):
        jmeta.hashed_text(["pay", " ?! "])
    with pytest.raises(ConfigError, match="buckets is 1"):
        jmeta.hashed_text(["pay"], buckets=1)


def test_padding_changes_nothing():
    encoder = jmeta.TextEncoder(features=16, buckets=64)
    short = jnp.asarray(jmeta.hashed_text(["pay my bill"], buckets=64))
    params = encoder.init(jax.random.key(0), short)
    padded = jnp.pad(short, ((0, 0), (0, 9)))
    np.testing.assert_allclose(encoder.apply(params, short), encoder.apply(params, padded), rtol=1e-5)


def test_a_description_that_is_not_there_has_finite_gradients():
    encoder = jmeta.TextEncoder(outputs=3, features=16, buckets=64)
    ids = jnp.zeros((2, 5), jnp.int32)
    params = encoder.init(jax.random.key(0), ids)
    gradients = jax.grad(lambda p: jnp.square(encoder.apply(p, ids)).sum())(params)
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(gradients))
