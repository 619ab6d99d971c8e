"""Runs that several processes train together, here two of two devices each, which meet over loopback."""

import functools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import jmeta
from jmeta.cli import main
from jmeta.runs import hosts
from jmeta.runs.run import read_rows

COMMAND = """
import sys
from jmeta.runs import hosts
hosts.HEARTBEAT, hosts.CONNECTING = 8, {connecting}
from jmeta.cli import main
main()
"""
FLAGS = ("--learner", "maml", "--data", "sinusoid", "--tasks", "4", "--steps", "20")


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def started(script, *arguments, devices=2):
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices)}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def job(*flags, of_one=((), ()), connecting=120):
    """The two processes of `jmeta train --distributed`."""
    meeting = ("--distributed", "--coordinator", f"127.0.0.1:{free_port()}", "--processes", 2)
    command = COMMAND.format(connecting=connecting)
    return [started(command, "train", *flags, *own, *meeting, "--process-id", i) for i, own in enumerate(of_one)]


def ended(processes, limit=300):
    """The exit code and the lines of the error stream of each process, which ends by itself."""
    try:
        told = [process.communicate(timeout=limit)[1].splitlines() for process in processes]
        return [(process.returncode, lines) for process, lines in zip(processes, told, strict=True)]
    finally:
        for process in processes:
            process.kill()


def until_at(folder, step, limit=200):
    """Waits for a job that was just started to be at a step."""
    file, begun = folder / "metrics.jsonl", time.time()
    while not (file.exists() and file.stat().st_mtime > begun and len(read_rows(folder)) >= step):
        assert time.time() < begun + limit
        time.sleep(0.05)


def errors(lines):
    return [line for line in lines if line.startswith("error: ")]


def rows_of(folder):
    return [{name: x for name, x in row.items() if name != "seconds"} for row in read_rows(folder)]


def alone(*flags, devices):
    """A run of one process that ends well."""
    ((code, lines),) = ended([started(COMMAND.format(connecting=1), "train", *flags, devices=devices)])
    assert code == 0, lines


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hosts") / "run"
    (code, lines), (other, silent) = ended(job(*FLAGS, "--out", folder))
    assert (code, other) == (0, 0), (lines, silent)
    assert any("evaluating on unseen tasks" in line for line in lines) and not errors(lines)
    assert not any("meta-training" in line or "evaluating" in line for line in silent)  # the first alone prints
    return folder


@pytest.mark.slow
def test_two_processes_have_the_numbers_of_one(undisturbed, tmp_path):
    assert json.loads((undisturbed / "config.json").read_text())["devices"] == 4
    alone(*FLAGS, "--devices", 4, "--out", tmp_path / "one", devices=4)
    rows, expected = rows_of(undisturbed), rows_of(tmp_path / "one")
    assert [row["step"] for row in rows] == list(range(1, 21))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4)
    jax.tree.map(close, rows, expected)
    result, other = (json.loads((folder / "result.json").read_text()) for folder in (undisturbed, tmp_path / "one"))
    assert result["mean_squared_error"] == pytest.approx(other["mean_squared_error"], rel=1e-4)
    run = jmeta.load(undisturbed)  # here, on two devices of one process
    params = jmeta.restore(undisturbed / "checkpoint", run.train_state, only="params")
    jax.tree.map(np.testing.assert_array_equal, params, run.train_state.params)


MOMENTS = int(os.environ.get("JMETA_KILLS", "3"))


@pytest.mark.slow
def test_a_killed_job_ends_and_goes_on_bit_identically(undisturbed, tmp_path):
    out, moments = tmp_path / "run", random.Random(int(os.environ.get("JMETA_KILLS_SEED", "0")))
    steps = sorted(moments.sample(range(1, 20), MOMENTS))
    for i, step in enumerate(steps):
        processes = job(*FLAGS, "--out", out, "--resume")
        until_at(out, step)
        time.sleep(moments.random())  # in the middle of a scan, a validation, or a checkpoint
        victim = i % 2
        processes[victim].send_signal(signal.SIGKILL)
        begun = time.monotonic()
        results = ended(processes, limit=60)
        assert time.monotonic() - begun < 60
        code, lines = results[1 - victim]
        if code == 0:  # the run had ended
            continue
        assert len(errors(lines)) == 1 and "the job ended, as a process of it was killed" in errors(lines)[0], lines
        print(
            f"killed process {victim} after step {step}: the other ended with {code}, {time.monotonic() - begun:.1f} s"
        )
    assert [code for code, _ in ended(job(*FLAGS, "--out", out, "--resume"))] == [0, 0]
    assert rows_of(out) == rows_of(undisturbed)
    one, other = (jmeta.load(folder) for folder in (out, undisturbed))
    for kept in ("train_state", "best"):
        pair = (jax.tree.map(raw, getattr(run, kept)) for run in (one, other))
        jax.tree.map(np.testing.assert_array_equal, *pair)
    # and on another number of devices and hosts
    alone("--resume", "--steps", 22, "--devices", 1, "--no-report", "--out", out, devices=1)
    assert read_rows(out)[-1]["step"] == 22
    assert json.loads((out / "config.json").read_text())["devices"] == 1


def raw(x):
    return jax.random.key_data(x) if jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key) else x


@pytest.mark.slow
def test_a_signal_to_one_process_ends_all_in_order(tmp_path):
    out = tmp_path / "run"
    processes = job(*FLAGS, "--out", out)
    until_at(out, 2)
    processes[1].send_signal(signal.SIGTERM)
    for code, lines in ended(processes):
        assert code == 143 and lines[-1].startswith("interrupted; go on by `jmeta train --resume"), lines
    assert jmeta.load(out, checkpoint="last").train_state.step == len(read_rows(out))


@pytest.mark.slow
def test_other_settings_and_a_silent_coordinator_are_told(tmp_path):
    out = tmp_path / "run"
    for code, lines in ended(job(*FLAGS, "--out", out, of_one=(("--seed", 0), ("--seed", 1)))):
        assert code == 2 and len(errors(lines)) == 1
        assert "process 1 has other settings than process 0; start all of them with the same" in errors(lines)[0]
    assert not out.exists()
    first, second = job(*FLAGS, "--out", out, connecting=4)
    first.kill()
    _, (code, lines) = ended([first, second], limit=60)
    assert code == 2 and len(lines) == 1
    assert "the processes of the job did not all meet at 127.0.0.1:" in lines[0] and "within 4 s" in lines[0]


LIBRARY = """
import sys
import jax, jax.numpy as jnp, optax
where, processes, process = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
if processes > 1:
    jax.distributed.initialize(where, processes, process)
import jmeta, numpy as np

def exact(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)

with jax.enable_x64(True):
    source = jmeta.sinusoid(shots=3, queries=3)
    source = source._replace(sample=lambda key, data, sample=source.sample: exact(sample(key, data)))
    learner = jmeta.maml(jmeta.linen(jmeta.MLP(outputs=1)), inner_rate=0.01, loss=jmeta.mean_squared_error)
    rough = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)
    learner = learner._replace(init=lambda key, task, init=learner.init: exact(init(key, rough(task))))
    mesh = jax.make_mesh((4,), ("tasks",))
    fit = {"steps": 20, "tasks": 8, "log_every": 10, "mesh": mesh}
    fitted = jmeta.fit(jax.random.key(0), learner, source, **fit)
    again = jmeta.fit(jax.random.key(0), learner, source, train_state=fitted.train_state, **fit | {"steps": 25})
    ask = {"episodes": 6, "metric": jmeta.mean_squared_error, "mesh": mesh}
    result = jmeta.evaluate(jax.random.key(1), learner, again.params, again.state, source, **ask)
    numbers = [result["mean_squared_error"], *(row["loss"] for row in fitted.history + again.history)]
    numbers += [float(np.abs(np.asarray(x)).sum()) for x in jax.tree.leaves(again.params)]
print("numbers", *numbers)
"""


@pytest.mark.slow
def test_fit_and_evaluate_in_float64_have_the_numbers_of_one_process():
    where = f"127.0.0.1:{free_port()}"
    processes = [started(LIBRARY, where, 2, i) for i in range(2)] + [started(LIBRARY, where, 1, 0, devices=4)]
    found = []
    for process, (out, err) in [(process, process.communicate(timeout=400)) for process in processes]:
        assert process.returncode == 0, err
        found.append([float(x) for line in out.splitlines() if "numbers" in line for x in line.split()[1:]])
    assert found[0] == found[1] and len(found[0]) > 5
    np.testing.assert_allclose(found[0], found[2], rtol=1e-6)


def test_flags_of_several_processes_are_checked(tmp_path, monkeypatch, capsys):
    for flags, sentence in (
        (["--coordinator", "here:1"], "are of several processes; add --distributed"),
        (["--distributed"], "the processes of the job are not known (coordinator_address should be defined)"),
    ):
        monkeypatch.setattr(jax.distributed, "initialize", refused)
        with pytest.raises(SystemExit) as stop:
            main(["train", *FLAGS, "--out", str(tmp_path / "run"), *flags])
        assert stop.value.code == 2 and sentence in capsys.readouterr().err
    monkeypatch.setattr(hosts, "several", lambda: True)
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    with pytest.raises(jmeta.ConfigError, match="--devices is 7, and the job has 2; leave the flag away"):
        train_of(tmp_path, "--devices", "7")._resolved()
    assert train_of(tmp_path)._resolved()[0].devices == 2


def refused(*_, **__):
    raise ValueError("coordinator_address should be defined.")


def train_of(tmp_path, *flags):
    import tyro

    from jmeta.cli.train import Train

    return tyro.cli(
        Train, args=[*FLAGS, "--out", str(tmp_path / "run"), *flags], config=(tyro.conf.FlagCreatePairsOff,)
    )


def test_what_differs_between_processes_is_named(monkeypatch):
    monkeypatch.setattr(hosts, "several", lambda: True)
    other = {}

    def of_two(mine):
        theirs = mine.copy()
        theirs[("code", "settings", "steps_done").index(other["what"]), 0] ^= 1
        return np.stack([mine, theirs])

    monkeypatch.setattr(hosts.multihost_utils, "process_allgather", of_two)
    for what in ("code", "settings", "steps_done"):
        other["what"] = what
        with pytest.raises(jmeta.HostError, match=f"process 1 has other .*{what.replace('_', ' ')}.* than process 0"):
            hosts.check_same(settings={"seed": 0}, steps_done=3)


def test_another_process_than_the_first_writes_and_prints_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hosts, "is_first", lambda: False)
    monkeypatch.setattr("jmeta.runs.training.save", lambda *_: None)
    main(["train", *FLAGS[:-1], "2", "--devices", "1", "--out", str(tmp_path / "run")])
    assert capsys.readouterr() == ("", "") and not (tmp_path / "run").exists()
