"""The inner problem: what a learner minimises on the support of one task."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
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


def descend(
    optimiser: optax.GradientTransformation, gradient: PyTree, optimiser_state: PyTree, params: PyTree, **extra: Any
) -> tuple[PyTree, PyTree]:
    """One step of an optax optimiser, inner or outer: `(new params, new optimiser state)`."""
    # optax itself mixes dtypes, which users who switch on strict promotion would have to pay for.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        update = optax.with_extra_args_support(optimiser).update
        updates, optimiser_state = update(gradient, optimiser_state, params, **extra)
        return optax.apply_updates(params, updates), optimiser_state


def check_inner(inner_rate: float, inner_steps: int) -> None:
    """Raises `ConfigError` unless α is positive and there is at least one inner step."""
    if not inner_rate > 0:
        raise ConfigError(f"inner_rate is {inner_rate}; give a positive rate.")
    if inner_steps < 1:
        raise ConfigError(f"inner_steps is {inner_steps}; give at least 1.")
