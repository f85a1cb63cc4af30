"""Ask a running job to save and stop, through its store: for those who may not signal it.

The job does both within seconds. Its supervisor does not start it again, because the stop was
requested; one that was killed and waits in a queue ends when it begins. `harness launch`, or
submitting it again, resumes from that step.

example: harness stop runs/a
"""

from __future__ import annotations

import argparse

from harness.cli import locate
from harness.errors import UsageError
from harness.supervision import control_requests
from harness.text import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `harness stop`."""
    parser.add_argument("run", metavar="RUN")


def run(given: argparse.Namespace) -> int:
    """Put a request to stop into the store of the run, for its newest attempt, and return 0.

    Raises UsageError if nothing trains the run now, StorageError if the store fails.
    """
    return ask(given.run, "stop")


def ask(path: str, kind: str) -> int:
    """Put a request for the newest attempt of a run into its store, and return 0.

    Args:
        path: Directory or URL of the run.
        kind: "stop" or "save".

    Raises:
        UsageError: There is no run, or its newest attempt has ended.
        StorageError: The store fails.
    """
    store, catalog = locate.run(*locate.stores(path))
    newest = max(catalog.attempts, default=0)
    if not newest or newest in catalog.ends:
        raise UsageError(
            f"nothing trains {store} now",
            f"found: attempt {newest} has ended" if newest else "found: no attempt",
        )
    control_requests.leave(catalog.stores[-1], newest, kind)
    say(f"attempt {newest} of {store} is asked to {kind}; harness status {path} tells what it does")
    return 0
