"""The former name of `jmeta.rl.policy_gradients`, until version 0.3."""

from typing import Any

from jmeta.errors import renamed
from jmeta.rl import policy_gradients


def __getattr__(name: str) -> Any:
    return renamed(__name__, name, policy_gradients)
