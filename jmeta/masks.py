"""Classes and examples that are not there: tasks of different ways and shots in one compiled program.

A row of zeros in `targets` is an example without a label, a column of zeros a class without an example. Matrix products
with the targets leave both away, so that a learner needs two things only: means that do not divide by zero, and answers
that never are a class which is not there.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Num, PyTree

from jmeta.errors import DataError
from jmeta.kinds import kinds_of


def shots(targets: Float[Array, "n ways"]) -> Float[Array, "ways"]:
    """The number of examples of each class."""
    return targets.sum(axis=0)


def rows_there(examples: Any) -> Bool[Array, "n"]:
    """Which rows of `Examples` there are, `[n]`; without a mask all of them."""
    mask = examples.mask
    return jnp.ones(len(examples.targets), bool) if isinstance(mask, tuple) else mask


def described(descriptions: PyTree) -> Bool[Array, "ways"]:
    """Which classes have a description, one of any kind that is not all zeros: `[ways, ...] -> [ways]`."""
    if kinds := kinds_of(descriptions):
        return jnp.stack([described(kind) for kind in kinds.values()]).any(axis=0)
    first = jax.tree.leaves(descriptions)[0]  # an array, the token ids in `TokenIds`, the images in `Similar`
    return first.reshape(first.shape[0], -1).any(axis=1)


def masked(x: Num[Array, "n ..."], kept: Bool[Array, "n"]) -> Num[Array, "n ..."]:
    """Zeros in the rows that are not kept."""
    return jnp.where(kept.reshape(len(x), *(1 for _ in x.shape[1:])), x, jnp.zeros_like(x))


def only(present: Bool[Array, "ways"], outputs: Float[Array, "n ways"]) -> Float[Array, "n ways"]:
    """The logits, 100 below the least of its row for each class that is not there: no probability and no gradient.

    Not the least number there is: the loss of a query whose class has no example stays one that can be averaged.

    Args:
        present: `[ways]`.
        outputs: `[n, ways]` logits.

    Returns:
        `[n, ways]`, finite.

    Raises:
        DataError: no class is there; outside of compiled code, which cannot tell.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jmeta.masks import only
        >>> jax.nn.softmax(only(jnp.asarray([True, False]), jnp.zeros((1, 2)))).tolist()
        [[1.0, 0.0]]
    """
    # in NumPy: inside of `jit` an operation of JAX on a constant is not a value
    if not isinstance(present, jax.core.Tracer) and not np.asarray(present).any():
        raise DataError("no class of the task has an example or a description; give the support at least one.")
    least = jnp.where(present[None], outputs, jnp.inf).min(axis=1, keepdims=True)
    floor = jax.lax.stop_gradient(jnp.where(present.any(), least - 100.0, 0.0))
    return jnp.where(present[None], outputs, floor)
