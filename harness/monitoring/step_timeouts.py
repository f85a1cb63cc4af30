"""How long each part of a run may take before it counts as hung."""

from __future__ import annotations

import time
from collections.abc import Callable

from harness.preemption.watchdog import OnHang, Watchdog

LEARNED_S, LEARNED_TIMES = 300.0, 30.0  # a step may take five minutes more than thirty times the longest so far
COMPILING_TIMES, SAVING_TIMES = 3.0, 6.0  # of the limit for a step: what is compiled, and what goes to a slow disk


class StepTimeouts:
    """The watchdog, told what the run is doing. `limit_s` is the most that a step may take; its own limit is learned, or set as `step_s`.
    What compiles may take three times as long, saving six times."""

    def __init__(self, limit_s: float, step_s: float | None, on_hang: OnHang, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit_s, self.step_s, self.clock = limit_s, step_s, clock
        self.longest_s = 0.0
        self._dog = Watchdog(on_hang, clock)
        self._step_began: float | None = None

    def first_step(self) -> None:
        """A step may have to compile."""
        self._dog.expect("the first step", COMPILING_TIMES * self.limit_s)

    def step(self) -> None:
        """At each step boundary."""
        now = self.clock()
        if self._step_began is not None:
            self.longest_s = max(self.longest_s, now - self._step_began)
        self._step_began = now
        learned_s = LEARNED_S + LEARNED_TIMES * self.longest_s if self.longest_s else self.limit_s
        self._dog.expect("a step", self.step_s or min(self.limit_s, learned_s))

    def evaluation(self) -> None:
        """At each batch of an evaluation, the first of which may have to compile."""
        self._pause()
        self._dog.expect("a batch of an evaluation", COMPILING_TIMES * self.limit_s)

    def evaluated(self) -> None:
        """The rest of the step goes on."""
        self._dog.expect("a step", self.limit_s)

    def saving(self) -> None:
        self._pause()
        self._dog.expect("saving", SAVING_TIMES * self.limit_s)

    def rest(self) -> None:
        """What follows has limits of its own, or is the user's."""
        self._pause()
        self._dog.rest()

    def close(self) -> None:
        self._dog.close()

    def _pause(self) -> None:
        self._step_began = None  # what takes long now is no step
