"""Looking up a name, with the nearest one in the error."""

import difflib
from collections.abc import Mapping
from typing import TypeVar

from jmeta.errors import UnknownNameError

T = TypeVar("T")


def lookup(registry: Mapping[str, T], name: str, kind: str) -> T:
    """The entry of a name.

    Args:
        registry: names and entries.
        name: what is looked for.
        kind: what the entries are, for the sentence: `"learner"`.

    Returns:
        The entry.

    Raises:
        UnknownNameError: there is no such name; the sentence gives the nearest one.

    Example:
        >>> from jmeta.registry import lookup
        >>> lookup({"maml": 1}, "maml", "learner")
        1
    """
    if name in registry:
        return registry[name]
    nearest = difflib.get_close_matches(name, registry, n=1, cutoff=0.0)[0]
    known = ", ".join(registry)
    raise UnknownNameError(f"there is no {kind} {name!r}; did you mean {nearest!r}? There are {known}.")
