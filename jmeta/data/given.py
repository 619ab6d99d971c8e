"""Tasks that are given as a list."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, PyTree

from jmeta.core import Task, TaskSource
from jmeta.errors import DataError
from jmeta.tree import leaf_shapes


def from_tasks(tasks: Sequence[Task]) -> TaskSource:
    """Tasks of a list, drawn uniformly with replacement.

    Args:
        tasks: of one structure, whose arrays have one shape: rows that are fewer by `Examples.mask`, see
            `jmeta.from_groups` for tables of groups of any size.

    Returns:
        A source, whose protocol says how many tasks there are.

    Raises:
        DataError: no tasks; one that is no `Task`; one of another structure or shape than the first.

    Example:
        >>> import jax, jmeta, numpy as np
        >>> one = jmeta.Examples(np.ones((5, 2), np.float32), np.eye(5, dtype=np.float32))
        >>> source = jmeta.from_tasks([jmeta.Task(one, one), jmeta.Task(one, one)])
        >>> source.sample(jax.random.key(0), source.data).support.inputs.shape
        (5, 2)
    """
    tasks = list(tasks)
    if not tasks or not all(isinstance(task, Task) for task in tasks):
        raise DataError("there are no tasks, or some are none; give a list of jmeta.Task(support, query).")
    tasks = [jax.tree.map(np.asarray, task) for task in tasks]
    first = leaf_shapes(tasks[0])
    for i, task in enumerate(tasks):
        here = leaf_shapes(task)
        for leaf in {**first, **here}:
            if first.get(leaf) != here.get(leaf):
                there, mine = (part.get(leaf, "not there") for part in (first, here))
                raise DataError(f"{leaf!r} of task {i} is {mine}, and of task 0 {there}; give all tasks one shape.")
    data = jax.tree.map(lambda *leaves: np.stack(leaves), *tasks)

    def sample(key: Key[Array, ""], data: PyTree) -> Task:
        i = jax.random.randint(key, (), 0, len(tasks))
        return jax.tree.map(lambda x: jnp.asarray(x)[i], data)

    return TaskSource(data, sample, {"given_tasks": len(tasks)})
