"""The command `jmeta`: a module of its own, so that Ctrl-C during the imports of the library leaves no traceback."""

import os
import signal
import sys
from typing import Any


def main() -> None:
    """Runs `jmeta.cli.main`."""
    # an exception would end inside of a library's C code, which makes another error of it, or crashes
    before = signal.signal(signal.SIGINT, _end)
    from jmeta.cli import main as command

    signal.signal(signal.SIGINT, before)
    command()


def _end(*_: Any) -> None:
    sys.stderr.write("interrupted.\n")
    sys.stderr.flush()
    os._exit(130)


if __name__ == "__main__":
    main()
