"""Arrays that take seconds to make, kept on disk between runs."""

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from jmeta.files import cache_folder


def cached(name: str, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays of `make()`, read from the cache folder where an earlier call left them there.

    The folder is `$JMETA_CACHE`, else `jmeta` in `$XDG_CACHE_HOME`, else `~/.cache/jmeta`. A damaged file is made
    again; where the folder cannot be written, the arrays are made and returned, and nothing is kept.

    Args:
        name: file name without suffix; everything that the arrays depend on must be in it.
        make: makes the arrays by name; none of them may hold Python objects.

    Returns:
        The arrays by name.

    Example:
        >>> import numpy as np
        >>> from jmeta.data.cache import cached
        >>> cached("squares-v1", lambda: {"x": np.arange(4) ** 2})["x"].tolist()
        [0, 1, 4, 9]
    """
    file = cache_folder() / f"{name}.npz"
    with contextlib.suppress(Exception), file.open("rb") as stream:  # a damaged file may raise nearly anything
        return dict(np.load(stream).items())
    arrays = make()
    with contextlib.suppress(OSError):
        _write(file, arrays)
    return arrays


def _write(file: Path, arrays: dict[str, np.ndarray]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=file.parent, prefix=f".{file.stem}-", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as stream:
            np.savez_compressed(stream, allow_pickle=False, **arrays)
        Path(part).replace(file)  # a reader never sees half of a file, and two writers do no harm
    except BaseException:
        Path(part).unlink()
        raise
