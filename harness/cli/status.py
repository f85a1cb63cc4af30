"""Say how a run stands: finished, to be continued, or failed, and why.

Exit code: 0 finished · 75 to be continued (stopped, running, or killed) · 1 failed · 74 cannot tell, or no such run.

example: harness status runs/a
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from typing import Any

from harness.checkpoint.history import Survey
from harness.cli import locate
from harness.errors import EXIT_FAILED, EXIT_FINISHED, EXIT_STOPPED, EXIT_STORAGE, UsageError
from harness.events import say


@dataclass(frozen=True)
class Outcome:
    """How a run stands."""

    state: str
    why: str
    exit_code: int


def outcome(found: Survey) -> Outcome:
    """A pure function of what is in the store. What is committed counts first, then how the newest attempt ended."""
    head, newest = found.head, max(found.attempts, default=0)
    whole = [m for m in found.history if any(part.sizes.get(m.data_key) == m.size_bytes for part in found.parts)]
    if found.history and not whole:
        return Outcome("failed", "there is a history, but the data of every checkpoint is missing or cut short", EXIT_FAILED)
    if head is not None and head.final is not None and newest <= head.attempt:  # a newer attempt extends the run
        if head in whole:
            return Outcome("finished", f"at step {head.step}", EXIT_FINISHED)
        return Outcome("to be continued", f"the last checkpoint's data is gone; a start goes on from step {whole[0].step}", EXIT_STOPPED)
    end = found.ends.get(newest)
    if end is None:
        return Outcome("to be continued", "no end is recorded: it is running, or was killed", EXIT_STOPPED)
    if end.get("why") == "failed":
        return Outcome("failed", str(end.get("error", "unknown error")), EXIT_FAILED)
    return Outcome("to be continued", _in_words(end), EXIT_STOPPED)


def _in_words(end: dict[str, Any]) -> str:
    why = str(end.get("why", "unreadable end record"))
    if why == "stopped":
        saved = "saved" if end.get("saved") else "NOT saved"
        return f"stopped by {'/'.join(end.get('signals', [])) or end.get('by', 'request')} at step {end.get('step')}, {saved}"
    return f"failed: {end.get('error')}" if why == "failed" else why


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--json", action="store_true", help="for machines")


def run(given: argparse.Namespace) -> int:
    try:
        store, found = locate.everywhere(given.run)
    except UsageError as error:
        say(f"cannot tell: {error.what}")
        return EXIT_STORAGE
    state = outcome(found)
    attempts = [
        {"attempt": n, "from": record.get("from"), "began": record.get("time"), "kind": record.get("kind"), "end": found.ends.get(n)}
        for n, record in sorted(found.attempts.items())
    ]
    head = found.head
    if given.json:
        fields = {"state": state.state, "why": state.why, "step": head.step if head else 0, "checkpoint": head.name if head else None}
        say(json.dumps(fields | {"run_id": found.run_id, "attempts": attempts}, indent=1))
        return state.exit_code
    say(f"{store}: {state.state} ({' '.join(state.why.split())})")
    say(f"newest checkpoint: {head.name if head else 'none'}" + (f", loss {locate.number(head.loss)}" if head else ""))
    rows = []
    for attempt in attempts:
        origin: Any = attempt["from"]
        end: Any = attempt["end"]
        rows.append(
            (
                str(attempt["attempt"]),
                str(attempt["began"]),
                f"step {origin['step']}" if origin else "nothing",
                str(end.get("time")) if end else "-",
                " ".join(_in_words(end).split())[:100] if end else "no end recorded",
            )
        )
    say("\n" + locate.table(("attempt", "began", "went on from", "ended", "how"), rows))
    return state.exit_code
