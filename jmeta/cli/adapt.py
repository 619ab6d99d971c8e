"""`jmeta adapt`."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from jmeta.cli.predict import answers, draw, read_query, show
from jmeta.data.folders import read_images
from jmeta.data.text import TokenIds, hashed_text
from jmeta.errors import ConfigError, DataError
from jmeta.runs import settings
from jmeta.runs.config import Config
from jmeta.runs.registry import LEARNERS
from jmeta.runs.run import load
from jmeta.runs.stopping import Signals


@dataclasses.dataclass(frozen=True)
class Adapt:
    """Adapt a run to your own images, and classify others or save the classifier."""

    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """The run folder."""
    support: Path
    """Labelled images, one sub-folder a class."""
    query: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Images to classify; in sub-folders named as the classes they are counted as well."""
    save: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Where to write what was adapted, for `jmeta predict` and `jmeta.FewShotClassifier.load`."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Where to draw `confusion.png`, of a query in sub-folders."""
    invert: bool = False
    """For dark strokes on a light ground: the data sets of jmeta have light strokes on a dark ground."""
    checkpoint: str = "best"
    """best, by validation, or last."""
    json: bool = False
    """Print one JSON object."""

    def run(self, signals: Signals) -> None:
        """Prints the class of each image."""
        if self.query is None and (self.save is None or self.out is not None):
            raise ConfigError(
                "there is nothing to classify; give images by --query, or a file by --save without --out."
            )
        run = load(self.folder, checkpoint=self.checkpoint)
        config = run.config
        shape = run.input_shape
        if len(shape) != 3:
            raise ConfigError(f"{self.folder} was trained on {config.data}, not on images; train on images first.")
        support = read_images(self.support, size=(shape[0], shape[1]), channels=shape[2], invert=self.invert)
        if (support.labels < 0).any():
            raise DataError(f"{self.support} holds images outside of a class; put them into one sub-folder a class.")
        if len(support.names) < 2:
            raise DataError(
                f"{self.support} holds one class, so that there is nothing to tell apart; give two or more."
            )
        if not LEARNERS[config.learner].embedding and len(support.names) > (config.ways or 0):
            raise DataError(
                f"{self.folder} was trained for {config.ways} ways, but {self.support} has {len(support.names)} "
                f"classes; give at most {config.ways}, or train a prototypical run, which takes any number."
            )
        query = None if self.query is None else read_query(self.query, shape, self.invert, support.names, self.out)
        names = np.asarray(support.names)
        classifier = run.classifier()
        described = _descriptions_of(self.folder, config, support.names)
        classifier.fit(support.images, names[support.labels], described)
        about = settings.protocol(config)
        result = {} if query is None else answers(classifier, query)
        if self.save is not None:
            classifier.save(self.save, note={**about, "invert": self.invert})
            result["saved"] = str(self.save)
        if self.out is not None:
            draw(self.out, result)
        show({**result, **about}, self.json)


def _descriptions_of(run: Path, config: Config, names: Sequence[str]) -> Any:
    """What the names of the sub-folders say about the classes, for a run that reads text."""
    if config.descriptions is None:
        return None
    if config.descriptions != "text":
        raise ConfigError(f"{run} reads {config.descriptions}, which a folder has not; train with --descriptions text.")
    return TokenIds(hashed_text(names))
