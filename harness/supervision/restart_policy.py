"""Derive the state of a run and whether its supervisor restarts it, from its stores alone.

All functions are pure. Stops do not count as failures: a preemption, a time limit, a request, a
lost machine. Failures are counted per supervisor, and the count returns to zero as soon as the run
reaches a greater step than ever before, or than ever since a rollback. `MOST_FAILURES` failures in
a row (or the number in the launch's record) are a crash loop, which a restart cannot repair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from harness.checkpoint.catalog import Catalog
from harness.errors import (
    EXIT_FAILED,
    EXIT_FINISHED,
    EXIT_STOPPED,
    EXIT_SUPERSEDED,
    EXIT_USAGE,
)
from harness.supervision.launches import Launch, attempts_of
from harness.supervision.restart_messages import describe_end

MOST_FAILURES = 3
EXIT_ASKED = 130  # the exit code of a shell for an interrupted command
ASKED = "harness stop"  # field `by` of the end record after this request
KILLED = {"why": "failed", "error": "killed: no end is recorded"}


@dataclass(frozen=True)
class Outcome:
    """The state of a run, and the exit code of its supervisor."""

    state: str
    why: str
    exit_code: int
    # It stopped because the whole machine is about to be lost: by a time limit or a cloud's notice.
    is_leaving: bool = False


@dataclass(frozen=True)
class Failure:
    """One failure of an attempt, or of a launch without an attempt."""

    subject: str
    error: str
    step: int | None = None
    rank: int | None = None
    trace: str = ""
    code: int = EXIT_FAILED
    launch: str = ""
    is_fruitless: bool = True  # no greater step was committed since this attempt or launch began

    def __str__(self) -> str:
        where = (f" at step {self.step}" if self.step is not None else "") + (
            f" on rank {self.rank}" if self.rank is not None else ""
        )
        return f"{self.subject} failed{where}: {' '.join(self.error.split())}"


def failures(catalog: Catalog, launches: Sequence[Launch], supervisor: str) -> list[Failure]:
    """Return this supervisor's failures since the last progress of the run, oldest first.

    Progress is a checkpoint at a greater step than ever before, or than ever since a rollback.

    Args:
        catalog: Catalog of the run's stores.
        launches: All launches of the run.
        supervisor: Name of the supervisor.
    """
    return [death for death in deaths(catalog, launches, supervisor) if death.is_fruitless]


def deaths(catalog: Catalog, launches: Sequence[Launch], supervisor: str) -> list[Failure]:
    """Return all failures of this supervisor's launches, oldest first.

    Launches that were stopped from outside have none.
    """
    died: list[tuple[int, int, Failure]] = []
    for launch in launches:
        if launch.supervisor != supervisor or (launch.end or {}).get("why") == "stopped":
            continue
        attempts = attempts_of(catalog, launch.name)
        for number, record in attempts.items():
            end = _end_of(catalog, number, launch)
            if end is not None and end.get("why") == "failed":
                is_fruitless = not catalog.has_progressed(number, record.get("reached", -1))
                failure = _failure(f"attempt {number}", end, launch.name, is_fruitless)
                died.append((launch.number, number, failure))
        has_died = bool(died) and died[-1][2].launch == launch.name
        if launch.end is not None and (
            _is_unfinished(catalog, launch) and not has_died
            if attempts
            else launch.end.get("why") == "failed"
        ):
            reached = launch.record.get("reached", -1)
            is_fruitless = not catalog.has_progressed(launch.greatest, reached)
            failure = _failure(f"launch {launch.name}", launch.end, launch.name, is_fruitless)
            died.append((launch.number, 0, failure))
    return [failure for _, _, failure in sorted(died, key=lambda item: item[:2])]


def _is_unfinished(catalog: Catalog, launch: Launch) -> bool:
    """Return whether a program of the user's own has not ended well, though the run is finished.

    What stands after its loop (an evaluation, an export) belongs to it.
    """
    head, end = catalog.head, launch.end or {}
    if not launch.record.get("loop") or head is None or head.final is None:
        return False
    attempts = attempts_of(catalog, launch.name)
    return (not attempts or head.attempt in attempts) and (
        end.get("why") in ("failed", "stopped") or bool(end.get("code"))
    )


def _rest(catalog: Catalog, launches: Sequence[Launch], launch: Launch) -> Outcome:
    """Return what must follow a launch for which `_is_unfinished` is true."""
    end, start = launch.end or {}, f"the run is finished, but {launch.record.get('loop')}"
    if end.get("why") == "stopped":
        why = f"{start} was ended from outside; a start runs it once more"
        return Outcome("to be continued", why, EXIT_STOPPED)
    error = end.get("error") or f"exit code {end.get('code')}"
    return _counted(catalog, launches, launch, f"{start} failed: {error}")


def _counted(catalog: Catalog, launches: Sequence[Launch], launch: Launch, error: str) -> Outcome:
    """Return whether a launch that failed is followed by another one, by the number of failures."""
    failed = failures(catalog, launches, launch.supervisor)
    most = int(launch.record.get("most_failures", MOST_FAILURES))
    if len(failed) >= most:
        return Outcome("failed", crash_loop(failed), EXIT_FAILED)
    count = (
        f"{len(failed)} of {most} in a row without a new checkpoint"
        if failed
        else "after new checkpoints"
    )
    return Outcome("to be continued", f"failed ({count}): {error}", EXIT_STOPPED)


def _end_of(catalog: Catalog, number: int, launch: Launch) -> dict[str, Any] | None:
    """Return how an attempt of a launch ended, or None if that is unknown.

    An attempt without an end record was killed. If it was killed or has lost a peer, the error
    record of its launch, if there is one, gives the cause.
    """
    end = catalog.ends.get(number, KILLED)
    if end is not KILLED and not end.get("lost"):
        return end
    if launch.end is None:  # the supervisor's machine is lost, or the launch is still running
        return None
    # A rank that was killed could not record its end; the launcher that ran torchrun could.
    return end | (launch.failure or {})


def _failure(subject: str, end: dict[str, Any], launch: str, is_fruitless: bool) -> Failure:
    error, trace = str(end.get("error", "unknown error")), str(end.get("trace", ""))
    code, step, rank = int(end.get("code", EXIT_FAILED)), end.get("step"), end.get("rank")
    return Failure(subject, error, step, rank, trace, code, launch, is_fruitless)


def crash_loop(failed: Sequence[Failure]) -> str:
    """Describe a crash loop for people."""
    steps = {failure.step for failure in failed}
    step = next(iter(steps)) if len(steps) == 1 else None
    same = f", each at step {step}" if step is not None else ""
    return f"{len(failed)} in a row died without a new checkpoint{same}; the first: {failed[0]}"


def outcome(catalog: Catalog, launches: Sequence[Launch] = ()) -> Outcome:
    """Return the state of a run.

    The checkpoints are considered first. A run is finished if, and only if, its last store has the
    final checkpoint whole: that store is the authority, and another machine sees no other one. If
    the checkpoints do not decide, the state depends on how the newest attempt ended, or a later
    launch that ended without an attempt.
    """
    head = catalog.head
    newest = max(
        (number for number in catalog.attempts if not _is_overtaken(catalog, number)), default=0
    )
    if (error := catalog.unreadable_head) is not None:
        return Outcome("not readable", f"{error.what}; {error.found}", EXIT_USAGE)
    whole = next(
        (m for m in catalog.history if catalog.may_be_apart(m) or catalog.whole_copies(m)), None
    )
    if catalog.history and whole is None:
        return Outcome(
            "failed",
            "there is a history, but the data of every checkpoint is missing or cut short",
            EXIT_FAILED,
        )
    # If there is a newer attempt, it extends the finished run, unless a later launch found that
    # there was nothing to do.
    last = _last(catalog, launches)
    is_enough = last is not None and last.has_ended_well and not attempts_of(catalog, last.name)
    if head is not None and head.final is not None and (newest <= head.attempt or is_enough):
        if has_final(catalog):
            return Outcome("finished", f"at step {head.step}", EXIT_FINISHED)
        why = (
            f"the last checkpoint is not in {catalog.stores[-1]}; a start uploads it"
            if whole is None or whole == head
            else f"the last checkpoint's data is gone; a start resumes from step {whole.step}"
        )
        return Outcome("to be continued", why, EXIT_STOPPED)
    return _ended(catalog, launches)


def has_final(catalog: Catalog) -> bool:
    """Return whether the last store has the final checkpoint whole, and it is the newest one."""
    head = catalog.head
    return (
        head is not None
        and head.final is not None
        and catalog.unreadable_head is None
        and catalog.stores[-1] in catalog.whole_copies(head)
    )


def _is_overtaken(catalog: Catalog, number: int) -> bool:
    """Return whether an attempt was overtaken.

    It ended right after its claim, because its resume point was not the newest checkpoint any more.
    """
    end = catalog.ends.get(number) or {}
    return end.get("why") == "stopped" and "error" in end


def _ended(catalog: Catalog, launches: Sequence[Launch]) -> Outcome:
    """Return the state of an unfinished run, by how its newest attempt or launch ended."""
    launch = _last(catalog, launches)
    end = _end(catalog, launch)
    if end is None and not catalog.attempts:
        return Outcome("to be continued", "no attempt has begun", EXIT_STOPPED)
    if end is None:
        return Outcome(
            "to be continued", "no end is recorded: it is running, or was killed", EXIT_STOPPED
        )
    if end.get("why") != "failed":
        return Outcome("to be continued", describe_end(end), EXIT_STOPPED)
    if launch is not None and launch.end is not None and launch.end.get("why") == "stopped":
        return Outcome(
            "to be continued",
            f"ended from outside; what broke by that: {end.get('error')}",
            EXIT_STOPPED,
        )
    error = str(end.get("error", "unknown error"))
    if launch is None or end.get("code") == EXIT_USAGE:
        return Outcome("failed", error, EXIT_FAILED)
    return _counted(catalog, launches, launch, error)


def _last(catalog: Catalog, launches: Sequence[Launch]) -> Launch | None:
    """Return the newest attempt's launch, or a later one that ended without an attempt, or None."""
    newest = max(catalog.attempts, default=0)
    names = {record.get("launch") for record in catalog.attempts.values()}
    own = [
        launch
        for launch in launches
        if launch.name == catalog.attempts.get(newest, {}).get("launch")
    ]
    later = [
        launch
        for launch in launches
        if launch.greatest >= newest and launch.name not in names and launch.end is not None
    ]
    both = own + later
    return both[-1] if both else None


def _end(catalog: Catalog, launch: Launch | None) -> dict[str, Any] | None:
    """Return how the newest attempt ended, or the later launch that `_last` has found.

    None if that is unknown.
    """
    newest = max(catalog.attempts, default=0)
    if launch is None:
        return catalog.ends.get(newest)
    return (
        _end_of(catalog, newest, launch)
        if catalog.attempts.get(newest, {}).get("launch") == launch.name
        else launch.end
    )


def _overtaken(catalog: Catalog, latest: int) -> Outcome:
    """Return what must follow a launch whose newest attempt, `latest`, has a successor.

    After a rollback nothing else trains the run. Before its end, a start would overtake it.
    """
    newest = max(catalog.attempts, default=0)
    kinds = {record.get("kind") for n, record in catalog.attempts.items() if n > latest}
    if kinds != {"rollback"}:
        why = f"attempt {newest} has begun elsewhere, and goes on"
        return Outcome("superseded", why, EXIT_SUPERSEDED)
    what = f"attempt {newest}, a rollback, has taken its place"
    if newest not in catalog.ends:
        return Outcome("superseded", f"{what}; start again when it is done", EXIT_SUPERSEDED)
    return Outcome("to be continued", f"{what}; a start resumes from there", EXIT_STOPPED)


def verdict(
    catalog: Catalog, launches: Sequence[Launch], name: str
) -> tuple[Outcome, list[Failure]]:
    """Decide what the supervisor of a launch that has ended must do.

    Args:
        catalog: Catalog of the run's stores.
        launches: All launches of the run.
        name: Name of the launch that has ended.

    Returns:
        The state of the run, and the failures to show. With exit code 75 the run is to be started
        again: by the supervisor, or, if `is_leaving`, where it gets another machine. With exit code
        1 the failures are all those in a row, else those of this launch.
    """
    launch = next((launch for launch in launches if launch.name == name), Launch(name))
    attempts = attempts_of(catalog, name)
    newest = max(catalog.attempts, default=0)
    latest = max(attempts, default=launch.greatest if launch.record else newest)
    end = (catalog.ends.get(latest) if attempts else launch.end) or {}
    died = deaths(catalog, launches, launch.supervisor)
    failed = [death for death in died if death.launch == name]
    whole = outcome(catalog, launches)
    is_whole = whole.exit_code == EXIT_FINISHED
    # Attempts that were claimed after the end of a finished run, if any, were overtaken.
    if (newest > latest and not (end.get("why") == "finished" and is_whole)) or end.get(
        "why"
    ) == "superseded":
        return _overtaken(catalog, latest), failed
    # A launch of a finished run is begun to extend it. If it ended before its first attempt, its
    # end counts, and not the checkpoint by which the run is finished.
    wanted_more = not attempts and end.get("why") in ("failed", "stopped")
    stands = _ended(catalog, launches) if wanted_more else whole
    if is_whole and _is_unfinished(catalog, launch):
        stands, end = _rest(catalog, launches, launch), launch.end or {}
    elif stands.exit_code == EXIT_FINISHED:
        return stands, failed
    if end.get("by") == ASKED:
        return Outcome("stopped", f"{describe_end(end)}; not started again", EXIT_ASKED), failed
    if end.get("why") == "failed" and end.get("code") == EXIT_USAGE:
        return Outcome("failed", str(end.get("error")), EXIT_USAGE), failed
    shown = (
        [death for death in died if death.is_fruitless]
        if stands.exit_code == EXIT_FAILED
        else failed
    )
    return replace(stands, is_leaving=bool(end.get("why") == "stopped" and end.get("by"))), shown
