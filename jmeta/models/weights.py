"""The weights of networks from files: safetensors, `.npz`, and PyTorch's `.pth`, of which no code is run."""

import collections
import io
import json
import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, PyTree

from jmeta.core import Model, Params, State
from jmeta.errors import CheckpointError, ConfigError, ModelError
from jmeta.tree import path_name

Names = Mapping[str, str | None] | Callable[[str], str | None]
_WRAPPERS = ("params", "batch_stats", "task_stats", "model", "body")  # where learners and libraries keep a network
_IN_TORCH = {  # what PyTorch calls what Flax calls so; γ and β are those of TensorFlow's BERT
    "kernel": ("weight",),
    "embedding": ("weight",),
    "scale": ("weight", "gamma"),
    "bias": ("beta",),
    "mean": ("running_mean",),
    "var": ("running_var",),
}


@dataclass(frozen=True)
class Matched:
    """Which leaves of a network have the weights of a file.

    Args:
        source: the file, or whatever else has the weights.
        taken: the leaves that have them, and the name of each in the file.
        missing: the leaves that the file has not; they stay as they were.
        reshaped: the leaves that have another shape in the file, and both shapes.
        left: the names of the file that no leaf has.

    Example:
        >>> from jmeta.models.weights import Matched
        >>> print(Matched("x.pth", {"body/kernel": "body.weight"}, ("head/kernel",), {}, ("fc.weight",)))
        1 of 2 leaves are those of x.pth; not there: head/kernel; left in the file: fc.weight
    """

    source: str
    taken: Mapping[str, str]
    missing: tuple[str, ...]
    reshaped: Mapping[str, str]
    left: tuple[str, ...]

    @property
    def whole(self) -> bool:
        """Whether every leaf has its weights."""
        return not self.missing and not self.reshaped

    def __str__(self) -> str:
        total = len(self.taken) + len(self.missing) + len(self.reshaped)
        reshaped = [f"{leaf} {shapes}" for leaf, shapes in self.reshaped.items()]
        parts = [f"{len(self.taken)} of {total} leaves are those of {self.source}"]
        for what, names in (
            ("not there", self.missing),
            ("of another shape", reshaped),
            ("left in the file", self.left),
        ):
            if names:
                parts.append(f"{what}: {_few(names)}")
        return "; ".join(parts)


def load_params(file: str | Path, like: PyTree, *, names: Names | None = None) -> tuple[PyTree, Matched]:
    """The weights of a file in the place of those of a network.

    A leaf and an array of the file belong together by their names, where `/` is `.`, and PyTorch's `weight`,
    `running_mean` and `running_var` are Flax's `kernel` (`scale`, `embedding`), `mean` and `var`. A `kernel` that is a
    `weight` in the file is transposed from PyTorch's layout, outputs first, to Flax's, outputs last.

    Args:
        file: `.safetensors`, `.npz`, or `.pth` (`.pt`, `.bin`) as `torch.save(model.state_dict(), file)` writes it,
            which is read without running code that it may hold.
        like: what `model.init` gives, `(params, state)`, or the parameters alone.
        names: how the names of the file become those of the network, where they are others: beginnings and what stands
            for each, as `{"encoder.": "", "fc": "head"}`, None to leave an array away; or a function of the name.

    Returns:
        `(like with the weights of the file, which ones matched)`; leaves that the file has not stay as they were, and
        `print(matched)` tells them.

    Raises:
        CheckpointError: the file is missing or damaged, or holds more than arrays.
        ConfigError: a suffix of another kind.
        ModelError: arrays of another shape than their leaves, and which; or no name of the file is the network's.

    Example:
        >>> import jax, jax.numpy as jnp, jmeta, numpy as np, tempfile
        >>> model = jmeta.linen(jmeta.MLP(outputs=2, hidden=()))
        >>> file = tempfile.mkdtemp() + "/weights.npz"
        >>> np.savez(file, **{"fc.weight": np.ones((2, 3)), "fc.bias": np.zeros(2)})
        >>> like = model.init(jax.random.key(0), jnp.ones((1, 3)))
        >>> (params, state), matched = jmeta.load_params(file, like, names={"fc": "head"})
        >>> params["head"]["kernel"].shape, sorted(matched.taken)
        ((3, 2), ['0/head/bias', '0/head/kernel'])
    """
    filled, matched = match(read_weights(file), like, names, source=str(file))
    if matched.reshaped:
        told = _few([f"{leaf} {shapes}" for leaf, shapes in matched.reshaped.items()])
        raise ModelError(
            f"weights of {file} have another shape: {told}; give a network of that size, or leave them away by "
            "names={'...': None}."
        )
    return filled, matched


def pretrained(model: Model, params: Params, state: State | None = None) -> Model:
    """A network that starts at given weights instead of drawing them.

    Args:
        model: the network.
        params: as `load_params` gives.
        state: beside them, as moving averages; default: none.

    Returns:
        The network, for any learner.

    Example:
        >>> import jax, jax.numpy as jnp, jmeta
        >>> model, x = jmeta.linen(jmeta.MLP(outputs=None)), jnp.ones((1, 3))
        >>> params, state = model.init(jax.random.key(0), x)
        >>> learner = jmeta.prototypical(jmeta.pretrained(model, params, state))
    """

    def init(key: Key[Array, ""], inputs: PyTree) -> tuple[Params, State]:
        return jax.tree.map(jnp.asarray, (params, state or {}))

    return model._replace(init=init)


def match(
    arrays: Mapping[str, Any], like: PyTree, names: Names | None = None, *, source: str
) -> tuple[PyTree, Matched]:
    """`load_params` of arrays by name, where one of another shape is no error but told.

    Args:
        arrays: as `read_weights` gives, or the leaves of another tree by their path.
        like: a tree.
        names: as in `load_params`.
        source: where the arrays are from.

    Returns:
        As `load_params`.

    Raises:
        ModelError: no array has a name of the tree.
    """
    renamed = {new: name for name in arrays if (new := _renamed(name, names)) is not None}
    by_name = {name.replace("/", "."): old for name, old in renamed.items()}
    bare = {_bare(name): old for name, old in renamed.items()}
    taken, reshaped, missing = dict[str, str](), dict[str, str](), list[str]()
    seen = set[str]()

    def filled(path: Any, leaf: Any) -> Any:
        leaf_name = path_name(path)
        found = _found(leaf_name.replace("/", "."), by_name) or _found(_bare(leaf_name), bare)
        if found is None:
            missing.append(leaf_name)
            return leaf
        seen.add(found)
        array = np.asarray(arrays[found])
        if leaf_name.endswith("kernel") and found.endswith("weight"):
            array = array.transpose(*range(2, array.ndim), 1, 0)
        if array.shape != leaf.shape:
            reshaped[leaf_name] = f"{list(array.shape)} instead of {list(leaf.shape)}"
            return leaf
        taken[leaf_name] = found
        return jnp.asarray(array, leaf.dtype)

    tree = jax.tree.map_with_path(filled, like)
    left = tuple(name for name in renamed.values() if name not in seen and not name.endswith("num_batches_tracked"))
    if not taken and not reshaped:
        raise ModelError(
            f"no weights of {source} have a name of the network: there are {_few(left)}, and the network has "
            f"{_few(missing)}; give a file of this architecture, or names= that bring them together."
        )
    return tree, Matched(source, taken, tuple(missing), reshaped, left)


def _renamed(name: str, names: Names | None) -> str | None:
    if names is None:
        return name
    if callable(names):
        return names(name)
    for start in sorted(names, key=len, reverse=True):
        if name.startswith(start):
            new = names[start]
            return None if new is None else new + name[len(start) :]
    return name


def _bare(name: str) -> str:
    """A name without what wraps a network: the places of a tuple, collections, the part of a learner."""
    parts = name.replace("/", ".").split(".")
    while len(parts) > 1 and (parts[0] in _WRAPPERS or parts[0].isdecimal()):
        parts = parts[1:]
    return ".".join(parts)


def _found(leaf: str, names: Mapping[str, str]) -> str | None:
    """The array of a leaf, by Flax's name of it or by PyTorch's."""
    before, _, last = leaf.rpartition(".")
    for name in (last, *_IN_TORCH.get(last, ())):
        whole = f"{before}.{name}" if before else name
        if whole in names:
            return names[whole]
    return None


def _few(names: Any) -> str:
    shown = [str(name) for name in names]
    return ", ".join(shown[:5]) + (f" and {len(shown) - 5} more" if len(shown) > 5 else "")


def read_weights(file: str | Path) -> dict[str, np.ndarray]:
    """The arrays of a file by name; those of nested dictionaries by names with dots.

    Args:
        file: as in `load_params`.

    Returns:
        The arrays, as they are in the file.

    Raises:
        CheckpointError: the file is missing or damaged, or holds more than arrays.
        ConfigError: a suffix of another kind.
    """
    path = Path(file).expanduser()
    if path.suffix not in _READERS:
        raise ConfigError(f"{file} is of no kind that is read; give {', '.join(_READERS)}.")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror or error}); name a file of weights.") from error
    try:
        return _READERS[path.suffix](content)
    except _MoreThanArrays as error:
        raise CheckpointError(
            f"{file} holds {error}, which would run as code; write the arrays alone, by "
            "torch.save(model.state_dict(), file) or safetensors."
        ) from error
    except Exception as error:  # readers raise errors of many kinds on bytes that are not theirs
        raise CheckpointError(f"{file} is damaged, or no {path.suffix} file of weights; get it anew.") from error


_SAFETENSORS: dict[str, Any] = {"F64": "f8", "F32": "f4", "F16": "f2", "BF16": jnp.bfloat16, "BOOL": "?"}
_SAFETENSORS |= {f"{kind}{8 * size}": f"{kind.lower()}{size}" for kind in "IU" for size in (1, 2, 4, 8)}


def _read_safetensors(content: bytes) -> dict[str, np.ndarray]:
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    body = memoryview(content)[8 + size :]
    arrays = {}
    for name, about in header.items():
        if name != "__metadata__":
            start, end = about["data_offsets"]
            if not 0 <= start <= end <= len(body):
                raise ValueError("an array ends beyond the file")
            arrays[name] = np.frombuffer(body[start:end], _SAFETENSORS[about["dtype"]]).reshape(about["shape"])
    return arrays


def _read_npz(content: bytes) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(content), allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}


class _MoreThanArrays(Exception):
    """A pickle names something that is no tensor."""


@dataclass(frozen=True)
class _Tensor:
    """A view of a storage, whose bytes come later in the file."""

    storage: tuple[str, Any]
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def array(self, data: bytes) -> np.ndarray:
        flat = np.frombuffer(data, self.storage[1])
        last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        if min(self.offset, *self.strides, *self.shape, 0) < 0 or (0 not in self.shape and last >= len(flat)):
            raise ValueError("a tensor ends beyond its storage")
        strides = [s * flat.itemsize for s in self.strides]
        return np.lib.stride_tricks.as_strided(flat[self.offset :], self.shape, strides, writeable=False).copy()


_STORAGES = {"Double": "f8", "Float": "f4", "Half": "f2", "BFloat16": jnp.bfloat16, "Bool": "?"}
_STORAGES |= {"Long": "i8", "Int": "i4", "Short": "i2", "Char": "i1", "Byte": "u1"}


class _Tensors(pickle.Unpickler):
    """Makes dictionaries, numbers and tensors, and nothing else: no class or function of the file is imported."""

    def find_class(self, module: str, name: str) -> Any:
        known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): lambda storage, offset, shape, strides, *_: _Tensor(
                storage, offset, shape, strides
            ),
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
            **{("torch", f"{kind}Storage"): dtype for kind, dtype in _STORAGES.items()},
        }
        if (module, name) not in known:
            raise _MoreThanArrays(f"{module}.{name}")
        return known[module, name]

    def persistent_load(self, pid: Any) -> tuple[str, Any]:
        _, dtype, key, *_ = pid
        return str(key), dtype


def _read_pth(content: bytes) -> dict[str, np.ndarray]:
    stream = io.BytesIO(content)
    if content[:2] == b"PK":
        with zipfile.ZipFile(stream) as archive:
            (pickled,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            folder = pickled.removesuffix("data.pkl")
            tensors = _flat(_Tensors(archive.open(pickled)).load())
            keys = {tensor.storage[0] for tensor in tensors.values()}
            storages = {key: archive.read(f"{folder}data/{key}") for key in keys}
    else:  # of PyTorch before 1.6: pickles of a number, a version, the system, the object, the storages' keys
        *_, tree, keys = (_Tensors(stream).load() for _ in range(5))
        tensors = _flat(tree)
        size = {key: np.dtype(dtype).itemsize for key, dtype in (t.storage for t in tensors.values())}
        storages = {}
        for key in keys:
            length = int.from_bytes(stream.read(8), "little")
            storages[key] = stream.read(length * size.get(key, 1))
    return {name: tensor.array(storages[tensor.storage[0]]) for name, tensor in tensors.items()}


def _flat(tree: Any, before: str = "") -> dict[str, _Tensor]:
    if isinstance(tree, _Tensor):
        return {before: tree}
    below = tree.items() if isinstance(tree, Mapping) else ()
    return {k: t for name, part in below for k, t in _flat(part, f"{before}.{name}" if before else str(name)).items()}


_READERS: Mapping[str, Callable[[bytes], dict[str, np.ndarray]]] = {
    ".safetensors": _read_safetensors,
    ".npz": _read_npz,
    **dict.fromkeys((".pth", ".pt", ".bin"), _read_pth),
}
