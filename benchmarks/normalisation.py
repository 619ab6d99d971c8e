"""What a normalisation costs and brings, together and one query at a time: `python -m benchmarks.normalisation`.

Every row trains one learner of the registry with its own settings and one network from three seeds, and evaluates each
on 640 unseen tasks of its data and of the other data. Seeds that are stored are not trained again.
"""

import time
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import jmeta
from benchmarks.machine import cpu
from benchmarks.results import RESULTS, Results, markdown_table
from jmeta.runs import settings
from jmeta.runs.registry import LEARNERS

DATA = ("glyphs", "omniglot")
EPISODES = 640


class Row(NamedTuple):
    """A learner with a network.

    Args:
        learner: of the registry.
        model: of the registry.
        network: options of the network, as on the command line.
        long: whether it is trained for many steps as well.
    """

    learner: str
    model: str
    network: tuple[str, ...] = ()
    long: bool = False

    @property
    def name(self) -> str:
        """`maml conv4 norm=layer`."""
        return " ".join((self.learner, self.model, *self.network))


ROWS = [
    Row("maml", "conv4-maml", long=True),
    Row("maml", "conv4", long=True),
    Row("prototypical", "conv4-maml-max", long=True),
    Row("prototypical", "conv4-max", long=True),
    Row("prototypical", "conv4-protonet", long=True),
    Row("linear_probe", "conv4-maml", ("norm=running",), long=True),
    Row("linear_probe", "conv4", long=True),
    Row("maml", "conv4", ("norm=transductive",), long=True),
    Row("maml", "conv4", ("norm=per_task",), long=True),
    Row("maml", "conv4", ("norm=layer",)),
    Row("maml", "conv4", ("spatial=mean",)),
    Row("maml", "conv4", ("head_init=random",)),
    Row("maml", "conv4", ("scale=false",)),
    Row("maml", "conv4-max", long=True),
    Row("maml", "conv4-maml", ("norm=group",)),
    Row("maml", "conv4-maml", ("norm=per_task",)),
    Row("prototypical", "conv4-max", ("norm=per_task",)),
    Row("prototypical", "conv4-max", ("norm=layer",)),
    Row("prototypical", "conv4-max", ("scale=false",)),
    Row("prototypical", "conv4", ("spatial=mean",)),
    Row("prototypical", "conv4"),
    Row("linear_probe", "conv4", ("spatial=mean",)),
    Row("linear_probe", "conv4-max"),
    Row("linear_probe", "conv4-max", ("norm=running",)),
    *(
        Row(name, model)
        for name in (
            "fomaml",
            "anil",
            "reptile",
            "maml_plus_plus",
            "meta_sgd",
            "meta_curvature",
            "imaml",
            "boil",
            "cavia",
        )
        for model in ("conv4", "conv4-maml")
    ),
    *(Row("proto_maml", model) for model in ("conv4", "conv4-maml")),
    *(
        Row(name, model)
        for name in ("matching", "relation", "r2d2", "metaoptnet", "in_context")
        for model in ("conv4-max", "conv4-maml-max")
    ),
    *(
        Row(name, model, network)
        for name in ("simpleshot", "transfer", "baseline_plus_plus")
        for model, network in (("conv4", ()), ("conv4-maml", ("norm=running",)))
    ),
]


@lru_cache(maxsize=1)
def trainer(row: Row, data: str, steps: int) -> tuple[Callable[[jax.Array], Any], jmeta.MetaLearner]:
    """One compiled training, `key -> (parameters, state)`, and the learner that is tested."""
    options = dict(option.split("=") for option in row.network)
    norm = options.pop("norm", None)
    size = {"tasks": 4, "train_queries": 15} if LEARNERS[row.learner].defaults["tasks"] == 8 else {}
    config = settings.resolve(row.learner, data, model=row.model, norm=norm, network=options, **size)
    source = settings.make_source(config, "train")
    learner = settings.make_learner(config, source)
    tester = settings.make_learner(config, settings.make_source(config, "test"), "test")
    optimizer = LEARNERS[row.learner].optimizer(config.outer_rate, steps)
    step = jmeta.make_step(learner, optimizer, source, tasks=config.tasks)

    @partial(jax.jit, compiler_options=jmeta.compiler_options())
    def train(key: jax.Array) -> Any:
        start = jmeta.init(key, learner, optimizer, source)
        end, _ = jax.lax.scan(lambda carry, _: (step(carry, None)[0], None), start, length=steps)
        return end.params, end.state

    return train, tester


def measure(row: Row, data: str, steps: int, seed: int) -> dict[str, Any]:
    """What `jmeta.evaluate` says of one training, on its own data and on the other."""
    train, tester = trainer(row, data, steps)
    begin = time.monotonic()
    params, state = jax.block_until_ready(train(jax.random.key(seed)))
    device = jax.devices()[0].device_kind
    result: dict[str, Any] = {
        "seconds": time.monotonic() - begin,
        "device": cpu() if device == "cpu" else device,
    }
    for other in DATA:
        test = settings.make_source(settings.resolve(row.learner, other, model=row.model), "test")
        result[other] = jmeta.evaluate(jax.random.key(1), tester, params, state, test, episodes=EPISODES)
    return result


def summary(results: list[dict[str, Any]], name: str) -> str:
    """The mean over the seeds and their standard deviation, in per cent."""
    values = 100 * np.asarray([r.get(name, r["accuracy"]) for r in results])
    return f"{values.mean():.1f} ± {values.std(ddof=1):.1f}"


def name_of(row: Row, data: str, steps: int, seed: int) -> str:
    """`glyphs, 1000 steps, seed 0: maml conv4 norm=layer`."""
    return f"{data}, {steps} steps, seed {seed}: {row.name}"


def markdown(rows: dict[str, Any], data: str, steps: tuple[int, ...], seeds: int) -> str:
    """A line for each row of which all seeds are there: together / alone where the two differ."""
    other = next(name for name in DATA if name != data)
    lines = []
    for row in ROWS:
        for length in steps:
            names = [name_of(row, data, length, seed) for seed in range(seeds)]
            if all(name in rows for name in names):
                results = [rows[name] for name in names]
                own, crossed = ([result[name] for result in results] for name in (data, other))
                alone = summary(own, "alone") if own[0]["transductive"] else "the same"
                cells = [summary(own, "accuracy"), alone, summary(crossed, "alone")]
                lines.append([row.learner, " ".join((row.model, *row.network)), str(length), *cells])
    header = ["learner", "network", "steps", "together", "one query at a time", "the other data, one at a time"]
    return markdown_table(header, lines)


def trainings(only: str, steps: tuple[int, ...], seeds: int) -> Iterator[tuple[Row, str, int, int]]:
    """What is trained, short before long."""
    for length in steps:
        for row in ROWS:
            if row.name.startswith(only) and (row.long or length == steps[0]):
                for data in DATA:
                    for seed in range(seeds):
                        yield row, data, length, seed


def run(
    only: str = "",
    steps: tuple[int, ...] = (1000, 8000),
    seeds: int = 3,
    file: Path = RESULTS / "normalisation.json",
    share: tuple[int, int] = (0, 1),
    minutes: float = float("inf"),
) -> None:
    """Measures what is not there yet and prints the tables.

    Args:
        only: rows whose name begins with it.
        steps: meta-steps; all but the first are for the rows that are trained for long.
        seeds: seeds of each row.
        file: where the results are kept.
        share: `i n`: every nth row and data set, from the ith on, for several processes with a file each.
        minutes: after which no training begins.
    """
    results, begin = Results(file, {"episodes": EPISODES}), time.monotonic()
    for k, training in enumerate(trainings(only, steps, seeds)):
        if k // seeds % share[1] == share[0] and time.monotonic() - begin < 60 * minutes:
            results.get(name_of(*training), partial(measure, *training))
    for data in DATA:
        print(f"\n{data}\n\n{markdown(results.rows, data, steps, seeds)}")


if __name__ == "__main__":
    import tyro

    tyro.cli(run)
