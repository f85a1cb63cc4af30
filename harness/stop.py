"""Signals become one flag: the only door to `signal`.

A handler here does nothing but set the flag. Who acts on it is decided at a step boundary, by all ranks together: a handler
that saved, or that called a collective, would dead-lock as soon as only some ranks got the signal.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import time
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
PR_SET_PDEATHSIG = 1

_requested: list[str] = []
_alarm_set_at = [float("-inf")]


def install() -> None:
    """Let the stop signals set the flag from now on. A second SIGINT ends the process at once."""
    for number in STOP_SIGNALS:
        if number is not signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # under nohup it stays ignored
            signal.signal(number, _handle)


def _handle(number: int, frame: FrameType | None) -> None:
    name = signal.Signals(number).name
    if name == "SIGINT" and name in _requested:
        os._exit(128 + number)
    _requested.append(name)


def requested() -> str | None:
    """The name of the first stop signal that this process got, or None."""
    return _requested[0] if _requested else None


def clear() -> None:
    """Forget what was requested; for a process that starts a second run."""
    _requested.clear()


def shield_loader_worker(worker_id: int = 0) -> None:
    """For a data-loader worker: outlive the signals meant for its rank, and die with its rank."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    _die_with_parent()


def die_with_launcher() -> None:
    """Under torchrun, die when it dies: a worker that outlives its launcher would go on writing as an orphan."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _die_with_parent()


def _die_with_parent() -> None:
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent or parent == 1:  # it died before we asked
        os._exit(1)


def watch(limit_s: float) -> None:
    """From now on, a process that neither calls this again nor `unwatch` for `limit_s` seconds prints its stacks and exits.

    To be called in each step: setting the alarm takes half a millisecond, so it is set again once a second at most.
    """
    if time.monotonic() - _alarm_set_at[0] < min(1.0, limit_s / 4):
        return
    _alarm_set_at[0] = time.monotonic()
    faulthandler.dump_traceback_later(limit_s, exit=True, file=2)  # by number: sys.stderr may be a notebook's, without a file


def unwatch() -> None:
    """What follows may take as long as it likes."""
    _alarm_set_at[0] = float("-inf")
    faulthandler.cancel_dump_traceback_later()
