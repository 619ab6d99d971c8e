"""What may import what: a module imports from its own layer and from those below it, and from none above."""

import ast
from importlib import import_module
from pathlib import Path

import pytest

import jmeta

PACKAGE = Path(jmeta.__file__).parent
LAYERS = [  # bottom to top; a folder stands for its files
    {"errors", "hyperparameters", "tree", "compilation", "files", "inputs", "kinds"},
    {"devices", "solvers"},
    {"masks", "metrics", "distances"},
    {"core"},
    {"embedding"},
    {"losses"},
    {"inner"},
    {"adjoint"},
    {"diagnosis", "details", "open_set"},
    {"step"},
    {"checks", "feed"},
    {"train"},
    {"evaluate"},
    {"optimizers", "bilevel"},
    {"data", "models"},
    {"learners"},
    {"rl", "search"},
    {"calibration", "estimators", "export"},
    {"runs", "sweep"},
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


@pytest.mark.parametrize(
    ("former", "name", "now"),
    [
        ("jmeta.envs", "collect", "jmeta.rl"),
        ("jmeta.policy_gradient", "dice", "jmeta.rl.policy_gradients"),
        ("jmeta.models", "Policy", "jmeta.rl"),
        ("jmeta.models", "CellNetwork", "jmeta.search"),
        ("jmeta.models", "MODELS", "jmeta.runs.registry"),
        ("jmeta.learners", "LEARNERS", "jmeta.runs.registry"),
        ("jmeta.data", "DATA", "jmeta.runs.registry"),
    ],
)
def test_names_of_a_version_ago_warn(former, name, now):
    module = import_module(former)
    with pytest.warns(DeprecationWarning, match=f"{former}.{name} is {now}.{name} now; import it from there"):
        found = getattr(module, name)
    assert found is getattr(import_module(now), name)
    with pytest.raises(AttributeError, match="has no attribute"):
        _ = module.never_there
