"""Load batches in a given order of samples, each sample under its own seed, in any process."""

from __future__ import annotations

import atexit
import contextlib
import copy
import dataclasses
import weakref
from array import array
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
    default_collate,
    get_worker_info,
)

from harness.data.held_generators import Randomness
from harness.data.plan import Share, kept_generators, seed_of
from harness.data.source import Batches, tell
from harness.preemption import children

Collate = Callable[[list[Any]], Any]
Ask = Callable[[Any, Collate | None], Any]  # of a dataset and its collate function
Watch = Callable[[Any, Any], Callable[[], list[str]]]  # of both: a function that names changes


@dataclass(frozen=True)
class Workers:
    """The worker processes that load ahead, with further DataLoader options for them."""

    number: int = 0
    init: Callable[[int], object] | None = None
    others: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    persistent: bool = False  # whether they outlive an epoch even in a loop over epochs
    watch: Watch | None = None  # called in each worker

    def begin(self, number: int) -> None:
        """Initialise a worker process; called in each of them."""
        children.shield_loader_worker(number)
        if self.init is not None:
            self.init(number)


@dataclass(frozen=True)
class Batching:
    """How a dataset is batched, ordered and loaded. A stream heeds `collate` and `samples_each`."""

    shuffle: bool
    drop_last: bool  # whether the incomplete last batch of an epoch is dropped
    order: Callable[[int], Sequence[int]] | None  # epoch -> its sample numbers; overrides `shuffle`
    collate: Collate | None  # None: torch's `default_collate`
    workers: Workers
    samples_each: int = 1  # samples in one item of the dataset, if that is a stream


@dataclass(frozen=True)
class Question:
    """A question about the dataset and the collate function, sent in place of a share.

    It is pickled on its way to a worker, so it contains neither of them: a collate function often
    has no pickle.
    """

    ask: Ask


class _Dealt:
    """A sampler for a DataLoader that yields the items that were last assigned to it."""

    items: Iterable[Share | Question] = ()

    def __iter__(self) -> Iterator[Share | Question]:
        return iter(self.items)


class _PlannedDataset(Dataset[Any]):
    """A dataset that turns a share into its micro-batches, each sample under its own seed."""

    def __init__(
        self,
        dataset: Any,
        collate: Collate,
        seed: int,
        *,
        seeds_held: bool = True,
        tells: bool = False,
        watch: Watch | None = None,
    ) -> None:
        self.dataset, self.collate, self.seed = dataset, collate, seed
        self._watch, self._shares = watch, 0
        self._changed: Callable[[], list[str]] = list
        # Whether `set_epoch` of the dataset is called here, and the epoch of the last call.
        self._tells, self._epoch_set = tells, -1
        self.randomness = Randomness({"dataset": dataset, "collate_fn": collate}, seeds_held)
        self._looked_at: int | None = None  # the last epoch that was begun in this process
        self._is_new = True

    def __getitem__(self, share: Share | Question) -> Any:
        """Return the share, its micro-batches and `_changes`, or the answer to the question."""
        if isinstance(share, Question):
            return share.ask(
                self.dataset, None if self.collate is default_collate else self.collate
            )
        if self._tells and share.epoch != self._epoch_set:
            tell(self.dataset, share.epoch)
            self._epoch_set = share.epoch
        if self.collate is default_collate and (tensors := plain_tensors(self.dataset)) is not None:
            # This gives the same values as default_collate, a whole micro-batch at once. Nothing
            # here can draw a random number.
            return share, [
                _rows(tensors, _indices(self.dataset, micro)) for micro in share.micro_batches
            ]
        if share.epoch != self._looked_at:  # generators may be created anew for each epoch
            self._looked_at = share.epoch
            self.randomness.look()
        batches = []
        with kept_generators(), self.randomness.kept():
            for number, micro in enumerate(share.micro_batches):
                samples = [self._sample(share.epoch, sample) for sample in micro]
                self.randomness.seed(
                    self.seed, "collate", share.epoch, share.start, number, *micro[:1]
                )
                batches.append(self.collate(samples))
        return share, batches, *self._changes()

    def _changes(self) -> list[list[str]]:
        """Look for changes after shares 2, 4, 8 … of a worker; the first one sets objects up."""
        if self._watch is None or get_worker_info() is None:
            return []
        if self._shares == 0:
            self._changed = self._watch(self.dataset, self.collate)
        self._shares += 1
        return [self._changed()] if self._shares & (self._shares - 1) == 0 else []

    def _sample(self, epoch: int, sample: int) -> Any:
        """Load a sample under its own seed."""
        self.randomness.seed(self.seed, "sample", epoch, sample)
        value = self.dataset[sample]
        if self._is_new:
            self._is_new = False
            # The first sample may create generators, and has drawn from them unseeded.
            if self.randomness.look():
                return self._sample(epoch, sample)
        return value

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the generators: another process has others, and finds them."""
        return self.__dict__ | {
            "randomness": Randomness(self.randomness.roots, self.randomness.seeds_held),
            "_looked_at": None,
            "_is_new": True,
            "_epoch_set": -1,
        }


def plain_tensors(dataset: Any) -> tuple[torch.Tensor, ...] | None:
    """Return the tensors of a TensorDataset or of a Subset of one, else None.

    None also stands for tensors that are not dense and contiguous, and for subclasses, which may
    do more for a sample than to index tensors.
    """
    while type(dataset) is Subset:
        dataset = dataset.dataset
    if type(dataset) is not TensorDataset:
        return None
    plain = all(
        type(tensor) is torch.Tensor and tensor.layout is torch.strided and tensor.is_contiguous()
        for tensor in dataset.tensors
    )
    return dataset.tensors if plain else None


def _indices(dataset: Any, samples: Sequence[int]) -> Sequence[int]:
    """Map indices into a Subset, also a nested one, to indices into the dataset beneath it."""
    while type(dataset) is Subset:
        samples, dataset = [int(dataset.indices[sample]) for sample in samples], dataset.dataset
    return samples


def _rows(tensors: Sequence[torch.Tensor], samples: Sequence[int]) -> list[torch.Tensor]:
    """Return the rows of each tensor with these numbers.

    `frombuffer` takes a quarter of the time of `torch.tensor(list)`, and `index_select` two thirds
    of that of an index. It refuses negative numbers, some dtypes, and an index on another device.
    """
    rows = torch.frombuffer(array("q", samples), dtype=torch.int64)
    try:
        return [tensor.index_select(0, rows) for tensor in tensors]
    except (IndexError, RuntimeError):
        return [tensor[rows] for tensor in tensors]


def as_first(items: list[Any]) -> Any:
    """Return the first item; the collate function for items that are batches already."""
    return items[0]


def as_is(item: Any) -> Any:
    """Return the item unchanged."""
    return item


# Iterators of DataLoaders. Each has worker processes as long as it exists.
_READING: weakref.WeakSet[Any] = weakref.WeakSet()


def _end_workers() -> None:
    """End the remaining workers when this process exits.

    Workers do not react to the signal with which multiprocessing ends child processes at exit, and
    multiprocessing would wait for them.
    """
    for reading in list(_READING):
        with contextlib.suppress(Exception):  # half built, without workers, or another process's
            reading._workers[0].is_alive()  # raises AssertionError for a child of another process
            reading._shutdown_workers()


class Loader:
    """A loader of shares, in order, ahead of their use if there are workers."""

    def __init__(
        self,
        dataset: Any,
        seed: int,
        collate: Collate | None,
        workers: Workers = Workers(),
        *,
        pin: bool = False,
        keeps: bool = False,
        tells: bool = False,
        seeds_held: bool = True,
    ) -> None:
        """Create the loader.

        Args:
            dataset: The dataset.
            seed: The seed from which the randomness of each sample follows.
            collate: The collate function; None means torch's `default_collate`.
            workers: The worker processes; with none, shares are loaded in this process.
            pin: Whether batches are copied to pinned memory.
            keeps: Whether the workers live until this object is dropped; else each call of `over`
                starts its own.
            tells: Whether `set_epoch` of the dataset is called here for each epoch.
            seeds_held: Whether generators held by the dataset are seeded for each sample, as the
                global ones are.
        """
        options: dict[str, Any] = {"seeds_held": seeds_held, "tells": tells, "watch": workers.watch}
        self._planned = _PlannedDataset(dataset, collate or default_collate, seed, **options)
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
            # Without a generator, iter() would draw from the global one.
            generator=torch.Generator().manual_seed(seed_of(seed, "loader")),
            persistent_workers=keeps and workers.number > 0,
            # A drill may have taken the workers away, for which the other options were.
            **(workers.others if workers.number else {}),
        )

    def over(self, items: Iterable[Share | Question]) -> Iterator[Any]:
        """Return an iterator over the shares with their micro-batches, or answers to questions.

        Only one such iterator may be in use at a time.
        """
        if self._loader is None:
            # A DataLoader would do the same here, at a higher cost.
            return map(self._planned.__getitem__, items)
        self._dealt.items = items
        with children.loader_workers(), torch.device("cpu"):  # where iter() draws its seed
            reading = iter(self._loader)
        _READING.add(reading)
        atexit.unregister(_end_workers)
        # At exit it runs before what PyTorch and multiprocessing have registered so far.
        atexit.register(_end_workers)
        return reading


def load(
    dataset: Any,
    shares: Iterable[Share],
    seed: int,
    collate: Collate | None,
    workers: Workers = Workers(),
) -> Batches:
    """Load the shares in order, once.

    Args:
        dataset: The dataset.
        shares: The shares to load.
        seed: The seed from which the randomness of each sample follows.
        collate: The collate function; None means torch's `default_collate`.
        workers: The worker processes.
    """
    return Loader(dataset, seed, collate, workers).over(shares)


def is_iterable(dataset: object) -> bool:
    """Return whether samples come from an iterator instead of by number."""
    return isinstance(dataset, IterableDataset) or not (
        hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    )


def to_device(batch: Any, device: torch.device) -> Any:
    """Return the batch with every tensor in it copied to the device."""
    if device.type == "cpu":  # batches are on the CPU already
        return batch
    if isinstance(batch, torch.Tensor | PackedSequence):  # part of the latter stays on the CPU
        return batch.to(device, non_blocking=True)  # type: ignore[arg-type]
    moves = callable(getattr(batch, "to", None)) and not isinstance(batch, type)
    if isinstance(batch, dict | UserDict) or (isinstance(batch, Mapping) and not moves):
        return _as_before(batch, {key: to_device(value, device) for key, value in batch.items()})
    if isinstance(batch, list | tuple):
        there = [to_device(item, device) for item in batch]
        return type(batch)(*there) if hasattr(batch, "_fields") else type(batch)(there)
    if moves:  # a batch of graphs, for example
        for options in ({"non_blocking": True}, {}):
            with contextlib.suppress(TypeError):  # it may not take this option, or no device
                return batch.to(device, **options)
    return batch


def _as_before(batch: Mapping[Any, Any], there: dict[Any, Any]) -> Mapping[Any, Any]:
    """Return a mapping of the batch's kind, with its attributes, of what is on the device now."""
    if type(batch) is dict:
        return there
    with contextlib.suppress(Exception):  # user code; PyTorch's pin_memory tries the same
        if not isinstance(batch, MutableMapping):
            return type(batch)(there)  # type: ignore[call-arg]
        copied = copy.copy(batch)
        copied.update(there)
        return copied
    return there
