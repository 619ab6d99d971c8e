"""The learners, one file each."""

from typing import Any

from jmeta.errors import moved


def __getattr__(name: str) -> Any:
    return moved(__name__, name, {"LEARNERS": "jmeta.runs.registry"})
