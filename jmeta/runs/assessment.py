"""What a trained run is worth: the result, how it adapts, and the rival without training."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jaxtyping import Array, Key

from jmeta.core import Task
from jmeta.evaluate import evaluate
from jmeta.files import write_whole
from jmeta.learners.prototypical import prototypical
from jmeta.models.adapters import identity
from jmeta.rl import Trajectory
from jmeta.runs import pictures
from jmeta.runs.registry import LEARNERS
from jmeta.runs.run import Run, write_temperature

Result = Mapping[str, Any]
INNER_STEPS, SHOTS = (0, 1, 2, 3, 5), (1, 2, 3, 5, 10)  # of the adaptation curve
UPDATES = (0, 1, 2, 3)  # of what acts in environments
QUICK = 200  # a run of fewer meta-steps is a trial, and is measured as one


def assess(run: Run, folder: Path, text: Callable[[Result], str]) -> Iterator[tuple[str, Result]]:
    """Evaluates a run on unseen tasks, draws its curves, and compares it with the nearest mean on raw pixels.

    Args:
        run: what was trained.
        folder: where `result.json` and the pictures go.
        text: what is written of a result.

    Yields:
        What was measured, in words, and the result; the learner's own first.
    """
    config, metric = run.config, run.config.metric.__name__
    quick = config.steps < QUICK
    pictures.learning_curve(folder / "learning_curve.png", run.history, metric)
    result = run.evaluate(episodes=200 if quick else 600)
    write_whole(folder / "result.json", text(result) + "\n")
    yield config.learner, result
    if config.kind == "classification":
        write_temperature(folder, run)
    source = run.source("test")
    inputs = jax.eval_shape(source.sample, jax.random.key(0), source.data).query.inputs
    if config.kind == "classification" and config.shots and inputs.ndim == 4:
        rival = prototypical(identity())
        yield (
            "nearest mean on raw pixels",
            evaluate(jax.random.key(1), rival, {}, {}, source, episodes=result["episodes"]),
        )
    if not quick:
        axis, results = adaptation(run, result)
        pictures.adaptation_curve(folder / "adaptation_curve.png", results, axis, metric)
    if LEARNERS[config.learner].acts:
        draw_trajectories(run, folder / "trajectories.png", "test")


def adaptation(run: Run, result: Result) -> tuple[str, list[Result]]:
    """Results against inner steps, of which `result` is one, or against shots for a learner that has none."""
    config = run.config
    if config.inner_steps is None:
        queries = min(5, config.queries)  # so that ten shots are left of the 20 images that a class of Omniglot has
        rows = config.own and min(config.entry.rows.values())
        taken = queries + (config.unlabelled or 0)
        shots = [k for k in SHOTS if not rows or k + taken <= rows]
        return "shots", [
            run.evaluate(episodes=200, shots=k, queries=queries) for k in ([0] if config.descriptions else []) + shots
        ]
    done = result["test_inner_steps"]
    return "test_inner_steps", [
        result if steps == done else run.evaluate(episodes=200, inner_steps=steps)
        for steps in sorted({*(UPDATES if LEARNERS[config.learner].acts else INNER_STEPS), done})
    ]


def draw_trajectories(run: Run, file: Path, split: str) -> None:
    """Draws the episodes of four tasks before and after adaptation."""
    source = run.source(split)
    sample_key, key = jax.random.split(jax.random.key(2))
    tasks = jax.vmap(source.sample, (0, None))(jax.random.split(sample_key, 4), source.data)

    def episodes(inner_steps: int) -> Trajectory:
        learner = run.learner_for(source, inner_steps, "test")

        def one_task(key: Key[Array, ""], task: Task) -> Trajectory:
            adapt_key, predict_key = jax.random.split(key)
            adapted = learner.adapt(adapt_key, run.params, run.state, task.support)
            outputs: Trajectory = learner.predict(predict_key, adapted, task.query.inputs)
            return outputs

        return jax.jit(jax.vmap(one_task))(jax.random.split(key, 4), tasks)

    after = episodes(max(1, run.config.test_inner_steps or 0))
    pictures.trajectories(file, tasks.support, episodes(0), after)
