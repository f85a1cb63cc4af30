"""Goodput accounting: attribute the wall time of an attempt to phases.

An attempt is in exactly one phase at any moment, so the phases sum to the wall time.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from harness.text import say

Phase = Literal[
    "startup", "restore", "data", "training", "redone", "evaluation", "save", "overhead"
]
STARTUP: Phase = "startup"
RESTORE: Phase = "restore"
DATA: Phase = "data"
TRAINING: Phase = "training"
REDONE: Phase = "redone"
SAVE: Phase = "save"
OVERHEAD: Phase = "overhead"


_asked = itertools.count()


def age_s() -> float:
    """Return the age of this process in seconds, which is the start-up time of its first run.

    Returns 0 if the kernel does not report the start time, and from the second call on: a later run
    in the same process has no such start-up time.
    """
    if next(_asked):
        return 0.0
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, AttributeError, IndexError):
        return 0.0


class Goodput:
    """The seconds spent in each phase, since the start of this process.

    Only the training thread changes phases. Any thread may call `spent`.

    Args:
        clock: Function that returns the current time in seconds.
        age_s: Age of the process in seconds, counted as start-up.
        say: Prints a line, for the wait notices.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        age_s: float = 0.0,
        say: Callable[[str], object] = say,
    ) -> None:
        self.redone_until = 0  # last step that an earlier attempt had made
        # Throughput at the end of the newest earlier attempt, if known.
        self.steps_per_s: float | None = None
        self.clock = clock
        self.closed = threading.Event()  # set when the loop has ended; ends the wait notices
        self.say = say
        self.is_joining = False  # the start-up may be waiting for the other ranks
        self.is_first_step = True
        self._spent: dict[str, float] = {STARTUP: age_s}
        self.phase, self.since = STARTUP, clock()

    def on(self, phase: Phase) -> Phase:
        """Switch the goodput phase; return the previous one."""
        now, before = self.clock(), self.phase
        self._spent[before] = self._spent.get(before, 0.0) + now - self.since
        self.phase, self.since = phase, now
        return before

    def resumes(self, redone_until: int, steps_per_s: float | None) -> None:
        """Take what earlier attempts have recorded: their last step, and their throughput."""
        self.redone_until, self.steps_per_s = redone_until, steps_per_s

    def train(self, step: int) -> None:
        """Switch to the phase for step `step`.

        That is `REDONE` for a step that an earlier attempt had made, else `TRAINING`.
        """
        self.on(TRAINING if step > self.redone_until else REDONE)

    def step_made(self) -> None:
        """Switch to `OVERHEAD` at the end of a step: what follows is work of the loop itself."""
        self.on(OVERHEAD)
        self.is_first_step = False

    @contextlib.contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """Attribute the time of the block to a phase, then switch back to the previous phase."""
        before = self.on(phase)
        try:
            yield
        finally:
            self.on(before)

    def spent(self) -> dict[str, float]:
        """Return the seconds spent in each phase until now, rounded to milliseconds."""
        phase, since, spent = self.phase, self.since, dict(self._spent)
        spent[phase] = spent.get(phase, 0.0) + self.clock() - since
        return {phase: round(seconds, 3) for phase, seconds in spent.items()}

    @contextlib.contextmanager
    def joining(self) -> Iterator[None]:
        """Attribute the block to start-up, marked as a wait for the other ranks."""
        self.on(STARTUP)
        self.is_joining = True
        try:
            yield
        finally:
            self.is_joining = False
