"""Solvers of the linear system of the implicit adjoint, which need no more of a matrix than its products."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jmeta.errors import ConfigError
from jmeta.hyperparameters import Number, violated

Matvec = Callable[[PyTree], PyTree]
LinearSolver = Callable[[Matvec, PyTree], PyTree]


def conjugate_gradient(maxiter: int = 5) -> LinearSolver:
    """Solves A u = v by at most `maxiter` steps of conjugate gradients; A must be positive definite.

    Args:
        maxiter: products with A, which bound the time of a meta-gradient.

    Returns:
        `(A, v) -> u`, where A is the function `u -> A u` of pytrees.

    Raises:
        ConfigError: `maxiter` below 1.

    Example:
        >>> import jax.numpy as jnp, jmeta
        >>> solve = jmeta.conjugate_gradient(maxiter=5)
        >>> float(solve(lambda u: 2.0 * u, jnp.ones(())))
        0.5

    Reference: Rajeswaran et al. 2019, "Meta-Learning with Implicit Gradients", section 3.
    """
    _check_maxiter(maxiter)

    def solve(matvec: Matvec, v: PyTree) -> PyTree:
        return jax.scipy.sparse.linalg.cg(matvec, v, maxiter=maxiter)[0]

    return solve


def neumann(maxiter: int = 10, rate: Number = 0.25) -> LinearSolver:
    """Solves A u = v by a Neumann series, u = η Σⱼ (I − η A)ʲ v over j = 0, ..., `maxiter`.

    Args:
        maxiter: products with A.
        rate: η; the series converges where it is below 2 over the largest eigenvalue of A, for iMAML 2 / (‖H‖ + λ).

    Returns:
        `(A, v) -> u`, where A is the function `u -> A u` of pytrees.

    Raises:
        ConfigError: `maxiter` below 1, or a rate that is not positive.

    Example:
        >>> import jax.numpy as jnp, jmeta
        >>> solve = jmeta.neumann(maxiter=20)
        >>> round(float(solve(lambda u: 2.0 * u, jnp.ones(()))), 4)
        0.5

    Reference: Lorraine, Vicol, Duvenaud 2020, "Optimizing Millions of Hyperparameters by Implicit Differentiation",
    algorithm 3, https://arxiv.org/abs/1911.02590.
    """
    _check_maxiter(maxiter)
    if violated(rate > 0):
        raise ConfigError(f"rate is {rate}; give a positive rate.")

    def solve(matvec: Matvec, v: PyTree) -> PyTree:
        def term(carry: tuple[PyTree, PyTree], _: None) -> tuple[tuple[PyTree, PyTree], None]:
            p, total = carry
            p = jax.tree.map(lambda p, ap: p - rate * ap, p, matvec(p))
            return (p, jax.tree.map(jnp.add, total, p)), None

        (_, total), _ = jax.lax.scan(term, (v, v), length=maxiter)
        return jax.tree.map(lambda x: rate * x, total)

    return solve


def _check_maxiter(maxiter: int) -> None:
    if maxiter < 1:
        raise ConfigError(f"maxiter is {maxiter}; give at least 1.")
