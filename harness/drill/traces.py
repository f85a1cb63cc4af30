"""Read the traces that the steps of a run have written, and find the steps that differ."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# In the order of cause and effect: the first one that differs is nearest to the cause.
COMPARED = ("samples", "batch", "loss", "state", "rng")


@dataclass(frozen=True)
class Step:
    """Trace of one step of one rank, made by one process."""

    rank: int
    step: int
    time: float  # end of the step, in seconds since the epoch
    attempt: int
    epoch: int
    digests: dict[str, Any]  # by the names in COMPARED; that of the state is a dict by tensor name
    is_writers: bool = False  # whether the writer made it


@dataclass
class Traces:
    """Traces of all processes of a run; the steps are in the order of time."""

    steps: list[Step] = field(default_factory=list)
    # Starts of the writer: (time, attempt, step that it resumes from).
    starts: list[tuple[float, int, int]] = field(default_factory=list)
    pids: list[tuple[float, int, int]] = field(default_factory=list)  # (time, rank, PID)
    has: set[str] = field(default_factory=set)  # features in use: "evaluation", "workers"
    workers: int = 0  # number of loader processes of a rank in the newest file

    @property
    def last_step(self) -> int:
        """Return the greatest step; 0 if there is none."""
        return max((step.step for step in self.steps), default=0)

    @property
    def last_epoch(self) -> int:
        """Return the greatest epoch; 0 if there is no step."""
        return max((step.epoch for step in self.steps), default=0)


def read(folder: Path) -> Traces:
    """Read all traces in a folder.

    A line that was cut off while it was written is ignored.
    """
    traces = Traces()
    for file in sorted(folder.glob("traces-*.jsonl")):
        rank = attempt = 0
        writes = False
        for line in _lines(file):
            if "pid" in line:
                rank, writes = int(line["rank"]), bool(line["writes"])
                traces.pids.append((line["time"], rank, line["pid"]))
            elif "attempt" in line:
                attempt = line["attempt"]
                if writes:
                    traces.starts.append((line["time"], attempt, line["goes_on_from"]))
            elif "has" in line:
                traces.has.add(line["has"])
                traces.workers = line.get("number", traces.workers)
            elif "step" in line:
                digests = {name: line[name] for name in COMPARED if name in line}
                traces.steps.append(
                    Step(rank, line["step"], line["time"], attempt, line["epoch"], digests, writes)
                )
    traces.steps.sort(key=lambda step: step.time)
    return traces


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    for text in file.read_text().splitlines():
        with contextlib.suppress(ValueError):
            yield json.loads(text)


@dataclass(frozen=True)
class Difference:
    """A step that differs from the same step of the undisturbed run."""

    step: int
    rank: int
    attempt: int
    time: float
    what: str  # the first of COMPARED that differs
    tensors: tuple[str, ...] = ()  # names of the state entries that differ, in the state's order


def first_of(differing: Sequence[Difference]) -> Difference | None:
    """Return the difference of the smallest step; of equal steps, the earliest."""
    return min(differing, key=lambda difference: (difference.step, difference.time), default=None)


def differences(whole: Traces, other: Traces) -> list[Difference]:
    """Find all steps of another run that differ from the undisturbed run, in the order of time.

    Steps that the undisturbed run has not made are not compared.
    """
    expected = {(step.rank, step.step): step.digests for step in whole.steps}
    differing = []
    for step in other.steps:
        wanted = expected.get((step.rank, step.step))
        if wanted is None:
            continue
        for name in COMPARED:
            mine, theirs = step.digests.get(name), wanted.get(name)
            # A large state is not digested in every step.
            if name == "state" and not (mine and theirs):
                continue
            if mine != theirs:
                tensors = (
                    tuple(key for key in theirs if mine.get(key) != theirs[key])
                    if name == "state" and theirs and mine
                    else ()
                )
                differing.append(
                    Difference(step.step, step.rank, step.attempt, step.time, name, tensors)
                )
                break
    return differing
