"""What may import what: a module imports from its own layer and from those below it, and from none above."""

import ast
from pathlib import Path

import pytest

import jmeta

PACKAGE = Path(jmeta.__file__).parent
LAYERS = [  # bottom to top; a folder stands for its files
    {"errors", "tree", "compilation", "files", "inputs"},
    {"masks", "metrics", "distances"},
    {"core"},
    {"losses"},
    {"inner"},
    {"adjoint"},
    {"diagnosis"},
    {"step"},
    {"checks"},
    {"train"},
    {"evaluate"},
    {"optimizers", "bilevel"},
    {"data", "models"},
    {"learners"},
    {"rl", "search"},
    {"calibration", "estimators", "export"},
    {"runs"},
    {"cli"},
]
HEIGHT = {name: height for height, layer in enumerate(LAYERS) for name in layer}
FORMER = {"envs", "policy_gradient"}  # names of a version ago


def parts(file):
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_import_goes_up(file):
    if parts(file) in {"__init__", *FORMER}:
        return
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jmeta."):
            assert HEIGHT[node.module.split(".")[1]] <= HEIGHT[parts(file)], f"line {node.lineno}: {node.module}"


@pytest.mark.parametrize("name", sorted(FORMER))
def test_former_names_warn(name):
    module = __import__(f"jmeta.{name}", fromlist=["x"])
    with pytest.warns(DeprecationWarning, match=rf"jmeta.{name} is called jmeta.rl\S* now; import (collect|dice)"):
        getattr(module, "collect" if name == "envs" else "dice")
