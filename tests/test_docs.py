"""The code in README.md and docs/ runs as it stands there, with fewer steps."""

import functools
import re
import runpy
import shlex
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jmeta
from jmeta import cli
from jmeta.runs.registry import LEARNERS

ROOT = Path(__file__).parents[1]
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PLACES = {  # what stands in two places runs once
    block: f"{file.stem}-{i}"
    for file in FILES
    for i, block in enumerate(re.findall(r"```python\n(.*?)```", file.read_text(), re.DOTALL))
}
QUICK = ("README", "new-learner")  # what a reader meets first, and what writes a learner; the others are slow
BLOCKS = [
    pytest.param(block, id=place, marks=() if place.startswith(QUICK) else pytest.mark.slow)
    for block, place in PLACES.items()
]
FEWER = [
    (r"\b(steps|tasks)=[\d_]+", r"\1=2"),
    (r"(?m)(jmeta\.evaluate\(.*?)(, episodes=\d+)?\)\)$", r"\1, episodes=2))"),
]


@pytest.mark.parametrize("block", BLOCKS)
def test_code(block, tmp_path, monkeypatch, capsys):
    if "jmeta.stream" in block:
        pytest.importorskip("grain")
    if "gymnasium" in block:
        pytest.importorskip("gymnasium", reason="pip install jmeta[rl]")
    monkeypatch.chdir(tmp_path)
    np.save("images.npy", np.random.default_rng(0).random((600, 16, 16, 1), np.float32))
    np.save("labels.npy", np.repeat(np.arange(30), 20))
    for pattern, fewer in FEWER:
        block = re.sub(pattern, fewer, block)
    exec(compile(block, "documentation", "exec"), {"__name__": "__main__"})
    assert "'ci95'" in capsys.readouterr().out  # a result with its protocol


@pytest.mark.slow
def test_the_examples_of_the_how_to_page_run_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    images, labels = random.random((600, 16, 16, 1), np.float32), np.repeat(np.arange(30), 20)
    tokens = {"ids": np.ones((20, 4), int), "mask": np.ones((20, 4)), "targets": np.ones((20, 1))}
    names = {"images": images, "labels": labels, "key": jax.random.key(0), "data": tokens, "functools": functools}
    exec("import jax, jmeta, numpy as np, optax", names)
    names["model"] = jmeta.linen(jmeta.MLP(outputs=5))
    names["optimizer"] = optax.adam(1e-3)
    page = (ROOT / "docs" / "how-to.md").read_text()
    blocks = re.findall(r"```py\n(.*?)```", page, re.DOTALL)
    # what follows is of a folder of pictures, and of runs as long as they are by default
    runs = [block for block in blocks if not re.search(r"read_images|Run\.begin|jmeta\.load", block)]
    assert len(runs) >= len(blocks) - 3 >= 6
    for block in runs:
        block = re.sub(r"\bsteps=2000", "steps=2", re.sub(r"\bsteps=[14]000", "steps=4", block))
        block = re.sub(r"jmeta\.Conv4\(outputs=5\)", "jmeta.MLP(outputs=5)", block).replace("Conv_0", "Dense_0")
        block = block.replace("episodes=200", "episodes=2").replace("test)", "test, episodes=2)")
        names["pretrained"] = names["fitted"].params if "fitted" in names else {}
        names["validation"] = names.get("test")
        exec(compile(block, "how-to", "exec"), names)
    task = names["source"].sample(jax.random.key(0), jax.tree.map(jnp.asarray, tokens))
    assert task.support.inputs["ids"].shape == (4, 4)
    assert (tmp_path / "runs" / "best").exists()


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs" / "learners").glob("*.md"))]
COMMANDS = sorted(
    {found[0] for page in PAGES for found in re.findall(r"(jmeta train [^`#\n]*?)\s*(#|`|\n)", page.read_text())}
)
# data, networks, files and variables of the reader's own, and `...` for what does not matter
OWN = re.compile(r"\$[A-Za-z]|--data \S+[./]|--model (\S+:|runs/)|--config|\.\.\.|PATH|FOLDER|DIR|NAME|FILE|--help")


def test_every_command_of_the_docs_is_one_of_today(capsys):
    plain = [command for command in COMMANDS if not OWN.search(command)]
    assert len(plain) > 60
    for command in plain:
        cli.main([*shlex.split(command)[1:], "--print-config"])
        assert "learner = " in capsys.readouterr().out, command


def test_the_first_example_is_under_twenty_lines():
    first = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert first is not None
    assert len(first.group(1).strip().splitlines()) < 20


@pytest.mark.parametrize("name", LEARNERS)
def test_every_learner_has_a_page_with_its_command_and_what_to_cite(name):
    page = (ROOT / "docs" / "learners" / f"{name}.md").read_text()
    assert f"--learner {name}" in page
    assert "**Choose it**" in page
    assert "## Differences" in page
    assert jmeta.citation(name) in page


def test_an_unknown_learner_has_no_citation():
    with pytest.raises(jmeta.UnknownNameError, match="there is no learner 'mamml'; did you mean 'maml'"):
        jmeta.citation("mamml")


def test_every_public_name_has_a_place_in_the_reference():
    assert runpy.run_path(str(ROOT / "docs" / "conf.py"))["undocumented"]() == []
