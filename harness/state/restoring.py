"""Restore the state of tracked objects bit for bit; check for mismatches before any change."""

from __future__ import annotations

import traceback
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

import harness.state.buffers as buffers
import harness.state.kinds as kinds
import harness.state.lr_schedules as lr_schedules
import harness.state.parameter_names as parameter_names
from harness.distributed import reshard
from harness.distributed.dtensors import class_behind
from harness.distributed.parts import PARTS
from harness.distributed.wrappers import unwrap
from harness.errors import UsageError
from harness.state.checks import (
    CHANGES,
    check_groups,
    check_module,
    check_moments,
    group_order,
    in_live_order,
    mismatches,
    of_another,
)
from harness.state.plain_values import in_place, placed

# The errors by which any `load_state_dict` may refuse a state.
REFUSALS = (
    ValueError,
    LookupError,
    RuntimeError,
    TypeError,
    AttributeError,
    AssertionError,
)


def restore(
    tracked: Mapping[str, Any],
    classes: Mapping[str, str],
    payload: Mapping[str, Any],
    source: str,
    accept: Collection[str] = (),
    *,
    says_names: bool = True,
    only: Collection[str] | None = None,
) -> list[str]:
    """Restore all tracked objects, bit for bit; return a text for each accepted difference.

    The state of an optimizer's parameter goes to that of the same name. Its groups and its state
    stay the same objects, because the program may hold them.

    Args:
        tracked: the tracked objects by name.
        classes: the saved class names; a state dict does not identify an optimizer's class.
        payload: the content of the checkpoint.
        source: the name of the checkpoint, for messages.
        accept: the differences that are accepted (`DTYPE`).
        says_names: whether it records each parameter name that the order does not give (newer do).
        only: the names of the objects to restore once more. None: restore all.

    Raises:
        UsageError: on a mismatch, before anything is changed; also if an object itself refuses its
            state: the objects before it are restored then.
    """
    cast, texts = set[int](), list[str]()  # `cast`: ids of parameters of another dtype than before
    states = {name: _state_for(name, unwrap(obj), payload, source) for name, obj in tracked.items()}
    for name, obj in tracked.items():
        _check_class(name, obj, classes, source)
        if isinstance(inner := unwrap(obj), nn.Module) and not _is_lazy(inner):
            texts += check_module(name, inner, states[name], source, accept, cast)
    are_all_there = all(
        key.removesuffix("_state_dict") in tracked for key in payload if key.endswith("_state_dict")
    )
    due = {name: unwrap(obj) for name, obj in tracked.items() if only is None or name in only}
    # Otherwise some names are not known yet: all objects are restored again with the rest. Until
    # then an optimizer with groups of other sizes, in their order, does not take its state.
    if are_all_there:
        states |= _by_name(tracked, payload, states, source, says_names=says_names)
    elif only is None:
        due = {n: obj for n, obj in due.items() if not _has_other_groups(obj, states[n])}
    if reshard.is_concerned(due, parts := payload.get(PARTS)):
        states |= reshard.as_live(due, states, parts)
    for name, obj in due.items():
        with in_place(obj):
            restore_object(name, obj, states[name], source, cast=cast)
    return texts


def _is_lazy(module: nn.Module) -> bool:
    """Return whether a module has parameters whose shape its first forward pass decides."""
    return any(is_lazy(value) for value in module.state_dict().values())


def _has_other_groups(obj: Any, state: Any) -> bool:
    """Return whether an optimizer's groups are of other sizes than the saved ones, in order."""
    sizes = parameter_names.numbered({"_state_dict": state}).get("")
    return (
        sizes is not None
        and parameter_names.is_optimizer(obj)
        and sizes != [len(group["params"]) for group in obj.param_groups]
    )


def _check_class(name: str, obj: Any, classes: Mapping[str, str], source: str) -> None:
    """Raise UsageError if an object is of another class than the one that was saved."""
    if name in classes and classes[name] != class_name(obj):
        raise UsageError(
            f"{name} is not what {source} was saved from",
            f"found: {class_name(obj)}, expected: {classes[name]}",
            "Put the old one back, or take a new run directory.",
        )


def _state_for(name: str, obj: Any, payload: Mapping[str, Any], source: str) -> Any:
    if f"{name}_state_dict" not in payload:
        saved = [key.removesuffix("_state_dict") for key in payload if key.endswith("_state_dict")]
        raise UsageError(
            f"{source} has no {name!r}",
            f"found: {', '.join(saved)}",
            "Track the same names as before, or take a new run directory.",
        )
    state = kinds.rebuilt(payload, f"{name}_state_dict")
    return parameter_names.to_live(obj, state) if isinstance(obj, nn.Module) else state


def _by_name(
    tracked: Mapping[str, Any],
    payload: Mapping[str, Any],
    states: Mapping[str, Any],
    source: str,
    *,
    says_names: bool,
) -> dict[str, Any]:
    """Return the state of each optimizer, with its parameters in the order of the live optimizer.

    Optimizers whose parameters are not all named are left out of the result. The schedulers of an
    optimizer whose groups have changed their places are in it, with their values in that order.

    Args:
        tracked: the tracked objects by name.
        payload: the content of the checkpoint.
        states: the saved state of each tracked object.
        source: the name of the checkpoint, for messages.
        says_names: whether the checkpoint records each name that the order of its parameters does
            not give.

    Raises:
        UsageError: for other parameters.
    """
    live = parameter_names.names(tracked)
    saved = parameter_names.saved_names(tracked, payload, says_all=says_names)
    ordered = {}
    for name, mine in live.items():
        optimizer, state = unwrap(tracked[name]), states[name]
        if name not in parameter_names.numbered({f"{name}_state_dict": state}):
            continue  # a state dict without parameter groups in torch's form
        check_groups(name, optimizer, state, source)
        theirs = saved.get(name)
        if (
            theirs is not None
            and parameter_names.are_known(theirs)
            and parameter_names.are_known(mine)
        ):
            state = ordered[name] = in_live_order(name, mine, theirs, state, source)
            order = group_order(mine, theirs)
            for other, scheduler in _schedulers_of(optimizer, tracked):
                if order != sorted(order) and isinstance(states[other], Mapping):
                    lr_schedules.check_regroupable(other, scheduler, states[other], len(order))
                    ordered[other] = lr_schedules.regrouped(states[other], order)
        check_moments(name, optimizer, state, source)
    return ordered


def _schedulers_of(
    optimizer: torch.optim.Optimizer, tracked: Mapping[str, Any]
) -> list[tuple[str, Any]]:
    inner = {name: unwrap(obj) for name, obj in tracked.items()}
    return [
        (name, obj)
        for name, obj in inner.items()
        if lr_schedules.is_schedule(obj) and getattr(obj, "optimizer", None) is optimizer
    ]


def restore_object(
    name: str, obj: Any, state: Any, source: str, *, cast: Collection[int] = ()
) -> None:
    """Restore the state of one object, bit for bit, without sharing memory with `state`.

    The tensors in `state` may be views of the memory of a whole checkpoint. A module copies them,
    an optimizer of torch's is made to copy them (`_mend`), and any other object gets a copy, with
    each tensor on the device where the object has one in its place.

    Args:
        name: the name of the object, for messages.
        obj: the object itself, without wrappers.
        state: its state dict.
        source: the name of the checkpoint, for messages.
        cast: ids of parameters with another dtype than before; their optimizer state has it too.

    Raises:
        UsageError: if the object refuses the state.
    """
    is_torchs = (
        isinstance(obj, torch.optim.Optimizer)
        and type(obj).load_state_dict is torch.optim.Optimizer.load_state_dict
        and not (
            obj._optimizer_load_state_dict_pre_hooks or obj._optimizer_load_state_dict_post_hooks
        )
    )
    try:
        if isinstance(obj, nn.Module):
            buffers.load(obj, state)
        else:
            obj.load_state_dict(
                state if is_torchs else placed(kinds.copied(state), obj.state_dict(), {})
            )
    except REFUSALS as error:
        raise _refused(name, obj, state, source, error) from error
    if isinstance(obj, torch.optim.Optimizer):
        _mend(obj, state, cast)


def _refused(name: str, obj: Any, state: Any, source: str, error: Exception) -> UsageError:
    if (
        isinstance(obj, nn.Module)
        and isinstance(state, Mapping)
        and (rows := mismatches(obj.state_dict(), state))
    ):
        return of_another(name, rows, source)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    place = traceback.extract_tb(error.__traceback__)[-1]
    message = "\n".join(lines[:20])
    return UsageError(
        f"{name} does not take the state in {source}",
        f"found: {type(error).__name__}: {message} ({place.filename}, line {place.lineno})",
        f"The model or its optimizer has changed. {CHANGES}",
    )


def _mend(optimizer: torch.optim.Optimizer, state: Any, cast: Collection[int]) -> None:
    """Undo what `Optimizer.load_state_dict` does to the state: casts and shared memory.

    It casts state to the dtype of its parameter, and keeps the given tensors if no cast is needed.
    After this call the state has the saved dtypes (but for parameters in `cast`), in tensors of its
    own. The same is done for optimizers inside the optimizer, if their state has torch's form or is
    the optimizer's own.
    """
    inside = [part for part in vars(optimizer).values() if isinstance(part, torch.optim.Optimizer)]
    if inside and isinstance(state, Mapping):
        states = [
            part for part in state.values() if parameter_names.numbered({"_state_dict": part})
        ]
        for part, saved in zip(inside, states, strict=False) if len(inside) == len(states) else ():
            _mend(part, saved, cast)
    if not parameter_names.numbered({"_state_dict": state}) or not isinstance(
        state.get("state"), Mapping
    ):
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=False):
        for part in (optimizer, *inside):
            held, saved = getattr(part, "state", {}), state["state"].get(number)
            if (
                parameter in held
                and number in state["state"]
                and (part is optimizer or _has_keys(held[parameter], saved))
            ):
                mended = _mended(held[parameter], saved, is_cast=id(parameter) in cast)
                if isinstance(held[parameter], dict):
                    held[parameter].update(mended)  # the program may hold it
                else:
                    held[parameter] = mended


def _has_keys(held: Any, saved: Any) -> bool:
    """Return whether two states of a parameter have the same keys.

    An optimizer inside another may keep something else for the parameter.
    """
    return isinstance(held, Mapping) and isinstance(saved, Mapping) and held.keys() == saved.keys()


def _mended(held: Any, saved: Any, *, is_cast: bool) -> Any:
    if isinstance(saved, torch.Tensor) and isinstance(held, torch.Tensor):
        own = held if held.dtype == saved.dtype or is_cast else saved.to(held.device)
        # A tensor of its own class was rebuilt for this restore and need not be copied.
        return own.clone() if own is saved and type(own) is torch.Tensor else own
    if isinstance(saved, Mapping) and isinstance(held, Mapping):
        # An optimizer's own load may rename, add and drop keys.
        return {
            key: _mended(value, saved[key], is_cast=is_cast) if key in saved else value
            for key, value in held.items()
        }
    if (
        isinstance(saved, list | tuple)
        and isinstance(held, list | tuple)
        and len(held) == len(saved)
    ):
        return type(saved)(
            _mended(mine, value, is_cast=is_cast) for mine, value in zip(held, saved, strict=True)
        )
    return held


def class_name(obj: Any) -> str:
    """Return the name of the object's class without those of DDP, FSDP2 and torch.compile."""
    return class_behind(type(unwrap(obj))).__name__
