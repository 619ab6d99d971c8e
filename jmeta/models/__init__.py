"""Networks in Flax Linen, the convolution they use, and adapters for other libraries."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

from flax import linen as nn

from jmeta.models.cells import CellNetwork, Genotype
from jmeta.models.networks import MLP, Conv4
from jmeta.models.policies import Policy, RecurrentPolicy
from jmeta.models.text import TextEncoder


class Entry(NamedTuple):
    """A network in the registry.

    Args:
        make: `(outputs=..., **options) -> module`, or `(actions=..., **options)` of an action space for one that acts.
        summary: one line.
        paper: who and when.
    """

    make: Callable[..., nn.Module]
    summary: str
    paper: str


MODELS: Mapping[str, Entry] = {
    "conv4": Entry(Conv4, "four convolutions of stride 2, group norm", "Finn et al. 2017, Wu, He 2018"),
    "conv4-max": Entry(
        partial(Conv4, pooling="max"), "four convolutions with 2x2 max-pooling, group norm", "Vinyals et al. 2016"
    ),
    "conv4-maml": Entry(
        partial(Conv4, norm="transductive", scale=False, spatial="mean", head_init="random"),
        "that of MAML on Omniglot: stride 2, transductive batch norm, spatial mean",
        "Finn et al. 2017",
    ),
    "conv4-maml-max": Entry(
        partial(Conv4, pooling="max", norm="transductive", scale=False, head_init="random"),
        "that of MAML on mini-ImageNet: max-pooling, transductive batch norm",
        "Finn et al. 2017",
    ),
    "conv4-protonet": Entry(
        partial(Conv4, pooling="max", norm="running"),
        "that of prototypical networks: max-pooling, batch norm with moving averages",
        "Snell et al. 2017",
    ),
    "policy": Entry(Policy, "perceptron 64-64 that acts without memory", "Finn et al. 2017"),
    "recurrent-policy": Entry(
        RecurrentPolicy, "gated recurrent unit of 128 that acts with a memory", "Duan et al. 2016"
    ),
    "mlp": Entry(MLP, "perceptron 40-40 for regression", "Finn et al. 2017"),
    "text": Entry(TextEncoder, "weighted sum of the embeddings of hashed n-grams", "Joulin et al. 2017"),
}
