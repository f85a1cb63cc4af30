"""Make a resume with DistributedDataParallel exact, or refuse it."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from harness.distributed.wrappers import ddp_wrappers, unwrap, wrappers
from harness.errors import UsageError

if TYPE_CHECKING:
    from harness.distributed.ranks import World


def check_resumable(name: str, module: object, world: World) -> None:
    """Refuse a wrapping that no resume could make exact.

    Raises:
        UsageError: Parameters or the optimizer are sharded in a way that is not supported, or DDP
            has static_graph=True on more than two ranks.
    """
    shells = [type(shell).__name__ for shell in wrappers(module)]
    if "FullyShardedDataParallel" in shells or "ZeroRedundancyOptimizer" in shells:
        raise UsageError(
            f"{name}: what FSDP1 and ZeroRedundancyOptimizer shard is not supported",
            f"found: {shells}",
            "Use fully_shard (FSDP2), or DistributedDataParallel, and a plain optimizer.",
        )
    for ddp in ddp_wrappers(module) if world.size > 1 else ():
        if ddp.static_graph and world.size > 2:
            raise UsageError(
                f"{name}: DistributedDataParallel(static_graph=True) sums gradients in another"
                " order after a resume",
                f"found: static_graph=True on {world.size} ranks",
                "Leave static_graph out.",
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


def fix_bucket_order(module: object, world: World) -> None:
    """Make DDP form its gradient buckets now, so that all steps sum gradients in the same order.

    DDP regroups gradients after the first backward pass of a process. From three ranks on, that
    changes the order of summation, so the first step after a resume would differ in the last bits
    from the same step in an uninterrupted run. One backward pass through a stand-in for the module,
    whose gradients are dropped, gives a fresh and a resumed process the same buckets. The sum of
    two numbers does not depend on their order, so two ranks do not need this, unless a
    communication hook of the user sees the buckets. Collective: every rank must call it.
    """
    for ddp in ddp_wrappers(module):
        # With find_unused_parameters DDP never regroups.
        if ddp.find_unused_parameters or (world.size < 3 and not ddp._comm_hooks):
            continue
        inner = ddp.module
        ddp.module = _Touch(inner)
        try:
            with torch.enable_grad(), no_buffer_sync([ddp]):
                ddp().backward()
        finally:
            ddp.module = inner
        for parameter in inner.parameters():
            parameter.grad = None


def rounds_restored_gradients(module: object, world: World) -> bool:
    """Return whether DDP rounds a gradient that was restored otherwise than one that has lasted.

    With gradient_as_bucket_view, a gradient that lasts is a part of a bucket and is divided by the
    number of ranks; another one is multiplied by its inverse, which is the same for powers of two.
    Where DDP regroups (see `fix_bucket_order`), it makes restored gradients parts of the buckets.
    """
    return world.size & (world.size - 1) != 0 and any(
        ddp.gradient_as_bucket_view
        and ddp.find_unused_parameters
        and not ddp._comm_hooks
        and any(parameter.grad is not None for parameter in ddp.module.parameters())
        for ddp in ddp_wrappers(module)
    )


@contextlib.contextmanager
def no_buffer_sync(modules: list[object]) -> Iterator[None]:
    """Keep forward passes from calling collectives while the block runs.

    So ranks may run different numbers of forward passes.
    """
    shells = [shell for module in modules for shell in ddp_wrappers(module)]
    before = [shell.require_forward_param_sync for shell in shells]
    try:
        for shell in shells:
            shell.require_forward_param_sync = False
        yield
    finally:
        for shell, value in zip(shells, before, strict=True):
            shell.require_forward_param_sync = value


def keeps_alike(obj: Any, held: Collection[int]) -> bool:
    """Return whether DDP keeps an object the same on all ranks, if it is let synchronise.

    This holds for a module in DDP, and for an optimizer all of whose parameters are `held`: the ids
    of the parameters in DDP modules.
    """
    inner = unwrap(obj)
    if isinstance(inner, Optimizer):
        return bool(held) and all(
            id(parameter) in held for group in inner.param_groups for parameter in group["params"]
        )
    return any(isinstance(shell, DistributedDataParallel) for shell in wrappers(obj))


def names_ignored(shell: DistributedDataParallel) -> set[str]:
    """Return the names that a module in DDP is set to ignore.

    DDP expects a dot before the names of parameters of the outermost module.
    """
    return {name.removeprefix(".") for name in shell.parameters_to_ignore}


def names_unsynchronised(shell: DistributedDataParallel) -> set[str]:
    """Return the names of what DDP lets differ by rank: what it ignores, and buffers if told so."""
    buffers = () if shell.broadcast_buffers else shell.module.named_buffers()
    return names_ignored(shell) | {name for name, _ in buffers}


def parameters_of(obj: Any) -> Iterator[nn.Parameter]:
    """Yield the parameters of the DDP modules in an object, without those that DDP ignores."""
    for shell in ddp_wrappers(obj):
        ignored = names_ignored(shell)
        for path, parameter in shell.module.named_parameters():
            if path not in ignored:
                yield parameter


def moments_of(obj: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors that an optimizer keeps for each parameter, in the order of these."""
    inner = unwrap(obj)
    for group in inner.param_groups if isinstance(inner, Optimizer) else ():
        for parameter in group["params"]:
            kept = inner.state.get(parameter)
            for value in kept.values() if isinstance(kept, Mapping) else ():
                if isinstance(value, torch.Tensor):
                    yield value


def copies_buffers(obj: Any) -> bool:
    """Return whether an object is a weight average that copies a module's buffers at each update.

    Such copies need not be kept, because DDP broadcasts the buffers again. Other averages that only
    equal the module now (many begin as a copy) may differ from it after the next step.
    """
    return getattr(obj, "copies_buffers", False) is True or (
        isinstance(obj, AveragedModel) and not obj.use_buffers
    )
