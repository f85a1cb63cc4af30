"""Compare and override settings of optimizers and schedulers.

A setting has two values: the one with which the program builds the object, and the one that a
checkpoint restores.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from harness.distributed.wrappers import unwrap
from harness.errors import UsageError

PROGRESS = (
    "last_epoch",
    "_step_count",
    "_last_lr",
    "_is_initial",
    "_get_lr_called_within_step",
    "T_cur",
    "best",
    "num_bad_epochs",
    "cooldown_counter",
    "verbose",
)
# The attributes that torch's and third-party schedulers use as settings. In a class that is not
# torch's, any other attribute may be progress.
SETTINGS = (
    "T_max",
    "T_0",
    "T_mult",
    "T_i",
    "eta_min",
    "total_steps",
    "total_iters",
    "milestones",
    "step_size",
    "gamma",
    "factor",
    "patience",
    "cooldown",
    "threshold",
    "base_lrs",
    "max_lrs",
    "min_lrs",
    "max_lr",
    "min_lr",
    "power",
    "start_factor",
    "end_factor",
    "lr_lambdas",
    "warmup_steps",
    "warmup_epochs",
    "warmup_t",
    "num_warmup_steps",
    "num_training_steps",
    "max_steps",
    "max_epochs",
    "total_epochs",
    "t_initial",
    "decay_t",
    "decay_rate",
    "lr_min",
    "cycle_limit",
    "cycle_mul",
    "cycle_decay",
    "warmup_lr_init",
    "_milestones",
)

# The lists of schedulers with one value for each parameter group of their optimizer.
PER_GROUP = (
    "base_lrs",
    "_last_lr",
    "lr_lambdas",
    "min_lrs",
    "max_lrs",
    "base_momentums",
    "max_momentums",
)


def regrouped(state: Mapping[str, Any], order: Sequence[int]) -> dict[str, Any]:
    """Return a scheduler's state with the values of parameter groups in another order.

    Args:
        state: the state dict of the scheduler.
        order: for each group in the new order, its place in the old one.
    """
    made = dict(state)
    for key, value in state.items():
        if key in PER_GROUP and isinstance(value, list | tuple) and len(value) == len(order):
            made[key] = type(value)(value[at] for at in order)
        elif key == "_schedulers":
            made[key] = [regrouped(part, order) for part in value]
    return made


def check_regroupable(name: str, scheduler: Any, state: Mapping[str, Any], count: int) -> None:
    """Check that a state with values for `count` parameter groups can have them reordered.

    Raises:
        UsageError: if a scheduler that is not torch's has a list that may be such values.
    """
    for part, inside in zip(
        vars(scheduler).get("_schedulers", ()), state.get("_schedulers", ()), strict=False
    ):
        check_regroupable(name, part, inside, count)
    unknown = [
        key
        for key, value in state.items()
        if key not in (*PER_GROUP, "_schedulers", "milestones", "_milestones")
        and isinstance(value, list | tuple)
        and len(value) == count > 1
    ]
    if unknown and not type(scheduler).__module__.startswith("torch."):
        raise UsageError(
            f"the parameter groups of {name}'s optimizer are in another order than before",
            f"found: {unknown[0]} of {type(scheduler).__name__}, with {count} values",
            "Make the groups in the same order in each process: sorted(…), no set.",
        )


def as_built(obj: Any) -> dict[str, Any]:
    """Return the settings of an optimizer or a scheduler as built; {} for any other object.

    Call it before anything is restored into the object.
    """
    inner = unwrap(obj)
    if isinstance(inner, torch.optim.Optimizer):
        return {"param_groups": [_settings(group) for group in inner.param_groups]}
    return copy.deepcopy(dict(inner.state_dict())) if is_schedule(inner) else {}


def digest_of_built(built: Mapping[str, Any]) -> str:
    """Return a digest of the settings as built, from `as_built`; the same in each process."""
    return hashlib.sha256(repr(_plain_form(built)).encode()).hexdigest()[:16]


def _plain_form(value: Any) -> Any:
    if isinstance(value, Mapping):
        return sorted((str(key), repr(_plain_form(item))) for key, item in value.items())
    if isinstance(value, list | tuple):
        return [_plain_form(item) for item in value]
    if isinstance(value, torch.Tensor):
        return value.tolist()
    return value if value is None or _is_plain(value) else type(value).__qualname__


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a parameter group, with copies of what a restore fills in place."""
    return {
        key: copy.deepcopy(value) if isinstance(value, torch.Tensor | list | dict) else value
        for key, value in group.items()
        if key != "params"
    }


def is_schedule(obj: Any) -> bool:
    """Return whether an object is a learning rate scheduler.

    Besides torch's schedulers this is any object whose class comes from a module with "scheduler"
    in its name.
    """
    return (
        isinstance(obj, torch.optim.lr_scheduler.LRScheduler) or "scheduler" in type(obj).__module__
    )


def other_settings(built: Mapping[str, Any], tracked: Mapping[str, Any]) -> list[str]:
    """Return a text for each scheduler setting that a checkpoint has changed.

    The restored value is compared with the value as built. The settings of optimizers are not
    compared, because the schedule and the loop may have changed any of them.
    """
    texts = []
    for name, obj in tracked.items():
        inner = unwrap(obj)
        if is_schedule(inner) and built.get(name):
            changed = [
                (path, was, now)
                for path, was, now, _, key in _differing(name, inner, built[name])
                if _is_setting(inner, key)
            ]
            texts += [
                f"{path}: {_short(was)} in the checkpoint, {_short(now)} as built"
                for path, was, now in changed
            ]
    return texts


def _is_setting(scheduler: Any, key: str) -> bool:
    return type(scheduler).__module__.startswith("torch.") or key in ("", *SETTINGS)


def _differing(
    path: str, scheduler: Any, built: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any, Any, str]]:
    """Yield the settings that differ, of a scheduler and of the schedulers inside it.

    Yields:
        The path, the restored value, the value as built, and the object and attribute name where
        the setting is found (None and "" if it cannot be overridden).
    """
    values = vars(scheduler)
    inside = [*values.get("_schedulers", ())]
    for at, (part, was_built) in enumerate(zip(inside, built.get("_schedulers", ()), strict=False)):
        yield from _differing(f"{path}[{at}]", part, was_built)
    if len(inside) != len(built.get("_schedulers", ())):
        yield f"{path}'s schedulers", len(inside), len(built["_schedulers"]), None, ""
    for key, now in built.items():
        if key in (*PROGRESS, "_schedulers") or key not in values:
            continue
        # It grows with each warm restart.
        if key == "T_i" and not built.get("T_mult") == values.get("T_mult") == 1:
            continue
        if key == "lr_lambdas":  # functions: only their number can be compared
            if len(now) != len(values[key]):
                yield (
                    f"{path}.{key}",
                    f"{len(values[key])} functions",
                    f"{len(now)} functions",
                    None,
                    "",
                )
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
    """Replace the restored settings of optimizers and schedulers by their settings as built.

    A learning rate that a schedule has moved keeps its place in the schedule: it is scaled by the
    ratio of the new to the old initial value. The progress of schedulers is kept.

    Args:
        built: the results of `as_built` from before the restore, by name.
        tracked: the tracked objects by name.

    Returns:
        A text for each change.
    """
    texts = []
    for name, obj in tracked.items():
        if isinstance(unwrap(obj), torch.optim.Optimizer):
            for at, (group, fresh) in enumerate(
                zip(unwrap(obj).param_groups, built[name]["param_groups"], strict=True)
            ):
                before = {key: value for key, value in group.items() if key != "params"}
                group.update(_overridden(before, fresh))
                texts += [
                    f"{name}[{at}].{key}: {before[key]} -> {group[key]}"
                    for key in before
                    if before[key] != group[key]
                ]
        elif is_schedule(unwrap(obj)) and built.get(name):
            for path, was, now, owner, key in list(_differing(name, unwrap(obj), built[name])):
                if owner is not None:
                    texts.append(f"{path}: {_short(was)} -> {_short(now)}")
                    vars(owner)[key] = now
    return texts


def _overridden(group: dict[str, Any], fresh: Mapping[str, Any]) -> dict[str, Any]:
    new = _settings(fresh)
    old_initial, new_initial = group.get("initial_lr"), fresh.get("initial_lr")
    if old_initial and new_initial is not None:
        new["lr"] = (
            group["lr"] if new_initial == old_initial else group["lr"] * (new_initial / old_initial)
        )
    return new
