"""From the order of samples to batches: each sample loaded under randomness of its own, by whichever process.

A source yields one `Share` with its micro-batches after another. `MapSource` is for datasets with sample numbers,
`StreamSource` for iterable ones, which are read in the main process and keep a state of their own on each rank.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset, default_collate

from harness import stop
from harness.data.epoch import tell, told_of_epochs
from harness.data.given import Given
from harness.data.order import Border, Plan, Position, Share, kept_generators, seed_cpu, seed_of
from harness.errors import UsageError
from harness.ranks import World

Collate = Callable[[list[Any]], Any]
Batches = Iterator[tuple[Share, list[Any]]]
Say = Callable[[str], object]
Bordered = Iterator[tuple[Share | Border, list[Any]]]


@dataclass(frozen=True)
class Workers:
    """The processes that load ahead, and what else a DataLoader wants to know of them."""

    number: int = 0
    init: Callable[[int], object] | None = None
    others: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    persistent: bool = False  # whether they outlive an epoch also where the loop is one over epochs

    def begin(self, number: int) -> None:
        """In each of them."""
        stop.shield_loader_worker(number)
        if self.init is not None:
            self.init(number)


class Source(Protocol):
    """Where the steps of a loop come from."""

    is_own: bool  # whether the loop finds its data itself

    def begin(self, position: Position, before: Mapping[str, Any] | None, say: Say, *, by_epoch: bool) -> None:
        """Be told, before all that follows, where the run stands, what its checkpoint has of the data, and if its loop is over epochs."""

    def asked(self, ask: Callable[[Any], Any]) -> Any:
        """What `ask` says of the dataset, asked in a process that loads it: user code never runs where others are still to be forked."""

    def steps_after(self, position: Position, epochs: int) -> int | None:
        """How many steps are left from here to the end of the last epoch, if that is known."""

    def shares(self, position: Position, epochs: int) -> Bordered:
        """This rank's share of each of them, with its micro-batches; in a loop over epochs a border before each epoch's."""

    def kept(self, position: Position) -> dict[str, Any]:
        """What a checkpoint's data has to have beside the position, the same for all ranks. On every rank, at a step boundary."""

    def close(self) -> None:
        """Nothing more is asked for: end the processes that load."""

    def state(self) -> Any:
        """What this rank needs to go on, beside the position; plain data."""

    def restore(self, state: Any) -> None:
        """Take such a state over."""


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

    def __init__(self, dataset: Any, collate: Collate, seed: int, tells: bool = False) -> None:
        self.dataset, self.collate, self.seed = dataset, collate, seed
        self._tells, self._told = tells, -1  # whether the dataset is told of each epoch here, and of which it has been

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
        batches = []
        with kept_generators():
            for number, micro in enumerate(share.micro_batches):
                samples = []
                for sample in micro:
                    seed_cpu(seed_of(self.seed, "sample", share.epoch, sample))
                    samples.append(self.dataset[sample])
                seed_cpu(seed_of(self.seed, "collate", share.epoch, share.start, number, *micro[:1]))
                batches.append(self.collate(samples))
        return share, batches


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


def as_is(item: Any) -> Any:
    return item


class Loader:
    """Loads shares in order, ahead of their use if there are workers."""

    def __init__(
        self, dataset: Any, seed: int, collate: Collate | None, workers: Workers = Workers(), *,
        pin: bool = False, keeps: bool = False, tells: bool = False,
    ) -> None:  # fmt: skip
        """`keeps`: the workers live until this object is dropped, not only for one `over`. `tells`: the dataset is told of each epoch."""
        self._planned, self._dealt = _PlannedDataset(dataset, collate or default_collate, seed, tells), _Dealt()
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
        return iter(self._loader)


def load(dataset: Any, shares: Iterable[Share], seed: int, collate: Collate | None, workers: Workers = Workers()) -> Batches:
    """Load the shares in order, once."""
    return Loader(dataset, seed, collate, workers).over(shares)


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
    is_own = False
    _by_epoch: bool = False
    _loader: Loader | None = None  # of workers that outlive an epoch

    world: World | None = None
    _say: Say = as_is

    def begin(self, position: Position, before: Mapping[str, Any] | None, say: Say, *, by_epoch: bool) -> None:
        self._by_epoch, self._say, self._size = by_epoch, say, len(self.dataset)
        if isinstance(self.plan.order, Given) and (note := self.plan.order.begin(self.plan.ordered, position.epoch, before)):
            say(note)

    @property
    def _keeps(self) -> bool:
        """Whether the workers live from the beginning to the end. In a loop over epochs they begin with an epoch's inner loop, as
        `iter(loader)` does, so that they have what the outer loop has set."""
        return self.workers.persistent or not self._by_epoch

    @property
    def _tells(self) -> bool:
        """Whether the dataset is told of its epoch where it is loaded; elsewhere that is the outer loop's, as with a DataLoader."""
        return told_of_epochs(self.dataset) and (not self._by_epoch or (self.workers.persistent and self.workers.number > 0))

    def asked(self, ask: Callable[[Any], Any]) -> Any:
        """Without workers it is asked here; else the first of them is, or, where workers live for one epoch, one that ends with this."""
        if not self.workers.number:
            return ask(self.dataset)
        loader = self._kept() if self._keeps else self._begun(dataclasses.replace(self.workers, number=1))
        (answer,) = loader.over([Question(ask)])
        return answer

    def _begun(self, workers: Workers) -> Loader:
        return Loader(self.dataset, self.plan.seed, self.collate, workers, pin=self.pin, keeps=self._keeps, tells=self._tells)

    def _kept(self) -> Loader:
        if self._loader is None:
            self._loader = self._begun(self.workers)
        return self._loader

    def close(self) -> None:
        self._loader = None

    def steps_after(self, position: Position, epochs: int) -> int | None:
        return self.plan.steps_after(position, epochs)

    def shares(self, position: Position, epochs: int) -> Bordered:
        """Where something could tell the difference, nothing of an epoch is asked for before the one before it is used up."""
        try:
            if not (self._by_epoch or self._tells or self.plan.order):
                for share, batches in self._kept().over(self.plan.shares(position, epochs)):
                    if share.start == 0 and share.epoch:
                        self._look_at_size()
                    yield share, batches
                return
            while position.epoch < epochs:
                self._look_at_size()
                if self._by_epoch:
                    yield Border(position.epoch), []
                loader = self._kept() if self._keeps else self._begun(self.workers)
                yield from loader.over(self._planned(position.epoch).of_epoch(position, epochs))
                position = Position(position.epoch + 1)
        finally:
            self.close()

    def _planned(self, epoch: int) -> Plan:
        """The plan with an epoch's order in it: the same on all ranks. Collective: every rank must call it."""
        if not isinstance(given := self.plan.order, Given):
            return self.plan
        samples = self.plan.samples(epoch)
        if self.world is not None and self.world.size > 1:
            name = seed_of(*samples)
            if any(other != name for other in self.world.gather(name)):
                self._say("the ranks' samplers give unlike orders: that of rank 0 is dealt out")
                samples = self.world.gather(samples if self.world.is_writer else [])[0]
        given.begun(epoch, samples)
        return dataclasses.replace(self.plan, order=lambda _: samples)

    def _look_at_size(self) -> None:
        """Tell of a dataset that has grown or shrunk: it is dealt out as large as it was when the loop began."""
        if (size := len(self.dataset)) != self._size:
            self._say(
                f"the dataset has {size} samples now, and {self._size} before: each epoch deals out the {self.plan.size} of the loop's"
                " beginning; to train on others start again with resume.accept=[data], or in a new run directory"
            )
            self._size = size

    def kept(self, position: Position) -> dict[str, Any]:
        order = self.plan.order.kept(position, self.plan.ordered) if isinstance(self.plan.order, Given) else {}
        return {"kinds": {"order": "kept"}, "order": order} if order else {}

    def state(self) -> None:
        """Nothing: the position says it all."""

    def restore(self, state: None) -> None:
        """Nothing: the position says it all."""


class _Unasked:
    """A source whose dataset is read in this process, if there is any, and which is not told of borders."""

    def begin(self, position: Position, before: Mapping[str, Any] | None, say: Say, *, by_epoch: bool) -> None:
        """Nothing changes."""

    def kept(self, position: Position) -> dict[str, Any]:
        return {}

    def asked(self, ask: Callable[[Any], Any]) -> Any:
        return ask(getattr(self, "dataset", None))

    def close(self) -> None:
        """There is nothing to end."""


@dataclass
class StreamSource(_Unasked):
    """An iterable dataset with `state_dict` and `load_state_dict`; each rank reads its own, in the main process."""

    dataset: Any
    world: World
    share_size: int
    accumulate: int
    collate: Collate
    seed: int
    _state: Any = None
    is_own = False

    def steps_after(self, position: Position, epochs: int) -> int | None:
        return None

    def state(self) -> Any:
        """The dataset's state right after the samples of the last share that was handed out."""
        return self._state

    def restore(self, state: Any) -> None:
        self._state = state
        if state is not None:
            self.dataset.load_state_dict(state)

    def shares(self, position: Position, epochs: int) -> Batches:
        """A pass ends on all ranks as soon as one has too little left for a share; what is left over is not used.

        To know whether a share is the last, the next one is read before it is handed out; the state is taken in between.
        """
        weights = (1 / self.accumulate,) * self.accumulate
        held: tuple[Position, list[Any], Any] | None = None
        for epoch in range(position.epoch, epochs):
            used = position.sample if epoch == position.epoch else 0
            iterator = iter(self.dataset)
            while (samples := self._next(iterator, epoch, used)) is not None:
                if held is not None:
                    yield self._hand_out(held, weights, last=False)
                used += self.share_size * self.world.size
                held = Position(epoch, used), samples, copy.deepcopy(self.dataset.state_dict())
            for _ in iterator:  # the rest, on a rank whose stream is longer: the next pass begins at the beginning everywhere
                pass
            if held is not None:  # a pass is over: go on from the end of it, not from before the unused rest
                held = Position(epoch + 1, 0), held[1], copy.deepcopy(self.dataset.state_dict())
        if held is not None:
            yield self._hand_out(held, weights, last=True)

    def _next(self, iterator: Iterator[Any], epoch: int, used: int) -> list[Any] | None:
        """A share's samples, under randomness of their own: they are read before the step before them is made."""
        with kept_generators():
            seed_cpu(seed_of(self.seed, "stream", self.world.rank, epoch, used))
            samples = [sample for _, sample in zip(range(self.share_size), iterator, strict=False)]
        short = int(len(samples) < self.share_size)
        return None if self.world.agree([short])[0] else samples

    def _hand_out(self, held: tuple[Position, list[Any], Any], weights: tuple[float, ...], *, last: bool) -> tuple[Share, list[Any]]:
        after, samples, self._state = held
        size = self.share_size // self.accumulate
        batches = [self.collate(samples[at : at + size]) for at in range(0, self.share_size, size)]
        epoch = after.epoch - (after.sample == 0)
        return Share(epoch, after.sample, (), weights, after, last), batches


class OwnSource(_Unasked):
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
) -> Source:
    """What fits the dataset. Raises UsageError for a dataset or a batch size that a run could not go on with exactly."""
    if is_iterable(dataset):
        if not (hasattr(dataset, "state_dict") and hasattr(dataset, "load_state_dict")):
            raise UsageError(
                f"{type(dataset).__name__} cannot resume: an iterable dataset needs state_dict() and load_state_dict()",
                remedy="Add both (where the iterator stands, as plain values), or bring a dataset with __len__ and __getitem__.",
            )
        Plan(global_batch_size, global_batch_size, accumulate, world.rank, world.size, seed).check()
        return StreamSource(dataset, world, global_batch_size // world.size, accumulate, collate or default_collate, seed)
    size = len(dataset) if order is None else 0
    given = order if order is None or isinstance(order, Given) else Given(order, dataset=dataset)
    plan = Plan(size, global_batch_size, accumulate, world.rank, world.size, seed, shuffle, drop_last, given)
    if given is not None:
        plan = dataclasses.replace(plan, size=given.length(plan.ordered))
    plan.check()
    return MapSource(dataset, plan, collate, workers, world.device.type == "cuda", world=world)


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
