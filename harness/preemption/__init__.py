"""Turn stop signals, deadlines and other stop requests into one flag per process.

Only this part of the package uses `signal`. A handler does nothing but set the flag, except that a
second SIGINT ends the process. All ranks decide together at a step boundary how to act on it: a
handler that saved a checkpoint or called a collective would deadlock if only some ranks received
the signal. Once a run is over, the stop signals do what they did before it: nobody would look at
the flag any more.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import signal
import sys
import time
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
PR_SET_PDEATHSIG = 1
# A second SIGINT within this time is the same one, forwarded by a launcher. So is every signal
# once a run is over: a launcher may forward one under another name.
AGAIN_S = 0.5

_requested: list[tuple[str, float]] = []  # reason, and `time.monotonic` of the request
_runs = 0  # number of times that the handlers were installed
_is_over = False  # whether the run that they were installed for last is over
_has_acted = False  # whether that run has ended because of the requests
_before: dict[int, Any] = {}  # what a signal did before the handlers were installed
# `time.monotonic` of the last signal that was passed on, or of the end of a run that had got one.
_passed_on_at = -math.inf


def install() -> None:
    """Install the handlers that let stop signals set the flag, for a run that begins.

    A second SIGINT, more than `AGAIN_S` seconds after the first, ends the process at once. SIGHUP
    stays ignored if it is ignored now. Requests to stop a run that is over are cleared. A signal
    that came too late to stop that run stays: it was meant for the whole process. SIGINT is not
    kept, because people interrupt what they see.
    """
    global _runs, _is_over, _has_acted
    if _is_over:
        _requested[:] = [
            (why, at)
            for why, at in _requested
            if not _has_acted and why.startswith("SIG") and why != "SIGINT"
        ]
    _runs, _is_over, _has_acted = _runs + 1, False, False
    for number in STOP_SIGNALS:
        action = signal.getsignal(number)
        # Under nohup, SIGHUP is ignored and stays so.
        if number is signal.SIGHUP and action is signal.SIG_IGN:
            continue
        if not is_caught(number):
            _before[number] = action
        signal.signal(number, handle)


def current_run() -> int:
    """Return the number of the run that the handlers were installed for last."""
    return _runs


def over(run: int, *, has_acted: bool = False) -> None:
    """Note that a run is over, and give the stop signals back what they did before it.

    Nothing changes if another run of this process has begun. `has_acted` says that the run has
    ended because of the requests.
    """
    global _is_over, _has_acted, _passed_on_at
    if _is_over or run != _runs:
        return
    _is_over, _has_acted = True, has_acted
    if signalled_at() is not None:
        # The same signal may still be forwarded; `_pass_on` tells it from a new one.
        _passed_on_at = time.monotonic()
        return
    with contextlib.suppress(ValueError):  # not in the main thread; `_pass_on` does the same later
        for number, action in _before.items():
            is_ours = action is not None and signal.getsignal(number) is handle
            if is_ours and number != signal.SIGINT:  # people and launchers send that one twice
                signal.signal(number, action)


def clear() -> None:
    """Clear all stop requests."""
    _requested.clear()


def handle(number: int, frame: FrameType | None) -> None:
    """Set the flag for a signal; exit at once on a second SIGINT after `AGAIN_S` seconds.

    Once the run is over, the signal does what it did before the run.

    Raises:
        KeyboardInterrupt: The signal is SIGINT, the run is over, and nothing else was installed.
    """
    name, now = name_of(number), time.monotonic()
    if _is_over:
        _pass_on(number, frame, now)
        return
    before = [at for why, at in _requested if why == name]
    request(name)
    if number == signal.SIGINT and before and now - before[0] > AGAIN_S:
        os._exit(128 + number)


def _pass_on(number: int, frame: FrameType | None, now: float) -> None:
    """Do what a signal did before the run, unless it may be one that was acted on just now."""
    global _passed_on_at
    if now - _passed_on_at <= AGAIN_S:
        return
    _passed_on_at, action = now, _before.get(number, signal.SIG_DFL)
    if callable(action):
        action(number, frame)
    elif action is signal.SIG_DFL:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


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
