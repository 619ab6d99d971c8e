"""`jmeta adapt`."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from jmeta.cli.show import as_json
from jmeta.data.folders import read_images
from jmeta.data.text import TokenIds, hashed_text
from jmeta.errors import ConfigError, DataError
from jmeta.runs import settings
from jmeta.runs.registry import LEARNERS
from jmeta.runs.run import load
from jmeta.runs.settings import Config
from jmeta.runs.stopping import Signals


@dataclasses.dataclass(frozen=True)
class Adapt:
    """Adapt a run to your own images and classify others."""

    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """The run folder."""
    support: Path
    """Labelled images, one sub-folder a class."""
    query: Path
    """Images to classify."""
    invert: bool = False
    """For dark strokes on a light ground: the data sets of jmeta have light strokes on a dark ground."""
    checkpoint: str = "best"
    """best, by validation, or last."""
    json: bool = False
    """Print one JSON object."""

    def run(self, signals: Signals) -> None:
        """Prints the class of each image."""
        run = load(self.folder, checkpoint=self.checkpoint)
        config = run.config
        shape = run.input_shape
        if len(shape) != 3:
            raise ConfigError(f"{self.folder} was trained on {config.data}, not on images; train on images first.")
        options: dict[str, Any] = {"size": shape[:2], "channels": shape[2], "invert": self.invert}
        support, query = (read_images(folder, **options) for folder in (self.support, self.query))
        if (support.labels < 0).any():
            raise DataError(f"{self.support} holds images outside of a class; put them into one sub-folder a class.")
        if not LEARNERS[config.learner].embedding and len(support.names) > (config.ways or 0):
            raise DataError(
                f"{self.folder} was trained for {config.ways} ways, but {self.support} has {len(support.names)} "
                f"classes; give at most {config.ways}, or train a prototypical run, which takes any number."
            )
        classifier = run.classifier()
        classifier.fit(_scaled(support.images), support.labels, _descriptions_of(self.folder, config, support.names))
        probabilities = classifier.predict_proba(_scaled(query.images))
        rows = [
            {"file": str(file), "class": support.names[int(p.argmax())], "probability": float(p.max())}
            for file, p in zip(query.files, probabilities, strict=True)
        ]
        if self.json:
            print(as_json({"predictions": rows, **settings.protocol(config)}))
            return
        table = Table(Column("file", overflow="fold"), Column("class", overflow="fold"), "probability")
        for row in rows:
            table.add_row(escape(str(row["file"])), escape(str(row["class"])), f"{row['probability']:.3f}")
        Console().print(table)


def _descriptions_of(run: Path, config: Config, names: Sequence[str]) -> Any:
    """What the names of the sub-folders say about the classes, for a run that reads text."""
    if config.descriptions is None:
        return None
    if config.descriptions != "text":
        raise ConfigError(f"{run} reads {config.descriptions}, which a folder has not; train with --descriptions text.")
    return TokenIds(hashed_text(names))


def _scaled(images: Any) -> Any:
    return images.astype("float32") / 255.0
