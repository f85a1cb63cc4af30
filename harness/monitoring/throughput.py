"""The throughput of an attempt, in steps per second."""

from __future__ import annotations

import math
from collections.abc import Callable

# Weight of the previous attempt's throughput in seconds. The first steps of an attempt are slow.
TRUSTED_S = 20.0


class Throughput:
    """The throughput of steps, over the whole attempt and for the last few steps.

    Work at step boundaries, such as a save, is left out of the short-term value by `pause`.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.begin(0)

    def begin(self, step: int, before: float | None = None) -> None:
        """Start to measure at step `step`.

        `before` is the throughput at the end of the previous attempt in steps per second, if known.
        """
        self._before = before
        self._first = self._recent = (self._clock(), step)

    def pause(self, step: int) -> None:
        """Leave the time so far out of the next `steps_within`: it was not spent on steps."""
        self._recent = (self._clock(), step)

    def steps_within(self, seconds: float, step: int) -> int:
        """Return how many steps fit into `seconds`, at least 1.

        It is computed from the steps since the last call of this method or of `pause`.
        """
        at, before = self._recent
        step_s = (self._clock() - at) / max(1, step - before)
        self._recent = (self._clock(), step)
        return max(1, int(seconds / max(step_s, 1e-6)))

    def left_s(self, step: int, end_step: int | None) -> float:
        """Return the seconds until `end_step`; infinity if that or the throughput is unknown."""
        rate = self.steps_per_s(step)
        return math.inf if end_step is None or not rate else (end_step - step) / rate

    def steps_per_s(self, step: int) -> float:
        """Return the throughput over this attempt.

        The throughput of the previous attempt counts as if it had been measured for `TRUSTED_S`
        more seconds, so it matters only at first.
        """
        at, first = self._first
        weight_s = TRUSTED_S if self._before else 0.0
        return (step - first + weight_s * (self._before or 0.0)) / max(
            1e-9, self._clock() - at + weight_s
        )
