"""Prepare child processes for signals, and send signals to them.

A forked child inherits the handlers of its parent. A handler that only sets a flag would keep a
child of the program alive on SIGTERM, and `multiprocessing` would wait for it for ever. Such a
child therefore gets the default action of SIGTERM back. Other stop signals keep their handlers:
they are often sent to all processes of a job.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

from harness import preemption

_masks: dict[int, set[int]] = {}  # by thread that forks: the signals that it blocks otherwise
_starting = set[int]()  # threads that start loader workers of this package


def _before_fork() -> None:
    """Block SIGTERM until the child has its action, or it could get lost in between."""
    _masks[threading.get_ident()] = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _unblock() -> None:
    """Block the same signals as before the fork."""
    signal.pthread_sigmask(signal.SIG_SETMASK, _masks.pop(threading.get_ident()))


def _in_child() -> None:
    """Give SIGTERM its default action, unless the child is a loader worker of this package."""
    if threading.get_ident() not in _starting and preemption.is_caught(signal.SIGTERM):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _unblock()


os.register_at_fork(before=_before_fork, after_in_parent=_unblock, after_in_child=_in_child)


def at_exit(function: Callable[[], object]) -> None:
    """Call a function at the exit of this process, but not at that of one that it has forked."""
    pid = os.getpid()
    atexit.register(lambda: function() if os.getpid() == pid else None)


@contextlib.contextmanager
def loader_workers() -> Iterator[None]:
    """Let the processes that this thread forks in the block ignore the stop signals at once.

    They call `shield_loader_worker`; until then a signal only sets the flag that they inherit.
    """
    _starting.add(threading.get_ident())
    try:
        yield
    finally:
        _starting.discard(threading.get_ident())


def shield_loader_worker(worker_id: int = 0) -> None:
    """Prepare a data-loader worker to ignore the stop signals and to die with its rank.

    The stop signals are meant for the rank, which still needs its workers until it stops.
    """
    for number in preemption.STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    preemption.die_with_parent()


def hold_back() -> None:
    """Block the stop signals in the calling thread.

    The kernel delivers them to other threads. A process that the thread starts inherits the mask,
    so that the signals stay blocked there until the process unblocks them.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, preemption.STOP_SIGNALS)


def forward(process_id: int, why: str) -> None:
    """Forward a signal, given by name, to a process; a process that is gone is no error."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process_id, signal.Signals[why])


def kill_group(pid: int) -> None:
    """Send SIGKILL to a process group, given by its leader; a group that is gone is no error."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
