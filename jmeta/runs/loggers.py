"""Where the rows of a run go beside `metrics.jsonl`."""

import csv
import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jmeta.errors import ConfigError
from jmeta.runs.config import Config

Row = Mapping[str, Any]
Logger = Callable[[Row], None]


def to_csv(folder: Path, config: Config) -> Logger:
    """`metrics.csv`, a column for each number."""
    file, rows = folder / "metrics.csv", list[Row]()

    def log(row: Row) -> None:
        rows.append(row)
        names = list(dict.fromkeys(name for row in rows for name in row))
        with file.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, names)
            writer.writeheader()
            writer.writerows(rows)

    return log


def to_tensorboard(folder: Path, config: Config) -> Logger:
    """Event files in `tensorboard/`, for `tensorboard --logdir`."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ConfigError("--log tensorboard needs tensorboardX: pip install tensorboardX.") from error
    writer = SummaryWriter(str(folder / "tensorboard"))

    def log(row: Row) -> None:
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                writer.add_scalar(name, value, row["step"])
        writer.flush()

    return log


def to_wandb(folder: Path, config: Config) -> Logger:
    """Weights & Biases, as its own settings say (`WANDB_MODE=offline` sends nothing)."""
    try:
        import wandb
    except ImportError as error:
        raise ConfigError("--log wandb needs wandb: pip install wandb.") from error
    project = os.environ.get("WANDB_PROJECT", "jmeta")
    run = wandb.init(project=project, name=folder.name, dir=str(folder), config=dataclasses.asdict(config))

    def log(row: Row) -> None:
        run.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])

    return log


LOGGERS: Mapping[str, Callable[[Path, Config], Logger]] = {
    "csv": to_csv,
    "tensorboard": to_tensorboard,
    "wandb": to_wandb,
}
