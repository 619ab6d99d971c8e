"""`jmeta list`."""

import dataclasses

from jmeta.runs.registry import DATA, LEARNERS, MODELS
from jmeta.runs.stopping import Signals


@dataclasses.dataclass(frozen=True)
class List:
    """List learners, data sets and models."""

    def run(self, signals: Signals) -> None:
        """Prints the registry."""
        for title, registry in (("learners", LEARNERS), ("data", DATA), ("models", MODELS)):
            print(title)
            for name, entry in registry.items():
                print(f"  {name:<18} {entry.summary} ({entry.paper})")
