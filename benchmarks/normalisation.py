"""What a normalisation costs and brings, together and one query at a time: `python -m benchmarks.normalisation`.

Every row trains one learner of the registry with its own settings and one network, three seeds in one program, and
evaluates each on 640 unseen tasks of its data and of the other data. Rows that are stored are not measured again.
"""

import time
from functools import partial
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


def measure(row: Row, data: str, lengths: tuple[int, ...], seeds: int) -> dict[str, Any]:
    """Accuracy of each seed after each number of steps, together and alone, on this data and on the other."""
    options = dict(option.split("=") for option in row.network)
    norm = options.pop("norm", None)
    size = {"tasks": 4, "train_queries": 15} if LEARNERS[row.learner].defaults["tasks"] == 8 else {}
    config = settings.resolve(row.learner, data, model=row.model, norm=norm, network=options, **size)
    source = settings.make_source(config, "train")
    learner = settings.make_learner(config, source)
    tester = settings.make_learner(config, settings.make_source(config, "test"), inner_steps=config.test_inner_steps)

    @partial(jax.jit, static_argnums=1, compiler_options=jmeta.compiler_options())
    def train(keys: jax.Array, steps: int) -> Any:
        def one(key: jax.Array) -> Any:
            optimizer = LEARNERS[row.learner].optimizer(config.outer_rate, steps)
            start = jmeta.init(key, learner, optimizer, source)
            step = jmeta.make_step(learner, optimizer, source, tasks=config.tasks)
            end, _ = jax.lax.scan(lambda carry, _: (step(carry, None)[0], None), start, length=steps)
            return end.params, end.state

        return jax.vmap(one)(keys)

    device = jax.devices()[0].device_kind
    result: dict[str, Any] = {}
    for steps in lengths:
        begin = time.monotonic()
        params, state = jax.block_until_ready(train(jax.random.split(jax.random.key(0), seeds), steps))
        result[str(steps)] = {"seconds": time.monotonic() - begin, "device": cpu() if device == "cpu" else device}
        for other in DATA:
            test = settings.make_source(settings.resolve(row.learner, other, model=row.model), "test")
            result[str(steps)][other] = []
            for i in range(seeds):
                θ, statistics = jax.tree.map(lambda x, i=i: x[i], (params, state))
                tested = jmeta.evaluate(jax.random.key(1), tester, θ, statistics, test, episodes=EPISODES)
                result[str(steps)][other].append(tested)
    return result


def summary(results: list[dict[str, Any]], name: str) -> str:
    """The mean over the seeds and their standard deviation, in per cent."""
    values = 100 * np.asarray([r.get(name, r["accuracy"]) for r in results])
    return f"{values.mean():.1f} ± {values.std(ddof=1):.1f}"


def markdown(rows: dict[str, Any], data: str) -> str:
    """A line for each row: together / alone where the two differ."""
    lines = []
    for row in ROWS:
        stored = rows.get(f"{data}: {row.name}", {})
        for steps, result in stored.items():
            own, other = result[data], result[next(name for name in DATA if name != data)]
            together, alone = summary(own, "accuracy"), summary(own, "alone")
            norm = own[0]["transductive"]
            cross = summary(other, "alone")
            lines.append(
                [
                    row.learner,
                    " ".join((row.model, *row.network)),
                    steps,
                    together,
                    alone if norm else "the same",
                    cross,
                ]
            )
    header = ["learner", "network", "steps", "together", "one query at a time", "the other data, one at a time"]
    return markdown_table(header, lines)


def run(
    only: str = "", steps: tuple[int, ...] = (1000, 8000), seeds: int = 3, file: Path = RESULTS / "normalisation.json"
) -> None:
    """Measures what is not there yet and prints the tables.

    Args:
        only: rows whose name begins with it.
        steps: meta-steps; the second number is for the rows that are trained for long.
        seeds: seeds of each row.
        file: where the results are kept.
    """
    results = Results(file, {"steps": steps, "seeds": seeds, "episodes": EPISODES})
    for row in ROWS:
        for data in DATA:
            if row.name.startswith(only):
                lengths = steps if row.long else steps[:1]
                results.get(f"{data}: {row.name}", partial(measure, row, data, lengths, seeds))
    for data in DATA:
        print(f"\n{data}\n\n{markdown(results.rows, data)}")


if __name__ == "__main__":
    import tyro

    tyro.cli(run)
