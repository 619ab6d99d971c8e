"""The papers' tables: a row that is cut goes on as if it had not been, and the tables say what was reached."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmeta
from benchmarks.papers import __main__ as papers
from benchmarks.papers import training
from benchmarks.papers.rows import ROWS, Row
from jmeta.step import TrainState

SMALL = {"ways": 3, "train_ways": 4, "queries": 2, "train_queries": 2, "network": {"features": 8}, "steps": 20}
ROW = Row("omniglot 3w1s small", "prototypical", "omniglot", SMALL, "98.8", "Snell et al. 2017: trained 60-way")


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    monkeypatch.setattr(papers, "ROWS", [ROW])
    monkeypatch.setattr(training, "EPISODES", 10)
    monkeypatch.setattr(training, "VALIDATION", 10)
    rng = np.random.default_rng(0)
    parts = {split: rng.integers(0, 256, (5 * 20, 28, 4), np.uint8) for split in ("train", "validation", "test")}
    np.savez(tmp_path / "omniglot.npz", **parts)

    def of(name, *more):
        file, checkpoints = tmp_path / f"{name}.json", tmp_path / name
        given = {"omniglot": tmp_path / "omniglot.npz", "file": file, "checkpoints": checkpoints, "scan": 1}
        return [*(str(x) for flag, value in given.items() for x in (f"--{flag}", value)), *more]

    return of


def results(path):
    return json.loads(path.read_text())["rows"]


@pytest.mark.slow
def test_a_row_that_was_cut_ends_as_one_in_one_go(arguments, tmp_path):
    whole = papers.main(arguments("whole"))
    assert "| 3w1s small | 98.8 | Snell et al. 2017: trained 60-way |" in whole and "| 20 |" in whole
    assert "Not run yet" not in whole
    for reached in (1, 2, 3):  # the second is validated
        assert f"| {reached} of 20 |" in papers.main(arguments("cut", "--minutes", "0"))
    papers.main(arguments("cut"))
    (name, one), (_, other) = (*results(tmp_path / "whole.json").items(), *results(tmp_path / "cut.json").items())
    assert name == "omniglot 3w1s small, 20 steps, seed 0"
    for part in ("best", "last", "best_step", "curve", "settings"):
        assert one[part] == other[part], part
    assert [row["step"] for row in one["curve"]] == list(range(2, 21, 2))
    best = max(one["curve"], key=lambda row: row["accuracy"])
    assert one["best_step"] == best["step"] and one["best"]["split"] == "test"


def test_a_checkpoint_of_other_settings_is_not_gone_on_with(tmp_path, capsys):
    def reached(step, seconds):
        state = TrainState(jax.random.key(step), jnp.asarray(step), {"w": jnp.full(2, step)}, {}, ())
        return training.Progress(state, ({"w": jnp.ones(2, int)}, {}), [{"step": step, "loss": 0.5}], seconds)

    start, file = reached(0, 0.0), tmp_path / "papers" / "row.npz"
    assert training.restore(file, start, {"seed": 0}) is start
    training.save(file, reached(3, 4.0), {"seed": 0})
    found = training.restore(file, start, {"seed": 0})
    assert jax.random.key_data(found.train_state.key).tolist() == [0, 3]
    assert found.train_state.params["w"].tolist() == [3, 3] and found.curve == [{"step": 3, "loss": 0.5}]
    assert found.best[0]["w"].tolist() == [1, 1] and found.seconds == 4.0
    assert training.restore(file, start, {"seed": 1}) is start
    assert "is of other settings; the row starts anew" in capsys.readouterr().out


def test_results_of_several_processes_are_merged(tmp_path, monkeypatch):
    monkeypatch.setattr(papers, "ROWS", [ROW, ROWS[-1]])

    def stored(name, seed, steps, accuracy):
        best = {"accuracy": accuracy, "ci95": 0.01, "transductive": True, "alone": 0.5, "alone_ci95": 0.02}
        about = {"metric": "accuracy", "settings": training.about(ROW.config(seed)), "device": "a GPU"}
        rows = {papers.name_of(ROW, seed, 1.0): {**about, "best": best, "steps": steps, "seconds": 60.0}}
        settings = {"episodes": training.EPISODES, "validation": training.VALIDATION}
        (tmp_path / name).write_text(json.dumps({"settings": settings, "rows": rows}))
        return str(tmp_path / name)

    files = [stored("a", 0, 20, 0.9), stored("b", 0, 10, 0.1), stored("c", 1, 20, 0.95)]
    text = papers.main(["--file", str(tmp_path / "all.json"), "--seeds", "2", "--merge", *files])
    assert (tmp_path / "all.md").read_text() == text
    assert "| 92.5 ± 1.0 (90.0 to 95.0) | 2 | yes | 50.0 ± 2.0 (50.0 to 50.0) | 20 | 60 | a GPU |" in text
    assert 'Not run yet:\n\n* `python -m benchmarks.papers --only "sinusoid 20-shot cavia"`' in text


def test_every_row_has_settings_and_a_name_of_its_own():
    assert len({row.name for row in ROWS}) == len(ROWS)
    assert all(ROW.name not in row.name for row in ROWS)
    for row in ROWS:
        config = row.config(seed=3, scale=0.5)
        assert config.seed == 3 and config.steps == row.settings["steps"] // 2


@pytest.mark.slow
def test_a_row_of_omniglot_in_two_minutes(tmp_path):
    try:
        jmeta.omniglot(split="test")
    except jmeta.DataError as error:
        pytest.skip(str(error))
    file = tmp_path / "papers.json"
    given = ["--only", "omniglot 5w1s prototypical", "--minutes", "2", "--scan", "10"]
    papers.main([*given, "--file", str(file), "--checkpoints", str(tmp_path)])
    (result,) = results(file).values()
    assert 10 <= result["steps"] <= 40_000 and not result["best"]["transductive"]
    assert result["best"]["accuracy"] > 0.8
