"""Updates that optax does not have: the step of TRPO, several on a batch, one into a set, and one that is learned."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PyTree

from jmeta.core import Info, Params
from jmeta.inner import descend

Objective = Callable[[Params], tuple[Float[Array, ""], Info]]
LearnedUpdate = Callable[[PyTree, PyTree, Int[Array, ""]], PyTree]


def trust_region(
    radius: float = 0.01,
    *,
    divergence: str = "kl",
    solver_steps: int = 10,
    damping: float = 1e-3,
    backtracks: int = 10,
    shrink: float = 0.7,
) -> optax.GradientTransformationExtraArgs:
    """The update of TRPO: the natural gradient, as far as a divergence allows and a line search confirms.

    x = F⁻¹ g by conjugate gradients, F = ∇² D(θ) by products with vectors; the step is √(2 δ / xᵀFx) x, made shorter
    until the objective has fallen and D ≤ δ. If no length does, nothing changes.

    Args:
        radius: δ, the largest divergence of one update.
        divergence: D, the name of an entry of the learner's info whose value and gradient are 0 at the θ that collected
            the batch: `"kl"` of `maml_rl` and `rl2`.
        solver_steps: of the conjugate gradients.
        damping: added to the diagonal of F.
        backtracks: how many lengths the line search tries.
        shrink: from one length to the next.

    Returns:
        An optax transformation that needs `value` and `objective_fn`, which `jmeta.fit` passes.

    Example:
        >>> import jmeta
        >>> optimizer = jmeta.trust_region(0.01)

    Reference: Schulman et al. 2015, "Trust Region Policy Optimization", section 6 and appendix C,
    https://arxiv.org/abs/1502.05477.

    Differences from the paper: none. From rllab's: the product with F is exact, not a finite difference of gradients.
    """

    def update(
        gradient: PyTree, state: PyTree, params: Params, *, value: Array, objective_fn: Objective, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        g, unravel = ravel_pytree(gradient)
        θ = ravel_pytree(params)[0]
        slope = jax.grad(lambda x: objective_fn(unravel(x))[1][divergence])

        def fisher(v: Array) -> Array:
            return jax.jvp(slope, (θ,), (v,))[1] + damping * v

        x = jax.scipy.sparse.linalg.cg(fisher, g, maxiter=solver_steps, tol=1e-10)[0]
        full = jnp.sqrt(2 * radius / jnp.maximum(x @ fisher(x), 1e-12)) * x

        def better(length: Array) -> Array:
            new, info = objective_fn(unravel(θ - length * full))
            return (new < value) & (info[divergence] <= radius)

        def shorter(search: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            i, length, _ = search
            length = length * shrink
            return i + 1, length, better(length)

        one = jnp.ones((), θ.dtype)
        start = (jnp.asarray(1), one, better(one))
        _, length, found = lax.while_loop(lambda search: ~search[2] & (search[0] < backtracks), shorter, start)
        return unravel(jnp.where(found, -length * full, jnp.zeros_like(full))), state

    return optax.GradientTransformationExtraArgs(lambda params: (), update)


def repeated(optimizer: optax.GradientTransformation, times: int) -> optax.GradientTransformationExtraArgs:
    """Several updates on the same batch: the epochs of PPO.

    The first uses the gradient at hand, the others that of `value_fn` where the one before has led.

    Args:
        optimizer: what makes one update.
        times: how many.

    Returns:
        An optax transformation that needs `value_fn`, which `jmeta.fit` passes. For a learner that collects nothing it
        is `times` updates on the same tasks.

    Raises:
        ConfigError: `times` is below 1.

    Example:
        >>> import jmeta, optax
        >>> optimizer = jmeta.repeated(optax.adam(1e-3), 5)

    Reference: Schulman et al. 2017, "Proximal Policy Optimization Algorithms", algorithm 1.

    Differences from the paper: every epoch is one update on the whole batch, without minibatches.
    """

    def update(
        gradient: PyTree, state: PyTree, params: Params, *, value_fn: Callable[[Params], Array], **extra: Any
    ) -> tuple[PyTree, PyTree]:
        def again(_: Any, carry: tuple[Params, PyTree]) -> tuple[Params, PyTree]:
            params, state = carry
            value, gradient = jax.value_and_grad(value_fn)(params)
            return descend(optimizer, gradient, state, params, value=value, grad=gradient, value_fn=value_fn)[:2]

        first = descend(optimizer, gradient, state, params, value_fn=value_fn, **extra)
        new, state = lax.fori_loop(1, times, again, first)
        return jax.tree.map(jnp.subtract, new, params), state

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def projected(
    optimizer: optax.GradientTransformation, projection: Callable[[Params], Params]
) -> optax.GradientTransformationExtraArgs:
    """An optimiser whose every step ends in a set: projected gradient descent, for constraints.

    θₖ₊₁ = P(θₖ + update).

    Args:
        optimizer: what makes the update.
        projection: P, `params -> params`, as the functions of `optax.projections`.

    Returns:
        An optax transformation, for the inner or the outer loop.

    Example:
        >>> import jmeta, optax
        >>> optimizer = jmeta.projected(optax.adam(0.1), optax.projections.projection_non_negative)
    """

    def update(gradient: PyTree, state: PyTree, params: Params, **extra: Any) -> tuple[PyTree, PyTree]:
        moved, state = descend(optimizer, gradient, state, params, **extra)
        return jax.tree.map(jnp.subtract, projection(moved), params), state

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def learned(update: LearnedUpdate) -> optax.GradientTransformationExtraArgs:
    """An inner optimiser with meta-learned parameters: φₖ₊₁ = φₖ + u(∇L(φₖ), η, k).

    Args:
        update: u, `(gradient, hyper, step) -> update`, of the gradient, of η, which a learner gives to its inner loop
            as `hyper`, and of the number of the inner step, from 0.

    Returns:
        An optax transformation for `jmeta.InnerProblem`, whose state is the number of the step.

    Example:
        >>> import jax, jmeta
        >>> from jmeta.optimizers import learned
        >>> optimiser = learned(lambda gradient, rate, step: jax.tree.map(lambda g: -rate * g, gradient))
        >>> problem = jmeta.InnerProblem(jmeta.support_loss(jmeta.identity(), jmeta.mean_squared_error), optimiser, 5)
    """

    def numbered(
        gradient: PyTree, step: Int[Array, ""], params: PyTree = None, *, hyper: PyTree, **extra: Any
    ) -> tuple[PyTree, Int[Array, ""]]:
        return update(gradient, hyper, step), step + 1

    return optax.GradientTransformationExtraArgs(lambda params: jnp.zeros((), jnp.int32), numbered)
