"""The learners, one file each. The registry drives the command line and the conformance tests."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jmeta.core import MetaLearner
from jmeta.learners.anil import anil
from jmeta.learners.maml import fomaml, maml
from jmeta.learners.prototypical import prototypical


class Entry(NamedTuple):
    """A learner in the registry.

    Args:
        make: `(model, **options) -> MetaLearner`.
        summary: one line.
        paper: who and when.
        embedding: whether the model gives an embedding of any width instead of one output for each way.
        defaults: options of `jmeta train` that suit the learner.
    """

    make: Callable[..., MetaLearner]
    summary: str
    paper: str
    embedding: bool = False
    defaults: Mapping[str, Any] = {}


_GRADIENT = {"model": "conv4", "inner_rate": 0.4, "tasks": 4}

LEARNERS: Mapping[str, Entry] = {
    "maml": Entry(
        maml, "an initialisation from which gradient steps learn a task", "Finn et al. 2017", False, _GRADIENT
    ),
    "fomaml": Entry(fomaml, "MAML without second derivatives", "Finn et al. 2017", False, _GRADIENT),
    "anil": Entry(anil, "MAML that adapts the head alone", "Raghu et al. 2020", False, _GRADIENT),
    "prototypical": Entry(
        prototypical,
        "nearest class mean in a learned space",
        "Snell et al. 2017",
        True,
        {"model": "conv4-max", "tasks": 1, "train_ways": 20, "train_queries": 5},
    ),
}
