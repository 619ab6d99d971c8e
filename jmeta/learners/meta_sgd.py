"""Meta-SGD (Li et al. 2017)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, PyTree

from jmeta.adjoint import exact
from jmeta.core import Adapted, MetaLearner, Model, Params, State, Task, check_model, episodic
from jmeta.hyperparameters import Number
from jmeta.inner import Adjoint, InnerProblem, Loss, answers, check_inner, initialiser, rate_for, support_loss
from jmeta.losses import softmax_cross_entropy
from jmeta.optimizers import learned
from jmeta.tree import everything, partition


def meta_sgd(
    model: Model,
    *,
    inner_rate: Number | None = None,
    inner_steps: int = 1,
    loss: Loss = softmax_cross_entropy,
    adjoint: Adjoint = exact(),
    adaptable: Callable[[str], bool] = everything,
) -> MetaLearner:
    """Meta-SGD: MAML that learns a rate for each weight together with the initialisation.

    φₖ₊₁ = φₖ − α ∘ ∇L(φₖ; support), where α has the shape of θ; the outer loop trains both θ and α. A rate may become
    negative: α is the direction of an update as well as its length.

    Args:
        model: the network, with as many outputs as the tasks have ways.
        inner_rate: where every entry of α starts. Default: 0.4 for cross entropy, 0.01 for any other loss.
        inner_steps: K.
        loss: L, inner and outer.
        adjoint: how to differentiate through the inner loop.
        adaptable: a predicate on the path of a leaf of θ: which leaves the inner loop changes, and have rates.

    Returns:
        The learner; its parameters are `{"model": θ, "rates": α}`, and `Adapted.params` is φ_K.

    Raises:
        ConfigError: `inner_rate` is not positive or K is negative; no leaf is adaptable.

    Example:
        >>> import jmeta
        >>> learner = jmeta.meta_sgd(jmeta.linen(jmeta.MLP(outputs=1)), inner_rate=0.01, loss=jmeta.mean_squared_error)

    Reference: Li, Zhou, Chen, Li 2017, "Meta-SGD: Learning to Learn Quickly for Few-Shot Learning", algorithm 1,
    https://arxiv.org/abs/1707.09835.

    Differences from the paper: α starts at one value and not at random ones from [0.005, 0.1]; more than one inner step
    is possible.
    """
    check_model(model)
    start = rate_for(loss, inner_rate, classes=0.4)
    check_inner(start, inner_steps)
    init_model = initialiser(model)

    def init(key: Key[Array, ""], task: Task) -> tuple[Params, State]:
        θ, state = init_model(key, task)
        rates = jax.tree.map(lambda x: jnp.full_like(x, start), partition(adaptable, θ)[0])
        return {"model": θ, "rates": rates}, state

    optimiser = learned(lambda gradient, rates, step: jax.tree.map(lambda rate, g: -rate * g, rates, gradient))
    solve = adjoint(InnerProblem(support_loss(model, loss), optimiser, inner_steps, adaptable))

    def adapt(key: Key[Array, ""], params: Params, state: State, support: PyTree) -> Adapted:
        return solve(key, params["model"], state, support, params["rates"])

    return episodic(init, adapt, answers(model), loss)
