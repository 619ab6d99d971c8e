"""Which classes and rows an evaluation found mistaken."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, PyTree

from jmeta.core import Task, TaskSource
from jmeta.errors import ConfigError


class Answers(NamedTuple):
    """Of each query: its row, its class, the class or -1 and the column that was answered, whether it is there."""

    rows: Int[Array, "n"]
    classes: Int[Array, "n"]
    answered: Int[Array, "n"]
    column: Int[Array, "n"]
    there: Bool[Array, "n"]


def answers_of(outputs: PyTree, task: Task) -> Answers:
    """Of the outputs for the queries of one task; raises `ConfigError` where the source does not tell what is asked."""
    query = task.query
    if isinstance(getattr(query, "classes", ()), tuple) or isinstance(query.rows, tuple):
        raise ConfigError(
            "details need the class and the row of each query, and the source does not tell them; let its sample give "
            "jmeta.Examples(..., classes=, rows=), as jmeta.from_arrays does."
        )
    column = outputs.argmax(axis=-1).astype(jnp.int32)
    told = [part for part in (task.support, query) if not isinstance(getattr(part, "classes", ()), tuple)]
    # which class each column of the targets means in this episode
    meant = jnp.stack([jnp.where(part.targets > 0, part.classes[:, None], -1).max(axis=0) for part in told]).max(axis=0)
    there = jnp.ones(len(query.rows), bool) if isinstance(query.mask, tuple) else query.mask & (query.rows >= 0)
    return Answers(query.rows, query.classes, meant[column], column, there)


def details_of(answers: Answers, source: TaskSource) -> dict[str, Any]:
    """The confusion matrix, the accuracy of each class and the mistaken rows, of the answers of all episodes."""
    there = np.asarray(answers.there).reshape(-1)
    rows, classes, answered, column = (np.asarray(x).reshape(-1)[there] for x in answers[:4])
    if "classes" in source.protocol:  # columns mean the same in all tasks
        count, answered = source.protocol["classes"], column
    else:
        count = max(len(source.names), int(max(classes.max(), answered.max())) + 1)
    confusion = np.zeros((count, count), np.int64)
    np.add.at(confusion, (classes[answered >= 0], answered[answered >= 0]), 1)
    asked = np.bincount(classes, minlength=count)
    right = np.bincount(classes[classes == answered], minlength=count)
    each, place, times = np.unique(rows, return_inverse=True, return_counts=True)
    wrong = np.bincount(place.reshape(-1), weights=classes != answered, minlength=len(each)).astype(int)
    class_of = np.zeros(len(each), int)
    class_of[place.reshape(-1)] = classes
    order = np.lexsort((each, -wrong / times))
    return {
        "confusion": confusion.tolist(),
        "accuracy_by_class": [int(r) / int(n) if n else None for r, n in zip(right, asked, strict=True)],
        "mistaken": [
            {"row": int(each[i]), "class": int(class_of[i]), "asked": int(times[i]), "wrong": int(wrong[i])}
            for i in order
            if wrong[i]
        ],
    }
