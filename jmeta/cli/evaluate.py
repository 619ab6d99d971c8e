"""`jmeta evaluate`."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro

from jmeta.cli.show import as_json, interval, print_result, result_table
from jmeta.runs import pictures
from jmeta.runs.assessment import UPDATES, draw_trajectories
from jmeta.runs.config import check_values
from jmeta.runs.registry import LEARNERS
from jmeta.runs.run import load
from jmeta.runs.stopping import Signals

_OtherInt = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: that of the run)")]


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Evaluate a run on unseen tasks."""

    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """The run folder."""
    episodes: int = 600
    """Unseen tasks."""
    seed: int = 1
    """The same seed gives the same tasks."""
    split: str = "test"
    """test, validation or train."""
    data: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: that of the run)")] = None
    """Other data: one of `jmeta list`, or a path."""
    ways: _OtherInt = None
    """Classes of an episode."""
    shots: _OtherInt = None
    """Labelled examples a class."""
    queries: _OtherInt = None
    """Query examples a class."""
    query_balance: Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="(default: none)")] = None
    """As many queries in all, but in the proportions of a Dirichlet distribution of this concentration: 2.0."""
    open_set: bool = False
    """Ask as many queries that are of no class: AUROC and FPR95 of rejecting them."""
    inner_steps: _OtherInt = None
    """Inner steps; 0 does not adapt at all."""
    checkpoint: str = "best"
    """best, by validation, or last."""
    json: bool = False
    """Print one JSON object."""

    def run(self, signals: Signals) -> None:
        """Prints the result."""
        check_values({"seed": self.seed})
        run = load(self.folder, checkpoint=self.checkpoint)
        if self.data is not None:
            run = run.on(self.data)
        config = run.config
        asked_sizes = ("ways", "shots", "queries", "query_balance")
        sizes = {name: value for name in asked_sizes if (value := getattr(self, name)) is not None}
        asked = partial(
            run.evaluate, self.split, episodes=self.episodes, seed=self.seed, open_set=self.open_set, **sizes
        )
        result = asked(inner_steps=self.inner_steps)
        results: list[dict[str, Any]] = []
        if LEARNERS[config.learner].acts and self.inner_steps is None:
            metric = config.metric.__name__
            results = [result if steps == result["test_inner_steps"] else asked(inner_steps=steps) for steps in UPDATES]
            # the pictures of other data or tasks stand beside those of the run
            asked_for = Path(self.data or "").stem, self.split, self.checkpoint
            ending = "".join(f"_{word}" for word in asked_for if word not in ("", "test", "best")) + ".png"
            pictures.adaptation_curve(self.folder / f"adaptation_curve{ending}", results, "test_inner_steps", metric)
            draw_trajectories(run, self.folder / f"trajectories{ending}", self.split)
            names = ("test_inner_steps", metric, "ci95")
            result["by_inner_steps"] = [{name: r[name] for name in names} for r in results]
        if self.json:
            print(as_json(result))
            return
        table = result_table(config, result)
        for r in results:
            table.add_row(f"after {r['test_inner_steps']}", interval(config, r))
        print_result(config, result, table)
