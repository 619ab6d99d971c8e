"""What the command line knows by name: networks, data sets, learners, and settings that suit them."""

from collections.abc import Callable, Mapping
from functools import partial

from jmeta.core import TaskSource
from jmeta.data.clinc150 import clinc150
from jmeta.data.glyphs import DESCRIPTIONS, glyphs
from jmeta.data.omniglot import omniglot
from jmeta.data.sinusoid import sinusoid
from jmeta.learners.am3 import am3
from jmeta.learners.anil import anil
from jmeta.learners.boil import boil
from jmeta.learners.cavia import cavia
from jmeta.learners.imaml import imaml
from jmeta.learners.in_context import in_context
from jmeta.learners.late_fusion import late_fusion
from jmeta.learners.maml import fomaml, maml
from jmeta.learners.maml_plus_plus import maml_plus_plus
from jmeta.learners.matching import matching
from jmeta.learners.meta_curvature import meta_curvature
from jmeta.learners.meta_sgd import meta_sgd
from jmeta.learners.metaoptnet import metaoptnet
from jmeta.learners.proto_maml import proto_maml
from jmeta.learners.prototypical import prototypical
from jmeta.learners.r2d2 import r2d2
from jmeta.learners.relation import relation
from jmeta.learners.reptile import reptile
from jmeta.learners.simpleshot import simpleshot
from jmeta.learners.transfer import baseline_plus_plus, linear_probe, transfer
from jmeta.learners.zero_shot import zero_shot
from jmeta.models.efficientnet import EfficientNetLite0
from jmeta.models.networks import MLP, Conv4
from jmeta.models.resnet import ResNet12
from jmeta.models.text import TextEncoder
from jmeta.models.vit import ViT
from jmeta.rl import bandit, gaussian_bandit, hidden_cartpole, point_navigation, tabular_mdp
from jmeta.rl.maml_rl import maml_rl
from jmeta.rl.policies import Policy, RecurrentPolicy
from jmeta.rl.rl2 import rl2
from jmeta.runs.entries import DataEntry, LearnerEntry, ModelEntry, clipped_adam, ppo, sgd

MODELS: Mapping[str, ModelEntry] = {
    "conv4": ModelEntry(Conv4, "four convolutions of stride 2, group norm", "Finn et al. 2017, Wu, He 2018"),
    "conv4-max": ModelEntry(
        partial(Conv4, pooling="max"), "four convolutions with 2x2 max-pooling, group norm", "Vinyals et al. 2016"
    ),
    "conv4-maml": ModelEntry(
        partial(Conv4, norm="transductive", scale=False, spatial="mean", head_init="random"),
        "that of MAML on Omniglot: stride 2, transductive batch norm, spatial mean",
        "Finn et al. 2017",
    ),
    "conv4-maml-max": ModelEntry(
        partial(Conv4, pooling="max", norm="transductive", scale=False, head_init="random"),
        "that of MAML on mini-ImageNet: max-pooling, transductive batch norm",
        "Finn et al. 2017",
    ),
    "conv4-protonet": ModelEntry(
        partial(Conv4, pooling="max", norm="running"),
        "that of prototypical networks: max-pooling, batch norm with moving averages",
        "Snell et al. 2017",
    ),
    "resnet12": ModelEntry(
        ResNet12, "four residual blocks of three convolutions, 64-160-320-640, group norm", "Lee et al. 2019"
    ),
    "efficientnet-lite0": ModelEntry(
        EfficientNetLite0, "inverted residual blocks, batch norm with moving averages", "Tan, Le 2019"
    ),
    "vit": ModelEntry(ViT, "vision transformer ViT-S/16 in the layout of DINO", "Dosovitskiy et al. 2021"),
    "policy": ModelEntry(Policy, "perceptron 64-64 that acts without memory", "Finn et al. 2017"),
    "recurrent-policy": ModelEntry(
        RecurrentPolicy, "gated recurrent unit of 128 that acts with a memory", "Duan et al. 2016"
    ),
    "mlp": ModelEntry(MLP, "perceptron 40-40 for regression", "Finn et al. 2017"),
    "text": ModelEntry(TextEncoder, "weighted sum of the embeddings of hashed n-grams", "Joulin et al. 2017"),
}


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


DATA: Mapping[str, DataEntry] = {
    "glyphs": DataEntry(
        glyphs,
        "characters of matplotlib's fonts, randomly warped; needs no download",
        "jmeta",
        descriptions=DESCRIPTIONS,
    ),
    "glyphs-confusable": DataEntry(
        partial(glyphs, confusable=True),
        "glyphs, all classes of an episode from one base letter",
        "jmeta",
        descriptions=DESCRIPTIONS,
    ),
    "clinc150": DataEntry(
        clinc150,
        "what people ask an assistant, 150 intents, text",
        "Larson et al. 2019",
        defaults={"model": "text"},
        descriptions=("text",),
    ),
    "omniglot": DataEntry(
        omniglot, "handwritten characters, split of Vinyals et al., rotations are classes", "Lake et al. 2015"
    ),
    "omniglot-lake": DataEntry(
        _omniglot_lake,
        "handwritten characters, background and evaluation alphabets; validates on training characters",
        "Lake et al. 2015",
    ),
    "omniglot-maml": DataEntry(
        partial(omniglot, protocol="maml"), "handwritten characters, 1,200 to train, seeded", "Finn et al. 2017"
    ),
    "sinusoid": DataEntry(
        _sinusoid,
        "regression of sine waves of random amplitude and phase",
        "Finn et al. 2017",
        "regression",
        {
            "model": "mlp",
            "tasks": 25,
            "shots": 10,
            "queries": 10,
            "train_queries": 10,
            "steps": 20_000,
        },
    ),
    "point_navigation": DataEntry(
        _environments(point_navigation),
        "a point in the plane that shall find a goal by reward alone",
        "Finn et al. 2017",
        kind="environment",
    ),
    "bandit": DataEntry(
        _environments(bandit),
        "Bernoulli bandits of 5 arms and 10 pulls",
        "Duan et al. 2016",
        kind="environment",
    ),
    "gaussian_bandit": DataEntry(
        _environments(gaussian_bandit),
        "Gaussian bandits of 5 arms and 10 pulls",
        "jmeta",
        kind="environment",
    ),
    "hidden_cartpole": DataEntry(
        _environments(hidden_cartpole),
        "poles on carts of unknown masses, lengths, friction and motors",
        "Barto et al. 1983",
        kind="environment",
    ),
    "tabular_mdp": DataEntry(
        _environments(tabular_mdp),
        "random decision processes of 10 states and 5 actions",
        "Duan et al. 2016",
        kind="environment",
    ),
}


_GRADIENT = {"model": "conv4", "inner_rate": 0.4, "tasks": 8, "train_queries": 5}
_METRIC = {"model": "conv4-max", "tasks": 1, "train_ways": 20, "train_queries": 5}
_HEAD = {"model": "conv4-max", "tasks": 4, "train_queries": 5}
_PRETRAINED = {"model": "conv4", "tasks": 1, "batch": 64}
_MOVES_ONLY_THE_BODY = {"head_init": "random"}  # through a head of zeros no gradient reaches it

LEARNERS: Mapping[str, LearnerEntry] = {
    "maml": LearnerEntry(
        maml, "an initialisation from which gradient steps learn a task", "Finn et al. 2017", defaults=_GRADIENT
    ),
    "fomaml": LearnerEntry(fomaml, "MAML without second derivatives", "Finn et al. 2017", defaults=_GRADIENT),
    "reptile": LearnerEntry(
        reptile,
        "moves the initialisation towards the weights of each task",
        "Nichol et al. 2018",
        defaults=_GRADIENT
        | {"inner_rate": 1e-3, "inner_steps": 5, "test_inner_steps": 50, "train_queries": 9, "outer_rate": 1.0},
        regression={"inner_optimizer": "sgd", "inner_rate": 0.01, "inner_steps": 32, "outer_rate": 1.0},
        optimizer=sgd,
    ),
    "maml_plus_plus": LearnerEntry(
        maml_plus_plus,
        "MAML with learned rates, a multi-step loss and normalisation per step",
        "Antoniou et al. 2019",
        defaults=_GRADIENT | {"inner_rate": 0.1, "inner_steps": 5, "options": {"multi_step_loss": 500}},
        regression={"inner_rate": 0.01, "inner_steps": 2},  # with 5, learned rates diverge
        optimizer=clipped_adam,
    ),
    "anil": LearnerEntry(anil, "MAML that adapts the head alone", "Raghu et al. 2020", defaults=_GRADIENT),
    "boil": LearnerEntry(
        boil,
        "MAML that adapts the body alone",
        "Oh et al. 2021",
        defaults=_GRADIENT,
        network=_MOVES_ONLY_THE_BODY,
    ),
    "meta_sgd": LearnerEntry(
        meta_sgd, "MAML with a learned rate for each weight", "Li et al. 2017", defaults=_GRADIENT
    ),
    "meta_curvature": LearnerEntry(
        meta_curvature, "MAML with a learned transformation of the gradient", "Park, Oliva 2019", defaults=_GRADIENT
    ),
    "cavia": LearnerEntry(
        cavia,
        "adapts a few context parameters alone",
        "Zintgraf et al. 2019",
        defaults=_GRADIENT | {"inner_rate": 1.0, "inner_steps": 2},
        regression={"inner_rate": 1.0, "inner_steps": 1},
        network={"context": 50} | _MOVES_ONLY_THE_BODY,
    ),
    "imaml": LearnerEntry(
        imaml,
        "MAML with the gradient of the minimum instead of the way there",
        "Rajeswaran et al. 2019",
        defaults=_GRADIENT | {"inner_rate": 0.1, "inner_steps": 16},
        regression={"inner_rate": 0.01, "inner_steps": 32},
    ),
    "proto_maml": LearnerEntry(
        proto_maml,
        "MAML whose head starts at the prototypes",
        "Triantafillou et al. 2020",
        embedding=True,
        defaults=_GRADIENT | {"inner_rate": 0.1, "inner_steps": 3},
    ),
    "prototypical": LearnerEntry(
        prototypical,
        "nearest class mean in a learned space",
        "Snell et al. 2017",
        embedding=True,
        defaults=_METRIC,
    ),
    "matching": LearnerEntry(
        matching,
        "attention over the labels of the support",
        "Vinyals et al. 2016",
        embedding=True,
        defaults=_METRIC | {"distance": "cosine"},
    ),
    "relation": LearnerEntry(
        relation,
        "a learned comparison of a query with each class",
        "Sung et al. 2018",
        embedding=True,
        defaults=_METRIC,
    ),
    "r2d2": LearnerEntry(
        r2d2,
        "a ridge regression on the support, differentiated through its solution",
        "Bertinetto et al. 2019",
        embedding=True,
        defaults=_HEAD,
    ),
    "metaoptnet": LearnerEntry(
        metaoptnet,
        "a support vector machine, differentiated through its solution",
        "Lee et al. 2019",
        embedding=True,
        defaults=_HEAD,
    ),
    "in_context": LearnerEntry(
        in_context,
        "a transformer that reads support and query as one sequence",
        "Kirsch et al. 2022",
        embedding=True,
        defaults=_HEAD,
    ),
    "zero_shot": LearnerEntry(
        zero_shot,
        "descriptions of classes as prototypes, without any example",
        "Snell et al. 2017",
        embedding=True,
        defaults=_METRIC | {"model": "conv4-protonet", "shots": 0},
        descriptions=True,
    ),
    "late_fusion": LearnerEntry(
        late_fusion,
        "distances to images and to descriptions, fused by what descriptions are worth",
        "jmeta",
        embedding=True,
        defaults=_METRIC | {"train_ways": 10, "train_shots": (0, 5)},
        descriptions=True,
    ),
    "am3": LearnerEntry(
        am3,
        "prototypes of images and descriptions, mixed by a gate",
        "Xing et al. 2019",
        embedding=True,
        defaults=_METRIC | {"train_ways": 10, "train_shots": (0, 10)},
        descriptions=True,
    ),
    "simpleshot": LearnerEntry(
        simpleshot,
        "nearest class mean on centred embeddings of a classifier of all training classes",
        "Wang et al. 2019",
        embedding=True,
        defaults=_PRETRAINED,
        pretrains=True,
    ),
    "transfer": LearnerEntry(
        transfer,
        "a classifier of all training classes, fine-tuned on each task",
        "Chen et al. 2019",
        embedding=True,
        defaults=_PRETRAINED | {"inner_rate": 0.05, "inner_steps": 20},
        regression={"inner_rate": 0.01, "inner_steps": 20, "options": {"new_head": False}},
        pretrains=True,
    ),
    "linear_probe": LearnerEntry(
        linear_probe,
        "logistic regression on embeddings of a classifier of all training classes",
        "Tian et al. 2020",
        embedding=True,
        defaults=_PRETRAINED,
        pretrains=True,
    ),
    "baseline_plus_plus": LearnerEntry(
        baseline_plus_plus,
        "a cosine classifier of all training classes, with a new head for each task",
        "Chen et al. 2019",
        embedding=True,
        defaults=_PRETRAINED | {"inner_rate": 1.0, "inner_steps": 50},
        pretrains=True,
    ),
    "maml_rl": LearnerEntry(
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
    "rl2": LearnerEntry(
        rl2,
        "a recurrent policy whose memory is what it learned about the task",
        "Duan et al. 2016",
        defaults={"model": "recurrent-policy", "tasks": 512, "steps": 1500, "queries": 20, "outer_rate": 3e-3},
        optimizer=ppo,
        acts=True,
    ),
}
