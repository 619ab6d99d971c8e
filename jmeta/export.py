"""Answers without the code that found them: a program of StableHLO, and a sealed file that holds one."""

import contextlib
import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export
from jaxtyping import Array

from jmeta.checkpoint import write_whole
from jmeta.errors import CheckpointError, ModelError

PLATFORMS = ("cpu", "cuda", "tpu")
_FORMAT = 1


def exported(answer: Callable[[Array], Array], shape: Sequence[int], dtype: Any) -> bytes:
    """The program of a function of any number of inputs, with all that it closes over as constants inside.

    Args:
        answer: `[n, *shape] -> [n, ...]`, for any n.
        shape: of one input.
        dtype: of the inputs.

    Returns:
        What `jax.export.deserialize` reads, for CPU, CUDA and TPU. JAX keeps reading it for at least half a year of
        newer versions.

    Raises:
        ModelError: the function cannot be traced for an unknown number of inputs.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jmeta.export import exported
        >>> program = exported(lambda x: 2 * x, (3,), jnp.float32)
        >>> jax.export.deserialize(bytearray(program)).call(jnp.ones((5, 3))).shape
        (5, 3)

    Reference: https://docs.jax.dev/en/latest/export/export.html.
    """
    (n,) = export.symbolic_shape("n")
    try:
        program = export.export(jax.jit(answer), platforms=PLATFORMS)(jax.ShapeDtypeStruct((n, *shape), dtype))
    except (TypeError, jax.errors.InconclusiveDimensionOperation) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ModelError(
            f"the network cannot be exported for any number of inputs ({reason}); write x.shape[0] for len(x), and "
            "compute no Python number from it."
        ) from error
    return bytes(program.serialize())


def answering(program: bytes) -> Callable[[Array], Array]:
    """The function of a program that `exported` gave, compiled once for each number of inputs.

    Raises:
        ValueError: it is none, or one of a newer JAX.
    """
    return jax.jit(export.deserialize(bytearray(program)).call)


def write_sealed(file: str | Path, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> None:
    """Writes arrays and what is to be known of them as one `.npz`, sealed by a digest; the file is whole or not there.

    Args:
        file: where; a file of that name is replaced.
        arrays: without Python objects.
        about: what JSON can hold.

    Raises:
        CheckpointError: it cannot be written, and why.
    """
    content = {**arrays, "about": np.asarray(json.dumps({**about, "format": _FORMAT}))}
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **content, digest=np.asarray(_digest(content)))
    write_file(file, buffer.getvalue())


def write_file(file: str | Path, content: bytes) -> None:
    """Writes a file in one go.

    Raises:
        CheckpointError: it cannot be written, and why.
    """
    try:
        write_whole(Path(file).expanduser(), content)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be written ({error.strerror or error}); name another file.") from error


def read_sealed(file: str | Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """What `write_sealed` wrote.

    Args:
        file: as given to `write_sealed`.

    Returns:
        `(arrays, about)`.

    Raises:
        CheckpointError: there is no such file, it is damaged or another's, or a newer version of jmeta wrote it.
    """
    try:
        content = Path(file).expanduser().read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror or error}); name a saved file.") from error
    arrays: dict[str, np.ndarray] = {}
    # zip, NumPy and zlib raise errors of many kinds on what they did not write
    with contextlib.suppress(ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile, NotImplementedError):
        with np.load(io.BytesIO(content), allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    seal = arrays.pop("digest", np.asarray(""))
    if "about" not in arrays or str(seal) != _digest(arrays):
        raise CheckpointError(f"{file} is damaged, or was not written by `save` of an estimator; save it anew.")
    about = json.loads(str(arrays.pop("about")))
    if about["format"] > _FORMAT:
        raise CheckpointError(f"{file} was written by jmeta {about['jmeta']}; install that version or a newer one.")
    return arrays, about


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(repr((name, array.dtype.str, array.shape)).encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
