"""Networks in Flax Linen, the convolution they use, and adapters for other libraries."""

from typing import Any

from jmeta.errors import moved

_MOVED = dict.fromkeys(("CellNetwork", "Genotype"), "jmeta.search")
_MOVED |= dict.fromkeys(("Policy", "RecurrentPolicy"), "jmeta.rl") | {"MODELS": "jmeta.runs.registry"}


def __getattr__(name: str) -> Any:
    return moved(__name__, name, _MOVED)
