"""How a run stands, and whether whoever started it shall start it again: pure functions of what is in its stores.

Stops are free: a preemption, a time limit, a request, a lost machine. What fails is counted by the supervisor that started it, and
forgotten as soon as the run gets further than ever; so many failures in a row are a crash loop, which no restart mends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from harness.checkpoint.catalog import Catalog
from harness.errors import EXIT_FAILED, EXIT_FINISHED, EXIT_STOPPED, EXIT_SUPERSEDED, EXIT_USAGE, printable
from harness.supervision.launches import Launch, attempts_of

MOST_FAILURES = 3
EXIT_ASKED = 130  # as a shell says of what somebody has interrupted
ASKED = "harness stop"
SAME, DIFFERENT, EXPECTED = "equal", "mismatch", "expected"  # what came of comparing steps that were made again with what they were
DATA, LOSS = "data", "loss"  # what differs first
LOOK = {
    DATA: "other samples: an order, a sampler or a dataset that is another one after a restart",
    LOSS: "same samples: what is neither tracked nor one of the global generators (of Python, NumPy, torch), a logged number that carries "
    "something over from step to step, or sick hardware",
}
KILLED = {"why": "failed", "error": "killed: no end is recorded"}


@dataclass(frozen=True)
class Outcome:
    """How a run stands."""

    state: str
    why: str
    exit_code: int
    is_leaving: bool = False  # it stopped because the whole machine goes away: its time limit, a cloud's notice


@dataclass(frozen=True)
class Failure:
    """One death."""

    what: str
    error: str
    step: int | None = None
    rank: int | None = None
    trace: str = ""
    code: int = EXIT_FAILED
    launch: str = ""
    is_fruitless: bool = True  # the run has never got further since

    def __str__(self) -> str:
        where = (f" at step {self.step}" if self.step is not None else "") + (f" on rank {self.rank}" if self.rank is not None else "")
        return f"{self.what} failed{where}: {' '.join(self.error.split())}"


def failures(found: Catalog, launches: Sequence[Launch], supervisor: str) -> list[Failure]:
    """What this supervisor's launches died of since the run last got further than ever, oldest first."""
    return [death for death in deaths(found, launches, supervisor) if death.is_fruitless]


def deaths(found: Catalog, launches: Sequence[Launch], supervisor: str) -> list[Failure]:
    """All that this supervisor's launches died of, oldest first."""
    died: list[tuple[int, int, Failure]] = []
    for launch in launches:
        if launch.supervisor != supervisor or (launch.end or {}).get("why") == "stopped":
            continue
        attempts = attempts_of(found, launch.name)
        for number, record in attempts.items():
            end = _end_of(found, number, launch)
            if end is not None and end.get("why") == "failed":
                is_fruitless = record.get("reached", -1) >= found.reached
                died.append((launch.number, number, _failure(f"attempt {number}", end, launch.name, is_fruitless)))
        if not attempts and launch.end is not None and launch.end.get("why") == "failed":
            is_fruitless = launch.record.get("reached", -1) >= found.reached
            died.append((launch.number, 0, _failure(f"launch {launch.name}", launch.end, launch.name, is_fruitless)))
    return [failure for _, _, failure in sorted(died, key=lambda item: item[:2])]


def _end_of(found: Catalog, number: int, launch: Launch) -> dict[str, Any] | None:
    """How an attempt of a launch ended; None if nothing tells."""
    end = found.ends.get(number, KILLED)
    if end is not KILLED and not end.get("lost"):
        return end
    if launch.end is None:  # the machine that supervises is lost, or it runs
        return None
    return end | (launch.failure or {})  # who was killed could not tell; torchrun did


def _failure(what: str, end: dict[str, Any], launch: str, is_fruitless: bool) -> Failure:
    error, trace = str(end.get("error", "unknown error")), str(end.get("trace", ""))
    return Failure(what, error, end.get("step"), end.get("rank"), trace, int(end.get("code", EXIT_FAILED)), launch, is_fruitless)


def crash_loop(failed: Sequence[Failure]) -> str:
    """A crash loop in words."""
    steps = {failure.step for failure in failed}
    step = next(iter(steps)) if len(steps) == 1 else None
    same = f", each at step {step}" if step is not None else ""
    return f"{len(failed)} in a row died without a new checkpoint{same}; the first: {failed[0]}"


def outcome(found: Catalog, launches: Sequence[Launch] = ()) -> Outcome:
    """What is committed counts first, then how the newest attempt, or a later launch that never got to one, ended."""
    head, newest = found.head, max((number for number in found.attempts if not _is_overtaken(found, number)), default=0)
    if (error := found.unreadable_head) is not None:
        return Outcome("not readable", f"{error.what}; {error.found}", EXIT_USAGE)
    whole = [m for m in found.history if any(part.sizes.get(m.data_key) == m.size_bytes for part in found.parts)]
    if found.history and not whole:
        return Outcome("failed", "there is a history, but the data of every checkpoint is missing or cut short", EXIT_FAILED)
    if head is not None and head.final is not None and newest <= head.attempt:  # a newer attempt extends the run
        if head in whole:
            return Outcome("finished", f"at step {head.step}", EXIT_FINISHED)
        return Outcome("to be continued", f"the last checkpoint's data is gone; a start goes on from step {whole[0].step}", EXIT_STOPPED)
    return _ended(found, launches)


def _is_overtaken(found: Catalog, number: int) -> bool:
    """Whether an attempt has only found, after its claim, that what it was to go on from is not the newest any more."""
    end = found.ends.get(number) or {}
    return end.get("why") == "stopped" and "error" in end


def _ended(found: Catalog, launches: Sequence[Launch]) -> Outcome:
    """How a run stands that is not finished, by what came last."""
    launch = _last(found, launches)
    end = _end(found, launch)
    if end is None and not found.attempts:
        return Outcome("to be continued", "no attempt has begun", EXIT_STOPPED)
    if end is None:
        return Outcome("to be continued", "no end is recorded: it is running, or was killed", EXIT_STOPPED)
    if end.get("why") != "failed":
        return Outcome("to be continued", in_words(end), EXIT_STOPPED)
    if launch is not None and launch.end is not None and launch.end.get("why") == "stopped":
        return Outcome("to be continued", f"ended from outside; what broke by that: {end.get('error')}", EXIT_STOPPED)
    error = str(end.get("error", "unknown error"))
    if launch is None or end.get("code") == EXIT_USAGE:
        return Outcome("failed", error, EXIT_FAILED)
    failed, most = failures(found, launches, launch.supervisor), int(launch.record.get("most_failures", MOST_FAILURES))
    if len(failed) >= most:
        return Outcome("failed", crash_loop(failed), EXIT_FAILED)
    count = f"{len(failed)} of {most} in a row without a new checkpoint" if failed else "after new checkpoints"
    return Outcome("to be continued", f"failed ({count}): {error}", EXIT_STOPPED)


def _last(found: Catalog, launches: Sequence[Launch]) -> Launch | None:
    """The launch that the newest attempt belongs to, or a later one that never got to an attempt."""
    newest = max(found.attempts, default=0)
    names = {record.get("launch") for record in found.attempts.values()}
    own = [launch for launch in launches if launch.name == found.attempts.get(newest, {}).get("launch")]
    later = [launch for launch in launches if launch.greatest >= newest and launch.name not in names and launch.end is not None]
    both = own + later
    return both[-1] if both else None


def _end(found: Catalog, launch: Launch | None) -> dict[str, Any] | None:
    """How what came last ended; None if nothing tells."""
    newest = max(found.attempts, default=0)
    if launch is None:
        return found.ends.get(newest)
    return _end_of(found, newest, launch) if found.attempts.get(newest, {}).get("launch") == launch.name else launch.end


def verdict(found: Catalog, launches: Sequence[Launch], name: str) -> tuple[Outcome, list[Failure]]:
    """What the supervisor of a launch that has ended shall do: start again if, and only if, the exit code is 75. And what is to be
    shown of it: all that failed in a row if that is the end, else what this launch died of."""
    launch = next((launch for launch in launches if launch.name == name), Launch(name))
    attempts = attempts_of(found, name)
    newest = max(found.attempts, default=0)
    latest = max(attempts, default=launch.greatest if launch.record else newest)
    end = (found.ends.get(latest) if attempts else launch.end) or {}
    died = deaths(found, launches, launch.supervisor)
    failed = [death for death in died if death.launch == name]
    if end.get("why") == "finished" and (stands := outcome(found, launches)).exit_code == EXIT_FINISHED:
        return stands, failed  # whatever has claimed an attempt since did not train
    if newest > latest or end.get("why") == "superseded":
        return Outcome("superseded", f"attempt {newest} has begun elsewhere, and goes on", EXIT_SUPERSEDED), failed
    wanted_more = not attempts and end.get("why") in ("failed", "stopped")  # if it was finished, this launch was to extend it
    stands = _ended(found, launches) if wanted_more else outcome(found, launches)
    if stands.exit_code == EXIT_FINISHED:
        return stands, failed
    if end.get("by") == ASKED:
        return Outcome("stopped", f"{in_words(end)}; not started again", EXIT_ASKED), failed
    if end.get("why") == "failed" and end.get("code") == EXIT_USAGE:
        return Outcome("failed", str(end.get("error")), EXIT_USAGE), failed
    shown = [death for death in died if death.is_fruitless] if stands.exit_code == EXIT_FAILED else failed
    return replace(stands, is_leaving=bool(end.get("why") == "stopped" and end.get("by"))), shown


def in_words(end: dict[str, Any]) -> str:
    """An end record for people."""
    why = str(end.get("why", "unreadable end record"))
    if why == "stopped" and "error" in end:  # found to be overtaken, after the claim
        return f"to be started again: {end['error']}"
    if why == "stopped" and "step" not in end:
        return "stopped before training began"
    if why == "stopped":
        saved = "saved" if end.get("saved") else "NOT saved"
        by = "/".join(end.get("signals", [])) or end.get("by", "request")
        return f"stopped by {by} at step {end.get('step')}, {saved}"
    return f"failed: {end.get('error')}" if why == "failed" else why


def replays_in_words(records: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """The same of all attempts, by their numbers: each that made a step another, and of the others the sum."""
    found = [replayed_in_words(record) for _, record in sorted(records.items()) if record.get("verdict") != SAME]
    equal = [record for record in records.values() if record.get("verdict") == SAME]
    if not equal:
        return found
    counts = ("recomputed", "compared", "of_losses", "of_samples")
    whole = {name: sum(_count(record, name) for record in equal) for name in counts}
    loosest = max(equal, key=lambda record: _tolerance(record) or 0.0)
    return [*found, _equal_in_words(dict(loosest) | whole)]


def replayed_in_words(record: Mapping[str, Any]) -> str:
    """What came of comparing the steps that an attempt made again, for people: one line if they are equal, else several."""
    said = {name: printable(str(value))[:200] for name, value in record.items()}
    if record.get("verdict") == SAME:
        return _equal_in_words(record)
    what, name = said.get("what"), f" {said['name']}" if said.get("name", LOSS) != LOSS else ""
    which = f"{what}{name}" + (f" on rank {said['rank']}" if record.get("rank") else "")
    hosts, devices = (list(record.get(names) or ("?", "?")) for names in ("hosts", "devices"))
    places = [printable(f"{host}, {device}")[:200] for host, device in zip(hosts, devices, strict=False)]
    lines = [
        f"was {said.get('was')} in attempt {said.get('before')} ({places[0]})",
        f"is {said.get('now')} in attempt {said.get('attempt')} ({places[-1]})",
    ]
    step = f"step {said.get('step')}"
    if record.get("verdict") == EXPECTED:
        return f"{step} is not what it was, and was expected to differ: {_listed(record, 'expected')} ({which}: {', '.join(lines)})"
    first = f"MISMATCH: {step} was made again, and is not what it was: {which}: {'other' if what == DATA else 'same'} samples"
    suspects = _listed(record, "suspects")
    return "\n".join(
        [first, *(f"  {line}" for line in lines), f"  look at: {f'{suspects}; ' if suspects else ''}{LOOK.get(str(what), '')}"]
    )


def _equal_in_words(record: Mapping[str, Any]) -> str:
    made, compared, of_losses, of_samples = (_count(record, name) for name in ("recomputed", "compared", "of_losses", "of_samples"))
    steps = f"{made} recomputed step{'s' * (made != 1)}"
    if not compared:
        return f"{steps}, none compared: nothing is left of what they were"
    tolerance = _tolerance(record)
    equal = f"all within {tolerance:g}, not exactly: {_listed(record, 'why')}" if tolerance else "all equal"
    some = f", {compared} compared" if compared < made else ""
    if not of_losses:
        return f"{steps}{some}, {equal} (in their samples: there is no loss to compare)"
    if not of_samples:
        return f"{steps}{some}, {equal} (in their losses: the samples' numbers are not known)"
    return f"{steps}{some}, {equal}" + (f" (the samples of {of_samples})" if of_samples > compared else "")


def _count(record: Mapping[str, Any], name: str) -> int:
    value = record.get(name)
    return value if isinstance(value, int) else 0


def _tolerance(record: Mapping[str, Any]) -> float | None:
    value = record.get("tolerance")
    return value if isinstance(value, float) else None


def _listed(record: Mapping[str, Any], name: str) -> str:
    values = record.get(name)
    return printable(", ".join(map(str, values)))[:1000] if isinstance(values, list) else ""
