"""When the clock asks for a save: every so many seconds, or as often as is worth it by what saves and interruptions cost this run."""

from __future__ import annotations

import datetime
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

from harness.arguments import AUTO
from harness.checkpoint.catalog import Catalog
from harness.text import duration

FIRST_S = 30.0  # until a save has been measured
LEAST_S, MOST_S = 5.0, 1800.0
ASSUMED_S = 4 * 3600.0  # between two kills, before there was any; counts like one that came after so long
TOLD_FROM = 0.1  # of the interval, a change that is told
COSTS, STEPS = 5, 50  # the last ones count


@dataclass(frozen=True)
class KillHistory:
    """What earlier attempts tell: for how long they ran, and how many were killed, which costs what was not saved."""

    seconds: float = 0.0
    kills: int = 0


def kill_history(found: Catalog) -> KillHistory:
    """Of all attempts to train. Who stopped on request had saved; who was killed is last heard of by a checkpoint."""
    seconds, kills = 0.0, 0
    for number, record in found.attempts.items():
        if record.get("kind") != "train":
            continue
        end = found.ends.get(number, {})
        heard = [m.time for m in found.manifests if m.attempt == number] + ([end["time"]] if "time" in end else [])
        kills += not end or end.get("why") == "failed" or end.get("saved") is False
        seconds += max((_between_s(record["time"], time) for time in heard), default=0.0)
    return KillHistory(seconds, kills)


def _between_s(before: str, after: str) -> float:
    """An estimate, and nothing but an estimate, is made of two machines' clocks."""
    return max(0.0, (datetime.datetime.fromisoformat(after) - datetime.datetime.fromisoformat(before)).total_seconds())


def best_interval_s(cost_s: float, between_kills_s: float, save_s: float) -> float:
    """The interval that loses the least time: saves cost C each, a kill costs half an interval; sqrt(2 C M).

    A save takes `save_s` to arrive: one is not begun before the last has. Source: Young, A first order approximation to the optimum
    checkpoint interval, 1974; Daly, 2006.
    """
    return min(max(math.sqrt(2 * cost_s * between_kills_s), LEAST_S, save_s), MOST_S)


def _not_told(kind: str, **fields: Any) -> None:
    """Who needs no record."""


class SavePolicy:
    """Tells whether it is time; for the writer's training thread."""

    def __init__(
        self, every_s: float | str | None, when_busy: str, clock: Callable[[], float], note: Callable[..., Any] = _not_told
    ) -> None:
        """`note` is told of each save that is left out and of each interval that is chosen."""
        self.is_auto = every_s == AUTO
        self.every_s: float | None = FIRST_S if isinstance(every_s, str) else every_s
        self.lives = KillHistory()
        self._skips = when_busy == "skip"
        self._clock, self._note = clock, note
        self._began_at = self._saved_at = self._stepped_at = clock()
        self._plain: deque[float] = deque(maxlen=STEPS)  # seconds of steps with no save beside them
        self._beside: list[float] = []  # and of those since a save began, to the one in which it arrived
        self._is_beside, self._save_s = False, 0.0
        self._costs: deque[float] = deque(maxlen=COSTS)
        self._told_s = 0.0

    def begun(self) -> None:
        """A save begins; the one before has arrived, or was waited for."""
        self._weigh()
        self._saved_at, self._is_beside = self._clock(), True

    def is_due(self, left_s: float, save_s: float, is_busy: bool) -> bool:
        """Whether it is time, with `left_s` until the run's end, which is saved anyway. The last save took `save_s`, or is on its way."""
        if self.every_s is None or left_s <= save_s or self._clock() - self._saved_at < self.every_s:
            return False
        if self._skips and is_busy:
            self._saved_at = self._clock()
            self._note("skipped", why="the save before has not arrived yet")
            return False
        return True

    def step(self, is_saving: bool, save_s: float) -> None:
        """A step is over, a save beside it or not: what it takes longer is what the save costs."""
        if not self.is_auto:
            return
        now = self._clock()
        took_s, self._stepped_at = now - self._stepped_at, now
        if not (is_saving or self._is_beside):
            self._plain.append(took_s)
            return
        self._beside.append(took_s)
        self._is_beside, self._save_s = is_saving, save_s
        if not is_saving:
            self._weigh()

    def _weigh(self) -> None:
        """What did the save cost beside which these steps were made?"""
        beside, self._beside, save_s = self._beside, [], self._save_s
        if not beside:
            return
        if not self._plain:  # one save follows the other: there is nothing to compare with
            self.every_s = max(self.every_s or 0.0, 2 * save_s)
            return
        self._costs.append(max(0.0, sum(beside) - len(beside) * median(self._plain)))
        cost_s, seconds = median(self._costs), self.lives.seconds + self._clock() - self._began_at
        between_s = (ASSUMED_S + seconds) / (1 + self.lives.kills)
        self.every_s = best_interval_s(cost_s, between_s, save_s)
        if abs(self.every_s - self._told_s) > TOLD_FROM * self._told_s:
            self._told_s = self.every_s
            kills = f"{self.lives.kills} kill{'s' * (self.lives.kills != 1)} in {duration(seconds)}"
            why = f"a save costs {cost_s:.2g} s of training and takes {save_s:.2g} s; {kills}"
            chosen = {"every_s": round(self.every_s, 1), "cost_s": round(cost_s, 4), "between_kills_s": round(between_s)}
            self._note("interval", **chosen, kills=self.lives.kills, why=why)
