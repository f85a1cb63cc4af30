"""Give every rank the writer's parameters and buffers: for good, or while a block runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from harness.distributed.wrappers import unwrap

if TYPE_CHECKING:
    from harness.distributed.ranks import World


def share_state(module: nn.Module, world: World) -> None:
    """Give every rank the writer's parameters and buffers. Collective: every rank must call it."""
    if world.size == 1:
        return
    for tensor in (*module.parameters(), *module.buffers()):
        if _is_plain(tensor):
            _put(tensor, world.from_writer(tensor))
        else:
            value = world.gather(tensor.detach().cpu() if world.is_writer else None)[0]
            if value is not None and not world.is_writer:
                with torch.no_grad():
                    tensor.copy_(value)


@contextlib.contextmanager
def writers_buffers(modules: Sequence[Any], world: World) -> Iterator[None]:
    """Give every rank the writer's buffers of modules while the block runs.

    Afterwards each rank gets its own values back, bit for bit. Buffers that are not plain tensors
    of the same shape on all ranks stay each rank's own. Collective: every rank must call it.
    """
    if world.size == 1:
        yield
        return
    buffers = {
        (at, name): buffer
        for at, module in enumerate(modules)
        for name, buffer in unwrap(module).named_buffers()
        if _is_plain(buffer)
    }
    about = {key: (tuple(of.shape), str(of.dtype)) for key, of in buffers.items()}
    everyones = world.gather(about)
    own: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        for key in everyones[0]:
            if any(theirs.get(key) != everyones[0][key] for theirs in everyones):
                continue
            value = world.from_writer(buffer := buffers[key])
            if not torch.equal(buffer, value):
                own.append((buffer, buffer.detach().clone()))
                _put(buffer, value)
        yield
    finally:
        # Backwards: two buffers may be views of the same memory.
        for buffer, value in reversed(own):
            _put(buffer, value)


def _is_plain(tensor: torch.Tensor) -> bool:
    """Return whether a tensor consists of nothing but elements in memory, which can be written."""
    return (
        tensor.layout is torch.strided
        and not (tensor.is_nested or tensor.is_quantized or tensor.is_meta or tensor.is_inference())
        and not is_traceable_wrapper_subclass(tensor)
    )


def _put(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Write values into a tensor of any strides; what autograd has noted of it stays valid."""
    # Of an expanded tensor, each location in memory is written once.
    once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())
    tensor.data[once].copy_(value[once])
