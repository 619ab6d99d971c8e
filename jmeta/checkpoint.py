"""Checkpoints of a training run, written by Orbax: complete or not there at all."""

from pathlib import Path

import jax
import orbax.checkpoint as ocp

from jmeta.errors import CheckpointError
from jmeta.train import TrainState

_OPTIONS = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)


def save(folder: str | Path, train_state: TrainState) -> None:
    """Writes a checkpoint; a process killed in the middle leaves the one before intact.

    Args:
        folder: where the checkpoints of the run lie, one sub-folder a step; the last two are kept.
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
    with ocp.CheckpointManager(Path(folder).absolute(), options=_OPTIONS) as manager:
        manager.save(int(train_state.step), args=ocp.args.StandardSave(train_state), force=True)


def latest_step(folder: str | Path) -> int | None:
    """The step of the newest complete checkpoint, or None."""
    if not Path(folder).is_dir():
        return None
    with ocp.CheckpointManager(Path(folder).absolute(), options=_OPTIONS) as manager:
        return manager.latest_step()


def restore(folder: str | Path, like: TrainState) -> TrainState:
    """Reads the newest complete checkpoint.

    Args:
        folder: as given to `save`.
        like: a `TrainState` of the same learner, model and optimiser, as `init` gives; its shapes are checked.

    Returns:
        The saved `TrainState`, bit for bit.

    Raises:
        CheckpointError: there is none, it is damaged, or it is of another learner, model or optimiser.
    """
    step = latest_step(folder)
    if step is None:
        raise CheckpointError(f"there is no checkpoint in {folder}; train first, or name another run.")
    try:
        with ocp.CheckpointManager(Path(folder).absolute(), options=_OPTIONS) as manager:
            restored = manager.restore(step, args=ocp.args.StandardRestore(like))
    except Exception as error:  # Orbax and TensorStore raise whatever they meet in a damaged file
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise CheckpointError(
            f"the checkpoint of step {step} in {folder} is damaged or of another model ({reason}); train anew, or name "
            "another run."
        ) from error
    if jax.tree.map(lambda x: (x.shape, x.dtype), restored) != jax.tree.map(lambda x: (x.shape, x.dtype), like):
        raise CheckpointError(f"the checkpoint in {folder} has other shapes than the model; name the run's own model.")
    return restored
