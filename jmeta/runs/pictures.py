"""The pictures of runs and of searches."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jmeta.rl.environment import Environment
from jmeta.rl.rollout import Trajectory, returns
from jmeta.search.cells import Genotype


def learning_curve(file: Path, rows: Sequence[Mapping[str, Any]], metric: str) -> None:
    """Draws meta-loss and validation result against the meta-step.

    Args:
        file: where the PNG goes.
        rows: of `metrics.jsonl`: `step`, `loss`, and at times `validation` and `validation_ci95`.
        metric: the name of the validation result.
    """
    figure = _figure(6.4, 5.4)
    upper, lower = figure.subplots(2, sharex=True)
    upper.plot([r["step"] for r in rows], [r["loss"] for r in rows], color="tab:gray")
    upper.set(ylabel="meta-loss", title="training tasks")
    _band(lower, [r for r in rows if "validation" in r], "step", "validation", "validation_ci95")
    lower.set(xlabel="meta-step", ylabel=_words(metric), title="validation tasks, mean and 95 % interval")
    for axes in (upper, lower):
        _tidy(axes)
    _show_percent(lower, metric)
    figure.savefig(file, dpi=120)


def adaptation_curve(file: Path, results: Sequence[Mapping[str, Any]], axis: str, metric: str) -> None:
    """Draws the result on unseen tasks against how much a learner adapted.

    Args:
        file: where the PNG goes.
        results: of `jmeta.evaluate`, each with an entry `axis`.
        axis: what is varied: `"test_inner_steps"` or `"shots"`.
        metric: the name of the result.
    """
    figure = _figure(5.4, 4.0)
    axes = figure.subplots()
    _band(axes, results, axis, metric, "ci95")
    episode = [f"{results[0][name]}-{name[:-1]}" for name in ("ways", "shots") if name in results[0] and name != axis]
    axes.set(
        xlabel={"test_inner_steps": "inner steps"}.get(axis, _words(axis)),
        ylabel=_words(metric),
        title=" ".join(["unseen", *episode, "tasks, mean and 95 % interval"]),
    )
    _tidy(axes)
    _show_percent(axes, metric)
    figure.savefig(file, dpi=120)


def comparison(file: Path, result: Mapping[str, Any]) -> None:
    """Draws runs beside each other with their intervals.

    Args:
        file: where the PNG goes.
        result: of `jmeta.runs.comparison.compare`.
    """
    rows, metric = result["runs"], result["metric"]
    figure = _figure(6.4, 1.2 + 0.4 * len(rows))
    axes = figure.subplots()
    places = list(range(len(rows)))[::-1]
    values, halves = [row[metric] for row in rows.values()], [row["ci95"] for row in rows.values()]
    axes.errorbar(values, places, xerr=halves, fmt="o", capsize=3)
    axes.set_yticks(places, list(rows))
    axes.set(xlabel=_words(metric), title=f"the same {result['episodes']} episodes, mean and 95 % interval")
    axes.set_ylim(-0.5, len(rows) - 0.5)
    _tidy(axes)
    if metric == "accuracy":
        axes.xaxis.set_major_formatter("{x:.1%}")
    figure.savefig(file, dpi=120)


def sweep(
    file: Path, values: Sequence[Mapping[str, float]], results: Sequence[tuple[float, float]], metric: str
) -> None:
    """Draws the cells of a sweep against their first hyper-parameter, a line for each value of the others.

    Args:
        file: where the PNG goes.
        values: of each cell, by name.
        results: of each, with half of its 95 % interval, or NaN.
        metric: the name of the results.
    """
    figure = _figure(5.4, 4.0)
    axes = figure.subplots()
    first, *others = values[0]
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for cell, (mean, half) in zip(values, results, strict=True):
        lines.setdefault(", ".join(f"{_words(n)} {cell[n]:g}" for n in others), []).append((cell[first], mean, half))
    for label, points in lines.items():
        xs, means, halves = zip(*sorted(points), strict=True)
        axes.errorbar(xs, means, yerr=halves, marker="o", markersize=4, capsize=3, label=label)
    places = [cell[first] for cell in values]
    if min(places) > 0 and max(places) >= 4 * min(places):
        axes.set_xscale("log")
    axes.set(xlabel=_words(first), ylabel=_words(metric))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    if others:
        axes.legend()
    _show_percent(axes, metric)
    figure.savefig(file, dpi=120)


def trajectories(file: Path, tasks: Environment, before: Trajectory, after: Trajectory) -> None:
    """Draws the episodes of some tasks before and after adaptation, one column for each task.

    Where observations are places in the plane it draws five paths, from a dot, and the parameters of a task that are a
    place as well by a star: the goal. Elsewhere it draws the reward of each step, a mean over episodes.

    Args:
        file: where the PNG goes.
        tasks: the environments, `[tasks]`.
        before: `[tasks, episodes, T]`.
        after: the same, of the adapted policy.
    """
    count, plane = len(before.rewards), getattr(before.observations, "shape", ())[3:] == (2,)
    figure = _figure(0.6 + 2.4 * count, 5.2)
    grid = figure.subplots(2, count, sharex=True, sharey=True, squeeze=False)
    for row, name, episodes in zip(grid, ("before", "after adaptation"), (before, after), strict=True):
        for i, axes in enumerate(row):
            axes.set_title(f"{name}, return {float(returns(episodes)[i].mean()):.1f}", fontsize=9)
            if not plane:
                axes.plot(episodes.rewards[i].mean(axis=0), linewidth=1.0)
                continue
            for places, alive in zip(episodes.observations[i, :5], episodes.alive[i, :5], strict=True):
                axes.plot(*places[alive].T, linewidth=0.8)
            axes.plot(*episodes.observations[i, 0, 0], "ko", markersize=4, zorder=3)
            if getattr(tasks.params, "shape", ()) == (count, 2):
                axes.plot(*tasks.params[i], "r*", markersize=12, zorder=3)
            axes.set_aspect("equal")
    if not plane:
        figure.supxlabel("step", fontsize=10)
        figure.supylabel("reward", fontsize=10)
    figure.savefig(file, dpi=120)


def confusion(file: Path, classes: Sequence[str], counts: Sequence[Sequence[int]]) -> None:
    """Draws how many images of a class (row) were answered by a class (column).

    Args:
        file: where the PNG goes.
        classes: their names.
        counts: `[classes, classes]`.
    """
    n = len(classes)
    side = min(2.4 + 0.5 * n, 20.0)
    figure = _figure(side, side)
    axes = figure.subplots()
    shares = [[count / max(sum(row), 1) for count in row] for row in counts]
    axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0)
    names = [name.replace("$", r"\$") for name in classes]  # which matplotlib would read as mathematics
    axes.set_xticks(range(n), names, rotation=90)
    axes.set_yticks(range(n), names)
    axes.set(xlabel="answer", ylabel="class", title="images")
    for i, row in enumerate(counts):
        for j, count in enumerate(row):
            if count:
                axes.text(j, i, count, ha="center", va="center", color="white" if shares[i][j] > 0.5 else "black")
    figure.savefig(file, dpi=120)


def cells(file: Path, genotype: Genotype) -> None:
    """Draws the two cells of a genotype as graphs, from their inputs to their result.

    Args:
        file: where the PNG goes.
        genotype: the cells.
    """
    figure = _figure(10.0, 6.4)
    for axes, (name, edges) in zip(figure.subplots(2), genotype._asdict().items(), strict=True):
        nodes = len(edges) // 2
        places = {0: (0.0, 1.0), 1: (0.0, 0.0)} | {k + 2: (1.6 + 1.6 * k, 1.0 - k % 2) for k in range(nodes)}
        result = (1.6 + 1.6 * nodes, 0.5)
        words = {0: "cell before last", 1: "last cell"} | {k + 2: f"node {k}" for k in range(nodes)}
        for k, (operation, i) in enumerate(edges):
            bend = 0.15 if k % 2 else -0.15
            _arrow(axes, places[i], places[k // 2 + 2], bend, _words(operation))
        for k in range(nodes):
            _arrow(axes, places[k + 2], result, 0.0, "")
        for place, word in [*((places[k], words[k]) for k in places), (result, "result")]:
            box = {"boxstyle": "round", "facecolor": "white", "edgecolor": "tab:gray"}
            axes.text(*place, word, ha="center", va="center", bbox=box)
        axes.set(title=f"{name} cell", xlim=(-0.6, result[0] + 0.5), ylim=(-0.5, 1.5))
        axes.axis("off")
    figure.savefig(file, dpi=120)


def _arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], bend: float, word: str) -> None:
    style = {"arrowstyle": "-|>", "color": "tab:blue", "shrinkA": 24, "shrinkB": 24}
    axes.annotate("", end, start, arrowprops={**style, "connectionstyle": f"arc3,rad={bend}"})
    middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 - bend * (end[0] - start[0]) / 2)
    if word:
        axes.text(
            *middle,
            word,
            ha="center",
            va="center",
            fontsize=9,
            color="tab:blue",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _band(axes: Any, rows: Sequence[Mapping[str, Any]], x: str, y: str, half_width: str) -> None:
    xs = [r[x] for r in rows]
    axes.plot(xs, [r[y] for r in rows], marker="o", markersize=4)
    axes.fill_between(xs, [r[y] - r[half_width] for r in rows], [r[y] + r[half_width] for r in rows], alpha=0.2)


def _tidy(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)


def _show_percent(axes: Any, metric: str) -> None:
    from matplotlib.ticker import PercentFormatter

    if metric == "accuracy":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def _words(name: str) -> str:
    return name.replace("_", " ")
