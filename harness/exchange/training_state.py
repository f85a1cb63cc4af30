"""Take the training state from a file that somebody else's script wrote.

It consists of the epoch and the step, and of the state of optimizers, schedulers and the gradient
scaler. Scripts store different things under the same name ("epoch" may be the last epoch that was
made, or the next one). The counts in a file are therefore checked against each other.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from harness import state
from harness.errors import UsageError
from harness.exchange import recognise
from harness.exchange.recognise import OPTIMIZER, SCALER, SCHEDULER, Part
from harness.step import Stepper
from harness.text import muted

MOST = 10**9  # limit on epochs and steps; a larger number is not a count
# Entries that the state of a scheduler of any kind may hold.
BOOKKEEPING = {
    "last_epoch",
    "verbose",
    "_step_count",
    "_last_lr",
    "_is_initial",
    "_get_lr_called_within_step",
}


@dataclass(frozen=True)
class Where:
    """The epoch to resume with, counted from 0, and the number of updates made so far."""

    epoch: int
    step: int


def position(
    parts: list[Part], per_epoch: int | None, epoch: int | None, step: int | None
) -> tuple[Where, str]:
    """Determine where a file's training stands.

    A stored "epoch" may be the last epoch that was made or the one to resume with. The optimizer's
    count of updates, or the scheduler's count of epochs, decides between them.

    Args:
        parts: The recognised parts of the file.
        per_epoch: Number of steps in an epoch; None if the data has no length.
        epoch: Epoch given by the caller; it overrides the file.
        step: Number of updates given by the caller; it overrides the file.

    Returns:
        The position, and a note ("" if there is none) on how a stored epoch was interpreted.

    Raises:
        UsageError: The number of updates cannot be determined, a stored count is no whole number,
            or the position is out of range.
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
        raise UsageError(
            "the number of updates made so far cannot be told", remedy="Say it: --step (step=…)."
        )
    where = Where(epoch, epoch * (per_epoch or 0) if updates is None else updates)
    if not (0 <= where.epoch < MOST and 0 <= where.step < MOST):
        raise UsageError(
            "a run cannot resume from there",
            f"found: epoch {where.epoch}, step {where.step}",
            "Say: --epoch, --step.",
        )
    return where, note


def _meant(
    written: int, updates: int | None, per_epoch: int | None, schedule: int | None
) -> tuple[int, str]:
    made = [
        count
        for count in (updates // per_epoch if updates is not None and per_epoch else None, schedule)
        if count is not None
    ]
    if written in made:
        return written, ""
    if written + 1 in made:
        return (
            written + 1,
            f"epoch {written} is the last one that was made, as the file's other counts tell: "
            f"goes on with {written + 1}",
        )
    return (
        written,
        f"epoch {written} is taken for the one to go on with; "
        f"if it is the last one that was made: --epoch {written + 1}",
    )


def _whole(parts: list[Part], name: str) -> int | None:
    alike = recognise.numbers_of(parts, name)
    if len({part.value for part in alike}) > 1:
        raise UsageError(
            f"which {name} a run is to resume with cannot be told",
            f"found: {', '.join(f'{part.key} {part.value}' for part in alike)}",
            f"Say it: --{name} ({name}=…).",
        )
    value = alike[0].value if alike else None
    if value is None or (value == value and 0 <= value < MOST and value == int(value)):
        return None if value is None else int(value)
    raise UsageError(
        f"a run cannot resume from {name} {value}",
        "found: in the file",
        f"Say it: --{name} ({name}=…).",
    )


def _updates(parts: list[Part]) -> int | None:
    """Return the greatest step count that optimizers such as Adam keep for each parameter."""
    counts = [
        int(kept["step"])
        for part in parts
        if part.kind == OPTIMIZER
        for kept in part.value["state"].values()
        if isinstance(kept, dict) and isinstance(kept.get("step"), int | float | torch.Tensor)
    ]
    return max(counts, default=None)


def _schedule(parts: list[Part]) -> int | None:
    return max(
        (int(part.value["last_epoch"]) for part in parts if part.kind == SCHEDULER), default=None
    )


@dataclass(frozen=True)
class Assignment:
    """The parts of a file, and which of them the objects of a task take."""

    where: str  # name of the file in messages
    parts: list[Part]
    named: Mapping[str, str]  # key or name of the part to use, by the object's name
    without: Collection[str]  # names of objects that take no state from the file
    counts: Mapping[str, int]  # number of the task's objects, by kind; 1 if absent
    taken: dict[str, Part] = field(default_factory=dict)  # by the object's name
    notes: list[str] = field(default_factory=list)  # lines for the user on what was taken

    def take(self, name: str, kind: str) -> Part | None:
        """Return the part for an object of the task, or None; record it as taken.

        Raises:
            UsageError: The named part does not exist, or the assignment is ambiguous.
        """
        if name in self.without:
            return None
        part: Part | None
        if name in self.named:
            part = recognise.called(self.parts, kind, self.named[name])
        else:
            is_lone = self.counts.get(kind, 1) < 2
            part = recognise.meant_for(self.parts, kind, name, is_lone=is_lone)
        if part is not None:
            self.taken[name] = part
        return part


def load_training_state(stepper: Stepper, assignment: Assignment, step: int) -> None:
    """Load the schedulers, the optimizers and the gradient scaler of a task from a file.

    A scheduler without a usable state in the file is advanced to `step`.

    Raises:
        UsageError: A part is ambiguous, or does not fit its object.
    """
    held = {name: _scheduler_part(stepper, assignment, name, step) for name in stepper.schedulers}
    own_rates = {
        id(scheduler.optimizer)
        for name, scheduler in stepper.schedulers.items()
        if held[name] is None and hasattr(scheduler, "optimizer")
    }
    for name, optimizer in stepper.optimizers.items():
        part = assignment.take(name, OPTIMIZER)
        if part is None:
            assignment.notes.append(f"{name}: not taken from the file; begins anew")
        else:
            keeps_rate = id(optimizer) in own_rates
            _load_optimizer(name, optimizer, part, assignment.where, keeps_rate=keeps_rate)
    for name, part in held.items():
        if part is not None:
            notes = _load_scheduler(name, stepper.schedulers[name], part, assignment.where)
            assignment.notes.extend(notes)
    if "scaler" in stepper.tracked and (part := assignment.take("scaler", SCALER)):
        stepper.tracked["scaler"].load_state_dict(part.value)


def _scheduler_part(stepper: Stepper, assignment: Assignment, name: str, step: int) -> Part | None:
    """Return the file's state for a scheduler if it counts updates, as this harness does.

    Otherwise advance the task's own scheduler to `step` and return None.
    """
    scheduler = stepper.schedulers[name]
    part = assignment.take(name, SCHEDULER)
    of = [
        own
        for own, optimizer in stepper.optimizers.items()
        if optimizer is getattr(scheduler, "optimizer", None)
    ]
    if part is not None and of and assignment.take(of[0], OPTIMIZER) is None:
        part = None  # its learning rates belong to another optimizer
    if part is not None and (name in assignment.named or part.value["last_epoch"] == step):
        return part
    assignment.taken.pop(name, None)
    with muted():  # suppress the warning that no optimizer step came first
        for _ in range(step):
            scheduler.step()
    why = (
        f"the file's counts {part.value['last_epoch']}, epochs perhaps, not updates"
        if part
        else "not taken from the file"
    )
    assignment.notes.append(f"{name}: {why}; the task's own is brought to step {step}")
    return None


def _load_optimizer(
    name: str, optimizer: torch.optim.Optimizer, part: Part, where: str, *, keeps_rate: bool
) -> None:
    """Load an optimizer's state; settings that the file lacks keep the task's values.

    Args:
        name: Name of the optimizer.
        optimizer: The optimizer to load into.
        part: Its state in the file.
        where: Name of the file in error messages.
        keeps_rate: Keep the learning rates of the task.

    Raises:
        UsageError: The state is of another kind of optimizer or of other parameters.
    """
    fresh = optimizer.state_dict()
    _check_optimizer(name, optimizer, part)
    state.restore_object(name, optimizer, part.value, where)
    for group, before in zip(optimizer.param_groups, fresh["param_groups"], strict=True):
        for key, value in before.items():
            if key not in group or (keeps_rate and key in ("lr", "initial_lr")):
                group[key] = value


def _check_optimizer(name: str, optimizer: torch.optim.Optimizer, part: Part) -> None:
    """Raise UsageError if the state is of another kind of optimizer or of other parameters."""
    kind = recognise.optimizer_kind(optimizer.state_dict())
    if kind != part.note:
        raise UsageError(
            f"{name} is {type(optimizer).__name__}, and what the file holds is of another kind",
            f"found: {part.note}",
            f"Take the task's old optimizer, or begin anew: --without {name}.",
        )
    own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in part.value["param_groups"] for number in group["params"]]
    held = part.value["state"]
    bad = [
        at
        for at, number in enumerate(numbers[: len(own)])
        if _misshaped(held.get(number, {}), own[at])
    ]
    if len(own) != len(numbers) or bad:
        shapes = f"; of another shape: parameter(s) {', '.join(map(str, bad[:5]))}" if bad else ""
        raise UsageError(
            f"{name} is of other parameters than the task's",
            f"found: {len(numbers)} parameters, expected: {len(own)}{shapes}",
            f"Begin anew: --without {name}.",
        )


def _misshaped(held: Any, parameter: torch.Tensor) -> bool:
    kept = held.values() if isinstance(held, Mapping) else ()
    return any(
        isinstance(item, torch.Tensor)
        and item.dim() == parameter.dim() > 0
        and item.shape != parameter.shape
        for item in kept
    )


def _load_scheduler(name: str, scheduler: Any, part: Part, where: str) -> list[str]:
    """Load a scheduler's state; return a note on the settings that the file has changed.

    Args:
        name: Name of the scheduler.
        scheduler: The scheduler to load into.
        part: Its state in the file.
        where: Name of the file in error messages.

    Raises:
        UsageError: The state is of another kind of scheduler.
    """
    own, theirs = (set(each) - BOOKKEEPING for each in (scheduler.state_dict(), part.value))
    if own != theirs:
        raise UsageError(
            f"{name} is a {type(scheduler).__name__}, and what the file holds is of another kind",
            f"keys in the file only: {', '.join(sorted(theirs - own)) or 'none'}; keys of "
            f"{type(scheduler).__name__} only: {', '.join(sorted(own - theirs)) or 'none'}",
            f"Begin it anew: --without {name}.",
        )
    before = dict(scheduler.state_dict())
    state.restore_object(name, scheduler, part.value, where)
    changed = [
        f"{key} {before[key]} -> {part.value[key]}"
        for key in sorted(own)
        if _plainly(before[key]) != _plainly(part.value[key])
    ]
    return [f"{name}: as in the file: {', '.join(changed)}"] if changed else []


def _plainly(value: Any) -> str:
    return str(sorted(value.items())) if isinstance(value, Mapping) else str(value)
