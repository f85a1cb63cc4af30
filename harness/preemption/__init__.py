"""Turn stop signals, deadlines and other stop requests into one flag per process.

Only this part of the package uses `signal`. A handler does nothing but set the flag, except that a
second SIGINT ends the process. All ranks decide together at a step boundary how to act on it: a
handler that saved a checkpoint or called a collective would deadlock if only some ranks received
the signal. Once a run is over, SIGINT raises KeyboardInterrupt, as it does without these handlers.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
PR_SET_PDEATHSIG = 1
# A second SIGINT within this time is the same one, forwarded by a launcher.
AGAIN_S = 0.5

_requested: list[tuple[str, float]] = []  # reason, and `time.monotonic` of the request
_runs = 0  # number of times that the handlers were installed
_is_over = False  # whether the run that they were installed for last is over


def install() -> None:
    """Install the handlers that let stop signals set the flag, for a run that begins.

    A second SIGINT, more than `AGAIN_S` seconds after the first, ends the process at once. SIGHUP
    stays ignored if it is ignored now. Requests to stop a run that is over are cleared.
    """
    global _runs, _is_over
    if _is_over:
        clear()
    _runs, _is_over = _runs + 1, False
    for number in STOP_SIGNALS:
        # Under nohup, SIGHUP is ignored and stays so.
        if number is not signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handle)


def current_run() -> int:
    """Return the number of the run that the handlers were installed for last."""
    return _runs


def over(run: int) -> None:
    """Note that a run is over; nothing changes if another run of this process has begun."""
    global _is_over
    _is_over = _is_over or run == _runs


def clear() -> None:
    """Clear all stop requests."""
    _requested.clear()


def handle(number: int, frame: FrameType | None) -> None:
    """Set the flag for a signal; exit at once on a second SIGINT after `AGAIN_S` seconds.

    Raises:
        KeyboardInterrupt: The signal is SIGINT and the run is over, unless the signal before came
            within `AGAIN_S` seconds.
    """
    name, now = name_of(number), time.monotonic()
    before = [at for why, at in _requested if why == name]
    request(name)
    if number == signal.SIGINT and before and not _is_over and now - before[0] > AGAIN_S:
        os._exit(128 + number)
    if number == signal.SIGINT and _is_over and not (before and now - before[-1] <= AGAIN_S):
        raise KeyboardInterrupt


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


def is_caught(number: int) -> bool:
    """Return whether a handler of this part of the package is installed for a signal."""
    return str(getattr(signal.getsignal(number), "__module__", "")).startswith(__name__)


def name_of(number: int) -> str:
    """Return the name of a signal."""
    return signal.Signals(number).name


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
