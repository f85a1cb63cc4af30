"""What a DataLoader is taken for: what is not taken over is refused, never dropped silently."""

from __future__ import annotations

import itertools
import sys
from typing import Any

import pytest
import torch
from torch.utils.data import (
    DataLoader,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    default_collate,
)
from torch.utils.data.distributed import DistributedSampler

from harness.data import dataset_source, loading
from harness.data.dataloader import adopt
from harness.data.dataset_source import MapSource
from harness.data.plan import Position
from harness.distributed.ranks import World
from harness.errors import UsageError

DATA = TensorDataset(torch.arange(40.0))


def source_of(loader: DataLoader) -> MapSource:
    """The source of a loop over the loader, begun."""
    adopted = adopt(loader)
    assert adopted is not None
    world = World(0, 1, torch.device("cpu"), 10)
    source = dataset_source.source(adopted.dataset, world, 1, 4, 1, adopted.batching)
    assert isinstance(source, MapSource)
    source.begin(Position(), None, print, by_epoch=False)
    return source


def numbers(source: MapSource, epochs: int = 1) -> list[int]:
    """What a loop over the source would train on; each sample is its number."""
    return [
        int(x)
        for _, batches in source.shares(Position(), epochs)
        for (batch,) in batches
        for x in batch
    ]


class Scaling(DataLoader):
    def __iter__(self):
        for (x,) in super().__iter__():
            yield (x * 100,)


class Filtering(DataLoader):
    def _get_iterator(self):
        return map(torch.neg, super()._get_iterator())


class Ordering(DataLoader):
    @property
    def _index_sampler(self):
        return [[3, 2], [1, 0]]


class Scaled(Scaling):
    pass


@pytest.mark.parametrize("kind", [Scaling, Filtering, Ordering, Scaled])
def test_a_loader_with_an_iteration_of_its_own_is_refused(kind):
    with pytest.raises(UsageError, match=f"{kind.__name__} iterates in a way of its own"):
        adopt(kind(DATA, 4))


def test_a_loader_whose_iterator_is_replaced_is_refused():
    loader = DataLoader(DATA, 4)
    vars(loader)["_get_iterator"] = lambda: iter([])
    with pytest.raises(UsageError, match="iterates in a way of its own"):
        adopt(loader)


def test_a_loader_that_only_sets_arguments_is_taken_over():
    class Collating(DataLoader):
        def __init__(self, data, size):
            super().__init__(data, size, collate_fn=self.put_together)

        def put_together(self, samples):
            return default_collate(samples)

        def __len__(self):
            return 3

    adopted = adopt(Collating(DATA, 4))
    assert adopted is not None and adopted.batch_size == 4
    assert adopted.batching.collate is not None


def test_a_loader_of_torchdata_is_taken_over():
    own = {"__module__": "torchdata.stateful_dataloader", "__iter__": lambda self: iter([])}
    assert adopt(type("StatefulDataLoader", (DataLoader,), own)(DATA, 4)) is not None


class Endless(Sampler):
    def __iter__(self):
        while True:
            yield from torch.randperm(40).tolist()


class EndlessOfKnownLength(Endless):
    def __len__(self):
        return 40


class EndlessAndSaysSo(Endless):
    def __len__(self):
        return sys.maxsize


class Counted(Sampler):
    def __iter__(self):
        return iter(range(0, 40, 2))


@pytest.mark.parametrize("kind", [Endless, EndlessOfKnownLength, EndlessAndSaysSo])
def test_a_sampler_that_never_ends_is_refused(kind):
    with pytest.raises(UsageError, match="never ends") as refused:
        source_of(DataLoader(DATA, 4, sampler=kind()))
    assert kind.__name__ in str(refused.value)


def test_an_order_that_never_ends_is_refused():
    endless: Any = itertools.count
    batching = loading.Batching(False, True, lambda _: endless(), None, loading.Workers())
    with pytest.raises(UsageError, match="never ends"):
        dataset_source.source(DATA, World(0, 1, torch.device("cpu"), 10), 1, 4, 1, batching)


def test_a_sampler_without_a_length_is_read_to_its_end():
    assert numbers(source_of(DataLoader(DATA, 4, sampler=Counted()))) == list(range(0, 40, 2))


@pytest.mark.parametrize(
    "sampler",
    [
        SequentialSampler(range(12)),
        RandomSampler(range(12), num_samples=40),
        DistributedSampler(range(12), num_replicas=1, rank=0),  # type: ignore[arg-type]
    ],
    ids=["in order", "drawn", "of one rank"],
)
def test_a_sampler_over_fewer_samples_than_the_dataset_keeps_to_them(sampler):
    found = numbers(source_of(DataLoader(DATA, 4, sampler=sampler)))
    assert len(found) == len(sampler) and set(found) == set(range(12))


def test_a_sampler_that_splits_fewer_samples_than_the_dataset_is_refused():
    sampler: Any = DistributedSampler(range(12), num_replicas=2, rank=0)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="12") as refused:
        adopt(DataLoader(DATA, 4, sampler=sampler))
    assert "Subset" in str(refused.value)
    adopted = adopt(DataLoader(Subset(DATA, range(12)), 4, sampler=sampler))
    assert adopted is not None and adopted.batching.order is None
