"""Measures, prints, stores and draws: `python -m benchmarks.speed`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.progress import track

from benchmarks.machine import environment
from benchmarks.speed import report
from benchmarks.speed.cases import CASES, Case
from benchmarks.speed.measure import measure
from benchmarks.speed.systems import INSTALL, SYSTEMS

RESULTS = Path(__file__).parents[1] / "results" / "speed.json"
QUICK_CASES = (
    "stride, exact, 1 step, 1 query",
    "stride, first order, 1 step, 1 query",
    "sinusoid, exact, 1 step",
    "60-way",
)
QUICK_SYSTEMS = ("jmeta", "two devices", "default norm", "torchopt", "torch.func", "PyTorch")


def main(
    cases: tuple[str, ...] = (),
    systems: tuple[str, ...] = (),
    calls: int = 5,
    budget: float = 60.0,
    rounds: int = 2,
    results: Path = RESULTS,
    resume: bool = False,
    quick: bool = False,
) -> None:
    """Measures how long a meta-step takes, in jmeta and in other libraries.

    Every case is stored as soon as it is measured; what is stored of other cases, from the same versions on the same
    processor, stays.

    Args:
        cases: words that the name of a case must contain one of; all cases by default.
        systems: names of systems; all that are installed by default.
        calls: timed calls of each process.
        budget: seconds that a process may take in a case, but for its first two calls.
        rounds: how often each system has its turn in a case, each time in a new process.
        results: the file of the results; tables (.md) and picture (.png) lie beside it.
        resume: leave out the cases that are stored already.
        quick: a few cases and systems, one round, in four minutes; stored in a file of its own.
    """
    if quick:
        cases, systems, rounds, calls = cases or QUICK_CASES, systems or QUICK_SYSTEMS, 1, min(calls, 3)
        results = RESULTS.with_name("speed_quick.json") if results == RESULTS else results
    console = Console()
    console = console if console.is_terminal else Console(width=120)
    installed = _installed(console)
    names = _chosen(systems, installed)
    circumstances = environment(package for name in installed for package in SYSTEMS[name].packages)
    stored = _stored(console, results, circumstances)
    chosen = [case for case in CASES if not cases or any(word in case.name for word in cases)]
    chosen = [case for case in chosen if not quick or case.source == "fixed"]
    left = [case for case in chosen if not (resume and _is_measured(case, names, stored))]
    for case in left:
        stored.pop(case.name, None)
    results.parent.mkdir(parents=True, exist_ok=True)
    for case in track(left, "measuring", console=console):
        stored[case.name] = measure(case, names, calls=calls, budget=budget, rounds=rounds)
        rows = {c.name: stored[c.name] for c in CASES if c.name in stored}
        results.write_text(json.dumps({"environment": circumstances, "cases": rows}, indent=1) + "\n")
    tables = report.tables(stored)
    report.show(console, tables)
    results.with_suffix(".md").write_text(report.markdown(circumstances, tables))
    report.picture(results.with_suffix(".png"), stored)
    console.print(f"stored in {results.with_suffix('')}.json, .md and .png")


def _installed(console: Console) -> list[str]:
    missing = {name: system.missing() for name, system in SYSTEMS.items()}
    for name, reason in missing.items():
        if reason:
            console.print(f"{name} is left out: {reason}. To compare with it: {INSTALL}", markup=False)
    return [name for name, reason in missing.items() if not reason]


def _chosen(wanted: tuple[str, ...], installed: list[str]) -> list[str]:
    wanted = tuple(name for name in wanted if name in installed) if wanted == QUICK_SYSTEMS else wanted
    unknown = [name for name in wanted if name not in installed]
    if unknown:
        raise SystemExit(f"no such systems here: {', '.join(unknown)}; choose from: {', '.join(installed)}")
    return [name for name in installed if not wanted or name in wanted]


def _stored(console: Console, results: Path, circumstances: dict[str, Any]) -> dict[str, Any]:
    content = json.loads(results.read_text()) if results.exists() else {}
    if content.get("environment") == circumstances:
        return content["cases"]
    if content:
        console.print(f"{results.name} is from other versions or another processor and is begun anew")
    return {}


def _is_measured(case: Case, names: list[str], stored: dict[str, Any]) -> bool:
    row = stored.get(case.name, {"systems": {}})
    entered = {name for name in names if SYSTEMS[name].enters(case)}
    return asdict(case).items() <= row.items() and entered <= set(row["systems"])


if __name__ == "__main__":
    tyro.cli(main)
