"""A trained run as one object: settings, learner, parameters, history, and the folder where they are kept."""

import contextlib
import dataclasses
import functools
import json
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jmeta.calibration import calibrate
from jmeta.core import Examples, MetaLearner, Params, State, Task, TaskSource
from jmeta.data.own import is_path
from jmeta.errors import CheckpointError, ConfigError, DataError
from jmeta.estimators import FewShotClassifier, FewShotPolicy, FewShotRegressor
from jmeta.evaluate import evaluate
from jmeta.files import write_whole
from jmeta.inputs import Standardisation
from jmeta.runs import settings
from jmeta.runs.checkpoint import latest_step, restore, save
from jmeta.runs.config import SETTINGS, VERSION, Config, check_values
from jmeta.runs.own import data_entry, found_out
from jmeta.runs.registry import DATA
from jmeta.runs.shapes import from_json, to_json
from jmeta.runs.start import started
from jmeta.step import TrainState
from jmeta.train import Metrics, fit

LAST, BEST = "checkpoint", "best"  # the folders of the last checkpoint, and of the best one by validation
_ROW = {"step", "loss", "seconds"}  # what a row of metrics.jsonl has


@dataclasses.dataclass(frozen=True)
class Run:
    """Settings, what was learned by them, and how it went; `jmeta.load` reads one, `Run.begin` starts one.

    Args:
        config: the settings, as `config.json` holds them.
        train_state: θ, state and all else that the next meta-step needs.
        history: the rows of `metrics.jsonl`.
        best: the `TrainState` of the best validation, which is what is evaluated and adapted; None for the last one.
        shapes: a task of shapes of training and of test, as far as they are known without the data.
        measured_temperature: of the probabilities, where it was measured before.

    Example:
        >>> import jmeta
        >>> run = jmeta.Run.begin(learner="maml", data="sinusoid", tasks=4).fit(steps=20)
        >>> run.evaluate(episodes=10)["metric"]
        'mean_squared_error'
    """

    config: Config
    train_state: TrainState
    history: Sequence[Mapping[str, Any]] = ()
    best: TrainState | None = None
    shapes: Mapping[str, Task] = dataclasses.field(default_factory=dict)
    measured_temperature: float | None = None

    @classmethod
    def begin(cls, learner: str | None = None, data: str | None = None, **options: Any) -> "Run":
        """A run before its first meta-step.

        Args:
            learner: a name of the registry; default maml.
            data: a name of the registry; default glyphs.
            options: the flags of `jmeta train`, with underscores; `from_` for `--from`, which warns of what is drawn.

        Returns:
            The run.

        Raises:
            UnknownNameError: a name is in no registry.
            ConfigError: a setting that has no meaning here, or a value that cannot work.
        """
        config = settings.resolve(learner, data, **options)
        source = settings.make_source(config, "train")
        begin, matched = started(config, settings.begin(config, settings.make_learner(config, source), source))
        if matched is not None and not matched.whole:
            warnings.warn(str(matched), stacklevel=2)
        return cls(config, begin)

    def __repr__(self) -> str:
        step, of = int(self.train_state.step), self.config.steps
        return f"Run({self.config.learner} on {self.config.data}, {self.config.model}, step {step} of {of})"

    @property
    def params(self) -> Params:
        """θ, of the best validation where there was one."""
        return self.used.params

    @property
    def state(self) -> State:
        """The learner's state beside θ."""
        return self.used.state

    @property
    def used(self) -> TrainState:
        """What is evaluated and adapted: the best by validation where there was one, else the last."""
        return self.best or self.train_state

    def source(self, split: str = "test", **sizes: int | float) -> TaskSource:
        """The tasks of a split; `ways`, `shots`, `queries` instead of the run's, and `query_balance`."""
        if split not in ("train", "validation", "test"):
            raise ConfigError(f"there is no split {split!r}; choose test, validation or train.")
        return _source(_hashable(self.config), split, tuple(sorted(sizes.items())))

    def learner_for(
        self, source: TaskSource | Task, inner_steps: int | None = None, split: str = "train"
    ) -> MetaLearner:
        """The learner as of a split, with a network that fits some tasks and perhaps other inner steps."""
        return settings.make_learner(self.config, source, split, inner_steps=inner_steps)

    @property
    def learner(self) -> MetaLearner:
        """The learner as it is tested."""
        return self.learner_for(self.shapes.get("test") or self.source("test"), split="test")

    def fit(self, *, steps: int | None = None, mesh: jax.sharding.Mesh | None = None) -> "Run":
        """Goes on with meta-training.

        Args:
            steps: meta-steps in all. Default: those of the settings. With more, the outer rate goes on by the schedule
                of a run of so many steps, so that it is larger at once than it was at the end.
            mesh: devices over which the tasks are divided, see `jmeta.fit`. Default: one device.

        Returns:
            The run afterwards; this one stays as it is.
        """
        config = self.config if steps is None else dataclasses.replace(self.config, steps=steps)
        source = self.source("train")
        rows: list[Mapping[str, Any]] = list(self.history)
        begun = time.monotonic() - (rows[-1]["seconds"] if rows else 0.0)

        def note(train_state: TrainState, metrics: Metrics) -> None:
            rows.append({**metrics, "seconds": round(time.monotonic() - begun, 2)})

        fitted = fit(
            jax.random.key(config.seed),
            self.learner_for(source),
            source,
            optimizer=settings.make_optimizer(config),
            steps=config.steps,
            tasks=config.tasks,
            log_every=max(1, config.steps // 100),
            train_state=self.train_state,
            callback=note,
            mesh=mesh,
        )
        return Run(config, fitted.train_state, rows)

    def evaluate(
        self,
        split: str = "test",
        *,
        episodes: int = 600,
        seed: int = 1,
        inner_steps: int | None = None,
        details: bool = False,
        open_set: bool = False,
        mesh: jax.sharding.Mesh | None = None,
        **sizes: int | float,
    ) -> dict[str, Any]:
        """Adapts to unseen tasks and measures the answers.

        Args:
            split: `"train"`, `"validation"` or `"test"`.
            episodes: number of tasks.
            seed: the same seed gives the same tasks.
            inner_steps: instead of the run's.
            details: whether the result has `"details"`: confusion matrix, accuracy by class, the rows that were wrong.
            open_set: whether there are queries of no class, see `jmeta.evaluate`; those that the data have for it, else
                those of other classes.
            mesh: devices over which the episodes are divided, see `jmeta.evaluate`. Default: one device.
            sizes: `ways`, `shots`, `queries` instead of the run's, and `query_balance`, see `jmeta.from_arrays`.

        Returns:
            As `jmeta.evaluate`, with the name of the `"metric"` and the protocol of the run.
        """
        source = self.source(split, **sizes)
        steps = self.config.test_inner_steps if inner_steps is None else inner_steps
        metric = self.config.metric
        key, learner = jax.random.key(seed), self.learner_for(source, inner_steps, "test")
        asked: dict[str, Any] = {"episodes": episodes, "metric": metric, "details": details, "mesh": mesh}
        asked["open_set"] = settings.unknown(self.config, split) if open_set else False
        result = evaluate(key, learner, self.params, self.state, source, **asked)
        about = {**settings.protocol(self.config), "test_inner_steps": steps, "seed": seed}
        return {"split": split, "metric": metric.__name__, **result, **about}

    @property
    def input_shape(self) -> tuple[int, ...]:
        """That of one example, `()` where there are none."""
        support = (self.shapes.get("test") or settings.shapes_of(self.source("test"))).support
        return tuple(support.inputs.shape[1:]) if isinstance(support, Examples) else ()

    def on(self, data: str, **own: Any) -> "Run":
        """The same parameters on other data, to be evaluated across domains.

        Args:
            data: a name of the registry, or a path.
            own: what `jmeta.data.own.read_own` takes, for a path.

        Returns:
            The run, whose `source` and `evaluate` are on the other data.

        Raises:
            ConfigError: data of another kind.
            DataError: inputs of another shape.
        """
        if is_path(data) and data not in DATA:
            data = str(Path(data).expanduser().absolute())
        shape = self.input_shape
        if (
            data not in DATA and Path(data).is_dir() and len(shape) == 3
        ):  # images are brought to what the run was trained with
            own = {"size": shape[0] if shape[0] == shape[1] else shape[:2], "channels": shape[2]} | own
        if Path(data).suffix in (".csv", ".parquet"):  # a table has the columns of the one that was trained on
            own = {name: self.config.own[name] for name in ("group", "target") if name in self.config.own} | own
        entry = data_entry(data, own)
        if entry.kind != self.config.kind:
            raise ConfigError(
                f"{data} is a {entry.kind}, and the run was trained on a {self.config.kind}; give data of that kind."
            )
        about = {**own, **found_out(entry)} if entry.division else {}
        other = dataclasses.replace(self, config=dataclasses.replace(self.config, data=data, own=about), shapes={})
        there = other.input_shape
        if shape != there:
            raise DataError(
                f"{data} has inputs of shape {list(there)}, and the run {list(shape)}; bring them to that shape."
            )
        return other

    def classifier(self) -> FewShotClassifier:
        """The run in the manner of scikit-learn, for tasks of your own, calibrated on validation tasks."""
        asked = self.config.ways * self.config.queries if self.config.ways else None
        return FewShotClassifier(
            self.learner,
            self.params,
            self.state,
            queries=asked,
            input_shape=self.input_shape,
            temperature=self.temperature,
        )

    @functools.cached_property
    def temperature(self) -> float:
        """At which its probabilities fit the run's validation tasks, see `jmeta.calibrate`; measured once."""
        if self.measured_temperature is not None:
            return self.measured_temperature
        key, source = jax.random.key(0), self.source("validation")
        return calibrate(key, self.learner, self.params, self.state, source, episodes=50)

    def regressor(self) -> FewShotRegressor:
        """The same for a run of regression."""
        if self.config.kind != "regression":
            raise ConfigError(f"{self.config.data} is no regression; take run.classifier().")
        kept = self.config.own.get("standardisation")
        by = Standardisation(**kept) if kept else None
        return FewShotRegressor(self.learner, self.params, self.state, input_shape=self.input_shape, standardisation=by)

    def policy(self) -> FewShotPolicy:
        """The same for a run that acts: a policy that adapts to an environment of your own.

        Raises:
            ConfigError: the run does not act.
        """
        if self.config.kind != "environment":
            raise ConfigError(f"{self.config.data} is no environment; take run.classifier() or run.regressor().")
        source = self.source("test")
        like = jax.tree.map(jnp.zeros_like, jax.eval_shape(source.sample, jax.random.key(0), source.data)).support
        return FewShotPolicy(self.learner, self.params, self.state, like=like)

    def save(self, folder: str | Path) -> None:
        """Writes a run folder, which `jmeta.load`, `jmeta evaluate`, `jmeta adapt` and `--resume` read.

        Args:
            folder: new, or that of the same settings.

        Raises:
            CheckpointError: the folder holds a run of other settings.
        """
        folder = Path(folder).expanduser()
        if (folder / "config.json").exists():
            same = dataclasses.replace(read_config(folder), steps=self.config.steps)
            if same != self.config:
                raise CheckpointError(f"{folder} holds a run of other settings; choose another folder.")
        folder.mkdir(parents=True, exist_ok=True)
        write_settings(folder, self.config, self.history, {split: self.source(split) for split in ("train", "test")})
        save(folder / LAST, self.train_state)
        if self.best is not None:
            save(folder / BEST, self.best)


def load(folder: str | Path, *, checkpoint: str = BEST) -> Run:
    """Reads a run folder of `jmeta train` or of `Run.save`.

    Args:
        folder: as given by `--out`.
        checkpoint: which parameters are evaluated and adapted: the `"best"` by validation, or the `"last"`. Training
            goes on from the last in any case.

    Returns:
        The run.

    Raises:
        CheckpointError: it is no run folder, or it is damaged.
        ConfigError: another checkpoint than these two.

    Example:
        >>> import jmeta, tempfile
        >>> folder = tempfile.mkdtemp()
        >>> jmeta.Run.begin(learner="maml", data="sinusoid", tasks=4).fit(steps=10).save(folder)
        >>> int(jmeta.load(folder).train_state.step)
        10
    """
    if checkpoint not in ("best", "last"):
        raise ConfigError(f"there is no checkpoint {checkpoint!r}; choose best or last.")
    folder = Path(folder).expanduser()
    config = read_config(folder)
    shapes = read_shapes(folder)
    source = shapes.get("train") or settings.make_source(config, "train")
    like = settings.like(config, settings.make_learner(config, source), source)
    has_best = checkpoint == BEST and latest_step(folder / BEST) is not None
    best = restore(folder / BEST, like) if has_best else None
    run = Run(config, restore(folder / LAST, like), read_rows(folder), best, shapes)
    return dataclasses.replace(run, measured_temperature=_read_temperature(folder, int(run.used.step)))


def write_settings(
    folder: Path, config: Config, rows: Sequence[Mapping[str, Any]], sources: Mapping[str, TaskSource]
) -> None:
    """All of a run folder but its checkpoints: the settings, the rows, and the shapes of its tasks."""
    write_whole(folder / "config.json", json.dumps(dataclasses.asdict(config), indent=2) + "\n")
    write_whole(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    shapes = {split: to_json(settings.shapes_of(source)) for split, source in sources.items()}
    write_whole(folder / "shapes.json", json.dumps({k: v for k, v in shapes.items() if v}, indent=2) + "\n")


def write_temperature(folder: Path, run: Run) -> None:
    """Keeps what was measured on validation tasks, so that the run answers without its data."""
    measured = {"step": int(run.used.step), "temperature": run.temperature}
    write_whole(folder / "calibration.json", json.dumps(measured) + "\n")


def _read_temperature(folder: Path, step: int) -> float | None:
    """That of the parameters of a step; of others, as when the run went on, it says nothing."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        stored = json.loads((folder / "calibration.json").read_text())
        return float(stored["temperature"]) if stored["step"] == step else None
    return None


def read_shapes(folder: Path) -> Mapping[str, Task]:
    """The shapes of a run's tasks; none for a run of version 0.1 or of an environment, whose source is asked."""
    try:
        stored = json.loads((folder / "shapes.json").read_text())
        return {split: from_json(task) for split, task in stored.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def read_config(run: Path) -> Config:
    """The settings of a run folder; those of a run before version 0.2 with the network that it had."""
    try:
        found = _today(json.loads((run / "config.json").read_text()))
        check_values(found)
        stored = Config.of(found)
        if stored.version == VERSION and (stored.own or found.keys() == SETTINGS.keys()):
            settings.check_names(stored)
            return stored
        return settings.resolve(**dataclasses.asdict(stored))  # what an older version did not tell
    except (FileNotFoundError, NotADirectoryError):
        if seeds := sorted(str(file.parent) for file in run.glob("*/config.json")):
            raise CheckpointError(f"{run} holds several runs; name one of {', '.join(seeds)}.") from None
        raise CheckpointError(
            f"{run} is no run of jmeta: it has no config.json; name a folder given as --out."
        ) from None
    except (ValueError, TypeError, OSError, RecursionError, AttributeError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise CheckpointError(
            f"{run}/config.json is damaged or of another version of jmeta ({reason}); train anew, or name another run."
        ) from error


def read_rows(run: Path) -> list[dict[str, Any]]:
    """The rows of `metrics.jsonl` that are whole; a kill may have cut the last line."""
    file = run / "metrics.jsonl"
    rows: list[dict[str, Any]] = []
    for line in file.read_text(errors="replace").splitlines() if file.exists() else []:
        with contextlib.suppress(ValueError):  # damage costs the lines that it hit, and no others
            row = json.loads(line)
            if isinstance(row, dict) and row.keys() >= _ROW:
                rows.append(row)
    return rows


def _today(stored: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run as they are named now; the networks that runs before version 0.2 had keep their form."""
    if "batch_norm" not in stored:
        return stored
    norm, former = stored.pop("batch_norm"), {"conv4": "conv4-maml", "conv4-max": "conv4-maml-max"}
    scale = {"network": {"scale": True}} if stored["learner"] == "maml_plus_plus" and norm is not None else {}
    return {**stored, "norm": norm, "model": former.get(stored["model"], stored["model"]), **scale}


def _hashable(config: Config) -> str:
    return json.dumps(dataclasses.asdict(config), sort_keys=True)


@functools.lru_cache(maxsize=8)
def _source(config: str, split: str, sizes: tuple[tuple[str, int | float], ...]) -> TaskSource:
    return settings.make_source(Config.of(json.loads(config)), split, **dict(sizes))
