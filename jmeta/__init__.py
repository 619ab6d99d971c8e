"""jmeta: functional meta-learning on JAX."""

from jmeta.adjoint import exact, first_order, mixed_mode, truncated
from jmeta.checkpoint import restore, save
from jmeta.compilation import compiler_options
from jmeta.core import Adapted, Examples, MetaLearner, Model, Task, TaskSource, episodic
from jmeta.data.episodes import from_arrays
from jmeta.data.folders import from_folder
from jmeta.data.glyphs import glyphs
from jmeta.data.omniglot import omniglot
from jmeta.data.sinusoid import sinusoid
from jmeta.distances import cosine, squared_euclidean
from jmeta.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    JmetaError,
    ModelError,
    NonFiniteError,
    UnknownNameError,
)
from jmeta.inner import InnerProblem
from jmeta.learners.anil import anil
from jmeta.learners.maml import fomaml, maml
from jmeta.learners.prototypical import prototypical
from jmeta.losses import accuracy, mean_squared_error, softmax_cross_entropy
from jmeta.models.adapters import equinox, haiku, linen, nnx
from jmeta.models.convolution import Conv
from jmeta.models.networks import MLP, BatchNorm, Conv4
from jmeta.train import Fit, TrainState, evaluate, fit, init, make_step
