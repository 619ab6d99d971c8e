"""`jmeta embed`."""

import dataclasses
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from jmeta.cli.show import progress
from jmeta.cli.train import named
from jmeta.data.labelled import Labelled, read_archive, read_folder, read_sentences
from jmeta.errors import ConfigError, DataError
from jmeta.runs.embedding import embed_file, encoder_of, is_encoder, network_of
from jmeta.runs.stopping import Signals, say

_Text = Annotated[str | None, tyro.conf.arg(metavar="COLUMN", help_behavior_hint="")]


@dataclasses.dataclass(frozen=True)
class Embed:
    """Embed a folder of images or a table of sentences by a pretrained network, once and for all."""

    data: Annotated[Path, tyro.conf.arg(metavar="PATH")]
    """A folder of images, an .npz of x and y, or with an encoder of sentences a .csv or .parquet table."""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE.npz")]
    """Where to write x, y, split and descriptions, for `jmeta train --data` and `jmeta.from_embeddings`."""
    model: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: that of the run)")] = None
    """A folder of sentence-transformers, or a network, as of `jmeta train --model`."""
    from_: Annotated[str | None, tyro.conf.arg(name="from", metavar="RUN|FILE", help_behavior_hint="")] = None
    """The weights of the network: a run, or a file (.safetensors, .npz, .pth)."""
    network: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=VALUE ...", help_behavior_hint="")] = ()
    """Options of the network, as of `jmeta train`."""
    size: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: that of the images)")] = None
    """Pixels of each side of the images of a folder: those that the network was trained on."""
    channels: Annotated[
        int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: 3 if any has colours)")
    ] = None
    """1 for greyscale, 3 for RGB."""
    text: _Text = None
    """Of a table: the column to read."""
    label: _Text = None
    """Of a table: the column of the class."""
    split: _Text = None
    """Of a table: the column that says train, validation or test."""
    batch: int = 64
    """Rows at a time."""

    def run(self, signals: Signals) -> None:
        """Embeds, and writes the file."""
        if self.out.suffix != ".npz":
            raise ConfigError(f"--out {self.out} is no .npz; name one.")
        if self.batch < 1:
            raise ConfigError(f"--batch is {self.batch}; give at least 1.")
        reads_text = self.model is not None and is_encoder(self.model)
        found = self._read(reads_text)
        if reads_text:
            embedder = encoder_of(str(self.model), self.batch)
        else:
            options = dict(named("network", option) for option in self.network)
            embedder = network_of(self.model, self.from_, options, found.inputs, self.batch)
            say(str(embedder.matched))
        about = {"data": str(self.data.absolute()), "model": str(self.model), "from": self.from_}
        with progress() as bars:
            bar = bars.add_task("embedding", total=len(found.labels), completed=0, note="compiling")

            def advance(done: int) -> None:
                bars.update(bar, completed=done, note="")

            embed_file(self.out, found, embedder, about, batch=self.batch, advance=advance)
        with np.load(self.out) as stored:
            n, width = stored["x"].shape
        print(f"written to {self.out}: {n:,} embeddings of {width} numbers, {len(found.names)} classes")

    def hint(self) -> str:
        """How to go on after an interruption."""
        return "; the same command goes on"

    def _read(self, reads_text: bool) -> Labelled:
        if not self.data.exists():
            raise DataError(f"{self.data} does not exist; give a folder of images, an .npz, a .csv or a .parquet file.")
        table = self.data.suffix in (".csv", ".parquet")
        if table != reads_text:
            what = (
                "an encoder of sentences reads a .csv or .parquet table" if reads_text else "a table needs an encoder"
            )
            raise DataError(f"{what}, and --data is {self.data} and --model {self.model}; give what fits.")
        if table:
            return read_sentences(self.data, self.text, self.label, self.split)
        for name in ("text", "label", "split"):
            if getattr(self, name) is not None:
                raise DataError(f"--{name} is for a .csv or .parquet table, and {self.data} is none; leave it away.")
        if self.data.is_dir():
            return read_folder(self.data, self.size, self.channels)
        if self.size is not None or self.channels is not None:
            raise DataError(f"--size and --channels are for folders of images, and {self.data} is none.")
        return read_archive(self.data)
