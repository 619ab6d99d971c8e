"""The learners, one file each. The registry drives the command line and the conformance tests."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import optax

from jmeta.core import MetaLearner
from jmeta.learners.am3 import am3
from jmeta.learners.anil import anil
from jmeta.learners.boil import boil
from jmeta.learners.cavia import cavia
from jmeta.learners.imaml import imaml
from jmeta.learners.in_context import in_context
from jmeta.learners.late_fusion import late_fusion
from jmeta.learners.maml import fomaml, maml
from jmeta.learners.maml_plus_plus import maml_plus_plus
from jmeta.learners.maml_rl import maml_rl
from jmeta.learners.matching import matching
from jmeta.learners.meta_curvature import meta_curvature
from jmeta.learners.meta_sgd import meta_sgd
from jmeta.learners.metaoptnet import metaoptnet
from jmeta.learners.proto_maml import proto_maml
from jmeta.learners.prototypical import prototypical
from jmeta.learners.r2d2 import r2d2
from jmeta.learners.relation import relation
from jmeta.learners.reptile import reptile
from jmeta.learners.rl2 import rl2
from jmeta.learners.simpleshot import simpleshot
from jmeta.learners.transfer import baseline_plus_plus, linear_probe, transfer
from jmeta.learners.zero_shot import zero_shot
from jmeta.optimizers import repeated


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


class Entry(NamedTuple):
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


_GRADIENT = {"model": "conv4", "inner_rate": 0.4, "tasks": 8, "train_queries": 5}
_METRIC = {"model": "conv4-max", "tasks": 1, "train_ways": 20, "train_queries": 5}
_HEAD = {"model": "conv4-max", "tasks": 4, "train_queries": 5}
_PRETRAINED = {"model": "conv4", "tasks": 1, "batch": 64}
_MOVES_ONLY_THE_BODY = {"head_init": "random"}  # through a head of zeros no gradient reaches it

LEARNERS: Mapping[str, Entry] = {
    "maml": Entry(
        maml, "an initialisation from which gradient steps learn a task", "Finn et al. 2017", defaults=_GRADIENT
    ),
    "fomaml": Entry(fomaml, "MAML without second derivatives", "Finn et al. 2017", defaults=_GRADIENT),
    "reptile": Entry(
        reptile,
        "moves the initialisation towards the weights of each task",
        "Nichol et al. 2018",
        defaults=_GRADIENT
        | {"inner_rate": 1e-3, "inner_steps": 5, "test_inner_steps": 50, "train_queries": 9, "outer_rate": 1.0},
        regression={"inner_optimizer": "sgd", "inner_rate": 0.01, "inner_steps": 32, "outer_rate": 1.0},
        optimizer=sgd,
    ),
    "maml_plus_plus": Entry(
        maml_plus_plus,
        "MAML with learned rates, a multi-step loss and normalisation per step",
        "Antoniou et al. 2019",
        defaults=_GRADIENT | {"inner_rate": 0.1, "inner_steps": 5, "options": {"multi_step_loss": 500}},
        regression={"inner_rate": 0.01, "inner_steps": 2},  # with 5, learned rates diverge
        optimizer=clipped_adam,
    ),
    "anil": Entry(anil, "MAML that adapts the head alone", "Raghu et al. 2020", defaults=_GRADIENT),
    "boil": Entry(
        boil,
        "MAML that adapts the body alone",
        "Oh et al. 2021",
        defaults=_GRADIENT,
        network=_MOVES_ONLY_THE_BODY,
    ),
    "meta_sgd": Entry(meta_sgd, "MAML with a learned rate for each weight", "Li et al. 2017", defaults=_GRADIENT),
    "meta_curvature": Entry(
        meta_curvature, "MAML with a learned transformation of the gradient", "Park, Oliva 2019", defaults=_GRADIENT
    ),
    "cavia": Entry(
        cavia,
        "adapts a few context parameters alone",
        "Zintgraf et al. 2019",
        defaults=_GRADIENT | {"inner_rate": 1.0, "inner_steps": 2},
        regression={"inner_rate": 1.0, "inner_steps": 1},
        network={"context": 50} | _MOVES_ONLY_THE_BODY,
    ),
    "imaml": Entry(
        imaml,
        "MAML with the gradient of the minimum instead of the way there",
        "Rajeswaran et al. 2019",
        defaults=_GRADIENT | {"inner_rate": 0.1, "inner_steps": 16},
        regression={"inner_rate": 0.01, "inner_steps": 32},
    ),
    "proto_maml": Entry(
        proto_maml,
        "MAML whose head starts at the prototypes",
        "Triantafillou et al. 2020",
        embedding=True,
        defaults=_GRADIENT | {"inner_rate": 0.1, "inner_steps": 3},
    ),
    "prototypical": Entry(
        prototypical,
        "nearest class mean in a learned space",
        "Snell et al. 2017",
        embedding=True,
        defaults=_METRIC,
    ),
    "matching": Entry(
        matching,
        "attention over the labels of the support",
        "Vinyals et al. 2016",
        embedding=True,
        defaults=_METRIC | {"distance": "cosine"},
    ),
    "relation": Entry(
        relation,
        "a learned comparison of a query with each class",
        "Sung et al. 2018",
        embedding=True,
        defaults=_METRIC,
    ),
    "r2d2": Entry(
        r2d2,
        "a ridge regression on the support, differentiated through its solution",
        "Bertinetto et al. 2019",
        embedding=True,
        defaults=_HEAD,
    ),
    "metaoptnet": Entry(
        metaoptnet,
        "a support vector machine, differentiated through its solution",
        "Lee et al. 2019",
        embedding=True,
        defaults=_HEAD,
    ),
    "in_context": Entry(
        in_context,
        "a transformer that reads support and query as one sequence",
        "Kirsch et al. 2022",
        embedding=True,
        defaults=_HEAD,
    ),
    "zero_shot": Entry(
        zero_shot,
        "descriptions of classes as prototypes, without any example",
        "Snell et al. 2017",
        embedding=True,
        defaults=_METRIC | {"shots": 0},
        descriptions=True,
    ),
    "late_fusion": Entry(
        late_fusion,
        "distances to images and to descriptions, fused by what descriptions are worth",
        "jmeta",
        embedding=True,
        defaults=_METRIC | {"train_ways": 10, "train_shots": (0, 5)},
        descriptions=True,
    ),
    "am3": Entry(
        am3,
        "prototypes of images and descriptions, mixed by a gate",
        "Xing et al. 2019",
        embedding=True,
        defaults=_METRIC | {"train_ways": 10, "train_shots": (0, 10)},
        descriptions=True,
    ),
    "simpleshot": Entry(
        simpleshot,
        "nearest class mean on centred embeddings of a classifier of all training classes",
        "Wang et al. 2019",
        embedding=True,
        defaults=_PRETRAINED,
        pretrains=True,
    ),
    "transfer": Entry(
        transfer,
        "a classifier of all training classes, fine-tuned on each task",
        "Chen et al. 2019",
        embedding=True,
        defaults=_PRETRAINED | {"inner_rate": 0.05, "inner_steps": 20},
        regression={"inner_rate": 0.01, "inner_steps": 20, "options": {"new_head": False}},
        pretrains=True,
    ),
    "linear_probe": Entry(
        linear_probe,
        "logistic regression on embeddings of a classifier of all training classes",
        "Tian et al. 2020",
        embedding=True,
        defaults=_PRETRAINED,
        pretrains=True,
    ),
    "baseline_plus_plus": Entry(
        baseline_plus_plus,
        "a cosine classifier of all training classes, with a new head for each task",
        "Chen et al. 2019",
        embedding=True,
        defaults=_PRETRAINED | {"inner_rate": 1.0, "inner_steps": 50},
        pretrains=True,
    ),
    "maml_rl": Entry(
        maml_rl,
        "an initialisation from which policy-gradient steps learn a task from reward",
        "Finn et al. 2017",
        defaults={
            "model": "policy",
            "inner_rate": 0.1,
            "tasks": 20,
            "steps": 600,
            "queries": 20,
            "outer_rate": 5e-3,
            "options": {"trace": 0.9, "later_rate": 0.01},
        },
        optimizer=partial(clipped_adam, norm=1.0),
        acts=True,
    ),
    "rl2": Entry(
        rl2,
        "a recurrent policy whose memory is what it learned about the task",
        "Duan et al. 2016",
        defaults={"model": "recurrent-policy", "tasks": 512, "steps": 1500, "queries": 20, "outer_rate": 3e-3},
        optimizer=ppo,
        acts=True,
    ),
}
