"""A run at a glance, from its stores: how it stands, how fast it is, how old its last checkpoint is, and what went wrong last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from harness.checkpoint.catalog import Catalog
from harness.report.liveness import alive
from harness.supervision import attempt_history, launches
from harness.supervision.restart_policy import in_words, outcome, replayed_in_words

PROBLEMS = ("not_saved", "not_uploaded", "not_deleted", "not_kept", "hang", "retry")


@dataclass(frozen=True)
class Summary:
    """What one line tells of a run."""

    state: str
    step: int
    end_step: int | None
    steps_per_s: float | None  # while it runs
    left_s: float | None
    saved_s: float | None  # how long ago the newest checkpoint was written
    problem: str


def summarise(found: Catalog) -> Summary:
    """Look at a run. Raises StorageError."""
    numbers = sorted(found.attempts)
    told = attempt_history.told(found.stores, numbers[-1]) if numbers else []
    lives = [attempt_history.summarise(found, number, told if number == numbers[-1] else []) for number in numbers]
    stands = alive(outcome(found, launches.read(found.stores)), lives, told)
    step = lives[-1].reached if lives else 0
    end_step = next((event["of"] for event in reversed(told) if isinstance(event.get("of"), int)), None)
    rate = attempt_history.steps_per_s(told) if stands.state == "running" else None
    left_s = (end_step - step) / rate if rate and end_step is not None else None
    return Summary(
        stands.state, step, end_step, rate, left_s, attempt_history.age_s(found.head) if found.head else None, _problem(lives, told)
    )


def _problem(lives: Sequence[attempt_history.AttemptSummary], told: Sequence[dict[str, Any]]) -> str:
    """The last thing that went wrong: in what runs now, else how an earlier attempt ended."""
    for event in reversed(told):
        if event.get("event") == event.get("verdict") == "mismatch":  # one that was not expected
            return replayed_in_words(event).splitlines()[0]
        if event.get("event") in PROBLEMS:
            return " ".join(f"{event['event'].replace('_', ' ')}: {event.get('error', '')}".split())
    for life in reversed(lives):
        if life.end is not None and life.end.get("why") == "failed":
            return f"attempt {life.attempt} {' '.join(in_words(life.end).split())}"
    return ""
