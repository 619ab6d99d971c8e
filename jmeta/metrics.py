"""Numbers that are reported beside accuracy."""

import numpy as np
from jaxtyping import Float

from jmeta.errors import ConfigError


def harmonic_mean(seen: float, unseen: float) -> float:
    """2 s u / (s + u): generalised zero-shot accuracy, which is 0 unless both are right at times.

    Args:
        seen: accuracy on examples of classes seen in training, among all classes.
        unseen: accuracy on those of unseen classes, among all classes.

    Returns:
        Between the two, nearer to the smaller.

    Example:
        >>> from jmeta.metrics import harmonic_mean
        >>> round(harmonic_mean(0.9, 0.3), 3)
        0.45

    Reference: Xian, Lampert, Schiele, Akata 2019, "Zero-Shot Learning — A Comprehensive Evaluation", section 4.2,
    https://arxiv.org/abs/1707.00600.
    """
    return 0.0 if seen + unseen == 0 else 2 * seen * unseen / (seen + unseen)


def auroc(positive: Float[np.ndarray, "p"], negative: Float[np.ndarray, "n"]) -> float:
    """The area under the ROC curve: how often a positive scores above a negative, ties counting half.

    Args:
        positive: `[p]`, scores of those that should be high (in scope: minus the distance to the nearest class).
        negative: `[n]`, scores of those that should be low.

    Returns:
        A share in `[0, 1]`; 0.5 is chance.

    Raises:
        ConfigError: one of the two is empty.

    Example:
        >>> import numpy as np
        >>> from jmeta.metrics import auroc
        >>> auroc(np.asarray([1.0, 3.0]), np.asarray([0.0, 2.0]))
        0.75

    Reference: Hanley, McNeil 1982, "The Meaning and Use of the Area under a ROC Curve".
    """
    if not len(positive) or not len(negative):
        raise ConfigError(f"there are {len(positive)} positives and {len(negative)} negatives; give some of each.")
    ordered = np.sort(negative)
    below, not_above = np.searchsorted(ordered, positive, "left"), np.searchsorted(ordered, positive, "right")
    return float((below + not_above).mean() / (2 * len(negative)))
