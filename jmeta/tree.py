"""Leaves of a pytree: selected by their path, and in a precision that sums can be taken in."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jmeta.errors import ConfigError


def path_name(path: tuple[Any, ...]) -> str:
    """The path of a leaf as text, `"body/kernel"`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def leaf_shapes(tree: PyTree) -> dict[str, str]:
    """Dtype and shape of each leaf by its path, `{"body/kernel": "float32[3, 4]"}`, as errors name them."""
    return {path_name(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in jax.tree.leaves_with_path(tree)}


def everything(path: str) -> bool:
    """Selects every leaf."""
    return True


def under(part: str) -> Callable[[str], bool]:
    """Selects the leaves whose path has a part, one name or several in a row.

    Args:
        part: `"head"` or `"Dense_0/kernel"`.

    Returns:
        A predicate on the path of a leaf.

    Example:
        >>> from jmeta.tree import under
        >>> under("head")("head/kernel"), under("head")("heads/kernel")
        (True, False)
    """
    return lambda path: f"/{part}/" in f"/{path}/"


def partition(select: Callable[[str], bool], tree: PyTree) -> tuple[PyTree, PyTree]:
    """Splits a tree into the leaves that `select` takes and the rest; the other half holds `None` in their place.

    Args:
        select: a predicate on the path of a leaf, `"body/kernel"`.
        tree: any pytree.

    Returns:
        `(selected, rest)`, which `combine` puts together again.

    Raises:
        ConfigError: no leaf is selected.

    Example:
        >>> from jmeta.tree import partition
        >>> partition(lambda path: path.startswith("head"), {"body": 1, "head": 2})
        ({'body': None, 'head': 2}, {'body': 1, 'head': None})
    """
    paths = [path_name(path) for path, _ in jax.tree.leaves_with_path(tree)]
    if paths and not any(map(select, paths)):
        raise ConfigError(
            f"no leaf of the parameters is adaptable; let `adaptable` (ANIL's `head`) choose among {', '.join(paths)}."
        )
    selected = jax.tree.map_with_path(lambda path, leaf: leaf if select(path_name(path)) else None, tree)
    rest = jax.tree.map_with_path(lambda path, leaf: None if select(path_name(path)) else leaf, tree)
    return selected, rest


def combine(selected: PyTree, rest: PyTree) -> PyTree:
    """Puts the two halves of `partition` together."""
    return jax.tree.map(lambda a, b: b if a is None else a, selected, rest, is_leaf=lambda x: x is None)


def widened(tree: PyTree) -> PyTree:
    """Floats of fewer than 32 bits as float32, for what is summed: bfloat16 knows no 301. All else stays as it is.

    Args:
        tree: any pytree of arrays.

    Returns:
        The same tree.

    Example:
        >>> import jax.numpy as jnp
        >>> from jmeta.tree import widened
        >>> widened({"low": jnp.ones(2, jnp.bfloat16), "count": jnp.ones(2, jnp.int8)})["low"].dtype.name
        'float32'
    """
    return jax.tree.map(lambda x: x.astype(jnp.float32) if _is_narrow(x) else x, tree)


def _is_narrow(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4


def part_of(i: int, seeds: int | None, tree: PyTree) -> PyTree:
    """What belongs to one of many seeds in arrays `[seeds, ...]`; all of it where there is no such axis, None."""
    return tree if seeds is None else jax.tree.map(lambda x: x[i], tree)
