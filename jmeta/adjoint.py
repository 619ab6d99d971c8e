"""How to differentiate through the inner loop: an argument of a learner, separate from what it minimises."""

from collections.abc import Callable

import jax
from jaxtyping import Array, Key, PyTree

from jmeta.core import Adapted, Params, State
from jmeta.inner import Adjoint, InnerProblem, Solve, descend
from jmeta.tree import combine, partition


def exact() -> Adjoint:
    """Differentiates through every inner step: dφ_K/dθ = Πₖ (I − α ∇²L(φₖ)).

    Returns:
        An adjoint whose meta-gradient is exact to second order.

    Example:
        >>> import jmeta
        >>> learner = jmeta.maml(jmeta.linen(jmeta.Conv4(outputs=5)), adjoint=jmeta.exact())

    Reference: Finn et al. 2017, "Model-Agnostic Meta-Learning", section 2.2, equation 1.
    """
    return lambda problem: _unrolled(problem, lambda gradient: gradient)


def first_order() -> Adjoint:
    """Treats the inner gradients as constants: dφ_K/dθ = I.

    Returns:
        An adjoint whose meta-gradient is ∇ of the query loss at φ_K, without second derivatives.

    Example:
        >>> import jmeta
        >>> learner = jmeta.maml(jmeta.linen(jmeta.Conv4(outputs=5)), adjoint=jmeta.first_order())

    Reference: Finn et al. 2017, "Model-Agnostic Meta-Learning", section 5.2 ("first order approx.").
    """
    return lambda problem: _unrolled(problem, jax.lax.stop_gradient)


def _unrolled(problem: InnerProblem, through: Callable[[PyTree], PyTree]) -> Solve:
    def solve(key: Key[Array, ""], params: Params, state: State, support: PyTree) -> Adapted:
        φ, fixed = partition(problem.adaptable, params)

        def step(
            carry: tuple[PyTree, PyTree, State], key: Key[Array, ""]
        ) -> tuple[tuple[PyTree, PyTree, State], Array]:
            φ, optimiser_state, state = carry

            def loss(φ: PyTree) -> tuple[Array, State]:
                return problem.loss(key, combine(φ, fixed), state, support)

            (value, state), gradient = jax.value_and_grad(loss, has_aux=True)(φ)
            φ, optimiser_state = descend(problem.optimiser, through(gradient), optimiser_state, φ)
            return (φ, optimiser_state, state), value

        carry = (φ, problem.optimiser.init(φ), state)
        (φ, _, state), losses = jax.lax.scan(step, carry, jax.random.split(key, problem.num_steps))
        return Adapted(combine(φ, fixed), state, {"inner_loss": losses})

    return solve
