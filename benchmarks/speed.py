"""How long a meta-step takes, in jmeta and in other libraries: `python -m benchmarks.speed`.

Exact second-order MAML of a Conv4 with stride 2 and batch norm, on one batch of 32 tasks, Adam outside. All systems get
the same arrays, the same initial weights and the same number of threads, run in turn, and must give the same loss.
"""

import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.custom_batching import custom_vmap
from rich.console import Console
from rich.progress import track
from rich.table import Table

import jmeta
from jmeta.train import _run

RESULTS = Path(__file__).parent / "results" / "speed.json"
INSTALL = "pip install torch==2.13.0 higher"
STEPS = 3  # meta-steps of one call
CALLS = 5


@dataclass(frozen=True)
class Case:
    """What is timed."""

    queries: int
    inner_steps: int
    ways: int = 5
    shots: int = 1
    tasks: int = 32
    features: int = 64
    size: int = 28
    inner_rate: float = 0.4
    rate: float = 1e-3


CASES = [Case(queries, inner_steps) for inner_steps in (1, 5) for queries in (15, 1)]

Step = Callable[[], np.ndarray]  # does STEPS meta-steps and returns their losses
System = Callable[[Case, jmeta.Task, Any], Step]


def batch(case: Case) -> jmeta.Task:
    """A fixed batch of tasks of random images."""
    random = np.random.default_rng(0)

    def examples(shots: int) -> jmeta.Examples:
        images = random.random((case.tasks, case.ways * shots, case.size, case.size, 1), np.float32)
        targets = np.eye(case.ways, dtype=np.float32)[np.repeat(np.arange(case.ways), shots)]
        return jmeta.Examples(images, np.broadcast_to(targets, (case.tasks, *targets.shape)))

    return jmeta.Task(examples(case.shots), examples(case.queries))


def maml(case: Case) -> jmeta.MetaLearner:
    """The learner of all systems."""
    model = jmeta.linen(jmeta.Conv4(outputs=case.ways, features=case.features))
    return jmeta.maml(model, inner_rate=case.inner_rate, inner_steps=case.inner_steps)


def weights(case: Case, tasks: jmeta.Task) -> Any:
    """The initial weights of all systems."""
    return maml(case).init(jax.random.key(0), jax.tree.map(lambda x: x[0], tasks))[0]


@custom_vmap
def _fixed(key: jax.Array, tasks: jmeta.Task) -> jmeta.Task:
    return jax.tree.map(lambda x: x[0], tasks)


@_fixed.def_vmap
def _fixed_batch(size: int, is_mapped: Any, key: jax.Array, tasks: jmeta.Task) -> tuple[jmeta.Task, Any]:
    return tasks, jax.tree.map(lambda _: True, tasks)


def run_jmeta(case: Case, tasks: jmeta.Task, params: Any) -> Step:
    """The compiled scan of `jmeta.fit`."""
    learner, optimizer = maml(case), optax.adam(case.rate)
    source = jmeta.TaskSource(jax.tree.map(jnp.asarray, tasks), _fixed, {})
    state = jmeta.init(jax.random.key(0), learner, optimizer, source)._replace(params=params)

    def step() -> np.ndarray:
        nonlocal state
        state, info = _run(
            state,
            source.data,
            jnp.asarray(10**6, jnp.int32),
            learner=learner,
            optimizer=optimizer,
            sample=source.sample,
            tasks=case.tasks,
            task_chunk=None,
            length=STEPS,
        )
        return np.asarray(info["loss"])

    return step


def run_higher(case: Case, tasks: jmeta.Task, params: Any) -> Step:
    """`higher` on PyTorch, one task after the other, as in its examples."""
    import higher
    import torch
    import torch.nn.functional as F
    from torch import nn

    torch.set_num_threads(threads())

    class Conv4(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            blocks = [params[f"Conv_{i}"]["kernel"].transpose(3, 2, 0, 1) for i in range(4)]
            self.kernels = nn.ParameterList(map(parameter, blocks))
            self.shifts = nn.ParameterList(parameter(params[f"BatchNorm_{i}"]["bias"]) for i in range(4))
            self.head, self.bias = parameter(params["head"]["kernel"].T), parameter(params["head"]["bias"])

        def forward(self, x: Any) -> Any:
            for kernel, shift in zip(self.kernels, self.shifts, strict=True):
                # SAME padding is (0, 1) for an even size and (1, 1) for an odd one.
                low = x.shape[-1] % 2
                x = F.conv2d(x if low else F.pad(x, (0, 1, 0, 1)), kernel, stride=2, padding=low)
                x = F.relu(F.batch_norm(x, None, None, one, shift, training=True, eps=1e-3))
            return F.linear(x.mean((2, 3)), self.head, self.bias)

    def parameter(array: Any) -> nn.Parameter:
        return nn.Parameter(torch.from_numpy(np.array(array, order="C")))

    def examples(part: jmeta.Examples) -> list[Any]:
        images = torch.from_numpy(np.moveaxis(part.inputs, -1, -3).copy())
        return list(zip(images, torch.from_numpy(part.targets.argmax(-1)), strict=True))

    one = torch.ones(case.features)  # batch norm without a scale has no second derivative
    network = Conv4()
    inner = torch.optim.SGD(network.parameters(), lr=case.inner_rate)
    outer = torch.optim.Adam(network.parameters(), lr=case.rate)
    pairs = list(zip(examples(tasks.support), examples(tasks.query), strict=True))

    def meta_step() -> float:
        outer.zero_grad()
        total = 0.0
        for (support, support_labels), (query, query_labels) in pairs:
            with higher.innerloop_ctx(network, inner, copy_initial_weights=False) as (adapted, optimizer):
                for _ in range(case.inner_steps):
                    optimizer.step(F.cross_entropy(adapted(support), support_labels))
                loss = F.cross_entropy(adapted(query), query_labels) / case.tasks
                loss.backward()
                total += loss.item()
        outer.step()
        return total

    return lambda: np.array([meta_step() for _ in range(STEPS)])


# name: the function, the packages it needs
SYSTEMS: Mapping[str, tuple[System, tuple[str, ...]]] = {
    "jmeta": (run_jmeta, ("jax", "jaxlib", "flax", "optax")),
    "higher": (run_higher, ("torch", "higher")),
}


def threads() -> int:
    """The cores that this process may use, which is how many threads XLA starts."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def measure(case: Case, systems: Mapping[str, System]) -> dict[str, dict[str, Any]]:
    """Seconds a meta-step (median) and seconds of the first call, for each system.

    Raises:
        RuntimeError: the systems do not have the same loss in the first meta-step.
    """
    tasks = batch(case)
    params = weights(case, tasks)
    steps = {name: system(case, tasks, params) for name, system in systems.items()}
    timed: dict[str, list[float]] = {name: [] for name in steps}
    losses: dict[str, float] = {}
    for _ in range(1 + CALLS):
        for name, step in steps.items():
            begin = time.perf_counter()
            values = step()
            timed[name].append((time.perf_counter() - begin) / STEPS)
            losses.setdefault(name, float(values[0]))
        if np.ptp(list(losses.values())) > 1e-4:
            raise RuntimeError(f"the systems do not compute the same loss: {losses}")
    return {
        name: {
            "seconds": float(np.median(times[1:])),
            "all_seconds": times[1:],  # far apart where other programs took the cores
            "first_call": times[0] * STEPS,
            "loss": losses[name],
        }
        for name, times in timed.items()
    }


def cpu() -> str:
    """The name of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    """Measures all cases, prints the table and stores it."""
    console = Console()
    systems, packages = {}, ["jmeta"]
    for name, (system, needs) in SYSTEMS.items():
        try:
            for package in needs:
                __import__(package)
        except ImportError as error:
            console.print(f"{name} is left out: {error}. To compare with it: {INSTALL}")
        else:
            systems[name] = system
            packages += needs
    rows = [{**asdict(case), "systems": measure(case, systems)} for case in track(CASES, "measuring", console=console)]
    table = Table(
        "inner steps",
        "queries a class",
        *systems,
        "first call of jmeta",
        title="milliseconds a meta-step, exact MAML: median, fastest",
    )
    for row in rows:
        base = row["systems"]["jmeta"]
        cells = [
            f"{1e3 * r['seconds']:.0f} ({r['seconds'] / base['seconds']:.2f}x), "
            f"{1e3 * min(r['all_seconds']):.0f} ({min(r['all_seconds']) / min(base['all_seconds']):.2f}x)"
            for r in row["systems"].values()
        ]
        first = f"{base['first_call']:.1f} s"
        table.add_row(str(row["inner_steps"]), str(row["queries"]), *cells, first)
    console.print(table)
    environment = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu(),
        "threads": threads(),
        "load": os.getloadavg(),
        "python": platform.python_version(),
        **{name: version(name) for name in packages if name != "jmeta"},
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"environment": environment, "rows": rows}, indent=2) + "\n")
    console.print(f"stored in {RESULTS}")


if __name__ == "__main__":
    main()
