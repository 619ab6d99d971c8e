"""N-way K-shot episodes from more examples than the device holds, read on the host while the last ones are in use."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from jmeta.checks import check_counts
from jmeta.core import Task, TaskSource
from jmeta.data.descriptions import Descriptions
from jmeta.data.episodes import Size
from jmeta.data.reading import Loader, Reader, Stream, grain
from jmeta.data.sampling import Transform
from jmeta.devices import Columns
from jmeta.errors import ConfigError, DataError
from jmeta.feed import words
from jmeta.inputs import as_seen


def stream(
    examples: Any,
    labels: np.ndarray | Array | Sequence[int] | str,
    *,
    rows: np.ndarray | Sequence[int] | None = None,
    decode: Callable[[Any], Any] | None = None,
    ways: Size = 5,
    shots: Size = 1,
    queries: Size = 15,
    names: Sequence[str] = (),
    descriptions: Descriptions | None = None,
    families: np.ndarray | Sequence[int] | None = None,
    transform: Transform | None = None,
    batch: int | None = None,
    min_rows: int | None = None,
    ordered: bool = False,
    query_balance: float | None = None,
    workers: int = 0,
    chunk_bytes: int = 2**28,
) -> TaskSource:
    """The episodes of `from_arrays`, from more examples than fit into the memory of the device, or of the machine.

    Labels stay in memory, examples where they are. `fit` and `evaluate` ask for the tasks of the meta-steps to come:
    their examples are read by Grain, in threads or in processes, while the device computes with those before, and go
    there as bytes. With the same key, tasks are those that `from_arrays` cuts from the same examples, bit for bit;
    which they are depends on the key, the meta-step and the place of the task alone, so that a run that goes on from a
    `train_state` needs no other position. On a mesh each device gets its own tasks, and each process reads those of
    its devices.

    Args:
        examples: what has a length and gives an example for a number: a memory-mapped array
            (`np.load(path, mmap_mode="r")`), a list of paths, a data source of array_record or tensorflow-datasets, a
            table of Hugging Face. Each is an array, a picture, or a dict that has one as `"image"`, `"inputs"` or
            `"img"`; all have one shape and type, and become inputs as `jmeta.as_inputs` says.
        labels: `[n]`, any integers, in any order; or the name of the entry of each example that is its label, all of
            which are read once.
        rows: which examples to take, their numbers or `[n]` booleans, as `jmeta.split_classes` gives. Default: all.
        decode: `example -> array`, applied on the host as it is read: to open a file, to bring pictures to one size.
        ways: as in `from_arrays`.
        shots: as in `from_arrays`.
        queries: as in `from_arrays`.
        names: as in `from_arrays`.
        descriptions: as in `from_arrays`.
        families: as in `from_arrays`.
        transform: as in `from_arrays`: on the device.
        batch: as in `from_arrays`.
        min_rows: as in `from_arrays`.
        ordered: as in `from_arrays`.
        query_balance: as in `from_arrays`.
        workers: processes that read, for a `decode` that computes in Python; a script then needs
            `if __name__ == "__main__":`. Default: threads of this process, which do for arrays and for files.
        chunk_bytes: how many bytes of tasks go to the device at a time, at most, which shortens the compiled scans of
            `fit` to a divisor of `log_every`. About five times as many are in use, on host and device.

    Returns:
        A source of tasks as `from_arrays` gives them, for `fit` and `evaluate`; `sample` finds in `data` those tasks
        alone that were read for their keys.

    Raises:
        ConfigError: Grain is missing, or a number that is none.
        DataError: what `from_arrays` says of labels, classes and sizes; another number of examples than of labels; and,
            when it is read, an example that raises, has another shape or type than the first, or is not finite.

    Example:
        >>> import jax, jmeta, numpy as np
        >>> images = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 1), np.uint8)  # np.load(path, mmap_mode="r")
        >>> source = jmeta.stream(images, np.repeat(np.arange(6), 10), ways=5, shots=1, queries=3)
        >>> learner = jmeta.prototypical(jmeta.linen(jmeta.MLP(outputs=8)))
        >>> fitted = jmeta.fit(jax.random.key(0), learner, source, steps=4, tasks=2, log_every=2)
        >>> [row["step"] for row in fitted.history]
        [2, 4]
    """
    grain()
    check_counts(chunk_bytes=chunk_bytes)
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 0:
        raise ConfigError(f"workers is {workers}; give a number of processes, or 0 for threads.")
    if not (hasattr(examples, "__len__") and hasattr(examples, "__getitem__")):
        kind = type(examples).__name__
        raise DataError(f"examples are a {kind}, which has no length and no examples by number; give one that has.")
    labels = _labels(examples, labels) if isinstance(labels, str) else np.asarray(labels)
    if len(examples) != len(labels):
        raise DataError(f"there are {len(examples)} examples but {len(labels)} labels; give one label for each.")
    loader = Loader(
        Reader(examples, decode),
        labels,
        _numbers(rows, len(labels)),
        ways=ways,
        shots=shots,
        queries=queries,
        names=names,
        descriptions=descriptions,
        families=families,
        batch=batch,
        min_rows=min_rows,
        ordered=ordered,
        query_balance=query_balance,
    )
    data = loader.on_device(jax.random.split(jax.random.key(0), 1))
    size = sum(x.nbytes for x in jax.tree.leaves(data))
    feed = Stream(loader, workers, chunk_bytes, size)
    return loader.plan._replace(data=data, sample=_sampler(transform, 2 if batch else 3), feed=feed)


def _sampler(transform: Transform | None, parts: int) -> Callable[[Key[Array, ""], Columns], Task]:
    """Finds the task of a key among those that were read."""

    def sample(key: Key[Array, ""], data: Columns) -> Task:
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), data.arrays)
        equal = (
            (flat.keys == words(key)[None]).all(axis=-1)
            if flat.keys.shape[1:] == words(key).shape
            else jnp.zeros(1, bool)
        )
        _, x, task = jax.tree.map(lambda x: x[jnp.argmax(equal)], flat)
        x = as_seen(x)
        if transform is not None:
            x = transform(jax.random.split(key, parts)[-1], x)
        # a task that was not read must not pass for another
        targets = jnp.where(equal.any(), task.query.targets, jnp.nan)
        if task.support == ():
            return Task((), task.query._replace(inputs=x, targets=targets))
        ways = targets.shape[1]
        x = x.reshape(ways, -1, *x.shape[1:])
        slots = len(task.support.targets) // ways
        inputs = (part.reshape(-1, *part.shape[2:]) for part in (x[:, :slots], x[:, slots:]))
        support, query = (part._replace(inputs=x) for part, x in zip(task, inputs, strict=True))
        return Task(support, query._replace(targets=targets))

    return sample


def _numbers(rows: Any, n: int) -> np.ndarray:
    """The numbers of the examples to take."""
    rows = np.arange(n) if rows is None else np.asarray(rows)
    if rows.shape == (n,) and rows.dtype == bool:
        return np.flatnonzero(rows)
    if rows.ndim != 1 or rows.dtype.kind not in "iu" or (rows.size and not 0 <= rows.min() <= rows.max() < n):
        raise DataError(f"rows are {rows.dtype}{list(rows.shape)}; give numbers from 0 to {n - 1}, or [{n}] booleans.")
    return rows


def _labels(examples: Any, name: str) -> np.ndarray:
    """The entry of this name of every example, of a table without its other columns."""
    if name in getattr(examples, "column_names", ()):
        return np.asarray(examples[name])
    try:
        return np.asarray([examples[i][name] for i in range(len(examples))])
    except (KeyError, TypeError, IndexError) as error:
        raise DataError(f"examples have no entry {name!r} to be their label; give labels, [n].") from error
