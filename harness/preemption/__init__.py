"""Signals, requests and deadlines become one flag: the only door to `signal`.

A handler here does nothing but set the flag. Who acts on it is decided at a step boundary, by all ranks together: a handler
that saved, or that called a collective, would dead-lock as soon as only some ranks got the signal.
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
AGAIN_S = 0.5  # what comes sooner is the same one, passed on by a launcher

_requested: list[tuple[str, float]] = []


def install() -> None:
    """Let the stop signals set the flag from now on. A second SIGINT, of a person who insists, ends the process at once."""
    for number in STOP_SIGNALS:
        if number is not signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # under nohup it stays ignored
            signal.signal(number, _handle)


def _handle(number: int, frame: FrameType | None) -> None:
    name = name_of(number)
    before = signalled_at(name)
    if number == signal.SIGINT and before is not None and time.monotonic() - before > AGAIN_S:
        os._exit(128 + number)
    request(name)


@contextlib.contextmanager
def raising(error: Callable[[str, signal.Signals], Exception], most: int) -> Iterator[None]:
    """While the block runs, in which others' code is to end by an error, the first so many stop signals raise one, and those after them
    come to nothing. A second SIGINT ends the process at once."""

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
    """Set the flag: a signal's name, or words for whatever else asks to stop. From any thread."""
    _requested.append((why, time.monotonic()))


def requested() -> str | None:
    """The first thing that asked this process to stop, or None."""
    return _requested[0][0] if _requested else None


def requests() -> list[str]:
    """All that asked this process to stop, in the order of asking."""
    return [why for why, _ in _requested]


def signalled_at(name: str = "SIG") -> float | None:
    """When (`time.monotonic`) the first signal came, or the first of this name; None if none did."""
    return next((at for why, at in _requested if why.startswith(name)), None)


def clear() -> None:
    """Forget what was requested; for a process that starts a second run."""
    _requested.clear()


def name_of(number: int) -> str:
    """A signal's name."""
    return signal.Signals(number).name


def forward(process_id: int, why: str) -> None:
    """Send a signal, by its name, on to another process; one that is gone is no error."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process_id, signal.Signals[why])


def shield_loader_worker(worker_id: int = 0) -> None:
    """For a data-loader worker: outlive the signals meant for its rank, and die with its rank."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    die_with_parent()


@contextlib.contextmanager
def noticed_at_once() -> Iterator[Callable[[], bool]]:
    """While the block runs, what it gives tells other threads whether a stop signal has come, also when the main thread cannot run its
    handler, as it waits inside a library. For the main thread."""
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    came, lock = list[int](), threading.Lock()

    def noticed() -> bool:
        with lock, contextlib.suppress(OSError):  # nothing to read, or closed
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


def hold_back() -> None:
    """For a thread: let the stop signals come to others, and to no process that it starts until that one has made up its mind."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


def kill_group(pid: int) -> None:
    """End a process that leads a group of its own, with all that it has started; one that is gone is no error."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def die_with_launcher() -> None:
    """Under torchrun, die when it dies: a worker that outlives its launcher would go on writing as an orphan."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()


def die_with_parent() -> None:
    """Be killed by the kernel when the parent dies, however it does; at once if it is dead already."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent or (parent == 1 and not _first_process_is_python()):
        os._exit(1)


def _first_process_is_python() -> bool:
    """In a container the launcher itself may be process 1, which elsewhere is what adopts orphans."""
    try:
        return os.path.realpath("/proc/1/exe") == os.path.realpath(sys.executable)
    except OSError:
        return False
