"""Evaluate on all ranks: each sample once, no padded duplicates, no effect on the training."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from harness import state
from harness.data import loading
from harness.data.plan import Position, Share
from harness.distributed import ddp
from harness.distributed.ranks import World
from harness.distributed.shared_tensors import writers_buffers
from harness.errors import UsageError
from harness.run.usage_checks import check_loggable


def evaluate(
    world: World,
    tracked: list[Any],
    dataset: Any,
    fn: Callable[[Any], Mapping[str, Any]],
    batch_size: int,
    collate: loading.Collate | None,
    beat: Callable[[], object],
) -> dict[str, float]:
    """Return the means over all samples of the sums that `fn` returns for each batch.

    Collective: every rank must call it.

    Args:
        world: The ranks; each one evaluates a contiguous part of the samples.
        tracked: The tracked objects; their modules are in eval mode meanwhile.
        dataset: A dataset with `__len__` and `__getitem__`.
        fn: Function from a batch on the device to named sums over its samples.
        batch_size: Samples in one batch of one rank.
        collate: Collate function; None for the default one.
        beat: Called before each batch.

    Raises:
        UsageError: `fn` uses a name that every event has, or the ranks' datasets have unlike sizes.
    """
    modules = [module for obj in tracked for module in _modules_of(obj)]
    sums: dict[str, float] = {}
    samples = range(
        world.rank * len(dataset) // world.size, (world.rank + 1) * len(dataset) // world.size
    )
    with contextlib.ExitStack() as meanwhile:
        meanwhile.enter_context(state.kept_generators())
        meanwhile.enter_context(writers_buffers(modules, world))
        meanwhile.enter_context(_eval_mode(modules))
        meanwhile.enter_context(torch.no_grad())
        meanwhile.enter_context(ddp.no_buffer_sync(list(modules)))
        for _, batches in loading.load(dataset, _shares(samples, batch_size), 0, collate):
            beat()
            for name, value in fn(loading.to_device(batches[0], world.device)).items():
                sums[name] = sums.get(name, 0.0) + float(value)
    check_loggable(sums)
    sizes, parts = zip(*world.gather((len(dataset), sums)), strict=True)
    if len(set(sizes)) > 1:
        raise UsageError(
            "the ranks were not given the same data to evaluate",
            f"found: {', '.join(map(str, sizes))} samples, by rank",
            "Give every rank the whole dataset: evaluate() gives each rank its share of it.",
        )
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: sum(part.get(name, 0.0) for part in parts) / len(dataset) for name in names}


def _modules_of(obj: Any) -> Iterator[nn.Module]:
    """Yield a tracked module, or the module inside a tracked average of weights."""
    inner = obj if isinstance(obj, nn.Module) else getattr(obj, "module", None)
    if isinstance(inner, nn.Module):
        yield inner


def _shares(samples: range, batch_size: int) -> Iterator[Share]:
    for at in range(0, len(samples), batch_size):
        yield Share(
            0, samples[at], (tuple(samples[at : at + batch_size]),), (1.0,), Position(), last=False
        )


@contextlib.contextmanager
def _eval_mode(modules: list[nn.Module]) -> Iterator[None]:
    """Put modules into eval mode; restore the mode of each submodule, also after an exception."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for part, training in modes:
            part.training = training
