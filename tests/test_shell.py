"""Runs from the shell on data and networks of one's own, in seeds, from files, beside each other."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import jmeta
from jmeta import cli
from jmeta.cli.train import Train
from jmeta.runs import assessment, settings
from jmeta.runs.comparison import compare
from jmeta.runs.loggers import LOGGERS
from jmeta.runs.own import model_entry
from jmeta.runs.training import best_row, on_resume, out_of_patience

SMALL = ("--learner", "maml", "--data", "sinusoid", "--tasks", "1", "--steps", "4", "--no-report")


def main(*arguments):
    cli.main([str(argument) for argument in arguments])


def fails(capsys, *arguments):
    """The one sentence of a command that must fail."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(*arguments)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.count("\n") == 1
    return err


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def sinusoid(tmp_path_factory):
    """Two short runs, to be read only."""
    folder = tmp_path_factory.mktemp("shell")
    for seed in (0, 1):
        main("train", *SMALL, "--seed", seed, "--out", folder / f"{seed}")
    return folder


def archive(file, classes=12, width=5):
    random = np.random.default_rng(0)
    centres = 3 * random.normal(size=(classes, width))
    labels = np.repeat(np.arange(classes), 12)
    np.savez(file, x=centres[labels] + random.normal(size=(len(labels), width)), y=[f"kind {i}" for i in labels])
    return file


@pytest.mark.slow
def test_own_vectors_are_trained_evaluated_and_opened_without_their_file(place, capsys):
    archive(place / "own.npz")
    flags = ("--learner", "prototypical", "--data", "own.npz", "--steps", "20", "--queries", "3", "--no-report")
    main("train", *flags, "--out", "run")
    main("evaluate", "run", "--episodes", "20", "--json")
    result = json.loads(capsys.readouterr().out)
    assert result["accuracy"] > 0.5 and result["ways"] == 4 and result["data"] == str(place / "own.npz")
    config = json.loads((place / "run" / "config.json").read_text())
    assert [len(config["own"]["division"][split]) for split in ("train", "validation", "test")] == [4, 4, 4]
    assert config["version"] == settings.VERSION
    archive(place / "other.npz", classes=30)
    main("evaluate", "run", "--data", "other.npz", "--episodes", "5", "--json")
    assert json.loads(capsys.readouterr().out)["data"] == str(place / "other.npz")
    archive(place / "wide.npz", width=6)
    assert "inputs of shape [6], and the run [5]" in fails(capsys, "evaluate", "run", "--data", "wide.npz")
    (place / "own.npz").unlink()  # a run is used without its data
    run = jmeta.load("run")
    assert run.input_shape == (5,) and run.learner is not None
    assert "does not exist" in fails(capsys, "evaluate", "run", "--ways", "2")


@pytest.mark.slow
def test_tables_by_group_are_regressions(place, capsys):
    with (place / "doses.csv").open("w", newline="") as stream:
        rows = [(f"p{i // 8}", i % 8, (1 + i // 8) * (i % 8)) for i in range(96)]
        csv.writer(stream).writerows([("person", "dose", "effect"), *rows])
    flags = ("--data", "doses.csv", "--group", "person", "--target", "effect", "--shots", "3", "--steps", "4")
    main("train", *flags, "--no-report", "--out", "run")
    config = jmeta.load("run").config
    assert (config.kind, config.queries, config.train_queries, config.model) == ("regression", 5, 5, "mlp")
    main("evaluate", "run", "--episodes", "5", "--json")
    result = json.loads(capsys.readouterr().out)
    assert result["mean_squared_error"] > 0
    # the numbers of the table itself go in and come out, also of a file, and without the table
    kept = config.own["standardisation"]
    assert result["target_spread"] == kept["target_spread"] > 1
    (place / "doses.csv").unlink()
    run = jmeta.load("run")
    doses, effects = np.arange(5.0)[:, None], 20.0 * np.arange(5.0)
    by = jmeta.Standardisation(**kept)
    regressor = run.regressor().fit(doses, effects)
    plain = jmeta.FewShotRegressor(run.learner, run.params, run.state).fit(by.inputs(doses), by.targets(effects))
    expected = plain.predict(by.inputs(doses)) * kept["target_spread"] + kept["target_mean"]
    np.testing.assert_allclose(regressor.predict(doses), expected, rtol=1e-5)
    regressor.save("p0.npz")
    np.testing.assert_allclose(jmeta.FewShotRegressor.load("p0.npz").predict(doses), expected, rtol=1e-5)


MODULE = """
import flax.linen as nn
from flax import nnx
class Small(nn.Module):
    outputs: int
    width: int = 3
    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.outputs)(nn.tanh(nn.Dense(self.width)(x)))
class Other(nnx.Module):
    def __init__(self, outputs, rngs):
        self.layer = nnx.Linear(1, outputs, rngs=rngs)
    def __call__(self, x):
        return self.layer(x)
class Headless(nn.Module):
    def __call__(self, x):
        return x
nothing = 3
"""


def test_a_network_of_ones_own(place, capsys):
    (place / "mynets.py").write_text(MODULE)
    main("train", *SMALL, "--model", "mynets:Small", "--network", "width=7", "--out", "linen")
    run = jmeta.load("linen")
    assert run.config.model == "mynets:Small" and run.params["Dense_1"]["kernel"].shape == (1, 7)
    main("train", *SMALL, "--model", "mynets:Other", "--out", "nnx")
    assert jmeta.load("nnx").params["layer"]["kernel"].shape == (1, 1)
    for name, sentence in (
        ("mynets:Missing", "cannot be imported"),
        ("nowhere:Small", "cannot be imported"),
        ("mynets:nothing", "is no Linen or NNX class"),
        ("mynets:Headless", "takes no argument `outputs`"),
    ):
        assert sentence in fails(capsys, "train", *SMALL, "--model", name, "--out", "no")
    assert not Path("no").exists()


def test_the_cell_of_a_search_is_a_network(place, capsys):
    cell = jmeta.random_genotype(0, 2)
    found = {"settings": {"features": 8, "nodes": 2}, "genotypes": {"second order": cell}}
    (place / "found").mkdir()
    (place / "found" / "result.json").write_text(json.dumps(found))
    config = settings.resolve("prototypical", "glyphs", model="found")
    assert config.norm == "group"
    module = model_entry("found").make(outputs=3)
    assert module.genotype == cell and (module.features, module.nodes, module.outputs) == (8, 2, 3)
    (place / "empty").mkdir()
    assert "holds no finished `jmeta search`" in fails(capsys, "train", "--model", "empty", "--out", "no")


def test_a_file_of_settings_lies_below_the_flags(place, capsys):
    main("train", *SMALL[:-1], "--inner-rate", "0.02", "--print-config")
    printed = capsys.readouterr().out
    assert "inner_rate = 0.02" in printed and not Path("runs").exists()
    (place / "own.toml").write_text(printed)
    main("train", "--config", "own.toml", "--steps", "3", "--no-report", "--out", "run")
    config = jmeta.load("run").config
    assert (config.inner_rate, config.steps, config.data) == (0.02, 3, "sinusoid")
    main("train", "--config=own.toml", "--steps", "2", "--no-report", "--out", "equals")
    assert jmeta.load("equals").config.inner_rate == 0.02
    (place / "bad.toml").write_text("steps = [")
    assert "cannot be read" in fails(capsys, "train", "--config", "bad.toml")


def test_seeds_have_a_folder_each_and_a_table(place, capsys, monkeypatch):
    monkeypatch.setattr(assessment, "QUICK", 1000)
    main("train", *SMALL[:-1], "--seeds", "3", "5", "--out", "runs")
    out = capsys.readouterr().out
    assert "mean of 2 seeds" in out
    summary = json.loads((place / "runs" / "seeds.json").read_text())
    values = [
        json.loads((place / f"runs/seed-{seed}/result.json").read_text())["mean_squared_error"] for seed in (3, 5)
    ]
    np.testing.assert_allclose(summary["mean_squared_error"], np.mean(values))
    np.testing.assert_allclose(summary["ci95"], 12.706 * abs(values[0] - values[1]) / 2, rtol=1e-3)
    assert "has one seed" in fails(capsys, "train", *SMALL, "--seeds", "1", "--out", "again")
    assert "names a seed twice" in fails(capsys, "train", *SMALL, "--seeds", "1", "1", "--out", "again")
    assert "runs holds several runs; name one of runs/seed-3, runs/seed-5" in fails(capsys, "evaluate", "runs")
    for folders in (["runs"], ["runs/seed-3", "runs/seed-5", "runs/seeds.json"]):
        main("compare", *folders, "--episodes", "5", "--json")
        assert set(json.loads(capsys.readouterr().out)["runs"]) == {"seed-3", "seed-5"}


@pytest.mark.slow
def test_runs_are_compared_on_the_same_episodes(sinusoid, capsys, place):
    main("compare", sinusoid / "0", sinusoid / "1", "--episodes", "20", "--json", "--plot", "picture.png")
    result = json.loads(capsys.readouterr().out)
    rows = result["runs"]
    runs = [jmeta.load(sinusoid / name) for name in ("0", "1")]
    alone = [run.evaluate(episodes=20)["mean_squared_error"] for run in runs]
    np.testing.assert_allclose([row["mean_squared_error"] for row in rows.values()], alone, rtol=1e-5)
    np.testing.assert_allclose(rows["1"]["difference"], alone[1] - alone[0], rtol=1e-4)
    assert rows["1"]["difference_ci95"] < np.hypot(*(row["ci95"] for row in rows.values()))  # paired
    assert Path("picture.png").stat().st_size > 1000
    main("compare", sinusoid / "0", sinusoid / "1", "--episodes", "5")
    assert "less 0" in capsys.readouterr().out
    assert "is given twice" in fails(capsys, "compare", sinusoid / "0", sinusoid / "0")
    assert "there is one run" in fails(capsys, "compare", sinusoid / "0")
    with pytest.raises(jmeta.ConfigError, match="has shots 10 and b 5, so that they have no episodes in common"):
        compare({"a": runs[0], "b": jmeta.Run.begin("maml", "sinusoid", tasks=1, shots=5)})


def test_a_report_is_one_page_that_needs_nothing_else(sinusoid, place, capsys):
    main("report", sinusoid / "0", sinusoid / "1", "--episodes", "5", "--out", "page.html")
    page = (place / "page.html").read_text()
    assert page.startswith("<!doctype html>") and "<script" not in page and "http" not in page
    assert "there is no run to look at" in fails(capsys, "report")
    assert page.count("<h2>") == 3 and "inner rate" in page and "±" in page and "less 0" in page


def test_the_best_checkpoint_is_what_is_used(sinusoid, place, capsys):
    folder = shutil.copytree(sinusoid / "0", place / "run")
    best, last = (jmeta.load(folder, checkpoint=name) for name in ("best", "last"))
    checked = [row for row in best.history if "validation" in row]
    assert int(best.best.step) == min(checked, key=lambda row: row["validation"])["step"]
    assert int(last.train_state.step) == int(best.train_state.step) == 4 and last.best is None
    assert "choose best or last" in fails(capsys, "evaluate", "run", "--checkpoint", "first")
    shutil.rmtree(folder / "best")
    assert jmeta.load(folder).best is None  # as runs of version 0.1 are


def test_a_temperature_belongs_to_its_parameters(sinusoid, place):
    folder = shutil.copytree(sinusoid / "0", place / "run")
    step = int(jmeta.load(folder).used.step)
    for stored, expected in (({"step": step, "temperature": 2.5}, 2.5), ({"step": step - 1, "temperature": 2.5}, None)):
        (folder / "calibration.json").write_text(json.dumps(stored))
        assert jmeta.load(folder).measured_temperature == expected


def test_the_best_row_and_patience():
    config = settings.resolve("maml", "sinusoid", patience=2)
    rows = [{"step": i, "validation": v} for i, v in enumerate((3.0, 1.0, 2.0))]
    assert best_row(config, [{"step": 0}, *rows])["step"] == 1  # of an error the least
    assert best_row(config, [{"step": 0}]) is None
    assert not out_of_patience(config, rows) and out_of_patience(config, [*rows, {"step": 3, "validation": 1.0}])
    higher = settings.resolve("maml", "glyphs", patience=1)
    assert best_row(higher, rows)["step"] == 0 and out_of_patience(higher, rows[:2])


def test_a_finished_run_goes_on_with_more_steps_and_other_rates(sinusoid, place, capsys):
    shutil.copytree(sinusoid / "0", place / "run")
    main("train", "--resume", "--steps", "6", "--outer-rate", "0.0001", "--no-report", "--out", "run")
    said = capsys.readouterr().err
    assert said.count("going on with steps 4 -> 6, outer rate 0.001 -> 0.0001, the outer rate goes on by") == 1
    run = jmeta.load("run")
    assert int(run.train_state.step) == 6 and run.config.outer_rate == 1e-4
    assert [row["step"] for row in run.history] == [1, 2, 3, 4, 5, 6]
    assert "is at step 6 already" in fails(capsys, "train", "--resume", "--steps", "5", "--out", "run")
    config, words = on_resume(run.config, {"steps": 6, "outer_rate": 1e-4})
    assert config == run.config and words == []


def test_a_run_that_ended_by_its_patience_does_not_go_on(sinusoid, place, capsys):
    shutil.copytree(sinusoid / "0", place / "run")
    shutil.rmtree(place / "run" / "best")
    rows = [{"step": i, "loss": 0.5, "seconds": 1.0, "validation": float(i)} for i in (1, 2, 3, 4)]
    (place / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--resume", "--steps", "6", "--no-report", "--out", "run")
    main("train", *flags, "--patience", "3")
    assert "and ended at step 4 of 6 by its patience" in capsys.readouterr().err
    main("train", *flags, "--patience", "6")
    said = capsys.readouterr().err
    assert "going on with patience 3 -> 6" in said and "by its patience" not in said
    assert int(jmeta.load("run", checkpoint="last").train_state.step) == 6


def test_minutes_fix_the_number_of_steps(place, capsys):
    main("train", *SMALL[:-3], "--minutes", "0.001", "--no-report", "--out", "run")
    assert "10 meta-steps fit into 0.001 minutes" in capsys.readouterr().err
    assert jmeta.load("run").config.steps == 10
    assert "both say how long to train" in fails(capsys, "train", *SMALL, "--minutes", "1", "--out", "other")


def test_curves_go_to_csv_as_well(place):
    main("train", *SMALL, "--log", "csv", "--out", "run")
    with (place / "run" / "metrics.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4] and float(rows[0]["loss"]) > 0
    assert rows[-1]["validation"] != ""


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_curves_go_elsewhere_where_it_is_installed(name, place, monkeypatch):
    pytest.importorskip({"tensorboard": "tensorboardX", "wandb": "wandb"}[name])
    monkeypatch.setenv("WANDB_MODE", "offline")
    log = LOGGERS[name](place, settings.resolve("maml", "sinusoid"))
    log({"step": 1, "loss": 0.5})
    assert any(path.is_file() for path in (place / name).rglob("*"))


def test_the_version(capsys):
    main("--version")
    assert capsys.readouterr().out == f"jmeta {jmeta.__version__}\n"


def test_help_tells_the_defaults_of_what_was_chosen(capsys):
    with pytest.raises(SystemExit) as stop:
        main("train", "--learner", "reptile", "--data", "sinusoid", "--help")
    out = capsys.readouterr().out
    assert stop.value.code == 0 and "Defaults of reptile on sinusoid" in out and "\ninner_steps = 32\n" in out


def test_output_that_nobody_reads_is_no_error():
    command = f"{sys.executable} -m jmeta.cli train --print-config"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} | sleep 0"], capture_output=True, text=True, env=os.environ
    )
    assert done.returncode in (0, 141) and done.stderr == ""


def test_a_sweep_is_of_one_process(monkeypatch):
    monkeypatch.setattr("jmeta.runs.hosts.several", lambda: True)
    with pytest.raises(jmeta.ConfigError, match="--distributed has no meaning for a sweep"):
        Train(sweep=("inner_rate=0.1",))._sweep()
