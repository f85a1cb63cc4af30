"""Load one object's state into a copy of the object, and check that the state is the same then."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from harness import state
from harness.errors import UsageError
from harness.untracked.object_walk import holds

MOST_BYTES, MOST_OBJECTS = 64 << 20, 20_000  # limits of an object that is copied
# The methods that must be torch's own.
LOADS = (
    "state_dict",
    "load_state_dict",
    "__setstate__",
    "__deepcopy__",
    "__reduce_ex__",
    "__reduce__",
)
OF_MODULE = (
    *LOADS,
    "_load_from_state_dict",
    "_save_to_state_dict",
    "get_extra_state",
    "set_extra_state",
    "__setattr__",
    "__getattr__",
)
HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
OF_OPTIMIZER = tuple(
    f"_optimizer_{name}"
    for name in (
        "state_dict_pre_hooks",
        "state_dict_post_hooks",
        "load_state_dict_pre_hooks",
        "load_state_dict_post_hooks",
    )
)
SOURCE = "the checkpoint"

LoadResult = tuple[list[str], str]  # the problems found, and why the object was not tried


def of_object(name: str, obj: Any, saved: Any) -> LoadResult:
    """Try to load an object that holds no tensors. For the training thread.

    The user's code runs, and the random generators are restored after it. If the object holds
    tensors, or is too large to copy, only the types in its state are compared.

    Args:
        name: the name of the tracked object.
        obj: the object inside the wrappers.
        saved: its state in the checkpoint.
    """
    if isinstance(obj, torch.amp.GradScaler) or not hasattr(obj, "load_state_dict"):
        return [], ""  # it holds only numbers, and runs torch's own code
    before = obj.state_dict()
    if held := holds(_without_optimizer(obj), MOST_BYTES, MOST_OBJECTS):
        return list(_unlike(before, saved, name, kinds_only=True)), f"{name} (it holds {held})"
    with state.kept_generators():
        try:
            known = [obj.optimizer] if isinstance(obj, torch.optim.lr_scheduler.LRScheduler) else []
            double = copy.deepcopy(obj, {id(optimizer): optimizer for optimizer in known})
        except Exception as error:  # noqa: BLE001 - the user's code may raise anything
            return [], f"{name} (it cannot be copied: {_line(error)})"
        if double is obj:
            return [], f"{name} (its copy is itself)"
        try:
            state.restore_object(name, double, saved, SOURCE)
            after = double.state_dict()
        except Exception as error:  # noqa: BLE001 - the user's code may raise anything
            return [f"{name} cannot be loaded again: {_line(error)}"], ""
    return list(_unlike(before, after, name)), ""


def of_torchs(name: str, obj: Any, saved: Any) -> LoadResult:
    """Try to load a module or an optimizer that is loaded by torch's own code only.

    Neither the copy of the object nor the state that is loaded into it has data.

    Args:
        name: the name of the tracked object.
        obj: the module or optimizer inside the wrappers.
        saved: its state without data; see `without_data`.
    """
    foreign = _foreign(obj)
    if foreign:
        return [], f"{name} ({foreign})"
    double = _module(obj, {}) if isinstance(obj, nn.Module) else _optimizer(obj)
    try:
        state.restore_object(name, double, saved, SOURCE)
        after = without_data(double.state_dict())
    except (
        UsageError,
        RuntimeError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        NotImplementedError,
    ) as error:
        return [f"{name} cannot be loaded again: {_line(error)}"], ""
    return list(_unlike(saved, after, name)), ""


def without_data(value: Any) -> Any:
    """Return the value with its tensors replaced by tensors on the meta device, without data.

    Quantized tensors and those of another layout than strided are not replaced.
    """
    if isinstance(value, torch.Tensor):
        return _meta(value)
    if isinstance(value, Mapping):
        items = {key: without_data(item) for key, item in value.items()}
        if not isinstance(value, OrderedDict):
            return items
        ordered = OrderedDict(items)
        if hasattr(value, "_metadata"):
            ordered._metadata = value._metadata  # type: ignore[attr-defined]
        return ordered
    if isinstance(value, list | tuple):
        parts = [without_data(item) for item in value]
        return tuple(parts) if isinstance(value, tuple) else parts
    return value


def _meta(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.layout is not torch.strided or tensor.is_quantized:
        return tensor
    # Without strides, as a restore would compare the data of an expanded tensor.
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _foreign(obj: Any) -> str:
    """Return which part of an object is not loaded by torch's own code; "" if there is none."""
    if isinstance(obj, torch.optim.Optimizer):
        return (
            _not_torchs(type(obj), LOADS) or _hooked(obj, OF_OPTIMIZER) or _odd(_values(obj.state))
        )
    for part in obj.modules():
        odd = (
            _not_torchs(type(part), OF_MODULE)
            or _hooked(part, HOOKS)
            or _odd((*part._parameters.values(), *part._buffers.values()))
        )
        if odd:
            return odd
    return ""


def _not_torchs(kind: type, names: tuple[str, ...]) -> str:
    for name in names:
        owner = next((base for base in kind.__mro__ if name in vars(base)), None)
        if owner is None or owner is object:
            continue
        # torch's parametrize creates classes whose functions are torch's own.
        module = getattr(vars(owner)[name], "__module__", None) or owner.__module__
        if not module.startswith(("torch.nn.", "torch.optim.")):
            return f"{kind.__name__} has a {name} of its own"
    return ""


def _hooked(obj: Any, names: tuple[str, ...]) -> str:
    return next(
        (
            f"{type(obj).__name__} has hooks: {name.strip('_')}"
            for name in names
            if getattr(obj, name, None)
        ),
        "",
    )


def _odd(values: Any) -> str:
    """Return a description of the first tensor that is not a plain strided one; "" if all are.

    Tensors of other classes have code of their own.
    """
    for value in values:
        if isinstance(value, torch.Tensor) and (
            type(value) not in (torch.Tensor, nn.Parameter, nn.Buffer)
            or value.layout is not torch.strided
            or value.is_nested
        ):
            return f"it holds a {type(value).__name__}, {str(value.layout).removeprefix('torch.')}"
    return ""


def _values(states: Mapping[Any, Any]) -> Iterator[Any]:
    for held in list(states.values()):
        yield from list(held.values()) if isinstance(held, dict) else ()


def _module(module: nn.Module, known: dict[int, nn.Module]) -> nn.Module:
    """Return a copy of a module whose tensors have no data.

    The copy shares its other attributes with the module: torch's loading writes to none of them.
    `known` holds the copies made so far, by the identity of the module.
    """
    if id(module) not in known:
        double = known[id(module)] = object.__new__(type(module))
        vars(double).update(vars(module))
        parameters = {
            key: None if value is None else nn.Parameter(_meta(value), value.requires_grad)
            for key, value in module._parameters.items()
        }
        buffers = {
            key: None if value is None else _meta(value) for key, value in module._buffers.items()
        }
        inner = {
            key: None if value is None else _module(value, known)
            for key, value in module._modules.items()
        }
        vars(double).update(_parameters=parameters, _buffers=buffers, _modules=inner)
    return known[id(module)]


def _optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    double: torch.optim.Optimizer = object.__new__(type(optimizer))
    vars(double).update(vars(optimizer))
    double.param_groups = [
        dict(group)
        | {
            "params": [
                nn.Parameter(_meta(parameter), parameter.requires_grad)
                for parameter in group["params"]
            ]
        }
        for group in optimizer.param_groups
    ]
    double.state = defaultdict(dict)
    return double


def _without_optimizer(obj: Any) -> Any:
    """Return the part of an object whose size counts: a scheduler's without its optimizer.

    The sub-schedulers of a scheduler are left out as well.
    """
    if isinstance(obj, torch.optim.lr_scheduler.LRScheduler):
        return {
            key: value
            for key, value in vars(obj).items()
            if key not in ("optimizer", "_schedulers")
        }
    return obj


def _unlike(before: Any, after: Any, where: str, *, kinds_only: bool = False) -> Iterator[str]:
    """Yield a message for each difference between two states.

    Args:
        before: the state before loading.
        after: the state after loading.
        where: the path to the state, for the messages.
        kinds_only: compare types, shapes and keys, but not values.
    """
    if isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor):
        was, now = (
            f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
            for tensor in (before, after)
        )
        if was != now:
            yield f"{where} was {was} and is {now} afterwards"
    elif type(before) is not type(after):
        yield f"{where} was a {_kind(before)} and is a {_kind(after)} afterwards"
    elif isinstance(before, Mapping):
        for key in [*before, *(key for key in after if key not in before)]:
            at = f"{where}[{key!r}]"
            if key not in before or key not in after:
                yield f"{at} is there {'before' if key in before else 'afterwards'} only"
            else:
                yield from _unlike(before[key], after[key], at, kinds_only=kinds_only)
    elif isinstance(before, list | tuple):
        if len(before) != len(after):
            yield f"{where} had {len(before)} things and has {len(after)} afterwards"
        for number, pair in enumerate(zip(before, after, strict=False)):
            yield from _unlike(*pair, f"{where}[{number}]", kinds_only=kinds_only)
    elif not kinds_only and not _is_same(before, after):
        yield f"{where} was {before!r:.80} and is {after!r:.80} afterwards"


def _is_same(before: Any, after: Any) -> bool:
    if isinstance(before, np.ndarray):
        return bool(before.dtype == after.dtype and before.tobytes() == after.tobytes())
    is_plain = isinstance(before, bool | int | float | complex | str | bytes | np.generic)
    return not is_plain or bool(before == after) or _both_nan(before, after)


def _both_nan(before: Any, after: Any) -> bool:
    return (
        isinstance(before, float)
        and isinstance(after, float)
        and math.isnan(before)
        and math.isnan(after)
    )


def _kind(value: Any) -> str:
    kind = type(value)
    return (
        kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    )


def _line(error: BaseException) -> str:
    if isinstance(error, UsageError):
        return error.found.removeprefix("found: ")
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
