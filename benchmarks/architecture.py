"""Cells that a search finds beside random ones, over seeds: `python -m benchmarks.architecture`.

Each seed is one `jmeta search`, whose folder `runs/architecture-SEED` goes on where it stopped.
"""

from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro

from benchmarks.results import RESULTS, Results, machine_line, markdown_table, percent
from jmeta.cli.search import ORDERS, Search, search


def run(data: str, seed: int) -> dict[str, Any]:
    """What `jmeta search` measures of one seed."""
    jax.clear_caches()  # the programs of two searches in one process once filled its memory map
    return search(Search(data=data, seed=seed, out=Path(f"runs/architecture-{seed}"), resume=True))


def main(data: Literal["omniglot", "glyphs"] = "omniglot", seeds: int = 3) -> None:
    """Searches, trains what was found and what was drawn anew, and writes the table and the picture.

    Args:
        data: images to search on.
        seeds: how many searches of each order.
    """
    results = Results(RESULTS / "architecture.json", {"data": data})
    rows = {seed: results.get(f"seed {seed}", partial(run, data, seed)) for seed in range(seeds)}
    lines = []
    for seed, row in rows.items():
        drawn = sorted(one["accuracy"] for name, one in row["networks"].items() if name.startswith("random"))
        for name in ORDERS:
            one, found = row["networks"][name], row["searches"][name]
            rank = f"{row['rank'][name]} of {len(drawn) + 1}"
            skips = f"{found['skips']} of {len(row['genotypes'][name][0])}"
            seconds = f"{found['seconds']:.0f} s"
            lines.append([str(seed), name, percent(one), rank, f"{one['parameters']:,}", seconds, skips])
        conv4 = row["networks"]["conv4"]
        lines.append([str(seed), "conv4", percent(conv4), "", f"{conv4['parameters']:,}", "", ""])
        middle = f"{100 * row['median_random']:.1f} % ({100 * drawn[0]:.1f} to {100 * drawn[-1]:.1f} %)"
        lines.append([str(seed), f"{len(drawn)} random cells", middle, "", "", "", ""])
    header = ["seed", "cell", "20-way 1-shot", "rank", "parameters", "search", "skips in the normal cell"]
    text = machine_line(f"python -m benchmarks.architecture --data {data} --seeds {seeds}")
    text += markdown_table(header, lines)
    print(text)
    (RESULTS / "architecture.md").write_text(text)
    picture(rows)


def picture(rows: dict[int, Any]) -> None:
    """Accuracy of the cells of each seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 4.0), layout="constrained")
    axes = figure.subplots()
    styles = {"second order": ("tab:blue", "o"), "first order": ("tab:orange", "s"), "conv4": ("tab:green", "^")}
    for seed, row in rows.items():
        drawn = [one["accuracy"] for name, one in row["networks"].items() if name.startswith("random")]
        axes.plot(
            np.full(len(drawn), seed), drawn, "_", color="tab:gray", ms=18, label=None if seed else "random cells"
        )
        for name, (color, marker) in styles.items():
            value = row["networks"][name]["accuracy"]
            axes.plot(seed, value, marker, color=color, ls="", label=None if seed else name)
    axes.set(xlabel="seed", ylabel="accuracy, 20-way 1-shot", xticks=list(rows), xlim=(-0.5, len(rows) + 0.6))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center right")
    figure.savefig(RESULTS / "architecture.png", dpi=120)


if __name__ == "__main__":
    tyro.cli(main)
