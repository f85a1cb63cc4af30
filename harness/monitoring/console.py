"""Console output of a run: one live line on a terminal, plain lines at intervals elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping

from harness.text import duration, redraw, say, size

LIVE_EVERY_S, LINE_EVERY_S = 0.1, 10.0


class ProgressBar:
    """A live line with the progress of a command that reads much data.

    It shows bytes, throughput and remaining time. Nothing is printed if stdout is not a terminal.
    """

    def __init__(
        self, label: str, total_bytes: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.label, self.total_bytes, self.clock = label, total_bytes, clock
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
                f"{self.label}  {size(self.done_bytes)} of {size(self.total_bytes)}"
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

    def show(
        self,
        step: int,
        end_step: int | None,
        epoch: int,
        epochs: int | None,
        values: Mapping[str, float],
        steps_per_s: float,
        rate: str,
        saved: str,
    ) -> None:
        """Print the progress line, unless the last one was printed too short a time ago.

        The shortest interval is `LIVE_EVERY_S` on a terminal, else `LINE_EVERY_S`.

        Args:
            step: Number of the step.
            end_step: Number of the last step of the run, or None if unknown.
            epoch: The epoch, from 0 on.
            epochs: Number of epochs of the whole run; None if the data has no epochs.
            values: Logged values, as means over ranks.
            steps_per_s: Throughput, from which the remaining time is computed.
            rate: The throughput, formatted.
            saved: State of saving and uploading.
        """
        if self.clock() < self._next_at:
            return
        self._next_at = self.clock() + (LIVE_EVERY_S if self.live else LINE_EVERY_S)
        parts = [f"epoch {min(epoch + 1, epochs)}/{epochs}"] if epochs else []
        parts.append(f"step {step}" + (f"/{end_step}" if end_step else ""))
        parts += [f"{name} {value:.4g}" for name, value in values.items()]
        parts.append(rate)
        if end_step and steps_per_s > 0:
            parts.append(f"{duration((end_step - step) / steps_per_s)} left")
        text = " · ".join([*parts, saved])
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
