"""The former name of `jmeta.rl`, until version 0.3."""

from typing import Any

from jmeta import rl
from jmeta.errors import renamed


def __getattr__(name: str) -> Any:
    return renamed(__name__, name, rl)
