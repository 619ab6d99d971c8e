"""Commands that are stopped from outside, and folders that one command at a time writes into."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from jmeta.errors import CheckpointError

LOCK = "lock"
PATIENCE = 10.0  # seconds for the scan that runs; then what is done is saved as it is


class Signals:
    """SIGINT and SIGTERM: the first ends a command in order, by `KeyboardInterrupt`, and a second at once.

    While XLA computes, Python's own handlers wait. What the system tells is read from a pipe by a thread, which can end
    the process at any time.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._holds = False
        self._begun: Callable[[], bool] = lambda: False
        self._finish: Callable[[], None] = lambda: None
        self._say: Callable[[], None] = lambda: None

    def __enter__(self) -> "Signals":
        if threading.current_thread() is not threading.main_thread():  # which alone may handle signals
            return self
        self._old = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._old_pipe = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        if hasattr(self, "_old"):
            signal.set_wakeup_fd(self._old_pipe)
            for number, handler in self._old.items():
                signal.signal(number, handler)
            os.close(self._write)  # which ends the thread
            self._thread.join(1.0)  # a thread that still runs while Python ends can abort the process

    @property
    def code(self) -> int:
        """The exit code of a stopped command: 130 after SIGINT, 143 after SIGTERM."""
        return 128 + (self.number or signal.SIGINT)

    @contextlib.contextmanager
    def held(self, begun: Callable[[], bool], finish: Callable[[], None], say: Callable[[], None]) -> Iterator[None]:
        """Inside, a signal is only noted in `number`, for the loop to look at.

        Args:
            begun: whether there is anything to save; without, the process ends at once.
            finish: saves what is done, for when the loop does not look in time.
            say: tells how to go on.
        """
        self._holds, self._begun, self._finish, self._say = True, begun, finish, say
        try:
            yield
        finally:
            self._holds = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number
        if not self._holds:
            raise KeyboardInterrupt

    def _watch(self) -> None:
        seen = 0
        while number := os.read(self._read, 1):
            if number[0] not in (signal.SIGINT, signal.SIGTERM):
                continue
            seen += 1
            if seen > 1:
                os._exit(128 + number[0])
            self.number = number[0]
            if self._holds:
                threading.Thread(target=self._late, daemon=True).start()
        os.close(self._read)

    def _late(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while self._holds and self._begun() and time.monotonic() < deadline:
            time.sleep(0.05)
        if self._holds:  # else the loop has looked
            if self._begun():
                self._finish()
            self._say()
            os._exit(self.code)


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Makes a folder, and holds it against a second process that would write into it.

    The system forgets the lock of a process that ended, however it did.

    Args:
        folder: where a run or a search lies.

    Raises:
        CheckpointError: it cannot be written, or somebody else does; the sentence names the process.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stream = _locked(folder)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written ({error.strerror}); choose another --out.") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            (folder / LOCK).unlink()
        stream.close()


def _locked(folder: Path) -> Any:
    try:
        import fcntl
    except ImportError:  # a system without it does without a lock
        return (folder / LOCK).open("a+")
    while True:
        stream = (folder / LOCK).open("a+")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            holder = stream.read().strip() or "another process"
            stream.close()
            raise CheckpointError(
                f"{folder} is being written by {holder}; wait for it, stop it, or choose another --out."
            ) from None
        except OSError:  # a file system without locks
            return stream
        with contextlib.suppress(OSError):
            if os.fstat(stream.fileno()).st_ino == (folder / LOCK).stat().st_ino:  # else its holder just removed it
                break
        stream.close()
    stream.truncate(0)
    stream.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
    stream.flush()
    return stream


def say(sentence: str) -> None:
    """Prints a sentence below whatever is drawn in the terminal."""
    print(f"\n{sentence}" if sys.stderr.isatty() else sentence, file=sys.stderr, flush=True)
