"""A meta-trained learner as a classifier in the manner of scikit-learn."""

import contextlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from jmeta.core import Adapted, Examples, MetaLearner, Params, State
from jmeta.errors import ConfigError, DataError, JmetaError, ModelError
from jmeta.estimators.base import FewShot
from jmeta.masks import only
from jmeta.tree import widened


class FewShotClassifier(FewShot):
    """A meta-trained learner as a classifier in the manner of scikit-learn: `fit` adapts it to a task.

    Args:
        learner: the meta-learner.
        params: θ, as `jmeta.fit` gives.
        state: the learner's state.
        seed: of what is random in adaptation.
        queries: how many queries at once the learner was evaluated with, for the warning below. Default: unknown.
        input_shape: that of one input, as in training; `fit` refuses others. Default: unknown, and left to the network.
        temperature: T of the probabilities softmax(logits / T), as `jmeta.calibrate` finds it.

    Attributes:
        classes_: `[classes]`, the sorted distinct labels, after `fit`.

    Warns:
        TransductiveWarning: from `predict`: the answers depend on the queries beside them, and there are fewer than in
            the evaluation.

    Example:
        >>> import jmeta, numpy as np
        >>> x = np.asarray([[0.0, 0.1], [0.1, 0.0], [5.0, 5.1]], np.float32)
        >>> classifier = jmeta.FewShotClassifier(jmeta.prototypical(jmeta.identity()), {}, {})
        >>> classifier.fit(x, ["near", "near", "far"]).predict(x[:1] + 1.0).tolist()
        ['near']

    Reference: Guo et al. 2017, "On Calibration of Modern Neural Networks", section 4.2.
    """

    _kind = "classifier"

    def __init__(
        self,
        learner: MetaLearner | None,
        params: Params,
        state: State,
        *,
        seed: int = 0,
        queries: int | None = None,
        input_shape: tuple[int, ...] | None = None,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(learner, params, state, seed=seed, queries=queries, input_shape=input_shape)
        self.temperature = temperature

    def fit(self, X: Any, y: Any, descriptions: Any = None) -> "FewShotClassifier":
        """Adapts the learner to a support.

        Args:
            X: `[n, ...]`, the inputs of the support, as `jmeta.from_arrays` takes them: pictures as bytes or 0 to 1.
            y: `[n]`, labels of any kind, of classes of any size.
            descriptions: `[classes, ...]` in the order of the sorted labels, for a learner that reads them.

        Returns:
            Itself.

        Raises:
            DataError: labels and inputs of different length, values that are not finite, or more classes than the
                outputs of a learner with a head of fixed width.
            ConfigError: a temperature that is not positive.
            ModelError: it was loaded from a file, without its learner.
        """
        X, y = self._support_of(X), np.asarray(y)
        if y.ndim != 1 or len(X) != len(y):
            raise DataError(f"there are {len(X)} inputs and labels of shape {list(y.shape)}; give one label for each.")
        if y.dtype.kind == "f" and not np.isfinite(y).all():
            raise DataError("y holds labels that are not finite; remove or repair NaN and infinite values.")
        if not 0.0 < self.temperature < float("inf"):
            raise ConfigError(f"temperature is {self.temperature}; give a positive number.")
        try:
            classes, index = np.unique(y, return_inverse=True)
        except TypeError as error:
            raise DataError("y holds labels that cannot be sorted; give all as text or all as numbers.") from error
        described = () if descriptions is None else jax.tree.map(jnp.asarray, descriptions)
        learner, ways = self._learner(), self._ways(X, len(classes), described)
        key, adapted = self._adapt(X, np.eye(ways, dtype=np.float32)[index], described)
        present, temperature = jnp.arange(ways) < len(classes), jnp.asarray(self.temperature, jnp.float32)
        self.classes_ = classes
        answer = partial(_probabilities, key, adapted, present, temperature, learner=learner, classes=len(classes))
        self._answers_by(answer, X)
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """The probability of each class, `[n, classes]`, in the order of `classes_`."""
        return self._answers(X)

    def predict(self, X: Any) -> np.ndarray:
        """The most probable class of each input, `[n]`."""
        probabilities = self.predict_proba(X)
        return self.classes_[probabilities.argmax(axis=1)]

    def score(self, X: Any, y: Any) -> float:
        """The share of inputs whose label is predicted."""
        return float((self.predict(X) == np.asarray(y)).mean())

    def _labels(self) -> dict[str, np.ndarray]:
        if self.classes_.dtype.hasobject and not all(isinstance(c, str | int | float) for c in self.classes_):
            raise DataError(f"labels as {self.classes_[0]!r} cannot be saved; give text or numbers.")
        return {"classes": np.asarray(self.classes_.tolist()) if self.classes_.dtype.hasobject else self.classes_}

    def _ways(self, X: np.ndarray, classes: int, descriptions: Any) -> int:
        """The number of classes, or that of the outputs of a head that has more."""

        def fit_to(ways: int) -> None:
            support = Examples(jnp.asarray(X[:1]), jnp.zeros((1, ways)), descriptions)
            self._try(support)

        def fits(ways: int) -> bool:
            with contextlib.suppress(JmetaError):
                fit_to(ways)
                return True
            return False

        try:
            fit_to(classes)
        except ModelError as error:
            # the head is whatever layer is as wide as the answers
            widths = {leaf.shape[-1] for leaf in jax.tree.leaves(self.params) if leaf.ndim in (1, 2)}
            for ways in sorted(width for width in widths if width > classes):
                if fits(ways):
                    return ways
            for ways in sorted(width for width in widths if width < classes):
                if fits(ways):
                    raise DataError(
                        f"the support has {classes} classes and the learner a head of {ways}; give fewer, or train a "
                        "prototypical learner, which takes any number."
                    ) from error
            raise
        return classes


def _probabilities(
    key: Key[Array, ""],
    adapted: Adapted,
    present: Bool[Array, "ways"],
    temperature: Float[Array, ""],
    inputs: Array,
    *,
    learner: MetaLearner,
    classes: int,
) -> Float[Array, "n classes"]:
    logits = widened(learner.predict(key, adapted, inputs))
    logits = only(present, logits / temperature.astype(logits.dtype))
    return jax.nn.softmax(logits[:, :classes], axis=1)
