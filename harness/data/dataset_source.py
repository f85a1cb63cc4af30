"""Sources of steps: `MapSource` for datasets with sample numbers, `OwnSource` for loops that find their data themselves; `source` chooses.

`StreamSource`, for iterable datasets, which are read in the main process and keep a state of their own on each rank, is in `stream`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import default_collate

from harness.data.epoch import told_of_epochs
from harness.data.given_order import KEPT, GivenOrder
from harness.data.loading import Collate, Loader, Question, Workers, as_is, is_iterable
from harness.data.plan import Border, Plan, Position, Share, seed_of
from harness.data.source import Batches, Bordered, Say, Source, Unasked
from harness.data.stream import StreamSource, check_resumable
from harness.distributed.ranks import World


@dataclass
class MapSource:
    """A dataset with `__len__` and `__getitem__`."""

    dataset: Any
    plan: Plan
    collate: Collate | None
    workers: Workers
    pin: bool
    world: World
    seeds_held: bool = True  # whether generators that the dataset holds are seeded for each sample, as the global ones are
    is_own = False
    _by_epoch: bool = False
    _loader: Loader | None = None  # of workers that outlive an epoch
    _say: Say = as_is

    def __post_init__(self) -> None:
        self._size = len(self.dataset)

    def begin(self, position: Position, before: Mapping[str, Any] | None, say: Say, *, by_epoch: bool) -> None:
        self._by_epoch, self._say = by_epoch, say
        if isinstance(self.plan.order, GivenOrder) and (note := self.plan.order.begin(self.plan.ordered, position.epoch, before)):
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
        return Loader(
            self.dataset, self.plan.seed, self.collate, workers,
            pin=self.pin, keeps=self._keeps, tells=self._tells, seeds_held=self.seeds_held,
        )  # fmt: skip

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
        if not isinstance(given := self.plan.order, GivenOrder):
            return self.plan
        samples = self.plan.samples(epoch)
        if self.world.size > 1:
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
        order = self.plan.order.kept(position, self.plan.ordered) if isinstance(self.plan.order, GivenOrder) else {}
        return {"kinds": {"order": KEPT}, "order": order} if order else {}

    def state(self) -> None:
        """Nothing: the position says it all."""

    def restore(self, state: None) -> None:
        """Nothing: the position says it all."""


class OwnSource(Unasked):
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
    given = order if order is None or isinstance(order, GivenOrder) else GivenOrder(order, dataset=dataset)
    plan = Plan(size, global_batch_size, accumulate, world.rank, world.size, seed, shuffle, drop_last, given)
    if given is not None:
        plan = dataclasses.replace(plan, size=given.length(plan.ordered))
    plan.check()
    return MapSource(dataset, plan, collate, workers, world.device.type == "cuda", world, seeds_held)
