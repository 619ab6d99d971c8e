"""Meta-Curvature (Park, Oliva 2019)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key, PyTree

from jmeta.adjoint import exact
from jmeta.core import Adapted, MetaLearner, Model, Params, State, Task, check_model, episodic
from jmeta.hyperparameters import Number
from jmeta.inner import Adjoint, InnerProblem, Loss, answers, check_inner, initialiser, rate_for, support_loss
from jmeta.losses import softmax_cross_entropy
from jmeta.optimizers import learned


def meta_curvature(
    model: Model,
    *,
    inner_rate: Number | None = None,
    inner_steps: int = 1,
    loss: Loss = softmax_cross_entropy,
    adjoint: Adjoint = exact(),
) -> MetaLearner:
    """Meta-Curvature: MAML that learns how to transform the inner gradient, one matrix for each axis of a weight.

    φₖ₊₁ = φₖ − α MC(∇L(φₖ; support)) with MC(G) = G ×₁ M₁ ×₂ M₂ ..., for a convolution ×₁ over the places of its
    kernel, ×₂ over its inputs, ×₃ over its outputs. The outer loop trains θ and all M, which start as identities.

    Args:
        model: the network, with as many outputs as the tasks have ways.
        inner_rate: α. Default: 0.4 for cross entropy, 0.01 for any other loss.
        inner_steps: K.
        loss: L, inner and outer.
        adjoint: how to differentiate through the inner loop.

    Returns:
        The learner; its parameters are `{"model": θ, "curvature": M}`, and `Adapted.params` is φ_K.

    Raises:
        ConfigError: `inner_rate` is not positive or K is negative.

    Example:
        >>> import jmeta
        >>> learner = jmeta.meta_curvature(jmeta.linen(jmeta.Conv4(outputs=5)))

    Reference: Park, Oliva 2019, "Meta-Curvature", section 3.2 and 3.3, https://arxiv.org/abs/1902.03356.

    Differences from the paper: biases are transformed as well, by a matrix of their own; the last layer is no
    exception.
    """
    check_model(model)
    α = rate_for(loss, inner_rate, classes=0.4)
    check_inner(α, inner_steps)
    init_model = initialiser(model)

    def init(key: Key[Array, ""], task: Task) -> tuple[Params, State]:
        θ, state = init_model(key, task)
        curvature = jax.tree.map(lambda x: tuple(jnp.eye(n, dtype=x.dtype) for n in _axes(x)), θ)
        return {"model": θ, "curvature": curvature}, state

    def update(gradient: PyTree, curvature: PyTree, step: Int[Array, ""]) -> PyTree:
        return jax.tree.map(lambda g, matrices: -α * _transformed(g, matrices), gradient, curvature)

    optimiser = learned(update)
    solve = adjoint(InnerProblem(support_loss(model, loss), optimiser, inner_steps))

    def adapt(key: Key[Array, ""], params: Params, state: State, support: PyTree) -> Adapted:
        return solve(key, params["model"], state, support, params["curvature"])

    return episodic(init, adapt, answers(model), loss)


def _axes(x: Array) -> tuple[int, ...]:
    """The sizes of the axes that are transformed; the spatial axes of a kernel count as one."""
    return x.shape if x.ndim < 3 else (x.size // (x.shape[-1] * x.shape[-2]), *x.shape[-2:])


def _transformed(gradient: Array, matrices: tuple[Array, ...]) -> Array:
    g = gradient.reshape(_axes(gradient))
    for axis, matrix in enumerate(matrices):
        g = jnp.moveaxis(jnp.tensordot(matrix, g, ((1,), (axis,))), 0, axis)
    return g.reshape(gradient.shape)
