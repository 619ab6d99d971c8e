"""Numbers that are reported beside accuracy."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

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


def wilson_interval(right: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a share, right / n, of n independent answers.

    (p + z² / 2n ± z √(p (1 − p) / n + z² / 4n²)) / (1 + z² / n), with p = right / n and z = 1.96: between 0 and 1, and
    not empty where all are right.

    Args:
        right: how many.
        n: of how many, at least one.

    Returns:
        `(low, high)`.

    Example:
        >>> from jmeta.metrics import wilson_interval
        >>> low, high = wilson_interval(10, 10)
        >>> round(low, 3), round(high, 3)
        (0.722, 1.0)

    Reference: Wilson 1927, "Probable Inference, the Law of Succession, and Statistical Inference".
    """
    p, z = right / n, 1.96
    middle, half = p + z**2 / (2 * n), z * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
    return max(0.0, (middle - half) / (1 + z**2 / n)), min(1.0, (middle + half) / (1 + z**2 / n))


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


def interval(values: PyTree, summary: Callable[[PyTree], Any] | None = None) -> tuple[float, float]:
    """A mean over episodes, and half the width of its 95 % interval, by the jackknife.

    An episode at a time is left out; of a plain mean that gives 1.96 s / √n to the last digit.

    Args:
        values: `[episodes]`, or a tree of `[episodes, ...]` with a summary.
        summary: means over the episodes -> scalar. Default: the mean itself.

    Returns:
        `(mean or its summary, half the width)`.

    Example:
        >>> import numpy as np
        >>> from jmeta.metrics import interval
        >>> interval(np.asarray([0.0, 1.0, 2.0]))[0]
        1.0

    Reference: Efron, Stein 1981, "The Jackknife Estimate of Variance".
    """
    leaves, tree = jax.tree.flatten(jax.tree.map(lambda x: np.asarray(x, np.float64), values))
    n, means = len(leaves[0]), [x.mean(axis=0) for x in leaves]

    def of(parts: list[Any]) -> float:
        mean = jax.tree.unflatten(tree, parts)
        return float(mean if summary is None else summary(mean))

    without = [mean - (x - mean) / (n - 1) for x, mean in zip(leaves, means, strict=True)]
    left = np.asarray([of([x[i] for x in without]) for i in range(n)])
    return of(means), float(1.96 * np.sqrt((n - 1) / n * np.square(left - left.mean()).sum()))


def seeds_interval(values: Sequence[float]) -> tuple[float, float]:
    """A mean over seeds, and half the width of its 95 % interval: Student's t, as few seeds know their spread badly.

    Args:
        values: one for each seed.

    Returns:
        `(mean, half the width)`; of a single one the width is NaN.

    Example:
        >>> from jmeta.metrics import seeds_interval
        >>> mean, half = seeds_interval([0.0, 1.0, 2.0])
        >>> mean, round(half, 3)
        (1.0, 2.484)

    Reference: Student 1908, "The Probable Error of a Mean".
    """
    from scipy import stats

    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return mean, float("nan")
    return mean, float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n))


def interquartile_mean(values: Float[np.ndarray, "..."]) -> float:
    """The mean of the middle half of all values: less shaken by single ones than a mean, better known than a median.

    Args:
        values: of any shape, as `[seeds, tasks]`; a quarter of them, rounded down, is left away at each end.

    Returns:
        The mean of the rest.

    Example:
        >>> import numpy as np
        >>> from jmeta.metrics import interquartile_mean
        >>> interquartile_mean(np.asarray([[0.0, 1.0], [2.0, 99.0]]))
        1.5

    Reference: Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice", section 4.3.
    """
    ordered = np.sort(np.asarray(values, np.float64), axis=None)
    cut = len(ordered) // 4
    return float(ordered[cut : len(ordered) - cut].mean())


def stratified_interval(
    key: Key[Array, ""],
    values: Float[np.ndarray, "seeds tasks"],
    summary: Callable[[Float[np.ndarray, "seeds tasks"]], float] = interquartile_mean,
    *,
    resamples: int = 2000,
) -> tuple[float, float]:
    """The 95 % interval of a summary over seeds and tasks, by the stratified bootstrap.

    Seeds are drawn anew with replacement, for each task by itself; the interval holds the middle 95 % of the summaries.

    Args:
        key: of the drawing.
        values: `[seeds, tasks]`, as the returns of policies trained from several seeds on the same tasks.
        summary: `[seeds, tasks] -> number`.
        resamples: how often seeds are drawn.

    Returns:
        `(low, high)`.

    Raises:
        ConfigError: values that are no matrix, or of a single seed.

    Example:
        >>> import jax, numpy as np
        >>> from jmeta.metrics import stratified_interval
        >>> low, high = stratified_interval(jax.random.key(0), np.arange(30.0).reshape(10, 3))
        >>> low < 14.5 < high
        True

    Reference: Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice", section 4.1.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 2 or len(values) < 2:
        raise ConfigError(f"values have shape {list(values.shape)}; give [seeds, tasks] of at least two seeds.")
    drawn = np.asarray(jax.random.randint(key, (resamples, *values.shape), 0, len(values)))
    summaries = [summary(np.take_along_axis(values, seeds, axis=0)) for seeds in drawn]
    low, high = np.percentile(summaries, [2.5, 97.5])
    return float(low), float(high)


def over_seeds_of(results: Sequence[Mapping[str, Any]], main: str) -> dict[str, Any]:
    """What `evaluate` reports of many seeds.

    Args:
        results: of each, as it reports of one.
        main: the name of the metric whose interval is `"ci95"`.

    Returns:
        The mean of each number with half of its interval over the seeds, the protocol, `"seeds"` and `"results"`.
    """
    combined = {name: value for name, value in results[0].items() if name not in ("skipped", "details")}
    for name in results[0]:
        half_width = "ci95" if name == main else f"{name}_ci95"
        if half_width in results[0]:
            combined |= zip((name, half_width), seeds_interval([result[name] for result in results]), strict=True)
    return {**combined, "seeds": len(results), "results": list(results)}
