"""`jmeta compare`."""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from jmeta.cli.show import as_json, interval
from jmeta.errors import ConfigError
from jmeta.runs import pictures
from jmeta.runs.comparison import compare
from jmeta.runs.config import check_values
from jmeta.runs.run import Run, load
from jmeta.runs.stopping import Signals


@dataclasses.dataclass(frozen=True)
class Compare:
    """Compare runs on the same episodes: a table, and the interval of each difference to the first."""

    folders: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN RUN ...")]
    """The run folders; the others are compared with the first."""
    episodes: int = 600
    """Unseen tasks."""
    seed: int = 1
    """The same seed gives the same tasks."""
    split: str = "test"
    """test, validation or train."""
    checkpoint: str = "best"
    """best, by validation, or last."""
    plot: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: none)")] = None
    """Where a picture goes."""
    json: bool = False
    """Print one JSON object."""

    def run(self, signals: Signals) -> None:
        """Prints the table."""
        check_values({"seed": self.seed})
        runs = {name: load(folder, checkpoint=self.checkpoint) for name, folder in named(self.folders).items()}
        result = compare(runs, split=self.split, episodes=self.episodes, seed=self.seed)
        if self.plot is not None:
            pictures.comparison(self.plot.expanduser(), result)
        if self.json:
            print(as_json(result))
            return
        _print(next(iter(runs.values())), result)


def named(folders: tuple[Path, ...]) -> dict[str, Path]:
    """Short names for folders: the last part, or all of it where two end alike."""
    runs = tuple(inner for folder in folders for inner in _runs_of(folder))
    if not runs:
        raise ConfigError("there is no run to look at; name the folders that were given as --out.")
    if twice := [folder for folder, count in Counter(runs).items() if count > 1]:
        raise ConfigError(f"{twice[0]} is given twice; give each run once.")
    ends = Counter(folder.name for folder in runs)
    return {folder.name if ends[folder.name] == 1 else str(folder): folder for folder in runs}


def _runs_of(folder: Path) -> tuple[Path, ...]:
    """The run itself, or the runs of all seeds; nothing of the table that stands beside those."""
    if folder.name == "seeds.json":
        return ()
    if (folder / "seeds.json").exists() and not (folder / "config.json").exists():
        return tuple(sorted(file.parent for file in folder.glob("*/config.json")))
    return (folder,)


def _print(run: Run, result: dict[str, object]) -> None:
    config, rows = run.config, result["runs"]
    assert isinstance(rows, dict)
    sizes = [f"{value} {name}" for name in ("ways", "shots", "queries") if (value := result.get(name)) is not None]
    sizes.append(f"the same {result['episodes']} {result['split']} episodes")
    print(f"{config.data}: {', '.join(sizes)}")
    table = Table("run", f"{config.metric.__name__.replace('_', ' ')}, 95 % interval", f"less {next(iter(rows))}")
    for name, row in rows.items():
        difference = config.written(row["difference"], row["difference_ci95"]) if "difference" in row else ""
        table.add_row(name, interval(config, row), difference)
    Console().print(table)
