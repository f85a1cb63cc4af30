"""End a process that makes no progress, after reporting the stack of each thread.

The launcher or supervisor that started the process restarts it.
"""

from __future__ import annotations

import faulthandler
import os
import threading
import time
import traceback
from collections.abc import Callable

from harness.threads import current_frames

TICK_S = 0.5
# A tick that is this late is no hang: the whole process was stopped (SIGSTOP, scontrol suspend, a
# closed laptop).
SUSPENDED_S = 1.0
REPORT_S = 15.0  # time limit of `on_hang`
# Margin of the faulthandler timer. It is also the longest suspension that a process survives, since
# that timer keeps running during a suspension.
BACKSTOP_S = 1800.0

OnHang = Callable[[str, float, str], object]  # the work, its limit in seconds, all stacks


_living: list[Watchdog] = []


def close_living() -> None:
    """Close all open watchdogs, such as that of an earlier run's loop left open in a notebook."""
    while _living:
        _living.pop().close()


class Watchdog:
    """A thread that ends the process with exit code 1 if work exceeds its time limit.

    `expect` sets the limit before each piece of work. A new watchdog closes the previous ones.

    Args:
        on_hang: Callback that reports a hang, called before the process ends.
        clock: Function that returns the current time in seconds.
        leave: Function that ends the process with an exit code.
    """

    def __init__(
        self,
        on_hang: OnHang,
        clock: Callable[[], float] = time.monotonic,
        leave: Callable[[int], object] = os._exit,
    ) -> None:
        self.clock, self._on_hang, self._leave = clock, on_hang, leave
        close_living()
        _living.append(self)
        self._awaited: tuple[float, str, float] | None = None
        self._thread: threading.Thread | None = None
        self._over = threading.Event()

    def expect(self, activity: str, limit_s: float) -> None:
        """Allow `activity` to take `limit_s` seconds, until the next call of `expect` or `rest`.

        A call costs less than a microsecond, except for the first, which starts the thread.
        """
        self._awaited = (self.clock() + limit_s, activity, limit_s)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True, name="watchdog")
            self._thread.start()

    def rest(self) -> None:
        """Remove the time limit until the next call of `expect`."""
        self._awaited = None

    def close(self) -> None:
        """End the thread and cancel the faulthandler timer."""
        self._over.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _run(self) -> None:
        """Check the time limit at each tick until `close`."""
        before = self.clock()
        while not self._over.wait(TICK_S):
            now = self.clock()
            late_s, before = now - before - TICK_S, now
            awaited = self._awaited
            if awaited is None:
                faulthandler.cancel_dump_traceback_later()
                continue
            until, activity, limit_s = awaited
            if late_s > SUSPENDED_S:
                until += late_s
                if self._awaited is awaited:
                    self._awaited = (until, activity, limit_s)
            elif now > until and self._awaited is awaited:
                self._hung(activity, limit_s)
                return
            # If something holds the GIL, this thread cannot run. The timer of faulthandler, which
            # does not need the GIL, then ends the process.
            faulthandler.dump_traceback_later(
                max(until - now, 0) + limit_s + BACKSTOP_S, exit=True, file=2
            )

    def _hung(self, activity: str, limit_s: float) -> None:
        """Report the hang and end the process, also if the report takes too long."""
        alarm = threading.Timer(REPORT_S, self._leave, (1,))
        alarm.daemon = True
        alarm.start()
        try:
            self._on_hang(activity, limit_s, stacks())
        finally:
            self._leave(1)


def stacks() -> str:
    """Return the stacks of all Python threads except the calling one, the main thread last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    own, main = threading.get_ident(), threading.main_thread().ident
    frames = sorted(current_frames().items(), key=lambda item: item[0] == main)
    parts = [
        f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in frames
        if ident != own
    ]
    return "\n".join(parts)
