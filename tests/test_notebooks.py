"""Every notebook runs from top to bottom: with few steps in each test run, as it stands in the slow one."""

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
    (r"(?m)^assert .*$", ""),  # of what many steps have learned
]


def execute(notebook, change=lambda source: source):
    nodes = nbformat.read(notebook, as_version=4)
    for cell in nodes.cells:
        if cell.cell_type == "code":
            cell.source = change(cell.source)
    NotebookClient(nodes, timeout=1800, resources={"metadata": {"path": notebook.parent}}).execute()


def with_few_steps(source):
    for pattern, fewer in FEWER:
        source = re.sub(pattern, fewer, source)
    return source


QUICK = [file for file in NOTEBOOKS if "search" not in file.stem]  # whose network alone compiles for a minute


@pytest.mark.filterwarnings("ignore")  # of the kernel's own machinery
@pytest.mark.parametrize("notebook", QUICK, ids=lambda file: file.stem)
def test_notebook_with_few_steps(notebook):
    assert "STEPS = " in notebook.read_text()
    execute(notebook, with_few_steps)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda file: file.stem)
def test_notebook(notebook, monkeypatch):
    for name in ("JAX_NUMPY_DTYPE_PROMOTION", "JAX_NUMPY_RANK_PROMOTION", "XLA_FLAGS"):
        monkeypatch.delenv(name, raising=False)  # as a user has it
    execute(notebook)
