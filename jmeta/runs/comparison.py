"""Runs beside each other, on the same episodes."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jmeta.errors import ConfigError
from jmeta.evaluate import per_episode
from jmeta.metrics import interval
from jmeta.runs.run import Run

FIXED = ("data", "ways", "shots", "queries")  # what makes episodes the same


def compare(runs: Mapping[str, Run], *, split: str = "test", episodes: int = 600, seed: int = 1) -> dict[str, Any]:
    """Evaluates runs on the same episodes: each with its interval, and each difference to the first with its own.

    A difference is taken episode by episode, so that its interval is that of paired samples: hard episodes are hard
    for both, and the difference is known better than either number.

    Args:
        runs: by name; the first is what the others are compared with.
        split: of the tasks.
        episodes: number of tasks.
        seed: the same seed gives the same tasks.

    Returns:
        `{"metric", "episodes", "split", "seed", "data", ..., "runs": {name: {metric, "ci95", "difference",
        "difference_ci95"}}}`, the differences not of the first.

    Raises:
        ConfigError: fewer than two runs, or runs whose episodes are not the same.
    """
    if len(runs) < 2:
        raise ConfigError("there is one run; give two or more to compare.")
    first, *others = runs.items()
    for name, run in others:
        for setting in FIXED:
            here, there = (getattr(one.config, setting) for one in (first[1], run))
            if here != there:
                raise ConfigError(
                    f"{first[0]} has {setting} {here} and {name} {there}, so that they have no episodes in common; "
                    f"compare runs of the same {setting}."
                )
    metric = first[1].config.metric
    values = {name: _values(run, split, episodes, seed) for name, run in runs.items()}
    base = values[first[0]]
    rows: dict[str, dict[str, float]] = {}
    for name, value in values.items():
        rows[name] = dict(zip((metric.__name__, "ci95"), interval(value), strict=True))
        if name != first[0]:
            rows[name] |= zip(("difference", "difference_ci95"), interval(value - base), strict=True)
    about = {name: value for name in FIXED if (value := getattr(first[1].config, name)) is not None}
    return {"metric": metric.__name__, "split": split, "episodes": episodes, "seed": seed, **about, "runs": rows}


def _values(run: Run, split: str, episodes: int, seed: int) -> np.ndarray:
    metric = run.config.metric
    values = per_episode(
        jax.random.key(seed),
        run.learner,
        run.params,
        run.state,
        run.source(split),
        {metric.__name__: metric},
        episodes=episodes,
    )
    return np.asarray(values[metric.__name__], np.float64)
