"""Text for people: lines without terminal control sequences, tables, durations and sizes."""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from harness.errors import printable

ERASED = "\r\x1b[K"  # erases the last line of the terminal
MOST_NAMES = 10  # names in one message


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a line without control characters, which names and records of others may contain.

    A broken stream is redirected to /dev/null, so that it raises no further error at exit.
    """
    _print(printable(text) + "\n", stream or sys.stdout)


def redraw(text: str, start: str = ERASED) -> None:
    """Print text over the last line of the terminal; `start` may erase the whole screen instead."""
    _print(start + printable(text), sys.stdout)


def _print(text: str, target: TextIO) -> None:
    try:
        encoding = getattr(target, "encoding", None) or "utf-8"  # it may lack some characters
        target.write(text.encode(encoding, errors="replace").decode(encoding))
        target.flush()
    except (OSError, ValueError):
        silence(target)


def silence(stream: TextIO) -> None:
    """Redirect a broken stream to /dev/null."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def fill_closed_streams() -> None:
    """Open /dev/null for standard streams that were closed when the process was started (`>&-`).

    Otherwise the next file that the process opens, perhaps a checkpoint, gets the file descriptor
    of a standard stream, and the output of any library is written into it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor, which is this one
        if getattr(sys, name) is None:
            # It stays open as long as the process lives.
            setattr(sys, name, Path(os.devnull).open("r" if number == 0 else "w"))  # noqa: SIM115


def duration(seconds: float) -> str:
    """Format a duration in seconds: 45 s, 3:20, 2:03:20."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{rest:02d}"
    return f"{minutes}:{rest:02d}" if minutes else f"{rest} s"


def size(size_bytes: float) -> str:
    """Format a size in bytes with a decimal unit: 12.3 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 1000 or unit == "GB":
            break
        size_bytes /= 1000
    return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Format rows as left-aligned columns without rules."""
    lines = [[printable(cell).replace("\n", " ") for cell in row] for row in [header, *rows]]
    widths = [max(len(line[at]) for line in lines) for at in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def listed(names: Sequence[str]) -> str:
    """Return names in one line, at most MOST_NAMES of them."""
    more = len(names) - MOST_NAMES
    return ", ".join([*names[:MOST_NAMES], *[f"{more} more"] * (more > 0)])


def number(value: float | None) -> str:
    """Format a number with five digits, or as "-" if it is None."""
    return "-" if value is None else f"{value:.5g}"


@contextlib.contextmanager
def muted() -> Iterator[None]:
    """Suppress log messages and warnings of libraries while the block runs."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def now() -> str:
    """Return the current UTC time in ISO format, for people to read; no decision depends on it."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
