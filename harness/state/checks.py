"""Checks that a saved state fits: names, shapes, dtypes, and the groups of optimizers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

import harness.state.buffers as buffers
from harness.errors import UsageError, printable
from harness.state.parameter_names import Names

DTYPE = "dtype"  # the word in `resume.accept` that permits a resume in another precision


# The entries of the state of torch's optimizers that have the shape of their parameter.
MOMENTS = (
    "exp_avg",
    "exp_avg_sq",
    "max_exp_avg_sq",
    "momentum_buffer",
    "square_avg",
    "grad_avg",
    "acc_delta",
    "sum",
    "exp_inf",
    "prev",
    "step_size",
    "ax",
)


# Between two epochs `run.epoch` is the next one: what its head changes is still to come.
BEFORE_TRACK = (
    "before run.track(…): `if run.step > N` what it does before step N + 1, as at the head of an "
    "epoch, and `if run.step >= N` what it does in step N or after it. run.epoch and run.step are "
    "known as soon as harness.init has returned, but the head of the epoch run.epoch may not have "
    "run; where it has, it runs again, and has to leave out what is done already"
)
CHANGES = (
    "If the loop itself changes them as it goes (layers, parameter groups), let it do so again "
    f"{BEFORE_TRACK}. Else put the old ones back, or take a new run directory."
)


def check_module(
    name: str,
    module: nn.Module,
    saved: Mapping[str, Any],
    source: str,
    accept: Collection[str],
    cast_ids: set[int],
) -> list[str]:
    """Check that a saved state fits a module: names, shapes and dtypes.

    For entries that get their size in training, the module's own `load_state_dict` decides.

    Args:
        name: the name of the module, for messages.
        module: the module itself, without wrappers.
        saved: the saved state dict.
        source: the name of the checkpoint, for messages.
        accept: the differences that the user accepts.
        cast_ids: a set to which the ids of parameters with another dtype are added.

    Returns:
        A text for each change of dtype, if such changes are accepted.

    Raises:
        UsageError: for other parameters, and for other dtypes unless they are accepted.
    """
    own, parameters = module.state_dict(), dict(module.named_parameters(remove_duplicate=False))
    rows = mismatches(own, saved, has_shards=True)
    if any(key in parameters or not buffers.decides(module, key) for _, key, *_ in rows):
        raise of_another(name, rows, source)
    both = {
        key: (own[key], saved[key])
        for key in own
        if isinstance(own[key], torch.Tensor) and isinstance(saved.get(key), torch.Tensor)
    }
    cast = [
        (key, _dtype(theirs), _dtype(mine))
        for key, (mine, theirs) in both.items()
        if mine.dtype != theirs.dtype
    ]
    if cast and DTYPE not in accept:
        raise _of_another_dtype(name, cast, source)
    cast_ids |= {id(parameters[key]) for key, *_ in cast if key in parameters}
    changes = Counter((was, now) for _, was, now in cast)
    return [
        f"{name}: {count} tensor(s) are {now} now, and were {was}: no exact resume"
        for (was, now), count in changes.items()
    ]


def _of_another_dtype(name: str, cast: list[tuple[str, str, str]], source: str) -> UsageError:
    """Return the error for tensors of another dtype, given as rows of name, saved and own dtype."""
    shown = [f"  {key}: {was} in the checkpoint, {now} here" for key, was, now in cast[:5]]
    return UsageError(
        f"{name} is of another dtype than in {source}: {len(cast)} tensor(s) differ",
        "\n".join(shown + ([f"  … and {len(cast) - 5} more"] if len(cast) > 5 else [])),
        "Build it in the old one, or take a new run directory. "
        "To resume from rounded values all the same: resume.accept=[dtype].",
    )


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def check_groups(
    name: str, optimizer: torch.optim.Optimizer, state: Mapping[str, Any], source: str
) -> None:
    """Check that the parameter groups are as many, and as large, as those that were saved.

    Args:
        name: the name of the optimizer, for messages.
        optimizer: the live optimizer.
        state: its saved state dict.
        source: the name of the checkpoint, for messages.

    Raises:
        UsageError: for other groups.
    """
    mine, theirs = (
        [len(group["params"]) for group in groups]
        for groups in (optimizer.param_groups, state["param_groups"])
    )
    if sorted(mine) != sorted(theirs):
        raise UsageError(
            f"{name} does not take the state in {source}: its parameter groups are others",
            f"found: {len(mine)} group(s), of {_listed(mine)} parameter(s); "
            f"expected: {len(theirs)}, of {_listed(theirs)}",
            CHANGES,
        )


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:20])) + (" …" if len(numbers) > 20 else "")


def in_live_order(
    name: str, mine: Names, theirs: Names, state: Mapping[str, Any], source: str
) -> Mapping[str, Any]:
    """Return an optimizer's state with groups and parameters in the order of the live optimizer.

    Each parameter keeps its number.

    Args:
        name: the name of the optimizer.
        mine: the parameter names of the live optimizer.
        theirs: the parameter names of the saved one.
        state: the saved state.
        source: the name of the checkpoint, for messages.

    Raises:
        UsageError: if the groups have other parameters.
    """
    if mine == theirs:
        return state
    if {frozenset(group) for group in mine} - {frozenset(group) for group in theirs}:
        now, before = ({called for group in names for called in group} for names in (mine, theirs))
        other = [f"not there any more: {_some(before - now)}"] * bool(before - now) + [
            f"new: {_some(now - before)}"
        ] * bool(now - before)
        differences = "; ".join(other) or "the same, grouped otherwise"
        raise UsageError(
            f"{name} has other parameters in its groups than in {source}",
            f"found: {differences}",
            CHANGES,
        )
    made = []
    for group, at in zip(mine, group_order(mine, theirs), strict=True):
        saved = state["param_groups"][at]
        places = {called: place for place, called in enumerate(theirs[at])}
        order = [places[called] for called in group]
        lists = {
            key: [saved[key][place] for place in order]
            for key in ("params", "param_names")
            if key in saved
        }
        made.append({**saved, **lists})
    return {**state, "param_groups": made}


def group_order(mine: Names, theirs: Names) -> list[int]:
    """Return for each live parameter group the place of the saved group with its parameters."""
    places = {frozenset(group): at for at, group in enumerate(theirs)}
    return [places[frozenset(group)] for group in mine]


def _some(names: Collection[str | None]) -> str:
    return ", ".join(sorted(map(str, names))[:5]) + (" …" if len(names) > 5 else "")


def check_moments(
    name: str, optimizer: torch.optim.Optimizer, state: Mapping[str, Any], source: str
) -> None:
    """Check that the state of each parameter has the parameter's shape.

    Otherwise the state belongs to another parameter. Entries that have shapes of their own are
    skipped, and so is a state dict that keeps the state of parameters under keys of its own.

    Raises:
        UsageError: if a shape differs.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    entries = state.get("state")
    held = [
        (number, p, entries.get(number) if isinstance(entries, Mapping) else None)
        for number, p in zip(numbers, parameters, strict=True)
        if not is_lazy(p)
    ]
    kept = [(number, p, entry) for number, p, entry in held if isinstance(entry, Mapping)]
    for key in dict.fromkeys(
        key
        for _, _, entry in kept
        for key, value in entry.items()
        if isinstance(value, torch.Tensor)
    ):
        pairs = [
            (number, tuple(p.shape), tuple(entry[key].shape))
            for number, p, entry in kept
            if isinstance(entry.get(key), torch.Tensor)
        ]
        is_moment = (
            key in MOMENTS if type(optimizer).__module__.startswith("torch.optim") else False
        )
        if not is_moment and Counter(mine for _, mine, _ in pairs) != Counter(
            theirs for *_, theirs in pairs
        ):
            continue  # an entry with shapes of its own
        if wrong := [
            (number, mine, theirs) for number, mine, theirs in pairs if mine != theirs and theirs
        ]:
            number, mine, theirs = wrong[0]
            raise UsageError(
                f"{name} has its parameters in another order than in {source}, "
                "which does not tell their names",
                f"found: parameter {number} is of shape {mine}; expected: {theirs}, as its {key}",
                "Give them in the same order in each process: sorted(…), no set.",
            )


def check_tensors(name: str, own: Mapping[str, Any], saved: Mapping[str, Any], source: str) -> None:
    """Check that a saved state dict has the names and shapes of an object's own.

    Args:
        name: the name of the object, for messages.
        own: its own state dict.
        saved: the saved state dict.
        source: the name of the checkpoint, for messages.

    Raises:
        UsageError: with a table of the missing, unexpected and mis-shaped tensors, if any exist.
    """
    if rows := mismatches(own, saved):
        raise of_another(name, rows, source)


def of_another(name: str, rows: list[tuple[str, str, str, str]], source: str) -> UsageError:
    """Return the error for a checkpoint of another model, with a table of the mismatches."""
    return UsageError(
        f"{source} is a checkpoint of another {name}: {len(rows)} tensor(s) differ",
        mismatch_table(rows),
        CHANGES,
    )


def mismatches(
    own: Mapping[str, Any], saved: Mapping[str, Any], *, has_shards: bool = False
) -> list[tuple[str, str, str, str]]:
    """Return the differences because of which one state dict cannot replace another.

    With `has_shards`, the data of a saved tensor without data is in the shards of the checkpoint.

    Returns:
        Rows of ("missing" | "unexpected" | "mis-shaped", name, own shape, saved shape).
    """

    def shape(value: Any, has_data: bool = False) -> str:
        if not isinstance(value, torch.Tensor):
            return type(value).__name__
        if value.is_nested:
            return f"nested, of {value.size(0)}"
        odd = (
            ""
            if value.layout is torch.strided and not value.is_quantized
            else " quantized"
            if value.is_quantized
            else " sparse"
        )
        return ("x".join(map(str, value.shape)) or "scalar") + (
            " without data" if value.is_meta and not has_data else odd
        )

    rows = [("missing", key, shape(own[key]), "-") for key in own if key not in saved]
    rows += [("unexpected", key, "-", shape(saved[key])) for key in saved if key not in own]
    return rows + [
        ("mis-shaped", key, shape(own[key]), shape(saved[key]))
        for key in own
        if key in saved and shape(own[key]) != shape(saved[key], has_shards)
    ]


def mismatch_table(rows: list[tuple[str, str, str, str]]) -> str:
    """Return the first forty mismatches as a table for messages."""
    width = max(len(row[1]) for row in rows)
    lines = [f"  {'':<10}  {'tensor':<{width}}  {'this model':>14}  {'checkpoint':>14}"]
    lines += [
        f"  {kind:<10}  {printable(key):<{width}}  {mine:>14}  {theirs:>14}"
        for kind, key, mine, theirs in rows[:40]
    ]
    return "\n".join([*lines, f"  … and {len(rows) - 40} more"] if len(rows) > 40 else lines)
