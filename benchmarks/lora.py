"""What an inner loop over low-rank factors saves of a transformer's memory: `python -m benchmarks.lora`.

The temporary bytes are those that XLA allocates for the compiled value and gradient of the objective on one batch of
tasks, as in `benchmarks.memory`; nothing is run.
"""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro

import jmeta
from benchmarks.memory import Transformer
from benchmarks.results import RESULTS, Results, machine_line, markdown_table

WAYS, TASKS, STEPS = 5, 4, (1, 5)
RANKS = (None, 4, 16)  # None: MAML of all weights


def memory(rank: int | None, steps: int, width: int, length: int) -> dict[str, Any]:
    """Bytes of a meta-gradient, and how many numbers each task adapts."""
    model, is_lora = jmeta.linen(Transformer(outputs=WAYS, layers=4, width=width)), jmeta.tree.under("lora")
    settings: dict[str, Any] = {"inner_rate": 0.1, "inner_steps": steps}
    if rank is not None:
        kernels = jmeta.tree.under("head")  # of five outputs, below the larger rank
        chosen = lambda path: path.endswith("kernel") and not kernels(path)  # noqa: E731
        model, settings["adaptable"] = jmeta.lora(model, rank, kernels=chosen), is_lora
    learner = jmeta.maml(model, **settings)
    shape = jax.ShapeDtypeStruct((TASKS, WAYS, length), jnp.int32)
    examples = jmeta.Examples(shape, jax.ShapeDtypeStruct((TASKS, WAYS, WAYS), jnp.float32))
    tasks = jmeta.Task(examples, examples)
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), tasks)
    params, state = jax.eval_shape(learner.init, jax.random.key(0), one)
    gradient = jax.value_and_grad(lambda p, tasks: learner.objective(jax.random.key(0), p, state, tasks)[0])
    analysis: Any = jax.jit(gradient).lower(params, tasks).compile().memory_analysis()
    sizes = {jmeta.tree.path_name(path): leaf.size for path, leaf in jax.tree.leaves_with_path(params)}
    adapted = sum(size for path, size in sizes.items() if rank is None or is_lora(path))
    return {
        "bytes": analysis.temp_size_in_bytes,
        "adapted": adapted,
        "share": adapted / sum(sizes.values()),
    }


def markdown(rows: dict[str, Any]) -> str:
    """A line for each learner."""
    lines = []
    for rank in RANKS:
        found = [rows[name_of(rank, steps)] for steps in STEPS]
        name = "MAML, all weights" if rank is None else f"MAML, LoRA of rank {rank}"
        megabytes = [f"{row['bytes'] / 2**20:.0f}" for row in found]
        lines.append([name, f"{found[0]['adapted']:,}", f"{100 * found[0]['share']:.1f} %", *megabytes])
    header = ["learner", "adapted numbers", "of θ", *(f"MB, {steps} inner steps" for steps in STEPS)]
    return machine_line("python -m benchmarks.lora") + markdown_table(header, lines)


def name_of(rank: int | None, steps: int) -> str:
    """`rank 4, 5 steps`."""
    return f"rank {rank}, {steps} steps"


def main(width: int = 256, length: int = 8, out: Path = RESULTS / "lora.json") -> None:
    """Compiles all cases, prints the table and stores it.

    Args:
        width: of the transformer, which has four blocks.
        length: tokens of an example; a task has five of support and five queries.
        out: where the numbers go; the table goes beside them.
    """
    results = Results(out, {"width": width, "length": length})
    for rank in RANKS:
        for steps in STEPS:
            results.get(name_of(rank, steps), partial(memory, rank, steps, width, length))
    out.with_suffix(".md").write_text(markdown(results.rows))
    print(markdown(results.rows))


if __name__ == "__main__":
    tyro.cli(main)
