"""What an attempt spends its time on: at any moment on one thing, so that all of it sums to wall time."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from harness.text import say

STARTUP, RESTORE, DATA, TRAINING, REDONE = "startup", "restore", "data", "training", "redone"
EVALUATION, SAVE, OVERHEAD = "evaluation", "save", "overhead"


_asked = itertools.count()


def age_s() -> float:
    """How long ago this process was started; 0 where the kernel does not tell, and for the second run that a process begins."""
    if next(_asked):
        return 0.0
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, AttributeError, IndexError):
        return 0.0


class Goodput:
    """Seconds by what they were spent on, from the start of this process on. For the training thread; `spent` may be read from any."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, age_s: float = 0.0) -> None:
        self.redone_until = 0  # the last step that an earlier attempt had made, too
        self.steps_per_s: float | None = None  # how fast that one was, at its end
        self.clock = clock
        self.closed = threading.Event()  # nothing more is spent
        self.say: Callable[[str], object] = say
        self.is_joining = False  # of what is start-up: for the other ranks
        self.is_first_step = True
        self._spent = {STARTUP: age_s}
        self.what, self.since = STARTUP, clock()

    def on(self, what: str) -> str:
        """From now on it is spent on that; returns on what it was spent until now."""
        now, before = self.clock(), self.what
        self._spent[before] = self._spent.get(before, 0.0) + now - self.since
        self.what, self.since = what, now
        return before

    def train(self, step: int) -> None:
        """From now on it is spent on making that step, or on making it again."""
        self.on(TRAINING if step > self.redone_until else REDONE)

    def step_made(self) -> None:
        """The step is over; what follows is the loop's own."""
        self.on(OVERHEAD)
        self.is_first_step = False

    @contextlib.contextmanager
    def during(self, what: str) -> Iterator[None]:
        """What the block takes is spent on that."""
        before = self.on(what)
        try:
            yield
        finally:
            self.on(before)

    def spent(self) -> dict[str, float]:
        """All of it until now, in seconds."""
        what, since, spent = self.what, self.since, dict(self._spent)
        spent[what] = spent.get(what, 0.0) + self.clock() - since
        return {what: round(seconds, 3) for what, seconds in spent.items()}

    @contextlib.contextmanager
    def joining(self) -> Iterator[None]:
        """In the block this process may have to wait for the other ranks."""
        self.on(STARTUP)
        self.is_joining = True
        try:
            yield
        finally:
            self.is_joining = False
