"""The two pictures of a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


def learning_curve(file: Path, rows: Sequence[Mapping[str, Any]], metric: str) -> None:
    """Draws meta-loss and validation result against the meta-step.

    Args:
        file: where the PNG goes.
        rows: of `metrics.jsonl`: `step`, `loss`, and at times `validation` and `validation_ci95`.
        metric: the name of the validation result.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    left = figure.subplots()
    left.plot(
        [r["step"] for r in rows], [r["loss"] for r in rows], color="tab:grey", label="meta-loss (training tasks)"
    )
    left.set(xlabel="meta-step", ylabel="meta-loss")
    right = left.twinx()
    checked = [r for r in rows if "validation" in r]
    right.errorbar(
        [r["step"] for r in checked],
        [r["validation"] for r in checked],
        [r["validation_ci95"] for r in checked],
        color="tab:blue",
        marker="o",
        markersize=3,
        capsize=2,
        label="validation, 95 % interval",
    )
    right.set(ylabel=_words(metric))
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(file, dpi=120)


def adaptation_curve(file: Path, results: Sequence[Mapping[str, Any]], axis: str, metric: str) -> None:
    """Draws the result on unseen tasks against how much a learner adapted.

    Args:
        file: where the PNG goes.
        results: of `jmeta.evaluate`, each with an entry `axis`.
        axis: what is varied: `"inner_steps"` or `"shots"`.
        metric: the name of the result.
    """
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    axes.errorbar(
        [r[axis] for r in results], [r[metric] for r in results], [r["ci95"] for r in results], marker="o", capsize=3
    )
    episode = ", ".join(
        f"{results[0][name]} {name}" for name in ("ways", "shots") if name in results[0] and name != axis
    )
    axes.set(xlabel=_words(axis), ylabel=_words(metric), title=f"unseen tasks, {episode}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)


def _words(name: str) -> str:
    return name.replace("_", " ")
