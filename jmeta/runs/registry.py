"""What the command line knows by name: networks, data sets, learners, and settings that suit them."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from jmeta.core import TaskSource
from jmeta.data.clinc150 import clinc150, out_of_scope
from jmeta.data.glyphs import DESCRIPTIONS, glyphs
from jmeta.data.omniglot import omniglot
from jmeta.data.sinusoid import sinusoid
from jmeta.data.tfds import benchmark
from jmeta.models.efficientnet import EfficientNetLite0
from jmeta.models.networks import MLP, Conv4
from jmeta.models.resnet import ResNet12
from jmeta.models.text import TextEncoder
from jmeta.models.vit import ViT
from jmeta.rl import (
    ant_direction,
    ant_velocity,
    bandit,
    cheetah_direction,
    cheetah_velocity,
    gaussian_bandit,
    hidden_cartpole,
    point_navigation,
    tabular_mdp,
    walker_body,
)
from jmeta.rl.policies import Policy, RecurrentPolicy
from jmeta.runs.entries import DataEntry, LearnerEntry, ModelEntry
from jmeta.runs.learners import LEARNERS

__all__ = ["DATA", "LEARNERS", "MODELS", "DataEntry", "LearnerEntry", "ModelEntry"]

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
    "linear": ModelEntry(
        partial(MLP, hidden=()), "a linear map, which begins as a turn of the space; for embeddings", "jmeta"
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


def _omniglot_lake(
    *, split: str, ways: int, shots: int, queries: int, batch: int | None = None, query_balance: float | None = None
) -> TaskSource:
    # the protocol has no validation split, and its test characters must stay unseen
    split = "train" if split == "validation" else split
    size: Any = {"ways": ways, "shots": shots, "queries": queries, "batch": batch, "query_balance": query_balance}
    return omniglot(split=split, protocol="lake", **size)


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
        outside=out_of_scope,
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
    "cifar_fs": DataEntry(
        partial(benchmark, "cifar_fs"), "photographs of 100 kinds, 32 x 32; `cifar100`", "Bertinetto et al. 2019"
    ),
    "fc100": DataEntry(
        partial(benchmark, "fc100"), "the same, divided by superclass; `cifar100`", "Oreshkin et al. 2018"
    ),
    "cub": DataEntry(
        partial(benchmark, "cub"), "birds of 200 species, 84 x 84; `caltech_birds2011`", "Triantafillou et al. 2020"
    ),
    "cub_chen": DataEntry(
        partial(benchmark, "cub_chen"), "the same birds, 100 / 50 / 50; `caltech_birds2011`", "Chen et al. 2019"
    ),
    "mini_imagenet": DataEntry(
        partial(benchmark, "mini_imagenet"),
        "photographs of 100 kinds, 84 x 84, in the folder MINI_IMAGENET_DIR",
        "Vinyals et al. 2016",
    ),
    "mini_imagenet_64": DataEntry(
        partial(benchmark, "mini_imagenet_64"), "its classes, 64 x 64; `imagenet_resized/64x64`", "Vinyals et al. 2016"
    ),
    "tiered_imagenet": DataEntry(
        partial(benchmark, "tiered_imagenet"),
        "photographs of 608 kinds, 84 x 84, in the folder TIERED_IMAGENET_DIR",
        "Ren et al. 2018",
    ),
    "tiered_imagenet_64": DataEntry(
        partial(benchmark, "tiered_imagenet_64"), "its classes, 64 x 64; `imagenet_resized/64x64`", "Ren et al. 2018"
    ),
    "quickdraw": DataEntry(
        partial(benchmark, "quickdraw"), "drawings of 345 things; `quickdraw_bitmap`", "Triantafillou et al. 2020"
    ),
    "textures": DataEntry(partial(benchmark, "textures"), "47 textures, 84 x 84; `dtd`", "Triantafillou et al. 2020"),
    "vgg_flower": DataEntry(
        partial(benchmark, "vgg_flower"), "102 flowers, 84 x 84; `oxford_flowers102`", "Triantafillou et al. 2020"
    ),
    "clinc_oos": DataEntry(
        partial(benchmark, "clinc_oos"),
        "the utterances of clinc150, divided at random; `clinc_oos`",
        "Larson et al. 2019",
        defaults={"model": "text"},
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
    "cheetah_velocity": DataEntry(
        _environments(cheetah_velocity),
        "half-cheetahs that shall run at a velocity; needs Brax",
        "Finn et al. 2017",
        kind="environment",
    ),
    "cheetah_direction": DataEntry(
        _environments(cheetah_direction),
        "half-cheetahs that shall run forward or backward; needs Brax",
        "Finn et al. 2017",
        kind="environment",
    ),
    "ant_velocity": DataEntry(
        _environments(ant_velocity),
        "ants that shall run at a velocity; needs Brax",
        "Finn et al. 2017",
        kind="environment",
    ),
    "ant_direction": DataEntry(
        _environments(ant_direction),
        "ants that shall run forward or backward; needs Brax",
        "Finn et al. 2017",
        kind="environment",
    ),
    "walker_body": DataEntry(
        _environments(walker_body),
        "walkers of unknown masses, lengths, friction and damping; needs Brax",
        "Rothfuss et al. 2019",
        kind="environment",
    ),
    "tabular_mdp": DataEntry(
        _environments(tabular_mdp),
        "random decision processes of 10 states and 5 actions",
        "Duan et al. 2016",
        kind="environment",
    ),
}
