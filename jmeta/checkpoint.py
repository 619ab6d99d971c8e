"""Checkpoints of a training run, written by Orbax and sealed by a digest: whole and unchanged, or not used at all."""

import hashlib
import json
from pathlib import Path
from typing import Any

import jax

from jmeta.errors import CheckpointError
from jmeta.train import TrainState
from jmeta.tree import path_name

_SEAL = "seal.json"


def save(folder: str | Path, train_state: TrainState) -> None:
    """Writes a checkpoint; a process killed in the middle leaves the one before intact.

    Args:
        folder: where the checkpoints of the run lie, one sub-folder a step; the last two are kept. Those of this step
            and later ones are replaced.
        train_state: what to write.

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

    step, path = int(train_state.step), Path(folder).absolute()
    with _manager(path) as manager:
        for stale in [s for s in manager.all_steps() if s >= step]:
            manager.delete(stale)
        manager.save(step, args=ocp.args.StandardSave(train_state), force=True)
    seal = {"sha256": _digest(path / str(step)), "leaves": _leaves(train_state)}
    write_whole(path / str(step) / _SEAL, json.dumps(seal))


def latest_step(folder: str | Path) -> int | None:
    """The step of the newest complete checkpoint, or None."""
    names = [seal.parent.name for seal in Path(folder).glob(f"*/{_SEAL}")]
    return max((int(name) for name in names if name.isdigit()), default=None)


def restore(folder: str | Path, like: TrainState) -> TrainState:
    """Reads the newest complete checkpoint.

    Args:
        folder: as given to `save`.
        like: a `TrainState` of the same learner, model and optimiser, as `init` gives; shapes are all that is used.

    Returns:
        The saved `TrainState`, bit for bit.

    Raises:
        CheckpointError: there is none, it is damaged, or it is of another learner, model or optimiser.
    """
    import orbax.checkpoint as ocp

    step = latest_step(folder)
    if step is None:
        raise CheckpointError(f"there is no checkpoint in {folder}; train first, or name another run.")
    path = Path(folder).absolute()
    there, here = _sealed_leaves(path / str(step)), _leaves(like)
    for leaf in {**here, **there}:
        if here.get(leaf) != there.get(leaf):
            raise CheckpointError(
                f"the checkpoint {path / str(step)} is of another model or learner: it has {leaf} "
                f"{there.get(leaf, 'missing')}, where the run has {here.get(leaf, 'none')}; put the run's own back."
            )
    with _manager(path) as manager:
        return manager.restore(step, args=ocp.args.StandardRestore(like))


def write_whole(file: Path, text: str) -> None:
    """Replaces a file in one go, so that a kill leaves the old one or the new one."""
    part = file.with_suffix(".part")
    part.write_text(text)
    part.replace(file)


def _manager(path: Path) -> Any:
    import orbax.checkpoint as ocp

    return ocp.CheckpointManager(
        path, options=ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    )


def _sealed_leaves(path: Path) -> dict[str, str]:
    """What a checkpoint holds; read before Orbax, which prints pages about a damaged file and misses some damage."""
    try:
        seal = json.loads((path / _SEAL).read_text())
        digest, leaves = seal["sha256"], dict(seal["leaves"])
    except (OSError, ValueError, KeyError, TypeError):
        digest, leaves = None, {}
    if digest != _digest(path):
        raise CheckpointError(f"the checkpoint {path} is damaged; remove it to go back to the one before it.")
    return leaves


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(file for file in path.rglob("*") if file.is_file() and file.stem != Path(_SEAL).stem):
        digest.update(repr((str(file.relative_to(path)), file.stat().st_size)).encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _leaves(train_state: TrainState) -> dict[str, str]:
    return {path_name(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in jax.tree.leaves_with_path(train_state)}
