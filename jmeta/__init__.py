"""jmeta: functional meta-learning on JAX."""

from jmeta.adjoint import conjugate_gradient, exact, first_order, implicit, mixed_mode, neumann, truncated
from jmeta.checkpoint import restore, save
from jmeta.citations import citation
from jmeta.compilation import compiler_options
from jmeta.core import Adapted, Examples, MetaLearner, Model, Task, TaskSource, episodic, over_tasks
from jmeta.data.assays import average_precision_gain, from_assays
from jmeta.data.episodes import from_arrays
from jmeta.data.folders import from_folder
from jmeta.data.glyphs import glyphs
from jmeta.data.groups import from_groups
from jmeta.data.omniglot import omniglot
from jmeta.data.sinusoid import sinusoid
from jmeta.distances import cosine, squared_euclidean
from jmeta.envs.rollout import mean_return
from jmeta.errors import (
    CheckpointError,
    ConfigError,
    ConvergenceWarning,
    DataError,
    JmetaError,
    ModelError,
    NonFiniteError,
    UnknownNameError,
)
from jmeta.inner import InnerProblem, support_loss
from jmeta.learners.anil import anil
from jmeta.learners.boil import boil
from jmeta.learners.cavia import cavia
from jmeta.learners.imaml import imaml
from jmeta.learners.maml import fomaml, maml
from jmeta.learners.maml_plus_plus import maml_plus_plus
from jmeta.learners.maml_rl import maml_rl
from jmeta.learners.meta_curvature import meta_curvature
from jmeta.learners.meta_sgd import meta_sgd
from jmeta.learners.proto_maml import proto_maml
from jmeta.learners.prototypical import prototypical
from jmeta.learners.reptile import reptile
from jmeta.learners.rl2 import rl2
from jmeta.learners.transfer import baseline_plus_plus, linear_probe, transfer
from jmeta.losses import accuracy, mean_squared_error, softmax_cross_entropy
from jmeta.models.adapters import equinox, haiku, linen, nnx
from jmeta.models.convolution import Conv
from jmeta.models.networks import MLP, BatchNorm, Conv4
from jmeta.optimizers import repeated, trust_region
from jmeta.train import Fit, TrainState, evaluate, fit, init, make_step
