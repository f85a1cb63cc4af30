"""Show how a run has spent its time, over all its attempts: useful training and everything else.

Every second since the run was submitted, or first started, is counted once. The time of a killed
attempt after its last event is "cut off by a kill"; the time of steps that were made before is
"recomputed steps". --html draws the report as a page.

example: harness report runs/a --html report.html
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from harness.cli import locate
from harness.errors import EXIT_FINISHED, StorageError
from harness.report import page, phrases
from harness.report.timeline import timeline
from harness.text import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `harness report`."""
    parser.add_argument("run", metavar="RUN")
    parser.add_argument(
        "--html",
        metavar="FILE",
        type=Path,
        help="also draw it, into one file that needs nothing else",
    )
    parser.add_argument("--json", action="store_true", help="for machines")


def run(given: argparse.Namespace) -> int:
    """Print the report, write the page of --html, and return 0. Raises UsageError, StorageError."""
    store, catalog = locate.everywhere(given.run)
    time = timeline(catalog)
    if given.json:
        numbers = {
            "wall_s": time.wall_s,
            "useful": time.useful,
            "between_interruptions_s": time.between_interruptions_s,
        }
        say(
            json.dumps(
                {"run": str(store), "state": time.stands.state} | numbers | asdict(time), indent=1
            )
        )
    else:
        say(phrases.text(str(store), time))
    if given.html is not None:
        try:
            given.html.write_text(page.page(str(store), time))
        except OSError as error:
            raise StorageError(
                f"cannot write {given.html}", f"found: {error}", "Name another file."
            ) from error
        say(f"drawn: {given.html}") if not given.json else None
    return EXIT_FINISHED
