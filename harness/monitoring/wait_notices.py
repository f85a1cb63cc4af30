"""Wait notices: print on the writer what the run is waiting for, if it takes long."""

from __future__ import annotations

import threading
import weakref

from harness.monitoring.goodput import (
    DATA,
    OVERHEAD,
    REDONE,
    RESTORE,
    SAVE,
    STARTUP,
    TRAINING,
    Goodput,
)
from harness.text import duration

# Seconds of waiting until the first notice, and between two checks. The following notices come each
# time that the wait has doubled.
FIRST_S, LOOK_S = 10.0, 1.0
AWAITED = {
    RESTORE: "the stores: finding and reading the checkpoint",
    DATA: "the next batch",
    OVERHEAD: "the other ranks",
    SAVE: "a save to arrive",
}
JOINING = "the other ranks to join"


def awaited_subject(goodput: Goodput) -> str:
    """Return what the run is waiting for; "" if nothing, or if no notice is needed.

    A step is no wait, however long it takes, except for the first one, which may have to compile.
    """
    phase = goodput.phase
    if phase in (TRAINING, REDONE):
        return (
            "the first step, which may have to compile, and the other ranks in it"
            if goodput.is_first_step
            else ""
        )
    return (JOINING if goodput.is_joining else "") if phase == STARTUP else AWAITED.get(phase, "")


class WaitNotices:
    """The wait notices of one run, which are printed when a wait takes long."""

    def __init__(self) -> None:
        # Start of the present phase, and the seconds after which the next notice is printed.
        self._since, self._next_s = -1.0, FIRST_S

    def look(self, goodput: Goodput) -> None:
        """Print a notice if it is time for one."""
        if goodput.since != self._since:
            self._since, self._next_s = goodput.since, FIRST_S
        waited_s, subject = goodput.clock() - self._since, awaited_subject(goodput)
        if subject and waited_s >= self._next_s:
            goodput.say(f"harness: waiting for {subject} ({duration(waited_s)})")
            self._next_s = 2 * waited_s


def watch(goodput: Goodput) -> None:
    """Check the goodput accounting every `LOOK_S` seconds, in a thread.

    The thread ends when the accounting is closed or garbage-collected.
    """
    threading.Thread(
        target=_watch, args=(weakref.ref(goodput), goodput.closed), daemon=True, name="waiting"
    ).start()


def _watch(kept: weakref.ref[Goodput], closed: threading.Event) -> None:
    waiting = WaitNotices()
    while not closed.wait(LOOK_S):
        if (goodput := kept()) is None:
            return
        waiting.look(goodput)
        del goodput
