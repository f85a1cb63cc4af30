"""Find tensors that `to_empty` has left uninitialised, whatever the memory holds.

Fresh memory is often zero, so its content tells nothing. From `harness.init` on, `to_empty` fills
what it makes, as torch does under `torch.utils.deterministic.fill_uninitialized_memory`: floating
tensors with a NaN of bits that no computation begins with, others with their largest value. What
still has these bits was never written, by whatever way: an initialiser, `load_state_dict`,
`.data`, a collective, the part of a DTensor alone. Version counters alone would not do: `.data` and
collectives do not count, and a DTensor and its part count apart.

A value that is not a floating number may happen to be the largest one. It counts as uninitialised
only if its tensor has not been written since in a way that torch counts.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import Module
from torch.utils.weak import WeakTensorKeyDictionary

from harness.distributed import dtensors
from harness.distributed.data_ranks import modules_in
from harness.distributed.wrappers import unwrap
from harness.errors import UsageError

# By dtype: an integer dtype of the same size, and the bits of a quiet NaN that is not torch.nan.
_NAN = {
    torch.float64: (torch.int64, 0x7FF8_5EED_5EED_5EED),
    torch.float32: (torch.int32, 0x7FC5_EED5),
    torch.float16: (torch.int16, 0x7E5E),
    torch.bfloat16: (torch.int16, 0x7FDE),
}
_CHUNK = 1 << 20  # elements that are compared at once
# The versions of the other tensors that were filled. Weak: a parameter may still be swapped.
_versions = WeakTensorKeyDictionary()
_is_used = False  # whether any tensor was filled


def watch() -> None:
    """Fill from now on what `nn.Module.to_empty` makes in this process.

    PyTorch has no hook for that, so the method is wrapped, once.
    """
    original = Module.to_empty
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def to_empty(self: Any, *args: Any, recurse: bool = True, **kwargs: Any) -> Any:
        made = original(self, *args, recurse=recurse, **kwargs)
        for tensor in (*self.parameters(recurse=recurse), *self.buffers(recurse=recurse)):
            fill(tensor)
        return made

    Module.to_empty = to_empty  # type: ignore[method-assign]


@torch.no_grad()
def fill(tensor: torch.Tensor) -> None:
    """Fill a tensor, or this rank's part of a sharded one, so that it counts as uninitialised."""
    global _is_used
    if (part := _part(tensor)) is None:
        return
    _is_used = True
    if known := _NAN.get(part.dtype):
        part.view(known[0]).fill_(known[1])
        return
    _raw(part).fill_(_largest(part))
    _versions[tensor] = dtensors.version_of(tensor)


def is_uninitialised(tensor: torch.Tensor) -> bool:
    """Return whether any element of a tensor, or of this rank's part, is as `fill` left it."""
    if (part := _part(tensor)) is None:
        return False
    if known := _NAN.get(part.dtype):
        bits = part.view(known[0])
        pieces = torch.split(bits.flatten(), _CHUNK) if bits.is_contiguous() else (bits,)
        return any(bool((piece == known[1]).any()) for piece in pieces)
    if tensor not in _versions or _versions[tensor] != dtensors.version_of(tensor):
        return False
    return bool((_raw(part) == _largest(part)).all())


def _part(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return the memory of a tensor on this rank as one of real numbers; None if it is not plain.

    Args:
        tensor: a parameter, a buffer, or a sharded one.
    """
    part = dtensors.plain(tensor)
    if (
        type(part) not in (torch.Tensor, nn.Parameter)
        or part.layout is not torch.strided
        or part.is_meta
        or part.is_quantized
        or part.is_inference()
        or not part.numel()
    ):
        return None
    part = part.detach()
    return torch.view_as_real(part) if part.is_complex() else part


def _raw(part: torch.Tensor) -> torch.Tensor:
    """Return a tensor that can be filled and compared: small floating numbers as their bytes."""
    return part.view(torch.uint8) if part.dtype.is_floating_point else part


def _largest(part: torch.Tensor) -> int | bool:
    if part.dtype is torch.bool:
        return True
    return 0x7F if part.dtype.is_floating_point else torch.iinfo(part.dtype).max


def names_of(module: nn.Module) -> list[str]:
    """Return the names of the parameters and buffers of a module that are not initialised."""
    if not _is_used:
        return []
    tensors = (*module.named_parameters(), *module.named_buffers())
    return [name for name, tensor in tensors if is_uninitialised(tensor)]


def check_memory(module: nn.Module) -> None:
    """Refuse to load into a module on the device meta: torch would drop the values.

    Raises:
        UsageError: A parameter or a buffer that its state dict holds is on meta.
    """
    if names := [key for key, of in module.state_dict().items() if getattr(of, "is_meta", False)]:
        raise UsageError(
            f"{len(names)} tensor(s) of the model are on the device meta, and can hold no values",
            f"found: {', '.join(names[:8])}",
            'Give them memory first: model.to_empty(device="cpu"), after fully_shard.',
        )


def check(objects: Mapping[str, Any]) -> None:
    """Refuse to train what was not initialised.

    It is called when the state of a checkpoint, if there is one, has been restored: so that is
    initialised, and what no checkpoint holds (buffers that are not persistent) is refused at a
    resume as it is in a new run.

    Args:
        objects: the objects that are tracked, by name.

    Raises:
        UsageError: A parameter or buffer is as `to_empty` left it, or an optimizer updates
            parameters without data.
    """
    modules = dict[str, nn.Module]()
    for path, module in (item for one in objects.items() for item in modules_in(*one)):
        if all(unwrap(module) is not other for other in modules.values()):
            modules[path] = unwrap(module)  # once: an average also holds the module that it is of
    held = {id(each) for module in modules.values() for each in module.parameters()}
    for name, obj in objects.items():
        if lost := sum(each.is_meta and id(each) not in held for each in _updated(unwrap(obj))):
            raise UsageError(
                f"{name} updates {lost} parameter(s) on the device meta that no tracked module has",
                "found: an optimizer that was made before its module got memory",
                "Make it after module.to_empty(…).",
            )
    found = [f"{path}.{name}" for path, module in modules.items() for name in names_of(module)]
    if found:
        more = f" and {len(found) - 8} more" if len(found) > 8 else ""
        raise UsageError(
            f"{len(found)} parameter(s) or buffer(s) are not initialised",
            f"found: as to_empty() left them: {', '.join(found[:8])}{more}",
            "Initialise them after it: reset_parameters(), load_state_dict(), or make all of it "
            "with harness.materialize(model, init). What a constructor computes (tables in "
            "buffers) is to be computed again.",
        )


def _updated(optimizer: Any) -> Iterator[torch.Tensor]:
    """Yield the parameters that an optimizer updates; nothing of other objects."""
    for group in optimizer.param_groups if isinstance(optimizer, torch.optim.Optimizer) else ():
        yield from group["params"]
