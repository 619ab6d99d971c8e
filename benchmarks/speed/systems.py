"""The contestants by name."""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks.speed.cases import Case
from benchmarks.speed.jax_systems import Step

INSTALL = "pip install -e '.[peers]'"


@dataclass(frozen=True)
class System:
    """A contestant.

    Args:
        function: `module:function` in this package, `Case -> Step`.
        packages: what it needs.
        enters: in which cases it takes part.
        tasks: how many tasks it is timed with, where all of them take too long; its time is scaled up to all tasks.
        processes: whether it is also timed as one process a core, each with its share of the tasks; the better counts.
        same_loss: whether it computes the loss of all others, which is checked.
    """

    function: str
    packages: tuple[str, ...]
    enters: Callable[[Case], bool]
    tasks: int | None = None
    processes: bool = False
    same_loss: bool = True

    def missing(self) -> str | None:
        """What keeps it from running here."""
        try:
            for package in self.packages:
                importlib.import_module(package.replace("dm-", "").replace("-", "_"))
        except ImportError as error:
            return str(error)
        return None

    def start(self, case: Case) -> Step:
        """A function that does some meta-steps and returns their losses."""
        step: Step = pkgutil.resolve_name(f"benchmarks.speed.{self.function}")(case)
        return step


def _maml(case: Case) -> bool:
    return case.inner_steps > 0 and case.source != "glyphs"


def _bearable(case: Case) -> bool:
    """Cases in which a grouped convolution's gradient takes seconds a meta-step and not minutes."""
    return case.network == "mlp" or (case.network == "conv4-stride" and case.inner_steps == 1)


_JAX = ("jax", "jaxlib", "flax", "optax")
SYSTEMS: Mapping[str, System] = {
    "jmeta": System("jax_systems:run_jmeta", _JAX, lambda case: True),
    "default norm": System(
        "jax_systems:run_default_norm",
        _JAX,
        lambda case: case.network != "mlp" and case.source == "fixed",
        same_loss=False,
    ),
    "two devices": System("jax_systems:run_two_devices", _JAX, lambda case: case.tasks % 2 == 0),
    "fixed batch": System("jax_systems:run_fixed_batch", _JAX, lambda case: case.source != "fixed"),
    "higher": System("torch_systems:run_higher", ("torch", "higher"), _maml, processes=True),
    "torchopt": System("torch_systems:run_torchopt", ("torch", "torchopt"), _maml, processes=True),
    "torch.func": System("torch_systems:run_torch_func", ("torch",), _maml, processes=True),
    "PyTorch": System("torch_systems:run_prototypical", ("torch",), lambda case: not case.inner_steps),
    # jax-meta has no first order.
    "jax-meta": System(
        "jax_systems:run_jax_meta",
        ("jax-meta", "dm-haiku"),
        lambda case: _maml(case) and _bearable(case) and not case.first_order,
    ),
    "nn.Conv": System(
        "jax_systems:run_nn_conv",
        _JAX,
        lambda case: (
            _maml(case)
            and _bearable(case)
            and case.network != "mlp"
            and case.source == "fixed"
            and not case.first_order
        ),
        tasks=4,
    ),
}
PEERS = ("higher", "torchopt", "torch.func", "PyTorch")
