"""Where the time of a meta-step goes: `python -m benchmarks.profile`.

Traces the compiled step of a case of `benchmarks.speed` and sums the time of XLA's operations by kind.
"""

import gzip
import json
import re
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import jax
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.speed.cases import CASES
from benchmarks.speed.jax_systems import run_jmeta

WRAPPERS = ("while", "call", "conditional")  # which hold other operations


def operations(trace: Path) -> list[dict[str, Any]]:
    """The events of a trace that are operations of XLA, without those that hold others."""
    file = next(trace.rglob("*.trace.json.gz"))
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    found = [event for event in events if event.get("ph") == "X" and "hlo_op" in event.get("args", {})]
    return [event for event in found if not event["args"]["hlo_op"].startswith(WRAPPERS)]


def kind(name: str) -> str:
    """The kind of an operation from its name: that of a fusion is the name of its last part."""
    return re.sub(r"[._]?\d+$", "", re.sub(r"\.(clone|remat|\d+)", "", name)).strip("_")


def main(case: str = "stride, exact, 1 step, 15 queries", calls: int = 3, rows: int = 15) -> None:
    """Traces a case.

    Args:
        case: the name of a case of `benchmarks.speed`.
        calls: traced calls.
        rows: kinds that are shown, the longest first.
    """
    chosen = {c.name: c for c in CASES}.get(case)
    if chosen is None:
        raise SystemExit(f"there is no case {case!r}; choose from: {'; '.join(c.name for c in CASES)}")
    step = run_jmeta(chosen)
    step()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                step()
        events = operations(Path(folder))
    total: dict[str, float] = defaultdict(float)
    count: dict[str, int] = defaultdict(int)
    for event in events:
        name = kind(event["args"]["hlo_op"])
        total[name] += event["dur"] / 1e3
        count[name] += 1
    steps = calls * chosen.steps
    table = Table("operation", "ms a meta-step", "times a meta-step")
    for name in sorted(total, key=lambda name: -total[name])[:rows]:
        table.add_row(name, f"{total[name] / steps:.1f}", f"{count[name] / steps:.0f}")
    table.add_row("all", f"{sum(total.values()) / steps:.1f}", f"{sum(count.values()) / steps:.0f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    tyro.cli(main)
