"""The command line: a thin layer over `jmeta.runs`, one file a command."""

import dataclasses
import errno
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro

import jmeta
from jmeta.cli.adapt import Adapt
from jmeta.cli.compare import Compare
from jmeta.cli.embed import Embed
from jmeta.cli.evaluate import Evaluate
from jmeta.cli.listing import List
from jmeta.cli.predict import Predict
from jmeta.cli.report import Report
from jmeta.cli.search import Search
from jmeta.cli.train import Train, defaults_of, with_file
from jmeta.errors import JmetaError
from jmeta.runs.hosts import leave, quiet
from jmeta.runs.programs import keep_programs
from jmeta.runs.stopping import Signals, say

COMMANDS: dict[str, Callable[..., Any]] = {
    "train": Train,
    "evaluate": Evaluate,
    "adapt": Adapt,
    "predict": Predict,
    "embed": Embed,
    "compare": Compare,
    "report": Report,
    "search": Search,
    "list": List,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point of `jmeta`; exits with code 2 and one sentence for whatever the user can put right."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if list(arguments) == ["--version"]:
        print(f"jmeta {jmeta.__version__}")
        return
    try:
        arguments = with_file(arguments)
    except JmetaError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    try:
        command: Any = tyro.extras.subcommand_cli_from_dict(
            COMMANDS, prog="jmeta", args=arguments, config=(tyro.conf.FlagCreatePairsOff,)
        )
    except SystemExit as stop:
        if stop.code in (0, None) and arguments[:1] == ["train"]:  # after its help
            print(defaults_of(arguments))
        raise
    folders = {name: value.expanduser() for name, value in vars(command).items() if isinstance(value, Path)}
    command = dataclasses.replace(command, **folders)
    keep_programs()
    with Signals() as signals, warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
        try:
            command.run(signals)
        except JmetaError as error:
            print(f"error: {error}", file=sys.stderr)
            leave(2)
        except KeyboardInterrupt:
            quiet()
            say(f"interrupted{command.hint() if hasattr(command, 'hint') else ''}.")
            os._exit(signals.code)  # XLA may still compute, and crashes when Python is taken down below it
        except BrokenPipeError:  # who reads the output has read enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python would flush it at its end
            leave(141)
        except OSError as error:
            what, why = error.filename or "a file of the run", error.strerror or error
            help_ = (
                "make room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "see that it is there and yours to use"
            )
            print(f"error: {what} cannot be written or read ({why}); {help_}, or give another folder.", file=sys.stderr)
            leave(2)
