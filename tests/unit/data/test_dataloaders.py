"""What a DataLoader is taken for: what is not taken over is refused, never dropped silently."""

from __future__ import annotations

import copy
import itertools
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    StackDataset,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)
from torch.utils.data.distributed import DistributedSampler

import harness
from harness.data import dataset_source, loading
from harness.data.dataloader import adopt
from harness.data.dataset_source import MapSource
from harness.data.plan import Position
from harness.data.sampler_state import SamplerState
from harness.distributed.ranks import World
from harness.errors import UsageError

DATA = TensorDataset(torch.arange(40.0))


def source_of(loader: DataLoader, position=Position(), epochs=2, size=4) -> MapSource:  # noqa: B008
    """The source of a loop over the loader, begun."""
    adopted = adopt(loader)
    assert adopted is not None
    world = World(0, 1, torch.device("cpu"), 10)
    source = dataset_source.source(adopted.dataset, world, 1, size, 1, adopted.batching)
    assert isinstance(source, MapSource)
    source.begin(position, epochs, None, print, by_epoch=False)
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


class AtOnce(Dataset):
    """Its samples are lists of the numbers below a number; a batch is as long as its longest."""

    pads, draws, shifts = False, False, 0.0

    def __len__(self):
        return 16

    def __getitem__(self, index):
        noise = torch.rand(()) if self.draws else torch.zeros(())
        return {"x": torch.arange(index + 1.0) + noise, "length": index + 1}

    def __getitems__(self, indices):
        samples = [self[index] for index in indices]
        if self.draws:
            samples = samples[::-1]
        for sample in samples:
            sample["length"] = np.int64(sample["length"])
            sample["x"] = sample["x"] + self.shifts
        return padded(samples) if self.pads else samples


class Shifting(AtOnce):
    shifts = 1.0


class Padding(AtOnce):
    pads = True


class Drawing(AtOnce):
    draws = True


def padded(samples):
    longest = max(len(sample["x"]) for sample in samples)
    for sample in samples:
        sample["x"] = nn.functional.pad(sample["x"], (0, longest - len(sample["x"])))
    return samples


def collated(samples):
    return default_collate(padded(samples))


def gives_back(samples):
    return samples


def begin(tmp_path, loader) -> None:
    run = harness.init(tmp_path / "run", seed=1, save_every_s=None)
    run.track(model=nn.Linear(1, 1))
    batches: Any = run.batches(loader, epochs=1)
    next(batches)
    batches.close()


@pytest.mark.parametrize(
    ("data", "collate"),
    [
        (Shifting(), collated),
        (Padding(), None),
        (Padding(), gives_back),
        (Subset(Shifting(), range(3, 9)), collated),
    ],
    ids=["other values", "padded", "padded and not collated", "inside a subset"],
)
@pytest.mark.usefixtures("process_as_it_was")
def test_a_dataset_that_gives_other_samples_at_once_is_refused(data, collate, tmp_path):
    with pytest.raises(UsageError, match="__getitems__ gives a DataLoader other samples"):
        begin(tmp_path, DataLoader(data, 4, collate_fn=collate))
    assert not (tmp_path / "run" / "attempts").exists(), "nothing was begun"


@pytest.mark.usefixtures("process_as_it_was")
def test_a_dataset_that_draws_and_gives_other_samples_at_once_is_warned_of(tmp_path, capsys):
    begin(tmp_path, DataLoader(Drawing(), 4, collate_fn=collated))
    assert "Drawing.__getitems__ gives a DataLoader other samples" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("data", "collate"),
    [
        (AtOnce(), collated),
        (Padding(), collated),
        (Subset(DATA, range(9)), None),
        (StackDataset(DATA, DATA), None),
    ],
    ids=["kinds of numbers", "padded again", "a subset", "a stack"],
)
@pytest.mark.usefixtures("process_as_it_was")
def test_nothing_is_said_where_batches_at_once_train_the_same(data, collate, tmp_path, capsys):
    begin(tmp_path, DataLoader(data, 4, collate_fn=collate))
    assert "__getitems__" not in capsys.readouterr().out


class Planned(Sampler):
    """A sampler with a plan for each of its epochs, and none for others."""

    def __init__(self, epochs=3, says=len):
        self.plans = [list(range(epoch, 40, 4)) for epoch in range(epochs)]
        self.epoch, self.order, self.says = 0, self.plans[0], says

    def set_epoch(self, epoch):
        self.says([epoch])
        self.epoch = epoch
        self.order = self.plans[epoch]

    def __len__(self):
        return len(self.order)

    def __iter__(self):
        return iter(self.order)


@pytest.mark.parametrize("epoch", [0, 2, 3], ids=["new", "in the last epoch", "finished"])
def test_a_sampler_is_asked_for_no_epoch_beyond_the_last_one(epoch):
    said: list[int] = []
    loader = DataLoader(DATA, 4, sampler=Planned(says=said.extend))
    source = source_of(loader, Position(epoch), epochs=3)
    assert set(said) <= {0, 1, 2}
    assert len(list(source.shares(Position(epoch), 3))) == 3 * (3 - epoch)
    if epoch < 3:
        next(source.shares(Position(epoch), 3))
        assert not source.kept(Position(epoch, 4)), "set_epoch gives the order of an epoch again"


def test_a_sampler_that_cannot_be_set_to_the_last_epoch_is_not_left_half_set():
    sampler = Planned(epochs=1)
    source = source_of(DataLoader(DATA, 4, sampler=sampler), Position(), epochs=3)
    assert (sampler.epoch, sampler.order) == (0, sampler.plans[0])
    assert numbers(source) == sampler.plans[0]


class Shared(Sampler):
    """A sampler one of whose attributes is a part of another one, and which gives the former."""

    def __init__(self, plans):
        self.order = plans[0]
        self.plans = plans

    def set_epoch(self, epoch):
        self.order = self.plans[epoch]

    def __len__(self):
        return 3

    def __iter__(self):
        return iter(self.order)


PLANS = [[0, 1, 2], [10, 11, 12], [20, 21, 22]]
AS: dict[str, Any] = {"lists": copy.deepcopy, "a tensor": torch.tensor, "an array": np.array}


@pytest.mark.parametrize("kind", AS)
def test_trying_an_epoch_changes_nothing_that_a_sampler_shares_with_itself(kind):
    sampler = Shared(AS[kind](PLANS))
    before = vars(sampler).copy()
    source = source_of(DataLoader(DATA, 3, sampler=sampler), epochs=3, size=3)
    assert all(vars(sampler)[name] is value for name, value in before.items())
    assert numbers(source, epochs=3) == [*PLANS[0], *PLANS[1], *PLANS[2]]


@pytest.mark.parametrize("kind", AS)
def test_a_restored_order_is_not_written_into_what_it_is_a_part_of(kind):
    sampler = Shared(AS[kind](PLANS))
    state = SamplerState(lambda epoch: [], sampler, None)
    assert state.put_back({"order": AS[kind]([7, 8, 9])}) == []
    assert [int(number) for number in sampler.order] == [7, 8, 9] and [
        [int(number) for number in plan] for plan in sampler.plans
    ] == PLANS


class Drawn(WeightedRandomSampler):
    def __init__(self):
        super().__init__([1.0] * 40, 40)
        self.first = self.weights[:3]


def test_restored_weights_are_still_those_of_the_program():
    weights, sampler = torch.ones(40), Drawn()
    sampler.weights, sampler.first = weights, weights[:3]
    state = SamplerState(lambda epoch: [], sampler, None)
    state.put_back({"weights": torch.arange(40.0), "first": torch.arange(3.0)})
    assert sampler.weights is weights and weights[39] == 39
    weights[1] = 5
    assert sampler.first[1] == 5
