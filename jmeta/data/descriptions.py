"""What describes classes: attributes, an embedding, the token ids of a text, images of similar classes, or several."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jmeta.data.text import TokenIds
from jmeta.errors import DataError
from jmeta.inputs import stored
from jmeta.kinds import Similar, kinds_of

Kind = np.ndarray | Array | Sequence[Any] | Mapping[int, Any] | TokenIds | Similar
Descriptions = Kind | Mapping[str, Kind]


def checked_descriptions(descriptions: Descriptions, classes: np.ndarray, names: Sequence[str] = ()) -> Any:
    """One description for each class as arrays `[classes, ...]`; `DataError` unless there is, all of one width."""
    called = [repr(name) for name in names] or [str(label) for label in classes]
    kinds = kinds_of(descriptions)
    found = {name: _checked_kind(kind, classes, called) for name, kind in (kinds or {"": descriptions}).items()}
    shared = any(isinstance(kind, Similar) for kind in found.values())  # several classes may be similar to one
    _tell_apart([jax.tree.leaves(kind)[0] for kind in found.values()], called, shared)
    return found if kinds else found[""]


def of_classes(kept: Sequence[bool] | np.ndarray, descriptions: Any) -> Any:
    """The descriptions of some classes; a mapping by label stays, as it serves all."""
    kinds = kinds_of(descriptions)
    if kinds:
        return {name: of_classes(kept, kind) for name, kind in kinds.items()}
    if isinstance(descriptions, TokenIds | Similar):
        return type(descriptions)(*(of_classes(kept, part) for part in descriptions))
    if descriptions is None or isinstance(descriptions, Mapping) or len(descriptions) == 0:
        return descriptions
    if len(descriptions) != len(kept):
        raise DataError(f"there are {len(descriptions)} descriptions but {len(kept)} classes; give one for each class.")
    return [one for one, wanted in zip(descriptions, kept, strict=True) if wanted]


def _checked_kind(kind: Any, classes: np.ndarray, called: Sequence[str]) -> Any:
    if isinstance(kind, TokenIds):
        return TokenIds(_checked(kind.ids, classes, called, np.dtype(np.int32)))
    if isinstance(kind, Similar):
        images = stored(_stacked(kind.images, classes, called))
        if not np.isfinite(images).all():
            raise DataError("images of similar classes are not finite; remove or repair NaN and infinite values.")
        of = np.arange(len(classes)) if isinstance(kind.of, tuple) else np.asarray(kind.of)
        if images.ndim < 3 or of.shape != (len(classes),):
            raise DataError(
                f"images of similar classes are {list(images.shape)}, of the classes {list(of.shape)}; give "
                "[classes, n, ...], n inputs for each class, and one number for each class."
            )
        return Similar(jnp.asarray(images), jnp.asarray(of, jnp.int32))
    return _checked(kind, classes, called, np.dtype(np.float32))


def _stacked(descriptions: Any, classes: np.ndarray, called: Sequence[str]) -> np.ndarray:
    """One of equal shape for each class."""
    if isinstance(descriptions, Mapping):
        missing = [name for name, label in zip(called, classes.tolist(), strict=True) if label not in descriptions]
        if missing:
            raise DataError(f"class {missing[0]} has no description; give one for each class.")
        descriptions = [descriptions[label] for label in classes.tolist()]
    if len(descriptions) != len(classes):
        raise DataError(
            f"there are {len(descriptions)} descriptions but {len(classes)} classes; give one for each class."
        )
    shapes = [np.shape(one) for one in descriptions]
    for name, shape in zip(called, shapes, strict=True):
        if shape != shapes[0] or shape == ():
            raise DataError(
                f"the description of class {name} has shape {list(shape)}, that of {called[0]} {list(shapes[0])}; give "
                "vectors of one width."
            )
    return np.stack([np.asarray(one) for one in descriptions])


def _checked(descriptions: Any, classes: np.ndarray, called: Sequence[str], dtype: np.dtype) -> Array:
    array = _stacked(descriptions, classes, called)
    if array.dtype.kind not in "buif" and array.dtype != jnp.bfloat16:
        raise DataError(
            f"descriptions are {array.dtype}; make numbers of them: jmeta.TokenIds(jmeta.hashed_text(texts)) for text."
        )
    if dtype == np.float32 and array.dtype.kind in "ui" and array.max() > 1:
        raise DataError(
            f"descriptions are integers up to {array.max()}, which may be token ids or numbers; give token ids as "
            "jmeta.TokenIds(ids) and numbers as floats."
        )
    if dtype == np.int32 and (array.dtype.kind not in "ui" or array.min() < 0):
        raise DataError(f"token ids are {array.dtype} from {array.min()}; jmeta.hashed_text(texts) makes them.")
    array = array.astype(dtype)
    for name, row in zip(called, array.reshape(len(array), -1), strict=True):
        if not np.isfinite(row).all():
            raise DataError(f"the description of class {name} is not finite; remove or repair NaN and infinite values.")
    return jnp.asarray(array)


def _tell_apart(kinds: Sequence[Array], called: Sequence[str], shared: bool) -> None:
    """That each class has a description, of whatever kind, and unless they are shared one of its own."""
    flat = np.concatenate([np.asarray(kind).reshape(len(called), -1) for kind in kinds], axis=1)
    for name, row in zip(called, flat, strict=True):
        if not row.any():
            raise DataError(f"the description of class {name} is all zeros, which says nothing; describe it.")
    if shared:
        return
    _, first, inverse = np.unique(flat, axis=0, return_index=True, return_inverse=True)
    for i, j in enumerate(first[inverse.reshape(-1)]):
        if i != j:
            raise DataError(
                f"classes {called[j]} and {called[i]} have the same description; describe what tells them apart, "
                "or make one class of them."
            )
