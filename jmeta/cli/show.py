"""What the commands print: tables, intervals, progress, JSON."""

import json
import math
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from jmeta.runs.config import Config


def as_json(result: Mapping[str, Any], indent: int | None = None) -> str:
    """JSON, with null for what is not finite."""
    return json.dumps(_finite(result), indent=indent, allow_nan=False)


def _finite(x: Any) -> Any:
    if isinstance(x, Mapping):
        return {name: _finite(value) for name, value in x.items()}
    if isinstance(x, list | tuple):
        return [_finite(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def interval(config: Config, result: Mapping[str, Any]) -> str:
    """A metric of `jmeta.evaluate` with half of its 95 % interval."""
    return config.written(result[config.metric.__name__], result["ci95"])


def result_table(config: Config, result: Mapping[str, Any]) -> Table:
    """The table of one result, for more rows to be added."""
    table = Table("learner", f"{config.metric.__name__.replace('_', ' ')}, 95 % interval")
    table.add_row(config.learner, interval(config, result))
    if "alone" in result:
        alone = {config.metric.__name__: result["alone"], "ci95": result["alone_ci95"]}
        table.add_row("each query alone", interval(config, alone))
    for name, words in (("auroc", "AUROC of rejection"), ("fpr95", "FPR95 of rejection")):
        if name in result:
            table.add_row(words, config.written(result[name], result[f"{name}_ci95"]))
    return table


def print_result(config: Config, result: Mapping[str, Any], table: Table) -> None:
    """A table below its protocol."""
    steps = result["test_inner_steps"]
    details = [
        *(f"{result[name]} {name}" for name in ("ways", "shots", "queries") if name in result),
        *([f"query balance {result['query_balance']:g}"] if "query_balance" in result else []),
        *([f"open set: {result['open_set']}"] if "open_set" in result else []),
        f"{result['episodes']} {result['split']} episodes",
        "transductive" if result["transductive"] else "not transductive",
        *([] if steps is None else [f"{steps} inner step{'' if steps == 1 else 's'}"]),
    ]
    print(f"{config.data}: {', '.join(details)}", flush=True)
    Console().print(table)


def progress(shown: bool = True) -> Progress:
    """A bar with a note, on the error stream."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
        disable=not shown,
    )
