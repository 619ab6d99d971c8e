"""What classifier and regressor share."""

import contextlib
import inspect
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from jmeta.compilation import compiled
from jmeta.core import Adapted, Examples, MetaLearner, Params, State
from jmeta.errors import CheckpointError, DataError, JmetaError, ModelError, NotFittedError, TransductiveWarning
from jmeta.export import exported, read_program, read_sealed, run_program, write_bytes, write_sealed
from jmeta.inputs import as_inputs

Estimator = TypeVar("Estimator", bound="FewShot")


class FewShot:
    """What classifier and regressor share: parameters as scikit-learn has them, and one adapted task."""

    _kind: str  # of estimator, as scikit-learn calls it
    note_: Mapping[str, Any]  # of one that was loaded

    def __init__(
        self,
        learner: MetaLearner | None,
        params: Params,
        state: State,
        *,
        seed: int = 0,
        queries: int | None = None,
        input_shape: tuple[int, ...] | None = None,
    ) -> None:
        self.learner, self.params, self.state, self.seed, self.queries = learner, params, state, seed, queries
        self.input_shape = input_shape

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The arguments of the constructor."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def set_params(self: Estimator, **params: Any) -> Estimator:
        """Changes arguments of the constructor; `fit` again afterwards."""
        for name, value in params.items():
            if name not in self.get_params():
                raise ModelError(f"there is no parameter {name!r}; there are {', '.join(self.get_params())}.")
            setattr(self, name, value)
        return self

    @property
    def input_shape_(self) -> tuple[int, ...]:
        """The shape of one input, as the support had it."""
        self._check_fitted()
        return self._support.shape[1:]

    def save(self, file: str | Path, *, note: Mapping[str, Any] | None = None) -> None:
        """Writes what was adapted, so that `load` answers in a process that has neither learner nor network.

        Args:
            file: where, an `.npz` of plain arrays: the program of `export`, the labels and a digest. A file of that
                name is replaced in one go.
            note: what else is to be known, of what JSON can hold; the attribute `note_` of what `load` gives.

        Raises:
            NotFittedError: before `fit`.
            ModelError: the network cannot be exported for any number of inputs.
            DataError: labels that are neither text nor numbers.
            CheckpointError: the file cannot be written, and why.
        """
        program = np.frombuffer(self._program(), np.uint8)
        about = {
            "estimator": type(self).__name__,
            "queries": self.queries,
            "transductive": self._transductive,
            "note": dict(note or {}),
        }
        write_sealed(file, {"program": program, **self._labels()}, about)

    @classmethod
    def load(cls: type[Estimator], file: str | Path) -> Estimator:
        """Reads what `save` wrote.

        Args:
            file: as given to `save`.

        Returns:
            An estimator that answers as the saved one did; it cannot `fit`, as the learner is not in the file.

        Raises:
            CheckpointError: there is no such file, it is damaged or another's, or this JAX cannot read its program.
        """
        arrays, about = read_sealed(file)
        if about.get("estimator") != cls.__name__:
            raise CheckpointError(f"{file} holds no {cls.__name__}; read it by {about.get('estimator')}.load.")
        program = arrays.pop("program").tobytes()
        try:
            (inputs,) = read_program(program).in_avals
        except Exception as error:  # of a newer JAX, whose files may have any form
            raise CheckpointError(
                f"{file} holds a program that jax {jax.__version__} cannot read; install a newer jax."
            ) from error
        loaded = cls(None, (), (), queries=about["queries"])
        loaded._answers_by(
            partial(run_program, program=program), np.zeros((1, *inputs.shape[1:]), inputs.dtype), about["transductive"]
        )
        vars(loaded).update({f"{name}_": value for name, value in {**arrays, "note": about["note"]}.items()})
        return loaded

    def export(self, file: str | Path) -> None:
        """Writes the answers as StableHLO for CPU, CUDA and TPU, which needs JAX alone to run.

        `jax.export.deserialize(bytearray(content)).call(X)` takes any number of inputs as the network sees them, see
        `jmeta.as_inputs` (of pictures of bytes `X.astype("float32") / 255`), of the shape that the support had, and
        gives what `predict_proba` gives, of a regressor `predict`. What was adapted is inside.

        Args:
            file: where; a file of that name is replaced in one go.

        Raises:
            NotFittedError: before `fit`.
            ModelError: the network cannot be exported for any number of inputs.
            CheckpointError: the file cannot be written, and why.
        """
        write_bytes(file, self._program())

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "_answer")

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import ClassifierTags, RegressorTags, Tags, TargetTags

        of_kind = {
            "classifier": {"classifier_tags": ClassifierTags()},
            "regressor": {"regressor_tags": RegressorTags()},
        }
        return Tags(estimator_type=self._kind, target_tags=TargetTags(required=True), **of_kind[self._kind])

    def _adapt(self, X: np.ndarray, targets: np.ndarray, descriptions: Any) -> tuple[Key[Array, ""], Adapted]:
        """The key of the answers, and the learner adapted to a support."""
        adapt_key, predict_key = jax.random.split(jax.random.key(self.seed))
        padded = _bucket(len(X))
        support = Examples(_padded(X, padded), _padded(targets, padded), descriptions, jnp.arange(padded) < len(X))
        learner = self._learner()
        try:
            self._try(support)
        except ModelError:  # a network or a loss of the user's own that takes no mask; what else is wrong is told below
            support = Examples(jnp.asarray(X), jnp.asarray(targets), descriptions)
        return predict_key, compiled(adapt)(adapt_key, self.params, self.state, support, learner=learner)

    def _support_of(self, X: Any) -> np.ndarray:
        """The inputs of a support, of the shape that the network was trained with."""
        shape = np.asarray(X).shape[1:]
        if self.input_shape is not None and shape != tuple(self.input_shape):
            raise DataError(
                f"X has rows of shape {list(shape)}, and the run was trained on {list(self.input_shape)}; "
                "bring them to it, pictures by jmeta.read_images(folder, size=, channels=)."
            )
        return checked_array(X, "X")

    def _try(self, support: Examples) -> None:
        """Raises `ModelError` unless the learner can be adapted to a support."""
        try:
            jax.eval_shape(self._learner().adapt, jax.random.key(0), self.params, self.state, support)
        except JmetaError:
            raise
        except Exception as error:  # a network raises whatever it meets in inputs of another shape
            raise ModelError(
                f"the network cannot take inputs of shape {list(support.inputs.shape[1:])}; give inputs of the shape "
                "that it was trained on."
            ) from error

    def _learner(self) -> MetaLearner:
        if self.learner is None:
            raise ModelError(
                f"this {type(self).__name__} is adapted already and was loaded without its learner; fit the one that "
                "was saved, or that of a run: jmeta.load(folder).classifier()."
            )
        return self.learner

    def _answers_by(self, answer: partial, support: np.ndarray, transductive: bool | None = None) -> None:
        """From here on it is fitted: `answer` takes inputs of the support's shape last."""
        self._answer, self._support = answer, support
        self._compiled = compiled(answer.func).program(**answer.keywords)  # looked up once, not at each answer
        self.n_features_in_ = int(np.prod(support.shape[1:]))
        self._transductive = self._is_transductive() if transductive is None else transductive

    def _check_fitted(self) -> None:
        if not self.__sklearn_is_fitted__():
            raise NotFittedError(f"this {type(self).__name__} has no task yet; call fit(X, y) on its support first.")

    def _program(self) -> bytes:
        self._check_fitted()
        return exported(self._answer, self._support.shape[1:], self._support.dtype)

    def _labels(self) -> dict[str, np.ndarray]:
        return {}

    def _answers(self, X: Any) -> np.ndarray:
        self._check_fitted()
        support = self._support
        if (shape := np.asarray(X).shape) == support.shape[1:]:
            raise DataError(f"X has shape {list(shape)}, which is one input; give a row for it, X[None].")
        X = checked_array(X, "X")
        if X.shape[1:] != support.shape[1:]:
            raise DataError(
                f"X has rows of shape {list(X.shape[1:])}, and the support has {list(support.shape[1:])}; give queries "
                "of the same shape."
            )
        if not np.can_cast(X.dtype, support.dtype, "same_kind"):
            raise DataError(f"X is {X.dtype}, and the support was {support.dtype}; give both as {X.dtype}.")
        X = X.astype(support.dtype)
        if self._transductive:
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
        return self._compiled(*self._answer.args, inputs)

    def _is_transductive(self) -> bool:
        """Whether the answer to the first input changes beside the others."""
        others = _padded(self._support, _bucket(len(self._support) + 1))
        alone, beside = (self._run(x) for x in (jnp.broadcast_to(others[:1], others.shape), others))
        return not np.allclose(alone[0], beside[0], rtol=1e-4, atol=1e-5, equal_nan=True)


def adapt(key: Key[Array, ""], params: Params, state: State, support: Any, *, learner: MetaLearner) -> Adapted:
    """`learner.adapt`, as a function that all estimators compile."""
    return learner.adapt(key, params, state, support)


def checked_array(x: Any, name: str) -> np.ndarray:
    """Finite numbers, a row for each example: inputs as the network sees them, targets as float32."""
    array = np.asarray(x)
    if array.dtype.kind == "O":  # as a table of columns of several kinds has
        with contextlib.suppress(TypeError, ValueError):
            array = array.astype(np.float32)
    if array.dtype.kind not in "buif" and array.dtype != jnp.bfloat16:
        raise DataError(f"{name} is {array.dtype}; give real numbers.")
    array = array.astype(np.float32) if name == "y" else as_inputs(array)
    if array.ndim < (2 if name == "X" else 1):
        raise DataError(f"{name} has shape {list(array.shape)}; give a row for each example, {name}[:, None].")
    if not array.size:
        raise DataError(f"{name} has shape {list(array.shape)}, which holds nothing; give at least one row and column.")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise DataError(f"{name} holds values that are not finite; remove or repair NaN and infinite values.")
    return array


def _bucket(n: int) -> int:
    """The next power of two, so that other numbers of rows find the same compiled program."""
    return 1 << max(0, n - 1).bit_length()


def _padded(x: np.ndarray, rows: int) -> Array:
    return jnp.asarray(np.concatenate([x, np.zeros((rows - len(x), *x.shape[1:]), x.dtype)]))
