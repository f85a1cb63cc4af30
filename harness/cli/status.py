"""Show the state of a run: running, to be continued, finished or failed, and why.

Every attempt is listed, with the steps that it lost.

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
    found: Catalog
    known: list[launches.Launch]
    lives: list[attempt_history.AttemptSummary]  # oldest first
    stands: Outcome
    replays: dict[int, dict[str, Any]]  # comparisons of recomputed steps, by attempt


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `harness status`."""
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--json", action="store_true", help="for machines")


def run(given: argparse.Namespace) -> int:
    """Print the state of the run and its attempts; return the exit code. Raises StorageError."""
    try:
        store, found = locate.everywhere(given.run)
    except UsageError as error:
        say(f"cannot tell: {error.what}")
        return EXIT_STORAGE
    status = _read(store, found)
    if given.json:
        say(json.dumps(_to_json(status), indent=1))
    else:
        _print(status)
    return status.stands.exit_code


def _read(store: Store, found: Catalog) -> RunStatus:
    """Read the launches, the events of failed attempts and the comparisons of recomputed steps.

    Args:
        store: First store of the run.
        found: Catalog of all its stores.

    Raises:
        StorageError: A store cannot be read.
    """
    known = launches.read(found.stores)
    told = {
        n: attempt_history.events(found.stores, n)
        for n in found.attempts
        if found.ends.get(n, {"why": "failed"}).get("why") == "failed"
    }
    lives = [
        attempt_history.summarise(found, number, told.get(number, []))
        for number in sorted(found.attempts)
    ]
    stands = alive(outcome(found, known), lives, told.get(lives[-1].attempt, []) if lives else [])
    return RunStatus(store, found, known, lives, stands, step_records.verdicts(found.stores))


def _to_json(status: RunStatus) -> dict[str, Any]:
    """Return the state of the run and its attempts for machines."""
    found, stands, head = status.found, status.stands, status.found.head
    return {
        "state": stands.state,
        "why": stands.why,
        "step": head.step if head else 0,
        "checkpoint": head.name if head else None,
        "run_id": found.run_id,
        "attempts": [
            asdict(life) | {"lost": life.lost} | _differs(found, life) for life in status.lives
        ],
        "launches": [
            {"launch": launch.name, "record": launch.record, "end": launch.end}
            for launch in status.known
        ],
        "replays": status.replays,
    }


def _print(status: RunStatus) -> None:
    """Print the state of the run, a table of its attempts, and what is remarkable about them."""
    found, stands, lives, head = status.found, status.stands, status.lives, status.found.head
    say(f"{status.store}: {stands.state} ({' '.join(stands.why.split())})")
    newest = "newest checkpoint that can be read" if found.unreadable_head else "newest checkpoint"
    say(
        f"{newest}: {head.name if head else 'none'}"
        + (f", loss {locate.number(head.loss)}" if head else "")
    )
    say(
        "\n"
        + locate.table(
            ("attempt", "launch", "began", "ended", "steps", "lost", "how"),
            [_row(life, stands.state == "running" and life is lives[-1]) for life in lives],
        )
    )
    for line in (*machine_record.messages(found), *describe_replays(status.replays)):
        say(line)
    for launch in status.known:
        if launch.end and launch.end.get("error") and not launches.attempts_of(found, launch.name):
            say(
                f"launch {launch.name} never began to train: "
                f"{' '.join(str(launch.end['error']).split())[:200]}"
            )


def _differs(found: Catalog, life: attempt_history.AttemptSummary) -> dict[str, object]:
    """Return what differs in machine and software from the attempt that this one resumes from.

    The result is a field of the JSON output.
    """
    return {
        "differs": [
            asdict(difference) for difference in machine_record.changes(found, life.attempt)
        ]
    }


def _row(life: attempt_history.AttemptSummary, runs: bool) -> tuple[str, ...]:
    """Return the table row of an attempt; `runs` is True for one that is running."""
    how = " ".join(describe_end(life.end).split())[:120] if life.end else "no end recorded"
    steps = f"{life.went_on_from}–{life.reached}"
    lost = "-" if runs else str(life.lost)  # a running attempt may still save its steps
    return (
        str(life.attempt),
        life.launch or "-",
        life.began or "-",
        life.ended or "-",
        steps,
        lost,
        how,
    )
