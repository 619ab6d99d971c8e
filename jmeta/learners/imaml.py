"""Implicit MAML (Rajeswaran et al. 2019)."""

from collections.abc import Callable

import optax

from jmeta.adjoint import implicit
from jmeta.core import MetaLearner, Model, check_model, episodic
from jmeta.errors import ConfigError
from jmeta.hyperparameters import Number, violated
from jmeta.inner import Adjoint, InnerProblem, Loss, answers, check_inner, initialiser, rate_for, support_loss
from jmeta.losses import softmax_cross_entropy


def imaml(
    model: Model,
    *,
    inner_rate: Number | None = None,
    inner_steps: int = 16,
    proximal: Number = 2.0,
    loss: Loss = softmax_cross_entropy,
    adjoint: Adjoint = implicit(),
    inner_optimizer: Callable[[Number], optax.GradientTransformation] = optax.sgd,
) -> MetaLearner:
    """iMAML: MAML whose inner loop runs to a minimum near θ, where the way there needs no differentiation.

    φ* minimises L(φ; support) + ½ λ ‖φ − θ‖²; the meta-gradient is (I + ∇²L(φ*) / λ)⁻¹ ∇L(φ*; query).

    Args:
        model: the network, with as many outputs as the tasks have ways.
        inner_rate: α. Default: 0.1 for cross entropy, 0.01 for any other loss.
        inner_steps: K, enough to come near the minimum, see `residual`.
        proximal: λ.
        loss: L, inner and outer.
        adjoint: `jmeta.implicit(...)` with its linear solver; another one unrolls the same inner problem.
        inner_optimizer: any optax optimiser of a rate.

    Returns:
        The learner; `Adapted.info["residual"]` says how far from the minimum the inner loop ended, see
        `jmeta.implicit`.

    Raises:
        ConfigError: λ or α is not positive, or K is negative.

    Example:
        >>> import jmeta
        >>> learner = jmeta.imaml(jmeta.linen(jmeta.Conv4(outputs=5)), proximal=2.0)

    Reference: Rajeswaran, Finn, Kakade, Levine 2019, "Meta-Learning with Implicit Gradients", algorithm 1 and 2,
    https://arxiv.org/abs/1909.04630.

    Differences from the paper: none in the algorithm. From the authors' code: it damps the Hessian in conjugate
    gradients by another constant (`cg_damping`), and can take L-BFGS inside; here the system is that of the paper.
    """
    check_model(model)
    α = rate_for(loss, inner_rate, classes=0.1)
    check_inner(α, inner_steps, inner_optimizer)
    if violated(proximal > 0):
        raise ConfigError(f"proximal is {proximal}; give a positive weight: without it φ* does not depend on θ.")
    problem = InnerProblem(support_loss(model, loss), inner_optimizer(α), inner_steps, proximal=proximal)
    return episodic(initialiser(model), adjoint(problem), answers(model), loss)
