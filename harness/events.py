"""What a run says: one line an event for machines, one live line for people. Neither can hurt the run.

A full disk under the events, a closed terminal, a broken pipe: training goes on, and what is said goes nowhere.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from harness.checkpoint.attempts import now
from harness.errors import StorageError, printable
from harness.store import LocalStore

LIVE_EVERY_S, LINE_EVERY_S = 0.1, 10.0
ERASED = "\r\x1b[K"  # the terminal's last line
SPENT_EVERY_S, ENDS = 1.0, ("finished", "stopped")
MOST_KEPT = 50_000  # lines, some ten megabytes


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a line for people, without what a terminal would obey: names and records may be somebody else's. A stream that is gone is
    replaced, so that nothing trips over it again at exit."""
    _print(printable(text) + "\n", stream or sys.stdout)


def redraw(text: str, start: str = ERASED) -> None:
    """Print text in the place of what a terminal shows: of its last line, or of all."""
    _print(start + printable(text), sys.stdout)


def _print(text: str, target: TextIO) -> None:
    try:
        target.write(text)
        target.flush()
    except (OSError, ValueError):
        silence(target)


def silence(stream: TextIO) -> None:
    """Let what is written to a broken stream go nowhere."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def fill_closed_streams() -> None:
    """Give a process that was started with closed standard streams (`>&-`) some that go nowhere: else the next file that it
    opens, a checkpoint perhaps, gets a stream's number, and what any library prints is written into it."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("r" if number == 0 else "w"))  # noqa: SIM115 - for the process's whole life


class Ledger:
    """The events of one attempt: `events/0003.jsonl` in a local store, and, `kept` here until then, segments in a remote one."""

    def __init__(
        self, store: LocalStore | None, key: str, kept: bool = False, spent: Callable[[], dict[str, float]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.store, self.key, self.clock = store, key, clock
        self.lost = 0
        self._spent, self._spent_at = spent, -SPENT_EVERY_S
        self.listeners: list[Callable[[Mapping[str, Any]], object]] = []  # are told of each event, on the thread that writes it
        self._kept: collections.deque[bytes] | None = collections.deque(maxlen=MOST_KEPT) if kept else None

    def take(self) -> list[bytes]:
        """The lines since the last call; of very many, the newest."""
        taken: list[bytes] = []
        while self._kept:
            taken.append(self._kept.popleft())
        return taken

    def write(self, kind: str, **fields: Any) -> None:
        """Append one event; one a second tells what the attempt's time was spent on. A store that refuses is complained of once."""
        if self._spent is not None and (kind in ENDS or self.clock() - self._spent_at >= SPENT_EVERY_S):
            self._spent_at, fields["spent"] = self.clock(), self._spent()
        event = {"event": kind, "time": now()} | fields
        for listener in self.listeners:
            listener(event)
        line = (json.dumps(event, default=str) + "\n").encode()
        if self._kept is not None:
            self._kept.append(line)
        if self.store is None:
            return
        try:
            self.store.append(self.key, line)
        except (StorageError, OSError) as error:
            if self.lost == 0:
                say(f"harness: events are not recorded: {str(error).splitlines()[0]}", sys.stderr)
            self.lost += 1


@dataclass(frozen=True)
class Moment:
    """What the progress line shows of one step."""

    step: int
    end_step: int | None
    epoch: int
    epochs: int | None
    values: dict[str, float]
    rate: str
    saved: str


class Bar:
    """A live line for a command that reads much: how far, how fast; nothing where nobody watches."""

    def __init__(self, what: str, total_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.what, self.total_bytes, self.clock = what, total_bytes, clock
        self.done_bytes, self._began, self._next_at = 0, clock(), clock() + LIVE_EVERY_S
        self.live = _is_terminal()

    def __call__(self, more_bytes: int) -> None:
        """So many bytes more are done."""
        self.done_bytes += more_bytes
        if self.live and self.clock() >= self._next_at:
            self._next_at = self.clock() + LIVE_EVERY_S
            rate = self.done_bytes / max(self.clock() - self._began, 1e-9)
            left = duration(max(0, self.total_bytes - self.done_bytes) / max(rate, 1.0))
            text = f"{self.what}  {size(self.done_bytes)} of {size(self.total_bytes)} · {size(rate)}/s · {left} left"
            redraw(text)

    def end(self) -> None:
        """Take the line away again."""
        if self.live:
            redraw("")


class Progress:
    """A live line on a terminal; elsewhere a plain line every ten seconds, without control characters."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.live = _is_terminal()
        self._next_at = clock()
        self._drawn = False

    def show(self, moment: Moment, steps_per_s: float) -> None:
        """Draw, unless the last drawing is too young."""
        if self.clock() < self._next_at:
            return
        self._next_at = self.clock() + (LIVE_EVERY_S if self.live else LINE_EVERY_S)
        text = _text(moment, steps_per_s)
        if self.live:
            redraw(text)
            self._drawn = True
        else:
            say(text)

    def say(self, text: str) -> None:
        """A lasting line, below the live one."""
        if self._drawn:
            redraw("")
        say(text)
        self._drawn = False


def _is_terminal() -> bool:
    try:
        return sys.stdout.isatty()
    except ValueError:
        return False


def _text(moment: Moment, steps_per_s: float) -> str:
    total = f"/{moment.end_step}" if moment.end_step else ""
    parts = [f"epoch {min(moment.epoch + 1, moment.epochs)}/{moment.epochs}"] if moment.epochs else []
    parts += [f"step {moment.step}{total}"]
    parts += [f"{name} {value:.4g}" for name, value in moment.values.items()]
    parts.append(moment.rate)
    if moment.end_step and steps_per_s > 0:
        parts.append(f"{duration((moment.end_step - moment.step) / steps_per_s)} left")
    parts.append(moment.saved)
    return " · ".join(parts)


def duration(seconds: float) -> str:
    """45 s, 3:20, 2:03:20."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{rest:02d}"
    return f"{minutes}:{rest:02d}" if minutes else f"{rest} s"


def size(size_bytes: float) -> str:
    """12.3 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 1000 or unit == "GB":
            break
        size_bytes /= 1000
    return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
