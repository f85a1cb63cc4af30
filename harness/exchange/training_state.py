"""Take the state of optimizers, schedulers and the gradient scaler from somebody else's file."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from harness import state
from harness.distributed.wrappers import unwrap
from harness.errors import UsageError
from harness.exchange import recognise, weights
from harness.exchange.recognise import OPTIMIZER, SCALER, SCHEDULER, Part
from harness.selfcheck import optimizer_fit
from harness.state import parameter_names
from harness.state.parameter_names import Names
from harness.step import Stepper
from harness.text import muted

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
class Assignment:
    """The parts of a file, and which of them the objects of a task take."""

    where: str  # name of the file in messages
    parts: list[Part]
    named: Mapping[str, str]  # key or name of the part to use, by the object's name
    without: Collection[str]  # names of objects that take no state from the file
    counts: Mapping[str, int]  # number of the task's objects, by kind; 1 if absent
    rename: Mapping[str, str]  # new names of tensors, as of `init.rename`
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
            part = _in_live_order(stepper, assignment, name, part)
            note = _load_optimizer(name, optimizer, part, assignment.where, keeps_rate=keeps_rate)
            assignment.notes.extend(note)
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


def _in_live_order(stepper: Stepper, assignment: Assignment, name: str, part: Part) -> Part:
    """Return the state of an optimizer in the file in the order of the task's parameters.

    Raises:
        UsageError: The state is of another kind of optimizer or of other parameters, or its order
            cannot be told.
    """
    optimizer, groups = stepper.optimizers[name], part.value["param_groups"]
    _check_optimizer(name, optimizer, part)
    mine = parameter_names.names(stepper.tracked)[name]
    here = [called for called, _ in parameter_names.parameters_of(stepper.tracked)]
    there = [
        called
        for module, own in stepper.modules.items()
        if module in assignment.taken
        for called in _called(module, unwrap(own), assignment.taken[module].value, assignment)
    ]
    said: list[list[Any]] = [group.get("param_names") or group["params"] for group in groups]
    said_here: Names | None = None
    if all(isinstance(called, str) for group in said for called in group):
        own_names = {called for group in mine for called in group}
        bare = [recognise.without_prefixes(dict.fromkeys(group)) for group in said]
        for module, own in stepper.modules.items():
            names = [_called(module, unwrap(own), group, assignment) for group in bare]
            if own_names == {called for group in names for called in group}:
                said_here = [list(group) for group in names]
    value, note = optimizer_fit.matched(
        name, optimizer, part.value, (mine, said_here), (here, there), assignment.where
    )
    if note:
        assignment.notes.append(note)
    if bad := optimizer_fit.misshaped(optimizer, value):
        raise _of_other_parameters(name, optimizer, part, bad)
    return dataclasses.replace(part, value=value)


def _called(
    name: str, module: nn.Module, named: Mapping[Any, Any], assignment: Assignment
) -> list[str]:
    """Return the names that tensors of a file have in the task, in the file's order.

    Args:
        name: Name of the module.
        module: The task's module.
        named: Tensors by their names in the file.
        assignment: The parts of the file and the new names of tensors.
    """
    new, _ = weights.with_new_names(module, named, assignment.rename, assignment.where)
    return [f"{name}.{key}" for key in parameter_names.clean_keys(module, list(new)).values()]


def _load_optimizer(
    name: str, optimizer: torch.optim.Optimizer, part: Part, where: str, *, keeps_rate: bool
) -> list[str]:
    """Load an optimizer's state; return a note on the settings that the file has changed.

    Settings that the file lacks keep the task's values.

    Args:
        name: Name of the optimizer.
        optimizer: The optimizer to load into.
        part: Its state in the file.
        where: Name of the file in error messages.
        keeps_rate: Keep the learning rates of the task.

    Raises:
        UsageError: The optimizer refuses the state.
    """
    fresh = optimizer.state_dict()["param_groups"]
    state.restore_object(name, optimizer, part.value, where)
    changed = []
    for at, (group, before) in enumerate(zip(optimizer.param_groups, fresh, strict=True)):
        for key, value in before.items():
            if key not in group or (keeps_rate and key in ("lr", "initial_lr")):
                group[key] = value
            elif key not in ("params", "param_names") and _plainly(value) != _plainly(group[key]):
                called = f"{key} of group {at}" if len(fresh) > 1 else key
                changed.append(f"{called} {value} -> {group[key]}")
    return [f"{name}: as in the file: {', '.join(changed)}"] if changed else []


def _check_optimizer(name: str, optimizer: torch.optim.Optimizer, part: Part) -> None:
    """Raise UsageError if the state is of another kind of optimizer or of other parameters."""
    kind = recognise.optimizer_kind(optimizer.state_dict())
    sizes, held = (
        [len(group["params"]) for group in groups]
        for groups in (optimizer.param_groups, part.value["param_groups"])
    )
    other = part.note if kind != part.note else ""
    if not other and sizes == held:
        other = optimizer_fit.other_kind(optimizer, part.value)
    if other:
        raise UsageError(
            f"{name} is {type(optimizer).__name__}, and what the file holds is of another kind",
            f"found: {other}",
            f"Take the task's old optimizer, or begin anew: --without {name}.",
        )
    if sum(sizes) != sum(held):
        raise _of_other_parameters(name, optimizer, part, [])


def _of_other_parameters(
    name: str, optimizer: torch.optim.Optimizer, part: Part, bad: list[int]
) -> UsageError:
    expected, found = (
        sum(len(group["params"]) for group in groups)
        for groups in (optimizer.param_groups, part.value["param_groups"])
    )
    shapes = f"; of another shape: parameter(s) {', '.join(map(str, bad[:5]))}" if bad else ""
    return UsageError(
        f"{name} is of other parameters than the task's",
        f"found: {found} parameters, expected: {expected}{shapes}",
        f"Begin anew: --without {name}.",
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
