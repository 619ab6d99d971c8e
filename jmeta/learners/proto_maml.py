"""Proto-MAML (Triantafillou et al. 2020)."""

from collections.abc import Callable

import jax.numpy as jnp
import optax
from jaxtyping import Array, Key

from jmeta.adjoint import exact
from jmeta.core import Adapted, Examples, MetaLearner, Model, Params, State, check_model, episodic, outputs_of
from jmeta.hyperparameters import Number
from jmeta.inner import Adjoint, InnerProblem, answers, check_inner, initialiser, support_loss
from jmeta.learners.prototypical import prototypes
from jmeta.learners.transfer import linear, with_head
from jmeta.losses import softmax_cross_entropy


def proto_maml(
    model: Model,
    *,
    inner_rate: Number = 0.1,
    inner_steps: int = 5,
    adjoint: Adjoint = exact(),
    inner_optimizer: Callable[[Number], optax.GradientTransformation] = optax.sgd,
) -> MetaLearner:
    """Proto-MAML: MAML whose head starts as the prototypical network that it is equivalent to.

    With prototypes cₖ of the embedded shots, −‖f(x) − cₖ‖² = 2 cₖᵀ f(x) − ‖cₖ‖² + a term common to all classes: the
    head starts at Wₖ = 2 cₖ, bₖ = −‖cₖ‖², and head and body adapt as in MAML. Meta-gradients flow through the start.

    Args:
        model: the embedding f_θ, whose outputs `[n, features]` have any width; `jmeta.Conv4(outputs=None)`.
        inner_rate: α.
        inner_steps: K.
        adjoint: how to differentiate through the inner loop.
        inner_optimizer: any optax optimiser of a rate.

    Returns:
        The learner. Its parameters are those of the embedding and do not depend on the number of ways; `Adapted.params`
        is `{"body": φ, "head": {"kernel": W, "bias": b}}`.

    Raises:
        ConfigError: α is not positive or K is negative.

    Example:
        >>> import jmeta
        >>> learner = jmeta.proto_maml(jmeta.linen(jmeta.Conv4(outputs=None)))

    Reference: Triantafillou et al. 2020, "Meta-Dataset: A Dataset of Datasets for Learning to Learn from Few Examples",
    section 3, https://arxiv.org/abs/1903.03096.

    Differences from the paper: its results are of the first-order variant, `adjoint=jmeta.first_order()`.
    """
    check_model(model)
    check_inner(inner_rate, inner_steps, inner_optimizer)
    network = with_head(model, linear)
    solve = adjoint(
        InnerProblem(support_loss(network, softmax_cross_entropy), inner_optimizer(inner_rate), inner_steps)
    )

    def adapt(key: Key[Array, ""], params: Params, state: State, support: Examples) -> Adapted:
        embeddings, _ = outputs_of(model, key, params, state, support, train=True)
        c = prototypes(embeddings, support.targets)
        start = {"body": params, "head": {"kernel": 2.0 * c.T, "bias": -jnp.square(c).sum(axis=1)}}
        return solve(key, start, state, support)

    return episodic(initialiser(model), adapt, answers(network), softmax_cross_entropy)
