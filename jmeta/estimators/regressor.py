"""A meta-trained learner as a regressor in the manner of scikit-learn."""

from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Array, Key

from jmeta.core import Adapted, MetaLearner, Params, State
from jmeta.errors import DataError
from jmeta.estimators.base import FewShot, checked_array
from jmeta.inputs import Standardisation


class FewShotRegressor(FewShot):
    """A meta-trained learner as a regressor in the manner of scikit-learn: `fit` adapts it to a task.

    Args:
        learner: the meta-learner.
        params: θ, as `jmeta.fit` gives.
        state: the learner's state.
        seed: of what is random in adaptation.
        queries: how many queries at once the learner was evaluated with. Default: unknown.
        input_shape: that of one input, as in training; `fit` refuses others. Default: unknown.
        standardisation: of inputs and targets in training: `fit` and `predict` take and give the numbers of the table
            itself. Default: they are as the learner has them.

    Example:
        >>> import jax, jmeta, numpy as np
        >>> learner = jmeta.maml(jmeta.linen(jmeta.MLP(outputs=1)), inner_rate=0.01, loss=jmeta.mean_squared_error)
        >>> fitted = jmeta.fit(jax.random.key(0), learner, jmeta.sinusoid(), steps=10, tasks=4)
        >>> regressor = jmeta.FewShotRegressor(learner, fitted.params, fitted.state)
        >>> regressor.fit(np.ones((5, 1)), np.ones(5)).predict(np.zeros((3, 1))).shape
        (3,)
    """

    _kind = "regressor"

    def __init__(
        self,
        learner: MetaLearner | None,
        params: Params,
        state: State,
        *,
        seed: int = 0,
        queries: int | None = None,
        input_shape: tuple[int, ...] | None = None,
        standardisation: Standardisation | None = None,
    ) -> None:
        super().__init__(learner, params, state, seed=seed, queries=queries, input_shape=input_shape)
        self.standardisation = standardisation

    def fit(self, X: Any, y: Any) -> "FewShotRegressor":
        """Adapts the learner to a support: X `[n, ...]`, y `[n]` or `[n, outputs]`."""
        X, y = self._support_of(X), checked_array(y, "y")
        if len(X) != len(y):
            raise DataError(f"there are {len(X)} inputs and {len(y)} targets; give one target for each input.")
        learner, flat, by = self._learner(), y.ndim == 1, self.standardisation
        targets = y[:, None] if flat else y
        inputs, targets = (np.asarray(by.inputs(X)), np.asarray(by.targets(targets))) if by else (X, targets)
        key, adapted = self._adapt(inputs, targets, ())
        self._answers_by(partial(_outputs, key, adapted, by, learner=learner, flat=flat), X)
        return self

    def predict(self, X: Any) -> np.ndarray:
        """The outputs, of the shape that y had in `fit`."""
        return self._answers(X)

    def score(self, X: Any, y: Any) -> float:
        """R², the share of the variance of y that is predicted."""
        y, outputs = np.asarray(y, np.float64), np.asarray(self.predict(X), np.float64)
        return float(1.0 - np.square(y - outputs).sum() / np.square(y - y.mean(axis=0)).sum())


def _outputs(
    key: Key[Array, ""],
    adapted: Adapted,
    by: Standardisation | None,
    inputs: Array,
    *,
    learner: MetaLearner,
    flat: bool,
) -> Array:
    outputs = learner.predict(key, adapted, inputs if by is None else by.inputs(inputs))
    outputs = outputs if by is None else by.outputs(outputs)
    return outputs[:, 0] if flat else outputs
