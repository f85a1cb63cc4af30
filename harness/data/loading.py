"""From the order of samples to batches: each sample loaded under randomness of its own, by whichever process.

A source yields one `Share` with its micro-batches after another. `MapSource` is for datasets with sample numbers,
`StreamSource` for iterable ones, which are read in the main process and keep a state of their own on each rank.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset, default_collate

from harness import stop
from harness.data.held import Randomness
from harness.data.order import Plan, Position, Share, kept_generators, seed_of
from harness.data.stream import StreamSource, check_resumable
from harness.ranks import World

Collate = Callable[[list[Any]], Any]
Batches = Iterator[tuple[Share, list[Any]]]


@dataclass(frozen=True)
class Workers:
    """The processes that load ahead, and what else a DataLoader wants to know of them."""

    number: int = 0
    init: Callable[[int], object] | None = None
    others: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def begin(self, number: int) -> None:
        """In each of them."""
        stop.shield_loader_worker(number)
        if self.init is not None:
            self.init(number)


class Source(Protocol):
    """Where the steps of a loop come from."""

    is_own: bool  # whether the loop finds its data itself

    def steps_after(self, position: Position, epochs: int) -> int | None:
        """How many steps are left from here to the end of the last epoch, if that is known."""

    def shares(self, position: Position, epochs: int) -> Batches:
        """This rank's share of each of them, with its micro-batches."""

    def state(self) -> Any:
        """What this rank needs to go on, beside the position; plain data."""

    def restore(self, state: Any) -> None:
        """Take such a state over."""


class _PlannedDataset(Dataset[Any]):
    """Turns a share into its micro-batches, each sample under randomness of its own."""

    def __init__(self, dataset: Any, collate: Collate, seed: int, seeds_held: bool = True) -> None:
        self.dataset, self.collate, self.seed = dataset, collate, seed
        self.randomness = Randomness({"dataset": dataset, "collate_fn": collate}, seeds_held)
        self._looked_at: int | None = None  # the last epoch that was begun in this process
        self._is_new = True

    def __getitem__(self, share: Share) -> tuple[Share, list[Any]]:
        if self.collate is default_collate and (tensors := plain_tensors(self.dataset)) is not None:
            # default_collate's very values, a whole micro-batch at once, and nothing here can draw a random number.
            numbers = [torch.tensor(_numbers(self.dataset, micro)) for micro in share.micro_batches]
            return share, [[tensor[micro] for tensor in tensors] for micro in numbers]
        if share.epoch != self._looked_at:  # generators may be made anew for each epoch
            self._looked_at = share.epoch
            self.randomness.look()
        batches = []
        with kept_generators(), self.randomness.kept():
            for number, micro in enumerate(share.micro_batches):
                samples = [self._sample(share.epoch, sample) for sample in micro]
                self.randomness.seed(self.seed, "collate", share.epoch, share.start, number, *micro[:1])
                batches.append(self.collate(samples))
        return share, batches

    def _sample(self, epoch: int, sample: int) -> Any:
        self.randomness.seed(self.seed, "sample", epoch, sample)
        value = self.dataset[sample]
        if self._is_new:
            self._is_new = False
            if self.randomness.look():  # made with the first sample, which has drawn from it
                return self._sample(epoch, sample)
        return value

    def __getstate__(self) -> dict[str, Any]:
        """Another process looks for itself: its generators are others."""
        return self.__dict__ | {
            "randomness": Randomness(self.randomness.roots, self.randomness.seeds_held),
            "_looked_at": None,
            "_is_new": True,
        }


def plain_tensors(dataset: Any) -> tuple[torch.Tensor, ...] | None:
    """The tensors of a TensorDataset, or of a part of one; None for whatever may do more for a sample than to index tensors."""
    while type(dataset) is Subset:
        dataset = dataset.dataset
    if type(dataset) is not TensorDataset:
        return None
    plain = all(type(tensor) is torch.Tensor and tensor.layout is torch.strided and tensor.is_contiguous() for tensor in dataset.tensors)
    return dataset.tensors if plain else None


def _numbers(dataset: Any, samples: Sequence[int]) -> Sequence[int]:
    """The samples' numbers in the TensorDataset that this is a part of."""
    while type(dataset) is Subset:
        samples, dataset = [int(dataset.indices[sample]) for sample in samples], dataset.dataset
    return samples


def as_first(items: list[Any]) -> Any:
    return items[0]


def as_is(item: Any) -> Any:
    return item


def load(
    dataset: Any, shares: Iterable[Share], seed: int, collate: Collate | None, workers: Workers = Workers(), *, pin: bool = False,
    seeds_held: bool = True,
) -> Batches:  # fmt: skip
    """Load the shares in order, ahead of their use if there are workers."""
    planned = _PlannedDataset(dataset, collate or default_collate, seed, seeds_held)
    if workers.number == 0 and not pin:
        return map(planned.__getitem__, shares)  # what a DataLoader does here, at less than its price
    loader: DataLoader[Any] = DataLoader(
        planned,
        batch_size=None,
        sampler=shares,
        collate_fn=as_is,
        num_workers=workers.number,
        pin_memory=pin,
        worker_init_fn=workers.begin if workers.number else None,
        generator=torch.Generator().manual_seed(seed_of(seed, "loader")),  # else iter() draws from the global generator
        **workers.others,
    )
    return iter(loader)


def is_iterable(dataset: object) -> bool:
    """Whether samples come from an iterator instead of by number."""
    return isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"))


@dataclass
class MapSource:
    """A dataset with `__len__` and `__getitem__`."""

    dataset: Any
    plan: Plan
    collate: Collate | None
    workers: Workers
    pin: bool
    seeds_held: bool = True  # whether generators that the dataset holds are seeded for each sample, as the global ones are
    is_own = False

    def steps_after(self, position: Position, epochs: int) -> int | None:
        return self.plan.steps_after(position, epochs)

    def shares(self, position: Position, epochs: int) -> Batches:
        shares = self.plan.shares(position, epochs)
        return load(self.dataset, shares, self.plan.seed, self.collate, self.workers, pin=self.pin, seeds_held=self.seeds_held)

    def state(self) -> None:
        """Nothing: the position says it all."""

    def restore(self, state: None) -> None:
        """Nothing: the position says it all."""


class OwnSource:
    """For a loop that finds its data itself: steps are counted, as the samples of one endless epoch."""

    is_own = True

    def steps_after(self, position: Position, epochs: int) -> None:
        """Nobody knows."""

    def shares(self, position: Position, epochs: int) -> Batches:
        for made in itertools.count(position.sample):
            yield Share(0, made, (), (1.0,), Position(0, made + 1), last=False), []

    def state(self) -> None:
        """Nothing: the position says it all."""

    def restore(self, state: None) -> None:
        """Nothing: the position says it all."""


def source(
    dataset: Any,
    world: World,
    seed: int,
    global_batch_size: int,
    *,
    accumulate: int,
    shuffle: bool,
    drop_last: bool,
    order: Callable[[int], Sequence[int]] | None,
    collate: Collate | None,
    workers: Workers,
    seeds_held: bool = True,
    samples_each: int = 1,
) -> Source:
    """What fits the dataset. Raises UsageError for a dataset or a batch size that a run could not go on with exactly."""
    if is_iterable(dataset):
        check_resumable(dataset)
        Plan(global_batch_size, global_batch_size, accumulate, world.rank, world.size, seed).check()
        items = global_batch_size // world.size // samples_each
        return StreamSource(dataset, world, items, accumulate, collate or default_collate, seed, samples_each, seeds_held)
    size = len(dataset) if order is None else 0
    plan = Plan(size, global_batch_size, accumulate, world.rank, world.size, seed, shuffle, drop_last, order)
    if order is not None:
        plan = dataclasses.replace(plan, size=len(plan.ordered(0)))
    plan.check()
    return MapSource(dataset, plan, collate, workers, world.device.type == "cuda", seeds_held)


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with every tensor in it on the device."""
    if device.type == "cpu":  # then there is no other
        return batch
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(item, device) for item in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(to_device(item, device) for item in batch)
    return batch
