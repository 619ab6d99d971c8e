"""Weights to begin with: those of another run, or of a file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jmeta.models.weights import Matched, match, read_weights
from jmeta.runs import settings
from jmeta.runs.config import Config
from jmeta.step import TrainState
from jmeta.tree import path_name


def weights_of(place: str | Path) -> Mapping[str, Any]:
    """The weights of a run, θ and state of its best validation, or of a file, by name.

    Args:
        place: the folder of a run, or a file as of `jmeta.load_params`.

    Returns:
        The arrays.

    Raises:
        CheckpointError: it is no run and no file of weights, or it is damaged.
        ConfigError: a file of another kind.
    """
    from jmeta.runs.run import load

    if not Path(place).expanduser().is_dir():
        return read_weights(place)
    run = load(place)
    return {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path((run.params, run.state))}


def started(config: Config, train_state: TrainState) -> tuple[TrainState, Matched | None]:
    """A `TrainState` before the first meta-step with the weights that the settings say.

    What a learner has beside its network, or of another size, as the head of a classifier of other classes, stays as it
    was drawn.

    Args:
        config: the settings.
        train_state: as `settings.begin` gives.

    Returns:
        The same with all weights that match, and which they are; None where the settings say none.

    Raises:
        ModelError: nothing matches.
        CheckpointError: as `weights_of`.
    """
    if config.from_ is None:
        return train_state, None
    like = (train_state.params, train_state.state)
    (params, state), matched = match(weights_of(config.from_), like, source=config.from_)
    optimizer_state = settings.make_optimizer(config).init(params)
    return train_state._replace(params=params, state=state, optimizer_state=optimizer_state), matched
