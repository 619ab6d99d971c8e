"""Sources of tasks. The registry drives the command line."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from jaxtyping import Array, Float

from jmeta.core import TaskSource
from jmeta.data.clinc150 import clinc150
from jmeta.data.glyphs import DESCRIPTIONS, glyphs
from jmeta.data.omniglot import omniglot
from jmeta.data.sinusoid import sinusoid
from jmeta.envs import bandit, gaussian_bandit, hidden_cartpole, mean_return, point_navigation, tabular_mdp
from jmeta.losses import accuracy, mean_squared_error, softmax_cross_entropy

Measure = Callable[[Any, Any], Float[Array, ""]]


class Entry(NamedTuple):
    """A data set in the registry.

    Args:
        load: `(split=, ways=, shots=, queries=, batch=) -> TaskSource`, split in train, validation, test; no `ways` and
            no `batch` where tasks have no classes, no `shots` where the support is an environment.
        summary: one line.
        paper: who and when.
        loss: of one task.
        metric: what is reported.
        defaults: options of `jmeta train` that suit the data; they come before those of the learner.
        descriptions: kinds of descriptions of classes that `load` takes as `descriptions=`, the usual one first.
        environment: whether the support is an environment to act in, instead of examples.
    """

    load: Callable[..., TaskSource]
    summary: str
    paper: str
    loss: Measure = softmax_cross_entropy
    metric: Measure = accuracy
    defaults: Mapping[str, Any] = {}
    descriptions: tuple[str, ...] = ()
    environment: bool = False


def _environments(make: Callable[..., TaskSource]) -> Callable[..., TaskSource]:
    def load(*, split: str, queries: int) -> TaskSource:
        return make(queries=queries)  # no split: every task is drawn anew

    return load


def _sinusoid(*, split: str, shots: int, queries: int) -> TaskSource:
    return sinusoid(shots=shots, queries=queries)


def _omniglot_lake(*, split: str, ways: int, shots: int, queries: int, batch: int | None = None) -> TaskSource:
    # the protocol has no validation split, and its test characters must stay unseen
    split = "train" if split == "validation" else split
    return omniglot(split=split, ways=ways, shots=shots, queries=queries, protocol="lake", batch=batch)


DATA: Mapping[str, Entry] = {
    "glyphs": Entry(
        glyphs,
        "characters of matplotlib's fonts, randomly warped; needs no download",
        "jmeta",
        descriptions=DESCRIPTIONS,
    ),
    "glyphs-confusable": Entry(
        partial(glyphs, confusable=True),
        "glyphs, all classes of an episode from one base letter",
        "jmeta",
        descriptions=DESCRIPTIONS,
    ),
    "clinc150": Entry(
        clinc150,
        "what people ask an assistant, 150 intents, text",
        "Larson et al. 2019",
        defaults={"model": "text"},
        descriptions=("text",),
    ),
    "omniglot": Entry(
        omniglot, "handwritten characters, split of Vinyals et al., rotations are classes", "Lake et al. 2015"
    ),
    "omniglot-lake": Entry(
        _omniglot_lake,
        "handwritten characters, background and evaluation alphabets; validates on training characters",
        "Lake et al. 2015",
    ),
    "omniglot-maml": Entry(
        partial(omniglot, protocol="maml"), "handwritten characters, 1,200 to train, seeded", "Finn et al. 2017"
    ),
    "sinusoid": Entry(
        _sinusoid,
        "regression of sine waves of random amplitude and phase",
        "Finn et al. 2017",
        mean_squared_error,
        mean_squared_error,
        {
            "model": "mlp",
            "inner_rate": 0.01,
            "tasks": 25,
            "shots": 10,
            "queries": 10,
            "train_queries": 10,
            "steps": 20_000,
        },
    ),
    "point_navigation": Entry(
        _environments(point_navigation),
        "a point in the plane that shall find a goal by reward alone",
        "Finn et al. 2017",
        metric=mean_return,
        environment=True,
    ),
    "bandit": Entry(
        _environments(bandit),
        "Bernoulli bandits of 5 arms and 10 pulls",
        "Duan et al. 2016",
        metric=mean_return,
        environment=True,
    ),
    "gaussian_bandit": Entry(
        _environments(gaussian_bandit),
        "Gaussian bandits of 5 arms and 10 pulls",
        "jmeta",
        metric=mean_return,
        environment=True,
    ),
    "hidden_cartpole": Entry(
        _environments(hidden_cartpole),
        "poles on carts of unknown masses, lengths, friction and motors",
        "Barto et al. 1983",
        metric=mean_return,
        environment=True,
    ),
    "tabular_mdp": Entry(
        _environments(tabular_mdp),
        "random decision processes of 10 states and 5 actions",
        "Duan et al. 2016",
        metric=mean_return,
        environment=True,
    ),
}
