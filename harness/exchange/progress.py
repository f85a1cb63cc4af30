"""How far was somebody else's training? Scripts write down different things under the same name; what they agree on is looked for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from harness.errors import UsageError
from harness.exchange import recognise
from harness.exchange.recognise import OPTIMIZER, SCHEDULER, Part

MOST = 10**9  # epochs or steps; more of them are no count


@dataclass(frozen=True)
class Where:
    """The epoch to go on with, counted from 0, and how many updates were made."""

    epoch: int
    step: int


def position(parts: list[Part], per_epoch: int | None, epoch: int | None, step: int | None) -> tuple[Where, str]:
    """Where a file's training stands, and a word on it where that is not certain. What is told as `epoch` and `step` counts.

    "epoch" may be the last one that was made or the one to go on with: the optimizer's count of updates, or the schedule's of epochs,
    tells which. `per_epoch` is the number of steps of an epoch, None if the data does not tell. Raises UsageError.
    """
    updates = _whole(parts, "step") if step is None else step
    if updates is None:
        updates = _updates(parts)
    if epoch is None and (written := _whole(parts, "epoch")) is not None:
        epoch, note = _meant(written, updates, per_epoch, _schedule(parts))
    else:
        note = ""
    if epoch is None:
        epoch = updates // per_epoch if updates is not None and per_epoch else 0
    if updates is None and per_epoch is None and epoch:
        raise UsageError("the number of updates made so far cannot be told", remedy="Say it: --step (step=…).")
    where = Where(epoch, epoch * (per_epoch or 0) if updates is None else updates)
    if not (0 <= where.epoch < MOST and 0 <= where.step < MOST):
        raise UsageError("a run cannot go on from there", f"found: epoch {where.epoch}, step {where.step}", "Say: --epoch, --step.")
    return where, note


def _meant(written: int, updates: int | None, per_epoch: int | None, schedule: int | None) -> tuple[int, str]:
    made = [count for count in (updates // per_epoch if updates is not None and per_epoch else None, schedule) if count is not None]
    if written in made:
        return written, ""
    if written + 1 in made:
        return written + 1, f"epoch {written} is the last one that was made, as the file's other counts tell: goes on with {written + 1}"
    return written, f"epoch {written} is taken for the one to go on with; if it is the last one that was made: --epoch {written + 1}"


def _whole(parts: list[Part], name: str) -> int | None:
    value = recognise.number_of(parts, name)
    if value is None or (value == value and 0 <= value < MOST and value == int(value)):
        return None if value is None else int(value)
    raise UsageError(f"a run cannot go on from {name} {value}", "found: in the file", f"Say it: --{name} ({name}=…).")


def _updates(parts: list[Part]) -> int | None:
    """What Adam and its kind count for each parameter."""
    counts = [
        int(kept["step"])
        for part in parts if part.kind == OPTIMIZER
        for kept in part.value["state"].values() if isinstance(kept, dict) and isinstance(kept.get("step"), int | float | torch.Tensor)
    ]  # fmt: skip
    return max(counts, default=None)


def _schedule(parts: list[Part]) -> int | None:
    return max((int(part.value["last_epoch"]) for part in parts if part.kind == SCHEDULER), default=None)
