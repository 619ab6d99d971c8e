"""Few-shot classification of text and rejection of what is out of scope: `python -m benchmarks.clinc150`.

Prototypical networks on hashed n-grams, trained from scratch, beside nearest class mean on TF-IDF on the same episodes,
over the five divisions of the intents.
"""

import math
import re
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import jmeta
from benchmarks.results import RESULTS, Results, machine_line, markdown_table
from jmeta.data.clinc150 import WIDTH, load_clinc150
from jmeta.data.text import hashed_text, inverse_document_frequency
from jmeta.metrics import auroc

SHOTS = (1, 5)
METHODS = ("prototypical", "TF-IDF")


def tfidf(train: Sequence[str], texts: Sequence[str]) -> np.ndarray:
    """Rows of unit length, word counts times smoothed inverse document frequency; as scikit-learn's default.

    Args:
        train: the texts that frequencies come from.
        texts: the texts to embed; words that are in none of `train` count, with the largest weight.
    """
    words = [[*re.findall(r"\b\w\w+\b|\b\w\b", text.lower())] for text in texts]
    frequency = Counter(word for text in train for word in set(re.findall(r"\b\w\w+\b|\b\w\b", text.lower())))
    index = {word: i for i, word in enumerate(sorted({word for row in words for word in row}))}
    x = np.zeros((len(texts), len(index)), np.float32)
    for row, found in zip(x, words, strict=True):
        for word in found:
            row[index[word]] += math.log((1 + len(train)) / (1 + frequency[word])) + 1
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def rejection(
    learner: jmeta.MetaLearner, params: Any, state: Any, source: jmeta.TaskSource, outside: np.ndarray, seed: int
) -> dict[str, float]:
    """AUROC of the distance to the nearest prototype: queries in scope against as many texts out of scope."""
    pool = jnp.asarray(outside)

    def scores(key: jax.Array, data: Any, pool: jax.Array) -> tuple[jax.Array, jax.Array]:
        task = source.sample(key, data)
        adapted = learner.adapt(key, params, state, task.support)
        other = jax.random.choice(jax.random.fold_in(key, 1), pool, (len(task.query.targets),), replace=False)
        inside, out = (learner.predict(key, adapted, x).max(axis=1) for x in (task.query.inputs, other))
        return inside, out

    keys = jax.random.split(jax.random.key(seed), 300)
    inside, out = jax.jit(lambda keys, data, pool: jax.lax.map(lambda key: scores(key, data, pool), keys))(
        keys, source.data, pool
    )
    values = [auroc(np.asarray(a), np.asarray(b)) for a, b in zip(inside, out, strict=True)]
    return {"auroc": float(np.mean(values)), "ci95": float(1.96 * np.std(values, ddof=1) / math.sqrt(len(values)))}


def fold_results(fold: int, steps: int, seed: int) -> dict[str, Any]:
    """Accuracy and AUROC of both methods on the test intents of one division."""
    train, test = (load_clinc150(split=split, fold=fold) for split in ("train", "test"))
    weights = inverse_document_frequency(hashed_text(train.texts, width=WIDTH))
    learner = jmeta.prototypical(jmeta.linen(jmeta.TextEncoder(features=1024, weights=weights)))
    source = jmeta.clinc150(fold=fold, ways=40, shots=5, queries=5)
    rate = optax.cosine_decay_schedule(1e-3, steps)
    begin = time.monotonic()
    fitted = jmeta.fit(jax.random.key(seed), learner, source, optimizer=optax.adam(rate), steps=steps, tasks=1)
    result: dict[str, Any] = {"seconds": time.monotonic() - begin}

    both = tfidf(train.texts, [*test.texts, *test.out_of_scope])
    x, outside = both[: len(test.texts)], both[len(test.texts) :]
    ids = hashed_text(test.out_of_scope, width=WIDTH)
    cosine = jmeta.prototypical(jmeta.identity(), distance=jmeta.cosine)
    for shots in SHOTS:
        ours = jmeta.clinc150(split="test", fold=fold, shots=shots)
        theirs = jmeta.from_embeddings(x, test.labels, shots=shots)
        methods: dict[str, tuple[jmeta.MetaLearner, Any, Any, jmeta.TaskSource, np.ndarray]] = {
            "prototypical": (learner, fitted.params, fitted.state, ours, ids),
            "TF-IDF": (cosine, {}, {}, theirs, outside),
        }
        for name, (method, params, state, tasks, unknown) in methods.items():
            accuracy = jmeta.evaluate(jax.random.key(seed + 1), method, params, state, tasks)
            rejected = rejection(method, params, state, tasks, unknown, seed + 2)
            result[f"{name}, {shots} shots"] = {**accuracy, "rejection": rejected}
    return result


def over_folds(values: Sequence[float]) -> str:
    """Mean and half of the 95 % interval over the divisions, by Student's t with four degrees of freedom."""
    half = 2.776 * np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) == 5 else float("nan")
    return f"{100 * np.mean(values):.1f} ± {100 * half:.1f} %"


def markdown(rows: dict[str, Any]) -> str:
    """Accuracy and AUROC over the divisions, then the accuracies of each."""
    lines = []
    for shots in SHOTS:
        for name in METHODS:
            cells = [row[f"{name}, {shots} shots"] for row in rows.values()]
            lines.append(
                [
                    f"5-way {shots}-shot",
                    name,
                    over_folds([cell["accuracy"] for cell in cells]),
                    over_folds([cell["rejection"]["auroc"] for cell in cells]),
                    ", ".join(f"{100 * cell['accuracy']:.1f}" for cell in cells),
                ]
            )
        ours, theirs = ([row[f"{name}, {shots} shots"]["accuracy"] for row in rows.values()] for name in METHODS)
        gains = [a - b for a, b in zip(ours, theirs, strict=True)]
        by_division = ", ".join(f"{100 * gain:+.1f}" for gain in gains)
        lines.append([f"5-way {shots}-shot", "difference", over_folds(gains), "", by_division])
    header = ["task", "method", "accuracy", "AUROC, out of scope", "accuracy by division"]
    seconds = [row["seconds"] for row in rows.values()]
    note = f"\nTraining takes {min(seconds):.0f} to {max(seconds):.0f} s a division.\n"
    return machine_line("python -m benchmarks.clinc150") + markdown_table(header, lines) + note


def picture(file: Path, rows: dict[str, Any]) -> None:
    """Accuracy of each division, ours against TF-IDF."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(4.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for shots, marker in zip(SHOTS, "os", strict=True):
        ours, theirs = ([row[f"{name}, {shots} shots"] for row in rows.values()] for name in METHODS)
        axes.errorbar(
            [r["accuracy"] for r in theirs],
            [r["accuracy"] for r in ours],
            xerr=[r["ci95"] for r in theirs],
            yerr=[r["ci95"] for r in ours],
            fmt=marker,
            label=f"{shots}-shot",
        )
    axes.axline((0.8, 0.8), slope=1, color="tab:gray", linestyle=":")
    axes.set(
        xlabel="nearest class mean on TF-IDF", ylabel="prototypical networks", title="CLINC150, 5-way, five divisions"
    )
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=120)


def main(steps: int = 300, seed: int = 0, folds: int = 5, out: Path = RESULTS / "clinc150.json") -> None:
    """Trains and tests on all divisions, prints the table and stores it with a picture.

    Args:
        steps: meta-steps of each division.
        seed: of training; tests draw from the next ones.
        folds: how many of the divisions.
        out: where the numbers go; table and picture go beside them.
    """
    results = Results(out, {"steps": steps, "seed": seed})
    names = [f"division {fold}" for fold in range(1, folds + 1)]
    for fold, name in enumerate(names, 1):
        results.get(name, partial(fold_results, fold, steps, seed))
    rows = {name: results.rows[name] for name in names}
    out.with_suffix(".md").write_text(markdown(rows))
    picture(out.with_suffix(".png"), rows)
    print(markdown(rows))


if __name__ == "__main__":
    tyro.cli(main)
