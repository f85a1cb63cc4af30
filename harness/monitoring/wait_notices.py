"""What a run is waiting for, said by the writer when it takes long."""

from __future__ import annotations

import threading
import weakref

from harness.monitoring.goodput import DATA, OVERHEAD, REDONE, RESTORE, SAVE, STARTUP, TRAINING, Goodput
from harness.text import duration

FIRST_S, LOOK_S = 10.0, 1.0  # said after so long, and then each time that it has taken twice as long
WORDS = {
    RESTORE: "the stores: finding and reading the checkpoint",
    DATA: "the next batch",
    OVERHEAD: "the other ranks",
    SAVE: "a save to arrive",
}
JOINING = "the other ranks to join"


def words(account: Goodput) -> str:
    """What is being waited for, or "" while nothing is: a step may take as long as it likes, but the first one may have to compile."""
    what = account.what
    if what in (TRAINING, REDONE):
        return "the first step, which may have to compile, and the other ranks in it" if account.is_first_step else ""
    return (JOINING if account.is_joining else "") if what == STARTUP else WORDS.get(what, "")


class WaitNotices:
    """Says what an account waits for, when it has taken long."""

    def __init__(self) -> None:
        self._since, self._next_s = -1.0, FIRST_S  # since when it waits, and after how long that is said

    def look(self, account: Goodput) -> None:
        """Say it, if it is time to."""
        if account.since != self._since:
            self._since, self._next_s = account.since, FIRST_S
        waited_s, what = account.clock() - self._since, words(account)
        if what and waited_s >= self._next_s:
            account.say(f"harness: waiting for {what} ({duration(waited_s)})")
            self._next_s = 2 * waited_s


def watch(account: Goodput) -> None:
    """Look at the account now and then, in a thread, until that is closed, or nobody has it any more."""
    threading.Thread(target=_watch, args=(weakref.ref(account), account.closed), daemon=True, name="waiting").start()


def _watch(kept: weakref.ref[Goodput], closed: threading.Event) -> None:
    waiting = WaitNotices()
    while not closed.wait(LOOK_S):
        if (account := kept()) is None:
            return
        waiting.look(account)
        del account
