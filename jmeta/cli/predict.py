"""`jmeta predict`, and what `jmeta adapt` shares with it."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from jmeta.cli.show import as_json
from jmeta.data.folders import Images, read_images
from jmeta.errors import ConfigError, DataError
from jmeta.estimators import FewShotClassifier
from jmeta.metrics import wilson_interval
from jmeta.runs import pictures
from jmeta.runs.stopping import Signals


@dataclasses.dataclass(frozen=True)
class Predict:
    """Classify images by what `jmeta adapt --save` wrote."""

    file: tyro.conf.Positional[Path]
    """What was adapted."""
    query: Path
    """Images to classify; in sub-folders named as the classes they are counted as well."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Where to draw `confusion.png`, of a query in sub-folders."""
    json: bool = False
    """Print one JSON object."""

    def run(self, signals: Signals) -> None:
        """Prints the class of each image."""
        classifier = FewShotClassifier.load(self.file)
        shape = classifier.input_shape_
        if len(shape) != 3:
            raise ConfigError(
                f"{self.file} was adapted to inputs of shape {list(shape)}, not to images; read it in Python: "
                "jmeta.FewShotClassifier.load."
            )
        about = classifier.note_
        query = read_query(self.query, shape, bool(about.get("invert")), names_of(classifier), self.out)
        result = answers(classifier, query)
        if self.out is not None:
            draw(self.out, result)
        show({**result, **about}, self.json)


def names_of(classifier: FewShotClassifier) -> list[str]:
    """The classes, as a sub-folder can be named."""
    return [str(name) for name in classifier.classes_]


def read_query(folder: Path, shape: tuple[int, ...], invert: bool, classes: Sequence[str], out: Path | None) -> Images:
    """The images of a query.

    Args:
        folder: of images, or of sub-folders named as classes.
        shape: of the classifier's inputs.
        invert: as the support was read.
        classes: that are known.
        out: where a confusion matrix is to be drawn.

    Returns:
        The images.

    Raises:
        DataError: images that cannot be read, or a sub-folder that is named as no class.
        ConfigError: a confusion matrix of images without classes.
    """
    query = read_images(folder, size=(shape[0], shape[1]), channels=shape[2], invert=invert)
    unknown = [name for name in query.names if name not in classes]
    if unknown and set(query.names) & set(classes):
        raise DataError(f"{folder} has a sub-folder {unknown[0]!r}, which is none of the classes {', '.join(classes)}.")
    if unknown:
        query = query._replace(names=(), labels=np.full_like(query.labels, -1))
    if out is not None and not query.names:
        raise ConfigError(f"{folder} has no sub-folders named as the classes, so there is no confusion; drop --out.")
    return query


def answers(classifier: FewShotClassifier, query: Images) -> dict[str, Any]:
    """The class of each image, and how often it is right where that is known.

    Args:
        classifier: adapted, its classes known by name.
        query: the images.

    Returns:
        `"predictions"`, and of a labelled query `"accuracy"`, its 95 % `"interval"`, `"classes"` and `"confusion"`, how
        many images of a class (row) were answered by a class (column).
    """
    probabilities = classifier.predict_proba(query.images)
    classes, answered = names_of(classifier), probabilities.argmax(axis=1)
    rows = [
        {"file": str(file), "class": classes[i], "probability": float(p[i])}
        for file, i, p in zip(query.files, answered, probabilities, strict=True)
    ]
    if not query.names:
        return {"predictions": rows}
    known = np.asarray([classes.index(name) for name in query.names])[query.labels]
    confusion = np.zeros((len(classes), len(classes)), int)
    np.add.at(confusion, (known, answered), 1)
    right = int(confusion.trace())
    return {
        "predictions": rows,
        "accuracy": right / len(rows),
        "interval": wilson_interval(right, len(rows)),
        "classes": classes,
        "confusion": confusion.tolist(),
    }


def draw(out: Path, result: dict[str, Any]) -> None:
    """Draws `confusion.png` into a folder."""
    out.mkdir(parents=True, exist_ok=True)
    pictures.confusion(out / "confusion.png", result["classes"], result["confusion"])


def show(result: dict[str, Any], json: bool) -> None:
    """Prints what `answers` gave, as tables or as one JSON object."""
    if json:
        print(as_json(result))
        return
    if "saved" in result:
        print(f"written to {result['saved']}")
    if "predictions" not in result:
        return
    table = Table(Column("file", overflow="fold"), Column("class", overflow="fold"), "probability")
    for row in result["predictions"]:
        table.add_row(escape(row["file"]), escape(row["class"]), f"{row['probability']:.3f}")
    Console().print(table)
    if "confusion" not in result:
        return
    low, high = result["interval"]
    print(
        f"accuracy {100 * result['accuracy']:.1f} % of {len(result['predictions'])} images, 95 % interval "
        f"{100 * low:.1f} to {100 * high:.1f} %"
    )
    columns = [Column(escape(name), overflow="fold", justify="right") for name in result["classes"]]
    table = Table(Column("class \\ answer", overflow="fold"), *columns)
    for name, counts in zip(result["classes"], result["confusion"], strict=True):
        table.add_row(escape(name), *map(str, counts))
    Console().print(table)
