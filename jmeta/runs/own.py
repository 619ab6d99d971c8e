"""The entries of built-in names, and of data and networks of one's own."""

import functools
import importlib
import inspect
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flax import linen, nnx

from jmeta.data.own import is_path, read_own
from jmeta.errors import ConfigError, UnknownNameError, lookup
from jmeta.models import adapters
from jmeta.runs.entries import DataEntry, ModelEntry
from jmeta.runs.registry import DATA, MODELS
from jmeta.search.architecture import genotype_of
from jmeta.search.cells import CellNetwork


def data_entry(name: str, own: Mapping[str, Any]) -> DataEntry:
    """The entry of built-in data, or of data of your own.

    Args:
        name: a name of `DATA`, or a path.
        own: what `jmeta.data.own.read_own` takes beside the path.

    Returns:
        The entry.

    Raises:
        UnknownNameError: no such name.
        ConfigError: settings of data of one's own for built-in data.
        DataError: the path cannot be read.
    """
    if name in DATA or not is_path(name):
        try:
            entry = lookup(DATA, name, "data set")
        except UnknownNameError as error:
            raise UnknownNameError(f"{str(error).rstrip('.')}, or the path of a folder, an .npz or a table.") from None
        if own:
            flag = next(iter(own)).replace("_", "-")
            raise ConfigError(f"--{flag} has no meaning for {name}; it is for data of your own, as --data FOLDER.")
        return entry
    path = Path(name).expanduser()
    changed = path.stat().st_mtime_ns if path.exists() else 0
    return _own_entry(str(path), json.dumps(own, sort_keys=True), changed)


@functools.lru_cache(maxsize=4)
def _own_entry(name: str, own: str, changed: int) -> DataEntry:
    found = read_own(name, **json.loads(own))
    least = min(len(found.division[split]) for split in ("validation", "test"))
    defaults: dict[str, Any] = {} if found.images else {"model": "mlp"}
    if found.kind == "classification":
        defaults["ways"] = min(5, least)
    return DataEntry(
        found.load,
        f"data of your own, {name}",
        "",
        found.kind,
        defaults,
        found.descriptions,
        found.division,
        found.rows,
        found.standardisation,
    )


def found_out(entry: DataEntry) -> dict[str, Any]:
    """What a run keeps of data of your own beside its settings: kind, division, standardisation."""
    found: dict[str, Any] = {"kind": entry.kind, "division": entry.division}
    return found | ({"standardisation": entry.standardisation._asdict()} if entry.standardisation else {})


def asked(own: Mapping[str, Any]) -> dict[str, Any]:
    """What `read_own` takes, of what a run keeps of its data; the division is given again."""
    return {name: value for name, value in own.items() if name not in ("kind", "standardisation")}


def model_entry(name: str) -> ModelEntry:
    """The entry of a built-in network, of a class of your own, or of the cell that a search found.

    Args:
        name: a name of `MODELS`, `package.module:Name` of a Linen or NNX class, or the folder of a `jmeta search`.

    Returns:
        The entry.

    Raises:
        UnknownNameError: no such name.
        ConfigError: a class that cannot be imported or is no module, or a folder without a search.
    """
    if ":" in name:
        return _own_model(name)
    if name not in MODELS and Path(name).expanduser().is_dir():
        return _found_model(Path(name).expanduser())
    return lookup(MODELS, name, "model")


def _own_model(name: str) -> ModelEntry:
    place, _, attribute = name.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` has it
    try:
        thing = getattr(importlib.import_module(place), attribute)
    except (ImportError, AttributeError, ValueError, SyntaxError) as error:
        raise ConfigError(
            f"--model {name} cannot be imported ({error}); name a class as package.module:Name, from the folder that "
            "holds the package."
        ) from error
    summary = f"a network of your own, {name}"
    if isinstance(thing, type) and issubclass(thing, linen.Module):
        return ModelEntry(thing, summary, "")
    if isinstance(thing, type) and issubclass(thing, nnx.Module):

        def make(**options: Any) -> Callable[[Any], Any]:
            return functools.partial(thing, **options)

        make.__signature__ = inspect.signature(thing.__init__)  # type: ignore[attr-defined]

        return ModelEntry(make, summary, "", lambda make: adapters.nnx(lambda rngs: make(rngs=rngs)))
    raise ConfigError(
        f"--model {name} is no Linen or NNX class; name one, or train it in Python by jmeta.fit with an adapter, "
        "jmeta.equinox or jmeta.haiku."
    )


def _found_model(folder: Path) -> ModelEntry:
    try:
        stored = json.loads((folder / "result.json").read_text())
        found, searched = genotype_of(stored["genotypes"]["second order"]), stored["settings"]
        size = {"features": searched["features"], "nodes": searched["nodes"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--model {folder} holds no finished `jmeta search`; name its --out, or a network."
        ) from error
    # group norm, as all networks of images have it: one query is answered as many are
    make = functools.partial(CellNetwork, genotype=found, norm="group", **size)
    return ModelEntry(make, f"the cell of {folder}", "Liu et al. 2019")
