"""Console output of a run: one live line on a terminal, plain lines at intervals elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from harness.text import duration, redraw, say, size

LIVE_EVERY_S, LINE_EVERY_S = 0.1, 10.0


@dataclass(frozen=True)
class StepSummary:
    """The contents of the progress line for one step."""

    step: int
    end_step: int | None  # last step of the run; None if unknown
    epoch: int  # from 0 on
    epochs: int | None  # of the whole run; None if the data has no epochs
    values: dict[str, float]  # logged values, as means over ranks
    rate: str  # throughput, formatted
    saved: str  # state of saving and uploading


class ProgressBar:
    """A live line with the progress of a command that reads much data.

    It shows bytes, throughput and remaining time. Nothing is printed if stdout is not a terminal.
    """

    def __init__(
        self, what: str, total_bytes: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.what, self.total_bytes, self.clock = what, total_bytes, clock
        self.done_bytes, self._began, self._next_at = 0, clock(), clock() + LIVE_EVERY_S
        self.live = _is_terminal()

    def __call__(self, more_bytes: int) -> None:
        """Add `more_bytes` to the bytes done; redraw the line, at most every `LIVE_EVERY_S`."""
        self.done_bytes += more_bytes
        if self.live and self.clock() >= self._next_at:
            self._next_at = self.clock() + LIVE_EVERY_S
            rate = self.done_bytes / max(self.clock() - self._began, 1e-9)
            left = duration(max(0, self.total_bytes - self.done_bytes) / max(rate, 1.0))
            text = (
                f"{self.what}  {size(self.done_bytes)} of {size(self.total_bytes)}"
                f" · {size(rate)}/s · {left} left"
            )
            redraw(text)

    def end(self) -> None:
        """Erase the line."""
        if self.live:
            redraw("")


class Console:
    """The progress line of a run.

    On a terminal it is one live line. Elsewhere it is a plain line every ten seconds, without
    control characters.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.live = _is_terminal()
        self._next_at = clock()
        self._drawn = False

    def show(self, summary: StepSummary, steps_per_s: float) -> None:
        """Print the progress line, unless the last one was printed too short a time ago.

        The shortest interval is `LIVE_EVERY_S` on a terminal, else `LINE_EVERY_S`. `steps_per_s`
        is the throughput from which the remaining time is computed.
        """
        if self.clock() < self._next_at:
            return
        self._next_at = self.clock() + (LIVE_EVERY_S if self.live else LINE_EVERY_S)
        text = _text(summary, steps_per_s)
        if self.live:
            redraw(text)
            self._drawn = True
        else:
            say(text)

    def say(self, text: str) -> None:
        """Print a permanent line in place of the live line; the next `show` draws that again."""
        if self._drawn:
            redraw("")
        say(text)
        self._drawn = False


def _is_terminal() -> bool:
    try:
        return sys.stdout.isatty()
    except ValueError:
        return False


def _text(summary: StepSummary, steps_per_s: float) -> str:
    total = f"/{summary.end_step}" if summary.end_step else ""
    parts = (
        [f"epoch {min(summary.epoch + 1, summary.epochs)}/{summary.epochs}"]
        if summary.epochs
        else []
    )
    parts += [f"step {summary.step}{total}"]
    parts += [f"{name} {value:.4g}" for name, value in summary.values.items()]
    parts.append(summary.rate)
    if summary.end_step and steps_per_s > 0:
        parts.append(f"{duration((summary.end_step - summary.step) / steps_per_s)} left")
    parts.append(summary.saved)
    return " · ".join(parts)
