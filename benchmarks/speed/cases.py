"""What is timed: the cases, their arrays, and the arithmetic that they need."""

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise, product
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import jmeta

Network = Literal["conv4-stride", "conv4-max", "mlp"]
Source = Literal["fixed", "arrays", "glyphs"]

FEATURES, SIZE, HIDDEN = 64, 28, (40, 40)
EPSILON = 1e-4  # of Adam: with 1e-8 its first step turns the rounding of a small gradient into a whole step
CLASSES, ROWS = 1000, 20  # of the arrays that tasks are drawn from, about as many as Omniglot has


@dataclass(frozen=True)
class Case:
    """What is timed.

    Args:
        group: the table that it stands in.
        network: a Conv4 on images 28x28 of one channel, or the MLP 1-40-40-1 on sinusoids.
        inner_steps: of MAML; 0 is a prototypical network.
        first_order: MAML without second derivatives.
        ways: classes of a task; 1 for a regression.
        shots: support examples a class.
        queries: query examples a class.
        tasks: tasks a meta-step.
        inner_rate: α.
        rate: β, of Adam.
        steps: meta-steps of one timed call.
        source: one fixed batch, tasks drawn from arrays of bytes, or glyphs with a random warp.
    """

    group: str
    network: Network
    inner_steps: int
    first_order: bool = False
    ways: int = 5
    shots: int = 1
    queries: int = 15
    tasks: int = 32
    inner_rate: float = 0.4
    rate: float = 1e-3
    steps: int = 3
    source: Source = "fixed"

    @property
    def name(self) -> str:
        """One line; unique."""
        network = {"conv4-stride": "stride, ", "conv4-max": "max-pool, ", "mlp": "sinusoid, "}[self.network]
        return (network if self.inner_steps else "ProtoNet, ") + self.label

    @property
    def label(self) -> str:
        """One line; unique within the group."""
        queries = f"{self.queries} quer{'ies' if self.queries > 1 else 'y'}"
        if not self.inner_steps:
            return f"{self.ways}-way {self.shots}-shot, {queries}"
        order = "first order" if self.first_order else "exact"
        steps = f"{self.inner_steps} step{'s' if self.inner_steps > 1 else ''}"
        drawn = self.source if self.source != "fixed" else ""
        return ", ".join(filter(None, (order, steps, queries if self.network != "mlp" else "", drawn)))


def _cases() -> list[Case]:
    networks: tuple[Network, ...] = ("conv4-stride", "conv4-max")
    # Where α makes the inner loop diverge (max-pooling, five steps at 0.4), the loss magnifies rounding.
    rates = {("conv4-stride", 1): 0.4, ("conv4-stride", 5): 0.1, ("conv4-max", 1): 0.05, ("conv4-max", 5): 0.01}
    titles = {"conv4-stride": "Conv4 with stride 2", "conv4-max": "Conv4 with max-pooling"}
    conv4 = [
        Case(
            f"MAML, {titles[network]}, 5-way 1-shot, 32 tasks",
            network,
            inner_steps,
            first_order,
            queries=queries,
            inner_rate=rates[network, inner_steps],
        )
        for network, first_order, inner_steps, queries in product(networks, (False, True), (1, 5), (15, 1))
    ]
    points: dict[str, Any] = {"ways": 1, "shots": 10, "queries": 10, "tasks": 25, "inner_rate": 0.01, "steps": 200}
    sinusoid = [Case("MAML, sinusoid MLP, 10-shot, 25 tasks", "mlp", inner_steps, **points) for inner_steps in (1, 5)]
    prototypical = Case("ProtoNet, one task", "conv4-max", 0, ways=60, queries=5, tasks=1)
    sources: tuple[Source, ...] = ("arrays", "glyphs")
    end_to_end = [
        Case(
            "End to end with sampling, MAML, Conv4 with stride 2, 5-way 1-shot, 32 tasks",
            "conv4-stride",
            1,
            queries=q,
            source=source,
        )
        for source, q in product(sources, (15, 1))
    ]
    return [*conv4, *sinusoid, prototypical, *end_to_end]


CASES = _cases()


@lru_cache(maxsize=2)
def batch(case: Case) -> jmeta.Task:
    """A fixed batch of tasks: random images, or points of sine waves."""
    random = np.random.default_rng(0)
    amplitude = random.uniform(0.1, 5, (case.tasks, 1, 1)).astype(np.float32)
    phase = random.uniform(0, np.pi, (case.tasks, 1, 1)).astype(np.float32)

    def examples(shots: int) -> jmeta.Examples:
        if case.network == "mlp":
            x = random.uniform(-5, 5, (case.tasks, shots, 1)).astype(np.float32)
            return jmeta.Examples(x, amplitude * np.sin(x - phase))
        images = random.random((case.tasks, case.ways * shots, SIZE, SIZE, 1), np.float32)
        return jmeta.Examples(images, _targets(case, shots))

    return jmeta.Task(examples(case.shots), examples(case.queries))


@lru_cache(maxsize=1)
def arrays() -> np.ndarray:
    """Random images of bytes, `[CLASSES, ROWS, 28, 28, 1]`."""
    return np.random.default_rng(0).integers(0, 256, (CLASSES, ROWS, SIZE, SIZE, 1), np.uint8)


def draw(case: Case, random: np.random.Generator) -> jmeta.Task:
    """A batch of tasks drawn from `arrays` in NumPy, for libraries that leave sampling to the host.

    It is kinder to them than the loaders that they ship: all images lie in memory, and one gather takes a batch.
    """
    chosen = np.stack([random.choice(CLASSES, case.ways, replace=False) for _ in range(case.tasks)])
    rows = random.permuted(np.tile(np.arange(ROWS), (case.tasks, case.ways, 1)), axis=-1)

    def examples(rows: np.ndarray) -> jmeta.Examples:
        images = arrays()[chosen[..., None], rows].reshape(case.tasks, -1, SIZE, SIZE, 1)
        return jmeta.Examples(images.astype(np.float32) / 255, _targets(case, rows.shape[-1]))

    last = case.shots + case.queries
    return jmeta.Task(examples(rows[..., : case.shots]), examples(rows[..., case.shots : last]))


def _targets(case: Case, shots: int) -> np.ndarray:
    targets = np.repeat(np.eye(case.ways, dtype=np.float32), shots, axis=0)
    return np.broadcast_to(targets, (case.tasks, *targets.shape))


def learner(case: Case, model: jmeta.Model | None = None) -> jmeta.MetaLearner:
    """The learner of jmeta, with its own network unless another is given."""
    model = model or jmeta.linen(_network(case))
    if not case.inner_steps:
        return jmeta.prototypical(model)
    make = jmeta.fomaml if case.first_order else jmeta.maml
    loss = jmeta.mean_squared_error if case.network == "mlp" else jmeta.softmax_cross_entropy
    return make(model, inner_rate=case.inner_rate, inner_steps=case.inner_steps, loss=loss)


def _network(case: Case) -> Any:
    outputs = case.ways if case.inner_steps else None
    if case.network == "mlp":
        return jmeta.MLP(outputs=outputs, hidden=HIDDEN)
    # the network of the papers, which the other libraries have
    of_the_paper: dict[str, Any] = {"norm": "transductive", "scale": False, "head_init": "random"}
    if case.network == "conv4-max":
        return jmeta.Conv4(outputs, features=FEATURES, pooling="max", **of_the_paper)
    return jmeta.Conv4(outputs, features=FEATURES, spatial="mean", **of_the_paper)


@lru_cache(maxsize=2)
def weights(case: Case) -> Any:
    """The initial weights of all systems, as jmeta draws and names them."""
    return learner(case).init(jax.random.key(0), jax.tree.map(lambda x: jnp.asarray(x[0]), batch(case)))[0]


def flops(case: Case) -> float:
    """The floating-point operations that one meta-step needs in its convolutions and dense layers.

    One application of a layer to one example is `c = 2 * multiply-adds` (for a convolution 3x3, 2 * 9 * inputs *
    outputs * pixels of the output). Of the layers after the first, forward costs `c`, the gradients of input and of
    weights `c` each. An exact inner step differentiates each of these three products by both of its factors: 3c + 6c.
    The first layer's input is data, so that forward and backward cost 2c and their derivatives 2c. With s support and q
    query examples a task and K inner steps:

        exact:        tasks * (K s (4 c₁ + 9 Σ c) + q (2 c₁ + 3 Σ c))
        first order:  tasks * (K s (2 c₁ + 3 Σ c) + q (2 c₁ + 3 Σ c))

    A prototypical network is first order with K = 1. Batch norm, losses and distances are left out.
    """
    first, *others = _layers(case)
    plain = 2 * first + 3 * sum(others)
    exact = 4 * first + 9 * sum(others)
    inner = exact if case.inner_steps and not case.first_order else plain
    return case.tasks * case.ways * (max(case.inner_steps, 1) * case.shots * inner + case.queries * plain)


def _layers(case: Case) -> list[int]:
    if case.network == "mlp":
        return [2 * a * b for a, b in pairwise((1, *HIDDEN, 1))]
    layers, size, channels = [], SIZE, 1
    for _ in range(4):
        output = -(-size // 2) if case.network == "conv4-stride" else size
        layers.append(2 * 9 * channels * FEATURES * output**2)
        size, channels = size // 2 if case.network == "conv4-max" else output, FEATURES
    return layers if not case.inner_steps else [*layers, 2 * FEATURES * case.ways]
