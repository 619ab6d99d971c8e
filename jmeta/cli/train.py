"""`jmeta train`."""

import dataclasses
import json
import os
import sys
import time
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro
from rich.console import Console
from rich.table import Table

from jmeta.cli.show import as_json, interval, print_result, progress, result_table
from jmeta.errors import CheckpointError, ConfigError, JmetaError, lookup
from jmeta.files import write_whole
from jmeta.metrics import seeds_interval
from jmeta.runs import hosts, settings, sweeping
from jmeta.runs.assessment import assess
from jmeta.runs.checkpoint import latest_step
from jmeta.runs.config import FLAGS, OWN, Config, Setting, flag
from jmeta.runs.loggers import LOGGERS
from jmeta.runs.run import LAST, Run, read_config
from jmeta.runs.stopping import LOCK, Signals, only_writer, say
from jmeta.runs.training import on_all_cores, on_resume, parts_of, resumed, steps_within, train

_TYPES: Mapping[Any, tuple[Any, str]] = {  # of a setting: that of its flag, and how the help shows a value
    int: (int | None, "INT"),
    float: (float | None, "FLOAT"),
    str: (str | None, "NAME"),
    tuple: (tuple[int, int] | None, "LEAST MOST"),
    Mapping: (tuple[str, ...], "NAME=VALUE ..."),
}


def _flag_of(setting: Setting) -> tuple[str, Any, Any]:
    """The field that is its flag; None, or no pair of name and value, where it is not given."""
    kind, metavar = _TYPES[setting.type]
    *most, last = setting.choices or ("",)
    text = setting.help.format(f"{', '.join(most)} or {last}")
    name = flag(setting.name).removeprefix("--")  # `from_`, as no name in Python may be `from`
    about = tyro.conf.arg(name=name, metavar=metavar, help=text, help_behavior_hint=f"(default: {setting.shown})")
    return setting.name, Annotated[kind, about], () if setting.type is Mapping else None


def _of_hosts(metavar: str) -> Any:
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="(default: that of Slurm, Cloud TPU or MPI)")


_Settings: Any = dataclasses.make_dataclass("_Settings", map(_flag_of, FLAGS.values()), frozen=True)


@dataclasses.dataclass(frozen=True)
class Train(_Settings):
    """Meta-train a learner, evaluate it on unseen tasks, and write a run folder."""

    minutes: Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="(default: by --steps)")] = None
    """As many meta-steps as fit into so many minutes of this machine, instead of --steps."""
    seeds: Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT ...", help_behavior_hint="(default: one run)")] = ()
    """A run for each seed, in a folder each, and a table of their results."""
    sweep: Annotated[
        tuple[str, ...], tyro.conf.arg(metavar="NAME=VALUE,VALUE ...", help_behavior_hint="(default: none)")
    ] = ()
    """Numbers of the learner, as `inner_rate=0.1,0.2,0.4`: all values at once, in each of --seeds, and a table."""
    config: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: none)")] = None
    """A TOML file of flags, as `steps = 400`; flags of the command line come on top."""
    print_config: bool = False
    """Print all settings as TOML, and end."""
    log: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...", help_behavior_hint="(default: JSON lines)")] = ()
    """Where the curves go as well: csv, tensorboard, wandb."""
    no_report: bool = False
    """Leave the evaluation on unseen tasks to `jmeta evaluate`."""
    out: Path = Path("runs/demo")
    """The run folder."""
    resume: bool = False
    """Go on from the last checkpoint of the run folder, if there is one."""
    distributed: bool = False
    """Train with the other processes of a job, on several hosts; Slurm, Cloud TPU or MPI tell which. The environment
    variable JMETA_DISTRIBUTED=1 is the same."""
    coordinator: Annotated[str | None, _of_hosts("HOST:PORT")] = None
    """Where process 0 of --distributed is, and a free port of that host."""
    processes: Annotated[int | None, _of_hosts("INT")] = None
    """How many processes --distributed has."""
    process_id: Annotated[int | None, _of_hosts("INT")] = None
    """Which of the processes of --distributed this is, from 0."""

    def run(self, signals: Signals) -> None:
        """Trains, evaluates and prints."""
        if self.print_config:
            print(_toml(self._resolved()[0]))
            return
        told = (self.coordinator, self.process_id, self.processes)
        if self.distributed or os.environ.get("JMETA_DISTRIBUTED") == "1":
            with hosts.together(*told):
                self._run(signals)
        elif any(value is not None for value in told):
            raise ConfigError(
                "--coordinator, --processes and --process-id are of several processes; add --distributed."
            )
        else:
            self._run(signals)

    def _run(self, signals: Signals) -> None:
        for name in self.log:
            lookup(LOGGERS, name, "logger")
        if self.sweep:
            self._sweep()
            return
        if not self.seeds:
            self._one(signals)
            return
        if len(self.seeds) < 2:
            raise ConfigError("--seeds has one seed, of which there is no interval; give more, or --seed.")
        if len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"--seeds {' '.join(map(str, self.seeds))} names a seed twice; give different ones.")
        results = []
        for seed in self.seeds:
            changes: dict[str, Any] = {"seed": seed, "seeds": (), "out": self.out / f"seed-{seed}"}
            one = dataclasses.replace(self, **changes)
            _tell(f"seed {seed}")
            results.append(one._one(signals))
        if not self.no_report and hosts.is_first():
            _print_seeds(self, [result for result in results if result is not None])

    def _sweep(self) -> None:
        """Writes the table of a sweep, and prints it."""
        if hosts.several():
            raise ConfigError("--distributed has no meaning for a sweep; leave it away.")
        for name in ("from_", "minutes", "patience", "log", "resume"):
            if getattr(self, name):
                raise ConfigError(f"{flag(name)} has no meaning for a sweep; leave it away.")
        if (self.out / "config.json").exists():
            raise CheckpointError(f"{self.out} is a run; choose another --out for the sweep.")
        config = self._resolved()[0]
        values = sweeping.values_of(self.sweep, config.learner)
        with only_writer(self.out):
            swept = sweeping.sweep_of(config, values, self.seeds)
            sweeping.write(self.out, config, swept, as_json)
        print(f"{config.data}, {config.learner}: validation tasks, 95 % interval\n\n{swept.table()}\n")
        print(f"written to {self.out}/")

    def hint(self) -> str:
        """How to go on after an interruption."""
        begun = (self.out / "config.json").exists()
        return f"; go on by `jmeta train --resume --out {self.out}`" if begun else ""

    def _given(self) -> dict[str, Any]:
        given = {name: value for name in FLAGS if (value := getattr(self, name)) not in (None, ())}
        for name in [name for name in given if FLAGS[name].type is Mapping]:
            given[name] = dict(named(name, option) for option in given[name])
        if hosts.several():
            there = jax.device_count()
            if given.setdefault("devices", there) != there:  # which a run that goes on takes as well
                raise ConfigError(f"--devices is {self.devices}, and the job has {there}; leave the flag away.")
        return given

    def _resolved(self) -> tuple[Config, list[str]]:
        """The settings of a new run, or of one to go on with and what changes in it; never mixes two in one folder."""
        given, out = self._given(), self.out
        if self.minutes is not None and self.steps is not None:
            raise ConfigError(
                f"--minutes {self.minutes:g} and --steps {self.steps} both say how long to train; give one of them."
            )
        if self.minutes is not None and not 0 < self.minutes < 1e6:
            raise ConfigError(f"--minutes is {self.minutes}; give a positive number below 1,000,000.")
        if not (out / "config.json").exists():
            others = not out.is_dir() or any(
                file.suffix != ".part" and file.name != LOCK and not file.name.startswith("seed-")
                for file in out.iterdir()
            )
            if out.exists() and others and not self.print_config:
                raise CheckpointError(f"{out} exists and is no run of jmeta; choose another --out.")
            return settings.resolve(**given), []
        if self.print_config:
            return read_config(out) if self.resume else settings.resolve(**given), []
        if not self.resume:
            raise CheckpointError(f"{out} exists; add --resume to go on with it, or choose another --out.")
        stored = read_config(out)
        asked = settings.resolve(
            **{"learner": stored.learner, "data": stored.data, "model": stored.model}
            | {name: stored.own[name] for name in OWN if name in stored.own}
            | given
        )
        changed = {name: value for name, value in given.items() if FLAGS[name].changes}
        for name in given.keys() - changed.keys():
            there, value = ((run.own if name in OWN else vars(run)).get(name) for run in (stored, asked))
            if value != there:
                raise ConfigError(
                    f"{out} was trained with {flag(name)} {there}, not {value}; leave the flag away to go on with it, "
                    "or choose another --out."
                )
        return on_resume(stored, changed)

    def _one(self, signals: Signals) -> Mapping[str, Any] | None:
        config = self._resolved()[0]
        hosts.check_same(settings=dataclasses.asdict(config))
        saved = latest_step(self.out / LAST)
        known = config if (self.out / "config.json").exists() else on_all_cores(config)
        parts = parts_of(known, begun=saved is not None)
        if parts.matched is not None:
            _tell(str(parts.matched))
        with only_writer(self.out) if hosts.is_first() else nullcontext():
            if (self.out / "config.json").exists():  # which another process may have written while this one waited
                config, changes = self._resolved()
                parts = resumed(self.out, parts._replace(config=config))
                if changes:
                    _tell(f"going on with {', '.join(changes)}")
            elif self.minutes is not None:
                steps = hosts.of_first(steps_within(parts, self.minutes))
                parts = parts._replace(config=dataclasses.replace(parts.config, steps=steps))
                _tell(f"{steps} meta-steps fit into {self.minutes:g} minutes")
            config = parts.config
            hosts.check_same(settings=dataclasses.asdict(config), steps_done=int(parts.begin.step))
            begun = time.monotonic()
            loggers = [LOGGERS[name](self.out, config) for name in self.log if hosts.is_first()]
            with progress(shown=hosts.is_first()) as bars:
                bar = bars.add_task("meta-training", total=config.steps, completed=0, note="compiling")

                validations: list[str] = []

                def show(row: Mapping[str, Any]) -> None:
                    if "validation" in row:
                        validations.append(f"validation {config.written(row['validation'])}")
                    note = "  ".join([f"loss {row['loss']:.3f}", *validations[-1:]])
                    bars.update(bar, completed=row["step"], note=note)

                stopped = partial(_stopped, self)
                run = train(self.out, parts, signals, loggers=[show, *loggers], stopped=stopped)
            seconds = f"{time.monotonic() - begun:.0f} s"
            done = int(run.train_state.step)
            early = f" and ended at step {done} of {config.steps} by its patience" if done < config.steps else ""
            _tell(f"meta-training took {seconds}{early}")
            return self._report(run) if hosts.is_first() and not self.no_report else None

    def _report(self, run: Run) -> Mapping[str, Any]:
        print("evaluating on unseen tasks", file=sys.stderr)
        (_, result), *others = assess(run, self.out, partial(as_json, indent=2))
        table = result_table(run.config, result)
        for name, other in others:
            table.add_row(name, interval(run.config, other))
        print_result(run.config, result, table)
        print(f"written to {self.out}/")
        return result


def _tell(sentence: str) -> None:
    if hosts.is_first():
        print(sentence, file=sys.stderr)


def _stopped(flags: Train) -> None:
    hosts.quiet()
    say(f"interrupted{flags.hint()}.")


def with_file(arguments: Sequence[str]) -> list[str]:
    """The flags of the file of `--config`, in front of those of the command line, which therefore hold.

    Args:
        arguments: of `jmeta`.

    Returns:
        The same, longer.

    Raises:
        ConfigError: the file cannot be read.
    """
    arguments = list(arguments)
    named = [value for flag, value in pairwise(arguments) if flag == "--config"]
    named += [argument.removeprefix("--config=") for argument in arguments if argument.startswith("--config=")]
    if not named or arguments[0] != "train":
        return arguments
    file = Path(named[-1]).expanduser()
    try:
        stored = tomllib.loads(file.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"--config {file} cannot be read ({error}); give a TOML file of flags.") from error
    flags: list[str] = []
    for name, value in stored.items():
        if value is False:
            continue
        flags.append(f"--{name.replace('_', '-')}")
        if isinstance(value, Mapping):
            flags += [f"{option}={json.dumps(part).strip(chr(34))}" for option, part in value.items()]
        elif value is not True:
            flags += [str(part) for part in (value if isinstance(value, list) else [value])]
    return ["train", *flags, *arguments[1:]]


def defaults_of(arguments: Sequence[str]) -> str:
    """The settings that a run of `--learner`, `--data` and `--model` would have, for the end of the help."""
    named = {name: value for flag, value in pairwise(arguments) if (name := flag[2:]) in ("learner", "data", "model")}
    try:
        config = settings.resolve(**named)
    except JmetaError as error:
        return f"error: {error}"
    return f"Defaults of {config.learner} on {config.data}:\n\n{_toml(config)}"


def named(flag: str, option: str) -> tuple[str, str]:
    """Name and value of `NAME=VALUE`; `ConfigError` for what is none."""
    name, equals, value = option.partition("=")
    if not equals:
        raise ConfigError(f"--{flag} {option} has no value; write {name}=VALUE.")
    return name.replace("-", "_"), value


def _toml(config: Config) -> str:
    """Settings as a file for --config: what is None has no meaning for the run and is left out."""
    values = {name: (config.own if name in OWN else vars(config)).get(name) for name in FLAGS}
    for name, setting in FLAGS.items():
        if setting.type is tuple and isinstance(values[name], int):
            values[name] = [values[name]] * 2  # the flag takes a range
    return "\n".join(
        f"{name.rstrip('_')} = {_toml_value(value)}" for name, value in values.items() if value not in (None, {})
    )


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{name} = {_toml_value(part)}" for name, part in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return repr(value)


def _print_seeds(flags: Train, results: list[Mapping[str, Any]]) -> None:
    """Each seed with its interval over episodes, and their mean with that over seeds."""
    config = read_config(flags.out / f"seed-{flags.seeds[0]}")
    metric = config.metric.__name__
    table = Table("seed", f"{metric.replace('_', ' ')}, 95 % interval over episodes")
    for seed, result in zip(flags.seeds, results, strict=True):
        table.add_row(str(seed), interval(config, result))
    mean, half = seeds_interval([result[metric] for result in results])
    summary = {metric: mean, "ci95": half, "seeds": list(flags.seeds), "results": results}
    table.add_row(f"mean of {len(results)} seeds, 95 % interval over seeds", interval(config, summary))
    write_whole(flags.out / "seeds.json", as_json(summary, indent=2) + "\n")
    Console().print(table)
