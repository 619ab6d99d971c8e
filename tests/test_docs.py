"""The code in README.md and docs/ runs as it stands there, with fewer steps."""

import re
import runpy
from pathlib import Path

import numpy as np
import pytest

import jmeta
from jmeta.runs.registry import LEARNERS

ROOT = Path(__file__).parents[1]
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{file.stem}-{i}")
    for file in FILES
    for i, block in enumerate(re.findall(r"```python\n(.*?)```", file.read_text(), re.DOTALL))
]
FEWER = [
    (r"\b(steps|tasks)=[\d_]+", r"\1=2"),
    (r"(?m)(jmeta\.evaluate\(.*?)(, episodes=\d+)?\)\)$", r"\1, episodes=2))"),
]


@pytest.mark.parametrize("block", BLOCKS)
def test_code(block, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.save("images.npy", np.random.default_rng(0).random((600, 16, 16, 1), np.float32))
    np.save("labels.npy", np.repeat(np.arange(30), 20))
    for pattern, fewer in FEWER:
        block = re.sub(pattern, fewer, block)
    exec(compile(block, "documentation", "exec"), {"__name__": "__main__"})
    assert "'ci95'" in capsys.readouterr().out  # a result with its protocol


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
