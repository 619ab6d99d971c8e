"""Reads the tasks of a stream by Grain, in threads or processes, while the device is busy with those before."""

import contextlib
import functools
import itertools
import mmap
import pickle
import threading
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from jmeta.core import Keys, KeysOf, Task, TaskSource
from jmeta.data.episodes import from_arrays
from jmeta.devices import Columns, columns_here, put_columns
from jmeta.errors import ConfigError, DataError, reason_of
from jmeta.feed import Words, words
from jmeta.inputs import stored

_COLUMNS = ("image", "inputs", "img")  # what tables call their inputs
_THREADS = 16  # of a process: files are waited for more than they are computed with


class Window(NamedTuple):
    """Tasks that were read, `[..., tasks]`.

    Args:
        keys: one a task.
        inputs: of support and query of a class after the other, as they are stored.
        tasks: all of them but the inputs, `()`.
    """

    keys: Any
    inputs: Any
    tasks: Task


class Reader:
    """Examples by their numbers, as they are stored on the device; goes to another process without its arrays' bytes.

    Args:
        examples: what has a length and gives an example for a number.
        decode: `example -> array`.
    """

    def __init__(self, examples: Any, decode: Callable[[Any], Any] | None) -> None:
        self.examples, self.decode = examples, decode
        self.plain = decode is None and isinstance(examples, np.ndarray) and examples.dtype != object
        self.like = None if self.plain else self._one(0)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "examples": _by_file(self.examples)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, examples=state["examples"]())

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """`[..., ]` numbers to `[..., *shape]`."""
        if self.like is None:
            numbers, place = rows.reshape(-1), np.arange(rows.size)
            found = self.examples[numbers]
        else:
            numbers, place = np.unique(rows, return_inverse=True)  # each is read once, in the order of the file
            found = np.empty((len(numbers), *self.like.shape), self.like.dtype)
            for i, number in enumerate(numbers):
                found[i] = self._like_the_first(int(number))
        if found.dtype.kind == "f" and not np.isfinite(found).all():
            number = numbers[int(np.argwhere(~np.isfinite(found))[0][0])]
            raise DataError(f"example {number} is not finite; remove or repair NaN and infinite values.")
        return stored(np.asarray(found))[place].reshape(*rows.shape, *found.shape[1:])

    def _like_the_first(self, number: int) -> np.ndarray:
        x, like = self._one(number), self.like
        if (x.shape, x.dtype) != (like.shape, like.dtype):  # type: ignore[union-attr]
            raise DataError(
                f"example {number} is {x.dtype}{list(x.shape)}, and example 0 {like.dtype}{list(like.shape)}; "  # type: ignore[union-attr]
                "bring all to one shape and type by decode=."
            )
        return x

    def _one(self, number: int) -> np.ndarray:
        try:
            example = self.examples[number]
            if self.decode is not None:
                example = self.decode(example)
        except Exception as error:  # whatever a user's code raises
            raise DataError(f"example {number} cannot be read: {reason_of(error)}.") from error
        if isinstance(example, Mapping):
            column = next((name for name in _COLUMNS if name in example), None)
            if column is None:
                raise DataError(
                    f"example {number} has {', '.join(map(str, example))}, and none of {', '.join(_COLUMNS)}; pick "
                    "one by decode=lambda example: example[...]."
                )
            example = example[column]
        x = np.asarray(example)
        if x.dtype.kind not in "buif":
            kind = type(example).__name__
            raise DataError(f"example {number} is a {kind} and no array of numbers; make one of it by decode=.")
        return x[..., None] if hasattr(example, "getbands") and x.ndim == 2 else x  # a grey picture of PIL


def _by_file(examples: Any) -> Callable[[], Any]:
    """What opens a memory-mapped array in another process, whose bytes would be sent there; all else as it is."""
    mapped = getattr(examples, "_mmap", None)
    if not isinstance(examples, np.memmap) or mapped is None or not examples.flags.c_contiguous:
        return functools.partial(_same, examples)
    begin = np.frombuffer(mapped, np.uint8).ctypes.data
    # `offset` is that of the array that was opened, of which this one may be a part
    whole = examples
    while isinstance(whole.base, np.memmap):
        whole = whole.base
    offset = whole.offset - whole.offset % mmap.ALLOCATIONGRANULARITY + examples.ctypes.data - begin
    memmap: Any = np.memmap  # whose type differs among versions of NumPy
    return functools.partial(memmap, examples.filename, examples.dtype, "r", offset, examples.shape)


def _same(x: Any) -> Any:
    return x


class Loader:
    """Reads the tasks of given keys; all that a worker needs.

    Args:
        read: examples by their numbers.
        labels: of each.
        rows: the numbers of the examples to take.
        options: of `from_arrays`.
    """

    def __init__(self, read: Reader, labels: np.ndarray, rows: np.ndarray, **options: Any) -> None:
        self.read, self.labels, self.rows, self.options = read, labels, rows.astype(np.int32), options

    def __getstate__(self) -> dict[str, Any]:
        # what is made of them stays here: not all functions can be sent
        return {name: vars(self)[name] for name in ("read", "labels", "rows", "options")}

    @functools.cached_property
    def plan(self) -> TaskSource:
        """The episodes of `from_arrays`, whose inputs are the numbers of the examples, from 1; 0 is none."""
        return from_arrays(self.rows + 1, self.labels[self.rows], **self.options)

    @functools.cached_property
    def _planned(self) -> Callable[[Keys], Any]:
        sample, data = jax.jit(jax.vmap(self.plan.sample, (0, None))), self.plan.data
        lock, compiled = threading.Lock(), set()

        def planned(keys: Keys) -> Any:
            with lock:  # or each thread would compile it
                if keys.shape not in compiled:
                    sample(keys, data)
                    compiled.add(keys.shape)
            return jax.tree.map(np.asarray, sample(keys, data))

        return planned

    def __call__(self, keys: Keys) -> Window:
        """The tasks, `[tasks]`, on the host."""
        support, query = task = self._planned(keys)
        rows = query.inputs
        if support != ():
            ways = query.targets.shape[-1]
            rows = np.concatenate([part.inputs.reshape(len(rows), ways, -1) for part in task], axis=2)
        rows = rows.reshape(len(rows), -1)
        inputs = self.read(np.maximum(rows - 1, 0))
        inputs[rows == 0] = 0
        without = (part if part == () else part._replace(inputs=(), rows=self.rows[part.rows]) for part in task)
        return Window(np.asarray(words(keys)), inputs, Task(*without))

    def on_device(self, keys: Keys) -> Columns:
        """The tasks as those of one step."""
        with Settings.now().on_host():
            window = self(Words.of(keys).keys())
        return put_columns(None, jax.tree.map(lambda x: x[None], window))


class Settings(NamedTuple):
    """What JAX draws by, which threads and processes do not take over."""

    x64: bool
    partitionable: bool

    @classmethod
    def now(cls) -> "Settings":
        """Those of this thread."""
        config: Any = jax.config  # whose attributes some versions declare
        return cls(config.jax_enable_x64, config.jax_threefry_partitionable)

    @contextlib.contextmanager
    def on_host(self) -> Iterator[None]:
        """With them, on the CPU, where what the device is busy with is not waited for."""
        try:
            cpu = jax.local_devices(backend="cpu")[0]
        except RuntimeError:  # JAX_PLATFORMS leaves it away
            cpu = jax.local_devices()[0]
        with jax.enable_x64(self.x64), jax.threefry_partitionable(self.partitionable), jax.default_device(cpu):
            yield


class Failed:
    """An error on its way from a worker to who asks for the data, with what raised it."""

    def __init__(self, error: DataError) -> None:
        self.error, self.cause = error, error.__cause__

    def __getstate__(self) -> dict[str, Any]:
        cause = self.cause
        if cause is None:
            return {"error": self.error, "cause": None}
        known = type(cause).__module__ not in ("__main__", "__mp_main__")  # which are others in another process
        try:
            if not known:
                raise TypeError
            pickle.loads(pickle.dumps(cause))
        except Exception:  # whatever pickling a user's exception raises
            cause = RuntimeError(f"{type(cause).__name__}: {cause}")
        cause.add_note("".join(traceback.format_exception(self.cause)))
        return {"error": self.error, "cause": cause}


class Step(NamedTuple):
    """Reads the tasks of a meta-step that are those of this process."""

    loader: Loader
    keys_of: KeysOf
    columns: Int[np.ndarray, "tasks"]
    settings: Settings

    def __call__(self, step: int) -> Window | Failed:
        """Their data, or why they cannot be read."""
        try:
            with self.settings.on_host():
                return self.loader(self.keys_of(int(step))[self.columns])
        except DataError as error:
            return Failed(error)


class Stream(NamedTuple):
    """The feed of a source whose tasks are read while others are in use: `jmeta.core.Feed`.

    Args:
        loader: reads tasks.
        workers: processes, or 0 for threads.
        chunk_bytes: of the tasks on the device at a time, at most.
        task_bytes: of one task.
    """

    loader: Loader
    workers: int
    chunk_bytes: int
    task_bytes: int

    def load(self, keys: Keys) -> Columns:
        """The data of the tasks of these keys."""
        return self.loader.on_device(keys)

    def fits(self, tasks: int) -> int:
        """How many steps of so many tasks may lie on the device at a time; at least one."""
        return max(1, self.chunk_bytes // (tasks * self.task_bytes))

    def chunks(
        self, keys_of: KeysOf, steps: range, tasks: int, length: int, mesh: jax.sharding.Mesh | None
    ) -> Generator[Columns]:
        """The data of `length` steps after `length` steps; what there is of the last is filled up by its last step."""
        library = grain()
        read = Step(self.loader, keys_of, np.asarray(columns_here(mesh, tasks)), Settings.now())
        buffer = -(-length // max(1, self.workers))
        options = library.ReadOptions(num_threads=min(_THREADS, buffer), prefetch_buffer_size=buffer)
        dataset = library.MapDataset.range(steps.start, steps.stop).map(read).to_iter_dataset(options)
        if self.workers:
            processes = library.multiprocessing.MultiprocessingOptions(self.workers, per_worker_buffer_size=2)
            dataset = dataset.mp_prefetch(processes, worker_init_fn=_start_worker)
        elements = iter(dataset)

        def following() -> Columns | None:
            try:
                parts = list(itertools.islice(elements, length))
            except RuntimeError as error:
                if "Worker process" not in str(error):
                    raise
                raise DataError(
                    f"a worker process of the stream has ended ({reason_of(error)}); look for its last words above, "
                    'take fewer workers where memory is short, and `if __name__ == "__main__":` in a script.'
                ) from error
            for part in parts:
                if isinstance(part, Failed):
                    raise part.error from part.cause
            parts += parts[-1:] * (length - len(parts))
            return put_columns(mesh, jax.tree.map(lambda *x: np.stack(x), *parts)) if parts else None

        with contextlib.closing(elements), ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(following)
            while (chunk := ahead.result()) is not None:
                ahead = pool.submit(following)
                yield chunk


def _start_worker(worker: int, workers: int) -> None:
    """Workers compute on the CPU alone: the accelerator belongs to the process that started them."""
    jax.config.update("jax_platforms", "cpu")


def grain() -> Any:
    """The library; `ConfigError` with what to do where it is missing."""
    try:
        import grain
        from absl import flags
    except ImportError as error:
        raise ConfigError("jmeta.stream needs grain: pip install grain.") from error
    for name in ("grain_enable_multiprocess_worker_profiling",):  # which it reads in programs without flags, too
        if name in flags.FLAGS:
            flags.FLAGS[name].present = True
    return grain
