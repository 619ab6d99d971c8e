"""Where `fit` and `evaluate` take the data of the tasks to come: all at once, or chunk by chunk from a stream."""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, PyTree, UInt32

from jmeta.core import Keys, TaskSource
from jmeta.devices import devices_of, replicated
from jmeta.errors import ConfigError
from jmeta.step import keys_of_step


class Words(NamedTuple):
    """Keys as they can lie on the host and go to another process.

    Args:
        numbers: `[..., words]`.
        kind: the name of the generator, None of raw keys of the old kind.
    """

    numbers: UInt32[np.ndarray, "..."]
    kind: str | None

    @classmethod
    def of(cls, keys: Keys) -> "Words":
        """Those of some keys."""
        typed = jnp.issubdtype(keys.dtype, jax.dtypes.prng_key)
        return cls(np.asarray(words(keys)), str(jax.random.key_impl(keys)) if typed else None)

    def keys(self, at: tuple[int | slice, ...] = ()) -> Keys:
        """The keys, or those at a place among them."""
        numbers = jnp.asarray(self.numbers[at])
        return numbers if self.kind is None else jax.random.wrap_key_data(numbers, impl=self.kind)


def words(keys: Keys) -> UInt32[Array, "..."]:
    """The numbers that keys are made of, on a new last axis."""
    return jax.random.key_data(keys) if jnp.issubdtype(keys.dtype, jax.dtypes.prng_key) else keys


@dataclasses.dataclass(frozen=True)
class KeysOfSteps:
    """The keys that the tasks of each meta-step are sampled by."""

    words: Words
    tasks: int

    def __call__(self, step: int) -> Keys:
        """`[tasks]`."""
        return keys_of_step(self.words.keys(), step, self.tasks)[0]


@dataclasses.dataclass(frozen=True)
class KeysOfEpisodes:
    """The keys that episodes are sampled by, `[chunks, tasks, steps]`: those of a device are a column of a chunk."""

    words: Words

    def __call__(self, step: int) -> Keys:
        """`[tasks]`."""
        chunk, place = divmod(step, self.words.numbers.shape[2])
        return self.words.keys((chunk, slice(None), place))


def check_fed(source: TaskSource, seeds: int | None) -> None:
    """Raises `ConfigError` where many seeds would need a stream at once."""
    if source.feed is not None and seeds is not None:
        raise ConfigError(
            "a stream has the tasks of one seed at a time; give one key, and evaluate one seed at a time."
        )


def data_of(source: TaskSource, keys: Keys) -> PyTree:
    """The data that the tasks of these keys, `[tasks]`, are cut from."""
    return source.data if source.feed is None else source.feed.load(keys)


@contextlib.contextmanager
def fed(
    source: TaskSource,
    key: Keys,
    steps: range,
    tasks: int,
    most: int,
    mesh: jax.sharding.Mesh | None,
) -> Iterator[tuple[int, Iterator[PyTree]]]:
    """The data of meta-steps, chunk after chunk.

    Args:
        source: where tasks come from.
        key: of the run; of many seeds, which need no stream, all of them.
        steps: the numbers of the steps.
        tasks: of a step.
        most: how many steps at most are one chunk.
        mesh: devices over which the tasks are divided, or None for one.

    Returns:
        How many steps are one chunk, a divisor of `most`, and the data of chunk after chunk while there are steps.
    """
    if source.feed is None:
        yield most, itertools.repeat(replicated(mesh, source.data))
        return
    fit = source.feed.fits(tasks)
    length = next(n for n in range(min(fit, most), 0, -1) if most % n == 0)
    keys_of = KeysOfSteps(Words.of(key), tasks)
    with contextlib.closing(source.feed.chunks(keys_of, steps, tasks, length, mesh)) as chunks:
        yield length, chunks


@contextlib.contextmanager
def fed_episodes(
    source: TaskSource,
    key: Key[Array, ""],
    episodes: int,
    chunk: int,
    mesh: jax.sharding.Mesh | None,
    seeds: int | None = None,
) -> Iterator[Iterator[tuple[Keys, PyTree]]]:
    """The keys and the data of the episodes of an evaluation, part after part.

    Args:
        source: where tasks come from.
        key: of the evaluation.
        episodes: how many.
        chunk: how many a device adapts at a time.
        mesh: devices over which they are divided, or None for one.
        seeds: as in `devices_of`.

    Returns:
        Of each part the keys, equally many, which the devices divide, and the data: of a source that has all, one part.
        Those beyond the last episode are some again.
    """
    check_fed(source, seeds)
    devices = devices_of(mesh, seeds)
    if source.feed is None:
        parts, size, block, length = 1, episodes + -episodes % devices, 0, 0
    else:
        block = chunk * devices
        blocks = -(-episodes // block)
        parts = -(-blocks // source.feed.fits(block))
        length = -(-blocks // parts)
        size = block * length
    keys = jax.random.split(key, episodes)[jnp.arange(parts * size) % episodes].reshape(parts, size)
    if source.feed is None:
        yield zip(replicated(mesh, keys), itertools.repeat(replicated(mesh, source.data)))
        return
    sampled = jax.vmap(lambda key: jax.random.split(key, 3)[0])(keys.reshape(-1))
    keys_of = KeysOfEpisodes(Words.of(sampled.reshape(parts, block, length)))
    with contextlib.closing(source.feed.chunks(keys_of, range(parts * length), block, length, mesh)) as chunks:
        yield zip(replicated(mesh, keys), chunks, strict=True)
