"""Datasets that are told of their epoch, and what differs from one epoch to the next."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import ConcatDataset, StackDataset, Subset


def told_of_epochs(dataset: Any) -> bool:
    """Whether it, or a dataset that it is made of, wants to be told of the epoch."""
    return any(True for _ in _listeners(dataset))


def tell(dataset: Any, epoch: int) -> None:
    """Tell it, and the datasets that it is made of, that an epoch begins."""
    for listener in _listeners(dataset):
        listener.set_epoch(epoch)


def _listeners(dataset: Any) -> Iterator[Any]:
    if callable(getattr(dataset, "set_epoch", None)):
        yield dataset
    elif isinstance(dataset, Subset):
        yield from _listeners(dataset.dataset)
    elif isinstance(dataset, ConcatDataset | StackDataset):
        parts = dataset.datasets
        for part in parts.values() if isinstance(parts, dict) else parts:
            yield from _listeners(part)
