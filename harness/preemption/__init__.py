"""Turn stop signals, deadlines and other stop requests into one flag per process.

Only this part of the package uses `signal`. A handler does nothing but set the flag, except that a
second SIGINT ends the process. All ranks decide together at a step boundary how to act on it: a
handler that saved a checkpoint or called a collective would deadlock if only some ranks received
the signal.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
PR_SET_PDEATHSIG = 1
# A second SIGINT within this time is the same one, forwarded by a launcher.
AGAIN_S = 0.5

_requested: list[tuple[str, float]] = []  # reason, and `time.monotonic` of the request


def install() -> None:
    """Install the handlers that let stop signals set the flag.

    A second SIGINT, more than `AGAIN_S` seconds after the first, ends the process at once. SIGHUP
    stays ignored if it is ignored now.
    """
    for number in STOP_SIGNALS:
        # Under nohup, SIGHUP is ignored and stays so.
        if number is not signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _handle)


def _handle(number: int, frame: FrameType | None) -> None:
    """Set the flag for a signal; exit at once on a second SIGINT after `AGAIN_S` seconds."""
    name = name_of(number)
    before = signalled_at(name)
    if number == signal.SIGINT and before is not None and time.monotonic() - before > AGAIN_S:
        os._exit(128 + number)
    request(name)


@contextlib.contextmanager
def raising(error: Callable[[str, signal.Signals], Exception], most: int) -> Iterator[None]:
    """Let the first stop signals raise an error inside the block.

    The block runs code of others that can only be ended by an error. Signals after the first `most`
    set the flag but raise nothing. A second SIGINT ends the process at once.

    Args:
        error: Function that makes the error from a message and the signal.
        most: Number of signals that raise an error.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        _handle(number, frame)
        if len(_requested) <= most:
            raise error(f"got {name_of(number)}", signal.Signals(number))

    install()
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number, handler in before.items():
        if handler is _handle:
            signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def request(why: str) -> None:
    """Request a stop; may be called from any thread.

    Args:
        why: Name of the signal, or a description of any other reason to stop.
    """
    _requested.append((why, time.monotonic()))


def requested() -> str | None:
    """Return the first reason to stop this process, or None if no stop was requested."""
    return _requested[0][0] if _requested else None


def requests() -> list[str]:
    """Return all reasons to stop this process, in the order of the requests."""
    return [why for why, _ in _requested]


def signalled_at(name: str = "SIG") -> float | None:
    """Return the `time.monotonic` time of the first stop signal, or None if there was none.

    Args:
        name: Prefix of the signal's name, for the time of the first signal of this name.
    """
    return next((at for why, at in _requested if why.startswith(name)), None)


def clear() -> None:
    """Clear all stop requests, for a process that starts a second run."""
    _requested.clear()


def is_caught(number: int) -> bool:
    """Return whether a handler of this module is installed for a signal in this process."""
    return getattr(signal.getsignal(number), "__module__", None) == __name__


def name_of(number: int) -> str:
    """Return the name of a signal."""
    return signal.Signals(number).name


@contextlib.contextmanager
def noticed_at_once() -> Iterator[Callable[[], bool]]:
    """Yield a function with which other threads detect a stop signal at once.

    It also works while the main thread cannot run its signal handler because it waits inside a
    library. Only the main thread may enter the block.
    """
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    came, lock = list[int](), threading.Lock()

    def noticed() -> bool:
        with lock, contextlib.suppress(OSError):  # the pipe is empty or closed
            came.extend(os.read(reader, 100))
        return requested() is not None or any(number in STOP_SIGNALS for number in came)

    try:
        yield noticed
    finally:
        signal.set_wakeup_fd(before)
        with lock:
            os.close(writer)
            os.close(reader)
            reader = -1


def die_with_launcher() -> None:
    """Under torchrun, let the kernel kill this process when the launcher dies.

    A worker that outlives its launcher would continue to write as an orphan.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()


def die_with_parent() -> None:
    """Let the kernel send SIGKILL to this process when its parent dies, for whatever reason.

    The process exits with code 1 at once if the parent is dead already.
    """
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent or (parent == 1 and not _first_process_is_python()):
        os._exit(1)


def _first_process_is_python() -> bool:
    """Return True if process 1 runs this Python interpreter.

    In a container the launcher itself may be process 1. Elsewhere process 1 adopts orphans.
    """
    try:
        return os.path.realpath("/proc/1/exe") == os.path.realpath(sys.executable)
    except OSError:
        return False
