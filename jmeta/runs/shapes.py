"""The shapes of a run's tasks as JSON, so that a run is used without its data."""

from typing import Any

import jax
import jax.numpy as jnp

from jmeta.core import Examples, Task
from jmeta.data.text import TokenIds
from jmeta.kinds import Similar, kinds_of


def to_json(task: Task) -> dict[str, Any] | None:
    """A task of shapes in lists and texts; None for one with another support than examples.

    Args:
        task: of `jax.ShapeDtypeStruct`.

    Returns:
        What `json.dumps` takes.
    """
    if not isinstance(task.query, Examples) or not isinstance(task.support, Examples | tuple):
        return None
    if not isinstance(task.support, Examples) and task.support != ():
        return None
    return {name: None if part == () else _examples(part) for name, part in task._asdict().items()}


def from_json(stored: dict[str, Any]) -> Task:
    """The task of shapes again."""

    def examples(part: dict[str, Any] | None) -> Any:
        if part is None:
            return ()
        fields: dict[str, Any] = {name: _shape(value) for name, value in part.items() if name in Examples._fields}
        if told := {name: value for name, value in part.items() if name not in Examples._fields}:
            fields["descriptions"] = _kind(told)
        return Examples(**fields)

    return Task(*(examples(stored[name]) for name in Task._fields))


def _examples(part: Examples) -> dict[str, Any]:
    fields = {name: value for name, value in part._asdict().items() if jax.tree.leaves(value)}
    told = fields.pop("descriptions", None)
    stored = {name: [list(value.shape), str(value.dtype)] for name, value in fields.items()}
    return stored if told is None else stored | _stored_kind(told)


def _stored_kind(kind: Any) -> dict[str, Any]:
    """The shapes of descriptions under a name that says of which kind they are."""
    if kinds := kinds_of(kind):
        return {"kinds": {name: _stored_kind(own) for name, own in kinds.items()}}
    shapes = [[list(leaf.shape), str(leaf.dtype)] for leaf in jax.tree.leaves(kind)]
    if isinstance(kind, Similar):
        return {"similar": shapes}
    return {"token_ids" if isinstance(kind, TokenIds) else "descriptions": shapes[0]}


def _kind(stored: dict[str, Any]) -> Any:
    if "kinds" in stored:
        return {name: _kind(own) for name, own in stored["kinds"].items()}
    if "similar" in stored:
        return Similar(*map(_shape, stored["similar"]))
    return TokenIds(_shape(stored["token_ids"])) if "token_ids" in stored else _shape(stored["descriptions"])


def _shape(stored: Any) -> jax.ShapeDtypeStruct:
    shape, dtype = stored
    return jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype))
