"""The time of a run, from when it was submitted until it was last heard of: each second is spent on one thing.

Within an attempt its own account tells (`run/account.py`), up to the last event; what a killed attempt did after that is lost. Between
attempts nothing runs: until a supervisor starts the next one that is waiting, then it is start-up.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from harness.checkpoint import records
from harness.checkpoint.catalog import Catalog
from harness.report.liveness import alive
from harness.selfcheck import step_records
from harness.store import Store
from harness.supervision import attempt_history, launches, machine_record
from harness.supervision.launches import Launch
from harness.supervision.restart_policy import Outcome, in_words, outcome

WAITING, LOST, OTHER = "waiting", "lost", "other"
WORDS = {
    "training": "useful training", "redone": "steps made again", LOST: "cut off by a kill", WAITING: "waiting to be started",
    "startup": "start-up", "restore": "restoring", "data": "waiting for data", "evaluation": "evaluation", "save": "saving",
    "overhead": "the loop itself", OTHER: "anything else",
}  # fmt: skip

MOST_S = 1e11  # three thousand years
ENDS = ("finished", "stopped", "failed", "killed", "running")


@dataclass(frozen=True)
class Save:
    """One checkpoint that was committed."""

    at: float  # seconds since the epoch
    step: int
    durable_s: float  # from its step until it was on the disk, or in the remote store if there is no disk
    blocked_s: float  # for how long training waited for it


@dataclass(frozen=True)
class AttemptSpan:
    """One attempt."""

    life: attempt_history.AttemptSummary
    began: float  # of its first process; seconds since the epoch
    ended: float  # or when it was last heard of
    spent: dict[str, float]  # seconds
    how: str  # finished, stopped, failed, killed, or running
    why: str
    saves: list[Save] = field(default_factory=list)
    losses: list[tuple[int, float]] = field(default_factory=list)

    @property
    def is_interrupted(self) -> bool:
        """Whether it ended before the run did."""
        return self.how in ("stopped", "failed", "killed")


@dataclass(frozen=True)
class Timeline:
    """All of a run."""

    stands: Outcome
    began: float
    ended: float
    stretches: list[AttemptSpan]
    spent: dict[str, float]  # over all attempts and what lies between them; sums to `wall_s`
    replays: dict[int, dict[str, Any]] = field(default_factory=dict)  # what came of comparing steps made again, by attempt
    environment: list[str] = field(default_factory=list)  # the attempts that ran on another machine or software than the one before

    @property
    def wall_s(self) -> float:
        return self.ended - self.began

    @property
    def useful(self) -> float:
        """The share of training that counts."""
        return self.spent.get("training", 0.0) / self.wall_s if self.wall_s else 0.0

    @property
    def saves(self) -> list[Save]:
        return [save for stretch in self.stretches for save in stretch.saves]

    @property
    def interruptions(self) -> list[AttemptSpan]:
        """The attempts that ended before the run did; all but the last have a successor."""
        return [stretch for stretch in self.stretches if stretch.is_interrupted]

    @property
    def between_interruptions_s(self) -> float | None:
        """The mean time that attempts have run until they were interrupted; None if none was."""
        count = len(self.interruptions)
        return sum(stretch.ended - stretch.began for stretch in self.stretches) / count if count else None


def timeline(found: Catalog) -> Timeline:
    """Read all that a run's stores tell of its time. Raises StorageError."""
    known = launches.read(found.stores)
    numbers = sorted(number for number, record in found.attempts.items() if record.get("kind", "train") == "train")
    told = {number: attempt_history.told(found.stores, number, math.inf) for number in numbers}
    lives = [attempt_history.summarise(found, number, told[number]) for number in numbers]
    stands = alive(outcome(found, known), lives, told[numbers[-1]] if numbers else [])
    seen = [_stretch(life, told[life.attempt], is_running=stands.state == "running" and life is lives[-1]) for life in lives]
    whole = _whole(stands, [stretch for stretch in seen if stretch is not None], known, _submitted(found.stores))
    return replace(whole, replays=step_records.verdicts(found.stores), environment=machine_record.told(found))


def _stretch(life: attempt_history.AttemptSummary, told: list[dict[str, Any]], *, is_running: bool) -> AttemptSpan | None:
    """One attempt, or None of one that has left nothing to tell when it was."""
    timed = [(at, event) for event in told if (at := _seconds(event.get("time"))) is not None]
    spent_at = [(at, _numbers(event["spent"])) for at, event in timed if isinstance(event.get("spent"), dict)]
    claimed, end = _seconds(life.began), _seconds(life.ended)
    heard = [at for at, _ in timed] + [at for at in (claimed, end) if at is not None]
    if not heard:
        return None
    began = spent_at[0][0] - sum(spent_at[0][1].values()) if spent_at else min(heard)
    ended = max(heard)
    how = (life.end or {}).get("why") or ("running" if is_running else "killed")
    how = how if how in ENDS else "failed"  # records may come from a bucket that others write to
    why = in_words(life.end) if life.end else {"running": "it is running"}.get(how, "no end is recorded: killed")
    spent = dict(spent_at[-1][1]) if spent_at else {}
    rest = max(0.0, ended - began - sum(spent.values()))
    untold = LOST if how in ("killed", "failed") else "overhead"
    spent[untold] = spent.get(untold, 0.0) + rest
    saves = [
        Save(at, event["step"], float(event.get("seconds") or 0), float(event.get("blocked_s") or 0))
        for at, event in timed
        if event.get("event") == "saved" and event.get("step") is not None
    ]
    steps = [event for _, event in timed if event.get("event") == "step" and event.get("step") is not None]
    losses = [(event["step"], float(event["loss"])) for event in steps if "loss" in event]
    return AttemptSpan(life, began, ended, spent, how, " ".join(why.split()), saves, losses)


def _whole(stands: Outcome, stretches: list[AttemptSpan], known: Sequence[Launch], submitted: float | None) -> Timeline:
    """Put the attempts one after another, with what lies between them. Where two overlap, the earlier one has the time."""
    starts = {launch.name: at for launch in known if (at := _seconds(launch.record.get("time"))) is not None}
    ends = [at for launch in known if (at := _seconds((launch.end or {}).get("time"))) is not None]
    firsts = [submitted, *starts.values(), *(stretch.began for stretch in stretches)]
    began = cursor = min((at for at in firsts if at is not None), default=0.0)
    spent: dict[str, float] = {}
    launch = None
    for stretch in sorted(stretches, key=lambda stretch: stretch.life.attempt):
        gap = max(0.0, stretch.began - cursor)
        started = starts.get(stretch.life.launch or "")
        own_start = max(0.0, stretch.began - max(started, cursor)) if started is not None else 0.0  # the launcher's, torchrun's
        if stretch.life.launch is not None and stretch.life.launch == launch:  # started again in place
            own_start = gap
        for what, seconds in ((WAITING, gap - min(gap, own_start)), ("startup", min(gap, own_start))):
            spent[what] = spent.get(what, 0.0) + seconds
        seen = max(0.0, stretch.ended - max(cursor, stretch.began))
        share = seen / sum(stretch.spent.values()) if sum(stretch.spent.values()) > 0 else 0.0
        for what, seconds in stretch.spent.items():
            spent[what] = spent.get(what, 0.0) + share * seconds
        cursor, launch = max(cursor, stretch.ended), stretch.life.launch
    if stretches and ends and max(ends) > cursor:  # its launcher had something left to do
        spent["overhead"] = spent.get("overhead", 0.0) + max(ends) - cursor
        cursor = max(ends)
    ordered = {what: spent[what] for what in WORDS if spent.get(what)}
    return Timeline(stands, began, cursor, stretches, ordered | {what: s for what, s in spent.items() if what not in WORDS and s})


def _submitted(stores: Sequence[Store]) -> float | None:
    """When the run was given to SLURM, if it was."""
    for store in stores:
        try:
            return _seconds(records.parse(store.read(launches.SUBMITTED)).get("submitted"))
        except FileNotFoundError:
            continue
    return None


def _seconds(time: object) -> float | None:
    """A recorded time, as seconds since the epoch."""
    try:
        return datetime.datetime.fromisoformat(str(time)).timestamp()
    except (ValueError, OverflowError, OSError):
        return None


def _numbers(spent: dict[str, Any]) -> dict[str, float]:
    """Seconds by kind; kinds that are not known become one."""
    found: dict[str, float] = {}
    for what, seconds in spent.items():
        if records.is_number(seconds) and 0 <= seconds < MOST_S:
            kind = what if what in WORDS else OTHER
            found[kind] = found.get(kind, 0.0) + float(seconds)
    return found
