"""Give state back: all of it, bit for bit, or none."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from harness.ddp import plain
from harness.errors import UsageError, printable


def restore(tracked: Mapping[str, Any], classes: Mapping[str, str], payload: Mapping[str, Any], source: str) -> None:
    """Give every tracked object its state back, bit for bit. Raises UsageError, before anything is changed, on a mismatch.

    `classes` are the class names at the time of saving; a state dict alone does not tell which optimizer it is of.
    """
    for name, thing in tracked.items():
        state = payload.get(f"{name}_state_dict")
        if state is None:
            saved = [key.removesuffix("_state_dict") for key in payload if key.endswith("_state_dict")]
            raise UsageError(
                f"{source} has no {name!r}", f"found: {', '.join(saved)}", "Track the same names as before, or take a new run directory."
            )
        if name in classes and classes[name] != class_name(thing):
            raise UsageError(
                f"{name} is not what {source} was saved from", f"found: {class_name(thing)}, expected: {classes[name]}",
                "Put the old one back, or take a new run directory.",
            )  # fmt: skip
        if isinstance(plain(thing), nn.Module) and not any(is_lazy(value) for value in plain(thing).state_dict().values()):
            check_tensors(name, plain(thing).state_dict(), state, source)
    for name, thing in tracked.items():
        restore_one(name, plain(thing), payload[f"{name}_state_dict"], source)


def restore_one(name: str, thing: Any, state: Any, source: str) -> None:
    """Give one object its state back, bit for bit, and let it keep nothing of `state`, which may be views of a whole checkpoint's memory:
    a module copies, an optimizer is made to, all else is given a copy. Raises UsageError."""
    try:
        thing.load_state_dict(state if isinstance(thing, nn.Module | torch.optim.Optimizer) else copy.deepcopy(state))
    except (ValueError, KeyError, RuntimeError) as error:
        raise UsageError(
            f"{name} does not take the state in {source}", f"found: {str(error).splitlines()[0]}",
            "The model or its optimizer has changed: put the old one back, or take a new run directory.",
        ) from error  # fmt: skip
    if isinstance(thing, torch.optim.Optimizer):
        _mend_state(thing, state)


def _mend_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """`Optimizer.load_state_dict` casts state to its parameter's dtype, and keeps as it is given what it need not: here it is as saved, in
    tensors of its own."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        if number in state["state"]:
            optimizer.state[parameter] = _mended(optimizer.state[parameter], state["state"][number])


def _mended(held: Any, saved: Any) -> Any:
    if isinstance(saved, torch.Tensor) and isinstance(held, torch.Tensor):
        own = held if held.dtype == saved.dtype else saved.to(held.device)
        return own.clone() if own is saved else own
    if isinstance(saved, Mapping) and isinstance(held, Mapping):
        return {key: _mended(held[key], value) for key, value in saved.items()}
    if isinstance(saved, list | tuple) and isinstance(held, list | tuple):
        return type(saved)(_mended(mine, value) for mine, value in zip(held, saved, strict=True))
    return held


def class_name(thing: Any) -> str:
    """The name of the class inside the shells of DDP and torch.compile."""
    return type(plain(thing)).__name__


def check_tensors(name: str, own: Mapping[str, Any], saved: Mapping[str, Any], source: str) -> None:
    """Raises UsageError with a table of missing, unexpected and mis-shaped tensors, if there are any."""
    if rows := mismatches(own, saved):
        raise UsageError(
            f"{source} is a checkpoint of another {name}: {len(rows)} tensor(s) differ",
            mismatch_table(rows),
            "Put the old model back, or take a new run directory.",
        )


def mismatches(own: Mapping[str, Any], saved: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """What keeps one state dict from taking the place of another: (missing | unexpected | mis-shaped, name, own shape, saved shape)."""

    def shape(value: Any) -> str:
        if not isinstance(value, torch.Tensor):
            return type(value).__name__
        odd = "" if value.layout is torch.strided and not value.is_quantized else " quantized" if value.is_quantized else " sparse"
        return ("x".join(map(str, value.shape)) or "scalar") + (" without data" if value.is_meta else odd)

    rows = [("missing", key, shape(own[key]), "-") for key in own if key not in saved]
    rows += [("unexpected", key, "-", shape(saved[key])) for key in saved if key not in own]
    return rows + [
        ("mis-shaped", key, shape(own[key]), shape(saved[key])) for key in own if key in saved and shape(own[key]) != shape(saved[key])
    ]


def mismatch_table(rows: list[tuple[str, str, str, str]]) -> str:
    """The mismatches for people, the first forty."""
    width = max(len(row[1]) for row in rows)
    lines = [f"  {'':<10}  {'tensor':<{width}}  {'this model':>14}  {'checkpoint':>14}"]
    lines += [f"  {kind:<10}  {printable(key):<{width}}  {mine:>14}  {theirs:>14}" for kind, key, mine, theirs in rows[:40]]
    return "\n".join([*lines, f"  … and {len(rows) - 40} more"] if len(rows) > 40 else lines)


def as_built(thing: Any) -> dict[str, Any]:
    """The settings that an optimizer or a scheduler has before anything is restored into it; {} for anything else."""
    inner = plain(thing)
    if isinstance(inner, torch.optim.Optimizer):
        return {"param_groups": [{key: value for key, value in group.items() if key != "params"} for group in inner.param_groups]}
    return copy.deepcopy(inner.state_dict()) if isinstance(inner, torch.optim.lr_scheduler.LRScheduler) else {}


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
        elif isinstance(plain(thing), torch.optim.lr_scheduler.LRScheduler):
            progress = (
                "last_epoch",
                "_step_count",
                "_last_lr",
                "_is_initial",
                "T_cur",
                "_schedulers",
                "best",
                "num_bad_epochs",
                "cooldown_counter",
            )
            values = vars(plain(thing))
            for key, value in built[name].items():
                settings = value if isinstance(value, list) else [value]  # base_lrs, say; not the functions of a LambdaLR
                if key not in progress and all(type(item) in (int, float, str, bool) for item in settings) and values.get(key) != value:
                    said.append(f"{name}.{key}: {values.get(key)} -> {value}")
                    values[key] = value
    return said


def _overridden(group: dict[str, Any], fresh: Mapping[str, Any]) -> dict[str, Any]:
    new = {key: value for key, value in fresh.items() if key != "params"}
    old_initial, new_initial = group.get("initial_lr"), fresh.get("initial_lr")
    if old_initial and new_initial is not None:
        new["lr"] = group["lr"] if new_initial == old_initial else group["lr"] * (new_initial / old_initial)
    return new
