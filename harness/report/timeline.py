"""Wall time of a run by category, from its submission to its last sign of life.

Each second counts in exactly one category. Within an attempt, the categories come from the
attempt's own goodput accounting (`monitoring/goodput.py`), which its events report. The time
between the last report and the end of the attempt, or its last sign of life, counts as cut off if
the attempt was killed or failed, else as overhead. Between two attempts nothing runs: that time is
waiting until a supervisor starts the next launch, then start-up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from harness.checkpoint import records
from harness.checkpoint.catalog import Catalog
from harness.checkpoint.records import seconds as _seconds
from harness.report.liveness import alive
from harness.selfcheck import step_records
from harness.store import Store
from harness.supervision import attempt_history, launches, machine_record
from harness.supervision.launches import Launch
from harness.supervision.restart_messages import describe_end
from harness.supervision.restart_policy import Outcome, outcome

WAITING, LOST, OTHER = "waiting", "lost", "other"
# Categories of time, in the order of the report, and their names for people.
LABELS = {
    "training": "useful training",
    "redone": "recomputed steps",
    LOST: "cut off by a kill",
    WAITING: "waiting to be started",
    "startup": "start-up",
    "restore": "restoring",
    "data": "waiting for data",
    "evaluation": "evaluation",
    "save": "saving",
    "overhead": "the loop itself",
    OTHER: "anything else",
}

MOST_S = 1e11  # three thousand years; a recorded duration beyond it is invalid
ENDS = ("finished", "stopped", "failed", "killed", "superseded", "running")


@dataclass(frozen=True)
class Save:
    """One committed checkpoint."""

    at: float  # seconds since the epoch
    step: int
    # From its step until it was on the disk, or in the remote store if there is no disk.
    durable_s: float
    blocked_s: float  # how long training waited for it


@dataclass(frozen=True)
class AttemptSpan:
    """One attempt and its time by category."""

    life: attempt_history.AttemptSummary
    # Start of the process that reports the time, else the first sign of life; seconds since the
    # epoch.
    began: float
    ended: float  # end, or last sign of life; seconds since the epoch
    spent: dict[str, float]  # seconds by category
    how: str  # one of `ENDS`
    why: str
    saves: list[Save] = field(default_factory=list)
    losses: list[tuple[int, float]] = field(default_factory=list)

    @property
    def is_interrupted(self) -> bool:
        """Return whether the attempt ended before the run was finished."""
        return self.how in ("stopped", "failed", "killed", "superseded")


@dataclass(frozen=True)
class Timeline:
    """The attempts of a run and its wall time by category."""

    stands: Outcome
    began: float  # seconds since the epoch
    ended: float  # seconds since the epoch
    stretches: list[AttemptSpan]
    # Seconds by category over all attempts and the gaps between them; they sum to `wall_s`.
    spent: dict[str, float]
    # Attempt -> result of comparing the steps that it recomputed with the original ones.
    replays: dict[int, dict[str, Any]] = field(default_factory=dict)
    # A line for each attempt on other hardware or software than the attempt that it resumed from.
    environment: list[str] = field(default_factory=list)

    @property
    def wall_s(self) -> float:
        """Return the time from the run's submission or first start to its last sign of life."""
        return self.ended - self.began

    @property
    def useful(self) -> float:
        """Return the share of wall time that was useful training, 0 to 1."""
        return self.spent.get("training", 0.0) / self.wall_s if self.wall_s else 0.0

    @property
    def saves(self) -> list[Save]:
        """Return the committed checkpoints of all attempts."""
        return [save for span in self.stretches for save in span.saves]

    @property
    def interruptions(self) -> list[AttemptSpan]:
        """Return the attempts that ended before the run was finished.

        All but the last have a successor.
        """
        return [span for span in self.stretches if span.is_interrupted]

    @property
    def between_interruptions_s(self) -> float | None:
        """Return the running time of all attempts, in seconds, per interruption.

        Returns None if no attempt was interrupted.
        """
        count = len(self.interruptions)
        return sum(span.ended - span.began for span in self.stretches) / count if count else None


def timeline(catalog: Catalog) -> Timeline:
    """Build the timeline of a run from the records and events in its stores.

    Only training attempts count, not imports and rollbacks. Raises StorageError.
    """
    known = launches.read(catalog.stores)
    numbers = sorted(
        number
        for number, record in catalog.attempts.items()
        if record.get("kind", "train") == "train"
    )
    events = attempt_history.logs(catalog, dict.fromkeys(numbers, math.inf))
    replays = step_records.verdicts(catalog.stores)
    made = step_records.last_steps(catalog, replays)
    attempts = [
        attempt_history.summarise(catalog, number, events[number], made.get(number, 0))
        for number in numbers
    ]
    newest = events[numbers[-1]] if numbers else []
    stands = alive(outcome(catalog, known), attempts, newest, catalog.unread)
    seen = [
        _span(
            attempt,
            events[attempt.attempt],
            is_running=stands.state == "running" and attempt is attempts[-1],
        )
        for attempt in attempts
    ]
    whole = _whole(
        stands,
        [span for span in seen if span is not None],
        known,
        _submitted(catalog.stores),
    )
    return replace(
        whole,
        replays=replays,
        environment=machine_record.messages(catalog),
    )


def _span(
    attempt: attempt_history.AttemptSummary, events: list[dict[str, Any]], *, is_running: bool
) -> AttemptSpan | None:
    """Return the span of one attempt; None if no record or event of it has a time.

    Args:
        attempt: Summary of the attempt.
        events: All events of the attempt.
        is_running: Whether the attempt is alive.
    """
    timed = [(at, event) for event in events if (at := _seconds(event.get("time"))) is not None]
    spent_at = [
        (at, _numbers(event["spent"]))
        for at, event in timed
        if isinstance(event.get("spent"), dict)
    ]
    claimed, end = _seconds(attempt.began), _seconds(attempt.ended)
    heard = [at for at, _ in timed] + [at for at in (claimed, end) if at is not None]
    if not heard:
        return None
    began = spent_at[0][0] - sum(spent_at[0][1].values()) if spent_at else min(heard)
    # No process has run since before 1970: such durations are invalid.
    began = began if began > 0 else min(heard)
    ended = max(heard)
    how = (attempt.end or {}).get("why") or ("running" if is_running else "killed")
    # Others may write to the bucket: a record may hold any word.
    how = how if how in ENDS else "failed"
    why = (
        describe_end(attempt.end)
        if attempt.end
        else {"running": "it is running"}.get(how, "no end is recorded: killed")
    )
    spent = dict(spent_at[-1][1]) if spent_at else {}
    rest = max(0.0, ended - began - sum(spent.values()))
    untold = LOST if how in ("killed", "failed", "superseded") else "overhead"
    spent[untold] = spent.get(untold, 0.0) + rest
    saves = [
        Save(
            at, event["step"], float(event.get("seconds") or 0), float(event.get("blocked_s") or 0)
        )
        for at, event in timed
        if event.get("event") == "saved" and event.get("step") is not None
    ]
    steps = [
        event
        for _, event in timed
        if event.get("event") == "step" and event.get("step") is not None
    ]
    losses = [(event["step"], float(event["loss"])) for event in steps if "loss" in event]
    return AttemptSpan(attempt, began, ended, spent, how, " ".join(why.split()), saves, losses)


def _whole(
    stands: Outcome, spans: list[AttemptSpan], known: Sequence[Launch], submitted: float | None
) -> Timeline:
    """Join the attempts and the gaps between them to the timeline of the run.

    Where two attempts overlap, the earlier one gets the time. The time of the later one is scaled
    down to the rest.

    Args:
        stands: State of the run.
        spans: Spans of the attempts.
        known: Launches of the run.
        submitted: When the run was submitted to SLURM, in seconds since the epoch, or None.
    """
    starts = {
        launch.name: at
        for launch in known
        if (at := _seconds(launch.record.get("time"))) is not None
    }
    ends = [at for launch in known if (at := _seconds((launch.end or {}).get("time"))) is not None]
    firsts = [submitted, *starts.values(), *(span.began for span in spans)]
    began = cursor = min((at for at in firsts if at is not None), default=0.0)
    spent: dict[str, float] = {}
    launch = None
    for span in sorted(spans, key=lambda span: span.life.attempt):
        own = span.life.launch
        # torchrun restarted the workers in place: the gap is all start-up.
        started = cursor if own is not None and own == launch else starts.get(own or "")
        for category, seconds in _gap(cursor, started, span.began).items():
            spent[category] = spent.get(category, 0.0) + seconds
        seen = max(0.0, span.ended - max(cursor, span.began))
        share = seen / sum(span.spent.values()) if sum(span.spent.values()) > 0 else 0.0
        for category, seconds in span.spent.items():
            spent[category] = spent.get(category, 0.0) + share * seconds
        cursor, launch = max(cursor, span.ended), span.life.launch
    # The launcher ended after the last attempt.
    if spans and ends and max(ends) > cursor:
        spent["overhead"] = spent.get("overhead", 0.0) + max(ends) - cursor
        cursor = max(ends)
    ordered = {category: spent[category] for category in LABELS if spent.get(category)}
    return Timeline(
        stands,
        began,
        cursor,
        spans,
        ordered | {category: s for category, s in spent.items() if category not in LABELS and s},
    )


def _gap(cursor: float, started: float | None, began: float) -> dict[str, float]:
    """Divide the time before an attempt into waiting for its launch and start-up.

    Args:
        cursor: When the time before was used up, in seconds since the epoch.
        started: When the launch of the attempt was started, or None if unknown.
        began: When the attempt began.
    """
    gap = max(0.0, began - cursor)
    # How long the launcher and torchrun took to start the attempt.
    own_start = max(0.0, began - max(started, cursor)) if started is not None else 0.0
    return {WAITING: gap - min(gap, own_start), "startup": min(gap, own_start)}


def _submitted(stores: Sequence[Store]) -> float | None:
    """Return when the run was submitted to SLURM, in seconds since the epoch, or None."""
    for store in stores:
        try:
            return _seconds(records.parse(store.read(launches.SUBMITTED)).get("submitted"))
        except FileNotFoundError:
            continue
    return None


def _numbers(spent: dict[str, Any]) -> dict[str, float]:
    """Return the valid entries of a report; unknown categories are added up as OTHER."""
    totals: dict[str, float] = {}
    for category, seconds in spent.items():
        if records.is_number(seconds) and 0 <= seconds < MOST_S:
            kind = category if category in LABELS else OTHER
            totals[kind] = totals.get(kind, 0.0) + float(seconds)
    return totals
