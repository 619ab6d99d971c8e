"""The inner problem: what a learner minimises on the support of one task."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import optax
from jaxtyping import Array, Float, Key, PyTree

from jmeta.core import Adapted, Params, State
from jmeta.errors import ConfigError
from jmeta.tree import everything


class InnerLoss(Protocol):
    """The loss of the inner loop."""

    def __call__(
        self, key: Key[Array, ""], params: Params, state: State, support: PyTree
    ) -> tuple[Float[Array, ""], State]: ...


class InnerProblem(NamedTuple):
    """The inner loop φ₀ = θ, φₖ₊₁ = φₖ + update(∇L(φₖ)), apart from how to differentiate through it.

    Args:
        loss: `(key, params, state, support) -> (scalar, state)`, L.
        optimiser: any optax transformation; `optax.sgd(α)` gives φₖ₊₁ = φₖ − α ∇L(φₖ).
        num_steps: K, the number of inner steps.
        adaptable: a predicate on the path of a leaf of θ (`"head/kernel"`): which leaves the inner loop changes.
    """

    loss: InnerLoss
    optimiser: optax.GradientTransformation
    num_steps: int
    adaptable: Callable[[str], bool] = everything


Solve = Callable[[Key[Array, ""], Params, State, PyTree], Adapted]
Adjoint = Callable[[InnerProblem], Solve]


def check_inner(inner_rate: float, inner_steps: int) -> None:
    """Raises `ConfigError` unless α is positive and there is at least one inner step."""
    if not inner_rate > 0:
        raise ConfigError(f"inner_rate is {inner_rate}; give a positive rate.")
    if inner_steps < 1:
        raise ConfigError(f"inner_steps is {inner_steps}; give at least 1.")
