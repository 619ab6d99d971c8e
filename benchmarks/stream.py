"""Training from a set that does not lie in memory, against one on the device: `python -m benchmarks.stream`.

Writes a file of random pictures to the folder of temporary files (TMPDIR), maps it into memory and trains on it by
`jmeta.stream`; the same network trains on the first classes of it by `jmeta.from_arrays`, in turns. Reports the time of
a meta-step, that of all cores (which other processes disturb less), and the memory of
the process, without the compilation.
"""

import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from rich.console import Console

import jmeta

SHAPE, ROWS = (28, 28, 1), 1000  # of a picture, of a class


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Args:
        gigabytes: of the file, which is deleted afterwards.
        steps: meta-steps of each measurement.
        rounds: measurements of each of the two, in turns; the median is reported.
        tasks: of a meta-step.
        queries: of a class.
        log_every: meta-steps of a compiled scan.
        chunk_megabytes: of the tasks that lie on the device at a time.
        workers: processes that read.
    """

    gigabytes: float = 10.0
    steps: int = 60
    rounds: int = 3
    tasks: int = 32
    queries: int = 15
    log_every: int = 20
    chunk_megabytes: int = 256
    workers: int = 0


def write(file: Path, gigabytes: float) -> np.ndarray:
    """Random bytes, class after class; gives them mapped into memory."""
    classes = int(gigabytes * 2**30 / np.prod(SHAPE) / ROWS)
    images = np.lib.format.open_memmap(file, "w+", np.uint8, (classes * ROWS, *SHAPE))
    random = np.random.default_rng(0)
    for begin in range(0, len(images), ROWS):
        images[begin : begin + ROWS] = random.integers(0, 256, (ROWS, *SHAPE), np.uint8)
    images.flush()
    return np.load(file, mmap_mode="r")


class Memory(threading.Thread):
    """The largest numbers of /proc/self/status since the start, in MiB: own memory, and pages of files."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak: dict[str, float] = {}
        self.stopped = threading.Event()

    def run(self) -> None:
        while not self.stopped.wait(0.05):
            lines = dict(x.split(":", 1) for x in Path("/proc/self/status").read_text().splitlines())
            for name in ("RssAnon", "RssFile", "VmRSS"):
                self.peak[name] = max(self.peak.get(name, 0.0), int(lines[name].split()[0]) / 1024)


def measured(source: jmeta.TaskSource, settings: Settings) -> dict[str, Any]:
    """Milliseconds a meta-step and MiB of memory of a run, compiled before, with its beginning left out."""
    learner = jmeta.maml(jmeta.linen(jmeta.Conv4(outputs=5)), inner_rate=0.4)
    times: list[tuple[float, float]] = []
    memory = Memory()

    def callback(train_state: Any, metrics: Any) -> None:
        times.append((time.perf_counter(), time.process_time()))
        if len(times) == 1:
            memory.start()

    jmeta.fit(
        jax.random.key(0),
        learner,
        source,
        steps=settings.steps,
        tasks=settings.tasks,
        log_every=settings.log_every,
        callback=callback,
    )
    memory.stopped.set()
    spent = (np.asarray(times[-1]) - times[0]) * 1000 / (settings.log_every * (len(times) - 1))
    return {"ms": spent[0], "CPU ms": spent[1], **memory.peak}


def main(settings: Settings) -> None:
    """Writes, measures, prints."""
    size: dict[str, Any] = {"ways": 5, "shots": 1, "queries": settings.queries}
    with tempfile.TemporaryDirectory() as folder:
        images = write(Path(folder) / "images.npy", settings.gigabytes)
        labels = np.repeat(np.arange(len(images) // ROWS), ROWS)
        some = slice(20 * ROWS)
        bound = settings.chunk_megabytes * 2**20
        sources = {
            "device": jmeta.from_arrays(np.asarray(images[some]), labels[some], **size),
            "stream": jmeta.stream(images, labels, workers=settings.workers, chunk_bytes=bound, **size),
        }
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in sources}
        for _ in range(settings.rounds):
            for name, source in sources.items():
                runs[name].append(measured(source, settings))
    found = {name: {k: float(np.median([run[k] for run in all_])) for k in all_[0]} for name, all_ in runs.items()}
    ratio = found["stream"]["ms"] / found["device"]["ms"]
    for name, row in found.items():
        Console().print(name, ", ".join(f"{k} {x:.1f}" for k, x in row.items()), highlight=False)
    Console().print(f"stream / device: {ratio:.3f}; {images.nbytes / 2**30:.1f} GB", highlight=False)


if __name__ == "__main__":
    main(tyro.cli(Settings))
