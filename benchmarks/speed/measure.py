"""The contestants by name, and the stop watch."""

import gc
import importlib
import os
import pkgutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

import jax
import numpy as np

from benchmarks.machine import matmul_peak
from benchmarks.speed.cases import Case, flops
from benchmarks.speed.jax_systems import Step, run_jmeta

INSTALL = "pip install -e '.[peers]'"
# Of the loss before and after the first outer update, relative. After five inner steps the meta-gradients of higher and
# torchopt have a rounding error that moves the second loss by 1e-3; jmeta and torch.func agree to 1e-5.
TOLERANCE = (1e-4, 2e-3)


@dataclass(frozen=True)
class System:
    """A contestant.

    Args:
        function: `module:function` in this package, `Case -> Step`.
        packages: what it needs.
        enters: in which cases it takes part.
        tasks: how many tasks it is timed with, where all of them take too long; its time is scaled up to all tasks.
    """

    function: str
    packages: tuple[str, ...]
    enters: Callable[[Case], bool]
    tasks: int | None = None

    def missing(self) -> str | None:
        """What keeps it from running here."""
        try:
            for package in self.packages:
                importlib.import_module(package.replace("dm-", "").replace("-", "_"))
        except ImportError as error:
            return str(error)
        return None

    def timed(self, case: Case) -> Case:
        """The case with as many tasks as it is timed with."""
        return replace(case, tasks=min(self.tasks or case.tasks, case.tasks))

    def start(self, case: Case) -> Step:
        """A function that does some meta-steps and returns their losses."""
        return pkgutil.resolve_name(f"benchmarks.speed.{self.function}")(self.timed(case))


def _maml(case: Case) -> bool:
    return case.inner_steps > 0 and case.source != "glyphs"


def _bearable(case: Case) -> bool:
    """Cases in which a grouped convolution's gradient takes seconds a meta-step and not minutes."""
    return case.network == "mlp" or (case.network == "conv4-stride" and case.inner_steps == 1)


_JAX = ("jax", "jaxlib", "flax", "optax")
SYSTEMS: Mapping[str, System] = {
    "jmeta": System("jax_systems:run_jmeta", _JAX, lambda case: True),
    "fixed batch": System("jax_systems:run_fixed_batch", _JAX, lambda case: case.source != "fixed"),
    "higher": System("torch_systems:run_higher", ("torch", "higher"), _maml),
    "torchopt": System("torch_systems:run_torchopt", ("torch", "torchopt"), _maml),
    "torch.func": System("torch_systems:run_torch_func", ("torch",), _maml),
    "PyTorch": System("torch_systems:run_prototypical", ("torch",), lambda case: not case.inner_steps),
    # jax-meta has no first order.
    "jax-meta": System(
        "jax_systems:run_jax_meta",
        ("jax-meta", "dm-haiku"),
        lambda case: _maml(case) and _bearable(case) and not case.first_order,
    ),
    "nn.Conv": System(
        "jax_systems:run_nn_conv",
        _JAX,
        lambda case: (
            _maml(case)
            and _bearable(case)
            and case.network != "mlp"
            and case.source == "fixed"
            and not case.first_order
        ),
        tasks=4,
    ),
}


def measure(case: Case, names: Sequence[str], *, calls: int, budget: float) -> dict[str, Any]:
    """Times some systems in turn.

    Args:
        case: what is timed.
        names: the systems; those that do not enter the case are left out.
        calls: timed calls of each, after a first one that compiles.
        budget: seconds after which a system is called no more, but for one timed call.

    Returns:
        The case, the circumstances, and for each system the median seconds a meta-step, all of them, the seconds of the
        first call, the first losses and the number of tasks it was timed with; seconds are scaled to all tasks.

    Raises:
        RuntimeError: systems differ in their loss before or after the first outer update.
    """
    entered = {name: SYSTEMS[name] for name in names if SYSTEMS[name].enters(case)}
    before = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "load": os.getloadavg(), "peak": matmul_peak()}
    steps = {name: system.start(case) for name, system in entered.items()}
    spent: dict[str, list[float]] = {name: [] for name in entered}
    losses: dict[str, list[float]] = {name: [] for name in entered}
    seconds: dict[str, list[float]] = {name: [] for name in entered}
    for call in range(1 + calls):
        for name, step in steps.items():
            if call > 1 and sum(spent[name]) > budget:
                continue
            begin = time.perf_counter()
            values = step().tolist()
            spent[name].append(time.perf_counter() - begin)
            scale = case.tasks / entered[name].timed(case).tasks
            seconds[name].append(spent[name][-1] / len(values) * scale)
            losses[name] += values
        if call == 1 and case.source == "fixed":
            _check_all(case, entered, losses)
    steps.clear()
    jax.clear_caches()
    gc.collect()
    return {
        **asdict(case),
        "flops": flops(case),
        **before,
        "systems": {
            name: {
                "seconds": float(np.median(times[1:])),
                "all_seconds": times[1:],  # far apart where other programs took the cores
                "first_call": spent[name][0],
                "compile": spent[name][0] - float(np.median(spent[name][1:])),
                "losses": losses[name][:2],
                "tasks": entered[name].timed(case).tasks,
            }
            for name, times in seconds.items()
        },
    }


def _check_all(case: Case, systems: Mapping[str, System], losses: Mapping[str, Sequence[float]]) -> None:
    for tasks in sorted({system.timed(case).tasks for system in systems.values()}):
        same = {name: losses[name] for name, system in systems.items() if system.timed(case).tasks == tasks}
        if tasks < case.tasks:
            same["jmeta, fewer tasks"] = run_jmeta(replace(case, tasks=tasks, steps=2))().tolist()
        check_losses(same)


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
