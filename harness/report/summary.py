"""Summarise a run from its stores in one line.

The line has the state of the run, its step, its speed, the age of its newest checkpoint, and its
last problem.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from harness.checkpoint.catalog import Catalog
from harness.report.liveness import alive
from harness.supervision import attempt_history, launches
from harness.supervision.restart_messages import describe_end, describe_replay
from harness.supervision.restart_policy import outcome

PROBLEMS = ("not_saved", "not_uploaded", "not_deleted", "not_kept", "hang", "retry")


@dataclass(frozen=True)
class Summary:
    """The state of a run, for one line of a table."""

    state: str
    step: int
    end_step: int | None
    steps_per_s: float | None  # None unless the run is running
    left_s: float | None  # estimated time to `end_step`
    saved_s: float | None  # age of the newest checkpoint; None if there is none
    problem: str  # "" if there is none


def summarise(catalog: Catalog) -> Summary:
    """Summarise a run from the catalog of its stores. Raises StorageError."""
    numbers = sorted(catalog.attempts)
    events = attempt_history.first_log(catalog, numbers[-1]) if numbers else []
    attempts = [
        attempt_history.summarise(catalog, number, events if number == numbers[-1] else [])
        for number in numbers
    ]
    stands = alive(outcome(catalog, launches.read(catalog.stores)), attempts, events)
    step = attempts[-1].reached if attempts else 0
    end_step = next(
        (event["of"] for event in reversed(events) if isinstance(event.get("of"), int)), None
    )
    rate = attempt_history.steps_per_s(events) if stands.state == "running" else None
    left_s = (end_step - step) / rate if rate and end_step is not None else None
    return Summary(
        stands.state,
        step,
        end_step,
        rate,
        left_s,
        attempt_history.age_s(catalog.head) if catalog.head else None,
        _problem(attempts, events),
    )


def _problem(
    attempts: Sequence[attempt_history.AttemptSummary], events: Sequence[dict[str, Any]]
) -> str:
    """Return the last problem among the newest attempt's events, else the last failed attempt.

    Args:
        attempts: Summaries of the attempts, oldest first.
        events: Events of the newest attempt.

    Returns:
        One line; "" if there was no problem.
    """
    for event in reversed(events):
        # A mismatch that was expected has another verdict; it is no problem.
        if event.get("event") == event.get("verdict") == "mismatch":
            return describe_replay(event).splitlines()[0]
        if event.get("event") in PROBLEMS:
            return " ".join(f"{event['event'].replace('_', ' ')}: {event.get('error', '')}".split())
    for attempt in reversed(attempts):
        if attempt.end is not None and attempt.end.get("why") == "failed":
            return f"attempt {attempt.attempt} {' '.join(describe_end(attempt.end).split())}"
    return ""
