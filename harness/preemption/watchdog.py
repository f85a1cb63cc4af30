"""A process that makes no progress says where it stands, and ends: whoever started it starts it again."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable

TICK_S = 0.5
SUSPENDED_S = 1.0  # a tick that is so late was no hang: the whole process was stopped (SIGSTOP, scontrol suspend, a laptop's lid)
REPORT_S = 15.0  # for how long a hung process may try to say where it stands
BACKSTOP_S = 1800.0  # also the longest suspension that a process survives: the C library's alarm goes on counting

OnHang = Callable[[str, float, str], object]  # what was awaited, the limit, every thread's stack


_living: list[Watchdog] = []


def close_living() -> None:
    """Watch over no work any more: of a loop that was left open, say in a notebook, when the next run begins."""
    while _living:
        _living.pop().close()


class Watchdog:
    """Told by `expect` before each piece of work how long that may take; what takes longer ends the process with exit code 1."""

    def __init__(self, on_hang: OnHang, clock: Callable[[], float] = time.monotonic, leave: Callable[[int], object] = os._exit) -> None:
        self.clock, self._on_hang, self._leave = clock, on_hang, leave
        close_living()
        _living.append(self)
        self._awaited: tuple[float, str, float] | None = None
        self._thread: threading.Thread | None = None
        self._over = threading.Event()

    def expect(self, what: str, limit_s: float) -> None:
        """From now on, `what` may take `limit_s` seconds, until the next call of this or of `rest`. Costs less than a microsecond."""
        self._awaited = (self.clock() + limit_s, what, limit_s)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True, name="watchdog")
            self._thread.start()

    def rest(self) -> None:
        """What follows may take as long as it likes."""
        self._awaited = None

    def close(self) -> None:
        """End the thread."""
        self._over.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _run(self) -> None:
        before = self.clock()
        while not self._over.wait(TICK_S):
            now = self.clock()
            late_s, before = now - before - TICK_S, now
            awaited = self._awaited
            if awaited is None:
                faulthandler.cancel_dump_traceback_later()
                continue
            until, what, limit_s = awaited
            if late_s > SUSPENDED_S:
                until += late_s
                if self._awaited is awaited:
                    self._awaited = (until, what, limit_s)
            elif now > until and self._awaited is awaited:
                self._hung(what, limit_s)
                return
            # Should this very thread not get to run, because something holds the interpreter's lock, the C library's alarm rings.
            faulthandler.dump_traceback_later(max(until - now, 0) + limit_s + BACKSTOP_S, exit=True, file=2)

    def _hung(self, what: str, limit_s: float) -> None:
        alarm = threading.Timer(REPORT_S, self._leave, (1,))
        alarm.daemon = True
        alarm.start()
        try:
            self._on_hang(what, limit_s, stacks())
        finally:
            self._leave(1)


def stacks() -> str:
    """Where every Python thread of this process is, the main thread last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    own, main = threading.get_ident(), threading.main_thread().ident
    frames = sorted(sys._current_frames().items(), key=lambda item: item[0] == main)
    parts = [f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}" for ident, frame in frames if ident != own]
    return "\n".join(parts)
