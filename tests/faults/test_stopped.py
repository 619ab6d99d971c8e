"""Runs that are stopped, doubled and starved, as processes of their own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import jmeta
from jmeta.runs import checkpoint

pytestmark = pytest.mark.slow
ROOT = Path(jmeta.__file__).parents[1]
SETTINGS = ("--data", "sinusoid", "--tasks", "16", "--inner-rate", "0.02", "--seed", "3")


def begin(out, *flags, steps=20_000, **options):
    settings = () if "--resume" in flags else (*SETTINGS, "--steps", str(steps))
    return subprocess.Popen(
        [sys.executable, "-m", "jmeta.cli", "train", "--no-report", *settings, "--out", str(out), *flags],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def rows(out):
    file = out / "metrics.jsonl"
    return [json.loads(line)["step"] for line in file.read_text().splitlines()] if file.exists() else []


def wait_for_rows(process, out, count):
    while len(rows(out)) < count:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


def leaves(out):
    state = jmeta.load(out).train_state
    return int(state.step), [np.asarray(x).tobytes() for x in jax.tree.leaves((state.params, state.optimizer_state))]


def last(error):
    return error.strip().splitlines()[-1]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_run_goes_on_bit_for_bit(number, code, tmp_path):
    out, whole = tmp_path / "run", tmp_path / "whole"
    with begin(out, steps=2000) as process:
        wait_for_rows(process, out, 7)
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
    assert process.returncode == code
    assert last(error) == f"interrupted; go on by `jmeta train --resume --out {out}`."
    assert "Traceback" not in error
    assert checkpoint.latest_step(out / "checkpoint") == rows(out)[-1]  # nothing is lost
    for arguments in ((out, "--resume"), (whole,)):
        with begin(*arguments, steps=2000) as process:
            _, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
    assert leaves(out) == leaves(whole) and rows(out) == rows(whole)


def test_a_second_signal_ends_at_once(tmp_path):
    """Within a scan that takes long, for which the first waits."""
    out = tmp_path / "run"
    with begin(out, steps=2_000_000) as process:  # a scan of 20,000 steps
        while not (out / "config.json").exists():
            time.sleep(0.01)
        time.sleep(8)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        begun = time.monotonic()
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 143 and time.monotonic() - begun < 2


def test_ctrl_c_during_the_imports_is_one_word(tmp_path):
    for delay in (0.3, 0.6, 1.0, 1.5):
        with subprocess.Popen(
            [sys.executable, "-c", "import _jmeta_command as c; c.main()", "list"],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            time.sleep(delay)
            process.send_signal(signal.SIGINT)
            _, error = process.communicate(timeout=60)
        assert process.returncode in (0, 130, -signal.SIGINT)
        assert "Traceback" not in error or delay < 0.5  # before the first line of Python of ours


def test_a_second_writer_is_refused_and_the_first_goes_on(tmp_path):
    out = tmp_path / "run"
    with begin(out, steps=2000) as first:
        wait_for_rows(first, out, 3)
        with begin(out, "--resume") as second:
            _, error = second.communicate(timeout=120)
        assert second.returncode == 2 and f"is being written by process {first.pid} on" in last(error)
        first.communicate(timeout=300)
    assert first.returncode == 0
    assert rows(out) == list(range(20, 2001, 20))


def test_a_full_disk_ends_a_run_in_one_sentence(tmp_path):
    """From one moment on no file may be written beyond 100 bytes."""
    import resource

    out = tmp_path / "run"
    with begin(out, steps=2000) as process:
        wait_for_rows(process, out, 11)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100, 100))
        _, error = process.communicate(timeout=120)
    assert process.returncode == 2, error
    assert "Traceback" not in error and "cannot be written" in last(error)
    step = checkpoint.latest_step(out / "checkpoint")
    assert step is not None
    with begin(out, "--resume") as process:
        _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    assert rows(out) == list(range(20, 2001, 20))
