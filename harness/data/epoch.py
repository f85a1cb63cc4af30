"""Datasets with a `set_epoch` method, which makes their samples differ between epochs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import ConcatDataset, StackDataset, Subset


def told_of_epochs(dataset: Any) -> bool:
    """Return whether the dataset, or a dataset that it is made of, has a `set_epoch`."""
    return any(True for _ in _listeners(dataset))


def tell(dataset: Any, epoch: int) -> None:
    """Call `set_epoch` of the dataset or, if it has none, of the datasets that it is made of."""
    for listener in _listeners(dataset):
        listener.set_epoch(epoch)


def _listeners(dataset: Any) -> Iterator[Any]:
    """Yield the datasets whose `set_epoch` has to be called."""
    if callable(getattr(dataset, "set_epoch", None)):
        yield dataset
    elif isinstance(dataset, Subset):
        yield from _listeners(dataset.dataset)
    elif isinstance(dataset, ConcatDataset | StackDataset):
        parts = dataset.datasets
        for part in parts.values() if isinstance(parts, dict) else parts:
            yield from _listeners(part)
