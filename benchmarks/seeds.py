"""All seeds of a learner in one program against a run of each: `python -m benchmarks.seeds`.

MAML on sinusoids, 10 shots, 25 tasks a meta-step. Each way is a process of its own, as the devices of a CPU are settled
before JAX starts: runs in turn, with threads inside of operations; one program; one program over two devices, one a
core. The ways take turns; a number is the median of whole calls of `jmeta.fit`, compilation apart.
"""

import json
import os
import subprocess
import sys
import time

import jax
import numpy as np

import jmeta
from benchmarks.results import machine_line, markdown_table

WAYS = {"in turn": 1, "one program": 1, "one program, two devices": 2}  # the devices of each


def worker(way: str, seeds: int, steps: int, calls: int) -> list[float]:
    """Seconds of meta-training of all seeds, a few times, after everything is compiled."""
    model = jmeta.linen(jmeta.MLP(outputs=1))
    learner = jmeta.maml(model, inner_rate=0.01, loss=jmeta.mean_squared_error)
    mesh = jax.make_mesh((2,), ("seeds",)) if WAYS[way] == 2 else None
    keys = jax.random.split(jax.random.key(0), seeds)

    def train(steps: int) -> None:
        for key in keys if way == "in turn" else [keys]:
            fitted = jmeta.fit(
                key, learner, jmeta.sinusoid(), steps=steps, tasks=25, log_every=100, progress=False, mesh=mesh
            )
            jax.block_until_ready(fitted.params)

    train(100)
    spent = []
    for _ in range(calls):
        begin = time.perf_counter()
        train(steps)
        spent.append(time.perf_counter() - begin)
    return spent


def main(seeds: int = 8, steps: int = 1000, calls: int = 3, rounds: int = 3, way: str = "") -> None:
    """Measures all ways and prints the table.

    Args:
        seeds: how many.
        steps: meta-steps of each.
        calls: of each way in a round.
        rounds: in which the ways take turns.
        way: the one that this process measures; without, all, in processes of their own.
    """
    if way:
        print(json.dumps(worker(way, seeds, steps, calls)))
        return
    spent: dict[str, list[float]] = {name: [] for name in WAYS}
    load = os.getloadavg()[0]
    for name in [*WAYS] * rounds:
        numbers = {"--seeds": seeds, "--steps": steps, "--calls": calls}
        flags = [text for pair in numbers.items() for text in map(str, pair)]
        command = [sys.executable, "-m", "benchmarks.seeds", "--way", name, *flags]
        environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(WAYS[name])}
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        spent[name] += json.loads(done.stdout)
    medians = {name: float(np.median(times)) for name, times in spent.items()}
    about = machine_line("python -m benchmarks.seeds")
    lines = [[name, f"{s:.2f}", f"{medians['in turn'] / s:.2f}"] for name, s in medians.items()]
    table = markdown_table([f"{seeds} seeds, {steps} steps", "seconds", "times as fast"], lines)
    print(f"load average {load:.1f} before; {about}{table}")


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
