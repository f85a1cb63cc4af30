"""Text for people: lines that a terminal cannot be harmed by, tables, durations and sizes."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from harness.errors import printable

ERASED = "\r\x1b[K"  # the terminal's last line


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


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Columns, aligned to the left, without lines."""
    lines = [[printable(cell).replace("\n", " ") for cell in row] for row in [header, *rows]]
    widths = [max(len(line[at]) for line in lines) for at in range(len(header))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def number(value: float | None) -> str:
    """Five digits, or - for what was not measured."""
    return "-" if value is None else f"{value:.5g}"


@contextlib.contextmanager
def muted() -> Iterator[None]:
    """While the block runs, what libraries log and warn of is not shown."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
