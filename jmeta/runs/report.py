"""Runs as one page of HTML that needs nothing else: to send, to print, to read in the dark."""

import base64
import html
import json
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jmeta.core import Examples, Task, TaskSource
from jmeta.runs import settings
from jmeta.runs.comparison import FIXED, compare
from jmeta.runs.run import Run

_STYLE = """
:root { color-scheme: light dark; --line: #8885; --good: #2a7d3f; --bad: #b3382c; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td:not(:last-child) { white-space: nowrap; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .8rem .3rem 0; text-align: left; vertical-align: top; }
img { max-width: 100%; background: #fff; border-radius: 4px; }
.episode { display: flex; flex-wrap: wrap; gap: .6rem; margin: .5rem 0 1.2rem; }
.episode figure { margin: 0; text-align: center; font-size: .8rem; }
.episode img { display: block; margin: 0 auto .2rem; width: 56px; height: 56px;
  image-rendering: pixelated; border: 2px solid var(--line); }
.right img { border-color: var(--good); } .wrong img { border-color: var(--bad); }
.matrix td, .matrix th { padding: .3rem .6rem; text-align: right; }
small { opacity: .75; }
@media print { body { max-width: none; margin: 0; } section { break-inside: avoid; } }
"""


def report(runs: Mapping[str, tuple[Path, Run]], *, episodes: int = 600) -> str:
    """A page about runs: what they are worth, how they learned, some episodes with their answers.

    Args:
        runs: by name, the folder and the run.
        episodes: unseen tasks of each number.

    Returns:
        The page.
    """
    results = {name: _measured(run, episodes) for name, (_, run) in runs.items()}
    parts = [_table(runs, results, episodes)]
    parts += [_section(name, folder, run, results[name]) for name, (folder, run) in runs.items()]
    title = html.escape(", ".join(runs))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style>'
        f"<body><h1>{title}</h1>{''.join(parts)}</body></html>\n"
    )


def _measured(run: Run, episodes: int) -> dict[str, Any]:
    """Its result, with the answers by class where the data tell the classes."""
    query = settings.shapes_of(run.source("test")).query
    told = isinstance(query, Examples) and not isinstance(query.classes, tuple) and not isinstance(query.rows, tuple)
    return run.evaluate(episodes=episodes, details=run.config.kind == "classification" and told)


def _table(runs: Mapping[str, tuple[Path, Run]], results: Mapping[str, Mapping[str, Any]], episodes: int) -> str:
    """Results with their protocol; with that of pairs where the runs have the same episodes."""
    rows = []
    for name, (_, run) in runs.items():
        result = results[name]
        sizes = [f"{result[key]} {key}" for key in ("ways", "shots", "queries") if key in result]
        about = [*sizes, "transductive" if result["transductive"] else "not transductive", f"seed {run.config.seed}"]
        steps = result["test_inner_steps"]
        about += [] if steps is None else [f"{steps} inner step{'' if steps == 1 else 's'}"]
        alone = run.config.written(result["alone"], result["alone_ci95"]) if "alone" in result else "the same"
        value = run.config.written(result[result["metric"]], result["ci95"])
        rows.append([name, run.config.learner, value, alone, f"{run.config.data}: {', '.join(about)}"])
    text = f"<p><small>{episodes} unseen episodes each, 95 % interval over episodes.</small></p>"
    head = ["run", "learner", "result", "each query alone", "protocol"]
    first = next(iter(runs.values()))[1]
    alike = len(runs) > 1 and all(
        getattr(run.config, key) == getattr(first.config, key) for _, run in runs.values() for key in FIXED
    )
    if alike:
        pairs = compare({name: run for name, (_, run) in runs.items()}, episodes=episodes)["runs"]
        head.insert(3, f"less {next(iter(runs))}")
        for row in rows:
            pair = pairs[row[0]]
            between = first.config.written(pair["difference"], pair["difference_ci95"]) if "difference" in pair else ""
            row.insert(3, between)
    return f"<section><h2>Results</h2>{_html_table(head, rows)}{text}</section>"


def _section(name: str, folder: Path, run: Run, result: Mapping[str, Any]) -> str:
    images = "".join(
        f'<p><img alt="{alt}" src="{_source((folder / file).read_bytes())}"></p>'
        for file, alt in (
            ("learning_curve.png", "loss and validation against the meta-step"),
            ("adaptation_curve.png", "the result against how much is adapted"),
            ("trajectories.png", "episodes before and after adaptation"),
        )
        if (folder / file).exists()
    )
    config = {key: value for key, value in settings.protocol(run.config).items() if value not in (None, {}, [])}
    config |= {"steps": run.config.steps, "tasks": run.config.tasks, "outer_rate": run.config.outer_rate}
    if run.config.inner_rate is not None:
        config |= {"inner_rate": run.config.inner_rate, "inner_steps": run.config.inner_steps}
    written = {key: value if isinstance(value, str) else json.dumps(value) for key, value in config.items()}
    table = _html_table(["setting", "value"], [[key.replace("_", " "), value] for key, value in written.items()])
    return f"<section><h2>{html.escape(name)}</h2>{table}{images}{_confusion(run, result)}{_episodes(run)}</section>"


_MATRIX = 15  # classes, of which a table of all against all is read at a glance


def _confusion(run: Run, result: Mapping[str, Any]) -> str:
    """Which classes were taken for which others: all of a few classes, of many those most often."""
    if "details" not in result:
        return ""
    counts = np.asarray(result["details"]["confusion"])
    told = run.source("test").names
    names = told if len(told) == len(counts) else tuple(str(k) for k in range(len(counts)))
    if len(counts) <= _MATRIX:
        rows = [[name, *map(str, row)] for name, row in zip(names, counts.tolist(), strict=True)]
        text = _html_table(["class, answered as", *names], rows).replace("<table>", '<table class="matrix">')
        return f"<h3>Confusion</h3>{text}"
    asked = counts.sum(1)
    wrong = np.where(np.eye(len(counts), dtype=bool), 0, counts)
    pairs = [np.unravel_index(i, counts.shape) for i in np.argsort(-wrong, axis=None, kind="stable")[:10]]
    rows = [[names[a], names[b], f"{wrong[a, b]} of {asked[a]}"] for a, b in pairs if wrong[a, b]]
    return f"<h3>Most often confused</h3>{_html_table(['class', 'answered as', 'queries'], rows)}" if rows else ""


def _episodes(run: Run, count: int = 2, shown: int = 15) -> str:
    """Some episodes of images, with the answers."""
    if run.config.kind != "classification":
        return ""
    source, learner, temperature = run.source("test"), run.learner, run.temperature

    @jax.jit
    def answered(key: jax.Array) -> Any:
        sample_key, adapt_key, predict_key = jax.random.split(key, 3)
        task = source.sample(sample_key, source.data)
        adapted = learner.adapt(adapt_key, run.params, run.state, task.support)
        return task, jax.nn.softmax(learner.predict(predict_key, adapted, task.query.inputs) / temperature, axis=1)

    text = []
    for i in range(count):
        task, probabilities = answered(jax.random.fold_in(jax.random.key(7), i))
        if not isinstance(task.support, Examples) or np.ndim(task.query.inputs) != 4:
            return ""
        truth, answer = np.argmax(task.query.targets, 1), np.argmax(probabilities, 1)
        classes = _column_names(source, task)
        figures = [
            f'<figure><img alt="" src="{_picture(image)}">{classes[k]}</figure>'
            for image, k in zip(task.support.inputs, np.argmax(task.support.targets, 1), strict=True)
        ]
        asked = []
        for j in range(0, len(truth), max(1, len(truth) // shown)):
            right = truth[j] == answer[j]
            said = f"{classes[answer[j]]} {100 * float(probabilities[j].max()):.0f} %"
            asked.append(
                f'<figure class="{"right" if right else "wrong"}"><img alt="" src="{_picture(task.query.inputs[j])}">'
                f"{said}{'' if right else f', is {classes[truth[j]]}'}</figure>"
            )
        text.append(
            f"<h3>Episode {i + 1}</h3><p><small>support</small></p><div class='episode'>{''.join(figures)}</div>"
            f"<p><small>queries, with the answer and its probability</small></p>"
            f"<div class='episode'>{''.join(asked)}</div>"
        )
    return "".join(text)


def _column_names(source: TaskSource, task: Task) -> list[str]:
    """What each column of the targets is in an episode, as HTML: the name of its class, where the data tell it."""
    columns, classes = np.argmax(task.query.targets, 1), task.query.classes
    names = [chr(ord("A") + k) for k in range(task.query.targets.shape[1])]
    for column, number in zip(columns, () if isinstance(classes, tuple) else np.asarray(classes), strict=False):
        names[column] = html.escape(source.names[number]) if number < len(source.names) else names[column]
    return names


def _picture(image: Any) -> str:
    from PIL import Image

    x = np.asarray(image, np.float32)
    x = (255 * np.clip((x - x.min()) / max(float(np.ptp(x)), 1e-6), 0, 1)).astype(np.uint8)
    stream = BytesIO()
    Image.fromarray(x[..., 0] if x.shape[-1] != 3 else x).save(stream, "png")
    return _source(stream.getvalue())


def _source(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f'<div class="wide"><table>{line(head, "th")}{body}</table></div>'
