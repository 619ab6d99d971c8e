"""Sources of tasks."""

from typing import Any

from jmeta.errors import moved


def __getattr__(name: str) -> Any:
    return moved(__name__, name, {"DATA": "jmeta.runs.registry"})
