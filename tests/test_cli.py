import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from PIL import Image

import jmeta
from jmeta import cli
from jmeta.cli.show import as_json
from jmeta.runs import assessment, checkpoint
from jmeta.runs.registry import DATA, LEARNERS, MODELS
from jmeta.runs.run import read_rows

TINY = ("--model", "mlp", "--ways", "3", "--queries", "2", "--steps", "5", "--tasks", "1")
SINUSOID = ("--data", "sinusoid", "--tasks", "1")
RUN = {
    "best",
    "checkpoint",
    "config.json",
    "shapes.json",
    "metrics.jsonl",
    "result.json",
    "learning_curve.png",
    "adaptation_curve.png",
}


def files(folder):
    return {file: file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def fails(capsys, *arguments, code=2):
    """Runs a command that must fail, and gives its one sentence."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert stop.value.code == code
    assert out == ""
    assert err.count("\n") == 1 and err.rstrip().endswith(".")
    return err


def prints(capsys, *arguments):
    capsys.readouterr()
    cli.main([str(argument) for argument in arguments])
    return capsys.readouterr().out


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """Runs of the same settings share their compiled programs, also with the processes that are killed."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name.upper(), str(value))
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished run of each kind, to be read only, and what they printed; `copy_of` gives one to spoil."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch, (folder / "printed").open("w") as printed:
        patch.setattr(sys, "stdout", printed)
        patch.setattr(sys, "stderr", printed)
        patch.setattr(assessment, "INNER_STEPS", (0,))
        patch.setattr(assessment, "SHOTS", (2,))
        patch.setattr(assessment, "QUICK", 0)
        cli.main(["train", *SINUSOID, "--steps", "10", "--out", f"{folder}/sinusoid"])
        cli.main(["train", *TINY, "--learner", "prototypical", "--train-ways", "3", "--out", f"{folder}/prototypical"])
        cli.main(["train", *TINY, "--no-report", "--out", f"{folder}/maml"])
    return folder


@pytest.fixture
def copy_of(runs, place):
    return lambda name: shutil.copytree(runs / name, place / name)


def drawn(folder, classes, n=2):
    """Images of one bar a class, at the angle of the class."""
    for i, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for j in range(n):
            image = np.zeros((28, 28), np.uint8)
            image[4 + 8 * i : 8 + 8 * i, 2 + j :] = 255
            Image.fromarray(image).save(folder / name / f"{j}.png")
    return folder


# list and help


def test_list_has_a_line_for_each_name(capsys):
    lines = prints(capsys, "list").splitlines()
    for registry in (LEARNERS, DATA, MODELS):
        for name, entry in registry.items():
            assert sum(line.split()[0] == name and entry.paper in line for line in lines) == 1


def test_every_flag_has_a_default(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert out.count("(default:") == len(dataclasses.fields(cli.Train)) and "required" not in out


def test_starting_is_quick():
    heavy = "{'orbax', 'matplotlib.figure', 'tensorflow_datasets', 'tensorflow', 'haiku', 'equinox', 'flax.nnx'}"
    code = f"import sys, jmeta.cli; print(*sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True)
    assert done.stdout.split() in ([], ["flax.nnx"])  # flax.linen itself imports nnx


# train


def test_a_run_folder(runs, capsys):
    run = runs / "sinusoid"
    assert {path.name for path in run.iterdir()} == RUN | {"checkpoint"}
    assert json.loads((run / "config.json").read_text())["steps"] == 10
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert [row["step"] for row in rows if "validation" in row] == [5, 10]
    assert all(np.isfinite(row["loss"]) for row in rows)
    assert json.loads((run / "result.json").read_text())["episodes"] == 600
    for name in ("learning_curve.png", "adaptation_curve.png"):
        with Image.open(run / name) as image:
            assert min(image.size) > 300 and len(set(image.convert("L").tobytes())) > 10


def test_what_train_prints(runs):
    printed = (runs / "printed").read_text()
    assert "sinusoid: 10 shots, 10 queries, 600 test episodes, not transductive, 1 inner step\n" in printed
    assert "glyphs: 3 ways, 1 shots, 2 queries, 600 test episodes, not transductive\n" in printed
    assert "nearest mean on raw pixels" in printed and printed.count(" % ± ") == 2
    assert f"written to {runs}/sinusoid/\n" in printed
    assert printed.count("meta-training ") == 3 + 3  # a bar that is no terminal's is drawn once, then the time


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--ways", "5000"), "5000 ways need 5000 classes"),
        (("--data", "glyphs-confusable", "--ways", "200"), "no family has 200 classes"),
        (("--ways", "1"), "ways is 1; give at least 2"),
        (("--steps", "0"), "--steps is 0"),
        (("--tasks", "0"), "--tasks is 0"),
        (("--inner-rate", "-1"), "--inner-rate is -1.0"),
        (("--learner", "mamml"), "did you mean 'maml'"),
        (("--data", "glyph"), "did you mean 'glyphs'"),
        (("--model", "foo"), "there is no model 'foo'"),
        (("--distance", "foo"), "there is no distance 'foo'"),
        (("--norm", "foo"), "there is no normalisation 'foo'"),
        (("--learner", "prototypical", "--inner-steps", "2"), "--inner-steps has no meaning for prototypical"),
        (("--data", "sinusoid", "--learner", "prototypical"), "use maml or "),
        (("--data", "sinusoid", "--model", "conv4"), "conv4 cannot take the inputs of sinusoid"),
        (("--out", "file"), "file exists and is no run"),
        ((*SINUSOID, "--out", "file/below"), "cannot be written"),
        (("--out", "full"), "full exists and is no run"),
        (("--out", "full", "--resume"), "full exists and is no run"),
    ],
)
def test_bad_flags_change_nothing(flags, sentence, capsys, place):
    (place / "file").write_text("mine")
    (place / "full").mkdir()
    (place / "full" / "thesis.txt").write_text("mine")
    before = files(place)
    assert sentence in fails(capsys, "train", *flags)
    assert files(place) == before and len(list(place.iterdir())) == 2


def test_missing_omniglot_is_told_at_once_with_the_command(capsys, place, monkeypatch):
    monkeypatch.setenv("HOME", str(place))
    monkeypatch.setenv("TFDS_DATA_DIR", str(place))
    begin = time.monotonic()
    assert "tfds.data_source('omniglot')" in fails(capsys, "train", "--data", "omniglot")
    assert time.monotonic() - begin < 10 and not any(place.iterdir())


def test_a_class_with_too_few_images_is_named(capsys, place, monkeypatch):
    def load(folder):
        return (
            np.zeros((40, 28, 28), np.uint8),
            np.repeat([0, 1], 20).astype(np.int32),
            np.array(["Greek 1", "Greek 2"]),
        )

    module = import_module("jmeta.data.omniglot")
    monkeypatch.setattr(module, "_prepared", lambda folder: place)
    monkeypatch.setattr(module, "_load", load)
    monkeypatch.setattr(module, "_characters", lambda *arguments: np.arange(2))
    sentence = fails(capsys, "train", "--data", "omniglot", "--ways", "2", "--shots", "10", "--queries", "15")
    assert "class 'Greek 1' has 20 examples, but 10 shots + 15 queries need 25" in sentence
    assert not any(place.iterdir())


def test_a_value_of_the_wrong_kind_is_the_parsers(capsys, place):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--ways", "many"])
    assert stop.value.code == 2 and not any(place.iterdir())


def test_a_run_is_not_overwritten(capsys, copy_of):
    before = files(copy_of("sinusoid"))
    assert "sinusoid exists; add --resume" in fails(capsys, "train", *SINUSOID, "--out", "sinusoid")
    assert files(Path("sinusoid").absolute()) == before


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--learner", "fomaml"), "was trained with --learner maml, not fomaml"),
        (("--seed", "1"), "was trained with --seed 0, not 1"),
        (("--data", "glyphs"), "was trained with --data sinusoid, not glyphs"),
    ],
)
def test_resume_refuses_other_flags(flags, sentence, capsys, copy_of):
    before = files(copy_of("sinusoid"))
    assert sentence in fails(capsys, "train", "--out", "sinusoid", "--resume", *flags)
    assert files(Path("sinusoid").absolute()) == before


def test_resume_refuses_a_default_that_was_given(capsys, copy_of):
    copy_of("prototypical")
    assert "not maml" in fails(capsys, "train", "--out", "prototypical", "--resume", "--learner", "maml")


def test_resume_of_a_finished_run_leaves_it(copy_of):
    before = files(copy_of("sinusoid"))
    cli.main(["train", *SINUSOID, "--steps", "10", "--seed", "0", "--out", "sinusoid", "--resume", "--no-report"])
    assert files(Path("sinusoid").absolute()) == before


# interrupted


def environment():
    return {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}


def parameters(run):
    loaded = jmeta.load(run)
    train_state = loaded.train_state
    assert int(train_state.step) == loaded.config.steps
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves((train_state.params, train_state.optimizer_state))]


STEPS = ("--steps", "30", "--inner-rate", "0.02", "--seed", "3", "--no-report")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    cli.main(["train", *SINUSOID, *STEPS, "--out", str(run)])
    return run


@pytest.mark.parametrize(("seed", "least", "most"), [(0, 0, 5), pytest.param(1, 5, 25, marks=pytest.mark.slow)])
def test_resume_after_kill(seed, least, most, uninterrupted, place):
    rng = np.random.default_rng(seed)
    lines, delay = rng.integers(least, most), rng.uniform(0, 0.2)
    metrics = place / "run" / "metrics.jsonl"
    with subprocess.Popen(
        [sys.executable, "-m", "jmeta.cli", "train", *SINUSOID, *STEPS, "--out", "run"],
        env=environment(),
        stderr=subprocess.DEVNULL,
    ) as process:
        while process.poll() is None and (not metrics.exists() or metrics.read_text().count("\n") < lines):
            time.sleep(0.001)
        time.sleep(delay)
        assert process.poll() is None, "the run ended before it was killed"
        process.send_signal(signal.SIGKILL)
    cli.main(["train", "--out", "run", "--resume", "--no-report"])
    assert parameters(place / "run") == parameters(uninterrupted)
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, 31))


def test_resume_before_the_first_checkpoint_and_with_half_a_line(uninterrupted, place):
    shutil.copytree(uninterrupted, place / "run")
    shutil.rmtree(place / "run" / "checkpoint")
    metrics = place / "run" / "metrics.jsonl"
    metrics.write_text(metrics.read_text()[:333])
    cli.main(["train", "--out", "run", "--resume", "--no-report"])
    assert parameters(place / "run") == parameters(uninterrupted)
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == list(range(1, 31))


def test_resume_from_the_checkpoint_before_one_that_is_not_sealed(uninterrupted, place):
    shutil.copytree(uninterrupted, place / "run")
    (place / "run" / "checkpoint" / "30" / "seal.json").unlink()
    assert checkpoint.latest_step(place / "run" / "checkpoint") == 25
    cli.main(["train", "--out", "run", "--resume", "--no-report"])
    assert parameters(place / "run") == parameters(uninterrupted)


def test_resume_of_a_folder_that_was_only_just_begun(place):
    (place / "run").mkdir()
    (place / "run" / "config.part").write_text("{")
    cli.main(["train", *SINUSOID, "--steps", "2", "--out", "run", "--resume", "--no-report"])
    assert (place / "run" / "checkpoint" / "2").is_dir()


def test_interrupting_says_how_to_go_on(capsys, monkeypatch, place, runs):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "_exit", sys.exit)
    monkeypatch.setattr("jmeta.runs.training.fit", interrupted)
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", *SINUSOID, "--out", "run"])
    assert stop.value.code == 130
    assert capsys.readouterr().err.endswith("interrupted; go on by `jmeta train --resume --out run`.\n")
    monkeypatch.setattr("jmeta.runs.run.evaluate", interrupted)
    assert fails(capsys, "evaluate", runs / "sinusoid", code=130) == "interrupted.\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_what_is_done(number, code, capsys, monkeypatch, place):
    """Also where the step is none at which a checkpoint is due."""

    def one_scan(*arguments, train_state, callback, **options):
        for step in (1, 2):
            if step == 2:
                os.kill(os.getpid(), number)
            callback(train_state._replace(step=train_state.step + step), {"step": step, "loss": 0.5})
        raise AssertionError("goes on")

    monkeypatch.setattr(os, "_exit", sys.exit)
    monkeypatch.setattr("jmeta.runs.training.fit", one_scan)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", *SINUSOID, "--steps", "100", "--out", "run"])
    assert stop.value.code == code and signal.getsignal(number) is before
    assert capsys.readouterr().err.endswith("interrupted; go on by `jmeta train --resume --out run`.\n")
    assert checkpoint.latest_step(place / "run" / "checkpoint") == 2
    assert [row["step"] for row in read_rows(place / "run")] == [1, 2]


def test_damaged_rows_cost_no_others(place):
    rows = [{"step": i, "loss": 0.5, "seconds": 1.0} for i in (1, 2, 3)]
    lines = [json.dumps(rows[0]), '{"step": 2, "lo', "[]", "5", '{"step": 2}', json.dumps(rows[2])]
    (place / "metrics.jsonl").write_bytes("\n".join(lines).encode() + b"\n\xff\xfe\n")
    assert read_rows(place) == [rows[0], rows[2]]


def test_a_full_disk_is_one_sentence(capsys, monkeypatch, place):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device", "run/learning_curve.png")

    monkeypatch.setattr("jmeta.cli.train.parts_of", full)
    sentence = "error: run/learning_curve.png cannot be written or read (No space left on device); make room"
    assert sentence in fails(capsys, "train", *SINUSOID, "--out", "run")


@pytest.mark.filterwarnings("default:.*episodes are not finite")
def test_a_loss_that_becomes_non_finite(capsys, place):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", *SINUSOID, "--outer-rate", "1e15", "--out", "run"])
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and "not finite at step 1: " in error
    assert error.endswith(
        "go on with other rates by --resume --outer-rate or --resume --inner-rate, or train anew with another --out."
    )
    assert checkpoint.latest_step(place / "run" / "checkpoint") == 1
    result = json.loads(prints(capsys, "evaluate", "run", "--json", "--episodes", "2"))
    assert result["mean_squared_error"] is None or result["mean_squared_error"] > 1e6
    with pytest.raises(SystemExit):
        cli.main(["train", "--out", "run", "--resume", "--no-report"])
    assert checkpoint.latest_step(place / "run" / "checkpoint") == 1


# evaluate


@pytest.mark.slow
def test_a_policy_is_measured_and_drawn_by_updates(place, capsys):
    flags = (
        "--learner",
        "rl2",
        "--data",
        "bandit",
        "--inner-steps",
        "0",
        "--steps",
        "1",
        "--tasks",
        "2",
        "--no-report",
    )
    cli.main(["train", *flags, "--out", "run"])
    result = json.loads(prints(capsys, "evaluate", "run", "--episodes", "20", "--json"))
    assert [row["test_inner_steps"] for row in result["by_inner_steps"]] == [0, 1, 2, 3]
    assert all(0 < row["mean_return"] < 10 and row["ci95"] > 0 for row in result["by_inner_steps"])
    for name in ("adaptation_curve.png", "trajectories.png"):
        with Image.open(place / "run" / name) as image:
            assert min(image.size) > 300 and len(set(image.convert("L").tobytes())) > 10


def test_evaluate_prints_one_object(runs, capsys):
    before = files(runs)
    result = json.loads(prints(capsys, "evaluate", runs / "maml", "--episodes", "5", "--seed", "7", "--json"))
    assert 0 <= result["accuracy"] <= 1 and result["ci95"] >= 0
    expected = {"episodes": 5, "ways": 3, "shots": 1, "queries": 2, "learner": "maml", "data": "glyphs", "seed": 7}
    assert expected.items() <= result.items()
    assert result["transductive"] is False and result["split"] == "test"
    assert files(runs) == before


def test_evaluate_with_unbalanced_queries_and_queries_of_no_class(runs, capsys):
    flags = ("--episodes", "4", "--query-balance", "2", "--open-set")
    result = json.loads(prints(capsys, "evaluate", runs / "prototypical", *flags, "--json"))
    assert (result["query_balance"], result["open_set"]) == (2.0, "other classes")
    assert 0 <= result["fpr95"] <= 1 and 0 <= result["auroc"] <= 1
    printed = prints(capsys, "evaluate", runs / "prototypical", *flags)
    assert "query balance 2, open set: other classes, 4 test episodes" in printed
    assert f"{100 * result['auroc']:.1f} % ±" in printed
    assert "--query-balance has no meaning for sinusoid" in fails(
        capsys, "evaluate", runs / "sinusoid", "--query-balance", "2"
    )


def test_evaluate_regression(runs, capsys):
    result = json.loads(prints(capsys, "evaluate", runs / "sinusoid", "--episodes", "5", "--json"))
    assert result["mean_squared_error"] > 0 and "accuracy" not in result and "ways" not in result
    assert "mean squared error" in prints(capsys, "evaluate", runs / "sinusoid", "--episodes", "5")


def test_evaluate_other_episodes(runs, capsys):
    flags = ("--episodes", "5", "--json", "--ways", "4", "--shots", "2", "--queries", "3", "--split", "validation")
    result = json.loads(prints(capsys, "evaluate", runs / "prototypical", *flags))
    assert {"ways": 4, "shots": 2, "queries": 3, "split": "validation"}.items() <= result.items()


def test_what_is_not_finite_is_null_in_json_however_deep():
    text = as_json({"value": float("nan"), "rows": [{"value": float("inf"), "steps": 1}]})
    assert json.loads(text) == {"value": None, "rows": [{"value": None, "steps": 1}]}


def test_evaluate_without_adapting_is_chance(runs, capsys):
    before, after = (
        json.loads(prints(capsys, "evaluate", runs / "maml", "--episodes", "20", "--json", "--inner-steps", steps))
        for steps in ("0", "3")
    )
    assert (before["test_inner_steps"], after["test_inner_steps"]) == (0, 3)
    assert before["accuracy"] < after["accuracy"]


@pytest.mark.parametrize(
    ("run", "flags", "sentence"),
    [
        ("maml", ("--ways", "4"), "so it cannot take 4"),
        ("maml", ("--episodes", "1"), "episodes is 1; give at least 2"),
        ("maml", ("--inner-steps", "-1"), "inner_steps is -1"),
        ("maml", ("--split", "tset"), "there is no split 'tset'"),
        ("maml", ("--shots", "0"), "shots is 0"),
        ("maml", ("--seed", "-1"), "--seed is -1"),
        ("prototypical", ("--inner-steps", "3"), "--inner-steps has no meaning for prototypical"),
        ("prototypical", ("--inner-steps", "0"), "--inner-steps has no meaning for prototypical"),
        ("prototypical", ("--ways", "5000"), "5000 ways need 5000 classes"),
        ("sinusoid", ("--ways", "3"), "--ways has no meaning for sinusoid"),
        ("missing", (), "missing is no run of jmeta"),
    ],
)
def test_bad_evaluation(run, flags, sentence, runs, capsys):
    assert sentence in fails(capsys, "evaluate", runs / run, *flags)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda config: "",
        lambda config: json.dumps(config)[:50],
        lambda config: "[]",
        lambda config: json.dumps({**config, "extra": 1}),
        lambda config: json.dumps({name: value for name, value in config.items() if name != "seed"}),
        lambda config: json.dumps({**config, "learner": "mamml"}),
        lambda config: json.dumps({**config, "steps": "ten"}),
    ],
)
def test_a_damaged_config(spoil, copy_of, capsys):
    run = copy_of("sinusoid")
    (run / "config.json").write_text(spoil(json.loads((run / "config.json").read_text())))
    before = files(run)
    for command in (("evaluate", run), ("train", "--out", run, "--resume")):
        assert "config.json is damaged or of another version" in fails(capsys, *command)
    assert files(run) == before


def test_a_foreign_checkpoint(copy_of, capsys):
    run, other = copy_of("sinusoid"), copy_of("maml")
    shutil.rmtree(run / "checkpoint")
    shutil.copytree(other / "checkpoint", run / "checkpoint")
    before = files(run)
    for command in (("evaluate", run), ("train", "--out", run, "--resume")):
        assert "is of another model or learner: it has params/" in fails(capsys, *command)
    assert files(run) == before


def test_a_damaged_checkpoint(copy_of, capsys):
    run = copy_of("sinusoid")
    largest = max((run / "checkpoint" / "10").rglob("*"), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    before = files(run)
    for command in (("evaluate", run), ("train", "--out", run, "--resume")):
        assert "checkpoint/10 is damaged; remove it" in fails(capsys, *command)
    assert files(run) == before


def test_no_checkpoint(copy_of, capsys):
    run = copy_of("sinusoid")
    shutil.rmtree(run / "checkpoint")
    assert "there is no checkpoint" in fails(capsys, "evaluate", run)


# adapt


def test_adapt_classifies_own_images(runs, capsys, place):
    support = drawn(place / "support", ("high", "[b]middle", "low"))
    query = drawn(place / "query", ("all",), n=3) / "all"
    flags = ("adapt", runs / "prototypical", "--support", support, "--query", query)
    result = json.loads(prints(capsys, *flags, "--json"))
    assert [Path(row["file"]).name for row in result["predictions"]] == ["0.png", "1.png", "2.png"]
    assert {row["class"] for row in result["predictions"]} <= {"high", "[b]middle", "low"}
    assert all(1 / 3 <= row["probability"] <= 1 for row in result["predictions"])
    table = prints(capsys, *flags)
    assert all(word in table for word in ("file", "class", "probability"))


def test_adapt_recognises_what_it_was_shown(runs, capsys, place):
    support = drawn(place / "support", ("high", "[b]middle", "low"))
    flags = ("adapt", runs / "prototypical", "--support", support, "--query", support)
    rows = json.loads(prints(capsys, *flags, "--json"))["predictions"]
    assert all(Path(row["file"]).parent.name == row["class"] for row in rows)
    assert "[b]middle" in prints(capsys, *flags)


def test_adapt_answers_one_image_as_it_does_among_many(runs, capsys, place):
    support = drawn(place / "support", ("high", "middle", "low"))
    many, one = (drawn(place / name, ("all",), n=n) / "all" for name, n in (("many", 6), ("one", 1)))
    flags = ("adapt", runs / "maml", "--support", support, "--json", "--query")
    among, alone = (json.loads(prints(capsys, *flags, query))["predictions"] for query in (many, one))
    assert alone[0]["class"] == among[0]["class"]
    np.testing.assert_allclose(alone[0]["probability"], among[0]["probability"], rtol=1e-5)


def test_what_was_adapted_is_saved_and_predicts_without_its_run(runs, capsys, place):
    support = drawn(place / "support", ("high", "low"))
    query = drawn(place / "query", ("high", "low"), n=3)
    flags = ("adapt", runs / "prototypical", "--support", support, "--invert")
    assert prints(capsys, *flags, "--save", "tea").splitlines() == ["written to tea"]
    direct = json.loads(prints(capsys, *flags, "--query", query, "--json"))
    stored = json.loads(prints(capsys, "predict", "tea", "--query", query, "--json"))
    for a, b in zip(direct.pop("predictions"), stored["predictions"], strict=True):
        assert (a["file"], a["class"]) == (b["file"], b["class"])
        assert a["probability"] == pytest.approx(b["probability"], rel=1e-4)
    assert direct.items() <= stored.items() and stored["invert"] is True
    both = json.loads(prints(capsys, *flags, "--query", query, "--save", "tea", "--json"))
    assert both["saved"] == "tea" and len(both["predictions"]) == 6


def test_a_query_in_folders_of_classes_is_counted(runs, capsys, place):
    support = drawn(place / "support", ("high", "[b]middle", "low"))
    wrong = drawn(place / "query", ("high", "[b]middle"), n=2)
    shutil.copy(wrong / "high" / "0.png", wrong / "[b]middle" / "2.png")
    flags = ("adapt", runs / "prototypical", "--support", support, "--query", wrong)
    result = json.loads(prints(capsys, *flags, "--json"))
    assert result["classes"] == ["[b]middle", "high", "low"]
    answered = {(Path(row["file"]).parent.name, Path(row["file"]).name): row["class"] for row in result["predictions"]}
    expected = [[0] * 3 for _ in range(3)]
    for (known, _), answer in answered.items():
        expected[result["classes"].index(known)][result["classes"].index(answer)] += 1
    assert result["confusion"] == expected and expected[0][1] >= 1
    right = sum(expected[i][i] for i in range(3))
    assert result["accuracy"] == right / 5
    assert result["interval"][0] < right / 5 < result["interval"][1]
    assert not list(place.glob("**/confusion.png"))
    table = prints(capsys, *flags, "--out", "drawn")
    assert f"accuracy {20 * right}.0 % of 5 images, 95 % interval" in table and "class \\ answer" in table
    with Image.open(place / "drawn" / "confusion.png") as picture:
        assert picture.width > 100
    elsewhere = drawn(place / "elsewhere", ("all",))
    assert "accuracy" not in prints(capsys, *flags[:-1], elsewhere)  # of folders that are no classes


def test_bad_queries_and_files(runs, capsys, place):
    support, query = drawn(place / "support", ("a", "b")), drawn(place / "query", ("a", "zebra"))
    prints(capsys, "adapt", runs / "prototypical", "--support", support, "--save", "tea")
    (place / "damaged").write_bytes((place / "tea").read_bytes()[:-100])
    nearest = jmeta.FewShotClassifier(jmeta.prototypical(jmeta.identity()), {}, {})
    nearest.fit(np.eye(3), ["a", "b", "c"]).save(place / "rows")
    before = files(place)
    adapt = ("adapt", runs / "prototypical", "--support", support)
    for flags, sentence in (
        (adapt, "there is nothing to classify; give images by --query, or a file by --save"),
        ((*adapt, "--save", "x", "--out", "y"), "there is nothing to classify"),
        ((*adapt, "--query", query), "query has a sub-folder 'zebra', which is none of the classes a, b"),
        ((*adapt, "--query", query, "--save", "x"), "none of the classes a, b"),
        ((*adapt, "--query", support / "a", "--out", "x"), "has no sub-folders named as the classes"),
        ((*adapt, "--query", support, "--save", "nowhere/x"), "nowhere/x cannot be written"),
        (("predict", "tea", "--query", query), "none of the classes a, b"),
        (("predict", "tea", "--query", place / "missing"), "missing is missing"),
        (("predict", "tea", "--query", support / "a", "--out", "x"), "has no sub-folders named as the classes"),
        (("predict", "damaged", "--query", support), "damaged is damaged, or no file that jmeta saved"),
        (("predict", "none", "--query", support), "none cannot be read"),
        (("predict", "rows", "--query", support), "was adapted to inputs of shape [3], not to images"),
    ):
        assert sentence in fails(capsys, *flags)
    assert files(place) == before


def test_bad_images(runs, capsys, place):
    support = drawn(place / "support", ("a", "b"))
    (place / "empty").mkdir()
    drawn(place / "broken", ("a",))
    (place / "broken" / "a" / "0.png").write_bytes(b"no image")
    four = drawn(place / "four", "abcd")
    before = files(place)
    for run, shots, query, sentence in (
        ("prototypical", support, place / "empty", "empty holds no images"),
        ("prototypical", place / "empty", support, "empty holds no images"),
        ("prototypical", support, place / "missing", "missing is missing"),
        ("prototypical", support, place / "broken", "0.png cannot be read as an image"),
        ("prototypical", support / "a", support, "holds images outside of a class"),
        ("maml", four, support, "was trained for 3 ways, but"),
        ("sinusoid", support, support, "not on images"),
    ):
        assert sentence in fails(capsys, "adapt", runs / run, "--support", shots, "--query", query)
    assert files(place) == before
