"""Body Only update in Inner Loop (Oh et al. 2021)."""

from jmeta.adjoint import exact
from jmeta.core import MetaLearner, Model
from jmeta.hyperparameters import Number
from jmeta.inner import Adjoint, Loss
from jmeta.learners.maml import maml
from jmeta.losses import softmax_cross_entropy
from jmeta.tree import under


def boil(
    model: Model,
    *,
    inner_rate: Number | None = None,
    inner_steps: int = 1,
    head: str = "head",
    loss: Loss = softmax_cross_entropy,
    adjoint: Adjoint = exact(),
) -> MetaLearner:
    """BOIL: MAML whose inner loop changes the body alone; the head stays, so that the representation must move.

    With θ = (body, head): bodyₖ₊₁ = bodyₖ − α ∇_body L(bodyₖ, head; support), the opposite of ANIL.

    Args:
        model: the network, with as many outputs as the tasks have ways.
        inner_rate: α, on the mean loss of the support. Default: 0.4 for cross entropy, 0.01 for any other loss.
        inner_steps: K.
        head: the part of the path of the parameters that stay; the models of jmeta call their last layer `head`.
        loss: L, inner and outer.
        adjoint: how to differentiate through the inner loop.

    Returns:
        The learner.

    Raises:
        ConfigError: every parameter lies under `head`, α is not positive, or K is negative.

    Example:
        >>> import jmeta
        >>> learner = jmeta.boil(jmeta.linen(jmeta.Conv4(outputs=5)))

    Reference: Oh, Yoo, Kim, Yun 2021, "BOIL: Towards Representation Change for Few-shot Learning", section 3,
    https://arxiv.org/abs/2008.08882.

    Differences from the paper: none. The paper trains with α = 0.5 on a body of 64 filters.
    """
    is_head = under(head)
    return maml(
        model,
        inner_rate=inner_rate,
        inner_steps=inner_steps,
        loss=loss,
        adjoint=adjoint,
        adaptable=lambda path: not is_head(path),
    )
