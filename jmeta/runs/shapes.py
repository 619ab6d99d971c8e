"""The shapes of a run's tasks as JSON, so that a run is used without its data."""

from typing import Any

import jax
import jax.numpy as jnp

from jmeta.core import Examples, Task
from jmeta.data.text import TokenIds


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
        fields: dict[str, Any] = {name: _shape(value) for name, value in part.items() if name != "token_ids"}
        if "token_ids" in part:
            fields["descriptions"] = TokenIds(_shape(part["token_ids"]))
        return Examples(**fields)

    return Task(*(examples(stored[name]) for name in Task._fields))


def _examples(part: Examples) -> dict[str, Any]:
    fields = {name: value for name, value in part._asdict().items() if jax.tree.leaves(value)}
    if isinstance(fields.get("descriptions"), TokenIds):
        fields["token_ids"] = fields.pop("descriptions").ids
    return {name: [list(value.shape), str(value.dtype)] for name, value in fields.items()}


def _shape(stored: Any) -> jax.ShapeDtypeStruct:
    shape, dtype = stored
    return jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype))
