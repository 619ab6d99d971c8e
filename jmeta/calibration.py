"""How sure a learner may be of its answers: one temperature, found on validation tasks."""

import jax
import numpy as np
from jaxtyping import Array, Float, Key

from jmeta.core import MetaLearner, Params, State, TaskSource
from jmeta.errors import DataError
from jmeta.evaluate import per_episode
from jmeta.losses import Pooled

_LEAST, _MOST = 0.01, 100.0


def calibrate(
    key: Key[Array, ""],
    learner: MetaLearner,
    params: Params,
    state: State,
    source: TaskSource,
    *,
    episodes: int = 100,
    task_chunk: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> float:
    """The temperature T at which the probabilities softmax(logits / T) are most likely right.

    T = argmin of −mean log softmax(logits / T)[target] over all queries of some tasks, in float64 to the last digits:
    in 1 / T the function is convex, and the sign of its derivative mean(E[logit] − logit[target]) tells on which side
    of the minimum one is. Accuracy stays as it is.

    Args:
        key: the same key gives the same tasks.
        learner: the meta-learner.
        params: θ.
        state: the learner's state.
        source: validation tasks, which are neither trained on nor reported.
        episodes: number of tasks.
        task_chunk: as in `jmeta.evaluate`.
        mesh: as in `jmeta.evaluate`.

    Returns:
        T between 0.01, of answers that are all right, and 100, of answers that tell nothing; for
        `jmeta.FewShotClassifier(..., temperature=T)`.

    Raises:
        ModelError: the model does not fit the tasks, or the outputs are not logits of the classes.
        DataError: outputs that are not finite, or no query has a label.

    Example:
        >>> import jax, jmeta
        >>> source, learner = jmeta.glyphs(split="validation"), jmeta.prototypical(jmeta.identity())
        >>> temperature = jmeta.calibrate(jax.random.key(0), learner, {}, {}, source, episodes=20)
        >>> temperature > 1.0  # squared distances between images are large
        True

    Reference: Guo, Pleiss, Sun, Weinberger 2017, "On Calibration of Modern Neural Networks", section 4.2,
    https://arxiv.org/abs/1706.04599.

    Differences from the paper: the temperature is one for all tasks of the validation classes, as a task has no
    validation examples of its own.
    """
    asked = (key, learner, params, state, source, {"answers": _ANSWERS})
    values = per_episode(*asked, episodes=episodes, task_chunk=task_chunk, mesh=mesh)["answers"]
    logits, targets = (
        np.asarray(values[name], np.float64).reshape(-1, values[name].shape[-1]) for name in ("outputs", "targets")
    )
    labelled = targets.any(axis=1)
    if not labelled.any() or not np.isfinite(logits[labelled]).all():
        raise DataError(
            "there is no query with a label and finite outputs to find a temperature on; look at the tasks."
        )
    return temperature_of(logits[labelled], targets[labelled])


def temperature_of(logits: Float[np.ndarray, "n ways"], targets: Float[np.ndarray, "n ways"]) -> float:
    """The temperature for logits whose targets are known.

    Args:
        logits: `[n, ways]`, in float64.
        targets: `[n, ways]` one-hot.

    Returns:
        T between 0.01 and 100.

    Example:
        >>> import numpy as np
        >>> from jmeta.calibration import temperature_of
        >>> sure = np.log([[0.9, 0.1]]).repeat(4, axis=0)  # right three times of four
        >>> round(float(temperature_of(sure, np.eye(2)[[0, 0, 0, 1]])), 6)  # log 9 / log 3
        2.0
    """
    right = (logits * targets).sum(axis=1)

    def slope(β: float) -> float:
        scaled = β * logits
        p = np.exp(scaled - scaled.max(axis=1, keepdims=True))
        return float(((p * logits).sum(axis=1) / p.sum(axis=1) - right).mean())

    low, high = np.log(1.0 / _MOST), np.log(1.0 / _LEAST)
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if slope(np.exp(middle)) <= 0.0 else (low, middle)
    return float(np.exp(-0.5 * (low + high)))


def _answers(outputs: Array, targets: Array, mask: Array | None = None) -> dict[str, Array]:
    return {"outputs": outputs, "targets": targets if mask is None else targets * mask[:, None].astype(targets.dtype)}


_ANSWERS = Pooled(_answers, lambda mean: mean)
