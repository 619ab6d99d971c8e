"""What a line of the registry says of a learner, a data set, a network."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import optax

from jmeta.core import MetaLearner, Model, TaskSource
from jmeta.inputs import Standardisation
from jmeta.losses import accuracy, mean_squared_error, softmax_cross_entropy
from jmeta.models.adapters import linen
from jmeta.optimizers import repeated
from jmeta.rl.rollout import mean_return

LOSSES: Mapping[str, Any] = {"classification": softmax_cross_entropy, "regression": mean_squared_error}
METRICS: Mapping[str, Any] = {"classification": accuracy, "regression": mean_squared_error, "environment": mean_return}


def adam(rate: float, steps: int) -> optax.GradientTransformation:
    """Adam at rate β, annealed to 0 by a cosine over the steps of the run."""
    return optax.adam(optax.cosine_decay_schedule(rate, steps))


def clipped_adam(rate: float, steps: int, norm: float = 10.0) -> optax.GradientTransformation:
    """`adam` of a gradient of at most a norm, as learned rates and rewards make some tasks' gradients explode."""
    return optax.chain(optax.clip_by_global_norm(norm), adam(rate, steps))


def sgd(rate: float, steps: int) -> optax.GradientTransformation:
    """Gradient descent at rate β, annealed to 0 by a line over the steps of the run."""
    return optax.sgd(optax.linear_schedule(rate, 0.0, steps))


def ppo(rate: float, steps: int) -> optax.GradientTransformation:
    """Eight epochs of clipped Adam on each batch of trajectories, at rate β annealed to 0 by a cosine."""
    epochs = 8
    return repeated(clipped_adam(rate, epochs * steps, norm=1.0), epochs)


class ModelEntry(NamedTuple):
    """A network in the registry.

    Args:
        make: `(outputs=..., **options) -> module`, or `(actions=..., **options)` of an action space for one that acts.
        summary: one line.
        paper: who and when.
        adapter: what makes a `Model` of the module.
    """

    make: Callable[..., Any]
    summary: str
    paper: str
    adapter: Callable[[Any], Model] = linen


class DataEntry(NamedTuple):
    """A data set in the registry.

    Args:
        load: `(split=, ways=, shots=, queries=, batch=) -> TaskSource`, split in train, validation, test; no `ways` and
            no `batch` where tasks have no classes, no `shots` where the support is an environment.
        summary: one line.
        paper: who and when.
        kind: of its tasks, `"classification"`, `"regression"`, or `"environment"` where the support is one to act in.
        defaults: options of `jmeta train` that suit the data; they come before those of the learner.
        descriptions: kinds of descriptions of classes that `load` takes as `descriptions=`, the usual one first.
        division: the classes or groups of each split, for data of your own.
        rows: how many rows each of them has.
        standardisation: what the numbers of a table were standardised by.
        outside: `(split=) -> [n, ...]`, inputs that are of no class, where the data have some.
    """

    load: Callable[..., TaskSource]
    summary: str
    paper: str
    kind: str = "classification"
    defaults: Mapping[str, Any] = {}
    descriptions: tuple[str, ...] = ()
    division: Mapping[str, Sequence[str]] = {}
    rows: Mapping[str, int] = {}
    standardisation: Standardisation | None = None
    outside: Callable[..., Any] | None = None


class LearnerEntry(NamedTuple):
    """A learner in the registry.

    Args:
        make: `(model, **options) -> MetaLearner`.
        summary: one line.
        paper: who and when.
        embedding: whether the model gives an embedding of any width instead of one output for each way.
        defaults: settings of `jmeta train` that suit the learner.
        regression: those that suit it where the data is a regression.
        network: options that the model needs, of those that it takes.
        optimizer: `(β, steps) -> optax transformation`, the outer optimiser of `jmeta train`.
        pretrains: whether it trains on batches of all classes at once, instead of on episodes.
        descriptions: whether the support must hold a description of each class.
        acts: whether the support is an environment to act in, instead of examples.
        unlabelled: whether it uses examples of the support that have no label.
        transductive: whether the answer to a query depends on the other queries, whatever the network.
    """

    make: Callable[..., MetaLearner]
    summary: str
    paper: str
    embedding: bool = False
    defaults: Mapping[str, Any] = {}
    regression: Mapping[str, Any] = {}
    network: Mapping[str, Any] = {}
    optimizer: Callable[[float, int], optax.GradientTransformation] = adam
    pretrains: bool = False
    descriptions: bool = False
    acts: bool = False
    unlabelled: bool = False
    transductive: bool = False
