"""Check whether an optimizer can go on from the state that somebody else's program saved.

Such a file names neither the class of its optimizer nor, in most cases, the parameters. Optimizers
of different classes can have settings of the same names, and parameters in another order can have
the same shapes: torch would load either without an error.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

from harness.errors import UsageError
from harness.state.checks import MOMENTS, in_live_order
from harness.state.parameter_names import Names, are_known

# Settings that tell optimizers with `betas` apart.
TELLING = ("amsgrad", "momentum_decay")
# All optimizers of torch have it since PyTorch 1.12. Older files may lack settings.
NEWER = "foreach"
# How a step is computed; what an optimizer keeps does not depend on it.
WAYS = {"foreach": False, "fused": False, "capturable": False, "differentiable": False}
# The errors by which a step of an optimizer may fail.
FAILURES = (RuntimeError, ValueError, TypeError, AssertionError, LookupError, AttributeError)


def other_kind(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> str:
    """Return in what a saved state is of another kind of optimizer, or "".

    Args:
        optimizer: An optimizer without state.
        saved: The state dict of an optimizer, with as many groups and parameters.
    """
    own, theirs = (
        {key for group in groups for key in group}
        for groups in (optimizer.param_groups, saved["param_groups"])
    )
    only_theirs = [key for key in TELLING if key in theirs - own]
    only_own = [key for key in TELLING if key in own - theirs and NEWER in theirs]
    if only_theirs or only_own:
        return f"settings with {', '.join(only_theirs) or 'no ' + ', '.join(only_own)}"
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    for number, wanted in zip(numbers, _kept(optimizer, saved["param_groups"]), strict=False):
        entry = saved["state"].get(number)
        if entry and isinstance(entry, Mapping) and (missing := wanted - entry.keys()):
            return f"{', '.join(map(str, entry))} for a parameter, and no {', '.join(missing)}"
    return ""


def _kept(optimizer: torch.optim.Optimizer, groups: list[Mapping[str, Any]]) -> list[set[str]]:
    """Return what the optimizer keeps for each parameter with these settings, by a step of a copy.

    The copy has parameters of one element. The result is empty if its step fails, and for classes
    that are not torch's own, whose step may do anything.
    """
    if type(optimizer).__module__.partition(".")[0] != "torch":
        return []
    try:
        twins = {
            id(parameter): torch.nn.Parameter(torch.zeros([1] * parameter.dim(), device="cpu"))
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        twin = copy.deepcopy(optimizer, dict(twins))
        for mine, theirs in zip(twin.param_groups, groups, strict=True):
            mine.update({key: theirs[key] for key in mine if key in theirs and key != "params"})
            mine.update({key: way for key, way in WAYS.items() if key in mine})
        for parameter in twins.values():
            parameter.grad = torch.zeros_like(parameter)
        twin.step()
        return [set(twin.state.get(each, {})) for each in twins.values()]
    except FAILURES:
        return []


def matched(
    name: str,
    optimizer: torch.optim.Optimizer,
    saved: Mapping[str, Any],
    names: tuple[Names, Names | None],
    orders: tuple[list[str], list[str]],
    where: str,
) -> tuple[Mapping[str, Any], str]:
    """Return a saved state with its parameters in the order of the live optimizer, and a note.

    If the file names them, they are matched by name, else by the order of the file's module.

    Args:
        name: Name of the optimizer.
        optimizer: The live optimizer.
        saved: The saved state, with as many parameters.
        names: The names of the live optimizer's parameters, and those in the file, if it names
            them: then the same names, in whatever order.
        orders: The names of all parameters in the order of the task's modules, and in that of the
            modules in the file.
        where: Name of the file in error messages.

    Raises:
        UsageError: The order in the file cannot be told, or its groups are others.
    """
    mine, said = names
    if not are_known(mine):
        return saved, ""
    if said is None:
        return _by_order(name, optimizer, saved, mine, orders, where)
    if [set(group) for group in mine] != [set(group) for group in said]:
        raise UsageError(
            f"{name} has its parameters in other groups than in {where}",
            f"found: {_groups(mine)}; expected: {_groups(said)}",
            f"Group them as in the file, or begin anew: --without {name}.",
        )
    note = "" if mine == said else f"{name}: its parameters are matched by their names"
    return in_live_order(name, mine, said, saved, where), note


def _by_order(
    name: str,
    optimizer: torch.optim.Optimizer,
    saved: Mapping[str, Any],
    mine: Names,
    orders: tuple[list[str], list[str]],
    where: str,
) -> tuple[Mapping[str, Any], str]:
    """Match parameters that the file does not name, as `matched` does.

    An optimizer has, in each group, the order of a module: in the file that of the file's module,
    which may define its parts in another order. A task's optimizer may deviate from its module,
    and the script may have done the same; then the shapes decide.
    """
    sizes = [len(group["params"]) for group in saved["param_groups"]]
    of_module, of_file = (_in_order(mine, order) for order in orders)
    if sizes != [len(group) for group in mine] or of_file is None or of_file == mine:
        return saved, ""
    other = in_live_order(name, mine, of_file, saved, where)
    fits, other_fits = not misshaped(optimizer, saved), not misshaped(optimizer, other)
    if fits and other_fits and mine != of_module:
        raise UsageError(
            f"which parameter of {name} each state in {where} is of cannot be told",
            f"found: parameters of equal shapes, and {name} has them in another order than the "
            "task's module and the file's module",
            f"Give {name} the parameters in the module's order, as model.parameters() does, "
            f"save with named parameters, or begin anew: --without {name}.",
        )
    if other_fits:
        return other, f"{name}: its parameters are matched in the order of the file's module"
    return saved, ""


def _groups(names: Names) -> str:
    """Name the first parameter of each group, and how many there are."""
    return ", ".join(f"{group[0]} and {len(group) - 1} more" for group in names[:5] if group)


def _in_order(names: Names, order: list[str]) -> Names | None:
    """Return the names in this order, group by group, or None if one is not in it."""
    places: dict[str | None, int] = {called: at for at, called in enumerate(order)}
    if not all(called in places for group in names for called in group):
        return None
    return [sorted(group, key=places.__getitem__) for group in names]


def misshaped(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> list[int]:
    """Return the places of the parameters whose state in the file has another shape."""
    is_torchs = type(optimizer).__module__.partition(".")[0] == "torch"
    own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    return [
        at
        for at, (number, parameter) in enumerate(zip(numbers, own, strict=False))
        if _is_misshaped(saved["state"].get(number), parameter, is_torchs=is_torchs)
    ]


def _is_misshaped(held: Any, parameter: torch.Tensor, *, is_torchs: bool) -> bool:
    """Return whether something that an optimizer keeps has another shape than its parameter.

    Of torch's optimizers the moments are compared. Any other optimizer may keep anything: of it,
    only tensors with as many dimensions as the parameter are compared.
    """
    kept = held.items() if isinstance(held, Mapping) else ()
    return any(
        isinstance(item, torch.Tensor)
        and item.shape != parameter.shape
        and (key in MOMENTS if is_torchs else item.dim() == parameter.dim() > 0)
        for key, item in kept
    )
