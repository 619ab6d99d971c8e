"""Characters read from their Unicode names, none of them seen in training: `python -m benchmarks.zero_shot`.

Zero-shot and generalised zero-shot learning on glyphs, with attributes and with text.
"""

import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import jmeta
from benchmarks.results import RESULTS, Results, machine_line, markdown_table, percent
from jmeta.core import Examples
from jmeta.data.glyphs import glyph_attributes, load_glyphs, warp
from jmeta.metrics import harmonic_mean
from jmeta.models.norms import Norm

NORMS: dict[Norm, str] = {
    "running": "batch norm with moving averages",
    "group": "group norm",
    "transductive": "transductive batch norm",
}


def learner_of(norm: Norm) -> jmeta.MetaLearner:
    """Zero-shot learning with the network of prototypical networks."""
    return jmeta.zero_shot(jmeta.linen(jmeta.Conv4(outputs=None, pooling="max", norm=norm)))


def train(learner: jmeta.MetaLearner, source: jmeta.TaskSource, steps: int, seed: int) -> tuple[jmeta.Fit, float]:
    """Meta-training and its seconds."""
    begin = time.monotonic()
    rate = optax.cosine_decay_schedule(1e-3, steps)
    fitted = jmeta.fit(jax.random.key(seed), learner, source, optimizer=optax.adam(rate), steps=steps, tasks=1)
    return fitted, time.monotonic() - begin


def zero_shot(descriptions: str, norm: Norm, steps: int, seed: int) -> dict[str, Any]:
    """Accuracy on unseen characters, 5-way and 20-way."""
    learner = learner_of(norm)
    source = jmeta.glyphs(ways=20, shots=0, queries=5, descriptions=descriptions)
    fitted, seconds = train(learner, source, steps, seed)

    def result(ways: int) -> dict[str, Any]:
        test = jmeta.glyphs(split="test", ways=ways, shots=0, queries=15, descriptions=descriptions)
        return jmeta.evaluate(jax.random.key(seed + 1), learner, fitted.params, fitted.state, test)

    return {"seconds": seconds, "5": result(5), "20": result(20)}


def generalised(norm: Norm, steps: int, seed: int, faces: int = 3) -> dict[str, Any]:
    """All classes together: faces never trained on of seen characters, and all faces of unseen ones.

    Args:
        norm: policy.
        steps: meta-steps.
        seed: of training and test.
        faces: how many faces of each seen character are kept for testing.
    """
    data, attributes = load_glyphs(), glyph_attributes(load_glyphs().names)
    first = np.searchsorted(data.labels, np.arange(len(data.names)))
    kept = np.arange(len(data.labels)) - first[data.labels] < faces  # the first faces are those of DejaVu Sans
    seen, split = data.splits[data.labels] == 0, data.splits[data.labels]
    learner = learner_of(norm)
    source = jmeta.from_arrays(
        data.images[seen & ~kept],
        data.labels[seen & ~kept],
        ways=20,
        shots=0,
        queries=5,
        descriptions=attributes[data.splits == 0],
        transform=warp,
    )
    fitted, _ = train(learner, source, steps, seed)

    def outputs(rows: np.ndarray, classes: np.ndarray) -> np.ndarray:
        """Logits of all of `classes` for warped images, in batches of 100 of mixed classes."""
        support = Examples(jnp.zeros((1, 28, 28, 1)), jnp.zeros((1, len(classes))), jnp.asarray(attributes[classes]))
        adapted = learner.adapt(jax.random.key(0), fitted.params, fitted.state, support)
        images = warp(jax.random.key(seed + 2), jnp.asarray(data.images[rows], jnp.float32) / 255.0)
        predict = jax.jit(lambda images: learner.predict(jax.random.key(0), adapted, images))
        return np.concatenate([predict(images[i : i + 100]) for i in range(0, len(rows) // 100 * 100, 100)])

    def shares(unseen: int, bias: float | None = None) -> tuple[float, float, float]:
        """Accuracy on seen and on unseen classes, their logits lowered and not, and the bias, best where not given."""
        classes = np.flatnonzero((data.splits == 0) | (data.splits == unseen))
        rows = np.flatnonzero(kept & (split == 0)), np.flatnonzero(kept & (split == unseen))
        mixed = np.random.default_rng(seed).permutation(np.concatenate(rows))
        logits = outputs(mixed, classes)
        labels = data.labels[mixed[: len(logits)]]
        of_seen = data.splits[labels] == 0

        def accuracies(bias: float) -> tuple[float, float]:
            answers = classes[(logits - bias * (data.splits[classes] == 0)).argmax(axis=1)]
            right = answers == labels
            return float(right[of_seen].mean()), float(right[~of_seen].mean())

        candidates = [bias] if bias is not None else list(np.linspace(-5, 40, 46))
        best = max(candidates, key=lambda b: harmonic_mean(*accuracies(b)))
        return *accuracies(best), best

    bias = shares(unseen=1)[2]
    plain, calibrated = shares(unseen=2, bias=0.0), shares(unseen=2, bias=bias)
    return {
        "classes": int((data.splits != 1).sum()),
        "bias": float(bias),
        **{
            name: {"seen": s, "unseen": u, "harmonic_mean": harmonic_mean(s, u)}
            for name, (s, u, _) in (("plain", plain), ("calibrated", calibrated))
        },
    }


def markdown(rows: dict[str, Any]) -> str:
    """The two tables."""
    lines = [
        [kind, NORMS[policy], percent(row["5"]), percent(row["20"])]
        for kind in ("attributes", "text")
        for policy in NORMS
        if (row := rows.get(f"{kind}, {policy}"))
    ]
    text = markdown_table(["description", "network", "5-way", "20-way"], lines)
    general = [
        [NORMS[policy], name, *(f"{100 * row[name][share]:.1f} %" for share in ("seen", "unseen", "harmonic_mean"))]
        for policy in NORMS
        if (row := rows.get(f"generalised, {policy}"))
        for name in ("plain", "calibrated")
    ]
    header = ["network", "logits of seen classes", "seen", "unseen", "harmonic mean"]
    return machine_line("python -m benchmarks.zero_shot") + text + "\n" + markdown_table(header, general)


def picture(file: Path, rows: dict[str, Any]) -> None:
    """Bars of the accuracies, with their intervals and chance."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    names = [name for kind in ("attributes", "text") for policy in NORMS if (name := f"{kind}, {policy}") in rows]
    for offset, ways in ((-0.2, "5"), (0.2, "20")):
        values = [rows[name][ways] for name in names]
        axes.bar(
            np.arange(len(names)) + offset,
            [v["accuracy"] for v in values],
            0.36,
            yerr=[v["ci95"] for v in values],
            label=f"{ways}-way",
        )
        axes.axhline(1 / int(ways), color="tab:gray", linestyle=":", linewidth=1)
    axes.set_xticks(np.arange(len(names)), [name.replace(", ", "\n") for name in names], fontsize=8)
    axes.set(ylabel="accuracy, unseen characters", ylim=(0, 1), title="zero-shot from the Unicode name; dots: chance")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(file, dpi=120)


def main(steps: int = 500, seed: int = 0, out: Path = RESULTS / "zero_shot.json") -> None:
    """Trains and tests all cases, prints the tables and stores them with a picture.

    Args:
        steps: meta-steps of each case.
        seed: of training; tests draw from the next one.
        out: where the numbers go; tables and picture go beside them.
    """
    results = Results(out, {"steps": steps, "seed": seed})
    for policy in NORMS:
        for kind in ("attributes", "text"):
            results.get(f"{kind}, {policy}", partial(zero_shot, kind, policy, steps, seed))
        results.get(f"generalised, {policy}", partial(generalised, policy, steps, seed))
    out.with_suffix(".md").write_text(markdown(results.rows))
    picture(out.with_suffix(".png"), results.rows)
    print(markdown(results.rows))


if __name__ == "__main__":
    tyro.cli(main)
