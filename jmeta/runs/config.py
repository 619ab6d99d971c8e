"""The settings of a run: here and nowhere else each is declared, in one line."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING
from functools import partial
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import optax
from jaxtyping import Array

from jmeta.distances import DISTANCES
from jmeta.errors import ConfigError, lookup
from jmeta.models.norms import Norm
from jmeta.runs.entries import METRICS, DataEntry
from jmeta.runs.own import asked, data_entry
from jmeta.runs.registry import DATA

VERSION = 2  # of the settings that a run folder holds; what changes a number of an old run changes this one
INNER_OPTIMIZERS: Mapping[str, Callable[[float], optax.GradientTransformation]] = {
    "sgd": optax.sgd,
    "momentum": partial(optax.sgd, momentum=0.9),
    "adam": partial(optax.adam, eps_root=1e-8),  # is differentiated through, and √v has no derivative at 0
    "rmsprop": optax.rmsprop,
}
_NORMS = {name: name for name in get_args(Norm)}
_DTYPES = {name: name for name in ("float32", "bfloat16")}
_FROM_0, _SEEDS = (0, 100_000), (0, 2**32 - 1)
_OF_OWN = "for data of your own alone"


class Setting(NamedTuple):
    """What is declared of a setting beside its name and its type; all that uses it follows from here.

    Args:
        help: of its flag, where `{}` stands for the choices; without, it has no flag.
        of: the part that takes it as an argument: learner, model or data; None for what training itself reads.
        split: `"train"` or `"test"` for what the part takes there alone.
        overlays: the setting that it replaces in its split, whose part, argument and range it has, and whose value
            where it is not given.
        range: the least and the most of a whole number.
        choices: names, and what each stands for.
        kind: what the choices are, for a sentence: `"distance"`.
        default: where neither data nor learner have one; without, that of the argument.
        regression: instead, where the data is a regression.
        requires: what the entry of the learner must say of itself, as `"pretrains"`.
        changes: whether it may change when a run goes on.
        shown: the default, in the help.
        name: of the field.
        type: of a value: `tuple` for a whole number or a range, `Mapping` for names with values; of the annotation.
    """

    help: str = ""
    of: Literal["learner", "model", "data"] | None = None
    split: Literal["train", "test"] | None = None
    overlays: str = ""
    range: tuple[int, int] = (1, 1_000_000)
    choices: Mapping[str, Any] = {}
    kind: str = ""
    default: Any = None
    regression: Any = None
    requires: str = ""
    changes: bool = False
    shown: str = "that of data and learner"
    name: str = ""
    type: Any = None

    @property
    def argument(self) -> str:
        """As which its part takes it."""
        return self.overlays or self.name

    def wanted(self, value: Any, least: int | None = None) -> str | None:
        """What a value may be, where this one is none of it; `least` instead of that of the range."""
        if self.type in (int, tuple):
            low, high = self.range if least is None else (least, self.range[1])
            pair = self.type is tuple and isinstance(value, list | tuple) and len(value) == 2
            numbers = tuple(value) if pair else (value,)
            whole = all(isinstance(number, int) and not isinstance(number, bool) for number in numbers)
            if whole and all(low <= number <= high for number in numbers) and list(numbers) == sorted(numbers):
                return None
            return f"a whole number from {low} to {high}" + (", or two, the least and the most" if pair else "")
        if self.type is float:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            return None if number and 0 < value < math.inf else "a positive number"
        if self.type is str:
            return None if isinstance(value, str) else "a text"
        named = isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
        return None if named else "names with their values"


def setting(help: str = "", of: str | None = None, *, absent: Any = None, **declared: Any) -> Any:
    """A field that is a setting.

    Args:
        help: as of `Setting`.
        of: as of `Setting`.
        absent: what it is in a `config.json` that is older than the setting; `MISSING` where all have it.
        declared: the rest of `Setting`.

    Returns:
        The field.
    """
    where = {"default_factory": absent} if callable(absent) else {"default": absent}
    return dataclasses.field(**where, metadata={"setting": Setting(help, of, **declared)})  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of a run, as its `config.json` holds them; None where one has no meaning for the learner or data."""

    learner: str = setting("One of `jmeta list`.", absent=MISSING, default="maml", shown="maml")
    data: str = setting(
        "One of `jmeta list`, or a path: a folder of images, an .npz, a .csv or .parquet table.",
        absent=MISSING,
        default="glyphs",
        shown="glyphs",
    )
    model: str = setting(
        "One of `jmeta list`, package.module:Name of a Linen or NNX class whose argument `outputs` is the width of its "
        "last layer, or the folder of a `jmeta search`.",
        absent=MISSING,
    )

    ways: int | None = setting("Classes of an episode.", "data", range=(1, 10_000), default=5)
    shots: int | None = setting("Labelled examples a class.", "data", range=_FROM_0, default=1)
    queries: int = setting("Query examples a class.", "data", absent=MISSING, default=15)
    train_ways: int | None = setting(
        "Classes of a training episode, if other than --ways.",
        split="train",
        overlays="ways",
    )
    train_shots: int | tuple[int, int] | None = setting(
        "Labelled examples a class of a training episode, a range, if other than --shots.",
        split="train",
        overlays="shots",
    )
    train_queries: int = setting(
        "Query examples a class of a training episode, if other than --queries.",
        split="train",
        overlays="queries",
        absent=MISSING,
    )
    batch: int | None = setting(
        "Images of a batch, for a learner that pre-trains on all classes at once.",
        "data",
        split="train",
        range=(1, 10_000_000),
        default=64,
        requires="pretrains",
    )
    unlabelled: int | None = setting(
        "Examples a class without a label in the support, for a learner that uses them.",
        "data",
        range=_FROM_0,
        requires="unlabelled",
    )
    distractors: int | None = setting(
        "Further classes that have such examples.", "data", range=(0, 10_000), requires="unlabelled"
    )
    descriptions: str | None = setting("Descriptions of the classes: attributes, text or similar.", "data")

    inner_rate: float | None = setting(
        "Inner rate α, on the mean loss of the support.",
        "learner",
        regression=0.01,  # as `jmeta.inner.rate_for`: a squared error has no bound
        changes=True,
    )
    inner_steps: int | None = setting("Inner steps in training.", "learner", range=_FROM_0, default=1)
    test_inner_steps: int | None = setting(
        "Inner steps at test, if other than --inner-steps.",
        split="test",
        overlays="inner_steps",
        changes=True,
    )
    inner_optimizer: str | None = setting(
        "Inner optimiser: {}.", "learner", choices=INNER_OPTIMIZERS, kind="inner optimiser"
    )
    distance: str | None = setting(
        "Distance kernel: {}.", "learner", choices=DISTANCES, kind="distance", default="squared_euclidean"
    )
    options: Mapping[str, Any] = setting(
        "Options of the learner, as `--options proximal=2.0`; its documentation lists them.", absent=dict
    )

    norm: str | None = setting("Normalisation of the network: {}.", "model", choices=_NORMS, kind="normalisation")
    dtype: str | None = setting(
        "Of the computation: {}; parameters are float32.", "model", choices=_DTYPES, kind="dtype", default="float32"
    )
    network: Mapping[str, Any] = setting(
        "Options of the network, as `--network features=32 spatial=mean`; its documentation lists them.", absent=dict
    )

    from_: str | None = setting(
        "A run, or a file of weights (.safetensors, .npz, .pth), to start from; what does not match is drawn.",
        shown="all is drawn",
    )
    steps: int = setting("Meta-steps.", absent=MISSING, range=(1, 1_000_000_000), default=2000, changes=True)
    tasks: int = setting("Tasks of a meta-step.", absent=MISSING)
    outer_rate: float = setting(
        "Outer rate β, annealed to 0 over the steps.", absent=MISSING, default=1e-3, changes=True
    )
    devices: int | None = setting(
        "Devices over which the tasks of a meta-step are divided; of a CPU its cores.",
        range=(1, 100_000),
        changes=True,
        shown="1, on a CPU one a core that divides the tasks",
    )
    patience: int | None = setting(
        "End after so many validations, of 20 in a run, without a better one.",
        range=(1, 1_000_000_000),
        changes=True,
        shown="no end",
    )
    seed: int = setting("The same seed gives the same run.", absent=MISSING, range=_SEEDS, default=0, shown="0")

    own: Mapping[str, Any] = setting(absent=dict)  # what is known of data of one's own, with the settings of `Own`
    version: int = setting(absent=VERSION, default=VERSION)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Config":
        """The settings of values as JSON has them, where a range is a list."""
        ranges = {name: values.get(name) for name, declared in SETTINGS.items() if declared.type is tuple}
        pairs = {name: pair for name, pair in ranges.items() if isinstance(pair, list | tuple)}
        return cls(**{**values, **{name: low if low == high else (low, high) for name, (low, high) in pairs.items()}})

    @property
    def kind(self) -> str:
        """Of the tasks: classification, regression or environment."""
        return str(self.own["kind"]) if self.own else DATA[self.data].kind

    @property
    def metric(self) -> Callable[[Any, Any], Array]:
        """What is reported."""
        return METRICS[self.kind]

    def written(self, value: float, half: float | None = None) -> str:
        """A metric as it is read, accuracies in per cent, with half of its interval if that is given."""
        text = f"{100 * value:.1f} %" if self.kind == "classification" else f"{value:.3f}"
        return text if half is None else f"{text} ± {self.written(half)}"

    @property
    def entry(self) -> DataEntry:
        """The data, in the registry or of one's own."""
        return data_entry(self.data, asked(self.own))

    def arguments(self, part: str, split: str) -> dict[str, Any]:
        """The keyword arguments that settings are of a part of the run.

        Args:
            part: learner, model or data.
            split: `"train"`; any other is test.

        Returns:
            By name, a choice as what it stands for; without those that have no meaning.
        """
        here = (None, "train" if split == "train" else "test")
        taken = {
            name: declared for name, declared in SETTINGS.items() if declared.of == part and declared.split in here
        }
        return {
            declared.argument: declared.choices[value] if declared.choices else value
            for name, declared in taken.items()
            if (value := getattr(self, name)) is not None
        }


@dataclasses.dataclass(frozen=True)
class _Own:
    """Settings of data of one's own, arguments of `jmeta.data.own.read_own`; `Config.own` keeps them."""

    size: int = setting("Pixels of each side of the images of a folder; default: that of the images.", shown=_OF_OWN)
    channels: int = setting(
        "Of the images of a folder: 1 for greyscale, 3 for RGB; default: 3 if any has colours.", shown=_OF_OWN
    )
    split_seed: int = setting(
        "Of the division of classes of your own into training, validation and test.", range=_SEEDS, shown=_OF_OWN
    )
    group: str = setting("Of a table: the column that says which task a row belongs to.", shown=_OF_OWN)
    target: str = setting("Of a table: the column to predict.", shown=_OF_OWN)


def _declared(owner: Any) -> dict[str, Setting]:
    """The settings of the fields of a dataclass, each with its name and type."""
    types, found = get_type_hints(owner), dict[str, Setting]()
    for field in dataclasses.fields(owner):
        one, name = types[field.name], field.name
        *_, kind = [part for part in get_args(one) if part is not NoneType] if isinstance(one, UnionType) else [one]
        declared: Setting = field.metadata["setting"]
        if declared.overlays:
            declared = declared._replace(of=found[declared.overlays].of, range=found[declared.overlays].range)
        found[name] = declared._replace(name=name, type=get_origin(kind) or kind)
    return found


SETTINGS = _declared(Config)
OWN = _declared(_Own)
FLAGS = {name: declared for name, declared in (SETTINGS | OWN).items() if declared.help}


def flag(name: str) -> str:
    """A setting as it is written on the command line."""
    return "--" + name.rstrip("_").replace("_", "-")


def check_values(values: Mapping[str, Any], *, least: Mapping[str, int] | None = None) -> None:
    """Raises `ConfigError` for the first setting whose type or range is wrong; None is a setting that is not there.

    Args:
        values: by the names of the settings.
        least: instead of the least number of a setting, as 1 for the shots of a learner that reads no descriptions.

    Raises:
        ConfigError: names the setting, its value and what it may be.

    Example:
        >>> from jmeta.runs.config import check_values
        >>> check_values({"steps": 400, "outer_rate": 1e-3, "train_shots": (1, 5)})
    """
    for name, declared in (SETTINGS | OWN).items():
        value = values.get(name)
        if value is not None and (wanted := declared.wanted(value, (least or {}).get(name))):
            shown = str(value) if len(str(value)) <= 60 else f"{str(value)[:60]}…"
            raise ConfigError(f"{flag(name)} is {shown}; give {wanted}.")


def check_choices(values: Mapping[str, Any]) -> None:
    """Raises `UnknownNameError` for the first setting that is none of its choices.

    Args:
        values: by the names of the settings.

    Raises:
        UnknownNameError: names the nearest choice.
    """
    for name, declared in SETTINGS.items():
        if declared.choices and values.get(name) is not None:
            lookup(declared.choices, values[name], declared.kind)
