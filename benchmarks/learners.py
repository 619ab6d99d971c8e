"""Every learner under one budget of wall time, on the same tasks: `python -m benchmarks.learners`.

A learner is trained by the settings of `jmeta train` with the network of its paper, whose batch norm is transductive,
for as many meta-steps as the budget holds at the rate that is measured before; compilation is apart. `--study ablation`
does the same for MAML++ with one part changed at a time.
"""

import inspect
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
import tyro
from rich.console import Console

import jmeta
from benchmarks.machine import environment
from jmeta.compilation import compiled
from jmeta.losses import accuracy
from jmeta.runs import settings
from jmeta.runs.registry import LEARNERS
from jmeta.train import _run as run

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("jax", "jaxlib", "flax", "optax")
PIXELS = "nearest mean on pixels"
EPISODES = 600


@dataclass(frozen=True, eq=False)
class Case:
    """What is trained.

    Args:
        label: the row of the table.
        learner: its name.
        data: the table.
        settings: of `jmeta train`, beside the defaults.
        options: of the learner, given the meta-steps that the budget holds.
        optimizer: `(β, steps) -> optax transformation` instead of the learner's own.
    """

    label: str
    learner: str
    data: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    options: Callable[[int], Mapping[str, Any]] = lambda steps: {}
    optimizer: Callable[[float, int], optax.GradientTransformation] | None = None

    @property
    def name(self) -> str:
        """One line; unique."""
        return f"{self.data}, {self.label}"


PAPERS = {"conv4": "conv4-maml", "conv4-max": "conv4-maml-max", "conv4-protonet": "conv4-maml-max"}


def of_the_paper(learner: str) -> dict[str, Any]:
    """The network of the papers, and tasks of one size."""
    defaults = LEARNERS[learner].defaults
    network: dict[str, Any] = {"model": PAPERS[defaults["model"]]}
    if LEARNERS[learner].pretrains:
        return network | {"norm": "running"}
    return network | ({"tasks": 4, "train_queries": 15} if defaults["tasks"] == 8 else {})


def learners() -> list[Case]:
    """Every learner that takes the data by itself."""
    regress = [name for name, entry in LEARNERS.items() if "loss" in inspect.signature(entry.make).parameters]
    images = [Case(name, name, "glyphs", of_the_paper(name)) for name, entry in LEARNERS.items() if not entry.acts]
    return [*images, *(Case(name, name, "sinusoid") for name in regress)]


def ablation() -> list[Case]:
    """MAML, MAML++, and MAML++ with one part changed."""

    def case(
        label: str,
        options: Callable[[int], Mapping[str, Any]] = lambda steps: {},
        settings: Mapping[str, Any] = {},
        **more: Any,
    ) -> Case:
        def annealed(steps: int) -> Mapping[str, Any]:
            return {"multi_step_loss": max(1, steps // 4), **options(steps)}

        return Case(label, "maml_plus_plus", "glyphs", {**network, **settings}, options=annealed, **more)

    network = of_the_paper("maml_plus_plus") | {"network": {"scale": True}}

    return [
        Case("MAML, 1 step", "maml", "glyphs", of_the_paper("maml")),
        Case("MAML, 5 steps, α 0.1", "maml", "glyphs", of_the_paper("maml") | {"inner_rate": 0.1, "inner_steps": 5}),
        case("MAML++"),
        case("without learned rates", lambda steps: {"learned_rates": False}),
        case("without multi-step loss", lambda steps: {"multi_step_loss": 0}),
        case("without batch norm per step", lambda steps: {"per_step_norm": False}),
        case("with running statistics", settings={"norm": "running"}),
        case("with derivative-order annealing", lambda steps: {"first_order_until": steps // 2}),
        case("without cosine annealing", optimizer=lambda rate, steps: optax.adam(rate)),
    ]


STUDIES = {"learners": learners, "ablation": ablation}


def measure(case: Case, seconds: float, seed: int) -> dict[str, Any]:
    """Trains one learner within the budget and evaluates it."""
    config = settings.resolve(case.learner, case.data, seed=seed, **case.settings)
    source, test = (settings.make_source(config, split) for split in ("train", "test"))

    def sized(steps: int) -> tuple[settings.Config, jmeta.MetaLearner, optax.GradientTransformation]:
        """The settings for so many meta-steps, with learner and optimiser."""
        options = {**config.options, **case.options(steps)}
        flags = {"steps": steps, "options": options, "seed": seed, **case.settings}
        own = settings.resolve(case.learner, case.data, **flags)
        optimizer = case.optimizer or LEARNERS[case.learner].optimizer
        return own, settings.make_learner(own, source), optimizer(own.outer_rate, steps)

    key = jax.random.key(seed)
    rate, compile_seconds, memory = _probe(key, *sized(1000)[1:], source, config.tasks)
    steps = max(20, int(rate * seconds))
    config, learner, optimizer = sized(steps)
    fitted = jmeta.fit(key, learner, source, optimizer=optimizer, steps=steps, tasks=config.tasks, log_every=10)
    tester = settings.make_learner(config, test, "test")
    metric = config.metric
    result = jmeta.evaluate(
        jax.random.key(1), tester, fitted.params, fitted.state, test, episodes=EPISODES, metric=metric
    )
    return {
        **result,
        "value": result[metric.__name__],
        "metric": metric.__name__,
        "steps": steps,
        "steps_per_second": rate,
        "compile_seconds": compile_seconds,
        "megabytes": memory / 1e6,
        "parameters": sum(x.size for x in jax.tree.leaves(fitted.params)),
        "inner_steps": config.inner_steps,
        "test_inner_steps": config.test_inner_steps,
        "model": config.model,
        "tasks": config.tasks,
        "seconds": seconds,
        "seed": seed,
    }


def _probe(
    key: jax.Array,
    learner: jmeta.MetaLearner,
    optimizer: optax.GradientTransformation,
    source: jmeta.TaskSource,
    tasks: int,
) -> tuple[float, float, int]:
    """Meta-steps a second, seconds of compilation, and temporary bytes of the compiled scan of `jmeta.fit`."""
    state = jmeta.init(key, learner, optimizer, source)
    arguments = (state, source.data, jnp.asarray(10**9, jnp.int32))
    begin = time.perf_counter()
    program = (
        compiled(run)
        .lower(
            *arguments,
            learner=learner,
            optimizer=optimizer,
            sample=source.sample,
            tasks=tasks,
            task_chunk=None,
            length=10,
        )
        .compile()
    )
    compile_seconds = time.perf_counter() - begin
    jax.block_until_ready(program(*arguments))
    calls, begin = 0, time.perf_counter()
    while (passed := time.perf_counter() - begin) < 2.0 or calls == 0:
        jax.block_until_ready(program(*arguments))
        calls += 1
    return 10 * calls / passed, compile_seconds, program.memory_analysis().temp_size_in_bytes


def main(
    study: Literal["learners", "ablation"] = "learners",
    seconds: float = 60.0,
    cases: tuple[str, ...] = (),
    seed: int = 0,
    resume: bool = False,
    results: Path = RESULTS,
) -> None:
    """Trains every learner for the same time, and writes one table and one picture.

    Args:
        study: all learners, or MAML++ with one part changed at a time.
        seconds: of meta-training for each learner, without compilation.
        cases: words that the name of a case must contain one of; all cases by default.
        seed: of training; the 600 test episodes are those of seed 1.
        resume: leave out the cases that are stored already.
        results: the folder of the results.
    """
    file = results / f"{study}.json"
    circumstances = {**environment(PACKAGES), "seconds": seconds, "seed": seed}
    content = json.loads(file.read_text()) if file.exists() else {}
    stored = content["cases"] if content.get("environment") == circumstances else {}
    every = STUDIES[study]()
    for case in every:
        if (cases and not any(word in case.name for word in cases)) or (resume and case.name in stored):
            continue
        stored[case.name] = measure(case, seconds, seed)
        print(case.name, f"{stored[case.name]['value']:.3f} ± {stored[case.name]['ci95']:.3f}", flush=True)
        jax.clear_caches()
        _write(file, circumstances, every, stored)
    if any(case.data == "glyphs" for case in every) and PIXELS not in stored:
        test = jmeta.glyphs(split="test")
        stored[PIXELS] = jmeta.evaluate(
            jax.random.key(1), jmeta.prototypical(jmeta.identity()), {}, {}, test, episodes=EPISODES
        )
    _write(file, circumstances, every, stored)
    rows = {case: stored[case.name] for case in every if case.name in stored}
    file.with_suffix(".md").write_text(markdown(study, circumstances, rows, stored.get(PIXELS)))
    picture(file.with_suffix(".png"), rows, stored.get(PIXELS))
    Console().print(f"stored in {file.with_suffix('')}.json, .md and .png")


def _write(file: Path, circumstances: Mapping[str, Any], every: list[Case], stored: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = {name: stored[name] for name in (*(case.name for case in every), PIXELS) if name in stored}
    file.write_text(json.dumps({"environment": circumstances, "cases": rows}, indent=1) + "\n")


def _interval(row: Mapping[str, Any], metric: str) -> str:
    if metric == accuracy.__name__:
        return f"{100 * row[metric]:.1f} ± {100 * row['ci95']:.1f} %"
    return f"{row[metric]:.3f} ± {row['ci95']:.3f}"


def markdown(study: str, circumstances: Mapping[str, Any], rows: Mapping[Case, Mapping[str, Any]], pixels: Any) -> str:
    """The tables, best first, with the command that makes them."""
    versions = ", ".join(f"{name} {number}" for name, number in circumstances["versions"].items())
    parts = [
        f"`python -m benchmarks.learners --study {study} --seconds {circumstances['seconds']:g} --seed "
        f"{circumstances['seed']}` on {circumstances['cpu']}, {circumstances['threads']} threads; Python "
        f"{circumstances['python']}, {versions}. {EPISODES} unseen episodes, one seed, one model."
    ]
    for data in dict.fromkeys(case.data for case in rows):
        mine = {case: row for case, row in rows.items() if case.data == data}
        metric = next(iter(mine.values()))["metric"]
        sign = -1 if metric == accuracy.__name__ else 1
        first = next(iter(mine.values()))
        ways = f"{first['ways']}-way " if "ways" in first else ""
        lines = [
            f"{data}, {ways}{first['shots']}-shot, {first['queries']} queries:\n",
            f"| learner | {metric.replace('_', ' ')} | meta-steps | steps/s | compile s | MB | parameters "
            "| inner steps, test | transductive |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
        ]
        for case, row in sorted(mine.items(), key=lambda item: sign * item[1]["value"]):
            inner = "–" if row["inner_steps"] is None else f"{row['inner_steps']}, {row['test_inner_steps']}"
            lines.append(
                f"| {case.label} | {_interval(row, metric)} | {row['steps']} | {row['steps_per_second']:.3g} | "
                f"{row['compile_seconds']:.1f} | {row['megabytes']:.1f} | {row['parameters']:,} | {inner} | "
                f"{'yes' if row['transductive'] else 'no'} |"
            )
        if pixels and data == "glyphs":
            lines.append(f"| {PIXELS} | {_interval(pixels, metric)} | | | | | | | no |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def picture(file: Path, rows: Mapping[Case, Mapping[str, Any]], pixels: Any) -> None:
    """Draws the result of each learner with its interval, one panel a data set."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    panels = list(dict.fromkeys(case.data for case in rows))
    figure = Figure(figsize=(6 * len(panels), 1.5 + 0.28 * max(len(rows) / len(panels), 8)), layout="constrained")
    for axes, data in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        mine = [(case, row) for case, row in rows.items() if case.data == data]
        metric = mine[0][1]["metric"]
        better_up = metric == accuracy.__name__
        mine.sort(key=lambda item: item[1]["value"] if better_up else -item[1]["value"])
        axes.errorbar(
            [row["value"] for _, row in mine], range(len(mine)), xerr=[row["ci95"] for _, row in mine], fmt="o"
        )
        if pixels and data == "glyphs":
            axes.axvline(pixels["accuracy"], color="gray", linestyle=":", label=PIXELS)
            axes.legend(frameon=False, loc="lower right")
        axes.set(yticks=range(len(mine)), yticklabels=[case.label for case, _ in mine], xlabel=metric.replace("_", " "))
        axes.set_title(f"{data}, {mine[0][1]['seconds']:g} s of meta-training each", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        if better_up:
            axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    tyro.cli(main)
