"""Strict promotion, checked shapes and quick compilation, switched on before jmeta is imported."""

import os

os.environ.setdefault("JAX_NUMPY_DTYPE_PROMOTION", "strict")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "2")
# most of the run is compilation, and LLVM's expensive passes are a third of it; what is computed stays the same
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax
import pytest
from jaxtyping import install_import_hook

install_import_hook("jmeta", "beartype.beartype")


@pytest.fixture
def float64():
    """Everything inside the test is computed in float64."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True, scope="module")
def compiled_programs_are_freed():
    """A worker that held the programs of many files, gigabytes of them, once crashed inside of the compiler."""
    yield
    jax.clear_caches()
