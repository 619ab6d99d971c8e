"""Architecture search as meta-learning for architectures: DARTS, on the losses of any meta-learner."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Key, PyTree

from jmeta.adjoint import exact
from jmeta.bilevel import bilevel
from jmeta.core import MetaLearner, Params, Task, TaskSource
from jmeta.errors import ConfigError, ModelError
from jmeta.inner import Adjoint
from jmeta.search.cells import OPERATIONS, Edge, Genotype, edge_count
from jmeta.tree import combine, partition, under

# the paper's, without annealing
WEIGHTS_OPTIMIZER = optax.chain(
    optax.clip_by_global_norm(5.0), optax.add_decayed_weights(3e-4), optax.sgd(0.025, momentum=0.9)
)


def darts(
    learner: MetaLearner,
    *,
    inner_optimizer: optax.GradientTransformation = WEIGHTS_OPTIMIZER,
    adjoint: Adjoint = exact(),
    architecture: Callable[[str], bool] = under("architecture"),
) -> MetaLearner:
    """DARTS: architecture parameters θ by gradient descent on the loss that the weights φ have after a training step.

    min_θ F(φ − ξ ∇L(φ, θ), θ), one step of φ on the support for one step of θ on the query, where both L and F are the
    objective of a meta-learner, on tasks of different classes.

    Args:
        learner: whose architecture is searched: its model has architecture parameters, as
            `jmeta.search.CellNetwork(genotype=None)`. Prototypical networks, MAML, or a classifier.
        inner_optimizer: of the weights, ξ its rate; default the paper's, momentum at 0.025 without annealing.
        adjoint: `exact()` is the second-order search; `first_order()` takes ∇F at the weights as constants.
        architecture: a predicate on the path of a leaf of the parameters: which are θ.

    Returns:
        The learner of a bilevel problem with persistent inner variables, see `jmeta.bilevel`, for tasks from
        `search_tasks`: `params` is θ, and `state` holds the weights. `jmeta.genotype(params)` is the cell.

    Raises:
        ConfigError: from `init` and `fit`, no leaf is of the architecture.
        ModelError: from `init` and `fit`, the learner has a state, which is not carried.

    Example:
        >>> import jax, jmeta, optax
        >>> network = jmeta.search.CellNetwork(features=2, nodes=1, cells=("normal",))
        >>> learner = jmeta.darts(jmeta.prototypical(jmeta.linen(network)))
        >>> tasks = jmeta.search_tasks(jmeta.glyphs(queries=1), jmeta.glyphs(split="validation", queries=1))
        >>> found = jmeta.fit(jax.random.key(0), learner, tasks, steps=1, tasks=1, optimizer=optax.adam(3e-4))
        >>> cell = jmeta.genotype(found.params).normal  # ((operation, input), (operation, input))

    Reference: Liu, Simonyan, Yang 2019, "DARTS: Differentiable Architecture Search", algorithm 1,
    https://arxiv.org/abs/1806.09055.

    Differences from the paper: the step of the weights inside the hypergradient is also the one that is kept, where the
    paper takes another one after that of θ; the first-order search takes ∇F after that step, not before it. The Hessian
    product is exact, not a finite difference of gradients.
    """

    def objective(key: Key[Array, ""], φ: PyTree, θ: PyTree, tasks: Task) -> Array:
        _, state = jax.eval_shape(learner.init, key, jax.tree.map(lambda x: x[0], tasks))  # which has no leaves
        return learner.objective(key, combine(φ, θ), state, tasks)[0]

    def halves(key: Key[Array, ""], task: Task) -> tuple[PyTree, PyTree]:
        params, state = learner.init(key, jax.tree.map(lambda x: x[0], task.support))
        if jax.tree.leaves(state):
            raise ModelError(
                'the learner has a state, which a search does not carry; give the model norm="transductive" or "group".'
            )
        return partition(architecture, params)

    def outer(key: Key[Array, ""], task: Task) -> PyTree:
        return halves(key, task)[0]

    def inner(key: Key[Array, ""], θ: PyTree, support: Task) -> PyTree:
        return halves(key, Task(support, support))[1]

    return bilevel(
        outer, inner, objective, objective, inner_optimizer=inner_optimizer, adjoint=adjoint, persistent=True
    )


def search_tasks(support: TaskSource, query: TaskSource, *, tasks: int = 1) -> TaskSource:
    """Tasks of a search: episodes that train the weights, and episodes of other classes that judge the architecture.

    Args:
        support: where episodes for the weights come from.
        query: where episodes for the architecture come from.
        tasks: episodes of each in one step.

    Returns:
        A source whose task is a pair of batches of episodes.

    Raises:
        ConfigError: `tasks` below 1.

    Example:
        >>> import jax, jmeta
        >>> source = jmeta.search_tasks(jmeta.glyphs(), jmeta.glyphs(split="validation"), tasks=2)
        >>> source.sample(jax.random.key(0), source.data).support.query.inputs.shape
        (2, 75, 28, 28, 1)
    """
    if tasks < 1:
        raise ConfigError(f"tasks is {tasks}; give at least 1 episode.")

    samples = (support.sample, query.sample)  # without the data, so that equal sources share a program

    def sample(key: Key[Array, ""], data: PyTree) -> Task:
        keys = jax.random.split(key, (2, tasks))
        both = zip(keys, samples, data, strict=True)
        return Task(*(jax.vmap(one, (0, None))(keys, data) for keys, one, data in both))

    return TaskSource((support.data, query.data), sample, {**support.protocol, "episodes_a_step": tasks})


def genotype(params: Params, *, skips: int | None = None, operations: Mapping[str, object] = OPERATIONS) -> Genotype:
    """The discrete cells of architecture parameters.

    Each node keeps the two inputs whose best operation has the largest softmax weight, and that operation; zero does
    not count.

    Args:
        params: with `normal` and `reduction`, `[edges, operations]`, somewhere in the tree: θ of `darts`.
        skips: how many skip connections a normal cell may have at most; the weakest go first, and their edges take
            another operation. The known failure of DARTS is a cell of skips alone. None: as many as there are.
        operations: in the order of the parameters.

    Returns:
        The genotype, which `jmeta.search.CellNetwork(genotype=...)` builds.

    Raises:
        ConfigError: `skips` is negative.

    Example:
        >>> import jax.numpy as jnp, jmeta
        >>> logits = jnp.zeros((2, 8)).at[:, 4].set(1.0)
        >>> jmeta.genotype({"normal": logits, "reduction": logits}).normal
        (('separable_3x3', 0), ('separable_3x3', 1))

    Reference: Liu, Simonyan, Yang 2019, section 2.4; `skips`: Chen, Xie, Wu, Tian 2019, "Progressive Differentiable
    Architecture Search" (P-DARTS), section 3.3, https://arxiv.org/abs/1904.12760.
    """
    if skips is not None and skips < 0:
        raise ConfigError(f"skips is {skips}; give 0 or more skip connections.")
    names = tuple(operations)
    logits = {
        path[-1].key: np.asarray(x) for path, x in jax.tree.leaves_with_path(params) if path[-1].key in Genotype._fields
    }
    weights = {name: np.asarray(jax.nn.softmax(jnp.asarray(x), axis=-1)).copy() for name, x in logits.items()}
    for w in weights.values():
        w[:, names.index("zero")] = -1.0
    cells = {name: _derive(w, names) for name, w in weights.items()}
    while skips is not None and sum(name == "skip" for name, _ in cells["normal"]) > skips:
        _weaken(weights["normal"], cells["normal"], names)
        cells["normal"] = _derive(weights["normal"], names)
    return Genotype(**cells)


def _derive(weights: np.ndarray, names: tuple[str, ...]) -> tuple[Edge, ...]:
    edges: list[Edge] = []
    for node in range(_nodes(len(weights))):
        rows = weights[edge_count(node) : edge_count(node + 1)]
        for i in sorted(np.argsort(-rows.max(axis=1), kind="stable")[:2]):
            edges.append((names[int(rows[i].argmax())], int(i)))
    return tuple(edges)


def _weaken(weights: np.ndarray, cell: tuple[Edge, ...], names: tuple[str, ...]) -> None:
    """Takes away the weakest skip of a cell."""
    skip = names.index("skip")
    rows = [edge_count(k // 2) + i for k, (name, i) in enumerate(cell) if name == "skip"]
    weights[min(rows, key=lambda row: weights[row, skip]), skip] = -1.0


def _nodes(edges: int) -> int:
    return next(nodes for nodes in range(edges + 1) if edge_count(nodes) >= edges)


def random_genotype(seed: int, nodes: int = 2, operations: Mapping[str, object] = OPERATIONS) -> Genotype:
    """Cells drawn at random: the rival of every search.

    Args:
        seed: the same seed gives the same cells.
        nodes: of a cell.
        operations: which there are; zero is not drawn.

    Returns:
        A genotype whose nodes have two different inputs, each with an operation, all uniform.

    Example:
        >>> import jmeta
        >>> len(jmeta.random_genotype(0, nodes=3).normal)
        6

    Reference: Li, Talwalkar 2019, "Random Search and Reproducibility for Neural Architecture Search".
    """
    random = np.random.default_rng(seed)
    names = [name for name in operations if name != "zero"]

    def cell() -> tuple[Edge, ...]:
        inputs = [sorted(random.choice(node + 2, 2, replace=False)) for node in range(nodes)]
        return tuple((names[random.integers(len(names))], int(i)) for pair in inputs for i in pair)

    return Genotype(cell(), cell())


def genotype_of(cells: Any) -> Genotype:
    """A genotype from JSON, which has lists alone."""
    return Genotype(*(tuple((str(name), int(i)) for name, i in cell) for cell in cells))
