"""jmeta: functional meta-learning on JAX."""

from jmeta.adjoint import exact, first_order, implicit, mixed_mode, truncated
from jmeta.bilevel import bilevel
from jmeta.calibration import calibrate
from jmeta.compilation import compiler_options
from jmeta.core import Adapted, Examples, MetaLearner, Model, Task, TaskSource, episodic, over_tasks
from jmeta.data.assays import average_precision_gain, from_assays
from jmeta.data.augmentation import augmentation, augmented
from jmeta.data.clinc150 import clinc150
from jmeta.data.embeddings import from_embeddings
from jmeta.data.episodes import from_arrays, split_classes
from jmeta.data.folders import from_folder, read_images
from jmeta.data.given import from_tasks
from jmeta.data.glyphs import glyphs
from jmeta.data.groups import from_groups
from jmeta.data.omniglot import omniglot
from jmeta.data.sinusoid import sinusoid
from jmeta.data.stream import stream
from jmeta.data.text import TokenIds, hashed_text, inverse_document_frequency
from jmeta.data.tfds import benchmark, tfds
from jmeta.data.varying import varying
from jmeta.distances import (
    cosine,
    diagonal_mahalanobis,
    dot_product,
    euclidean,
    mahalanobis,
    squared_euclidean,
)
from jmeta.embedding import embed, embedded
from jmeta.errors import (
    CheckpointError,
    ConfigError,
    ConvergenceWarning,
    DataError,
    HostError,
    JmetaError,
    ModelError,
    NonFiniteError,
    NotFittedError,
    TransductiveWarning,
    UnknownNameError,
)
from jmeta.estimators import FewShotClassifier, FewShotPolicy, FewShotRegressor
from jmeta.evaluate import evaluate
from jmeta.inner import InnerProblem, support_loss
from jmeta.inputs import Standardisation, as_inputs
from jmeta.kinds import Similar
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
from jmeta.losses import (
    Pooled,
    accuracy,
    expected_calibration_error,
    mean_squared_error,
    negative_log_likelihood,
    softmax_cross_entropy,
)
from jmeta.metrics import auroc, harmonic_mean
from jmeta.models.adapters import equinox, haiku, identity, linen, nnx
from jmeta.models.convolution import Conv
from jmeta.models.efficientnet import EfficientNetLite0
from jmeta.models.lora import lora
from jmeta.models.metric import with_metric
from jmeta.models.networks import MLP, Conv4
from jmeta.models.norms import BatchNorm, GroupNorm
from jmeta.models.resnet import ResNet12
from jmeta.models.sentences import sentence_encoder
from jmeta.models.text import TextEncoder
from jmeta.models.vit import ViT
from jmeta.models.weights import load_params, pretrained
from jmeta.open_set import max_logit, max_probability
from jmeta.optimizers import projected, repeated, trust_region
from jmeta.rl.maml_rl import maml_rl
from jmeta.rl.rl2 import rl2
from jmeta.rl.rollout import mean_return
from jmeta.runs.checkpoint import restore, save
from jmeta.runs.citations import citation
from jmeta.runs.run import Run, load
from jmeta.search.architecture import darts, genotype, random_genotype, search_tasks
from jmeta.solvers import conjugate_gradient, neumann
from jmeta.step import TrainState, make_step
from jmeta.sweep import Sweep, sweep
from jmeta.train import Fit, fit, init

__version__ = "0.2.0.dev0"
