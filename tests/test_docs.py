"""The code in README.md and docs/ runs as it stands there, with fewer steps."""

import re
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{file.stem}-{i}")
    for file in FILES
    for i, block in enumerate(re.findall(r"```python\n(.*?)```", file.read_text(), re.DOTALL))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_code(block, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.save("images.npy", np.random.default_rng(0).random((600, 16, 16, 1), np.float32))
    np.save("labels.npy", np.repeat(np.arange(30), 20))
    block = re.sub(r"steps=[\d_]+", "steps=2", block).replace("test)", "test, episodes=2)")
    exec(compile(block, "documentation", "exec"), {"__name__": "__main__"})
    assert "'accuracy'" in capsys.readouterr().out


def test_the_first_example_is_under_twenty_lines():
    first = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert first is not None
    assert len(first.group(1).strip().splitlines()) < 20
