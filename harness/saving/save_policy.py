"""Decide when the clock asks for a save.

The interval is fixed, or is chosen from the measured cost of saves and interruptions of this run.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

from harness.arguments import AUTO
from harness.checkpoint import records
from harness.checkpoint.catalog import Catalog
from harness.text import duration

FIRST_S = 30.0  # interval until a save has been measured
LEAST_S, MOST_S = 5.0, 1800.0
# Assumed time between two kills before the first one. It counts like one kill after that time.
ASSUMED_S = 4 * 3600.0
RECORDED_FROM = 0.1  # relative change of the interval above which it is recorded
COSTS, STEPS = 5, 50  # how many of the last save costs and step times are used


@dataclass(frozen=True)
class KillHistory:
    """How long earlier attempts ran, in seconds, and how many were killed.

    A kill costs the steps that were not saved.
    """

    seconds: float = 0.0
    kills: int = 0


def kill_history(catalog: Catalog) -> KillHistory:
    """Return the total run time and the number of kills of all training attempts.

    An attempt that stopped on request had saved, so it does not count as killed. One that failed,
    or ended without a save, does. The last trace of a killed attempt is a checkpoint, so its run
    time ends there.
    """
    seconds, kills = 0.0, 0
    for number, record in catalog.attempts.items():
        if record.get("kind") != "train":
            continue
        end = catalog.ends.get(number, {})
        kills += not end or end.get("why") == "failed" or end.get("saved") is False
        if (began := records.seconds(record.get("time"))) is None:
            continue
        times = [*(m.time for m in catalog.manifests if m.attempt == number), end.get("time")]
        heard = [at for time in times if (at := records.seconds(time)) is not None]
        # The times may be from the clocks of two machines: this is only good for estimates.
        seconds += max(0.0, max(heard, default=began) - began)
    return KillHistory(seconds, kills)


def best_interval_s(cost_s: float, between_kills_s: float, save_s: float) -> float:
    """Return the save interval that loses the least time, in seconds.

    A save costs C = `cost_s`, and a kill costs half an interval on average. With a mean time
    between kills of M = `between_kills_s`, the optimal interval is sqrt(2 C M). Source: Young, A
    first order approximation to the optimum checkpoint interval, 1974; Daly, 2006.

    A save takes `save_s` until it is committed, and the next one does not begin before that, so the
    interval is not shorter. The result is limited to the range from LEAST_S to MOST_S.
    """
    return min(max(math.sqrt(2 * cost_s * between_kills_s), LEAST_S, save_s), MOST_S)


def _discard_event(kind: str, **fields: Any) -> None:
    """Discard an event; the default of `note`."""


class SavePolicy:
    """The clock's decision when to save; for the writer's training thread."""

    def __init__(
        self,
        every_s: float | str | None,
        when_busy: str,
        clock: Callable[[], float],
        note: Callable[..., Any] = _discard_event,
    ) -> None:
        """Initialise the policy.

        Args:
            every_s: the interval in seconds, AUTO to choose it from measurements, or None for no
                saves by the clock.
            when_busy: "skip" to skip a save that is due while another one is in flight.
            clock: returns the time in seconds.
            note: records an event for each save that is skipped and each interval that is chosen.
        """
        self.is_auto = every_s == AUTO
        self.every_s: float | None = FIRST_S if isinstance(every_s, str) else every_s
        self.history = KillHistory()
        self._skips = when_busy == "skip"
        self._clock, self._note = clock, note
        self._began_at = self._saved_at = self._stepped_at = clock()
        self._plain: deque[float] = deque(maxlen=STEPS)  # seconds of steps with no save in flight
        # Seconds of the steps since a save began, up to the step in which it was committed.
        self._beside: list[float] = []
        self._is_beside, self._save_s = False, 0.0
        self._costs: deque[float] = deque(maxlen=COSTS)
        self._recorded_s = 0.0

    def learn(self, catalog: Catalog) -> None:
        """Take how often this run was killed so far from its records."""
        self.history = kill_history(catalog)

    def begun(self) -> None:
        """Record that a save begins; the previous one is committed, or was waited for."""
        self._weigh()
        self._saved_at, self._is_beside = self._clock(), True

    def is_due(self, left_s: float, save_s: float, is_busy: bool) -> bool:
        """Return whether a save is due.

        A due save that is skipped is recorded as an event, and the interval starts again.

        Args:
            left_s: the time until the end of the run, in seconds. The end is saved in any case, so
                no save is due if the end is nearer than a save takes.
            save_s: how long the last committed save took, in seconds.
            is_busy: whether a save is in flight.
        """
        if (
            self.every_s is None
            or left_s <= save_s
            or self._clock() - self._saved_at < self.every_s
        ):
            return False
        if self._skips and is_busy:
            self._saved_at = self._clock()
            self._note("skipped", why="the save before has not arrived yet")
            return False
        return True

    def step(self, is_saving: bool, save_s: float) -> None:
        """Record the duration of a step; the extra time of steps during a save is its cost.

        Args:
            is_saving: whether a save is in flight.
            save_s: how long the last committed save took, in seconds.
        """
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
        """Estimate what the last save cost from the steps made during it, and set the interval."""
        beside, self._beside, save_s = self._beside, [], self._save_s
        if not beside:
            return
        if not self._plain:  # saves follow each other, so there is no step to compare with
            self.every_s = max(self.every_s or 0.0, 2 * save_s)
            return
        self._costs.append(max(0.0, sum(beside) - len(beside) * median(self._plain)))
        cost_s, seconds = (
            median(self._costs),
            self.history.seconds + self._clock() - self._began_at,
        )
        between_s = (ASSUMED_S + seconds) / (1 + self.history.kills)
        self.every_s = best_interval_s(cost_s, between_s, save_s)
        if abs(self.every_s - self._recorded_s) > RECORDED_FROM * self._recorded_s:
            self._recorded_s = self.every_s
            kills = (
                f"{self.history.kills} kill{'s' * (self.history.kills != 1)} in {duration(seconds)}"
            )
            why = f"a save costs {cost_s:.2g} s of training and takes {save_s:.2g} s; {kills}"
            chosen = {
                "every_s": round(self.every_s, 1),
                "cost_s": round(cost_s, 4),
                "between_kills_s": round(between_s),
            }
            self._note("interval", **chosen, kills=self.history.kills, why=why)
