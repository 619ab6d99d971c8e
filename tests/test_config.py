"""Settings are declared once: what a declaration gives, and that one is all that a new setting needs."""

import dataclasses
import inspect
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

import jmeta
from jmeta import cli
from jmeta.runs import settings
from jmeta.runs.config import FLAGS, OWN, SETTINGS, Config, check_choices, check_values, flag
from jmeta.runs.registry import DATA, LEARNERS, MODELS
from jmeta.runs.run import read_config

NO_FLAGS = {"own", "version"}  # what a run keeps beside what it was asked for


@pytest.fixture(scope="module")
def help_of_train():
    said = subprocess.run([sys.executable, "-m", "jmeta.cli", "train", "--help"], capture_output=True, text=True)
    return " ".join(re.sub(r"[│╭╰─╮╯]", " ", said.stdout).split())


@pytest.mark.parametrize("name", [*SETTINGS, *OWN])
def test_what_is_declared_is_a_flag_with_help_and_a_check(name, help_of_train):
    setting = (SETTINGS | OWN)[name]
    assert (name in FLAGS) == (name not in NO_FLAGS)
    if name in FLAGS:
        start = setting.help.partition("{}")[0]
        assert re.search(rf"{flag(name)} [A-Z=. ]+ {re.escape(start)}", help_of_train)
        assert all(choice in help_of_train for choice in setting.choices)
    wrong = {int: 0.5, float: -1.0, str: 3, tuple: [5, 1], Mapping: "no"}[setting.type]
    with pytest.raises(jmeta.ConfigError, match=rf"{flag(name)} is .*; give "):
        check_values({name: wrong})
    if setting.choices:
        with pytest.raises(jmeta.UnknownNameError, match=f"there is no {setting.kind} 'nothing'"):
            check_choices({name: "nothing"})


def test_what_a_part_shall_take_is_taken_by_one_of_its_entries():
    makes = {
        "learner": [entry.make for entry in LEARNERS.values()],
        "model": [entry.make for entry in MODELS.values()],
        "data": [entry.load for entry in DATA.values()],
    }
    for setting in SETTINGS.values():
        if setting.of:
            assert any(setting.argument in inspect.signature(make).parameters for make in makes[setting.of])


def test_arguments_are_those_of_a_part_in_its_split():
    config = settings.resolve("matching", ways=3, train_shots=(1, 4), batch=None)
    assert config.arguments("data", "train") == {"ways": 20, "shots": (1, 4), "queries": 5}
    assert config.arguments("data", "validation") == {"ways": 3, "shots": 1, "queries": 15}
    assert config.arguments("learner", "train") == {"distance": jmeta.cosine}
    assert config.arguments("model", "test") == {"norm": "group", "dtype": "float32"}
    steps = settings.resolve("maml", inner_steps=2, test_inner_steps=7)
    assert [steps.arguments("learner", split)["inner_steps"] for split in ("train", "test")] == [2, 7]


def test_a_stored_run_is_read_and_not_resolved_anew(tmp_path, monkeypatch):
    config = settings.resolve("late_fusion", "glyphs")
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))

    def later(model, *, distance, inner_rate):
        """The learner takes an argument that it did not have."""

    entry = LEARNERS["late_fusion"]
    monkeypatch.setitem(LEARNERS, "late_fusion", entry._replace(make=later, defaults={"inner_rate": 0.3}))
    stored = read_config(tmp_path)
    assert stored == config and stored.inner_rate is None and stored.train_shots == (0, 5)


@pytest.mark.parametrize(
    ("learner", "data"), [("late_fusion", "glyphs"), ("maml_plus_plus", "glyphs"), ("cavia", "sinusoid")]
)
def test_what_is_printed_is_a_file_of_the_same_settings(learner, data, tmp_path, capsys):
    cli.main(["train", "--learner", learner, "--data", data, "--print-config"])
    printed = capsys.readouterr().out
    (tmp_path / "same.toml").write_text(printed)
    cli.main(["train", "--config", str(tmp_path / "same.toml"), "--print-config"])
    assert capsys.readouterr().out == printed and f'learner = "{learner}"' in printed


ONE_LINE = '    temperature: float | None = setting("Of the attention.", "learner")\n'
USED = """
import inspect, sys
import jmeta
from jmeta import cli
from jmeta.runs import settings
from jmeta.runs.registry import LEARNERS

assert jmeta.__file__.startswith(sys.argv[1])
config = settings.resolve("matching", temperature=0.5)
assert config.arguments("learner", "train")["temperature"] == 0.5
assert settings.resolve("matching").temperature == 0.1  # of the learner's signature
assert settings.resolve("maml").temperature is None
given = {}
entry = LEARNERS["matching"]
def spy(*model, **arguments):
    given.update(arguments)
    return entry.make(*model, **arguments)
spy.__signature__ = inspect.signature(entry.make)
LEARNERS["matching"] = entry._replace(make=spy)
settings.make_learner(config, settings.make_source(config, "test"), "test")
assert given["temperature"] == 0.5
cli.main(["train", "--learner", "matching", "--temperature", "0.25", "--print-config"])
for flags in (["--temperature", "1"], ["--learner", "matching", "--temperature", "-1"], ["--help"]):
    try:
        cli.main(["train", *flags])
    except SystemExit:
        pass
"""


def test_a_new_setting_is_one_line(tmp_path):
    package = tmp_path / "jmeta"
    shutil.copytree(Path(jmeta.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    declared = (package / "runs" / "config.py").read_text()
    place = declared.index("    distance: str | None = setting(")
    (package / "runs" / "config.py").write_text(declared[:place] + ONE_LINE + declared[place:])
    done = subprocess.run(
        [sys.executable, "-c", USED, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert "Traceback" not in done.stderr, done.stderr
    assert "\ntemperature = 0.25\n" in done.stdout
    assert "--temperature has no meaning for maml with conv4 on glyphs; leave it away." in done.stderr
    assert "--temperature is -1.0; give a positive number." in done.stderr
    assert re.search(r"--temperature FLOAT[\s│]+Of the attention", done.stdout)


def test_a_field_without_a_default_is_in_every_config():
    always = {field.name for field in dataclasses.fields(Config) if field.default is dataclasses.MISSING}
    needed = {"learner", "data", "model", "queries", "train_queries", "steps", "tasks", "outer_rate", "seed"}
    assert always - {"options", "network", "own"} == needed
