"""Compiled programs kept on disk between commands."""

import os
import warnings

import jax

from jmeta.files import cache_folder


def keep_programs() -> None:
    """Lets JAX keep what took long to compile in the cache folder, unless `JMETA_CACHE` is `off` or JAX has its own.

    Where an entry cannot be read or written it is as if there were none.
    """
    if os.environ.get("JMETA_CACHE") == "off" or jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    warnings.filterwarnings("ignore", message=".*persistent compilation cache.*")
    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
