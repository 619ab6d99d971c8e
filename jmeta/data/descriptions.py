"""What describes classes: attributes, an embedding, or the token ids of a text."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jmeta.data.text import TokenIds
from jmeta.errors import DataError

Descriptions = np.ndarray | Array | Sequence[Any] | Mapping[int, Any] | TokenIds


def checked_descriptions(
    descriptions: Descriptions, classes: np.ndarray, names: Sequence[str] = ()
) -> Array | TokenIds:
    """One description for each class as an array `[classes, ...]`; `DataError` unless there is, all of one width."""
    if isinstance(descriptions, TokenIds):
        return TokenIds(_checked(descriptions.ids, classes, names, np.dtype(np.int32)))
    return _checked(descriptions, classes, names, np.dtype(np.float32))


def _checked(descriptions: Any, classes: np.ndarray, names: Sequence[str], dtype: np.dtype) -> Array:
    called = [repr(name) for name in names] or [str(label) for label in classes]
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
    array = np.stack([np.asarray(one) for one in descriptions])
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
    flat = array.reshape(len(array), -1)
    for name, row in zip(called, flat, strict=True):
        if not np.isfinite(row).all():
            raise DataError(f"the description of class {name} is not finite; remove or repair NaN and infinite values.")
        if not row.any():
            raise DataError(f"the description of class {name} is all zeros, which says nothing; describe it.")
    _, first, inverse = np.unique(flat, axis=0, return_index=True, return_inverse=True)
    for i, j in enumerate(first[inverse.reshape(-1)]):
        if i != j:
            raise DataError(
                f"classes {called[j]} and {called[i]} have the same description; describe what tells them apart, "
                "or make one class of them."
            )
    return jnp.asarray(array)
