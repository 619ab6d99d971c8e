"""A trained run as one object: settings, learner, parameters, history, and the folder where they are kept."""

import contextlib
import dataclasses
import functools
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jmeta import experiment
from jmeta.calibration import calibrate
from jmeta.checkpoint import restore, save, write_whole
from jmeta.core import MetaLearner, Params, State, TaskSource
from jmeta.data import DATA
from jmeta.errors import CheckpointError, ConfigError
from jmeta.estimators import FewShotClassifier, FewShotRegressor
from jmeta.experiment import Config
from jmeta.losses import softmax_cross_entropy
from jmeta.train import Metrics, TrainState, evaluate, fit

_ROW = {"step", "loss", "seconds"}  # what a row of metrics.jsonl has


@dataclasses.dataclass(frozen=True)
class Run:
    """Settings, what was learned by them, and how it went; `jmeta.load` reads one, `Run.begin` starts one.

    Args:
        config: the settings, as `config.json` holds them.
        train_state: θ, state and all else that the next meta-step needs.
        history: the rows of `metrics.jsonl`.

    Example:
        >>> import jmeta
        >>> run = jmeta.Run.begin(learner="maml", data="sinusoid", tasks=4).fit(steps=20)
        >>> run.evaluate(episodes=10)["metric"]
        'mean_squared_error'
    """

    config: Config
    train_state: TrainState
    history: Sequence[Mapping[str, Any]] = ()

    @classmethod
    def begin(cls, learner: str | None = None, data: str | None = None, **settings: Any) -> "Run":
        """A run before its first meta-step.

        Args:
            learner: a name of the registry; default maml.
            data: a name of the registry; default glyphs.
            settings: the flags of `jmeta train`, with underscores.

        Returns:
            The run.

        Raises:
            UnknownNameError: a name is in no registry.
            ConfigError: a setting that has no meaning here, or a value that cannot work.
        """
        config = experiment.resolve(learner, data, **settings)
        source = experiment.make_source(config, "train")
        return cls(config, experiment.begin(config, experiment.make_learner(config, source), source))

    @property
    def params(self) -> Params:
        """θ."""
        return self.train_state.params

    @property
    def state(self) -> State:
        """The learner's state."""
        return self.train_state.state

    def source(self, split: str = "test", **sizes: int) -> TaskSource:
        """The tasks of a split, train, validation or test; `ways`, `shots`, `queries` instead of the run's."""
        if split not in ("train", "validation", "test"):
            raise ConfigError(f"there is no split {split!r}; choose test, validation or train.")
        return _source(_hashable(self.config), split, tuple(sorted(sizes.items())))

    def learner_for(self, source: TaskSource, inner_steps: int | None = None) -> MetaLearner:
        """The learner with a network that fits some tasks, and other inner steps than in training."""
        return experiment.make_learner(self.config, source, inner_steps=inner_steps)

    @property
    def learner(self) -> MetaLearner:
        """The learner as it is tested."""
        return self.learner_for(self.source("test"), self.config.test_inner_steps)

    def fit(self, *, steps: int | None = None) -> "Run":
        """Goes on with meta-training.

        Args:
            steps: meta-steps in all. Default: those of the settings. With more, the outer rate goes on by the schedule
                of a run of so many steps, so that it is larger at once than it was at the end.

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
            optimizer=experiment.make_optimizer(config),
            steps=config.steps,
            tasks=config.tasks,
            log_every=max(1, config.steps // 100),
            train_state=self.train_state,
            callback=note,
        )
        return Run(config, fitted.train_state, rows)

    def evaluate(
        self, split: str = "test", *, episodes: int = 600, seed: int = 1, inner_steps: int | None = None, **sizes: int
    ) -> dict[str, Any]:
        """Adapts to unseen tasks and measures the answers.

        Args:
            split: `"train"`, `"validation"` or `"test"`.
            episodes: number of tasks.
            seed: the same seed gives the same tasks.
            inner_steps: instead of the run's.
            sizes: `ways`, `shots`, `queries` instead of the run's.

        Returns:
            As `jmeta.evaluate`, with the name of the `"metric"` and the protocol of the run.
        """
        source = self.source(split, **sizes)
        steps = self.config.test_inner_steps if inner_steps is None else inner_steps
        metric = DATA[self.config.data].metric
        key, learner = jax.random.key(seed), self.learner_for(source, steps)
        result = evaluate(key, learner, self.params, self.state, source, episodes=episodes, metric=metric)
        about = {**experiment.protocol(self.config), "test_inner_steps": steps, "seed": seed}
        return {"split": split, "metric": metric.__name__, **result, **about}

    def classifier(self) -> FewShotClassifier:
        """The run in the manner of scikit-learn, for tasks of your own, calibrated on validation tasks."""
        asked = self.config.ways * self.config.queries if self.config.ways else None
        return FewShotClassifier(self.learner, self.params, self.state, queries=asked, temperature=self.temperature)

    @functools.cached_property
    def temperature(self) -> float:
        """At which its probabilities fit the run's validation tasks, see `jmeta.calibrate`; measured once."""
        key, source = jax.random.key(0), self.source("validation")
        return calibrate(key, self.learner, self.params, self.state, source, episodes=50)

    def regressor(self) -> FewShotRegressor:
        """The same for a run of regression."""
        if DATA[self.config.data].loss is softmax_cross_entropy:
            raise ConfigError(f"{self.config.data} is no regression; take run.classifier().")
        return FewShotRegressor(self.learner, self.params, self.state)

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
        write_whole(folder / "config.json", json.dumps(dataclasses.asdict(self.config), indent=2) + "\n")
        write_whole(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in self.history))
        save(folder / "checkpoint", self.train_state)


def load(folder: str | Path) -> Run:
    """Reads a run folder of `jmeta train` or of `Run.save`.

    Args:
        folder: as given by `--out`.

    Returns:
        The run as it was at its last checkpoint.

    Raises:
        CheckpointError: it is no run folder, or it is damaged.

    Example:
        >>> import jmeta, tempfile
        >>> folder = tempfile.mkdtemp()
        >>> jmeta.Run.begin(learner="maml", data="sinusoid", tasks=4).fit(steps=10).save(folder)
        >>> int(jmeta.load(folder).train_state.step)
        10
    """
    folder = Path(folder).expanduser()
    config = read_config(folder)
    return Run(config, read_train_state(folder, config), read_rows(folder))


def read_config(run: Path) -> Config:
    """The settings of a run folder; those of a run before version 0.2 with the network that it had."""
    try:
        stored = Config(**_today(json.loads((run / "config.json").read_text())))
        return experiment.resolve(**dataclasses.asdict(stored))
    except FileNotFoundError:
        raise CheckpointError(
            f"{run} is no run of jmeta: it has no config.json; name a folder given as --out."
        ) from None
    except (ValueError, TypeError, OSError) as error:
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


def read_train_state(run: Path, config: Config) -> TrainState:
    """The newest checkpoint of a run folder."""
    source = experiment.make_source(config, "train")
    learner = experiment.make_learner(config, source)
    return restore(run / "checkpoint", jax.eval_shape(lambda: experiment.begin(config, learner, source)))


def _hashable(config: Config) -> str:
    return json.dumps(dataclasses.asdict(config), sort_keys=True)


@functools.lru_cache(maxsize=8)
def _source(config: str, split: str, sizes: tuple[tuple[str, int], ...]) -> TaskSource:
    return experiment.make_source(Config(**json.loads(config)), split, **dict(sizes))
