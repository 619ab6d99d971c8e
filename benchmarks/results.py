"""Results that a benchmark has already: a run that was interrupted goes on where it stopped."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import environment
from jmeta.files import write_whole

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


class Results:
    """A JSON file of results by name.

    Args:
        file: where they are kept.
        settings: what they depend on; results of other settings are discarded.
    """

    def __init__(self, file: Path, settings: Mapping[str, Any]) -> None:
        self.file, self.settings = file, settings
        stored = json.loads(file.read_text()) if file.exists() else {}
        same = stored.get("settings") == json.loads(json.dumps(settings))
        self.rows: dict[str, Any] = stored["rows"] if same else {}
        if self.rows:
            print(f"{len(self.rows)} results are in {file} and not measured again; delete it to do so", flush=True)
        self._about = {"settings": settings, "environment": environment(PACKAGES)}

    def get(self, name: str, compute: Callable[[], Any], *, again: bool = False) -> Any:
        """The result of that name, computed and stored if it is not there yet or shall be computed again."""
        if again or name not in self.rows:
            self.rows[name] = json.loads(json.dumps(compute()))
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.file, json.dumps({**self._about, "rows": self.rows}, indent=2) + "\n")
            print(f"{name}: done", flush=True)
        return self.rows[name]


def percent(result: Mapping[str, Any]) -> str:
    """An accuracy of `jmeta.evaluate` with half of its 95 % interval."""
    return f"{100 * result['accuracy']:.1f} ± {100 * result['ci95']:.1f} %"


def markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def machine_line(command: str) -> str:
    """The command and the machine, as they stand above a table."""
    about = environment(PACKAGES)
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    return f"`{command}` on {about['cpu']}, {about['threads']} threads; Python {about['python']}, {versions}.\n\n"
