"""What inference that looks at all queries adds to a prototypical network: `python -m benchmarks.transductive`.

One prototypical network a seed, with Conv4, is trained on glyphs; its embeddings of the test characters, each face with
several warps, are computed once. All methods then answer the same episodes: 5 ways, 1 and 5 shots, 75 queries, equally
many of each class or in the proportions of a Dirichlet distribution.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import jmeta
from benchmarks.results import RESULTS, Results, machine_line, markdown_table
from jmeta.data.glyphs import SPLITS, load_glyphs, warp
from jmeta.evaluate import per_episode
from jmeta.metrics import interval, seeds_interval

WARPS = 8  # of each face, so that one class has rows enough for all queries of an episode
MODEL = jmeta.linen(jmeta.Conv4(outputs=None, pooling="max"))
BASE = "prototypical"
METHODS = (
    jmeta.prototypical,
    jmeta.pt_map,
    jmeta.tim,
    jmeta.laplacian_shot,
    jmeta.bd_cspn,
    jmeta.label_propagation,
    jmeta.soft_kmeans,
)
LEARNERS: Mapping[str, jmeta.MetaLearner] = {make.__name__: make(jmeta.identity()) for make in METHODS}
TRANSDUCTIVE = tuple(name for name in LEARNERS if name not in (BASE, "soft_kmeans"))
SEMI_SUPERVISED = ("label_propagation", "soft_kmeans")
SHOTS, BALANCES = (1, 5), {"balanced": None, "unbalanced": 2.0}


_samplers: dict[str, Any] = {}


class Embedded(NamedTuple):
    """Embeddings of the characters of a split.

    Args:
        z: `[rows, features]`.
        labels: `[rows]`.
        families: `[classes]`, the base letter of each class.
    """

    z: np.ndarray
    labels: np.ndarray
    families: np.ndarray


def embedded(seed: int, steps: int, split: str = "test") -> Embedded:
    """Trains the prototypical network of a seed, and embeds each face under some warps."""
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-3, steps))
    source = jmeta.glyphs(ways=20, shots=1, queries=5)
    learner = jmeta.prototypical(MODEL)
    fitted = jmeta.fit(jax.random.key(seed), learner, source, optimizer=optimizer, steps=steps, tasks=1)
    data = load_glyphs()
    mine = np.flatnonzero(data.splits == SPLITS.index(split))
    rows = np.repeat(np.flatnonzero(np.isin(data.labels, mine)), WARPS)

    @jax.jit
    def embed(key: jax.Array, images: jax.Array) -> jax.Array:
        return MODEL.apply(key, fitted.params, fitted.state, warp(key, images), train=False)[0]

    batches = np.array_split(rows, -(-len(rows) // 1000))
    keys = jax.random.split(jax.random.key(seed + 1), len(batches))
    images = [jmeta.as_inputs(data.images[batch]) for batch in batches]
    z = [np.asarray(embed(key, jnp.asarray(batch))) for key, batch in zip(keys, images, strict=True)]
    return Embedded(np.concatenate(z), data.labels[rows], data.families[mine])


def cached(file: Path, seed: int, steps: int, split: str = "test") -> Embedded:
    """`embedded`, from a file where it is there already."""
    if not file.exists():
        np.savez(file, **embedded(seed, steps, split)._asdict())
    with np.load(file) as stored:
        return Embedded(**stored)


def gains(
    data: Embedded, episodes: int, *, confusable: bool = False, methods: Sequence[str] = TRANSDUCTIVE, **options: Any
) -> dict[str, dict[str, float]]:
    """Of each method its accuracy, and the mean and half of the interval over episodes of what it gains."""
    families = data.families if confusable else None
    source = jmeta.from_arrays(data.z, data.labels, families=families, **options)
    # tasks of the same sizes share their sampler and with it all compiled programs
    source = source._replace(sample=_samplers.setdefault(str((len(data.z), confusable, options)), source.sample))
    found: dict[str, np.ndarray] = {}
    for name in (BASE, *methods):
        params, state = LEARNERS[name].init(jax.random.key(0), source.sample(jax.random.key(0), source.data))
        asked = (jax.random.key(1), LEARNERS[name], params, state, source, {"accuracy": jmeta.accuracy})
        found[name] = np.asarray(per_episode(*asked, episodes=episodes)["accuracy"], np.float64)
    result = {}
    for name, values in found.items():
        gain, ci95 = interval(values - found[BASE])
        result[name] = {"accuracy": float(values.mean()), "gain": gain, "ci95": ci95}
    return result


def tasks() -> dict[str, dict[str, Any]]:
    """What the methods are asked, by the title of its row; `steps` is the share of the meta-steps of the network."""
    named: dict[str, dict[str, Any]] = {}
    for shots in SHOTS:
        for balance, value in BALANCES.items():
            named[f"glyphs, {balance}, {shots}-shot"] = {"shots": shots, "query_balance": value}
    for shots in SHOTS:
        for balance, value in BALANCES.items():
            one = {"confusable": True, "shots": shots, "query_balance": value}
            named[f"glyphs of one base letter, {balance}, {shots}-shot"] = one
    for shots in SHOTS:
        named[f"glyphs, balanced, {shots}-shot, a sixth of the meta-steps"] = {"share": 6, "shots": shots}
    for distractors in (0, 5):
        others = f", and of {distractors} other classes" if distractors else ""
        named[f"glyphs, 1-shot, 5 unlabelled examples a class{others}"] = {
            "shots": 1,
            "unlabelled": 5,
            "distractors": distractors,
            "methods": SEMI_SUPERVISED,
        }
    return named


def markdown(rows: Mapping[str, Any], seeds: int, titles: Sequence[str]) -> str:
    """Accuracy of the prototypical network and what each method adds to it, the mean over the seeds."""
    names = [name for name in LEARNERS if name != BASE]
    lines = []
    for title in titles:
        results = [rows[f"seed {seed}, {title}"] for seed in range(seeds)]
        line = [title, f"{100 * np.mean([result[BASE]['accuracy'] for result in results]):.1f} %"]
        for name in names:
            if name not in results[0]:
                line.append("")
                continue
            mean, half = seeds_interval([result[name]["gain"] for result in results])
            half = results[0][name]["ci95"] if len(results) == 1 else half
            line.append(f"{100 * mean:+.1f} ± {100 * half:.1f}")
        lines.append(line)
    over = f"the mean of {seeds} seeds, 95 % interval over the seeds" if seeds > 1 else "one seed, 95 % interval"
    note = f"\nPoints above {BASE} on the same episodes, {over}.\n"
    return machine_line("python -m benchmarks.transductive") + markdown_table(["tasks", BASE, *names], lines) + note


def main(
    steps: int = 600,
    seeds: int = 3,
    episodes: int = 400,
    out: Path = RESULTS / "transductive.json",
    cache: Path = Path("/tmp"),
) -> None:
    """Trains, embeds, answers, and writes the table; a run that was interrupted goes on.

    Args:
        steps: meta-steps of each network.
        seeds: how many networks.
        episodes: of each cell.
        out: where the numbers go; the table goes beside them.
        cache: a folder for the embeddings.
    """
    results = Results(out, {"steps": steps, "episodes": episodes})
    for title, options in tasks().items():
        length = steps // options.pop("share", 1)
        for seed in range(seeds):
            file = cache / f"transductive-{length}-{seed}.npz"

            def compute(seed: int = seed, file: Path = file, length: int = length, options: Any = options) -> Any:
                return gains(cached(file, seed, length), episodes, **options)

            results.get(f"seed {seed}, {title}", compute)
    table = markdown(results.rows, seeds, list(tasks()))
    out.with_suffix(".md").write_text(table)
    print(table)


if __name__ == "__main__":
    tyro.cli(main)
