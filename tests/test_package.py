"""The package is what its metadata say, and what is built from it runs in an empty environment."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import jmeta

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_files_name_the_version():
    assert f"\nversion: {jmeta.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    released = jmeta.__version__.partition(".dev")
    heading = "Unreleased" if released[1] else released[0]
    assert f"\n## {heading}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_oldest_versions_are_those_that_the_package_allows():
    needed = dict(re.findall(r"^([\w-]+)>=([\d.]+)$", "\n".join(PROJECT["dependencies"]), re.MULTILINE))
    oldest = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "constraints-oldest.txt").read_text(), re.MULTILINE))
    assert needed
    for name, version in needed.items():
        assert re.fullmatch(re.escape(version) + r"(\.0)*", oldest[name]), name


@pytest.mark.slow
def test_the_wheel_runs_in_an_empty_environment(tmp_path):
    """What a stranger does: install, list, train, evaluate. The wheel is built from the source distribution."""
    empty = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    environment = empty | {"JMETA_CACHE": str(tmp_path / "cache"), "JAX_PLATFORMS": "cpu"}

    def run(*command):
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        return result.stdout

    run(sys.executable, "-m", "build", "--outdir", "dist", str(ROOT))
    wheel, archive = sorted((tmp_path / "dist").iterdir(), key=lambda file: file.suffix, reverse=True)
    assert wheel.name == f"jmeta-{jmeta.__version__}-py3-none-any.whl"
    assert archive.name == f"jmeta-{jmeta.__version__}.tar.gz"
    run(sys.executable, "-m", "venv", "empty")
    programs = tmp_path / "empty" / "bin"
    run(str(programs / "pip"), "install", "--quiet", str(wheel))
    assert run(
        str(programs / "python"), "-W", "error", "-c", "import jmeta; print(jmeta.__version__, jmeta.__file__)"
    ) == (f"{jmeta.__version__} {next(programs.parent.glob('lib/*/site-packages'))}/jmeta/__init__.py\n")
    assert "maml" in run(str(programs / "jmeta"), "list")
    size = ("--steps", "2", "--tasks", "1", "--queries", "2")
    run(str(programs / "jmeta"), "train", *size, "--out", "runs/demo")
    result = json.loads(run(str(programs / "jmeta"), "evaluate", "runs/demo", "--episodes", "4", "--json"))
    assert 0 <= result["accuracy"] <= 1 and result["episodes"] == 4
    assert (tmp_path / "runs/demo/learning_curve.png").exists()
