"""What the steps of a run left behind, and the first that is another one than it was."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

COMPARED = ("samples", "batch", "loss", "state", "rng")  # in the order in which one leads to the next


@dataclass(frozen=True)
class Step:
    """One step of one rank, as one process made it."""

    rank: int
    step: int
    time: float
    attempt: int
    epoch: int
    digests: dict[str, Any]
    is_writers: bool = False


@dataclass
class Traces:
    """What all processes of a run have left behind, in the order of their making."""

    steps: list[Step] = field(default_factory=list)
    starts: list[tuple[float, int, int]] = field(default_factory=list)  # of the writer: when, attempt, the step gone on from
    pids: list[tuple[float, int, int]] = field(default_factory=list)  # when, rank, process
    has: set[str] = field(default_factory=set)  # what the run was seen to have: evaluations, workers

    @property
    def last_step(self) -> int:
        return max((step.step for step in self.steps), default=0)

    @property
    def last_epoch(self) -> int:
        return max((step.epoch for step in self.steps), default=0)


def read(folder: Path) -> Traces:
    """All traces in a folder; a line that was being written is left out."""
    found = Traces()
    for file in sorted(folder.glob("traces-*.jsonl")):
        rank = attempt = 0
        writes = False
        for line in _lines(file):
            if "pid" in line:
                rank, writes = int(line["rank"]), bool(line["writes"])
                found.pids.append((line["time"], rank, line["pid"]))
            elif "attempt" in line:
                attempt = line["attempt"]
                if writes:
                    found.starts.append((line["time"], attempt, line["goes_on_from"]))
            elif "has" in line:
                found.has.add(line["has"])
            elif "step" in line:
                digests = {name: line[name] for name in COMPARED if name in line}
                found.steps.append(Step(rank, line["step"], line["time"], attempt, line["epoch"], digests, writes))
    found.steps.sort(key=lambda step: step.time)
    return found


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    for text in file.read_text().splitlines():
        with contextlib.suppress(ValueError):
            yield json.loads(text)


@dataclass(frozen=True)
class Difference:
    """The first step that is another one."""

    step: int
    rank: int
    attempt: int
    time: float
    what: str  # of COMPARED
    tensors: tuple[str, ...] = ()  # names of what differs in the state, in its order


def first_of(found: Sequence[Difference]) -> Difference | None:
    """The first of them in the order of steps."""
    return min(found, key=lambda difference: (difference.step, difference.time), default=None)


def differences(whole: Traces, other: Traces) -> list[Difference]:
    """All steps that another run made otherwise, in the order of their making."""
    expected = {(step.rank, step.step): step.digests for step in whole.steps}
    found = []
    for step in other.steps:
        wanted = expected.get((step.rank, step.step))
        if wanted is None:
            continue
        for name in COMPARED:
            mine, theirs = step.digests.get(name), wanted.get(name)
            if name == "state" and not (mine and theirs):  # of a large state not each step is digested
                continue
            if mine != theirs:
                tensors = tuple(key for key in theirs if mine.get(key) != theirs[key]) if name == "state" and theirs and mine else ()
                found.append(Difference(step.step, step.rank, step.attempt, step.time, name, tensors))
                break
    return found
