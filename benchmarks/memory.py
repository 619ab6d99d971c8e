"""How much memory a meta-gradient takes against the inner steps, for each adjoint: `python -m benchmarks.memory`.

The temporary bytes are those that XLA allocates for the compiled value and gradient of the objective on one batch of
tasks; they are read from the compiled program and need no run. What is timed is that program.
"""

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import linen as nn
from rich.console import Console
from rich.progress import track
from rich.table import Table

import jmeta
from benchmarks.machine import environment as machine
from jmeta.inner import Adjoint

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")

ADJOINTS: Mapping[str, Adjoint] = {
    "exact()": jmeta.exact(),
    "exact(checkpoint=True)": jmeta.exact(checkpoint=True),
    "mixed_mode()": jmeta.mixed_mode(),
    "mixed_mode(checkpoint=True)": jmeta.mixed_mode(checkpoint=True),
    "truncated(last=1)": jmeta.truncated(last=1),
    "first_order()": jmeta.first_order(),
}


class Transformer(nn.Module):
    """A pre-norm transformer that classifies sequences of tokens.

    Args:
        outputs: number of classes.
        layers: number of blocks of self-attention and MLP.
        width: of the stream; the MLPs are four times as wide.
        heads: of each attention.
        vocabulary: number of tokens.
    """

    outputs: int = 2
    layers: int = 2
    width: int = 128
    heads: int = 4
    vocabulary: int = 256

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps `[n, length]` to logits `[n, outputs]`."""
        positions = self.param("positions", nn.initializers.normal(0.02), (tokens.shape[1], self.width))
        x = nn.Embed(self.vocabulary, self.width)(tokens) + positions[None]
        for _ in range(self.layers):
            x = x + nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(x))
            x = x + nn.Dense(self.width)(nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x))))
        return nn.Dense(self.outputs, name="head")(nn.LayerNorm()(x).mean(axis=1))


@dataclass(frozen=True)
class Case:
    """A learner, without its inner loop, and a batch of tasks."""

    name: str
    model: jmeta.Model
    tasks: jmeta.Task
    inner_rate: float
    loss: Callable[[Any, Any], jax.Array] = jmeta.softmax_cross_entropy
    timed: bool = False


def cases() -> list[Case]:
    """All that is measured."""
    random = np.random.default_rng(0)

    def classes(inputs: Callable[[int], np.ndarray], ways: int, shots: int, queries: int) -> jmeta.Task:
        parts = [
            jmeta.Examples(inputs(ways * n), np.eye(ways, dtype=np.float32)[np.repeat(np.arange(ways), n)])
            for n in (shots, queries)
        ]
        return jax.tree.map(lambda x: jnp.asarray(x)[None], jmeta.Task(*parts))

    images = classes(lambda n: random.random((n, 28, 28, 1), np.float32), 5, 1, 15)
    tokens = classes(lambda n: random.integers(256, size=(n, 64), dtype=np.int32), 2, 4, 4)
    sines = jax.vmap(jmeta.sinusoid().sample, in_axes=(0, None))(jax.random.split(jax.random.key(0), 25), ())
    mlp = jmeta.linen(jmeta.MLP(outputs=1))
    return [
        Case(
            "Conv4, 5-way 1-shot, 1 task",
            jmeta.linen(jmeta.Conv4(5, norm="transductive", scale=False, spatial="mean", head_init="random")),
            images,
            0.4,
        ),
        Case("MLP 40-40 on sinusoids, 25 tasks", mlp, sines, 0.01, jmeta.mean_squared_error),
        Case("transformer, 8 sequences of 64, 1 task", jmeta.linen(Transformer()), tokens, 0.1, timed=True),
    ]


def compile_gradient(case: Case, adjoint: Adjoint, inner_steps: int) -> tuple[Any, tuple[Any, ...]]:
    """The compiled value and gradient of the objective, and its arguments."""
    learner = jmeta.maml(
        case.model, inner_rate=case.inner_rate, inner_steps=inner_steps, loss=case.loss, adjoint=adjoint
    )
    params, state = learner.init(jax.random.key(0), jax.tree.map(lambda x: x[0], case.tasks))
    arguments = jax.random.key(1), params, state, case.tasks
    gradient = jax.jit(jax.value_and_grad(learner.objective, argnums=1, has_aux=True))
    return gradient.lower(*arguments).compile(), arguments


def measure(case: Case, steps: Sequence[int], timed_steps: Sequence[int], calls: int) -> dict[str, Any]:
    """Bytes, and seconds where the case is timed, by adjoint and number of inner steps.

    Args:
        case: what is measured.
        steps: numbers of inner steps.
        timed_steps: those of them that are timed, where the case is.
        calls: how often, after a first call; the adjoints take turns.
    """
    temporary: dict[str, dict[int, int]] = {name: {} for name in ADJOINTS}
    seconds: dict[str, dict[int, float]] = {name: {} for name in ADJOINTS}
    for k in steps:
        compiled = {name: compile_gradient(case, adjoint, k) for name, adjoint in ADJOINTS.items()}
        for name, (program, _) in compiled.items():
            temporary[name][k] = program.memory_analysis().temp_size_in_bytes
        if case.timed and k in timed_steps:
            times: dict[str, list[float]] = {name: [] for name in ADJOINTS}
            for _ in range(1 + calls):
                for name, (program, arguments) in compiled.items():
                    begin = time.perf_counter()
                    jax.block_until_ready(program(*arguments))
                    times[name].append(time.perf_counter() - begin)
            for name, values in times.items():
                seconds[name][k] = float(np.median(values[1:]))
    params, _ = case.model.init(jax.random.key(0), jax.tree.map(lambda x: x[0], case.tasks).support.inputs)
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    tasks = jax.tree.leaves(case.tasks)[0].shape[0]
    return {"case": case.name, "parameter_bytes": size, "tasks": tasks, "bytes": temporary, "seconds": seconds}


Cells = list[list[str]]


def memory_cells(row: Mapping[str, Any]) -> Cells:
    """A header and a line for each adjoint: megabytes, and their growth from 5 inner steps (or the least) on."""
    steps = list(next(iter(row["bytes"].values())))
    base, most = 5 if 5 in steps else min(steps), max(steps)
    header = ["adjoint", *(f"{k} inner step{'s' * (k > 1)}" for k in steps), f"{most} over {base}"]
    lines = [
        [name, *(f"{b / 1e6:.1f} MB" for b in by_steps.values()), f"{by_steps[most] / by_steps[base]:.2f}x"]
        for name, by_steps in row["bytes"].items()
    ]
    return [header, *lines]


def time_cells(row: Mapping[str, Any]) -> Cells:
    """A header and a line for each adjoint: milliseconds, and what they are of those of the first adjoint."""
    first = next(iter(row["seconds"].values()))
    header = ["adjoint", *(f"{k} inner step{'s' * (k > 1)}" for k in first)]
    lines = [
        [name, *(f"{1e3 * s:.0f} ms ({s / first[k]:.2f}x)" for k, s in by_steps.items())]
        for name, by_steps in row["seconds"].items()
    ]
    return [header, *lines]


def tables(rows: Sequence[Mapping[str, Any]]) -> dict[str, Cells]:
    """All tables, by title."""
    memory = {f"{r['case']}; φ of a task is {r['parameter_bytes'] / 1e6:.2g} MB": memory_cells(r) for r in rows}
    timed = {f"{r['case']}: value and gradient, median": time_cells(r) for r in rows if any(r["seconds"].values())}
    return memory | timed


def markdown(rows: Sequence[Mapping[str, Any]], environment: Mapping[str, Any]) -> str:
    """The tables for the docs, with the command that makes them."""
    versions = ", ".join(f"{name} {number}" for name, number in environment["versions"].items())
    parts = [
        f"`python -m benchmarks.memory` on {environment['cpu']}, {environment['threads']} threads, backend "
        f"{environment['backend']}, float32; Python {environment['python']}, {versions}. Temporary memory of the "
        "compiled value and gradient of the meta-objective:"
    ]
    for title, (header, *lines) in tables(rows).items():
        rule = ["---", *("---:" for _ in header[1:])]
        code = [[f"`{name}`", *values] for name, *values in lines]
        parts += [f"{title}:", "\n".join(f"| {' | '.join(line)} |" for line in [header, rule, *code])]
    return "\n\n".join(parts) + "\n"


def picture(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draws bytes against inner steps, one panel a case and one line an adjoint.

    Args:
        file: where the PNG goes.
        rows: what `measure` returned.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    figure = Figure(figsize=(4.2 * len(rows), 4.4), layout="constrained")
    for axes, row in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows, strict=True):
        for (name, by_steps), marker in zip(row["bytes"].items(), "os^vDX", strict=True):
            # Hollow markers and dashes leave lines visible that lie on each other.
            style = "--" if name.startswith("mixed") else "-"
            megabytes = [b / 1e6 for b in by_steps.values()]
            axes.plot(list(by_steps), megabytes, style, marker=marker, fillstyle="none", label=name)
        steps = list(next(iter(row["bytes"].values())))
        axes.set(xscale="log", yscale="log", xlabel="inner steps", ylabel="temporary memory, MB")
        axes.set_title(row["case"], fontsize=10)
        axes.set_xticks(steps, [str(k) for k in steps])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(file, dpi=120)


def main(
    steps: tuple[int, ...] = (1, 5, 10, 50),
    timed_steps: tuple[int, ...] = (1, 10),
    calls: int = 5,
    results: Path = RESULTS / "memory.json",
) -> None:
    """Measures all cases, prints the tables and stores them with a picture.

    Args:
        steps: numbers of inner steps.
        timed_steps: those of them that are timed.
        calls: timed calls, of which the median counts.
        results: where the numbers go; the tables and the picture go beside them.
    """
    console = Console()
    rows = [measure(case, steps, timed_steps, calls) for case in track(cases(), "measuring", console=console)]
    for title, (header, *lines) in tables(rows).items():
        table = Table(header[0], title=title)
        for name in header[1:]:
            table.add_column(name, justify="right")
        for line in lines:
            table.add_row(*line)
        console.print(table)
    environment = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "load": os.getloadavg(),
        "backend": jax.default_backend(),
        **machine(PACKAGES),
    }
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps({"environment": environment, "rows": rows}, indent=2) + "\n")
    results.with_suffix(".md").write_text(markdown(rows, environment))
    picture(results.with_suffix(".png"), rows)
    console.print(f"stored in {results.with_suffix('')}.json, .md and .png")


if __name__ == "__main__":
    tyro.cli(main)
