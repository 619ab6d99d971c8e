"""A run that several processes train together, on one host or on many, by JAX's distributed runtime."""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree

import jmeta
from jmeta.devices import replicated
from jmeta.errors import ConfigError, HostError, JmetaError, reason_of

CONNECTING = 300  # seconds until all processes must have met
HEARTBEAT = 30  # seconds without a sign of life of a process, after which all others end
ENDING = 7 * 24 * 3600  # seconds that the others wait for the first, which evaluates alone
_LOST = (
    "the job ended, as a process of it was killed, failed, or cannot be reached any more; see what each of them "
    "printed, and start all again with --resume"
)
_LAST_WORDS = (
    "import signal, sys; [signal.signal(n, signal.SIG_IGN) for n in (signal.SIGINT, signal.SIGTERM)]; "
    "sys.stdin.read() or print(sys.argv[1], file=sys.stderr)"
)
_speaker: list["subprocess.Popen[bytes]"] = []


def several() -> bool:
    """Whether this is one of the processes of a distributed run."""
    return jax.distributed.is_initialized()


def is_first() -> bool:
    """Whether this process is the one that writes and prints; the only one always is."""
    return not several() or jax.process_index() == 0


@contextlib.contextmanager
def together(coordinator: str | None, process_id: int | None, processes: int | None) -> Iterator[None]:
    """Meets the other processes, and waits for them at the end; where one is lost, all end with a sentence.

    JAX itself aborts a process that waits for another which is gone; a helper process says the sentence then.

    Args:
        coordinator: `HOST:PORT` of process 0; None where Slurm, Cloud TPU or MPI tell.
        process_id: from 0; None likewise.
        processes: how many there are; None likewise.

    Raises:
        ConfigError: nothing tells which processes there are, or JAX has started.
        HostError: another process is gone.
    """
    _speaker[:] = [_last_words()]
    _begin(coordinator, process_id, processes)
    try:
        yield
        jax.distributed.shutdown()
        quiet()
    except JmetaError:
        raise
    except Exception as error:
        if is_of_others(error):
            raise HostError(f"{_LOST} ({reason_of(error)}).") from error
        if isinstance(error, OSError):
            raise
        traceback.print_exc()
        leave(1)  # Python would wait for the others, and they for this process


def _begin(coordinator: str | None, process_id: int | None, processes: int | None) -> None:
    def late() -> None:
        where = f"at {coordinator}" if coordinator else "at their coordinator"
        print(
            f"error: the processes of the job did not all meet {where} within {CONNECTING} s; see that each of them "
            "runs, with the same --processes, that --coordinator names the host of process 0, and that its port is "
            "open.",
            file=sys.stderr,
            flush=True,
        )
        quiet()
        os._exit(2)

    jax.config.update("jax_enable_preemption_service", False)  # which would take SIGTERM
    timer = threading.Timer(CONNECTING, late)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process_id,
            initialization_timeout=CONNECTING + 60,  # JAX ends a process that is late without a sentence
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=ENDING,
        )
    except (ValueError, TypeError, RuntimeError) as error:
        quiet()
        raise ConfigError(
            f"the processes of the job are not known ({reason_of(error)}); start them by Slurm, MPI or on a Cloud TPU, "
            "or give each --coordinator HOST:PORT, --processes and --process-id."
        ) from error
    finally:
        timer.cancel()


def is_of_others(error: BaseException | None) -> bool:
    """Whether an error is of what JAX does with other processes, or comes of such a one."""
    while error is not None and not isinstance(error, jax.errors.JaxRuntimeError):
        error = error.__cause__ or error.__context__
    return error is not None and jax.process_count() > 1


def check_same(**facts: Any) -> None:
    """Compares all that has to be the same in all processes: the code, and some facts about the run.

    Args:
        facts: of any type that JSON has, by what they are called in the sentence, in the plural or uncountable.

    Raises:
        HostError: they differ, or the processes have unequally many devices; the sentence is the same in all of them.
    """
    if not several():
        return
    counts = Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) > 1:
        each = ", ".join(str(counts[i]) for i in sorted(counts))
        raise HostError(f"the processes have {each} devices; give each of them equally many.")
    facts = {"code of jmeta or JAX": [jmeta.__version__, jax.__version__, _code()]} | facts
    digests = [hashlib.sha256(json.dumps(fact, sort_keys=True).encode()).digest() for fact in facts.values()]
    all_digests = multihost_utils.process_allgather(np.frombuffer(b"".join(digests), np.uint8).reshape(len(facts), -1))
    for i, name in enumerate(facts):
        differs = (all_digests[:, i] != all_digests[0, i]).any(axis=1)
        if differs.any():
            others = ", ".join(str(process) for process in np.flatnonzero(differs))
            raise HostError(
                f"process {others} has other {name.replace('_', ' ')} than process 0; start all of them with the "
                "same code, the same flags, and an --out that lies on a file system of all hosts."
            )


def largest(value: int) -> int:
    """The largest of what the processes have, the same in all of them."""
    return int(multihost_utils.process_allgather(np.asarray(value, np.int32)).max()) if several() else value


def of_first(value: int) -> int:
    """What the first process has."""
    return int(multihost_utils.broadcast_one_to_all(np.asarray(value, np.int32))) if several() else value


def everywhere(tree: PyTree) -> PyTree:
    """The arrays on the devices of all processes, as Orbax wants them; on one process as they are."""
    if jax.process_count() == 1:
        return tree
    return replicated(jax.make_mesh((jax.device_count(),), ("devices",), (jax.sharding.AxisType.Auto,)), tree)


def wait(name: str) -> None:
    """Until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def quiet() -> None:
    """Nothing more has to be said at the end of this process."""
    for process in _speaker:
        with contextlib.suppress(OSError):
            process.communicate(b".")
    _speaker.clear()


def leave(code: int) -> NoReturn:
    """Ends the process, which has said why; where there are others, without waiting for them."""
    quiet()
    if not several():
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _last_words() -> "subprocess.Popen[bytes]":
    """A process that says the sentence if this one ends without having been `quiet`, however it does."""
    command = [sys.executable, "-I", "-S", "-c", _LAST_WORDS, f"error: {_LOST}."]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def _code() -> str:
    """A digest of the sources of jmeta."""
    digest = hashlib.sha256()
    root = Path(jmeta.__file__).parent
    for file in sorted(root.rglob("*.py")):
        digest.update(file.relative_to(root).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()
