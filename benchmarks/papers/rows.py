"""What is reproduced: the rows of the papers' tables, in the order in which they are run.

The settings are those of the command line. Inner rates are on the mean loss, see the pages of the learners.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jmeta.runs import settings
from jmeta.runs.config import Config

WAYS_1, WAYS_5 = ((5, 1), (20, 1)), ((5, 5), (20, 5))  # and shots


class Row(NamedTuple):
    """A number of a paper, and how it is reproduced.

    Args:
        name: data, episode, system.
        learner: of the registry.
        data: of the registry.
        settings: of the run, those that are not the learner's or the data's own.
        published: the number.
        theirs: where it is from, and what its protocol was.
    """

    name: str
    learner: str
    data: str
    settings: Mapping[str, Any]
    published: str
    theirs: str

    def config(self, seed: int = 0, scale: float = 1.0) -> Config:
        """The settings of one training, whose steps may be scaled."""
        own = {**self.settings, "steps": max(10, round(scale * self.settings["steps"])), "seed": seed}
        return settings.resolve(self.learner, self.data, **own)


class System(NamedTuple):
    """A learner with a network, in all episodes of Omniglot, split of Vinyals et al., rotations as classes.

    Args:
        name: with `transductive` where one query's answer depends on the others.
        learner: of the registry.
        settings: of all episodes.
        twenty: those that are others in 20-way.
        published: by the episode.
        theirs: as in `Row`.
    """

    name: str
    learner: str
    settings: Mapping[str, Any]
    twenty: Mapping[str, Any] = {}
    published: Mapping[str, str] = {}
    theirs: str = "no number for Omniglot"

    def row(self, ways: int, shots: int) -> Row:
        """Of one kind of episode."""
        episode = f"{ways}w{shots}s"
        own = {"ways": ways, "shots": shots, **self.settings, **(self.twenty if ways == 20 else {})}
        return Row(
            f"omniglot {episode} {self.name}",
            self.learner,
            "omniglot",
            own,
            self.published.get(episode, "–"),
            self.theirs,
        )


_MAML = {"5w1s": "98.7 ± 0.4", "5w5s": "99.9 ± 0.1", "20w1s": "95.8 ± 0.3", "20w5s": "98.9 ± 0.2"}
_FINN = "Finn et al. 2017: transductive, 60,000 steps"
# the authors' rate is 2.0 on the mean loss; with 0.4 the first 450 meta-steps are better on validation classes
_GRADIENT = {"tasks": 32, "train_queries": 5, "steps": 40_000}
_GRADIENT_20 = {"tasks": 16, "inner_steps": 5, "test_inner_steps": 5, "steps": 30_000}
_COMPARE = {"train_ways": 20, "train_queries": 5, "tasks": 4, "steps": 30_000}

FIRST = [
    System(
        "maml transductive",
        "maml",
        {"model": "conv4-maml", "inner_rate": 0.4, "test_inner_steps": 3, **_GRADIENT},
        _GRADIENT_20,
        _MAML,
        _FINN,
    ),
    System(
        "maml default",
        "maml",
        {"model": "conv4", "inner_rate": 0.4, **_GRADIENT},
        _GRADIENT_20,
        _MAML,
        _FINN,
    ),
    System(
        "prototypical",
        "prototypical",
        {"model": "conv4-max", "train_ways": 60, "train_queries": 5, "tasks": 1, "steps": 40_000},
        {},
        {"5w1s": "98.8", "5w5s": "99.7", "20w1s": "96.0", "20w5s": "98.9"},
        "Snell et al. 2017: trained 60-way",
    ),
    System(
        "maml++ transductive",
        "maml_plus_plus",
        {
            "model": "conv4-max",
            "norm": "transductive",
            "inner_rate": 0.1,
            "inner_steps": 5,
            "options": {"multi_step_loss": 5000},
            "tasks": 8,
            "train_queries": 5,
            "steps": 30_000,
        },
        {"steps": 20_000},
        {"5w1s": "99.47", "5w5s": "99.93", "20w1s": "97.65", "20w5s": "99.33"},
        "Antoniou et al. 2019: transductive, an ensemble of 5 checkpoints",
    ),
]

THEN = [
    System(
        "meta_sgd",
        "meta_sgd",
        {"model": "conv4", **_GRADIENT},
        {"tasks": 16, "steps": 30_000},
        {"5w1s": "99.53 ± 0.26", "20w1s": "95.93 ± 0.38"},
        "Li et al. 2017: transductive",
    ),
    System(
        "anil",
        "anil",
        {"model": "conv4", "inner_steps": 5, **_GRADIENT},
        {"tasks": 16, "steps": 30_000},
        {"20w1s": "96.2 ± 0.5"},
        "Raghu et al. 2020: transductive",
    ),
    System(
        "reptile",
        "reptile",
        {"model": "conv4", "tasks": 5, "inner_steps": 5, "train_queries": 9, "test_inner_steps": 50, "steps": 40_000},
        {"inner_steps": 10, "inner_rate": 5e-4, "options": {"inner_batch": 20}},
        {"5w1s": "95.39 ± 0.09", "20w1s": "88.14 ± 0.15"},
        "Nichol et al. 2018: not transductive, 100,000 and 200,000 steps",
    ),
    System("r2d2", "r2d2", {"model": "conv4-max", **_COMPARE}),
    System(
        "matching",
        "matching",
        {"model": "conv4-max", **_COMPARE},
        {},
        {"5w1s": "98.1", "20w1s": "93.8"},
        "Vinyals et al. 2016: not transductive",
    ),
    System(
        "relation",
        "relation",
        {"model": "conv4-max", **_COMPARE},
        {},
        {"5w1s": "99.6 ± 0.2", "20w1s": "97.6 ± 0.2"},
        "Sung et al. 2018: relation of feature maps by convolutions",
    ),
    System("in_context", "in_context", {"model": "conv4-max", **_COMPARE}),
]


def _sinusoid(learner: str, shots: int) -> Row:
    """A learner of sine waves with the settings that the registry has for it, trained as long as in MAML's paper."""
    published, theirs = _SINUSOID[learner]
    own = {"shots": shots, "steps": 70_000}
    return Row(f"sinusoid {shots}-shot {learner}", learner, "sinusoid", own, published.get(shots, "–"), theirs)


_SINUSOID: Mapping[str, tuple[Mapping[int, str], str]] = {
    "maml": ({5: "1.13 ± 0.18", 10: "0.77 ± 0.11"}, "Li et al. 2017: one step"),
    "meta_sgd": ({5: "0.90 ± 0.16", 10: "0.53 ± 0.09"}, "Li et al. 2017: one step"),
    "cavia": ({10: "0.19 to 0.21"}, "Zintgraf et al. 2019: one step, by the size of the context"),
}

ROWS: list[Row] = [
    *(system.row(*episode) for episodes in (WAYS_1, WAYS_5) for system in FIRST for episode in episodes),
    *(system.row(*episode) for system in THEN for episode in WAYS_1),
    *(_sinusoid(learner, shots) for shots in (10, 5, 20) for learner in _SINUSOID),
]
