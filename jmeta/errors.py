"""The errors that jmeta raises: one sentence each, what is wrong and what to do."""

import difflib
import importlib
import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")


class JmetaError(Exception):
    """Base of every error that jmeta raises on purpose.

    The command line prints the sentence and exits with code 2.
    """


class DataError(JmetaError, ValueError):
    """The data cannot give the tasks that were asked for."""


class ModelError(JmetaError, ValueError):
    """The model does not fit the tasks."""


class ConfigError(JmetaError, ValueError):
    """An option has a value that cannot work."""


class UnknownNameError(ConfigError, KeyError):
    """A name is in no registry; the sentence gives the nearest one."""

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError would print the sentence in quotes


class CheckpointError(JmetaError, OSError):
    """A run folder or a checkpoint cannot be used."""


class HostError(JmetaError, RuntimeError):
    """The processes of a run on several hosts do not find each other, do not fit together, or one of them is gone."""


class NonFiniteError(JmetaError, FloatingPointError):
    """The meta-loss, its gradient or the update became infinite or not a number.

    Attributes:
        step: the meta-step at which it happened, from 0.
        train_state: the last finite `TrainState`, from which `jmeta.fit` goes on with other rates.
    """

    def __init__(self, message: str, step: int, train_state: Any) -> None:
        super().__init__(message)
        self.step = step
        self.train_state = train_state


class ConvergenceWarning(UserWarning):
    """An inner problem was not solved, so that an implicit meta-gradient is wrong."""


class NotFittedError(JmetaError, ValueError, AttributeError):
    """An estimator was asked before `fit`."""


class TransductiveWarning(UserWarning):
    """Answers depend on the queries beside them, and there are fewer than in the evaluation."""


def lookup(registry: Mapping[str, T], name: str, kind: str) -> T:
    """The entry of a name.

    Args:
        registry: names and entries.
        name: what is looked for.
        kind: what the entries are, for the sentence: `"learner"`.

    Returns:
        The entry.

    Raises:
        UnknownNameError: there is no such name; the sentence gives the nearest one, if one is near.

    Example:
        >>> from jmeta.errors import lookup
        >>> lookup({"maml": 1}, "maml", "learner")
        1
    """
    if name in registry:
        return registry[name]
    nearest = difflib.get_close_matches(name, registry, n=1, cutoff=0.5)
    meant = f"did you mean {nearest[0]!r}? There are" if nearest else "there are"
    raise UnknownNameError(f"there is no {kind} {name!r}; {meant} {', '.join(registry)}.")


def moved(module: str, name: str, places: Mapping[str, str]) -> Any:
    """A name from where it is now, with a `DeprecationWarning` that says so: for the `__getattr__` of a module.

    Args:
        module: where it was.
        name: of what is asked for.
        places: the module where each name is now; that of `"*"` has all others.

    Returns:
        What has the name.

    Raises:
        AttributeError: no such name was there.
    """
    place = places.get(name, places.get("*"))
    if place is None or name.startswith("__") or not hasattr(importlib.import_module(place), name):
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    warnings.warn(f"{module}.{name} is {place}.{name} now; import it from there.", DeprecationWarning, stacklevel=3)
    return getattr(importlib.import_module(place), name)


def reason_of(error: BaseException) -> str:
    """The first line of what went wrong at first: libraries wrap what the system said."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    return (text[:200] or type(error).__name__).rstrip(".;: ")
