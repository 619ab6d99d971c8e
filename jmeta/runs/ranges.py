"""Which values the settings of a run can have, wherever they come from: flags, a TOML file, `config.json`, Python."""

import math
from collections.abc import Mapping
from typing import Any

from jmeta.errors import ConfigError

_COUNTS: Mapping[str, tuple[int, int]] = {
    "ways": (1, 10_000),
    "train_ways": (1, 10_000),
    "shots": (0, 100_000),
    "train_shots": (0, 100_000),
    "queries": (1, 1_000_000),
    "train_queries": (1, 1_000_000),
    "steps": (1, 1_000_000_000),
    "tasks": (1, 1_000_000),
    "inner_steps": (0, 100_000),
    "test_inner_steps": (0, 100_000),
    "batch": (1, 10_000_000),
    "devices": (1, 100_000),
    "patience": (1, 1_000_000_000),
    "seed": (0, 2**32 - 1),
    "split_seed": (0, 2**32 - 1),
    "version": (1, 1_000_000),
}
_RATES = ("inner_rate", "outer_rate")
_TEXTS = ("learner", "data", "model", "distance", "norm", "dtype", "inner_optimizer", "descriptions")
_TABLES = ("options", "network", "own")


def check_values(settings: Mapping[str, Any], *, least: Mapping[str, int] | None = None) -> None:
    """Raises `ConfigError` for the first setting whose type or range is wrong; None is a setting that is not there.

    Args:
        settings: by the names of `Config`.
        least: instead of the least number of a setting, as 1 for the shots of a learner that reads no descriptions.

    Raises:
        ConfigError: names the setting, its value and what it may be.

    Example:
        >>> from jmeta.runs.ranges import check_values
        >>> check_values({"steps": 400, "outer_rate": 1e-3, "train_shots": (1, 5)})
    """
    for name, value in settings.items():
        if value is not None and (wanted := _wanted(name, value, (least or {}).get(name))):
            shown = str(value) if len(str(value)) <= 60 else f"{str(value)[:60]}…"
            raise ConfigError(f"--{name.replace('_', '-')} is {shown}; give {wanted}.")


def _wanted(name: str, value: Any, bound: int | None) -> str | None:
    """What the setting may be, where the value is none of it."""
    if name in _COUNTS:
        least, most = _COUNTS[name]
        least = least if bound is None else bound
        pair = name == "train_shots" and isinstance(value, list | tuple) and len(value) == 2
        numbers = tuple(value) if pair else (value,)
        whole = all(isinstance(number, int) and not isinstance(number, bool) for number in numbers)
        if whole and all(least <= number <= most for number in numbers) and list(numbers) == sorted(numbers):
            return None
        return f"a whole number from {least} to {most}" + (", or two, the least and the most" if pair else "")
    if name in _RATES:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return None if number and 0 < value < math.inf else "a positive number"
    if name in _TEXTS:
        return None if isinstance(value, str) else "a text"
    if name in _TABLES:
        named = isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
        return None if named else "names with their values"
    return None
