"""Take over the settings of a user's DataLoader: dataset, batching, sample order and workers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import dataclass
from typing import Any

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    default_collate,
)
from torch.utils.data.distributed import DistributedSampler

from harness.data.given_order import GivenOrder
from harness.data.loading import Batching, Workers, as_first, is_iterable
from harness.errors import UsageError

KEPT = ("timeout", "prefetch_factor", "multiprocessing_context")
# The methods and properties of a DataLoader that are not called, because it is not iterated over.
NOT_CALLED = ("__iter__", "_get_iterator", "_index_sampler", "_auto_collation")


@dataclass(frozen=True)
class FromDataLoader:
    """The settings of a DataLoader that the harness takes over."""

    dataset: Any
    batch_size: int  # samples in one rank's micro-batch
    batching: Batching


def adopt(loader: object) -> FromDataLoader | None:
    """Return the settings of a DataLoader, or None for any other object.

    A DataLoader over an iterable dataset that has a `state_dict` itself (torchdata's
    StatefulDataLoader) becomes the dataset: it is read as a stream of batches.

    Raises:
        UsageError: A run could not find the samples again. The DataLoader has no fixed batch size,
            an iteration of its own, or a sampler that gives each rank a different order.
    """
    if not isinstance(loader, DataLoader):
        return None
    if (
        loader.batch_size is not None
        and is_iterable(loader.dataset)
        and hasattr(loader, "state_dict")
    ):
        # A loader with a state of its own is a stream of batches.
        stream = Batching(False, loader.drop_last, None, as_first, Workers(), loader.batch_size)
        return FromDataLoader(loader, loader.batch_size, stream)
    _check_iteration(loader)
    batches: Any = loader.batch_sampler
    if type(batches) is not BatchSampler and not _is_of_torchdata(type(batches)):
        raise UsageError(
            "this DataLoader does not batch samples by a number of its own, so no run could go on"
            " in the middle of it",
            f"found: batch_size={loader.batch_size}, a {type(batches).__name__} as batch_sampler",
            "Give its dataset to batches(), with the number of samples in an update, and their"
            " order, epoch by epoch, as order=.",
        )
    shuffle, order = (
        (False, None) if is_iterable(loader.dataset) else _order(batches.sampler, loader.dataset)
    )
    collate = None if loader.collate_fn is default_collate else loader.collate_fn
    others = {name: getattr(loader, name) for name in KEPT} if loader.num_workers else {}
    workers = Workers(loader.num_workers, loader.worker_init_fn, others, loader.persistent_workers)
    batching = Batching(shuffle, batches.drop_last, order, collate, workers)
    return FromDataLoader(loader.dataset, batches.batch_size, batching)


def _check_iteration(loader: DataLoader[Any]) -> None:
    """Refuse a DataLoader that iterates in a way of its own, which would be dropped silently.

    torchdata's iterates as torch's does, and counts meanwhile what it has read.

    Raises:
        UsageError: A class of the program, or of a library, overrides the iteration.
    """
    for name in NOT_CALLED:
        owner = next((cls for cls in type(loader).__mro__ if name in vars(cls)), DataLoader)
        if name in vars(loader) or not (owner is DataLoader or _is_of_torchdata(owner)):
            raise UsageError(
                f"{type(loader).__name__} iterates in a way of its own, and a DataLoader is taken"
                " apart: its batches are loaded without it, so that they can be found again",
                f"found: {name} of {owner.__module__}.{owner.__qualname__}",
                "Do what it does to samples in the dataset, what it does to batches in collate_fn"
                " or at the head of the loop, and give a plain DataLoader; their order is"
                " sampler= or order=.",
            )


def _is_of_torchdata(kind: type) -> bool:
    """Return whether a class is torchdata's: a loader or a sampler of torch's with a state."""
    return kind.__module__.startswith("torchdata.")


def _order(sampler: Any, dataset: Any) -> tuple[bool, Callable[[int], Sequence[int]] | None]:
    """Return whether to shuffle the samples, and the sampler's own order, if it has one.

    Raises:
        UsageError: The sampler gives each rank a different order, or a part of the dataset.
    """
    is_whole = _reads_all_of(sampler, dataset)
    if type(sampler) is SequentialSampler and is_whole:
        return False, None
    is_random = type(sampler) is RandomSampler or (
        _is_of_torchdata(type(sampler)) and hasattr(sampler, "replacement")
    )
    if is_random and is_whole and not sampler.replacement and sampler.num_samples == len(dataset):
        return True, None
    # The harness splits the samples over the ranks itself, whatever this sampler would do.
    if is_whole and (
        type(sampler) is DistributedSampler
        or (_is_of_torchdata(type(sampler)) and isinstance(sampler, DistributedSampler))
    ):
        return sampler.shuffle, None
    if getattr(sampler, "num_replicas", 1) == 1:
        return False, GivenOrder(lambda epoch: _at_epoch(sampler, epoch), sampler, dataset)
    raise UsageError(
        "this DataLoader's sampler splits the samples over the ranks, and so does the harness",
        f"found: a {type(sampler).__name__} for rank {getattr(sampler, 'rank', '?')}"
        f" of {sampler.num_replicas}"
        + (
            ""
            if is_whole
            else f", over {_samples_of(sampler)} samples; the dataset has {len(dataset)}"
        ),
        "Build it with num_replicas=1, rank=0 on every rank: the harness splits its order over the"
        " ranks."
        + ("" if is_whole else " Or give it and the DataLoader Subset(dataset, range(…))."),
    )


def _samples_of(sampler: Any) -> int | None:
    """Return the number of the samples over which one of torch's samplers goes, if it says so."""
    over = getattr(sampler, "data_source", getattr(sampler, "dataset", None))
    return len(over) if isinstance(over, Sized) else None


def _reads_all_of(sampler: Any, dataset: Any) -> bool:
    """Return whether a sampler goes over as many samples as the dataset has, as far as it says.

    A program may give a sampler other data than the DataLoader: range(10) for the first ten.
    """
    return _samples_of(sampler) in (None, len(dataset))


def _at_epoch(sampler: Any, epoch: int) -> Iterable[int]:
    """Return the sampler, set to an epoch."""
    if hasattr(sampler, "set_epoch"):
        sampler.set_epoch(epoch)
    return sampler  # type: ignore[no-any-return]
