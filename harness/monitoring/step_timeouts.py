"""Time-outs of the parts of a run, after which the run counts as hung."""

from __future__ import annotations

import time
from collections.abc import Callable

from harness.preemption.watchdog import OnHang, Watchdog

# A step may take five minutes more than thirty times the longest step so far.
LEARNED_S, LEARNED_TIMES = 300.0, 30.0
# Multiples of `limit_s` for work that may have to compile, and for saves to a slow disk.
COMPILING_TIMES, SAVING_TIMES = 3.0, 6.0


class StepTimeouts:
    """The watchdog of a run, with the time-out of each kind of work.

    The time-out of a step is `step_s`. Without it, it is learned from the longest step so far, at
    most `limit_s`. A batch of an evaluation may take three times `limit_s`, a save six times. The
    first step may take three times the greater one of `limit_s` and `step_s`.

    Args:
        limit_s: The longest time-out of a step in seconds, unless `step_s` is given.
        step_s: Time-out of a step in seconds; None: it is learned.
        on_hang: Callback that reports a hang.
        clock: Function that returns the current time in seconds.
    """

    def __init__(
        self,
        limit_s: float,
        step_s: float | None,
        on_hang: OnHang,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limit_s, self.step_s, self.clock = limit_s, step_s, clock
        self._most_s = max(limit_s, step_s or 0.0)  # the longest that a step may take in any case
        self.longest_s = 0.0
        self._dog = Watchdog(on_hang, clock)
        self._step_began: float | None = None

    def first_step(self) -> None:
        """Start the time-out of the first step, which may have to compile."""
        self._dog.expect("the first step", COMPILING_TIMES * self._most_s)

    def step(self) -> None:
        """Start the time-out of the next step; called at each step boundary.

        The duration of the step that ended here updates `longest_s`.
        """
        now = self.clock()
        if self._step_began is not None:
            self.longest_s = max(self.longest_s, now - self._step_began)
        self._step_began = now
        learned_s = LEARNED_S + LEARNED_TIMES * self.longest_s if self.longest_s else self.limit_s
        self._dog.expect("a step", self.step_s or min(self.limit_s, learned_s))

    def evaluation(self) -> None:
        """Start the time-out of a batch of an evaluation; the first batch may have to compile."""
        self._pause()
        self._dog.expect("a batch of an evaluation", COMPILING_TIMES * self.limit_s)

    def evaluated(self) -> None:
        """Start the time-out of the rest of a step after an evaluation.

        It is `limit_s`, or `step_s` if that is longer.
        """
        self._dog.expect("a step", self._most_s)

    def saving(self) -> None:
        """Start the time-out of a save."""
        self._pause()
        self._dog.expect("saving", SAVING_TIMES * self.limit_s)

    def rest(self) -> None:
        """Stop the time-out: what follows has time-outs of its own, or is the user's code."""
        self._pause()
        self._dog.rest()

    def close(self) -> None:
        """End the watchdog."""
        self._dog.close()

    def _pause(self) -> None:
        self._step_began = None  # time that is not spent on a step must not raise the time-out
