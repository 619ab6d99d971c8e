"""Answers without the code that found them: a program of StableHLO, and a sealed file that holds one."""

import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export
from jaxtyping import Array

from jmeta.errors import CheckpointError, ModelError
from jmeta.files import write_whole

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


def read_program(program: bytes) -> export.Exported:
    """What `exported` gave, with its shapes; raises what JAX raises where it is none, or one of a newer JAX."""
    return export.deserialize(bytearray(program))


def run_program(inputs: Array, *, program: bytes) -> Array:
    """The answers of a program that `exported` gave."""
    return read_program(program).call(inputs)


def write_bytes(file: str | Path, content: bytes) -> None:
    """`write_whole` for a file that a user named.

    Raises:
        CheckpointError: it cannot be written, and why.
    """
    try:
        write_whole(Path(file).expanduser(), content)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be written ({error.strerror or error}); name another file.") from error


def write_sealed(file: str | Path, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> None:
    """Writes arrays, and what is to be known of them, as one `.npz` with a digest.

    Args:
        file: where; a file of that name is replaced.
        arrays: without Python objects.
        about: what JSON can hold.

    Raises:
        CheckpointError: it cannot be written, and why.

    Example:
        >>> import numpy as np, os, tempfile
        >>> from jmeta.export import read_sealed, write_sealed
        >>> file = os.path.join(tempfile.mkdtemp(), "x.npz")
        >>> write_sealed(file, {"x": np.arange(3)}, {})
        >>> read_sealed(file)[0]["x"].tolist()
        [0, 1, 2]
    """
    content: dict[str, Any] = {
        **arrays,
        "about": np.asarray(json.dumps({**about, "format": _FORMAT, "jmeta": version("jmeta")})),
    }
    buffer = io.BytesIO()
    np.savez(buffer, **content, digest=np.asarray(_digest(content)))
    write_bytes(file, buffer.getvalue())


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
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except Exception:  # zip, zlib and NumPy raise errors of many kinds on bytes that they did not write
        arrays = {}
    seal = arrays.pop("digest", np.asarray(""))
    if "about" not in arrays or str(seal) != _digest(arrays):
        raise CheckpointError(f"{file} is damaged, or no file that jmeta saved; save it anew.")
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
