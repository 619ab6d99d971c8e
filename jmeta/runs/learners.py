"""The learners that the command line knows by name, with settings that suit them: the second half of the registry."""

from collections.abc import Mapping
from functools import partial

from jmeta.learners.am3 import am3
from jmeta.learners.anil import anil
from jmeta.learners.bd_cspn import bd_cspn
from jmeta.learners.boil import boil
from jmeta.learners.cavia import cavia
from jmeta.learners.feat import feat
from jmeta.learners.fused_cosine import fused_cosine
from jmeta.learners.imaml import imaml
from jmeta.learners.in_context import in_context
from jmeta.learners.label_propagation import label_propagation
from jmeta.learners.laplacian_shot import laplacian_shot
from jmeta.learners.late_fusion import late_fusion
from jmeta.learners.maml import fomaml, maml
from jmeta.learners.maml_plus_plus import maml_plus_plus
from jmeta.learners.matching import matching
from jmeta.learners.meta_baseline import meta_baseline
from jmeta.learners.meta_curvature import meta_curvature
from jmeta.learners.meta_sgd import meta_sgd
from jmeta.learners.metaoptnet import metaoptnet
from jmeta.learners.proto_maml import proto_maml
from jmeta.learners.prototypical import prototypical
from jmeta.learners.pt_map import pt_map
from jmeta.learners.r2d2 import r2d2
from jmeta.learners.relation import relation
from jmeta.learners.reptile import reptile
from jmeta.learners.simpleshot import simpleshot
from jmeta.learners.soft_kmeans import soft_kmeans
from jmeta.learners.tim import tim
from jmeta.learners.tip_adapter import tip_adapter
from jmeta.learners.transfer import baseline_plus_plus, linear_probe, transfer
from jmeta.learners.zero_shot import zero_shot
from jmeta.rl.maml_rl import maml_rl
from jmeta.rl.rl2 import rl2
from jmeta.runs.entries import LearnerEntry, clipped_adam, ppo, sgd

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
    "meta_baseline": LearnerEntry(
        meta_baseline,
        "nearest class mean by cosine, with a learned temperature",
        "Chen et al. 2021",
        embedding=True,
        defaults=_METRIC,
    ),
    "feat": LearnerEntry(
        feat,
        "class means that look at each other by attention",
        "Ye et al. 2020",
        embedding=True,
        defaults=_METRIC,
    ),
    "tim": LearnerEntry(
        tim,
        "a classifier of each task that is sure of every query and of no class for all of them",
        "Boudiaf et al. 2020",
        embedding=True,
        defaults=_METRIC,
        transductive=True,
    ),
    "pt_map": LearnerEntry(
        pt_map,
        "queries transported to the classes, equally many to each",
        "Hu et al. 2021",
        embedding=True,
        defaults=_METRIC,
        transductive=True,
    ),
    "laplacian_shot": LearnerEntry(
        laplacian_shot,
        "nearest class mean, with neighbours among the queries in the same class",
        "Ziko et al. 2020",
        embedding=True,
        defaults=_METRIC,
        transductive=True,
    ),
    "bd_cspn": LearnerEntry(
        bd_cspn,
        "class means mended by the queries nearest to them",
        "Liu et al. 2020",
        embedding=True,
        defaults=_METRIC,
        transductive=True,
    ),
    "label_propagation": LearnerEntry(
        label_propagation,
        "labels that flow over a learned graph of support and queries",
        "Liu et al. 2019",
        embedding=True,
        defaults=_METRIC,
        unlabelled=True,
        transductive=True,
    ),
    "soft_kmeans": LearnerEntry(
        soft_kmeans,
        "class means refined by examples without a label",
        "Ren et al. 2018",
        embedding=True,
        defaults=_METRIC | {"unlabelled": 5},
        unlabelled=True,
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
    "fused_cosine": LearnerEntry(
        fused_cosine,
        "cosines with the examples and with the name of a class, fused; for embeddings of one space",
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
    "tip_adapter": LearnerEntry(
        tip_adapter,
        "a classifier of class names, and a cache of the support beside it",
        "Zhang et al. 2022",
        embedding=True,
        defaults=_METRIC | {"train_ways": 10, "train_shots": (0, 5)},
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
