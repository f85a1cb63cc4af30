"""Say how a run stands: running, to be continued, finished, or failed, and why; every attempt, and the steps that each one lost.

Exit code: 0 finished · 75 to be continued (stopped, running, or killed) · 1 failed · 74 cannot tell, or no such run · 78 its newest
checkpoint is of a format that only a newer harness can read.

example: harness status runs/a
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from harness.checkpoint.catalog import Catalog
from harness.cli import locate
from harness.errors import EXIT_STORAGE, UsageError
from harness.report.liveness import alive
from harness.selfcheck import step_records
from harness.supervision import attempt_history, launches, machine_record
from harness.supervision.restart_policy import in_words, outcome, replays_in_words
from harness.text import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--json", action="store_true", help="for machines")


def run(given: argparse.Namespace) -> int:
    try:
        store, found = locate.everywhere(given.run)
    except UsageError as error:
        say(f"cannot tell: {error.what}")
        return EXIT_STORAGE
    known = launches.read(found.stores)
    told = {
        n: attempt_history.events(found.stores, n) for n in found.attempts if found.ends.get(n, {"why": "failed"}).get("why") == "failed"
    }
    lives = [attempt_history.summarise(found, number, told.get(number, [])) for number in sorted(found.attempts)]
    stands = alive(outcome(found, known), lives, told.get(lives[-1].attempt, []) if lives else [])
    head, replays = found.head, step_records.verdicts(found.stores)
    if given.json:
        fields = {"state": stands.state, "why": stands.why, "step": head.step if head else 0, "checkpoint": head.name if head else None}
        attempts = [asdict(life) | {"lost": life.lost} | _differs(found, life) for life in lives]
        starts = [{"launch": launch.name, "record": launch.record, "end": launch.end} for launch in known]
        say(json.dumps(fields | {"run_id": found.run_id, "attempts": attempts, "launches": starts, "replays": replays}, indent=1))
        return stands.exit_code
    say(f"{store}: {stands.state} ({' '.join(stands.why.split())})")
    newest = "newest checkpoint that can be read" if found.unreadable_head else "newest checkpoint"
    say(f"{newest}: {head.name if head else 'none'}" + (f", loss {locate.number(head.loss)}" if head else ""))
    say(
        "\n"
        + locate.table(
            ("attempt", "launch", "began", "ended", "steps", "lost", "how"),
            [_row(life, stands.state == "running" and life is lives[-1]) for life in lives],
        )
    )
    for line in (*machine_record.told(found), *replays_in_words(replays)):
        say(line)
    for launch in known:
        if launch.end and launch.end.get("error") and not launches.attempts_of(found, launch.name):
            say(f"launch {launch.name} never began to train: {' '.join(str(launch.end['error']).split())[:200]}")
    return stands.exit_code


def _differs(found: Catalog, life: attempt_history.AttemptSummary) -> dict[str, object]:
    """What of the machine and the software is not as in the attempt that this one went on from."""
    return {"differs": [asdict(difference) for difference in machine_record.changes(found, life.attempt)]}


def _row(life: attempt_history.AttemptSummary, runs: bool) -> tuple[str, ...]:
    how = " ".join(in_words(life.end).split())[:120] if life.end else "no end recorded"
    steps = f"{life.went_on_from}–{life.reached}"
    lost = "-" if runs else str(life.lost)  # what is not saved yet is not lost yet
    return str(life.attempt), life.launch or "-", life.began or "-", life.ended or "-", steps, lost, how
