"""The lock of a run folder, and what is told to who is stopped."""

import os
import subprocess
import sys
import threading

import pytest

import jmeta
from jmeta.runs.stopping import LOCK, Signals, only_writer

HOLD = """
import pathlib, sys, time
from jmeta.runs.stopping import only_writer
with only_writer(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_has_one_writer_and_the_sentence_names_it(tmp_path):
    with only_writer(tmp_path / "run"):
        with (
            pytest.raises(jmeta.CheckpointError, match=rf"run is being written by process {os.getpid()} on .* since 2"),
            only_writer(tmp_path / "run"),
        ):
            pass
        assert (tmp_path / "run" / LOCK).exists()
    assert not (tmp_path / "run" / LOCK).exists()
    with only_writer(tmp_path / "run"):
        pass


def test_the_lock_of_a_dead_writer_is_taken_over(tmp_path):
    """Killed, it leaves the file, and the system forgets the lock."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": root()}
    ) as process:
        process.stdout.readline()
        with pytest.raises(jmeta.CheckpointError, match=f"written by process {process.pid} on"), only_writer(tmp_path):
            pass
        process.kill()
        process.wait()
    assert (tmp_path / LOCK).exists()
    with only_writer(tmp_path):
        assert str(os.getpid()) in (tmp_path / LOCK).read_text()


def root():
    return os.path.dirname(os.path.dirname(jmeta.__file__))


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(jmeta.CheckpointError, match=r"cannot be written .*; choose another --out"),
        only_writer(tmp_path / "file" / "run"),
    ):
        pass


def test_no_thread_is_left_that_could_abort_the_end_of_the_process():
    before = threading.enumerate()
    for _ in range(20):
        with Signals():
            pass
        assert threading.enumerate() == before


def test_a_command_ends_well(tmp_path):
    command = [sys.executable, "-m", "jmeta.cli", "train", "--data", "sinusoid", "--steps", "2", "--no-report"]
    ended = subprocess.run([*command, "--out", str(tmp_path / "run")], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
