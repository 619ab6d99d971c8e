"""R2-D2, ridge regression as the base learner (Bertinetto et al. 2019)."""

import jax.numpy as jnp
from jax.scipy.linalg import solve
from jaxtyping import Array, Float, Key

from jmeta.core import Adapted, Examples, MetaLearner, Model, Params, State, Task
from jmeta.embedding import embedded
from jmeta.errors import ConfigError
from jmeta.hyperparameters import Number, violated
from jmeta.losses import softmax_cross_entropy
from jmeta.masks import only, shots


def r2d2(model: Model, *, penalty: Number = 1.0, scale: Number = 1.0) -> MetaLearner:
    """R2-D2: a head that is a ridge regression on the support, differentiated through its solution.

    W = argmin ‖X W − Y‖² + λ ‖W‖² with X = f_θ(support) and Y one-hot; outputs are α f_θ(x) W + β. λ, α and β are
    learned with θ.

    Args:
        model: the embedding f_θ, whose outputs `[n, features]` have any width.
        penalty: λ at the start.
        scale: α at the start; β starts at 0.

    Returns:
        The learner, for any number of ways. `Adapted.params` is `(θ, W [features, ways], present [ways])`.

    Raises:
        ConfigError: penalty or scale is not positive.
        ModelError: `model` is no `Model`.

    Example:
        >>> import jmeta
        >>> learner = jmeta.r2d2(jmeta.linen(jmeta.Conv4(outputs=None, pooling="max")))

    Reference: Bertinetto, Henriques, Torr, Vedaldi 2019, "Meta-learning with differentiable closed-form solvers",
    section 3.2 and equation 6, https://arxiv.org/abs/1805.08136.

    Differences from the paper: λ and α are exp of what is learned, so that they stay positive. The authors' network is
    wider and has dropout.
    """
    for name, value in (("penalty", penalty), ("scale", scale)):
        if violated(value > 0):
            raise ConfigError(f"{name} is {value}; give a positive number.")

    def init(key: Key[Array, ""], task: Task) -> tuple[Params, State]:
        params, state = model.init(key, task.support.inputs)
        head = {"log_penalty": jnp.log(penalty), "log_scale": jnp.log(scale), "shift": jnp.zeros(())}
        return {"model": params, **head}, {"model": state}

    def adapt(key: Key[Array, ""], params: Params, state: State, support: Examples) -> Adapted:
        w = ridge(support.inputs, support.targets, jnp.exp(params["log_penalty"]))
        return Adapted((params, w, shots(support.targets) > 0), state, {"penalty": jnp.exp(params["log_penalty"])})

    def predict(key: Key[Array, ""], adapted: Adapted, x: Float[Array, "queries features"]) -> Array:
        params, w, present = adapted.params
        return only(present, jnp.exp(params["log_scale"]) * (x @ w) + params["shift"])

    return embedded(model, init, adapt, predict, softmax_cross_entropy)


def ridge(
    x: Float[Array, "n features"], y: Float[Array, "n ways"], penalty: Float[Array, ""]
) -> Float[Array, "features ways"]:
    """argmin over W of ‖X W − Y‖² + λ ‖W‖², solved in the smaller of the two spaces.

    With fewer examples than features (XᵀX + λI)⁻¹ Xᵀ Y = Xᵀ (X Xᵀ + λI)⁻¹ Y, a system of n instead of `features`.

    Args:
        x: `[n, features]`, X.
        y: `[n, ways]` one-hot, Y; an example whose row is zeros is left away.
        penalty: λ, positive.

    Returns:
        `[features, ways]`, W.

    Example:
        >>> import jax.numpy as jnp
        >>> from jmeta.learners.r2d2 import ridge
        >>> ridge(jnp.eye(2), jnp.eye(2), jnp.asarray(1.0)).round(3).tolist()
        [[0.5, 0.0], [0.0, 0.5]]
    """
    x = x * y.any(axis=1)[:, None].astype(x.dtype)
    n, features = x.shape
    if n < features:
        return x.T @ solve(x @ x.T + penalty * jnp.eye(n, dtype=x.dtype), y, assume_a="pos")
    return solve(x.T @ x + penalty * jnp.eye(features, dtype=x.dtype), x.T @ y, assume_a="pos")
