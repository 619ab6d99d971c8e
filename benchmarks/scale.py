"""What a device does and holds when there are more of them: `python -m benchmarks.scale`.

The numbers are read from compiled programs of a meta-step on devices of a CPU, of which nothing runs.
"""

import json
from pathlib import Path
from typing import Any

import jax
import optax
import tyro
from rich.console import Console
from rich.table import Table

import jmeta
from benchmarks.memory import Transformer
from benchmarks.results import RESULTS
from jmeta.devices import mesh_of, on_mesh, place_of

DEVICES = 8


def measure(learner: jmeta.MetaLearner, source: jmeta.TaskSource, mesh: jax.sharding.Mesh, tasks: int) -> Any:
    """Of one device: FLOPs, bytes of what it holds between meta-steps and within one, and its all-reduces.

    Args:
        learner: the meta-learner, which Adam trains.
        source: its tasks.
        mesh: of the devices.
        tasks: of a meta-step, on all devices.
    """
    optimizer = optax.adam(1e-3)
    with on_mesh(mesh) as inside:
        assert inside is not None
        start = jax.eval_shape(lambda: jmeta.init(jax.random.key(0), learner, optimizer, source))
        placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place_of(inside, x)), start)
        step = jmeta.make_step(learner, optimizer, source, tasks=tasks, mesh=inside)
        program = jax.jit(lambda start: jax.lax.scan(step, start, length=2)).lower(placed).compile()
    memory: Any = program.memory_analysis()
    costs: Any = program.cost_analysis()
    text = program.as_text() or ""
    return {
        "flops": costs["flops"],
        "held": memory.argument_size_in_bytes,
        "given": memory.output_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "all_reduces": text.count(" all-reduce(") + text.count(" all-reduce-start("),
    }


def weak_scaling(tasks: int = 8) -> dict[int, Any]:
    """As many tasks for each device on 1, 2, 4 and 8 devices: MAML, Conv4, glyphs."""
    learner = jmeta.maml(jmeta.linen(jmeta.Conv4(outputs=5)), inner_rate=0.4)
    source = jmeta.glyphs(ways=5, shots=1, queries=1)
    return {n: measure(learner, source, _mesh(n, 1), n * tasks) for n in _counts()}


def divided_model(width: int = 256, layers: int = 4) -> dict[int, Any]:
    """A transformer whose parameters lie on 1, 2, 4 and 8 devices: MAML, 4 steps, 8 sequences of 16 tokens."""
    adjoint = jmeta.mixed_mode(checkpoint=True)
    model = jmeta.linen(Transformer(width=width, layers=layers))
    learner = jmeta.maml(model, inner_rate=0.1, inner_steps=4, adjoint=adjoint)
    source = jmeta.TaskSource((), _sequences, {})
    return {n: measure(learner, source, _mesh(1, n), 1) for n in _counts()}


def _sequences(key: jax.Array, data: Any) -> jmeta.Task:
    def part(key: jax.Array) -> jmeta.Examples:
        tokens = jax.random.randint(key, (4, 16), 0, 256)
        return jmeta.Examples(tokens, jax.nn.one_hot(tokens[:, 0] % 2, 2))

    return jmeta.Task(*map(part, jax.random.split(key)))


def _counts() -> list[int]:
    return [n for n in (1, 2, 4, 8) if n <= DEVICES]


def _mesh(tasks: int, model: int) -> jax.sharding.Mesh:
    return jax.make_mesh((tasks, model), ("tasks", "model"), devices=jax.devices()[: tasks * model])


def picture(file: Path, cases: dict[str, dict[int, Any]]) -> None:
    """What a device does and holds, each relative to a single device."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    for axes, (title, rows) in zip(figure.subplots(1, 2, sharey=True), cases.items(), strict=True):
        for name, marker in (("flops", "o-"), ("held", "s-"), ("temporary", "^-")):
            axes.plot(list(rows), [row[name] / rows[1][name] for row in rows.values()], marker, label=name)
        axes.plot(list(rows), [1 / n if "model" in title else 1 for n in rows], ":", color="tab:gray", label="ideal")
        axes.set_xscale("log", base=2)
        axes.set(title=title, xlabel="devices", xticks=list(rows), xticklabels=list(rows), ylim=(0, 1.1))
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("of a device, against one")
    figure.axes[1].legend(frameon=False)
    figure.savefig(file, dpi=120)


def main(out: Path = RESULTS / "scale.json") -> None:
    """Prints both tables and stores them with a picture.

    Args:
        out: where the numbers go; the picture goes beside them.
    """
    mesh_of(DEVICES)  # divides a CPU
    cases = {"tasks over devices, 8 each": weak_scaling(), "a model over devices": divided_model()}
    out.write_text(json.dumps(cases, indent=2) + "\n")
    picture(out.with_suffix(".png"), cases)
    for title, rows in cases.items():
        table = Table("devices", "MFLOPs", "held, MB", "temporary, MB", "all-reduces", title=title)
        for n, row in rows.items():
            numbers = [f"{row[name] / 1e6:.2f}" for name in ("flops", "held", "temporary")]
            table.add_row(str(n), *numbers, str(row["all_reduces"]))
        Console().print(table)


if __name__ == "__main__":
    tyro.cli(main)
