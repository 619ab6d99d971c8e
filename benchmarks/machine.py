"""The machine that the benchmarks run on."""

import os
import platform
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp


def threads() -> int:
    """The cores that this process may use, which is how many threads XLA starts."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu() -> str:
    """The name of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())


def environment(packages: Iterable[str]) -> dict[str, Any]:
    """What two measurements must have in common to stand in one table."""
    versions = {name: version(name) for name in sorted(set(packages))}
    return {"cpu": cpu(), "threads": threads(), "python": platform.python_version(), "versions": versions}


def matmul_peak(size: int = 2048, calls: int = 6) -> float:
    """FLOP/s of the fastest of some float32 matrix products in JAX."""
    x = jnp.ones((size, size), jnp.float32)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()

    def seconds() -> float:
        begin = time.perf_counter()
        product(x, x).block_until_ready()
        return time.perf_counter() - begin

    return 2 * size**3 / min(seconds() for _ in range(calls))
