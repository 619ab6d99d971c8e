"""Checkpoints of a training run, written by Orbax and sealed by a digest: whole and unchanged, or not used at all."""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jmeta.devices import on_one_device
from jmeta.errors import CheckpointError, ConfigError, reason_of
from jmeta.files import write_whole
from jmeta.runs.hosts import everywhere, is_first, is_of_others, wait
from jmeta.step import TrainState
from jmeta.tree import leaf_shapes, path_name

_SEAL = "seal.json"
_LEFTOVER = re.compile(r"\d+\.(part|replaced|orbax-checkpoint-tmp.*)")  # what a killed write may leave
_KEPT = 2


def save(folder: str | Path, train_state: TrainState | PyTree) -> None:
    """Writes a checkpoint; a process killed in the middle, or a full disk, leaves the one before intact.

    On several hosts each process calls it, with a folder that all of them see; what is no array the first one writes.

    Args:
        folder: where the checkpoints of the run lie, one sub-folder a step; the last two are kept. Those of this step
            and later ones are replaced.
        train_state: what to write: a `TrainState`, or any pytree of arrays (parameters alone) into a folder of its own.

    Raises:
        CheckpointError: the checkpoint cannot be written, and why; or a tree would replace the checkpoints of a run.

    Example:
        >>> import jax, jmeta, optax, tempfile
        >>> learner = jmeta.maml(jmeta.linen(jmeta.MLP(outputs=1)), loss=jmeta.mean_squared_error)
        >>> train_state = jmeta.init(jax.random.key(0), learner, optax.adam(1e-3), jmeta.sinusoid())
        >>> folder = tempfile.mkdtemp()
        >>> jmeta.save(folder, train_state)
        >>> int(jmeta.restore(folder, train_state).step)
        0
    """
    import orbax.checkpoint as ocp

    path, tree = _absolute(folder), everywhere(on_one_device(_stored(train_state)))
    step = int(np.max(train_state.step)) if isinstance(train_state, TrainState) else 0  # that of the seed furthest on
    if not isinstance(train_state, TrainState) and any("step" in _leaves_of(path / str(s)) for s in _steps(path)):
        raise CheckpointError(f"{path} holds the checkpoints of a run, which this would replace; name another folder.")
    if not jax.tree.leaves(tree):
        raise CheckpointError(f"there is nothing to save in {path}: the tree has no leaves; give it some.")
    new = path / f"{step}.part"
    if is_first():
        _remove(folder for folder in path.glob("*") if _LEFTOVER.fullmatch(folder.name))
    replaced = [path / str(s) for s in _steps(path) if s >= step]
    if (path / str(step)).exists() and path / str(step) not in replaced:
        replaced.append(path / str(step))  # a write that was killed before it was sealed
    try:
        if is_first():
            new.mkdir(parents=True)
            _reserve(new / "room", tree)
        wait("a folder for a checkpoint")
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(new / "default", tree)
            checkpointer.wait_until_finished()
        if not is_first():
            wait("a sealed checkpoint")
            return
        names = sorted(file.relative_to(new).as_posix() for file in new.rglob("*") if file.is_file())
        seal = {"sha256": _digest(new, names), "files": names, "leaves": leaf_shapes(tree)}
        write_whole(new / _SEAL, json.dumps(seal))
        for old in replaced:
            old.rename(old.with_name(f"{old.name}.replaced"))
        new.rename(path / str(step))
    except Exception as error:  # Orbax and what it writes with raise errors of many kinds
        if is_of_others(error):
            raise
        _remove([new])
        raise CheckpointError(
            f"the checkpoint of step {step} cannot be written to {path} ({reason_of(error)}); make room there, or save "
            "elsewhere: those before it are as they were."
        ) from error
    wait("a sealed checkpoint")
    _remove(old.with_name(f"{old.name}.replaced") for old in replaced)
    _remove(path / str(s) for s in sorted(_steps(path))[:-_KEPT])


def latest_step(folder: str | Path) -> int | None:
    """The step of the newest complete checkpoint, or None."""
    return max(_steps(_absolute(folder)), default=None)


def restore(folder: str | Path, like: TrainState | PyTree, *, only: str | None = None, step: int | None = None) -> Any:
    """Reads the newest complete checkpoint.

    Args:
        folder: as given to `save`.
        like: a `TrainState` of the same learner, model and optimiser, as `init` gives, or a tree as it was saved; of
            which the shapes are used, and on which devices it lies: divided over a mesh, as `init(mesh=...)` gives it,
            or not, whatever the devices were that saved it.
        only: the name of a field of `TrainState`, as `"params"`: that alone is read and returned, so that learner and
            optimiser may be others. `like` is a `TrainState`, or a tree of that field.
        step: whose checkpoint to read instead of the newest.

    Returns:
        What was saved, bit for bit.

    Raises:
        CheckpointError: there is none, it is damaged (then the sentence tells which one before it is whole), or it is
            of another learner, model or optimiser, and which of them.
        ConfigError: `only` is no field of `TrainState`.

    Example:
        >>> import jax, jmeta, optax, tempfile
        >>> learner = jmeta.maml(jmeta.linen(jmeta.MLP(outputs=1)), loss=jmeta.mean_squared_error)
        >>> folder, source = tempfile.mkdtemp(), jmeta.sinusoid()
        >>> jmeta.save(folder, jmeta.init(jax.random.key(0), learner, optax.adam(1e-3), source))
        >>> other = jmeta.init(jax.random.key(1), learner, optax.sgd(1e-3), source)
        >>> params = jmeta.restore(folder, other, only="params")
        >>> other = other._replace(params=params)  # goes on from these with another optimiser
    """
    if only is not None and only not in TrainState._fields:
        raise ConfigError(f"only is {only!r}; give one of {', '.join(TrainState._fields)}.")
    path = _absolute(folder)
    step = latest_step(path) if step is None else step
    if step is None or step not in _steps(path):
        there = f": it has {', '.join(map(str, sorted(_steps(path))))}" if _steps(path) else ""
        which = "no checkpoint" if step is None else f"no checkpoint of step {step}"
        raise CheckpointError(f"there is {which} in {folder}{there}; train first, or name another run.")
    checkpoint = path / str(step)
    if not _is_whole(checkpoint):
        whole = [s for s in sorted(_steps(path)) if s < step and _is_whole(path / str(s))]
        rest = f"go back to step {whole[-1]}, which is whole" if whole else "train anew, as none before it is whole"
        raise CheckpointError(f"the checkpoint {checkpoint} is damaged; remove it to {rest}.")
    is_part = only is not None and not isinstance(like, TrainState)
    wanted = {only: like} if is_part else {only: getattr(like, only)} if only else _stored(like)
    sealed = {name: leaf for name, leaf in _leaves_of(checkpoint).items() if only is None or name.split("/")[0] == only}
    _compare(checkpoint, sealed, leaf_shapes(wanted))
    try:
        saved = _read(checkpoint, wanted, whole=only is None)
    except ValueError as error:  # the same arrays in other containers
        raise CheckpointError(
            f"the checkpoint {checkpoint} is of another version of jmeta, whose state had another form; train anew."
        ) from error
    if only is None:
        return saved if isinstance(like, TrainState) else saved["tree"]
    by_path = {path_name(p): leaf for p, leaf in jax.tree.leaves_with_path(saved)}
    return jax.tree.map_with_path(lambda p, _: by_path[path_name(p)], wanted)[only]


def _absolute(folder: str | Path) -> Path:
    return Path(folder).expanduser().absolute()


def _stored(tree: Any) -> Any:
    """What Orbax writes: a tree that is no `TrainState` lies under a name, so that it may be a single array."""
    if isinstance(tree, TrainState):
        return tree
    return {"tree": jax.tree.map(lambda x: x if _is_shape(x) else jnp.asarray(x), tree)}


def _is_shape(x: Any) -> bool:
    return isinstance(x, jax.ShapeDtypeStruct)


def _steps(path: Path) -> list[int]:
    """The steps of the sealed checkpoints; whatever else lies in the folder is somebody else's."""
    names = [seal.parent.name for seal in path.glob(f"*/{_SEAL}")]
    return [int(name) for name in names if name.isdecimal() and name == str(int(name))]


def _remove(folders: Iterable[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _reserve(file: Path, tree: PyTree) -> None:
    """Raises `OSError` where there is no room for the tree: Orbax, which writes in threads, prints pages instead."""
    leaves = jax.tree.leaves(tree)
    size = 2**16 + sum(2**10 + leaf.size * leaf.dtype.itemsize for leaf in leaves)
    with file.open("wb") as stream:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(stream.fileno(), 0, size)
        else:
            stream.write(bytes(size))
    file.unlink()


def _read(checkpoint: Path, like: PyTree, whole: bool) -> Any:
    """What has the form of a tree, or, where that is a part of what was saved, all of it."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        if not whole:
            wanted = {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(like)}
            saved = checkpointer.metadata(checkpoint / "default").item_metadata.tree
            like = jax.tree.map_with_path(lambda path, leaf: wanted.get(path_name(path), leaf), saved)
        return checkpointer.restore(checkpoint / "default", jax.tree.map(_here, like))


def _here(leaf: Any) -> Any:
    """A leaf to read to this device, unless it tells another: those that wrote it need not be there."""
    if isinstance(leaf, jax.Array) or (getattr(leaf, "sharding", None) is not None and _is_shape(leaf)):
        return leaf
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here)


def _compare(checkpoint: Path, there: dict[str, str], here: dict[str, str]) -> None:
    differing = [leaf for leaf in {**here, **there} if here.get(leaf) != there.get(leaf)]
    if not differing:
        return
    of_optimizer = all(leaf.split("/")[0] == "optimizer_state" for leaf in differing)
    other, help_ = (
        ("optimiser", "give the run's own, or take θ alone by jmeta.restore(folder, like, only='params')")
        if of_optimizer
        else ("model or learner", "put the run's own back")
    )
    leaf = differing[0]
    raise CheckpointError(
        f"the checkpoint {checkpoint} is of another {other}: it has {leaf} {there.get(leaf, 'missing')}, where the run "
        f"has {here.get(leaf, 'none')}; {help_}."
    )


def _seal(checkpoint: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        seal = json.loads((checkpoint / _SEAL).read_text())
        return seal if isinstance(seal, dict) else {}
    return {}


def _is_whole(checkpoint: Path) -> bool:
    """Looked at before Orbax, which prints pages about a damaged file and misses some damage."""
    seal = _seal(checkpoint)
    if "files" in seal:
        names = seal["files"]
    else:  # of the first versions, which hashed all there was
        files = (file for file in checkpoint.rglob("*") if file.is_file() and file.stem != Path(_SEAL).stem)
        names = [file.relative_to(checkpoint).as_posix() for file in sorted(files)]
    try:
        return isinstance(seal["leaves"], dict) and seal["sha256"] == _digest(checkpoint, names)
    except (OSError, KeyError, TypeError):
        return False


def _digest(checkpoint: Path, names: Iterable[str]) -> str:
    """Of the files that were written; what a file manager or a synchronising service adds does no harm."""
    digest = hashlib.sha256()
    for name in names:
        content = (checkpoint / name).read_bytes()
        digest.update(repr((name, len(content))).encode())
        digest.update(content)
    return digest.hexdigest()


def _leaves_of(checkpoint: Path) -> dict[str, str]:
    return dict(_seal(checkpoint).get("leaves", {}))
