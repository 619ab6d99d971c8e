"""The former name of `jmeta.rl.policy_gradients`, until version 0.3."""

from typing import Any

from jmeta.errors import moved


def __getattr__(name: str) -> Any:
    return moved(__name__, name, {"*": "jmeta.rl.policy_gradients"})
