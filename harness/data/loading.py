"""From the order of samples to batches: each sample loaded under randomness of its own, by whichever process."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset, default_collate

from harness import preemption
from harness.data.epoch import tell
from harness.data.held_generators import Randomness
from harness.data.plan import Share, kept_generators, seed_of
from harness.data.source import Batches

Collate = Callable[[list[Any]], Any]


@dataclass(frozen=True)
class Workers:
    """The processes that load ahead, and what else a DataLoader wants to know of them."""

    number: int = 0
    init: Callable[[int], object] | None = None
    others: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    persistent: bool = False  # whether they outlive an epoch also where the loop is one over epochs

    def begin(self, number: int) -> None:
        """In each of them."""
        preemption.shield_loader_worker(number)
        if self.init is not None:
            self.init(number)


@dataclass(frozen=True)
class Question:
    """What is asked of the dataset in the place of a share."""

    ask: Callable[[Any], Any]


class _Dealt:
    """The sampler of a DataLoader that gives, each time, what it has been given."""

    items: Iterable[Share | Question] = ()

    def __iter__(self) -> Iterator[Share | Question]:
        return iter(self.items)


class _PlannedDataset(Dataset[Any]):
    """Turns a share into its micro-batches, each sample under randomness of its own."""

    def __init__(self, dataset: Any, collate: Collate, seed: int, *, seeds_held: bool = True, tells: bool = False) -> None:
        self.dataset, self.collate, self.seed = dataset, collate, seed
        self._tells, self._told = tells, -1  # whether the dataset is told of each epoch here, and of which it has been
        self.randomness = Randomness({"dataset": dataset, "collate_fn": collate}, seeds_held)
        self._looked_at: int | None = None  # the last epoch that was begun in this process
        self._is_new = True

    def __getitem__(self, share: Share | Question) -> Any:
        if isinstance(share, Question):
            return share.ask(self.dataset)
        if self._tells and share.epoch != self._told:
            tell(self.dataset, share.epoch)
            self._told = share.epoch
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
            "_told": -1,
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


_READING: weakref.WeakSet[Any] = weakref.WeakSet()  # passes over loaders, which have workers as long as they are there


def _end_workers() -> None:
    """End what is left of workers when this process exits: they do not heed the signal by which multiprocessing ends them, and waits."""
    for reading in list(_READING):
        if getattr(reading, "_workers", None):
            with contextlib.suppress(Exception):  # of one that was never whole
                reading._shutdown_workers()


class Loader:
    """Loads shares in order, ahead of their use if there are workers."""

    def __init__(
        self, dataset: Any, seed: int, collate: Collate | None, workers: Workers = Workers(), *,
        pin: bool = False, keeps: bool = False, tells: bool = False, seeds_held: bool = True,
    ) -> None:  # fmt: skip
        """`keeps`: the workers live until this object is dropped, not only for one `over`. `tells`: the dataset is told of each epoch.
        `seeds_held`: generators that it holds are seeded for each sample, as the global ones are."""
        self._planned = _PlannedDataset(dataset, collate or default_collate, seed, seeds_held=seeds_held, tells=tells)
        self._dealt = _Dealt()
        self._loader: DataLoader[Any] | None = None
        if workers.number == 0 and not pin:
            return
        self._loader = DataLoader(
            self._planned,
            batch_size=None,
            sampler=self._dealt,
            collate_fn=as_is,
            num_workers=workers.number,
            pin_memory=pin,
            worker_init_fn=workers.begin if workers.number else None,
            generator=torch.Generator().manual_seed(seed_of(seed, "loader")),  # else iter() draws from the global generator
            persistent_workers=keeps and workers.number > 0,
            **workers.others,
        )

    def over(self, items: Iterable[Share | Question]) -> Iterator[Any]:
        """Each share with its micro-batches, or the answer to a question. One at a time."""
        if self._loader is None:
            return map(self._planned.__getitem__, items)  # what a DataLoader does here, at less than its price
        self._dealt.items = items
        reading = iter(self._loader)
        _READING.add(reading)
        atexit.unregister(_end_workers)
        atexit.register(_end_workers)  # before what PyTorch and multiprocessing have registered so far
        return reading


def load(dataset: Any, shares: Iterable[Share], seed: int, collate: Collate | None, workers: Workers = Workers()) -> Batches:
    """Load the shares in order, once."""
    return Loader(dataset, seed, collate, workers).over(shares)


def is_iterable(dataset: object) -> bool:
    """Whether samples come from an iterator instead of by number."""
    return isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"))


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
