"""What a network of another library takes beside its inputs, and what of its state is a constant."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax

from jmeta.core import Mask, State
from jmeta.errors import ModelError

# the names that other libraries' networks give the switch, and its value where the network learns
SWITCHES = {
    "train": True,
    "training": True,
    "is_training": True,
    "deterministic": False,
    "use_running_average": False,
    "inference": False,
}


@dataclasses.dataclass(frozen=True)
class Call:
    """What the call of a network takes beside its inputs: a switch, a `mask`, and what an adapter gives of its own."""

    known: tuple[str, ...]
    needed: tuple[str, ...]

    @classmethod
    def of(cls, function: Callable[..., Any], name: str, own: tuple[str, ...] = (), *, method: bool = True) -> "Call":
        others = list(inspect.signature(function).parameters.values())[2 if method else 1 :]
        parameters = [p for p in others if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        known = tuple(p.name for p in parameters if p.name in (*SWITCHES, "mask", *own))
        needed = tuple(p.name for p in parameters if p.default is p.empty)
        for parameter in needed:
            if parameter not in known:
                raise ModelError(
                    f"the call of {name} needs {parameter!r}, which jmeta does not give; give it a default, or one "
                    f"of the names that it knows: {', '.join(SWITCHES)}, mask{''.join(f', {n}' for n in own)}."
                )
        return cls(known, needed)

    @property
    def switches(self) -> tuple[str, ...]:
        return tuple(name for name in self.known if name in SWITCHES)

    def options(self, train: bool, mask: Mask = None, state: State = ()) -> dict[str, Any]:
        """The keyword arguments of one call."""
        if mask is not None and "mask" not in self.known and state:
            raise ModelError(
                "the tasks have rows that are not there, which would enter the statistics of the network; let it take "
                "`mask`, `[n]`, and give it to its normalisation, or use one without statistics over rows."
            )
        given: dict[str, Any] = {name: train is SWITCHES[name] for name in self.switches}
        return given | ({"mask": mask} if mask is not None and "mask" in self.known else {})


def averages_as_constants(state: dict[str, Any]) -> State:
    """Moving averages are data of former batches, not a path for the meta-gradient; NNX itself has it so."""
    return {name: jax.lax.stop_gradient(part) if name == "batch_stats" else part for name, part in state.items()}
