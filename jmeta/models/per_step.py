"""A network that has some parameters and statistics anew for each inner step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key, PyTree

from jmeta.core import Model, Params, State
from jmeta.tree import everything, path_name

Select = Callable[[str], bool]


def per_step(model: Model, sets: int, *, weights: Select, statistics: Select = everything) -> Model:
    """A network with a set of some parameters, and of what statistics it keeps, for each inner step.

    Args:
        model: the network.
        sets: how many sets there are; the last one serves all further steps.
        weights: a predicate on the path of a leaf of the parameters: of which there are sets.
        statistics: the same for the state.

    Returns:
        The model, whose sets lie on a leading axis. Its state is `{"step": k, "model": the network's}`, and whatever
        else stands in it, which stays: each call with `train=True` belongs to step k, from 0, and counts it; an answer
        is that of the step before. An inner loop starts from `"step"` 0.

    Example:
        >>> import jax, jax.numpy as jnp, jmeta
        >>> from jmeta.models.per_step import per_step
        >>> model = per_step(jmeta.linen(jmeta.MLP(outputs=1)), 5, weights=lambda path: path.endswith("bias"))
        >>> θ, state = model.init(jax.random.key(0), jnp.ones((2, 1)))
        >>> θ["head"]["bias"].shape, θ["head"]["kernel"].shape
        ((5, 1), (40, 1))

    Reference: Antoniou, Edwards, Storkey 2019, "How to Train Your MAML", section 4 (BNRS, BNWB),
    https://arxiv.org/abs/1810.09502.
    """

    def repeat(x: Array) -> Array:
        return jnp.broadcast_to(x[None], (sets, *x.shape))

    def init(key: Key[Array, ""], inputs: PyTree) -> tuple[Params, State]:
        params, own = model.init(key, inputs)
        state = {"step": jnp.zeros((), jnp.int32), "model": _where(statistics, repeat, own)}
        return _where(weights, repeat, params), state

    def apply(
        key: Key[Array, ""], params: Params, state: State, inputs: PyTree, *, train: bool, **mask: Any
    ) -> tuple[PyTree, State]:
        step = state["step"] if train else jnp.maximum(state["step"] - 1, 0)

        def now(x: Array) -> Array:
            return of_step(x, step)

        def put(sets: Array, x: Array) -> Array:
            return sets.at[jnp.minimum(step, len(sets) - 1)].set(x)

        given = _where(weights, now, params), _where(statistics, now, state["model"])
        outputs, new = model.apply(key, *given, inputs, train=train, **mask)
        new = _where(statistics, put, state["model"], new)
        return outputs, {**state, "step": state["step"] + int(train), "model": new}

    return Model(init, apply)


def of_step(sets: Array, step: Int[Array, ""]) -> Array:
    """That of an inner step; the last one serves all further steps."""
    return sets[jnp.minimum(step, len(sets) - 1)]


def _where(select: Select, change: Callable[..., Array], tree: PyTree, *others: PyTree) -> PyTree:
    """The selected leaves changed, and the rest of the last tree as it is."""

    def leaf(path: Any, *leaves: Array) -> Array:
        return change(*leaves) if select(path_name(path)) else leaves[-1]

    return jax.tree.map_with_path(leaf, tree, *others)
