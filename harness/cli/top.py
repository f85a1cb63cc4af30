"""Show several runs at once: state, step, rate, time left, last checkpoint and last problem.

On a terminal the table is refreshed every few seconds, until Ctrl-C. Otherwise, or with --once, it
is printed once. All values come from the runs' stores. The column "saved" is the age of the last
checkpoint.

example: harness top runs/a runs/b s3://bucket/c
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time

from harness.checkpoint.catalog import read_catalog
from harness.cli import locate
from harness.errors import EXIT_FINISHED, HarnessError
from harness.report.summary import summarise
from harness.text import duration, redraw, say

HEADER = ("run", "state", "step", "rate", "left", "saved", "last problem")
CLEAR = "\x1b[H\x1b[2J"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `harness top`."""
    parser.add_argument("runs", metavar="RUN", nargs="+")
    parser.add_argument("--once", action="store_true", help="look once")
    parser.add_argument(
        "--every", metavar="SECONDS", type=float, default=5.0, help="how often it looks (5)"
    )


def run(given: argparse.Namespace) -> int:
    """Print the table of runs, once or repeatedly, and return 0."""
    while True:
        text = locate.table(HEADER, [_row(name) for name in given.runs])
        if given.once or not sys.stdout.isatty():
            say(text)
            return EXIT_FINISHED
        columns = shutil.get_terminal_size().columns
        redraw("\n".join(line[:columns] for line in text.splitlines()) + "\n", CLEAR)
        time.sleep(max(0.5, given.every))


def _row(name: str) -> tuple[str, ...]:
    """Return the table row of a run; if the run cannot be read, its row shows the error."""
    try:
        seen = summarise(read_catalog(*locate.stores(name)))
    except HarnessError as error:
        return (
            name,
            "cannot tell",
            "-",
            "-",
            "-",
            "-",
            " ".join(f"{error.what} {error.found}".split())[:120],
        )
    step = f"{seen.step}/{seen.end_step}" if seen.end_step is not None else str(seen.step)
    rate = f"{seen.steps_per_s:.3g}/s" if seen.steps_per_s is not None else "-"
    left = duration(seen.left_s) if seen.left_s is not None else "-"
    saved = f"{duration(seen.saved_s)} ago" if seen.saved_s is not None else "-"
    return name, seen.state, step, rate, left, saved, seen.problem[:120] or "-"
