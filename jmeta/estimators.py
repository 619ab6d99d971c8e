"""Adapting as people know it: `fit` on a support with labels of any kind, `predict` on as many queries as there are."""

import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from jmeta.compilation import compiled
from jmeta.core import Adapted, Examples, MetaLearner, Params, State
from jmeta.errors import DataError, JmetaError, ModelError, NotFittedError, TransductiveWarning
from jmeta.inputs import as_inputs
from jmeta.masks import only


class _FewShot:
    """What classifier and regressor share: parameters as scikit-learn has them, and one adapted task."""

    def __init__(
        self, learner: MetaLearner, params: Params, state: State, *, seed: int = 0, queries: int | None = None
    ) -> None:
        self.learner, self.params, self.state, self.seed, self.queries = learner, params, state, seed, queries

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The arguments of the constructor."""
        return {name: getattr(self, name) for name in ("learner", "params", "state", "seed", "queries")}

    def set_params(self, **params: Any) -> "_FewShot":
        """Changes arguments of the constructor; `fit` again afterwards."""
        for name, value in params.items():
            if name not in self.get_params():
                raise ModelError(f"there is no parameter {name!r}; there are {', '.join(self.get_params())}.")
            setattr(self, name, value)
        return self

    def _adapt(self, X: Any, targets: np.ndarray, descriptions: Any) -> None:
        keys = jax.random.split(jax.random.key(self.seed))
        self._predict_key, self._support = keys[1], X
        self.n_features_in_ = int(np.prod(X.shape[1:]))
        padded = _bucket(len(X))
        support = Examples(_padded(X, padded), _padded(targets, padded), descriptions, jnp.arange(padded) < len(X))
        try:
            jax.eval_shape(self.learner.adapt, keys[0], self.params, self.state, support)
        except ModelError:  # a network or a loss of the user's own that takes no mask; what else is wrong is told below
            support = Examples(jnp.asarray(X), jnp.asarray(targets), descriptions)
        self._adapted = compiled(_adapt)(keys[0], self.params, self.state, support, learner=self.learner)
        self._transductive: bool | None = None

    def _outputs(self, X: Any) -> np.ndarray:
        if not hasattr(self, "_adapted"):
            raise NotFittedError(f"this {type(self).__name__} has no task yet; call fit(X, y) on its support first.")
        X = _array(X, "X")
        if X.shape[1:] != self._support.shape[1:]:
            raise DataError(
                f"X has rows of shape {list(X.shape[1:])}, and the support has {list(self._support.shape[1:])}; give "
                "queries of the same shape."
            )
        if self._is_transductive(X):
            if len(X) < (self.queries or 2):
                warnings.warn(
                    f"this model is transductive: an answer depends on the other queries, and of {len(X)} at once it "
                    f"is worse than of the {self.queries or 'many'} that it was evaluated with; ask more at once, or "
                    'train with another normalisation, as norm="group".',
                    TransductiveWarning,
                    stacklevel=3,
                )
            return np.asarray(self._run(jnp.asarray(X)))
        return np.asarray(self._run(_padded(X, _bucket(len(X)))))[: len(X)]

    def _run(self, inputs: Array) -> Array:
        return compiled(_predict)(self._predict_key, self._adapted, inputs, learner=self.learner)

    def _is_transductive(self, X: np.ndarray) -> bool:
        """Whether the answer to the first query changes beside the support: measured once for each task."""
        if self._transductive is None:
            first, others = X[:1], self._support
            alone, beside = (self._run(jnp.asarray(x)) for x in (first, np.concatenate([first, others])))
            same = np.allclose(alone[0], beside[0], rtol=1e-4, atol=1e-5, equal_nan=True)
            self._transductive = not same
        return self._transductive


class FewShotClassifier(_FewShot):
    """A meta-trained learner as a classifier in the manner of scikit-learn: `fit` adapts it to a task.

    Args:
        learner: the meta-learner.
        params: θ, as `jmeta.fit` gives.
        state: the learner's state.
        seed: of what is random in adaptation.
        queries: how many queries at once the learner was evaluated with, for the warning below. Default: unknown.

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
    """

    def fit(self, X: Any, y: Sequence[Any] | np.ndarray, descriptions: Any = None) -> "FewShotClassifier":
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
        """
        X, y = _array(X, "X"), np.asarray(y)
        if y.ndim != 1 or len(X) != len(y):
            raise DataError(f"there are {len(X)} inputs and labels of shape {list(y.shape)}; give one label for each.")
        self.classes_, index = np.unique(y, return_inverse=True)
        described = () if descriptions is None else jax.tree.map(jnp.asarray, descriptions)
        ways = self._ways(X, len(self.classes_), described)
        self._present = jnp.arange(ways) < len(self.classes_)
        self._adapt(X, np.eye(ways, dtype=np.float32)[index], described)
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """The probability of each class, `[n, classes]`, in the order of `classes_`."""
        logits = only(self._present, jnp.asarray(self._outputs(X))) if hasattr(self, "_adapted") else self._outputs(X)
        return np.asarray(jax.nn.softmax(logits[:, : len(self.classes_)], axis=1))

    def predict(self, X: Any) -> np.ndarray:
        """The most probable class of each input, `[n]`."""
        probabilities = self.predict_proba(X)
        return self.classes_[probabilities.argmax(axis=1)]

    def score(self, X: Any, y: Sequence[Any] | np.ndarray) -> float:
        """The share of inputs whose label is predicted."""
        return float((self.predict(X) == np.asarray(y)).mean())

    def _ways(self, X: np.ndarray, classes: int, descriptions: Any) -> int:
        """The number of classes, or that of the outputs of a head that has more."""

        def fits(ways: int) -> Any:
            support = Examples(jnp.asarray(X[:1]), jnp.zeros((1, ways)), descriptions)
            return jax.eval_shape(self.learner.adapt, jax.random.key(0), self.params, self.state, support)

        try:
            fits(classes)
        except ModelError as error:
            head = [
                leaf.shape[-1]
                for path, leaf in jax.tree.leaves_with_path(self.params)
                if "head" in jax.tree_util.keystr(path) and leaf.ndim
            ]
            for ways in sorted({width for width in head if width > classes}):
                try:
                    fits(ways)
                except JmetaError:
                    continue
                return ways
            if any(width < classes for width in head):
                raise DataError(
                    f"the support has {classes} classes and the learner a head of {max(head)}; give fewer, or train a "
                    "prototypical learner, which takes any number."
                ) from error
            raise
        return classes


class FewShotRegressor(_FewShot):
    """A meta-trained learner as a regressor in the manner of scikit-learn: `fit` adapts it to a task.

    Args:
        learner: the meta-learner.
        params: θ, as `jmeta.fit` gives.
        state: the learner's state.
        seed: of what is random in adaptation.
        queries: how many queries at once the learner was evaluated with. Default: unknown.

    Example:
        >>> import jax, jmeta, numpy as np
        >>> learner = jmeta.maml(jmeta.linen(jmeta.MLP(outputs=1)), inner_rate=0.01, loss=jmeta.mean_squared_error)
        >>> fitted = jmeta.fit(jax.random.key(0), learner, jmeta.sinusoid(), steps=10, tasks=4)
        >>> regressor = jmeta.FewShotRegressor(learner, fitted.params, fitted.state)
        >>> regressor.fit(np.ones((5, 1)), np.ones(5)).predict(np.zeros((3, 1))).shape
        (3,)
    """

    def fit(self, X: Any, y: Any) -> "FewShotRegressor":
        """Adapts the learner to a support: X `[n, ...]`, y `[n]` or `[n, outputs]`."""
        X, y = _array(X, "X"), _array(y, "y")
        if len(X) != len(y):
            raise DataError(f"there are {len(X)} inputs and {len(y)} targets; give one target for each input.")
        self._flat = y.ndim == 1
        self._adapt(X, y[:, None] if self._flat else y, ())
        return self

    def predict(self, X: Any) -> np.ndarray:
        """The outputs, of the shape that y had in `fit`."""
        outputs = self._outputs(X)
        return outputs[:, 0] if self._flat else outputs

    def score(self, X: Any, y: Any) -> float:
        """R², the share of the variance of y that is predicted."""
        y, outputs = np.asarray(y, np.float64), np.asarray(self.predict(X), np.float64)
        return float(1.0 - np.square(y - outputs).sum() / np.square(y - y.mean(axis=0)).sum())


def _adapt(key: Key[Array, ""], params: Params, state: State, support: Examples, *, learner: MetaLearner) -> Adapted:
    return learner.adapt(key, params, state, support)


def _predict(key: Key[Array, ""], adapted: Adapted, inputs: Array, *, learner: MetaLearner) -> Array:
    return learner.predict(key, adapted, inputs)


def _array(x: Any, name: str) -> np.ndarray:
    array = np.asarray(x)
    if array.dtype.kind not in "buif" and array.dtype != jnp.bfloat16:
        raise DataError(f"{name} is {array.dtype}; give real numbers.")
    array = array.astype(np.float32) if name == "y" else as_inputs(array)
    if not len(array):
        raise DataError(f"{name} has no rows; give at least one.")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise DataError(f"{name} holds values that are not finite; remove or repair NaN and infinite values.")
    return array


def _bucket(n: int) -> int:
    """The next power of two, so that other numbers of rows find the same compiled program."""
    return 1 << max(0, n - 1).bit_length()


def _padded(x: np.ndarray, rows: int) -> Array:
    return jnp.asarray(np.concatenate([x, np.zeros((rows - len(x), *x.shape[1:]), x.dtype)]))
