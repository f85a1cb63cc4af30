"""Wrap modules for several ranks, and find what is inside the wrappers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from harness.distributed.ranks import World


def wrappers(module: object) -> Iterator[object]:
    """Yield the module and everything that it wraps, outermost first.

    The wrappers of torch.compile, DDP and DataParallel come first, then the plain module.
    """
    yield module
    while True:
        inner = getattr(module, "_orig_mod", None)
        if inner is None and isinstance(module, DistributedDataParallel | nn.DataParallel):
            inner = module.module
        if inner is None:
            return
        module = inner
        yield module


def unwrap(module: Any) -> Any:
    """Return the module inside the wrappers of torch.compile, DDP and DataParallel."""
    return list(wrappers(module))[-1]


def submodules(module: object) -> list[tuple[str, nn.Module]]:
    """Return every submodule of a module with its path, the module itself first.

    Wrappers around submodules are left out, also of the paths.
    """
    modules: dict[int, tuple[str, nn.Module]] = {}

    def walk(part: nn.Module, path: str) -> None:
        part = unwrap(part)
        if id(part) not in modules:
            modules[id(part)] = path, part
            for name, child in part._modules.items():
                if child is not None:
                    walk(child, f"{path}.{name}" if path else name)

    if isinstance(unwrap(module), nn.Module):
        walk(unwrap(module), "")
    return list(modules.values())


def shells(module: object) -> dict[int, list[nn.Module]]:
    """Return the wrappers around a module and around its parts, outermost first.

    They come by the id of the plain module inside; modules without wrappers are left out.
    """
    children = [child for _, part in submodules(module) for child in part._modules.values()]
    around: dict[int, list[nn.Module]] = {}
    for outer in (module, *children):
        *found, inner = wrappers(outer)
        if found:
            around[id(inner)] = [shell for shell in found if isinstance(shell, nn.Module)]
    return around


def ddp_wrappers(module: object) -> list[DistributedDataParallel]:
    """Return every DDP wrapper around a tracked object or around a part of it."""
    outer = [shell for shell in wrappers(module) if isinstance(shell, DistributedDataParallel)]
    inner = unwrap(module)
    return outer + (
        [part for part in inner.modules() if isinstance(part, DistributedDataParallel)]
        if isinstance(inner, nn.Module)
        else []
    )


def wrap(module: nn.Module, world: World) -> nn.Module:
    """Wrap a module in DistributedDataParallel on this rank's device.

    A module without trainable parameters is returned unchanged, as is any module if there is no
    process group.
    """
    if not world.joined or not any(parameter.requires_grad for parameter in module.parameters()):
        return module
    return DistributedDataParallel(
        module, device_ids=[world.device.index] if world.device.type == "cuda" else None
    )
