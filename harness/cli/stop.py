"""Ask a running job to save and stop, through its store: for those who may not signal it.

The job does both within seconds. Its supervisor does not start it again, because the stop was
requested; one that was killed or preempted and waits in a queue ends when it begins. `harness
launch`, or submitting it again, resumes from that step.

example: harness stop runs/a
"""

from __future__ import annotations

import argparse

from harness.checkpoint.catalog import Catalog
from harness.cli import locate
from harness.errors import EXIT_STOPPED, UsageError
from harness.supervision import control_requests, launches
from harness.supervision.restart_policy import verdict
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
        UsageError: There is no run, or its newest attempt has ended, and nothing starts it again.
        StorageError: The store fails.
    """
    store, catalog = locate.run(*locate.stores(path))
    newest = max(catalog.attempts, default=0)
    waits = kind == "stop" and newest in catalog.ends and _is_to_go_on(catalog, newest)
    if not newest or (newest in catalog.ends and not waits):
        raise UsageError(
            f"nothing trains {store} now",
            f"found: attempt {newest} has ended" if newest else "found: no attempt",
        )
    control_requests.leave(catalog.stores[-1], newest, kind)
    if waits:
        say(
            f"attempt {newest} of {store} has ended; its job ends when it begins again, if it waits"
        )
        return 0
    say(f"attempt {newest} of {store} is asked to {kind}; harness status {path} tells what it does")
    return 0


def _is_to_go_on(catalog: Catalog, newest: int) -> bool:
    """Return whether the supervisor of an attempt that has ended starts the run again."""
    name = str(catalog.attempts[newest].get("launch") or "")
    if not launches.is_name(name):
        return False
    known = launches.read(catalog.stores)
    stands, _ = verdict(catalog, known, name)
    launch = next((launch for launch in known if launch.name == name), launches.Launch(name))
    # A job is requeued; `harness launch` itself ends where it is stopped from outside.
    is_over = stands.is_leaving or (launch.end or {}).get("why") == "stopped"
    return stands.exit_code == EXIT_STOPPED and not (launch.is_of_launch and is_over)
