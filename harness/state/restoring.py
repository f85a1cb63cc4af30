"""Give state back: all of it, bit for bit, or none."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

import harness.state.buffers as buffers
import harness.state.kinds as kinds
import harness.state.parameter_names as parameter_names
from harness.distributed.ddp import plain
from harness.errors import UsageError, printable
from harness.state.parameter_names import Names

DTYPE = "dtype"  # what to accept, to go on in another precision
REFUSALS = (ValueError, LookupError, RuntimeError, TypeError, AttributeError, AssertionError)  # of a load_state_dict, whoever wrote it
# What optimizers of torch's keep in the shape of their parameter.
MOMENTS = (
    "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "grad_avg", "acc_delta", "sum", "exp_inf", "prev",
    "step_size", "ax",
)  # fmt: skip
CHANGES = (
    "If the loop itself changes them as it goes (layers, parameter groups), let it do so again before run.track(…): run.epoch and run.step "
    "are known as soon as harness.init has returned. Else put the old ones back, or take a new run directory."
)


def restore(
    tracked: Mapping[str, Any], classes: Mapping[str, str], payload: Mapping[str, Any], source: str, accept: Collection[str] = (),
    *, says_names: bool = True,
) -> list[str]:  # fmt: skip
    """Give every tracked object its state back, bit for bit; returns in words what is another than it was, and accepted.

    `classes` are the class names at the time of saving; a state dict alone does not tell which optimizer it is of. What an optimizer keeps
    goes to the parameter of the same name; `says_names`: without names the file is of the usual order, and not of an older harness. Raises
    UsageError, before anything is changed, on a mismatch.
    """
    said: list[str] = []
    cast: set[int] = set()  # by identity: parameters of another dtype than before
    states = {name: _state_for(name, plain(thing), payload, source) for name, thing in tracked.items()}
    for name, thing in tracked.items():
        if name in classes and classes[name] != class_name(thing):
            raise UsageError(
                f"{name} is not what {source} was saved from", f"found: {class_name(thing)}, expected: {classes[name]}",
                "Put the old one back, or take a new run directory.",
            )  # fmt: skip
        if isinstance(plain(thing), nn.Module) and not any(is_lazy(value) for value in plain(thing).state_dict().values()):
            said += _check_module(name, plain(thing), states[name], source, accept, cast)
    are_all_there = all(key.removesuffix("_state_dict") in tracked for key in payload if key.endswith("_state_dict"))
    if are_all_there:  # else the names of some are not known yet: all are given their state again with the rest
        states |= _by_name(tracked, payload, states, source, says_names=says_names)
    for name, thing in tracked.items():
        restore_one(name, plain(thing), states[name], source, cast=cast)
    return said


def _state_for(name: str, thing: Any, payload: Mapping[str, Any], source: str) -> Any:
    if f"{name}_state_dict" not in payload:
        saved = [key.removesuffix("_state_dict") for key in payload if key.endswith("_state_dict")]
        raise UsageError(
            f"{source} has no {name!r}", f"found: {', '.join(saved)}", "Track the same names as before, or take a new run directory."
        )
    state = kinds.rebuilt(payload, f"{name}_state_dict")
    return parameter_names.to_live(thing, state) if isinstance(thing, nn.Module) else state


def _check_module(
    name: str, module: nn.Module, saved: Mapping[str, Any], source: str, accept: Collection[str], found: set[int]
) -> list[str]:  # fmt: skip
    """Raises UsageError for other parameters, and for other dtypes unless they are accepted; these are returned in words, and the
    identities of such parameters added to those found. Of what gets its size in training the module's own `load_state_dict` decides."""
    own, parameters = module.state_dict(), dict(module.named_parameters(remove_duplicate=False))
    rows = mismatches(own, saved)
    if any(key in parameters or not buffers.decides(module, key) for _, key, *_ in rows):
        raise _of_another(name, rows, source)
    both = {key: (own[key], saved[key]) for key in own if isinstance(own[key], torch.Tensor) and isinstance(saved.get(key), torch.Tensor)}
    cast = [(key, _dtype(theirs), _dtype(mine)) for key, (mine, theirs) in both.items() if mine.dtype != theirs.dtype]
    if cast and DTYPE not in accept:
        shown = [f"  {key}: {was} in the checkpoint, {now} here" for key, was, now in cast[:5]]
        raise UsageError(
            f"{name} is of another dtype than in {source}: {len(cast)} tensor(s) differ",
            "\n".join(shown + ([f"  … and {len(cast) - 5} more"] if len(cast) > 5 else [])),
            "Build it in the old one, or take a new run directory. To go on from rounded values all the same: resume.accept=[dtype].",
        )
    found |= {id(parameters[key]) for key, *_ in cast if key in parameters}
    changes = Counter((was, now) for _, was, now in cast)
    return [f"{name}: {count} tensor(s) are {now} now, and were {was}: no exact resume" for (was, now), count in changes.items()]


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _by_name(
    tracked: Mapping[str, Any], payload: Mapping[str, Any], states: Mapping[str, Any], source: str, *, says_names: bool
) -> dict[str, Any]:  # fmt: skip
    """The state of each optimizer with its parameters in the order of the living one. Raises UsageError for other parameters."""
    live, saved = parameter_names.names(tracked), parameter_names.saved_names(tracked, payload, says_all=says_names)
    ordered = {}
    for name, mine in live.items():
        optimizer, state = plain(tracked[name]), states[name]
        if name not in parameter_names.numbered({f"{name}_state_dict": state}):
            continue  # a state dict of its own
        _check_groups(name, optimizer, state, source)
        theirs = saved.get(name)
        if theirs is not None and parameter_names.are_known(theirs) and parameter_names.are_known(mine):
            state = ordered[name] = _ordered(name, mine, theirs, state, source)
        _check_moments(name, optimizer, state, source)
    return ordered


def _check_groups(name: str, optimizer: torch.optim.Optimizer, state: Mapping[str, Any], source: str) -> None:
    mine, theirs = ([len(group["params"]) for group in groups] for groups in (optimizer.param_groups, state["param_groups"]))
    if sorted(mine) != sorted(theirs):
        raise UsageError(
            f"{name} does not take the state in {source}: its parameter groups are others",
            f"found: {len(mine)} group(s), of {_listed(mine)} parameter(s); expected: {len(theirs)}, of {_listed(theirs)}",
            CHANGES,
        )


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:20])) + (" …" if len(numbers) > 20 else "")


def _ordered(name: str, mine: Names, theirs: Names, state: Mapping[str, Any], source: str) -> Mapping[str, Any]:
    """An optimizer's state with its groups, and the parameters in them, in the order of the living one; each keeps its number."""
    if mine == theirs:
        return state
    groups = {frozenset(group): at for at, group in enumerate(theirs)}
    if any(frozenset(group) not in groups for group in mine):
        now, before = ({called for group in names for called in group} for names in (mine, theirs))
        other = [f"not there any more: {_some(before - now)}"] * bool(before - now) + [f"new: {_some(now - before)}"] * bool(now - before)
        found = "; ".join(other) or "the same, grouped otherwise"
        raise UsageError(f"{name} has other parameters in its groups than in {source}", f"found: {found}", CHANGES)
    made = []
    for group in mine:
        at = groups[frozenset(group)]
        saved = state["param_groups"][at]
        places = {called: place for place, called in enumerate(theirs[at])}
        order = [places[called] for called in group]
        lists = {key: [saved[key][place] for place in order] for key in ("params", "param_names") if key in saved}
        made.append({**saved, **lists})
    return {**state, "param_groups": made}


def _some(names: Collection[str | None]) -> str:
    return ", ".join(sorted(map(str, names))[:5]) + (" …" if len(names) > 5 else "")


def _check_moments(name: str, optimizer: torch.optim.Optimizer, state: Mapping[str, Any], source: str) -> None:
    """Raises UsageError if what is kept of parameters has not their shapes: it would be another one's."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    held = [(number, p, state["state"].get(number)) for number, p in zip(numbers, parameters, strict=True) if not is_lazy(p)]
    kept = [(number, p, entry) for number, p, entry in held if isinstance(entry, Mapping)]
    for key in dict.fromkeys(key for _, _, entry in kept for key, value in entry.items() if isinstance(value, torch.Tensor)):
        pairs = [(number, tuple(p.shape), tuple(entry[key].shape)) for number, p, entry in kept if isinstance(entry.get(key), torch.Tensor)]
        is_moment = key in MOMENTS if type(optimizer).__module__.startswith("torch.optim") else False
        if not is_moment and Counter(mine for _, mine, _ in pairs) != Counter(theirs for *_, theirs in pairs):
            continue  # it has shapes of its own
        if wrong := [(number, mine, theirs) for number, mine, theirs in pairs if mine != theirs and theirs]:
            number, mine, theirs = wrong[0]
            raise UsageError(
                f"{name} has its parameters in another order than in {source}, which does not tell their names",
                f"found: parameter {number} is of shape {mine}; expected: {theirs}, as its {key}",
                "Give them in the same order in each process: sorted(…), no set.",
            )


def restore_one(name: str, thing: Any, state: Any, source: str, *, cast: Collection[int] = ()) -> None:
    """Give one object its state back, bit for bit, and let it keep nothing of `state`, which may be views of a whole checkpoint's memory:
    a module copies, an optimizer of torch's is made to, all else is given a copy. `cast`: by identity, parameters that have
    another dtype than before, and so has what is kept of them. Raises UsageError."""
    is_torchs = isinstance(thing, torch.optim.Optimizer) and type(thing).load_state_dict is torch.optim.Optimizer.load_state_dict
    try:
        if isinstance(thing, nn.Module):
            buffers.load(thing, state)
        else:
            thing.load_state_dict(state if is_torchs else kinds.copied(state))
    except REFUSALS as error:
        raise _refused(name, thing, state, source, error) from error
    if isinstance(thing, torch.optim.Optimizer):
        _mend(thing, state, cast)


def _refused(name: str, thing: Any, state: Any, source: str, error: Exception) -> UsageError:
    if isinstance(thing, nn.Module) and isinstance(state, Mapping) and (rows := mismatches(thing.state_dict(), state)):
        return _of_another(name, rows, source)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    place = traceback.extract_tb(error.__traceback__)[-1]
    told = "\n".join(lines[:20])
    return UsageError(
        f"{name} does not take the state in {source}",
        f"found: {type(error).__name__}: {told} ({place.filename}, line {place.lineno})",
        f"The model or its optimizer has changed. {CHANGES}",
    )


def _mend(optimizer: torch.optim.Optimizer, state: Any, cast: Collection[int]) -> None:
    """`Optimizer.load_state_dict` casts state to its parameter's dtype, and keeps as it is given what it need not: here it is as saved, in
    tensors of its own. So is the state of an optimizer inside, if it is there in the form of torch's."""
    inside = [part for part in vars(optimizer).values() if isinstance(part, torch.optim.Optimizer)]
    if inside and isinstance(state, Mapping):
        states = [part for part in state.values() if parameter_names.numbered({"_state_dict": part})]
        for part, saved in zip(inside, states, strict=False) if len(inside) == len(states) else ():
            _mend(part, saved, cast)
    if not parameter_names.numbered({"_state_dict": state}) or not isinstance(state.get("state"), Mapping):
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=False):
        if number in state["state"] and parameter in optimizer.state:
            optimizer.state[parameter] = _mended(optimizer.state[parameter], state["state"][number], is_cast=id(parameter) in cast)


def _mended(held: Any, saved: Any, *, is_cast: bool) -> Any:
    if isinstance(saved, torch.Tensor) and isinstance(held, torch.Tensor):
        own = held if held.dtype == saved.dtype or is_cast else saved.to(held.device)
        return own.clone() if own is saved and type(own) is torch.Tensor else own  # one of a class of its own was made for this
    if isinstance(saved, Mapping) and isinstance(held, Mapping):
        return {key: _mended(held[key], value, is_cast=is_cast) if key in held else value for key, value in saved.items()}
    if isinstance(saved, list | tuple) and isinstance(held, list | tuple) and len(held) == len(saved):
        return type(saved)(_mended(mine, value, is_cast=is_cast) for mine, value in zip(held, saved, strict=True))
    return held


def class_name(thing: Any) -> str:
    """The name of the class inside the shells of DDP and torch.compile."""
    return type(plain(thing)).__name__


def check_tensors(name: str, own: Mapping[str, Any], saved: Mapping[str, Any], source: str) -> None:
    """Raises UsageError with a table of missing, unexpected and mis-shaped tensors, if there are any."""
    if rows := mismatches(own, saved):
        raise _of_another(name, rows, source)


def _of_another(name: str, rows: list[tuple[str, str, str, str]], source: str) -> UsageError:
    return UsageError(f"{source} is a checkpoint of another {name}: {len(rows)} tensor(s) differ", mismatch_table(rows), CHANGES)


def mismatches(own: Mapping[str, Any], saved: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """What keeps one state dict from taking the place of another: (missing | unexpected | mis-shaped, name, own shape, saved shape)."""

    def shape(value: Any) -> str:
        if not isinstance(value, torch.Tensor):
            return type(value).__name__
        if value.is_nested:
            return f"nested, of {value.size(0)}"
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
