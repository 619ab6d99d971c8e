"""Model-Agnostic Meta-Learning (Finn et al. 2017)."""

from collections.abc import Callable

import optax

from jmeta.adjoint import exact, first_order
from jmeta.core import MetaLearner, Model, check_model, episodic
from jmeta.hyperparameters import Number
from jmeta.inner import Adjoint, InnerProblem, Loss, answers, check_inner, initialiser, rate_for, support_loss
from jmeta.losses import softmax_cross_entropy
from jmeta.tree import everything


def maml(
    model: Model,
    *,
    inner_rate: Number | None = None,
    inner_steps: int = 1,
    loss: Loss = softmax_cross_entropy,
    adjoint: Adjoint = exact(),
    adaptable: Callable[[str], bool] = everything,
    inner_optimizer: Callable[[Number], optax.GradientTransformation] = optax.sgd,
) -> MetaLearner:
    """MAML: an initialisation θ from which a few gradient steps learn a task.

    φ₀ = θ, φₖ₊₁ = φₖ − α ∇L(φₖ; support); the objective is the mean over tasks of L(φ_K; query).

    Args:
        model: the network; `jmeta.linen(module)` makes one. It has as many outputs as the tasks have ways.
        inner_rate: α, on the *mean* loss of the support. Default: 0.4 for cross entropy, 0.01 for any other loss.
        inner_steps: K; with 0, θ is trained on all tasks without adaptation.
        loss: L, `(outputs, targets) -> scalar`, inner and outer.
        adjoint: how to differentiate through the inner loop; `exact()` is MAML, `first_order()` is FOMAML.
        adaptable: a predicate on the path of a leaf of θ (`"head/kernel"`): which leaves the inner loop changes.
        inner_optimizer: any optax optimiser of a rate, as `partial(optax.sgd, momentum=0.9)`; it starts anew for each
            task, and is differentiated through: Adam needs `partial(optax.adam, eps_root=1e-8)`, as √v has no
            derivative at 0.

    Returns:
        The learner; `Adapted.params` is φ_K, `Adapted.info["inner_loss"]` is L(φₖ; support) for k < K, `[inner_steps]`.

    Raises:
        ConfigError: α is not positive or K is negative; from `init` and `fit`, no leaf is adaptable, or the inner
            optimiser has no derivative where a gradient is 0.
        ModelError: `model` is no `Model`; from `init` and `fit`, the outputs do not have the shape of the targets.

    Example:
        >>> import jax, jmeta
        >>> source = jmeta.sinusoid(shots=10)
        >>> learner = jmeta.maml(jmeta.linen(jmeta.MLP(outputs=1)), inner_rate=0.01, loss=jmeta.mean_squared_error)
        >>> fitted = jmeta.fit(jax.random.key(0), learner, source, steps=10, tasks=4)

    Reference: Finn, Abbeel, Levine 2017, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks",
    algorithm 1 and 2, https://arxiv.org/abs/1703.03400.

    Differences from the paper: none in the algorithm. From the authors' code: its classification loss is the sum over
    the support divided by the shots, `ways` times this mean, so that its α = 0.4 in 5-way is `inner_rate=2.0` here.
    """
    check_model(model)
    α = rate_for(loss, inner_rate, classes=0.4)
    check_inner(α, inner_steps, inner_optimizer)

    problem = InnerProblem(support_loss(model, loss), inner_optimizer(α), inner_steps, adaptable)
    return episodic(initialiser(model), adjoint(problem), answers(model), loss)


def fomaml(
    model: Model, *, inner_rate: Number | None = None, inner_steps: int = 1, loss: Loss = softmax_cross_entropy
) -> MetaLearner:
    """First-order MAML: MAML whose inner gradients count as constants.

    The meta-gradient is ∇L(φ_K; query), without the factor Πₖ (I − α ∇²L(φₖ)).

    Args:
        model: the network, with as many outputs as the tasks have ways.
        inner_rate: α, on the mean loss of the support. Default: 0.4 for cross entropy, 0.01 for any other loss.
        inner_steps: K.
        loss: L, inner and outer.

    Returns:
        The learner.

    Raises:
        ConfigError: α is not positive or K is negative, see `maml`.

    Example:
        >>> import jmeta
        >>> learner = jmeta.fomaml(jmeta.linen(jmeta.Conv4(outputs=5)))

    Reference: Finn, Abbeel, Levine 2017, section 5.2; Nichol, Achiam, Schulman 2018, "On First-Order Meta-Learning
    Algorithms", https://arxiv.org/abs/1803.02999.

    Differences from the paper: none.
    """
    return maml(model, inner_rate=inner_rate, inner_steps=inner_steps, loss=loss, adjoint=first_order())
