"""Match optimizer state to parameters by name, whatever order the optimizer received them in.

An optimizer identifies its parameters by numbers alone, and the numbers depend on the process that
assigned them: parameter groups made from a set have another order each time. A checkpoint therefore
records what the numbers mean: for each optimizer, group by group, the name of each parameter. The
name is that of the tracked object, a dot, and the parameter's name in that object. If the names
follow from the file itself (all parameters of one tracked module, or of several, in their order),
they are omitted: most files need none.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from harness.distributed.wrappers import submodules, unwrap

Names = list[list[str | None]]  # the name of each parameter, group by group
# The attribute names of the wrapped module in torch.compile and in activation checkpointing.
SHELLS = (
    "_orig_mod",
    "_checkpoint_wrapped_module",
)

_last: list[Any] = []  # the last call of `needed`: its input, its parameters, and its result


def clean_keys(module: nn.Module, keys: Sequence[str]) -> dict[str, str]:
    """Return the names of parameters and buffers without the names of wrappers inside the module.

    If two names would become the same, all names stay as they are.

    Returns:
        The name without wrappers by the full name.
    """
    if not any(shell in key for key in keys for shell in (*SHELLS, "module.")):
        return {key: key for key in keys}
    return _unless_twice(
        {key: _clean(key, dropped) for dropped in [_parallel(module)] for key in keys}
    )


def _parallel(module: nn.Module) -> set[str]:
    """Return the paths of the modules that DDP or DataParallel wrap inside a module."""
    wraps = (nn.DataParallel, DistributedDataParallel)
    return {
        f"{path}.module".lstrip(".")
        for path, part in module.named_modules(remove_duplicate=False)
        if isinstance(part, wraps)
    }


def _clean(key: str, dropped: set[str]) -> str:
    if not dropped and not any(shell in key for shell in SHELLS):
        return key
    parts = key.split(".")
    return ".".join(
        part
        for at, part in enumerate(parts)
        if part not in SHELLS and ".".join(parts[: at + 1]) not in dropped
    )


def _unless_twice(names: dict[str, str]) -> dict[str, str]:
    return names if len(set(names.values())) == len(names) else {key: key for key in names}


def without_shells(module: nn.Module | None, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a module's state dict with the names that it has without wrappers.

    For the state dict of a file, whose module is not known (None), only the names of torch.compile
    and of checkpoint wrappers are removed, not those of DDP and DataParallel.
    """
    names = (
        clean_keys(module, list(state))
        if module
        else _unless_twice({key: _clean(key, set()) for key in state})
    )
    if all(new == key for key, new in names.items()):
        return state
    made = OrderedDict((names[key], value) for key, value in state.items())
    dropped = _parallel(module) if module else set()
    # The versions of the submodules: that of a wrapped module replaces that of its wrapper.
    if hasattr(state, "_metadata"):
        made._metadata = {  # type: ignore[attr-defined]
            _clean(path, dropped): version for path, version in state._metadata.items()
        }
    return made


def to_live(module: nn.Module, saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a saved state dict with the names that the live module has for the same entries."""
    own = module.state_dict()
    if all(key in saved for key in own):
        return saved
    live = {clean: key for key, clean in clean_keys(module, list(own)).items()}
    names = _unless_twice(
        {key: key if key in own else live.get(_clean(key, set()), key) for key in saved}
    )
    made = OrderedDict((names[key], value) for key, value in saved.items())
    dropped = _parallel(module)
    if hasattr(saved, "_metadata"):
        versions = {_clean(path, set()): version for path, version in saved._metadata.items()}
        mine = own._metadata  # type: ignore[attr-defined]
        made._metadata = {  # type: ignore[attr-defined]
            path: versions.get(_clean(path, dropped), version) for path, version in mine.items()
        }
    return made


def parameters_of(tracked: Mapping[str, Any]) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield every parameter of the tracked modules with its name, once per module."""
    for name, obj in tracked.items():
        inner = unwrap(obj)
        if isinstance(inner, nn.Module):
            parameters = dict(inner.named_parameters())
            clean = clean_keys(inner, list(parameters))
            yield from (
                (f"{name}.{clean[key]}", parameter) for key, parameter in parameters.items()
            )


def names(tracked: Mapping[str, Any]) -> dict[str, Names]:
    """Return the parameter names of each tracked optimizer.

    The name is None if no tracked module holds the parameter and the optimizer has no name for it.
    """
    by_identity: dict[int, str] = {}
    for called, parameter in parameters_of(tracked):
        by_identity.setdefault(id(parameter), called)
    return {
        name: [_of_group(group, by_identity) for group in optimizer.param_groups]
        for name, optimizer in _optimizers(tracked).items()
    }


def _optimizers(tracked: Mapping[str, Any]) -> dict[str, torch.optim.Optimizer]:
    return {name: unwrap(obj) for name, obj in tracked.items() if is_optimizer(unwrap(obj))}


def _of_group(group: Mapping[str, Any], by_identity: Mapping[int, str]) -> list[str | None]:
    # torch keeps `param_names` if the optimizer was built from named parameters.
    recorded = group.get("param_names") or [None] * len(group["params"])
    pairs = zip(group["params"], recorded, strict=True)
    return [
        by_identity.get(id(parameter), called and _clean(called, set()))
        for parameter, called in pairs
    ]


def is_optimizer(obj: Any) -> bool:
    """Return whether an object is an optimizer with a list of parameter groups, as in torch."""
    return isinstance(obj, torch.optim.Optimizer) and isinstance(
        getattr(obj, "param_groups", None), list
    )


def needed(tracked: Mapping[str, Any], payload: Mapping[str, Any]) -> dict[str, Names]:
    """Return the names that a checkpoint must record, because `derived` would not return them.

    The last result is cached: at the next save it is the same, as long as the optimizers have the
    same parameters.
    """
    parameters = [
        p
        for optimizer in _optimizers(tracked).values()
        for group in optimizer.param_groups
        for p in group["params"]
    ]
    sizes = numbered(payload)
    asked = [
        tuple(tracked),
        sizes,
        [len(state) for key, state in payload.items() if key.endswith("_state_dict")],
    ]
    if (
        not _last
        or _last[0] != asked
        or any(known() is not p for known, p in zip(_last[1], parameters, strict=False))
    ):
        live, implied = names(tracked), _derived_of(tracked, payload)
        to_record = {
            n: mine
            for n, mine in live.items()
            if n in sizes and mine != implied.get(n) and (n in implied or are_known(mine))
        }
        _last[:] = [asked, [weakref.ref(parameter) for parameter in parameters], to_record]
    return dict(_last[2])


def _derived_of(tracked: Mapping[str, Any], payload: Mapping[str, Any]) -> dict[str, Names]:
    modules = [name for name, obj in tracked.items() if isinstance(unwrap(obj), nn.Module)]
    return derived(payload, modules, {called for called, _ in parameters_of(tracked)})


def derived(
    payload: Mapping[str, Any], modules: Collection[str], parameters: Collection[str]
) -> dict[str, Names]:
    """Return the parameter names that follow from a checkpoint itself, by optimizer.

    In a file without names an optimizer has all parameters of one module, or of several consecutive
    modules, in their order. It gets the first modules that fit by the number of parameters and that
    no other optimizer has. If there are two groups, the first has the parameters with more than one
    dimension and the second has the others, provided that these counts fit.

    Args:
        payload: the content of the checkpoint.
        modules: the names of the tracked modules.
        parameters: the names of all parameters, which tell parameters from buffers.

    Returns:
        The names of each optimizer for which such modules exist.
    """
    held = _held(payload, modules, parameters)
    left, assigned = list(held), dict[str, Names]()
    for name, sizes in numbered(payload).items():
        runs = (
            left[start:end] for start in range(len(left)) for end in range(start + 1, len(left) + 1)
        )
        run = next(
            (run for run in runs if sum(len(held[module]) for module in run) == sum(sizes) > 0),
            None,
        )
        if run is not None:
            left = [module for module in left if module not in run]
            assigned[name] = _in_groups(
                {called: dims for module in run for called, dims in held[module].items()}, sizes
            )
    return assigned


def _in_groups(held: Mapping[str, int], sizes: list[int]) -> Names:
    matrices = [called for called, dims in held.items() if dims > 1]
    others = [called for called, dims in held.items() if dims <= 1]
    called = [*matrices, *others] if sizes == [len(matrices), len(others)] else list(held)
    return [list(called[sum(sizes[:at]) : sum(sizes[: at + 1])]) for at in range(len(sizes))]


def _held(
    payload: Mapping[str, Any], modules: Collection[str], parameters: Collection[str]
) -> dict[str, dict[str, int]]:
    """Return the saved parameters of each module, in the order of the file.

    Returns:
        By module, and then by parameter name: the number of dimensions.
    """
    held: dict[str, dict[str, int]] = {}
    for key, state in payload.items():
        name = key.removesuffix("_state_dict")
        if name in modules and name != key:  # a module may be called like another entry
            clean = {called: f"{name}.{_clean(called, set())}" for called in state}
            dimensions = {
                clean[called]: _dims(value)
                for called, value in state.items()
                if clean[called] in parameters
            }
            held |= {name: dimensions} if dimensions else {}
    return held


def _dims(value: Any) -> int:
    return value.dim() if isinstance(value, torch.Tensor) and not value.is_nested else 0


def numbered(payload: Mapping[str, Any]) -> dict[str, list[int]]:
    """Return the number of parameters in each group, for each optimizer in a checkpoint."""
    counts = {}
    for key, state in payload.items():
        groups = (
            state.get("param_groups")
            if key.endswith("_state_dict") and isinstance(state, Mapping)
            else None
        )
        if isinstance(groups, list) and all(
            isinstance(group, Mapping) and isinstance(group.get("params"), list) for group in groups
        ):
            counts[key.removesuffix("_state_dict")] = [len(group["params"]) for group in groups]
    return counts


def are_known(named: Names | None) -> bool:
    """Return whether there are parameters, each has a name, and all names are different."""
    flat = [name for group in named or () for name in group]
    return bool(flat) and None not in flat and len(set(flat)) == len(flat)


def saved_names(
    tracked: Mapping[str, Any], payload: Mapping[str, Any], *, says_all: bool
) -> dict[str, Names]:
    """Return the parameter names of each optimizer in a checkpoint.

    Args:
        tracked: the tracked objects by name.
        payload: the content of the checkpoint.
        says_all: whether the checkpoint records each name that the order of its parameters does
            not give. If so, the names that it gives are returned too.
    """
    recorded: dict[str, Names] = payload.get("names", {})
    return (_derived_of(tracked, payload) if says_all else {}) | recorded


def named_parameters(tracked: Mapping[str, Any]) -> dict[str, nn.Parameter]:
    """Find the parameters of all tracked objects, by name.

    A parameter of a module is named after the object and its own path. A parameter that only an
    optimizer has is named after its position in the optimizer: NAME.param_groups.GROUP.NUMBER.
    """
    parameters: dict[str, nn.Parameter] = {}
    known: set[int] = set()
    objects = {name: unwrap(obj) for name, obj in tracked.items()}
    listed = [
        (".".join(filter(None, (name, path, key))), parameter)
        for name, obj in objects.items()
        for path, part in submodules(obj)
        for key, parameter in part._parameters.items()
    ] + [
        (f"{name}.param_groups.{at}.{number}", parameter)
        for name, obj in objects.items()
        if isinstance(obj, torch.optim.Optimizer)
        for at, group in enumerate(obj.param_groups)
        for number, parameter in enumerate(group["params"])
    ]
    for name, parameter in listed:
        if parameter is not None and id(parameter) not in known:
            known.add(id(parameter))
            parameters[name] = parameter
    return parameters
