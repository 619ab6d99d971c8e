"""Fast Context Adaptation via Meta-Learning (Zintgraf et al. 2019)."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Key, PyTree

from jmeta.adjoint import exact
from jmeta.core import Adapted, MetaLearner, Model, Params, State, check_model, episodic
from jmeta.hyperparameters import Number
from jmeta.inner import Adjoint, InnerProblem, Loss, answers, check_inner, initialiser, support_loss
from jmeta.losses import softmax_cross_entropy
from jmeta.tree import combine, partition, under


def cavia(
    model: Model,
    *,
    inner_rate: Number = 1.0,
    inner_steps: int = 2,
    context: str = "context",
    loss: Loss = softmax_cross_entropy,
    adjoint: Adjoint = exact(),
) -> MetaLearner:
    """CAVIA: a task is learned by a few context parameters; all other weights are shared by all tasks.

    With weights θ and context φ: φ₀ = 0, φₖ₊₁ = φₖ − α ∇_φ L(θ, φₖ; support). The outer loop trains θ alone.

    Args:
        model: a network with context parameters, as `jmeta.MLP(outputs=1, context=4)`; in a network of your own,
            `self.param("context", nn.initializers.zeros_init(), (4,))`, whose value further layers depend on.
        inner_rate: α.
        inner_steps: K.
        context: the part of the path of the context parameters.
        loss: L, inner and outer.
        adjoint: how to differentiate through the inner loop.

    Returns:
        The learner. The context stands in θ for its shape; its value there is not used.

    Raises:
        ConfigError: no parameter lies under `context` (the sentence lists them), α is not positive, or K is negative.

    Example:
        >>> import jmeta
        >>> learner = jmeta.cavia(jmeta.linen(jmeta.MLP(outputs=1, context=4)), loss=jmeta.mean_squared_error)

    Reference: Zintgraf, Shiarlis, Kurin, Hofmann, Whiteson 2019, "Fast Context Adaptation via Meta-Learning",
    algorithm 1, https://arxiv.org/abs/1810.03642.

    Differences from the paper: none in the algorithm. From the authors' code: it halves the inner rate after 5,000
    steps in some experiments.
    """
    check_model(model)
    check_inner(inner_rate, inner_steps)
    is_context = under(context)
    solve = adjoint(InnerProblem(support_loss(model, loss), optax.sgd(inner_rate), inner_steps, is_context))

    def adapt(key: Key[Array, ""], params: Params, state: State, support: PyTree) -> Adapted:
        φ, θ = partition(is_context, params)
        return solve(key, combine(jax.tree.map(jnp.zeros_like, φ), θ), state, support)

    return episodic(initialiser(model), adapt, answers(model), loss)
