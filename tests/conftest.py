"""Strict promotion, checked shapes and quick compilation, switched on before jmeta is imported."""

import mmap
import os
from importlib.util import find_spec
from pathlib import Path


def knows(flag):
    """Whether this XLA has a flag; one that it does not know would end the process."""
    for library in Path(find_spec("jaxlib").origin).parent.glob("libjax_common*"):
        with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return content.find(flag.encode()) >= 0
    return False


os.environ.setdefault("JAX_NUMPY_DTYPE_PROMOTION", "strict")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "2")
# Most of the run is compilation, of which these leave two thirds. At level 0 some gradients of max-pooling in float64
# come out wrong, which the tests against finite differences see; they ask for level 1.
QUICK = {
    "xla_backend_optimization_level": "0",
    "xla_llvm_disable_expensive_passes": "true",
    "xla_cpu_use_fusion_emitters": "false",
}
os.environ.setdefault("XLA_FLAGS", " ".join(f"--{name}={value}" for name, value in QUICK.items() if knows(name)))

# each small program is compiled once in a run, not once in every file, and not at all in the next run
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import pytest
from jaxtyping import install_import_hook

install_import_hook("jmeta", "beartype.beartype")


@pytest.fixture
def float64():
    """Everything inside the test is computed in float64."""
    with jax.enable_x64(True):
        yield


def mappings():
    """How many areas of memory the process has, of 65530 that Linux allows; a compiled program takes about five."""
    maps = Path("/proc/self/maps")
    return len(maps.read_bytes().splitlines()) if maps.exists() else MAPPINGS


MAPPINGS = 20_000


@pytest.fixture(autouse=True, scope="module")
def compiled_programs_are_freed():
    """A worker that held the programs of many files, gigabytes of them, once crashed inside of the compiler."""
    yield
    if mappings() >= MAPPINGS:
        jax.clear_caches()
