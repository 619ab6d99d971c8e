"""The command `jmeta`: a module of its own, so that Ctrl-C during the imports of the library leaves no traceback."""

import sys


def main() -> None:
    """Runs `jmeta.cli.main`."""
    try:
        from jmeta.cli import main as command
    except KeyboardInterrupt:
        print("interrupted.", file=sys.stderr)
        sys.exit(130)
    command()


if __name__ == "__main__":
    main()
