"""The cells of differentiable architecture search, as a mixture of operations and as one that was chosen."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float

from jmeta.errors import ModelError
from jmeta.models.convolution import Conv, conv_general_dilated
from jmeta.models.norms import Norm, norm_layer

Images = Float[Array, "n height width channels"]
Before = Float[Array, "n height_before width_before channels_before"]
Results = Float[Array, "n new_height new_width features"]
Edge = tuple[str, int]


class Genotype(NamedTuple):
    """Two cells; in each, two edges a node: which operation, on which of the two inputs (0, 1) and the nodes (2, ...).

    Args:
        normal: of cells that keep the size.
        reduction: of cells that halve it.
    """

    normal: tuple[Edge, ...]
    reduction: tuple[Edge, ...]


class Settings(NamedTuple):
    """What all operations of a cell have in common.

    Args:
        features: channels of what an operation gives, and of what it gets.
        strides: 2 where it halves height and width.
        norm: the normalisation, as in `jmeta.Conv4`.
    """

    features: int
    strides: int
    norm: Norm


class SeparableConv(nn.Module):
    """A depthwise convolution and then a pointwise one, as one convolution whose kernel is the product of theirs.

    w[i, j, c, f] = d[i, j, c] p[c, f]. Nothing is between the two, so the result is the same, and on a CPU one dense
    convolution of few channels is faster than a grouped one, to any order of derivative.

    Args:
        features: channels of the result.
        kernel: height and width of d.
        strides: 1 or 2.
        dilation: spacing of the kernel's entries.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jmeta.search.cells import SeparableConv
        >>> SeparableConv(6, 3, strides=2).init_with_output(jax.random.key(0), jnp.ones((1, 8, 8, 4)))[0].shape
        (1, 4, 4, 6)
    """

    features: int
    kernel: int
    strides: int = 1
    dilation: int = 1

    @nn.compact
    def __call__(self, x: Images) -> Results:
        k, channels = self.kernel, x.shape[-1]
        start = nn.initializers.lecun_normal
        depthwise = self.param("depthwise", start(in_axis=(0, 1), out_axis=()), (k, k, channels), x.dtype)
        pointwise = self.param("pointwise", start(), (channels, self.features), x.dtype)
        w = depthwise[..., None] * pointwise[None, None]
        reach = self.dilation * (k - 1) // 2
        strides, dilation = (self.strides,) * 2, (self.dilation,) * 2
        return conv_general_dilated(x, w, strides, [(reach, reach)] * 2, rhs_dilation=dilation)


class _Pointwise(nn.Module):
    """ReLU, convolution 1x1, normalisation."""

    settings: Settings

    @nn.compact
    def __call__(self, x: Images, train: bool) -> Results:
        f, strides, norm = self.settings
        x = Conv(f, (1, 1), use_bias=False)(nn.relu(x[:, ::strides, ::strides]))
        return norm_layer(norm)(x, train=train)


class _Separable(nn.Module):
    """ReLU, depthwise and pointwise convolution, normalisation; `times` in a row."""

    settings: Settings
    kernel: int
    dilation: int = 1
    times: int = 2

    @nn.compact
    def __call__(self, x: Images, train: bool) -> Results:
        f, strides, norm = self.settings
        for _ in range(self.times):
            x = SeparableConv(f, self.kernel, strides, self.dilation)(nn.relu(x))
            x = norm_layer(norm)(x, train=train)
            strides = 1
        return x


class _Pooled(nn.Module):
    """The maximum or the mean of 3x3, and normalisation."""

    settings: Settings
    maximum: bool

    @nn.compact
    def __call__(self, x: Images, train: bool) -> Results:
        _, strides, norm = self.settings
        if self.maximum:
            y = _max_of_three(_max_of_three(x, 1), 2)[:, ::strides, ::strides]
        else:
            y = nn.avg_pool(x, (3, 3), (strides, strides), ((1, 1), (1, 1)), count_include_pad=False)
        return norm_layer(norm)(y, train=train)


def _max_of_three(x: Images, axis: int) -> Images:
    """The maximum of each entry and its two neighbours along an axis, whose second derivative is fast."""
    pads = [(int(i == axis), int(i == axis)) for i in range(4)]
    size = x.shape[axis]
    padded = jnp.pad(x, pads, constant_values=-jnp.inf)
    parts = [lax.slice_in_dim(padded, k, k + size, axis=axis) for k in range(3)]
    return jnp.maximum(jnp.maximum(parts[0], parts[1]), parts[2])


class _Skip(nn.Module):
    """Nothing, or where it halves the size a pointwise convolution."""

    settings: Settings

    @nn.compact
    def __call__(self, x: Images, train: bool) -> Results:
        return x if self.settings.strides == 1 else _Pointwise(self.settings)(x, train)


class _Zero(nn.Module):
    """No edge."""

    settings: Settings

    @nn.compact
    def __call__(self, x: Images, train: bool) -> Results:
        strides = self.settings.strides
        return jnp.zeros_like(x[:, ::strides, ::strides])


Operation = Callable[[Settings], nn.Module]

OPERATIONS: Mapping[str, Operation] = {
    "zero": _Zero,
    "skip": _Skip,
    "max_pool_3x3": lambda settings: _Pooled(settings, maximum=True),
    "average_pool_3x3": lambda settings: _Pooled(settings, maximum=False),
    "separable_3x3": lambda settings: _Separable(settings, 3),
    "separable_5x5": lambda settings: _Separable(settings, 5),
    "dilated_3x3": lambda settings: _Separable(settings, 3, dilation=2, times=1),
    "dilated_5x5": lambda settings: _Separable(settings, 5, dilation=2, times=1),
}


class _Mixture(nn.Module):
    """Σₒ wₒ o(x) over operations o: an edge of a cell that is searched."""

    settings: Settings
    operations: Mapping[str, Operation]

    @nn.compact
    def __call__(self, x: Images, weights: Float[Array, "operations"], train: bool) -> Results:
        results = {name: make(self.settings)(x, train) for name, make in self.operations.items()}
        if len({y.shape for y in results.values()}) > 1:
            shapes = ", ".join(f"{name} {list(y.shape)}" for name, y in results.items())
            raise ModelError(
                f"the operations of an edge give different shapes: {shapes}; they are summed, so make them equal."
            )
        return sum((w * y for w, y in zip(weights, results.values(), strict=True)), jnp.zeros((), x.dtype))


class _Cell(nn.Module):
    """A cell of two inputs; `weights` mix all edges, or else `edges` are two a node."""

    settings: Settings
    nodes: int
    operations: Mapping[str, Operation]
    edges: tuple[Edge, ...] | None

    @nn.compact
    def __call__(self, before: Before, last: Images, weights: Array | None, train: bool) -> Results:
        f, strides, norm = self.settings
        same = Settings(f, 1, norm)
        halved = same._replace(strides=2 if before.shape[1] > last.shape[1] else 1)
        states = [_Pointwise(halved)(before, train), _Pointwise(same)(last, train)]
        for node in range(self.nodes):
            parts = []
            if weights is not None:
                first = edge_count(node)
                for i, x in enumerate(list(states)):
                    settings = same._replace(strides=strides if i < 2 else 1)
                    parts.append(_Mixture(settings, self.operations)(x, weights[first + i], train))
            elif self.edges is not None:
                for name, i in self.edges[2 * node : 2 * node + 2]:
                    settings = same._replace(strides=strides if i < 2 else 1)
                    parts.append(self.operations[name](settings)(states[i], train))
            states.append(sum(parts[1:], parts[0]))
        return jnp.concatenate(states[2:], axis=-1)


class _Architecture(nn.Module):
    """The architecture parameters: one logit for each operation of each edge."""

    edges: int
    operations: int

    @nn.compact
    def __call__(self) -> dict[str, Float[Array, "edges operations"]]:
        start = nn.initializers.normal(1e-3)
        return {name: self.param(name, start, (self.edges, self.operations)) for name in Genotype._fields}


class CellNetwork(nn.Module):
    """A stem of stride 2 and a row of cells; without a genotype, every edge is a mixture that `jmeta.darts` searches.

    ō(x) = Σₒ softmax(a)ₒ o(x) on each edge, with the architecture parameters a under `architecture`.

    Args:
        outputs: width of the last layer, called `head`; None leaves it away and gives the embedding.
        features: channels of the operations of the first cell; each reduction doubles them.
        cells: `"normal"` or `"reduction"`, from the stem to the end.
        nodes: of a cell, whose result is all of them side by side.
        genotype: the cells that were chosen; None for the search.
        norm: the normalisation, as in `jmeta.Conv4`.
        operations: by name, each a function from `Settings` to a module that is called with images and `train`.

    Raises:
        ModelError: operations of an edge that give different shapes.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jmeta.search import CellNetwork
        >>> network = CellNetwork(outputs=None, features=4, nodes=1, cells=("normal",))
        >>> network.init_with_output(jax.random.key(0), jnp.ones((2, 8, 8, 1)))[0].shape
        (2, 4)

    Reference: Liu, Simonyan, Yang 2019, "DARTS: Differentiable Architecture Search", section 2.1 and 2.2,
    https://arxiv.org/abs/1806.09055.

    Differences from the paper: batch norm has a bias in the search, too; a skip that halves the size is one pointwise
    convolution; sizes of network and cell are those of small images.
    """

    outputs: int | None = None
    features: int = 16
    cells: tuple[str, ...] = ("normal", "reduction", "normal")
    nodes: int = 2
    genotype: Genotype | None = None
    norm: Norm = "transductive"
    operations: Mapping[str, Operation] = nn.FrozenDict(OPERATIONS)

    @nn.compact
    def __call__(self, images: Images, train: bool = True) -> Float[Array, "n outputs"]:
        weights: dict[str, Any] = dict.fromkeys(Genotype._fields)
        if self.genotype is None:
            architecture = _Architecture(edge_count(self.nodes), len(self.operations), name="architecture")
            weights = {name: jax.nn.softmax(a, axis=-1) for name, a in architecture().items()}
        f = self.features
        stem = Conv(self.nodes * f, (3, 3), strides=2, use_bias=False)(images)
        before = last = norm_layer(self.norm)(stem, train=train)
        for kind in self.cells:
            f = 2 * f if kind == "reduction" else f
            settings = Settings(f, 2 if kind == "reduction" else 1, self.norm)
            edges = None if self.genotype is None else getattr(self.genotype, kind)
            cell = _Cell(settings, self.nodes, self.operations, edges)
            before, last = last, cell(before, last, weights[kind], train)
        x = last.mean(axis=(1, 2))
        return x if self.outputs is None else nn.Dense(self.outputs, name="head")(x)


def edge_count(nodes: int) -> int:
    """The edges of the first `nodes` nodes of a cell: 2, 3, 4, ... of the nodes one after the other."""
    return nodes * (nodes + 3) // 2
