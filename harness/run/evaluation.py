"""Evaluate on all ranks: each sample once, no padded duplicates, no effect on the training."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from harness import state
from harness.config.rules import COUNT
from harness.data import loading
from harness.data.dataloader import adopt
from harness.data.plan import Position, Share
from harness.distributed import ddp, dtensors
from harness.distributed.ranks import World
from harness.distributed.shared_tensors import writers_buffers
from harness.errors import UsageError
from harness.monitoring.metric_buffer import check_loggable


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
        dataset: A dataset with `__len__` and `__getitem__`, or a DataLoader, whose settings count.
        fn: Function from a batch on the device to named sums over its samples.
        batch_size: Samples in one batch of one rank.
        collate: Collate function; None for the default one.
        beat: Called before each batch.

    Raises:
        UsageError: There is no such dataset, `fn` does not return sums by name, or uses a name that
            every event has, or the ranks' datasets have unlike sizes.
    """
    dataset, batch_size, collate, workers = _adopted(dataset, batch_size, collate)
    _check(dataset, fn, batch_size, collate)
    modules = [module for obj in tracked for module in _modules_of(obj)]
    sums: dict[str, float] = {}
    own = list(_shares(len(dataset), world.data_rank, world.data_size, batch_size))
    more = _surplus(modules, len(dataset), world, batch_size)
    with contextlib.ExitStack() as meanwhile:
        meanwhile.enter_context(state.kept_generators())
        if world.data_size == world.size:  # else a buffer may belong to a rank's part of a layer
            meanwhile.enter_context(writers_buffers(modules, world))
        meanwhile.enter_context(_eval_mode(modules))
        meanwhile.enter_context(torch.no_grad())
        meanwhile.enter_context(ddp.no_buffer_sync(list(modules)))
        for number, (_, batches) in enumerate(
            loading.load(dataset, [*own, *more], 0, collate, workers)
        ):
            beat()
            found = _sums(fn(loading.to_device(batches[0], world.device)))
            for name, value in found.items() if number < len(own) else ():
                sums[name] = sums.get(name, 0.0) + float(value)
    dtensors.reshard(modules)
    return _means(world, len(dataset), sums)


def _means(world: World, size: int, sums: Mapping[str, float]) -> dict[str, float]:
    """Return the means over all samples from each rank's sums.

    Collective: every rank must call it. Raises UsageError if the ranks' datasets have unlike sizes.
    """
    sizes, everyones = zip(*world.gather((size, sums)), strict=True)
    _check_sizes(sizes)
    # Ranks with the same data rank have evaluated the same samples: one of them counts.
    ranks = world.data_ranks
    parts = [part for rank, part in enumerate(everyones) if ranks.index(ranks[rank]) == rank]
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: sum(part.get(name, 0.0) for part in parts) / size for name in names}


def _adopted(
    dataset: Any, batch_size: int, collate: loading.Collate | None
) -> tuple[Any, int, loading.Collate | None, loading.Workers]:
    """Return what to evaluate, and how: as given, or as a DataLoader says.

    Raises:
        UsageError: A DataLoader gives its samples in a way of its own, or some of them only.
    """
    found = adopt(dataset)
    if found is None:
        return dataset, batch_size, collate, loading.Workers()
    if found.batching.order is not None or loading.is_iterable(found.dataset):
        raise UsageError(
            "evaluate() gives each sample of a dataset once",
            f"found: a DataLoader with a {type(getattr(dataset, 'sampler', None)).__name__}, over"
            f" a {type(found.dataset).__name__}",
            "Give a dataset: evaluate(Subset(dataset, numbers), fn, batch_size=…).",
        )
    batching = found.batching
    return found.dataset, found.batch_size, batching.collate, batching.workers


def _check(dataset: Any, fn: Any, batch_size: Any, collate: Any) -> None:
    """Raise UsageError for arguments of other kinds than `evaluate` takes."""
    wrong = [
        f"found: {name}={value!r:.80}, expected: {expected}"
        for name, value, is_right, expected in (
            (
                "dataset",
                dataset,
                not isinstance(dataset, type) and not loading.is_iterable(dataset),
                "a dataset with __len__ and __getitem__, or a DataLoader of one",
            ),
            ("fn", fn, callable(fn), "a function from a batch to sums over its samples"),
            ("batch_size", batch_size, COUNT.holds(batch_size), COUNT.allowed),
            ("collate_fn", collate, collate is None or callable(collate), "a function, or None"),
        )
        if not is_right
    ]
    if wrong:
        raise UsageError(
            "evaluate() takes a dataset and a function",
            "\n".join(wrong),
            'As in run.evaluate(held_out, lambda batch: {"val_loss": loss(model, batch)}).',
        )


def _sums(found: Any) -> Mapping[str, Any]:
    """Return what the function gave for a batch.

    Raises:
        UsageError: It is no dict of numbers, or a name is one that every event has.
    """
    if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
        raise UsageError(
            "the function given to evaluate() returns sums by name",
            f"found: {found!r:.200}",
            'Let it return a dict of numbers: {"val_loss": loss.sum()}.',
        )
    check_loggable(found, "evaluate")
    return found


def _modules_of(obj: Any) -> Iterator[nn.Module]:
    """Yield a tracked module, or the module inside a tracked average of weights."""
    inner = obj if isinstance(obj, nn.Module) else getattr(obj, "module", None)
    if isinstance(inner, nn.Module):
        yield inner


def _check_sizes(sizes: Sequence[int]) -> None:
    """Raise UsageError if the ranks' datasets have unlike sizes."""
    if len(set(sizes)) > 1:
        raise UsageError(
            "the ranks were not given the same data to evaluate",
            f"found: {', '.join(map(str, sizes))} samples, by rank",
            "Give every rank the whole dataset: evaluate() gives each rank its share of it.",
        )


def _surplus(modules: list[nn.Module], size: int, world: World, batch_size: int) -> list[Share]:
    """Return the batches that this rank makes beyond its own; their results do not count.

    A forward pass of a sharded module is a collective, so all ranks make as many.

    Raises:
        UsageError: The ranks' datasets have unlike sizes.
    """
    if not dtensors.holds_sharded(modules):
        return []
    _check_sizes(world.gather(size))
    counts = [
        sum(1 for _ in _shares(size, rank, world.data_size, batch_size))
        for rank in range(world.data_size)
    ]
    first = Share(0, 0, ((0,),), (1.0,), Position(), last=False)
    return [first] * (max(counts) - counts[world.data_rank])


def _shares(size: int, rank: int, ranks: int, batch_size: int) -> Iterator[Share]:
    """Yield the batches of a rank's part of a dataset of that size."""
    samples = range(rank * size // ranks, (rank + 1) * size // ranks)
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
