"""Flags, files of flags, loggers and locks: what is told where they cannot be, and what they become where they can."""

import errno
import fcntl
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import jmeta
from jmeta import cli
from jmeta.cli.adapt import _descriptions_of
from jmeta.cli.train import defaults_of, with_file
from jmeta.runs import settings
from jmeta.runs.loggers import LOGGERS
from jmeta.runs.programs import keep_programs
from jmeta.runs.stopping import LOCK, only_writer


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


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--options", "proximal"), "--options proximal has no value; write proximal=VALUE"),
        (("--network", "width"), "--network width has no value; write width=VALUE"),
        (("--minutes", "0"), "--minutes is 0.0; give a positive number below"),
        (("--minutes", "5", "--steps", "9"), "--minutes 5 and --steps 9 both say how long to train; give one of them"),
        (("--minutes", "nan"), "--minutes is nan; give a positive number"),
        (("--log", "cvs"), "there is no logger 'cvs'; did you mean 'csv'"),
        (("--config", "missing.toml"), "--config missing.toml cannot be read"),
        (("--data", "own.npz"), "own.npz has no x or images or inputs (it has z); save it as numpy.savez(file, x="),
        (("--data", "own.npz", "--group", "person"), "--group is for a .csv or .parquet table, and "),
    ],
)
def test_flags_that_cannot_be_leave_nothing_behind(flags, sentence, capsys, place):
    np.savez("own.npz", z=np.ones(3))
    assert sentence in fails(capsys, "train", *flags, "--out", "run")
    assert [file.name for file in place.iterdir()] == ["own.npz"]


def test_a_file_of_flags_is_written_out_in_front_of_those_of_the_command_line():
    Path("own.toml").write_text(
        'learner = "imaml"\nresume = true\nno_report = false\ntrain_shots = [1, 5]\noptions = { proximal = 2.0 }\n'
        'network = { spatial = "mean" }\n'
    )
    written = ["--learner", "imaml", "--resume", "--train-shots", "1", "5", "--options", "proximal=2.0"]
    written += ["--network", "spatial=mean"]
    for given in (["--config", "own.toml"], ["--config=own.toml"]):
        assert with_file(["train", *given, "--seed", "3"]) == ["train", *written, *given, "--seed", "3"]
        assert with_file(["evaluate", *given]) == ["evaluate", *given]


def test_printed_settings_are_a_file_that_gives_the_same_settings(capsys):
    flags = ("--learner", "imaml", "--options", "proximal=3.0", "--network", "features=8", "spatial=mean")
    main("train", *flags, "--train-shots", "1", "5", "--print-config")
    printed = capsys.readouterr().out
    Path("own.toml").write_text(printed)
    main("train", "--config", "own.toml", "--print-config")
    assert capsys.readouterr().out == printed
    assert "proximal = 3" in printed and 'spatial = "mean"' in printed and "train_shots = [1, 5]" in printed


def test_help_of_what_cannot_be_says_why():
    assert defaults_of(["train", "--learner", "mamml"]).startswith("error: there is no learner 'mamml'; did you mean")


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_logger_that_is_not_installed_is_told_with_its_extra(name, module, place, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(jmeta.ConfigError, match=f"--log {name} needs {module}: pip install {module}"):
        LOGGERS[name](place, settings.resolve("maml", "sinusoid"))


def test_one_class_leaves_nothing_to_tell_apart(place, capsys, monkeypatch):
    run = jmeta.Run.begin("prototypical", "glyphs", model="mlp", ways=2, train_ways=2)
    monkeypatch.setattr("jmeta.cli.adapt.load", lambda folder, checkpoint: run)
    (place / "support" / "a").mkdir(parents=True)
    Image.fromarray(np.zeros((28, 28), np.uint8)).save(place / "support" / "a" / "0.png")
    sentence = fails(capsys, "adapt", "run", "--support", "support", "--query", "support")
    assert "support holds one class, so that there is nothing to tell apart; give two or more" in sentence


def test_what_the_names_of_folders_say():
    described = {name: settings.resolve("zero_shot", "glyphs", descriptions=name) for name in ("attributes", "text")}
    with pytest.raises(jmeta.ConfigError, match="run reads attributes, which a folder has not; train with --desc"):
        _descriptions_of(Path("run"), described["attributes"], ["a", "b"])
    told = _descriptions_of(Path("run"), described["text"], ["green tea", "black tea"])
    (ids,) = told
    assert ids.shape[0] == 2 and not np.array_equal(ids[0], ids[1])
    assert _descriptions_of(Path("run"), settings.resolve("maml"), ["a", "b"]) is None


def test_where_the_system_has_no_locks_a_folder_is_written_without(place, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "fcntl", None)
        with only_writer(place / "a"):
            assert (place / "a" / LOCK).exists()

    def unsupported(stream, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with only_writer(place / "b"), only_writer(place / "b"):
        assert (place / "b" / LOCK).exists()


def test_programs_are_kept_in_the_cache_folder_unless_it_is_off_or_jax_has_its_own(place, monkeypatch):
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}

    def kept(cache, own=None):
        monkeypatch.setenv("JMETA_CACHE", cache)
        jax.config.update("jax_compilation_cache_dir", own)
        keep_programs()
        return jax.config.jax_compilation_cache_dir

    try:
        assert kept("off") is None
        assert kept(str(place), "own") == "own"
        assert kept(str(place)) == str(place / "programs")
        assert jax.config.jax_persistent_cache_min_compile_time_secs == 0.3
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
