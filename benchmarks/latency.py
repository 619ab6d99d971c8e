"""How long a prediction takes once a task is adapted to: `python -m benchmarks.latency`.

Each learner has network and settings of `jmeta train` on glyphs, 5 ways, 1 shot. Its classifier adapts once; then one
image, and 64 at once, go from NumPy to probabilities in NumPy. The median and the 95th percentile of many calls are
printed: of the classifier, of one that was saved and loaded, and of the bare program, from device to device.
"""

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jmeta
from benchmarks.results import RESULTS, Results, machine_line, markdown_table

LEARNERS = ("maml", "prototypical")
SIZES = (1, 64)


def milliseconds(call: Callable[[], Any], calls: int) -> dict[str, float]:
    """The median and the 95th percentile of the time of a call, after it is compiled."""
    for _ in range(3):
        jax.block_until_ready(call())
    times = []
    for _ in range(calls):
        begin = time.perf_counter()
        jax.block_until_ready(call())
        times.append(1e3 * (time.perf_counter() - begin))
    return {"median": float(np.median(times)), "p95": float(np.percentile(times, 95))}


def measure(learner: str, calls: int) -> dict[str, Any]:
    """Times of one learner by what answers and the number of images."""
    run = jmeta.Run.begin(learner=learner, data="glyphs")
    source = run.source("test")
    task = source.sample(jax.random.key(0), source.data)
    labels = np.asarray(task.support.targets).argmax(axis=1)
    begin = time.perf_counter()
    classifier = run.classifier().fit(np.asarray(task.support.inputs), labels)
    first = time.perf_counter() - begin
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "adapted.npz"
        classifier.save(file)
        size, loaded = file.stat().st_size, jmeta.FewShotClassifier.load(file)
    images = np.random.default_rng(0).random((max(SIZES), *task.query.inputs.shape[1:]), np.float32)
    key, θ = jax.random.key(0), run.params
    adapted = jax.jit(run.learner.adapt)(key, θ, run.state, task.support)
    predict = jax.jit(run.learner.predict, compiler_options=jmeta.compiler_options())
    rows = {}
    for n in SIZES:
        rows[str(n)] = {
            "classifier": milliseconds(partial(classifier.predict_proba, images[:n]), calls),
            "loaded": milliseconds(partial(loaded.predict_proba, images[:n]), calls),
            "program": milliseconds(partial(predict, key, adapted, jnp.asarray(images[:n])), calls),
        }
    return {"model": run.config.model, "bytes": size, "first_fit_seconds": first, "images": rows}


def markdown(rows: dict[str, Any]) -> str:
    """A line for each learner and number of images: median (95th percentile) in milliseconds."""
    lines = []
    for name, row in rows.items():
        for n, times in row["images"].items():
            cells = [f"{t['median']:.2f} ({t['p95']:.2f})" for t in times.values()]
            lines.append([name, row["model"], n, *cells, f"{row['bytes'] / 1e6:.2f} MB"])
    return markdown_table(
        ["learner", "network", "images", "classifier", "loaded", "program alone", "saved file"], lines
    )


def run(calls: int = 200, file: Path = RESULTS / "latency.json") -> None:
    """Measures what is not there yet and prints the table.

    Args:
        calls: of each, after it is compiled.
        file: where the results are kept.
    """
    results = Results(file, {"calls": calls, "sizes": SIZES, "device": jax.devices()[0].device_kind})
    for name in LEARNERS:
        results.get(name, partial(measure, name, calls))
    about = machine_line("python -m benchmarks.latency")
    print(f"\nmilliseconds, median (95th percentile); {about}{markdown(results.rows)}")


if __name__ == "__main__":
    import tyro

    tyro.cli(run)
