"""The settings of optimizers and schedulers: as a program builds them, and as a checkpoint gives them back."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from harness.distributed.ddp import plain

PROGRESS = (
    "last_epoch", "_step_count", "_last_lr", "_is_initial", "_get_lr_called_within_step", "T_cur", "best", "num_bad_epochs",
    "cooldown_counter", "verbose",
)  # fmt: skip
# What torch's and other people's schedulers call settings; of a class that is not torch's anything else may be progress.
SETTINGS = (
    "T_max", "T_0", "T_mult", "T_i", "eta_min", "total_steps", "total_iters", "milestones", "step_size", "gamma", "factor", "patience",
    "cooldown", "threshold", "base_lrs", "max_lrs", "min_lrs", "max_lr", "min_lr", "power", "start_factor", "end_factor", "lr_lambdas",
    "warmup_steps", "warmup_epochs", "warmup_t", "num_warmup_steps", "num_training_steps", "max_steps", "max_epochs", "total_epochs",
    "t_initial", "decay_t", "decay_rate", "lr_min", "cycle_limit", "cycle_mul", "cycle_decay", "warmup_lr_init", "_milestones",
)  # fmt: skip


def as_built(thing: Any) -> dict[str, Any]:
    """The settings that an optimizer or a scheduler has before anything is restored into it; {} for anything else."""
    inner = plain(thing)
    if isinstance(inner, torch.optim.Optimizer):
        return {"param_groups": [{key: value for key, value in group.items() if key != "params"} for group in inner.param_groups]}
    return copy.deepcopy(dict(inner.state_dict())) if is_schedule(inner) else {}


def is_schedule(thing: Any) -> bool:
    """Whether it moves learning rates: torch's own, or what says so by the name of its module."""
    return isinstance(thing, torch.optim.lr_scheduler.LRScheduler) or "scheduler" in type(thing).__module__


def other_settings(built: Mapping[str, Any], tracked: Mapping[str, Any]) -> list[str]:
    """Each setting of a scheduler that a checkpoint has given back otherwise than the program builds it, in words.

    Of an optimizer's the schedule and the loop may have changed any, so they are not compared.
    """
    said = []
    for name, thing in tracked.items():
        inner = plain(thing)
        if is_schedule(inner) and built.get(name):
            found = [(path, was, now) for path, was, now, _, key in _differing(name, inner, built[name]) if _is_setting(inner, key)]
            said += [f"{path}: {_short(was)} in the checkpoint, {_short(now)} as built" for path, was, now in found]
    return said


def _is_setting(scheduler: Any, key: str) -> bool:
    return type(scheduler).__module__.startswith("torch.") or key in ("", *SETTINGS)


def _differing(path: str, scheduler: Any, built: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any, Any, str]]:
    """Where, the restored and the built value, and which object has it under which name; of the schedulers inside as well."""
    values = vars(scheduler)
    inside = [*values.get("_schedulers", ())]
    for at, (part, was_built) in enumerate(zip(inside, built.get("_schedulers", ()), strict=False)):
        yield from _differing(f"{path}[{at}]", part, was_built)
    if len(inside) != len(built.get("_schedulers", ())):
        yield f"{path}'s schedulers", len(inside), len(built["_schedulers"]), None, ""
    for key, now in built.items():
        if key in (*PROGRESS, "_schedulers") or key not in values:
            continue
        if key == "T_i" and not built.get("T_mult") == values.get("T_mult") == 1:  # grows with each warm restart
            continue
        if key == "lr_lambdas":  # functions, of which nothing but their number is known
            if len(now) != len(values[key]):
                yield f"{path}.{key}", f"{len(values[key])} functions", f"{len(now)} functions", None, ""
        elif _is_plain(now) and _is_plain(values[key]) and values[key] != now:
            yield f"{path}.{key}", values[key], now, scheduler, key


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(_is_plain(item) for item in value.values())
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return type(value) in (int, float, str, bool)


def _short(value: Any) -> str:
    text = repr(sorted(value.elements()) if hasattr(value, "elements") else value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def apply_override(built: Mapping[str, Any], tracked: Mapping[str, Any]) -> list[str]:
    """Put the settings that optimizers and schedulers were built with over those that came out of a checkpoint.

    `built` holds what `as_built` gave before the restore. A learning rate that a schedule has moved keeps its place in the
    schedule: it is scaled by new over old initial value. How far a scheduler has come is kept. Returns what changed, in words.
    """
    said = []
    for name, thing in tracked.items():
        if isinstance(plain(thing), torch.optim.Optimizer):
            for at, (group, fresh) in enumerate(zip(plain(thing).param_groups, built[name]["param_groups"], strict=True)):
                before = {key: value for key, value in group.items() if key != "params"}
                group.update(_overridden(before, fresh))
                said += [f"{name}[{at}].{key}: {before[key]} -> {group[key]}" for key in before if before[key] != group[key]]
        elif is_schedule(plain(thing)) and built.get(name):
            for path, was, now, owner, key in list(_differing(name, plain(thing), built[name])):
                if owner is not None:
                    said.append(f"{path}: {_short(was)} -> {_short(now)}")
                    vars(owner)[key] = now
    return said


def _overridden(group: dict[str, Any], fresh: Mapping[str, Any]) -> dict[str, Any]:
    new = {key: value for key, value in fresh.items() if key != "params"}
    old_initial, new_initial = group.get("initial_lr"), fresh.get("initial_lr")
    if old_initial and new_initial is not None:
        new["lr"] = group["lr"] if new_initial == old_initial else group["lr"] * (new_initial / old_initial)
    return new
