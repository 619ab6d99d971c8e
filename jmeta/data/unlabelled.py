"""Examples of a support that have no label, some of them of none of its classes."""

from typing import NamedTuple

import jax.numpy as jnp

from jmeta.core import Examples
from jmeta.errors import DataError


class Unlabelled(NamedTuple):
    """How many examples without a label an episode has.

    Args:
        rows: a class.
        classes: how many classes there are that are none of the episode, distractors.
    """

    rows: int = 0
    classes: int = 0

    @classmethod
    def of(cls, unlabelled: int, distractors: int) -> "Unlabelled":
        """The numbers; `DataError` where they are none, or distractors without an example."""
        for name, value in (("unlabelled", unlabelled), ("distractors", distractors)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise DataError(f"{name} is {value}; give a whole number, 0 or more.")
        if distractors and not unlabelled:
            raise DataError(f"distractors is {distractors}, and unlabelled 0, so that they have no example; give both.")
        return cls(unlabelled, distractors)


def with_unlabelled(support: Examples, added: Examples) -> Examples:
    """A support with examples after its own that have no label.

    Args:
        support: of an episode.
        added: inputs, classes and rows of others, without targets, and which of them there are.

    Returns:
        All of them; with a mask only if the support has one, where all are there.

    Example:
        >>> import jax.numpy as jnp, jmeta
        >>> from jmeta.data.unlabelled import with_unlabelled
        >>> support = jmeta.Examples(jnp.ones((2, 3)), jnp.eye(2))
        >>> with_unlabelled(support, jmeta.Examples(jnp.zeros((1, 3)), ())).targets.tolist()
        [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]
    """
    n, ways = len(added.inputs), support.targets.shape[1]
    added = added._replace(targets=jnp.zeros((n, ways), support.targets.dtype))
    both = {
        name: jnp.concatenate([own, getattr(added, name)])
        for name in ("inputs", "targets", "mask", "classes", "rows")
        if not isinstance(own := getattr(support, name), tuple)
    }
    return support._replace(**both)
