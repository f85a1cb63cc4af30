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
from harness.supervision.restart_messages import in_words, replayed_in_words
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


def summarise(found: Catalog) -> Summary:
    """Summarise a run from the catalog of its stores. Raises StorageError."""
    numbers = sorted(found.attempts)
    told = attempt_history.told(found, numbers[-1]) if numbers else []
    lives = [
        attempt_history.summarise(found, number, told if number == numbers[-1] else [])
        for number in numbers
    ]
    stands = alive(outcome(found, launches.read(found.stores)), lives, told)
    step = lives[-1].reached if lives else 0
    end_step = next(
        (event["of"] for event in reversed(told) if isinstance(event.get("of"), int)), None
    )
    rate = attempt_history.steps_per_s(told) if stands.state == "running" else None
    left_s = (end_step - step) / rate if rate and end_step is not None else None
    return Summary(
        stands.state,
        step,
        end_step,
        rate,
        left_s,
        attempt_history.age_s(found.head) if found.head else None,
        _problem(lives, told),
    )


def _problem(
    lives: Sequence[attempt_history.AttemptSummary], told: Sequence[dict[str, Any]]
) -> str:
    """Return the last problem among the newest attempt's events, else the last failed attempt.

    Args:
        lives: Summaries of the attempts, oldest first.
        told: Events of the newest attempt.

    Returns:
        One line; "" if there was no problem.
    """
    for event in reversed(told):
        # A mismatch that was expected has another verdict; it is no problem.
        if event.get("event") == event.get("verdict") == "mismatch":
            return replayed_in_words(event).splitlines()[0]
        if event.get("event") in PROBLEMS:
            return " ".join(f"{event['event'].replace('_', ' ')}: {event.get('error', '')}".split())
    for life in reversed(lives):
        if life.end is not None and life.end.get("why") == "failed":
            return f"attempt {life.attempt} {' '.join(in_words(life.end).split())}"
    return ""
