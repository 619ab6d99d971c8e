"""The papers' tables, reproduced: `python -m benchmarks.papers [--only TEXT] [--minutes M] [--seeds N]`.

A row that is done is not run again, and one that time cut off goes on from its checkpoint. θ is chosen by validation,
never by test classes. Processes that run at once need a `--file` each, which `--merge` brings together. On a machine
without tensorflow-datasets Omniglot is read from a file of `python -m benchmarks.accelerator --pack FILE`.
"""

import argparse
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.papers.rows import ROWS, Row
from benchmarks.papers.training import EPISODES, VALIDATION, about, measure
from benchmarks.results import RESULTS, Results, markdown_table
from jmeta.errors import JmetaError

HEADER = ["row", "published", "its protocol", "jmeta", "seeds", "transductive", "one query alone", "steps"]
HEADER += ["seconds", "machine"]


def name_of(row: Row, seed: int, scale: float) -> str:
    """`omniglot 5w1s maml default, 40000 steps, seed 0`."""
    return f"{row.name}, {row.config(seed, scale).steps} steps, seed {seed}"


def stored(rows: dict[str, Any], row: Row, seed: int, scale: float) -> dict[str, Any] | None:
    """The result of a row with its present settings, finished or not."""
    result: dict[str, Any] | None = rows.get(name_of(row, seed, scale))
    return result if result and result["settings"] == about(row.config(seed, scale)) else None


def written(results: Sequence[dict[str, Any]], name: str, half: str) -> str:
    """The mean over the seeds, with the half-width of the episodes' interval, and the range where there are several."""
    values, widths = (np.asarray([result["best"][key] for result in results]) for key in (name, half))
    factor, digits = (100, 1) if results[0]["metric"] == "accuracy" else (1, 3)
    least, most, mean, width = (factor * x for x in (values.min(), values.max(), values.mean(), widths.mean()))
    text = f"{mean:.{digits}f} ± {width:.{digits}f}"
    return text if len(values) == 1 else f"{text} ({least:.{digits}f} to {most:.{digits}f})"


def line(row: Row, results: Sequence[dict[str, Any]]) -> list[str]:
    """A row of the table."""
    is_transductive, steps = results[0]["best"]["transductive"], results[0]["settings"]["steps"]
    reached = [result["steps"] for result in results]
    return [
        row.name.partition(" ")[2],
        row.published,
        row.theirs,
        written(results, results[0]["metric"], "ci95"),
        str(len(results)),
        "yes" if is_transductive else "no",
        written(results, "alone", "alone_ci95") if is_transductive else "the same",
        f"{min(reached):,} of {steps:,}" if min(reached) < steps else f"{steps:,}",
        f"{np.mean([result['seconds'] for result in results]):.0f}",
        ", ".join(sorted({result["device"] for result in results})),
    ]


def markdown(rows: dict[str, Any], seeds: int, scale: float = 1.0) -> str:
    """A table a data set, and what is not there yet."""
    text, missing = "", []
    for data in dict.fromkeys(row.data for row in ROWS):
        lines = []
        for row in (row for row in ROWS if row.data == data):
            found = [stored(rows, row, seed, scale) for seed in range(seeds)]
            there = [result for result in found if result]
            lines += [line(row, there)] if there else []
            missing += [] if there else [row.name]
        text += f"{data}\n\n{markdown_table(HEADER, lines)}\n" if lines else ""
    commands = "".join(f'* `python -m benchmarks.papers --only "{name}"`\n' for name in missing)
    return text + (f"Not run yet:\n\n{commands}" if missing else "")


def merge(results: Results, files: Sequence[Path]) -> None:
    """Takes over what files of the same episodes have and `results` has not, or with fewer steps."""
    for file in files:
        for name, row in Results(file, results.settings).rows.items():
            ours = results.rows.get(name)
            if ours is None or ours["settings"] != row["settings"] or ours["steps"] < row["steps"]:
                results.get(name, partial(dict, row), again=True)


def main(arguments: Sequence[str] | None = None) -> str:
    """Runs the rows that are not done, one after the other.

    Args:
        arguments: of the command line.

    Returns:
        The tables.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose name contains this text, or one of several, by commas")
    parser.add_argument("--minutes", type=float, help="of training a row, in this call; default: until it is done")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--file", type=Path, default=RESULTS / "papers.json", help="of the results; a table beside it")
    parser.add_argument("--checkpoints", type=Path, default=Path("runs/papers"), help="a folder; a file a row and seed")
    parser.add_argument("--scan", type=int, default=100, help="meta-steps of a compiled scan")
    parser.add_argument("--scale", type=float, default=1.0, help="of the meta-steps of each row, to try it out")
    parser.add_argument("--omniglot", type=Path, metavar="FILE", help="Omniglot, packed")
    parser.add_argument("--merge", type=Path, nargs="*", metavar="FILE", help="only take over these results")
    flags = parser.parse_args(arguments)
    results = Results(flags.file, {"episodes": EPISODES, "validation": VALIDATION})
    merge(results, flags.merge or ())
    wanted = [row for row in ROWS if any(text.strip() in row.name for text in flags.only.split(","))]
    for seed, row in ((seed, row) for seed in range(flags.seeds) for row in wanted if flags.merge is None):
        name, config = name_of(row, seed, flags.scale), row.config(seed, flags.scale)
        result = stored(results.rows, row, seed, flags.scale)
        if result and result["steps"] == config.steps:
            continue
        file = flags.checkpoints / f"{name.replace(', ', '-').replace(' ', '-')}.npz"
        run = partial(measure, config, file, omniglot=flags.omniglot, minutes=flags.minutes, scan=flags.scan)
        try:
            results.get(name, run, again=True)
        except JmetaError as error:
            print(f"{name}: {error}", flush=True)
        except Exception:  # a row that does not fit into memory shall not end the others
            print(f"{name}: {traceback.format_exc()[-1000:]}", flush=True)
    text = markdown(results.rows, flags.seeds, flags.scale)
    if results.rows:
        flags.file.with_suffix(".md").write_text(text)
    print(text)
    return text


if __name__ == "__main__":
    main()
