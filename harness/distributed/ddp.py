"""Unwrap modules, and make a resume with DistributedDataParallel exact."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from harness.distributed.ranks import World
from harness.errors import UsageError


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


def plain(module: Any) -> Any:
    """Return the module inside the wrappers of torch.compile, DDP and DataParallel."""
    return list(wrappers(module))[-1]


def parts(module: object) -> list[tuple[str, nn.Module]]:
    """Return every submodule of a module with its path, the module itself first.

    Wrappers around submodules are left out, also of the paths.
    """
    found: dict[int, tuple[str, nn.Module]] = {}

    def walk(part: nn.Module, path: str) -> None:
        part = plain(part)
        if id(part) not in found:
            found[id(part)] = path, part
            for name, child in part._modules.items():
                if child is not None:
                    walk(child, f"{path}.{name}" if path else name)

    if isinstance(plain(module), nn.Module):
        walk(plain(module), "")
    return list(found.values())


def shells_of(module: object) -> list[DistributedDataParallel]:
    """Return every DDP wrapper around a tracked object or around a part of it."""
    found = [shell for shell in wrappers(module) if isinstance(shell, DistributedDataParallel)]
    inner = plain(module)
    return found + (
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


def check_resumable(name: str, module: object, world: World) -> None:
    """Refuse a wrapping that no resume could make exact.

    Raises:
        UsageError: Parameters or the optimizer are sharded; DDP has static_graph=True on more than
            two ranks; or DDP has broadcast_buffers=False around a module with buffers, on more than
            one rank.
    """
    shells = [type(shell).__name__ for shell in wrappers(module)]
    sharded = isinstance(plain(module), nn.Module) and any(
        hasattr(parameter, "_local_tensor") for parameter in plain(module).parameters()
    )
    if sharded or "FullyShardedDataParallel" in shells or "ZeroRedundancyOptimizer" in shells:
        raise UsageError(
            f"{name}: sharded state is not supported yet",
            f"found: {shells}",
            "Use DistributedDataParallel and a plain optimizer.",
        )
    for ddp in shells_of(module) if world.size > 1 else ():
        if ddp.static_graph and world.size > 2:
            raise UsageError(
                f"{name}: DistributedDataParallel(static_graph=True) sums gradients in another"
                " order after a resume",
                f"found: static_graph=True on {world.size} ranks",
                "Leave static_graph out.",
            )
        if not ddp.broadcast_buffers and any(True for _ in ddp.module.buffers()):
            raise UsageError(
                f"{name}: with broadcast_buffers=False each rank has buffers of its own, and only"
                " the writer's are saved",
                "found: DistributedDataParallel(broadcast_buffers=False) around a module with"
                " buffers",
                "Leave broadcast_buffers out.",
            )


class _Touch(nn.Module):
    """A stand-in for a module: its output depends on every trainable parameter.

    It uses the parameters in the order of their registration, with sparse gradients where the
    module has them.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        sparse = {
            id(part.weight)
            for part in module.modules()
            if isinstance(part, nn.Embedding | nn.EmbeddingBag) and part.sparse
        }
        # A tuple, so that the parameters are not registered here a second time.
        self._touched = tuple(
            (parameter, id(parameter) in sparse)
            for parameter in module.parameters()
            if parameter.requires_grad
        )

    def forward(self) -> torch.Tensor:
        """Return a scalar that depends on every trainable parameter."""
        total = torch.zeros((), device=self._touched[0][0].device)
        for parameter, is_sparse in self._touched:
            first = torch.zeros(1, dtype=torch.long, device=parameter.device)
            part = F.embedding(first, parameter, sparse=True) if is_sparse else parameter
            total = total + part.sum().real.float()
        return total


def settle_buckets(module: object, world: World) -> None:
    """Make DDP form its gradient buckets now, so that all steps sum gradients in the same order.

    DDP regroups gradients after the first backward pass of a process. From three ranks on, that
    changes the order of summation, so the first step after a resume would differ in the last bits
    from the same step in an uninterrupted run. One backward pass through a stand-in for the module,
    whose gradients are dropped, gives a fresh and a resumed process the same buckets. The sum of
    two numbers does not depend on their order, so two ranks do not need this, unless a
    communication hook of the user sees the buckets. Collective: every rank must call it.
    """
    for ddp in shells_of(module):
        # With find_unused_parameters DDP never regroups.
        if ddp.find_unused_parameters or (world.size < 3 and not ddp._comm_hooks):
            continue
        inner = ddp.module
        ddp.module = _Touch(inner)
        try:
            with torch.enable_grad(), quiet_forward([ddp]):
                ddp().backward()
        finally:
            ddp.module = inner
        for parameter in inner.parameters():
            parameter.grad = None


@contextlib.contextmanager
def quiet_forward(modules: list[object]) -> Iterator[None]:
    """Keep forward passes from calling collectives while the block runs.

    So ranks may run different numbers of forward passes.
    """
    shells = [shell for module in modules for shell in shells_of(module)]
    before = [shell.require_forward_param_sync for shell in shells]
    try:
        for shell in shells:
            shell.require_forward_param_sync = False
        yield
    finally:
        for shell, value in zip(shells, before, strict=True):
            shell.require_forward_param_sync = value
