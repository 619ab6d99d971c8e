"""Kinds of descriptions of classes: images of similar classes, and several kinds by name."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Similar(NamedTuple):
    """Descriptions of classes that are images of known, related classes: a zebra looks like a horse.

    The network that embeds the examples of a task embeds these images too, and the mean of each class's is what a
    learner reads; `jmeta.embedded` puts it in their place.

    Args:
        images: `[classes, n, ...]`, n inputs for each class, as the examples are; zeros say nothing. For
            `jmeta.from_arrays` it may be a mapping from each label to its images.
        of: `[classes]`, numbers of the related classes, by which `jmeta.late_fusion` divides descriptions into folds.
            Default: each class has others.

    Example:
        >>> import jmeta, numpy as np
        >>> horses, snow = np.ones((2, 3, 28, 28, 1))
        >>> source = jmeta.from_arrays(
        ...     np.ones((40, 28, 28, 1)), np.repeat([0, 1], 20), ways=2, shots=0,
        ...     descriptions={"similar": jmeta.Similar(np.stack([horses, horses])), "attributes": np.eye(2)},
        ... )
        >>> source.data.descriptions["similar"].images.shape
        (2, 3, 28, 28, 1)
    """

    images: Any
    of: Any = ()


def kinds_of(descriptions: Any) -> Mapping[str, Any] | None:
    """The kinds of descriptions by name, where there are several; None where there is one."""
    named = isinstance(descriptions, Mapping) and all(isinstance(name, str) for name in descriptions)
    return descriptions if named and descriptions else None


def is_similar(x: Any) -> bool:
    """Whether a description is images of similar classes, or their embedding."""
    return isinstance(x, Similar)
