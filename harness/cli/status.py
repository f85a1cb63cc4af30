"""Show the state of a run: running, to be continued, finished or failed, and why.

Every attempt is listed, with the steps that it lost. If the remote store of a run directory cannot
be read, only what the directory holds is listed, and neither finished nor failed is said of it.

Exit code: 0 finished · 75 to be continued (stopped, running, or killed) · 1 failed · 74 cannot
tell, or no such run · 78 only a newer harness can read the newest checkpoint.

example: harness status runs/a
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from typing import Any

from harness.checkpoint.catalog import Catalog
from harness.cli import locate
from harness.errors import EXIT_STORAGE, UsageError
from harness.report.liveness import alive
from harness.selfcheck import step_records
from harness.store import Store
from harness.supervision import attempt_history, launches, machine_record
from harness.supervision.restart_messages import describe_end, describe_replays
from harness.supervision.restart_policy import Outcome, outcome
from harness.text import say


@dataclass(frozen=True)
class RunStatus:
    """What the stores of a run show of its state and of its attempts."""

    store: Store  # the first one
    catalog: Catalog
    known: list[launches.Launch]
    attempts: list[attempt_history.AttemptSummary]  # oldest first
    stands: Outcome
    replays: dict[int, dict[str, Any]]  # comparisons of recomputed steps, by attempt


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `harness status`."""
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--json", action="store_true", help="for machines")


def run(given: argparse.Namespace) -> int:
    """Print the state of the run and its attempts; return the exit code. Raises StorageError."""
    try:
        store, catalog = locate.everywhere(given.run)
    except UsageError as error:
        say(f"cannot tell: {error.what}")
        return EXIT_STORAGE
    status = _read(store, catalog)
    if given.json:
        say(json.dumps(_to_json(status), indent=1))
    else:
        _print(status)
    return status.stands.exit_code


def _read(store: Store, catalog: Catalog) -> RunStatus:
    """Read the launches, the events of failed attempts and the comparisons of recomputed steps.

    Args:
        store: First store of the run.
        catalog: Catalog of all its stores.

    Raises:
        StorageError: A store cannot be read.
    """
    known = launches.read(catalog.stores)
    last = max(catalog.attempts, default=0)
    events = attempt_history.logs(
        catalog,
        {
            n: attempt_history.TAIL_BYTES if n == last else attempt_history.LAST_BYTES
            for n in catalog.attempts
            if catalog.ends.get(n, {"why": "failed"}).get("why") == "failed"
        },
    )
    replays = step_records.verdicts(catalog.stores)
    made = step_records.last_steps(catalog, replays)
    attempts = [
        attempt_history.summarise(catalog, number, events.get(number, []), made.get(number, 0))
        for number in sorted(catalog.attempts)
    ]
    newest = events.get(attempts[-1].attempt, []) if attempts else []
    stands = alive(outcome(catalog, known), attempts, newest, catalog.unread)
    return RunStatus(store, catalog, known, attempts, stands, replays)


def _to_json(status: RunStatus) -> dict[str, Any]:
    """Return the state of the run and its attempts for machines."""
    catalog, stands, head = status.catalog, status.stands, status.catalog.head
    return {
        "state": stands.state,
        "why": stands.why,
        "step": head.step if head else 0,
        "checkpoint": head.name if head else None,
        "run_id": catalog.run_id,
        "attempts": [
            asdict(attempt) | {"lost": attempt.lost} | _differs(catalog, attempt)
            for attempt in status.attempts
        ],
        "launches": [
            {"launch": launch.name, "record": launch.record, "end": launch.end}
            for launch in status.known
        ],
        "replays": status.replays,
    }


def _print(status: RunStatus) -> None:
    """Print the state of the run, a table of its attempts, and what is remarkable about them."""
    catalog, stands, attempts, head = (
        status.catalog,
        status.stands,
        status.attempts,
        status.catalog.head,
    )
    say(f"{status.store}: {stands.state} ({' '.join(stands.why.split())})")
    newest = (
        "newest checkpoint that can be read" if catalog.unreadable_head else "newest checkpoint"
    )
    say(
        f"{newest}: {head.name if head else 'none'}"
        + (f", loss {locate.number(head.loss)}" if head else "")
    )
    say(
        "\n"
        + locate.table(
            ("attempt", "launch", "began", "ended", "steps", "lost", "how"),
            [
                _row(attempt, stands.state == "running" and attempt is attempts[-1])
                for attempt in attempts
            ],
        )
    )
    for line in (*machine_record.messages(catalog), *describe_replays(status.replays)):
        say(line)
    for launch in status.known:
        if (
            launch.end
            and launch.end.get("error")
            and not launches.attempts_of(catalog, launch.name)
        ):
            say(
                f"launch {launch.name} never began to train: "
                f"{' '.join(str(launch.end['error']).split())[:200]}"
            )


def _differs(catalog: Catalog, attempt: attempt_history.AttemptSummary) -> dict[str, object]:
    """Return what differs in machine and software from the attempt that this one resumes from.

    The result is a field of the JSON output.
    """
    return {
        "differs": [
            asdict(difference) for difference in machine_record.changes(catalog, attempt.attempt)
        ]
    }


def _row(attempt: attempt_history.AttemptSummary, runs: bool) -> tuple[str, ...]:
    """Return the table row of an attempt; `runs` is True for one that is running."""
    how = " ".join(describe_end(attempt.end).split())[:120] if attempt.end else "no end recorded"
    steps = f"{attempt.went_on_from}–{attempt.reached}"
    lost = "-" if runs else str(attempt.lost)  # a running attempt may still save its steps
    return (
        str(attempt.attempt),
        attempt.launch or "-",
        attempt.began or "-",
        attempt.ended or "-",
        steps,
        lost,
        how,
    )
