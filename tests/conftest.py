"""Strict promotion, checked shapes and quick compilation, switched on before jmeta is imported."""

import gc
import mmap
import os
from importlib.util import find_spec
from pathlib import Path


def knows(flag):
    """Whether this XLA has a flag; one that it does not know would end the process."""
    for library in Path(find_spec("jaxlib").origin).parent.glob("libjax_common*"):
        with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return content.find(b"\0" + flag.encode() + b"\0") >= 0  # a word of its own, not one among reserved names
    return False


os.environ.setdefault("JAX_NUMPY_DTYPE_PROMOTION", "strict")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
# Most of the run is compilation, of which these leave two thirds. At level 0 some gradients of max-pooling in float64
# come out wrong, which the tests against finite differences see; they ask for level 1.
QUICK = {
    "xla_backend_optimization_level": "0",
    "xla_llvm_disable_expensive_passes": "true",
    "xla_cpu_use_fusion_emitters": "false",
    "xla_cpu_parallel_codegen_split_count": "1",  # parts cost more than they save where both cores are busy
}
os.environ.setdefault("XLA_FLAGS", " ".join(f"--{name}={value}" for name, value in QUICK.items() if knows(name)))

# to note in each program which lines of Python an operation comes from takes a part of the time to make it
os.environ.setdefault("JAX_INCLUDE_FULL_TRACEBACKS_IN_LOCATIONS", "false")

# each small program is compiled once in a run, not once in every file, and not at all in the next run
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import pytest
from jaxtyping import install_import_hook

install_import_hook("jmeta", "beartype.beartype")

# tracing makes many small objects, and to look for cycles among them took a tenth of the time
gc.freeze()
gc.set_threshold(50_000, 50, 50)


@pytest.fixture
def float64():
    """Everything inside the test is computed in float64."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def free_programs():
    """A function that lets compiled programs go where there are many.

    A worker that held those of many files, gigabytes of them, once crashed inside of the compiler: Linux allows a
    process 65,530 areas of memory, and a program takes about ten of them and 2 MB.
    """
    areas = Path("/proc/self/maps")

    def free():
        if not areas.exists() or areas.read_bytes().count(b"\n") > 10_000:
            jax.clear_caches()

    return free


@pytest.fixture(autouse=True, scope="module")
def programs_are_freed(free_programs):
    yield
    free_programs()


# The longest files, so that no worker is left with one of them at the end.
LONG = (
    "conformance",
    "conformance_meshes",
    "cli",
    "core",
    "train",
    "adjoint",
    "benchmarks",
    "docs",
    "notebooks",
    "shell",
    "estimators",
)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONG)
