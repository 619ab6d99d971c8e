"""A learned metric as one linear map after an embedding."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, PyTree

from jmeta.core import Model, Params, State, check_model
from jmeta.errors import ConfigError


def with_metric(model: Model, metric: str = "full") -> Model:
    """An embedding whose squared Euclidean distance is a learned Mahalanobis distance of the embedding of `model`.

    ‖Lᵀ z − Lᵀ c‖² = (z − c)ᵀ L Lᵀ (z − c), so that a learned metric needs no learner of its own: it is one linear map
    more.

    Args:
        model: the embedding, whose outputs are `[n, features]`.
        metric: `"diagonal"`, a scale for each feature, or `"full"`, L `[features, features]`; both start as the
            identity.

    Returns:
        The model, whose parameters are `(those of model, the metric's)`.

    Raises:
        ConfigError: an unknown metric.
        ModelError: `model` is no `Model`.

    Example:
        >>> import jax, jax.numpy as jnp, jmeta
        >>> learner = jmeta.prototypical(jmeta.with_metric(jmeta.linen(jmeta.Conv4(outputs=None)), "diagonal"))

    Reference: Goldberger et al. 2004, "Neighbourhood Components Analysis", section 2.
    """
    check_model(model)
    if metric not in ("diagonal", "full"):
        raise ConfigError(f"metric is {metric!r}; give 'diagonal' or 'full'.")

    def init(key: Key[Array, ""], inputs: PyTree) -> tuple[Params, State]:
        params, state = model.init(key, inputs)
        outputs, _ = jax.eval_shape(lambda: model.apply(key, params, state, inputs, train=False))
        one = jnp.ones if metric == "diagonal" else jnp.eye
        return (params, one(outputs.shape[-1], dtype=outputs.dtype)), state

    def apply(
        key: Key[Array, ""], params: Params, state: State, inputs: PyTree, *, train: bool, **mask: Any
    ) -> tuple[PyTree, State]:
        params, factor = params
        z, state = model.apply(key, params, state, inputs, train=train, **mask)
        return (z * factor[None] if metric == "diagonal" else z @ factor), state

    return Model(init, apply)
