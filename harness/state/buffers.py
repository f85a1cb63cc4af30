"""Load a module's state in cases where `load_state_dict` alone fails.

These cases are buffers that get their size in training, nested buffers, and expanded tensors
(several elements share one memory location). Tensors that training adds or takes away cannot be
loaded at all; `misfits` tells them while the program still runs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy


def load(module: nn.Module, saved: Mapping[str, Any]) -> None:
    """Load a state dict into a module, with room made for buffers that are still empty.

    `module.load_state_dict(saved)` is tried first. If it raises RuntimeError, buffers that are None
    or empty get the shape and dtype that they had when saved, and the load is tried again.

    Raises:
        Exception: any error that `module.load_state_dict` raises.
    """
    nested, saved = _nested(module, saved)
    repeated = _take_out_repeated(module)
    try:
        try:
            module.load_state_dict(saved)
        except RuntimeError:
            if not _make_room(module, saved):
                raise
            module.load_state_dict(saved)
    finally:
        _put_back(repeated)
        for held, name, tensor in nested:
            held[name] = tensor
    _part_buffers(module, saved)


def _part_buffers(module: nn.Module, saved: Mapping[str, Any]) -> None:
    """Give memory of their own to buffers that share some as built and had parted when saved.

    Two buffers may be registered from one tensor, and training may set each to another one. A load
    writes both into the one memory. Those that are still alike stay one.
    """
    shared: dict[int, list[tuple[Any, str, Any]]] = {}
    for path, part in module.named_modules():
        registered: tuple[Any, ...] = (part._parameters, part._buffers)
        for held in registered:
            for name, tensor in held.items():
                value = saved.get(f"{path}.{name}".lstrip("."))
                if _is_loaded(tensor, value) and not _loads_itself(part):
                    shared.setdefault(tensor.untyped_storage().data_ptr(), []).append(
                        (held, name, value)
                    )
    with torch.no_grad():
        for group in shared.values():
            if len(group) == 1 or all(is_equal(held[name], value) for held, name, value in group):
                continue
            for held, name, value in group:
                if isinstance(held[name], nn.Parameter):  # is what an optimizer has
                    held[name].copy_(value)
            for held, name, value in group:
                if not (isinstance(held[name], nn.Parameter) or is_equal(held[name], value)):
                    held[name] = torch.empty_like(held[name]).copy_(value)


def _is_loaded(tensor: Any, value: Any) -> bool:
    """Return whether a tensor with memory of its own kind has got the saved value."""
    return (
        type(tensor) in (torch.Tensor, nn.Parameter)
        and type(value) is torch.Tensor
        and tensor.layout is torch.strided
        and not (tensor.is_meta or tensor.is_nested or tensor.is_quantized or tensor.numel() == 0)
        and (tensor.shape, tensor.dtype) == (value.shape, value.dtype)
    )


def is_equal(tensor: torch.Tensor, value: torch.Tensor) -> bool:
    """Return whether two tensors have the same numbers, or are NaN in the same places."""
    other = value.to(tensor.device)
    return bool(((tensor == other) | ((tensor != tensor) & (other != other))).all())


def _nested(
    module: nn.Module, saved: Mapping[str, Any]
) -> tuple[list[tuple[Any, str, torch.Tensor]], Mapping[str, Any]]:
    """Take nested buffers out of the module and the saved state: torch loads no nested tensor.

    Returns:
        The nested buffers, each as (buffer dict of the submodule, name, saved tensor on the device
        of the live buffer), and the saved state without them.
    """
    keys = {
        key for key, value in saved.items() if isinstance(value, torch.Tensor) and value.is_nested
    }
    if not keys:
        return [], saved
    nested: list[tuple[Any, str, torch.Tensor]] = []
    for path, part in module.named_modules():
        for name, held in part._buffers.items():
            if (
                (key := f"{path}.{name}".lstrip(".")) in keys
                and held is not None
                and held.is_nested
            ):
                nested.append((part._buffers, name, saved[key].to(held.device)))
                part._buffers[name] = None
                keys.remove(key)
    taken = {
        key: value
        for key, value in saved.items()
        if not (isinstance(value, torch.Tensor) and value.is_nested) or key in keys
    }
    made: OrderedDict[str, Any] = OrderedDict(taken)
    if hasattr(saved, "_metadata"):
        made._metadata = saved._metadata  # type: ignore[attr-defined]
    return nested, made


def decides(module: nn.Module, key: str) -> bool:
    """Return whether loading may accept an entry that does not match by name or shape.

    This is the case for extra state, for a buffer without content, and for the state of a submodule
    with its own way of loading (an overridden method or a pre-hook), or inside such a submodule.
    """
    path, _, name = key.rpartition(".")
    if name == "_extra_state":
        return True
    owner, around = module, [module]
    for step in path.split(".") if path else ():
        if (inner := owner._modules.get(step)) is None:
            return any(map(_loads_itself, around))
        owner = inner
        around.append(owner)
    held = owner._buffers.get(name)
    is_empty = name in owner._buffers and (held is None or held.numel() == 0)
    return is_empty or any(map(_loads_itself, around))


def _loads_itself(part: nn.Module) -> bool:
    own = type(part).load_state_dict is not nn.Module.load_state_dict or any(
        not _is_of_fsdp(hook) for hook in part._load_state_dict_pre_hooks.values()
    )
    # torch's own overrides, such as those of batch norms, only read what older versions wrote.
    is_torchs = type(part).__module__.startswith("torch.nn.modules")
    return own or (
        type(part)._load_from_state_dict is not nn.Module._load_from_state_dict and not is_torchs
    )


def _is_of_fsdp(hook: Any) -> bool:
    """Return whether a hook is one by which `fully_shard` shards before a load."""
    module = getattr(getattr(hook, "hook", hook), "__module__", None)
    return str(module).startswith("torch.distributed.fsdp.")


# The shape of each tensor in a `state_dict`, by module path and name: None for a buffer that is
# None, LAZY for a parameter that gets its shape later.
Layout = dict[str, dict[str, Any]]
LAZY, GONE, PARAMETER_GROUP = "lazy", "gone", "parameter group"


def layout_of(parts: Iterable[tuple[str, Any]]) -> Layout:
    """Return the layout of a module's parts, given with their paths, or that of an optimizer.

    Parts with their own way of saving or loading are left out, with what is inside them.
    """
    layout, left_out = Layout(), set[str]()
    for path, part in parts:
        steps = path.split(".")
        if any(".".join(steps[:n]) in left_out for n in range(len(steps) + 1)):
            continue
        if _is_torchs_form(part):
            layout[path] = _shapes(part)
        else:
            left_out.add(path)
    return layout


def _is_torchs_form(part: Any) -> bool:
    if isinstance(part, torch.optim.Optimizer):
        return type(part).load_state_dict is torch.optim.Optimizer.load_state_dict
    return not (
        _loads_itself(part)
        or part._state_dict_hooks
        or type(part).state_dict is not nn.Module.state_dict
        or type(part)._save_to_state_dict is not nn.Module._save_to_state_dict
    )


def _shapes(part: Any) -> dict[str, Any]:
    if isinstance(part, torch.optim.Optimizer):
        groups = enumerate(part.param_groups)
        return {f"{PARAMETER_GROUP} {at}": (len(group["params"]),) for at, group in groups}
    shapes: dict[str, Any] = {
        key: LAZY if is_lazy(value) else value.shape
        for key, value in part._parameters.items()
        if value is not None
    }
    for key, value in part._buffers.items():
        if key not in part._non_persistent_buffers_set:
            shapes[key] = None if value is None else LAZY if is_lazy(value) else value.shape
    return shapes


def held_by(part: Any) -> list[int]:
    """Return the ids of a part's parameters and buffers, or the size of each parameter group."""
    if isinstance(part, torch.optim.Optimizer):
        return [len(group["params"]) for group in part.param_groups]
    return [*map(id, part._parameters.values()), *map(id, part._buffers.values())]


def misfits(built: Layout, parts: Iterable[tuple[str, Any]]) -> dict[str, str]:
    """Return what of the present tensors a module with the layout `built` could not load.

    Returns:
        By the path of the tensor, or the parameter group of an optimizer: how it is another one.
    """
    said = {}
    for path, part in parts:
        if (before := built.get(path)) is None or (now := _shapes(part)) == before:
            continue
        for key in dict.fromkeys((*before, *now)):
            was, is_now = before.get(key, GONE), now.get(key, GONE)
            if not _fits(was, is_now):
                said[f"{path}.{key}".lstrip(".")] = (
                    "is new"
                    if was == GONE
                    else "is gone"
                    if is_now in (None, GONE)
                    else f"was {_spelled(was)} and is {_spelled(is_now)}"
                )
    return said


def _fits(was: Any, now: Any) -> bool:
    if was is None or was == now:
        return True
    if was == GONE:
        return now is None
    return (was == LAZY or 0 in was) and now not in (None, GONE)


def _spelled(shape: Any) -> str:
    return shape if isinstance(shape, str) else "x".join(map(str, shape)) or "a scalar"


def _make_room(module: nn.Module, saved: Mapping[str, Any]) -> bool:
    """Give empty buffers the shape and dtype of their saved values; return whether any changed."""
    made = False
    for path, part in module.named_modules():
        for name, held in part._buffers.items():
            value = saved.get(f"{path}.{name}".lstrip("."))
            if name in part._non_persistent_buffers_set or not isinstance(value, torch.Tensor):
                continue
            if held is None or (held.numel() == 0 and held.shape != value.shape):
                part._buffers[name] = torch.zeros_like(
                    value, device=_device(module) if held is None else held.device
                )
                made = True
    return made


def _device(module: nn.Module) -> torch.device:
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


# The dict that holds the tensor, its name in there, the tensor, and the copy that replaces it.
Repeated = list[tuple[Any, str, torch.Tensor, torch.Tensor]]


def _take_out_repeated(module: nn.Module) -> Repeated:
    """Replace each expanded buffer or parameter by a plain copy.

    In an expanded tensor (`expand`) several elements share one memory location, so torch cannot
    write to it as a whole.
    """
    repeated: Repeated = []
    for part in module.modules():
        registered: tuple[Any, ...] = (part._buffers, part._parameters)
        for held in registered:
            for name, tensor in held.items():
                if tensor is not None and _is_repeated(tensor):
                    copy = tensor.detach().clone(memory_format=torch.contiguous_format)
                    repeated.append(
                        (
                            held,
                            name,
                            tensor,
                            nn.Parameter(copy, tensor.requires_grad)
                            if held is part._parameters
                            else copy,
                        )
                    )
                    held[name] = repeated[-1][3]
    return repeated


def _is_repeated(tensor: torch.Tensor) -> bool:
    if (
        type(tensor) not in (torch.Tensor, nn.Parameter)
        or tensor.is_nested
        or tensor.layout is not torch.strided
    ):
        return False
    return any(
        stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )


def _put_back(repeated: Repeated) -> None:
    """Write the loaded values into the expanded tensors, and put these back into the module.

    If the loaded values are not the same along an expanded dimension, the plain copy stays.
    """
    for held, name, tensor, loaded in repeated:
        once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())
        with torch.no_grad():
            tensor.detach()[once].copy_(loaded[once])
            if torch.equal(tensor, loaded):
                held[name] = tensor
