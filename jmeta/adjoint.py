"""How to differentiate through the inner loop: an argument of a learner, separate from what it minimises."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Key, PyTree

from jmeta.core import Adapted, Params, State
from jmeta.errors import ConfigError
from jmeta.hyperparameters import Number, violated
from jmeta.inner import (
    Adjoint,
    InnerProblem,
    Solve,
    checked_when_differentiated,
    descend,
    with_statistics,
)
from jmeta.solvers import LinearSolver, conjugate_gradient
from jmeta.solvers import neumann as neumann
from jmeta.tree import combine, partition, widened


def exact(*, checkpoint: bool = False) -> Adjoint:
    """Differentiates through every inner step: dφ_K/dθ = Πₖ (I − α ∇²L(φₖ)).

    Args:
        checkpoint: whether to keep only φₖ of about 2√K of the K inner steps (for a K with a divisor near √K; of all K
            for a prime one) and compute the rest again on the way back: memory that hardly grows with the steps, for
            two more forward and backward passes of each.

    Returns:
        An adjoint whose meta-gradient is exact to second order.

    Example:
        >>> import jmeta
        >>> learner = jmeta.maml(jmeta.linen(jmeta.Conv4(outputs=5)), adjoint=jmeta.exact())

    Reference: Finn et al. 2017, "Model-Agnostic Meta-Learning", section 2.2, equation 1.
    """
    return partial(_unrolled, scan=_scan_in_segments if checkpoint else _scan_short)


def first_order() -> Adjoint:
    """Treats the inner gradients as constants: dφ_K/dθ = I.

    Returns:
        An adjoint whose meta-gradient is ∇ of the query loss at φ_K, without second derivatives.

    Example:
        >>> import jmeta
        >>> learner = jmeta.maml(jmeta.linen(jmeta.Conv4(outputs=5)), adjoint=jmeta.first_order())

    Reference: Finn et al. 2017, "Model-Agnostic Meta-Learning", section 5.2 ("first order approx.").
    """
    return truncated(last=0)


def truncated(last: int) -> Adjoint:
    """Differentiates through the last inner steps, and treats the gradients of those before as constants.

    dφ_K/dθ = Πₖ (I − α ∇²L(φₖ)) over k = K − last, ..., K − 1: `first_order()` at 0, `exact()` at K.

    Args:
        last: how many inner steps to differentiate through; more than there are means all.

    Returns:
        An adjoint whose memory does not grow with the steps before the last ones.

    Raises:
        ConfigError: a negative `last`.

    Example:
        >>> import jmeta
        >>> learner = jmeta.maml(jmeta.linen(jmeta.Conv4(outputs=5)), inner_steps=5, adjoint=jmeta.truncated(last=2))

    Reference: Shaban et al. 2019, "Truncated Back-propagation for Bilevel Optimization", section 2.2.

    Differences from the paper: it differentiates in hyper-parameters, of which every step has a term; here θ is the
    start of the loop, so the steps before count as the identity and not as 0.
    """
    if last < 0:
        raise ConfigError(f"last is {last}; give 0 or more inner steps.")
    return partial(_unrolled, last=last)


def mixed_mode(*, checkpoint: bool = False) -> Adjoint:
    """Differentiates exactly, with the Hessian products of the inner loss computed forward over reverse.

    On the way back v ← v − α ∇²L(φₖ) v needs one product a step, d/dε ∇L(φₖ + ε v): a forward derivative of a gradient,
    which keeps no more than φₖ, where reverse over reverse keeps the whole inner backward pass.

    Args:
        checkpoint: whether to keep φₖ of about 2√K of the K inner steps alone, as `exact(checkpoint=True)` does, for
            one more forward and backward pass of each.

    Returns:
        An adjoint whose meta-gradient is that of `exact()` to rounding, in less memory. State (batch statistics) and
        the inner losses in `info` count as constants.

    Example:
        >>> import jmeta
        >>> learner = jmeta.maml(jmeta.linen(jmeta.Conv4(outputs=5)), inner_steps=5, adjoint=jmeta.mixed_mode())

    Reference: Kemaev et al. 2025, "Scalable Meta-Learning via Mixed-Mode Differentiation" (MixFlow-MG),
    https://arxiv.org/abs/2505.00793, section 3.
    """
    scan = _scan_in_segments if checkpoint else jax.lax.scan
    return partial(_unrolled, scan=scan, value_and_grad=_mixed_value_and_grad)


def annealed(adjoint: Adjoint, until: int) -> Adjoint:
    """Treats the inner gradients as constants in the first meta-steps: derivative-order annealing.

    Both orders lie in one compiled program, of which one is computed.

    Args:
        adjoint: from the meta-step `until` on.
        until: meta-steps of `first_order()` before it; 0 leaves the adjoint as it is.

    Returns:
        An adjoint for inner problems whose state counts the meta-steps, `state["meta_step"]`.

    Example:
        >>> import jmeta
        >>> from jmeta.adjoint import annealed
        >>> learner = jmeta.maml_plus_plus(jmeta.linen(jmeta.Conv4(outputs=5)), adjoint=annealed(jmeta.exact(), 100))

    Reference: Antoniou, Edwards, Storkey 2019, "How to Train Your MAML", section 4 (DA),
    https://arxiv.org/abs/1810.09502.
    """

    def both(problem: InnerProblem) -> Solve:
        early, late = first_order()(problem), adjoint(problem)

        def solve(
            key: Key[Array, ""],
            params: Params,
            state: State,
            support: PyTree,
            hyper: PyTree = (),
            optimiser_state: PyTree = None,
        ) -> Adapted:
            given = (key, params, state, support, hyper, optimiser_state)
            return jax.lax.cond(state["meta_step"] < until, lambda: early(*given), lambda: late(*given))

        return solve

    return both if until else adjoint


Loss = Callable[[PyTree, PyTree], tuple[Array, State]]


def _value_and_grad(loss: Loss, φ: PyTree, context: PyTree) -> tuple[tuple[Array, State], PyTree]:
    return jax.value_and_grad(loss, has_aux=True)(φ, context)


def _mixed_value_and_grad(loss: Loss, φ: PyTree, context: PyTree) -> tuple[tuple[Array, State], PyTree]:
    """`_value_and_grad` with its own transpose: the Hessian product as a forward derivative of the gradient."""
    smooth, rest = _split_inexact(context)

    @jax.custom_vjp
    def value_and_grad(φ: PyTree, smooth: PyTree, rest: PyTree) -> tuple[tuple[Array, State], PyTree]:
        return _value_and_grad(loss, φ, combine(smooth, rest))

    def forward(φ: PyTree, smooth: PyTree, rest: PyTree) -> Any:
        return value_and_grad(φ, smooth, rest), (φ, smooth, rest)

    def backward(kept: Any, cotangents: Any) -> Any:
        φ, smooth, rest = kept
        _, v = cotangents

        def gradients(φ: PyTree) -> PyTree:
            return jax.grad(lambda φ, smooth: loss(φ, combine(smooth, rest))[0], argnums=(0, 1))(φ, smooth)

        return *jax.jvp(gradients, (φ,), (v,))[1], None

    value_and_grad.defvjp(forward, backward)
    return value_and_grad(φ, smooth, rest)


def _split_inexact(tree: PyTree) -> tuple[PyTree, PyTree]:
    """The leaves that a derivative can be taken in, and the others (keys, integers)."""

    def is_inexact(x: Any) -> bool:
        return jnp.issubdtype(x.dtype, jnp.inexact)

    smooth = jax.tree.map(lambda x: x if is_inexact(x) else None, tree)
    return smooth, jax.tree.map(lambda x: None if is_inexact(x) else x, tree)


def _scan_short(step: Callable[..., Any], carry: PyTree, keys: Key[Array, " steps"]) -> Any:
    """`scan`, with up to five steps compiled as one body: a quarter faster than stacking what each has to keep.

    A single step is no loop, whose start `vmap` would copy for each task: all supports pass through one θ together.
    """
    if len(keys) == 1:
        carry, value = jax.jit(step)(carry, keys[0])
        return carry, jax.tree.map(lambda x: x[None], value)
    return jax.lax.scan(step, carry, keys, unroll=len(keys) <= 5)


def _scan_in_segments(step: Callable[..., Any], carry: PyTree, keys: Key[Array, " steps"]) -> Any:
    """`scan` in segments, of which the way back keeps the start of each, and the steps of one at a time."""

    @jax.checkpoint
    def segment(carry: PyTree, keys: Key[Array, " size"]) -> Any:
        return jax.lax.scan(jax.checkpoint(step), carry, keys)

    steps = len(keys)
    # A prime number of steps is one segment: a remainder would be one more copy of the step to compile.
    size = next((d for d in range(math.isqrt(steps), 1, -1) if steps % d == 0), max(steps, 1))
    carry, values = jax.lax.scan(segment, carry, keys.reshape(-1, size))
    return carry, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), values)


def _unrolled(problem: InnerProblem, **how: Any) -> Solve:
    return with_statistics(problem, _descent(problem, **how))


def _descent(
    problem: InnerProblem,
    *,
    last: int | None = None,
    scan: Callable[..., Any] = _scan_short,
    value_and_grad: Callable[..., Any] = _value_and_grad,
) -> Solve:
    def solve(
        key: Key[Array, ""],
        params: Params,
        state: State,
        support: PyTree,
        hyper: PyTree = (),
        optimiser_state: PyTree = None,
    ) -> Adapted:
        θ, fixed = partition(problem.adaptable, params)

        def steps(carry: Any, keys: Key[Array, " steps"], through: Callable[[PyTree], PyTree]) -> Any:
            def loss(φ: PyTree, context: Any) -> tuple[Array, State]:
                key, fixed, state, support = context
                return problem.loss(key, combine(φ, fixed), state, support)

            def step(carry: Any, key: Key[Array, ""]) -> Any:
                φ, optimiser_state, state = carry
                (value, state), gradient = value_and_grad(loss, φ, (key, fixed, state, support))
                gradient = through(_add_proximal(problem.proximal, gradient, φ, θ))
                gradient = checked_when_differentiated(problem.optimiser, gradient, φ)
                φ, optimiser_state = descend(problem.optimiser, gradient, optimiser_state, φ, hyper=hyper)
                return (φ, optimiser_state, state), (value, combine(φ, fixed) if problem.trajectory else ())

            return scan(step, carry, keys)

        keys = jax.random.split(key, problem.num_steps)
        first = 0 if last is None else max(0, problem.num_steps - last)
        carry = (θ, problem.optimiser.init(θ) if optimiser_state is None else optimiser_state, state)
        spans: list[tuple[Array, Callable[[PyTree], PyTree]]] = []
        # An empty span would be a scan through which a derivative goes that is zero.
        if first:
            spans.append((keys[:first], jax.lax.stop_gradient))
        if first < problem.num_steps or not spans:
            spans.append((keys[first:], lambda gradient: gradient))
        values = []
        for span, through in spans:
            carry, value = steps(carry, span, through)
            values.append(value)
        φ, optimiser_state, state = carry
        losses, trajectory = jax.tree.map(lambda *x: jnp.concatenate(x), *values)
        params = trajectory if problem.trajectory else combine(φ, fixed)
        return Adapted(params, state, {"inner_loss": losses}, optimiser_state)

    return solve


def _add_proximal(weight: Number, gradient: PyTree, φ: PyTree, θ: PyTree) -> PyTree:
    """The gradient of the inner loss with ½ λ ‖φ − θ‖²."""
    if violated(weight != 0):
        return gradient
    return jax.tree.map(lambda g, φ, θ: g + weight * (φ - θ), gradient, φ, θ)


def implicit(solver: LinearSolver = conjugate_gradient(), *, tolerance: float = 0.3) -> Adjoint:
    """Differentiates the minimum that the inner loop ends at, and not the way to it.

    φ* minimises L(φ) + ½ λ ‖φ − θ‖², so that with A = ∇²L(φ*) + λ I, dφ*/dθ = λ A⁻¹, and dφ*/dη = −A⁻¹ ∂²L/∂φ∂η for
    whatever else L depends on. The meta-gradient is one linear system in Hessian products at φ*; memory does not grow
    with the inner steps, and any inner optimiser will do.

    Args:
        solver: of the linear system, `jmeta.conjugate_gradient(maxiter)` or `jmeta.neumann(maxiter, rate)`.
        tolerance: of the residual, see below, above which a task counts as not converged.

    Returns:
        An adjoint. Its `info` has `residual`, ‖∇L(φ) + λ (φ − θ)‖ / (‖∇L(θ)‖ + λ ‖φ − θ‖) from 0 at the minimum to 1 at
        the start, and `unconverged`, 1 where it is above `tolerance`, about which `jmeta.fit` warns: away from the
        minimum the meta-gradient is wrong in silence. State (batch statistics) and `info` count as constants. Where
        λ = 0 the minimum does not depend on the start of the loop, and the gradient in θ is 0.

    Raises:
        ConfigError: when given an `InnerProblem` with a trajectory.

    Example:
        >>> import jmeta
        >>> learner = jmeta.imaml(jmeta.linen(jmeta.Conv4(outputs=5)), adjoint=jmeta.implicit(jmeta.neumann(10)))

    Reference: Rajeswaran, Finn, Kakade, Levine 2019, "Meta-Learning with Implicit Gradients", lemma 1 and algorithm 2,
    https://arxiv.org/abs/1909.04630; Lorraine, Vicol, Duvenaud 2020, "Optimizing Millions of Hyperparameters by
    Implicit Differentiation", theorem 1, https://arxiv.org/abs/1911.02590.
    """

    def adjoint(problem: InnerProblem) -> Solve:
        λ = problem.proximal
        if problem.trajectory:
            raise ConfigError("the implicit adjoint knows the minimum alone; take exact() for a trajectory.")
        descent = _descent(problem, last=0)

        def gradients(φ: PyTree, context: PyTree) -> tuple[PyTree, PyTree]:
            """∇ of L in φ and in what else it depends on."""
            smooth, rest = _split_inexact(context)

            def loss(φ: PyTree, smooth: PyTree) -> Array:
                key, fixed, state, support, *_ = combine(smooth, rest)
                return problem.loss(key, combine(φ, fixed), state, support)[0]

            return jax.grad(loss, argnums=(0, 1))(φ, smooth)

        # Every array is an argument: what a `custom_vjp` closes over may not be a tracer of `vmap`.
        @jax.custom_vjp
        def minimum(θ: PyTree, smooth: PyTree, rest: PyTree) -> Adapted:
            context = combine(smooth, rest)
            key, fixed, *others = context
            adapted = descent(key, combine(θ, fixed), *others)
            φ, _ = partition(problem.adaptable, adapted.params)
            start, gradient = gradients(θ, context)[0], gradients(φ, context)[0]
            pull = jax.tree.map(lambda φ, θ: λ * (φ - θ), φ, θ)
            start, gradient, pull = widened((start, gradient, pull))
            scale = optax.tree.norm(start) + optax.tree.norm(pull)
            residual = optax.tree.norm(jax.tree.map(jnp.add, gradient, pull)) / scale
            info = {"residual": residual, "unconverged": (residual > tolerance).astype(residual.dtype)}
            return adapted._replace(info={**adapted.info, **info})

        def forward(θ: PyTree, smooth: PyTree, rest: PyTree) -> Any:
            adapted = minimum(θ, smooth, rest)
            return adapted, (adapted.params, smooth, rest)

        def backward(kept: Any, cotangents: Adapted) -> Any:
            params, smooth, rest = kept
            φ, _ = partition(problem.adaptable, params)
            v, v_fixed = partition(problem.adaptable, cotangents.params)

            def products(u: PyTree) -> tuple[PyTree, PyTree]:
                return jax.jvp(lambda φ: gradients(φ, combine(smooth, rest)), (φ,), (u,))[1]

            u = solver(lambda u: jax.tree.map(lambda u, hu: λ * u + hu, u, products(u)[0]), v)
            key, fixed, *others = jax.tree.map(jnp.negative, products(u)[1])
            fixed = jax.tree.map(jnp.add, fixed, v_fixed)  # which reach φ* as they are, too
            return jax.tree.map(lambda u: λ * u, u), (key, fixed, *others), None

        minimum.defvjp(forward, backward)

        def solve(
            key: Key[Array, ""],
            params: Params,
            state: State,
            support: PyTree,
            hyper: PyTree = (),
            optimiser_state: PyTree = None,
        ) -> Adapted:
            θ, fixed = partition(problem.adaptable, params)
            if violated(λ != 0):
                θ = jax.lax.stop_gradient(θ)  # where an outer loop is told that its gradient is zero
            return minimum(θ, *_split_inexact((key, fixed, state, support, hyper, optimiser_state)))

        return with_statistics(problem, solve)

    return adjoint
