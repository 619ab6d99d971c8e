"""The stop watch: every system in a process of its own, in turn."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import matmul_peak, threads
from benchmarks.speed.cases import Case, flops
from benchmarks.speed.systems import SYSTEMS, System

# Of the loss before and after the first outer update, relative. After five inner steps the meta-gradients of higher and
# torchopt have a rounding error that moves the second loss by 1e-3; jmeta and torch.func agree to 1e-5.
TOLERANCE = (1e-4, 2e-3)


def measure(case: Case, names: Sequence[str], *, calls: int, budget: float, rounds: int = 1) -> dict[str, Any]:
    """Times some systems.

    Args:
        case: what is timed.
        names: the systems; those that do not enter the case are left out.
        calls: timed calls of each process, after a first one that compiles.
        budget: seconds after which a process is called no more, but for one timed call.
        rounds: how often all systems have their turn, each time in new processes.

    Returns:
        The case, the circumstances, and for each system the median seconds a meta-step, all of them, the seconds of the
        first call, the first losses, the peak of memory in bytes, and how many tasks and processes it was timed with;
        seconds are scaled to all tasks. A system that ended before its time has `"died"` instead, the reason.

    Raises:
        RuntimeError: systems differ in their loss before or after the first outer update.
    """
    entered = {name: SYSTEMS[name] for name in names if SYSTEMS[name].enters(case)}
    before = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "load": os.getloadavg(), "peak": matmul_peak()}
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in entered}
    for _ in range(rounds):
        for name, system in entered.items():
            turns[name].append(_turn(case, name, system, calls=calls, budget=budget))
    systems = {name: _together(results) for name, results in turns.items()}
    if case.source == "fixed":
        _check_all(case, systems)
    return {**asdict(case), "flops": flops(case), **before, "systems": systems}


def _turn(case: Case, name: str, system: System, **how: Any) -> dict[str, Any]:
    """One process with all threads and, for some, one with one thread a core: what was faster."""
    timed = replace(case, tasks=min(system.tasks or case.tasks, case.tasks))
    results = [_processes(timed, name, 1, **how)]
    cores = threads()
    if system.processes and cores > 1 and case.tasks % cores == 0 and case.tasks > 1:
        results.append(_processes(timed, name, cores, **how))
    alive = [result for result in results if "died" not in result]
    if not alive:
        return results[0]
    best = min(alive, key=lambda result: np.median(result["all_seconds"]))
    scale = case.tasks / timed.tasks
    # the losses are those of all tasks together
    return {**best, "all_seconds": [scale * s for s in best["all_seconds"]], "losses": alive[0]["losses"][:2]}


def _processes(case: Case, name: str, count: int, **how: Any) -> dict[str, Any]:
    asked = json.dumps({"case": asdict(replace(case, tasks=case.tasks // count)), "name": name, **how})
    command = [sys.executable, "-m", "benchmarks.speed.worker", asked]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    if count > 1:
        environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    pin = [["taskset", "--cpu-list", str(core)] if count > 1 else [] for core in sorted(os.sched_getaffinity(0))]
    started = [
        subprocess.Popen(pin[i] + command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for i in range(count)
    ]
    ended = [process.communicate() for process in started]
    for process, (_, error) in zip(started, ended, strict=True):
        if process.returncode < 0:
            return {"died": f"killed by {signal.Signals(-process.returncode).name}"}
        if process.returncode:
            said = [line for line in error.splitlines() if line.strip(" -") and not line.startswith("For simplicity")]
            return {"died": (said or ["without a word"])[-1][:120]}
    results = [json.loads(out.splitlines()[-1]) for out, _ in ended]
    slowest = max(results, key=lambda result: np.median(result["spent"][1:]))
    return {
        "all_seconds": [seconds / slowest["steps"] for seconds in slowest["spent"][1:]],
        "first_call": slowest["spent"][0],
        "compile": slowest["spent"][0] - float(np.median(slowest["spent"][1:])),
        "losses": results[0]["losses"],
        "memory": sum(result["memory"] for result in results),
        "tasks": case.tasks,
        "processes": count,
    }


def _together(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All turns of a system."""
    died = [result for result in results if "died" in result]
    if died:
        return died[0]
    seconds = [s for result in results for s in result["all_seconds"]]
    last = results[-1]
    return {
        **last,
        "seconds": float(np.median(seconds)),
        "all_seconds": seconds,  # far apart where other programs took the cores
        "compile": float(np.median([result["compile"] for result in results])),
        "memory": max(result["memory"] for result in results),
    }


def _check_all(case: Case, systems: Mapping[str, Mapping[str, Any]]) -> None:
    by_tasks: dict[int, dict[str, Sequence[float]]] = {}
    for name, system in systems.items():
        if "died" not in system and SYSTEMS[name].same_loss:
            by_tasks.setdefault(system["tasks"], {})[name] = system["losses"]
    for tasks, losses in by_tasks.items():
        if tasks < case.tasks:
            fewer = replace(case, tasks=tasks, steps=2)
            losses["jmeta, fewer tasks"] = _processes(fewer, "jmeta", 1, calls=1, budget=0.0)["losses"]
        check_losses(losses)


def check_losses(losses: Mapping[str, Sequence[float]]) -> None:
    """Compares the losses of the first two meta-steps; the second depends on the gradient of the first.

    Raises:
        RuntimeError: they differ by more than rounding.
    """
    for step, tolerance in enumerate(TOLERANCE):
        values = [values[step] for values in losses.values() if len(values) > step]
        # Written so that NaN is a difference too.
        if values and not np.ptp(values) <= tolerance * max(1.0, abs(np.median(values))):
            raise RuntimeError(f"the systems do not compute the same loss in meta-step {step + 1}: {dict(losses)}")
