"""Almost No Inner Loop (Raghu et al. 2020)."""

from jmeta.adjoint import exact
from jmeta.core import MetaLearner, Model
from jmeta.hyperparameters import Number
from jmeta.inner import Adjoint, Loss
from jmeta.learners.maml import maml
from jmeta.losses import softmax_cross_entropy
from jmeta.tree import under


def anil(
    model: Model,
    *,
    inner_rate: Number | None = None,
    inner_steps: int = 1,
    head: str = "head",
    loss: Loss = softmax_cross_entropy,
    adjoint: Adjoint = exact(),
) -> MetaLearner:
    """ANIL: MAML whose inner loop changes the head alone; the body is a shared representation.

    With θ = (body, head): headₖ₊₁ = headₖ − α ∇_head L(body, headₖ; support), the body stays as it is.

    Args:
        model: the network, with as many outputs as the tasks have ways.
        inner_rate: α, on the mean loss of the support. Default: 0.4 for cross entropy, 0.01 for any other loss.
        inner_steps: K.
        head: the part of the path of the parameters that adapt, `"head"` or `"Dense_0/kernel"`; the models of jmeta
            call their last layer `head`.
        loss: L, inner and outer.
        adjoint: how to differentiate through the inner loop.

    Returns:
        The learner.

    Raises:
        ConfigError: no parameter lies under `head` (the sentence lists them), α is not positive, or K is negative.

    Example:
        >>> import jmeta
        >>> learner = jmeta.anil(jmeta.linen(jmeta.Conv4(outputs=5)), inner_steps=5)

    Reference: Raghu, Raghu, Bengio, Vinyals 2020, "Rapid Learning or Feature Reuse?", section 4,
    https://arxiv.org/abs/1909.09157.

    Differences from the paper: none.
    """
    return maml(
        model,
        inner_rate=inner_rate,
        inner_steps=inner_steps,
        loss=loss,
        adjoint=adjoint,
        adaptable=under(head),
    )
