"""`jmeta report`."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from jmeta.cli.compare import named
from jmeta.files import write_whole
from jmeta.runs.report import report
from jmeta.runs.run import load
from jmeta.runs.stopping import Signals


@dataclasses.dataclass(frozen=True)
class Report:
    """Write one page of HTML about runs, which needs nothing else."""

    folders: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN ...")]
    """The run folders."""
    out: Path = Path("report.html")
    """The page."""
    episodes: int = 600
    """Unseen tasks of each number."""
    checkpoint: str = "best"
    """best, by validation, or last."""

    def run(self, signals: Signals) -> None:
        """Writes the page."""
        runs = {
            name: (folder, load(folder, checkpoint=self.checkpoint)) for name, folder in named(self.folders).items()
        }
        self.out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.out, report(runs, episodes=self.episodes))
        print(f"written to {self.out}")
