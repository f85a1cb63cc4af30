"""How fast steps are being made."""

from __future__ import annotations

import math
from collections.abc import Callable

TRUSTED_S = 20.0  # the first steps of an attempt are slow


class Throughput:
    """How fast steps are being made, what is done at their boundaries left out of the short view."""

    def __init__(self, clock: Callable[[], float], step: int, before: float | None = None) -> None:
        """`before` is how many steps were made in a second until the attempt before this one ended."""
        self._clock, self._before = clock, before
        self._first = self._recent = (clock(), step)

    def pause(self, step: int) -> None:
        """Something that is no step took time just now."""
        self._recent = (self._clock(), step)

    def steps_within(self, seconds: float, step: int) -> int:
        """How many steps fit into so many seconds, at least 1, by those since the last call."""
        at, before = self._recent
        step_s = (self._clock() - at) / max(1, step - before)
        self._recent = (self._clock(), step)
        return max(1, int(seconds / max(step_s, 1e-6)))

    def left_s(self, step: int, end_step: int | None) -> float:
        """How long it is until that step, if it is known."""
        rate = self.steps_per_s(step)
        return math.inf if end_step is None or not rate else (end_step - step) / rate

    def steps_per_s(self, step: int) -> float:
        """Over this attempt; at first what was seen before counts as well, as if it were so many seconds' worth."""
        at, first = self._first
        weight_s = TRUSTED_S if self._before else 0.0
        return (step - first + weight_s * (self._before or 0.0)) / max(1e-9, self._clock() - at + weight_s)
