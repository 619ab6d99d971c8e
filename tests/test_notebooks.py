"""Notebooks run from top to bottom: the first with few steps in each test run, all as they stand in the slow ones."""

import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
FEWER = [
    (r"(?<!, )\bSTEPS = [\d_]+", "STEPS = 20"),
    (r"\b(SHOTS|NODES), STEPS = (\d+), [\d_]+", r"\1, STEPS = \2, 20"),
    (r"\b(episodes|tasks)=\d\d+", r"\1=4"),
]
LEARNED = {  # what many steps have learned
    "01-sinusoid": 'assert results[1]["mean_squared_error"] <= 1.0',
    "02-zero-shot": 'assert result["accuracy"] - result["ci95"] > 0.6',
    "03-meta-rl": "before, after = results\n"
    'assert after["mean_return"] - after["ci95"] > before["mean_return"] + before["ci95"] + 10',
    "04-architecture-search": 'best_random = max(results[f"random {i}"]["accuracy"] for i in range(3))\n'
    'assert results["found"]["accuracy"] > best_random',
    "05-text": 'assert results[0]["accuracy"] > 0.85 and results[5]["accuracy"] > 0.95',
}


def execute(notebook, change=lambda source: source, check=""):
    nodes = nbformat.read(notebook, as_version=4)
    for cell in nodes.cells:
        if cell.cell_type == "code":
            cell.source = change(cell.source)
    nodes.cells.append(nbformat.v4.new_code_cell(check))
    NotebookClient(nodes, timeout=1800, resources={"metadata": {"path": notebook.parent}}).execute()


def with_few_steps(source):
    for pattern, fewer in FEWER:
        source = re.sub(pattern, fewer, source)
    return source


@pytest.mark.filterwarnings("ignore")  # of the kernel's own machinery
@pytest.mark.parametrize("notebook", NOTEBOOKS[:1], ids=lambda file: file.stem)  # the others compile for long
def test_notebook_with_few_steps(notebook):
    assert "STEPS = " in notebook.read_text()
    execute(notebook, with_few_steps)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda file: file.stem)
def test_notebook(notebook, monkeypatch):
    for folder in re.findall(r'os.environ\[\\"(\w+)', notebook.read_text()):
        if folder not in os.environ:
            pytest.skip(f"needs {folder}")
    for name in ("JAX_NUMPY_DTYPE_PROMOTION", "JAX_NUMPY_RANK_PROMOTION", "XLA_FLAGS"):
        monkeypatch.delenv(name, raising=False)  # as a user has it
    execute(notebook, check=LEARNED[notebook.stem])
