"""Sources of steps for map-style datasets and for loops that find their data themselves.

`MapSource` serves datasets with sample numbers, `OwnSource` serves loops that find their data
themselves. `StreamSource`, in `stream`, serves iterable datasets, which are read in the main
process and keep a state of their own on each rank. The function `source` chooses between
`MapSource` and `StreamSource`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch.utils.data import default_collate

from harness.data.given_order import KEPT, GivenOrder
from harness.data.loading import (
    Ask,
    Batching,
    Collate,
    Loader,
    Question,
    Workers,
    as_is,
    is_iterable,
)
from harness.data.plan import Border, Plan, Position, Share, seed_of
from harness.data.source import Batches, Bordered, InThisProcess, Say, takes_epoch
from harness.data.stream import StreamSource, check_resumable
from harness.distributed.ranks import World


@dataclass
class MapSource:
    """A source for a dataset with `__len__` and `__getitem__`."""

    dataset: Any
    plan: Plan
    collate: Collate | None
    workers: Workers
    pin: bool
    world: World
    # Whether generators that the dataset holds are seeded for each sample, as the global ones are.
    seeds_held: bool = True
    is_own = False
    _by_epoch: bool = False
    _loader: Loader | None = None  # kept if its workers outlive an epoch
    _say: Say = as_is

    def __post_init__(self) -> None:
        self._size, self._changed = len(self.dataset), set[str]()

    def begin(
        self,
        position: Position,
        epochs: int | None,
        before: Mapping[str, Any] | None,
        say: Say,
        *,
        by_epoch: bool,
    ) -> None:
        """Store the settings of the loop, restore a given order, and report its notice, if any."""
        self._by_epoch, self._say = by_epoch, say
        if isinstance(self.plan.order, GivenOrder) and (
            note := self.plan.order.begin(self.plan.ordered, position.epoch, epochs, before)
        ):
            say(note)

    def put_back(self) -> None:
        """Restore the state of the sampler of a given order once more."""
        if isinstance(self.plan.order, GivenOrder):
            self.plan.order.put_back()

    @property
    def _keeps(self) -> bool:
        """Return whether the workers live from the beginning of the loop to its end.

        In a loop over epochs, workers that are not persistent start with an epoch's inner loop, as
        with `iter(loader)`, so that they see what the outer loop has set.
        """
        return self.workers.persistent or not self._by_epoch

    @property
    def _tells(self) -> bool:
        """Return whether the process that loads the dataset calls its `set_epoch`.

        Otherwise the user's outer loop has to call it, as with a DataLoader.
        """
        return takes_epoch(self.dataset) and (
            not self._by_epoch or (self.workers.persistent and self.workers.number > 0)
        )

    def asked(self, ask: Ask) -> Any:
        """Evaluate `ask` on the dataset and the collate function, in a process that loads them.

        User code must not run in a process from which others are still to be forked. Without
        workers that is this process, otherwise the first worker. Where workers live for one epoch
        only, it is a single worker that ends after the answer.
        """
        if not self.workers.number:
            return ask(self.dataset, self.collate)
        loader = (
            self._kept()
            if self._keeps
            else self._begun(dataclasses.replace(self.workers, number=1))
        )
        (answer,) = loader.over([Question(ask)])
        return answer

    def _begun(self, workers: Workers) -> Loader:
        """Create a loader with these workers."""
        return Loader(
            self.dataset,
            self.plan.seed,
            self.collate,
            workers,
            pin=self.pin,
            keeps=self._keeps,
            tells=self._tells,
            seeds_held=self.seeds_held,
        )

    def _kept(self) -> Loader:
        """Return the loader that outlives an epoch; create it at the first call."""
        if self._loader is None:
            self._loader = self._begun(self.workers)
        return self._loader

    def close(self) -> None:
        """Drop the loader, which ends its workers."""
        self._loader = None

    def steps_after(self, position: Position, epochs: int) -> int | None:
        """Return the number of steps from `position` to the end of the last epoch."""
        return self.plan.steps_after(position, epochs)

    def shares(self, position: Position, epochs: int) -> Bordered:
        """Yield this rank's share of each step with its micro-batches.

        In a loop over epochs, a border comes before the shares of each epoch, and another one after
        an epoch of which no share is left.
        Nothing of an epoch is requested before the previous epoch is used up, wherever that makes
        a difference: in a loop over epochs, with a `set_epoch` that is called here, and with a
        given order. In all other cases the loader may load ahead into the next epoch.
        """
        try:
            if not (self._by_epoch or self._tells or self.plan.order):
                items = self._kept().over(self.plan.shares(position, epochs))
                for share, batches in self._looked_at(items):
                    if share.start == 0 and share.epoch:
                        self._look_at_size()
                    yield share, batches
                return
            while position.epoch < epochs:
                self._look_at_size()
                if self._by_epoch:
                    yield Border(position.epoch), []
                loader = self._kept() if self._keeps else self._begun(self.workers)
                plan, is_empty = self._planned(position.epoch), True
                for item in self._looked_at(loader.over(plan.of_epoch(position, epochs))):
                    is_empty = False
                    yield item
                if is_empty and self._by_epoch:
                    yield Border(position.epoch), []
                position = Position(position.epoch + 1)
        finally:
            self.close()

    def _looked_at(self, items: Iterator[Any]) -> Iterator[Any]:
        """Yield each share with its micro-batches; report what has changed in a worker, once."""
        for share, batches, *changed in items:
            if changed and (new := [path for path in changed[0] if path not in self._changed]):
                self._changed |= set(new)
                self._say(
                    f"changes in the worker processes that load samples: {', '.join(new[:10])}. It"
                    " begins anew in each worker, also after a restart. A cache does no harm; what"
                    " samples and batches depend on has to follow from their numbers, the epoch or"
                    " the generators"
                )
            yield share, batches

    def _planned(self, epoch: int) -> Plan:
        """Return the plan with the order of an epoch fixed, the same on all ranks.

        If the ranks' orders differ, rank 0's order is used, with a warning.
        Collective: every rank must call it.
        """
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
        """Warn if the dataset has grown or shrunk.

        The plan keeps the size that the dataset had when the loop began.
        """
        if (size := len(self.dataset)) != self._size:
            self._say(
                f"the dataset has {size} samples now, and {self._size} before: each epoch deals out"
                f" the {self.plan.size} of the loop's"
                " beginning; to train on others start again with resume.accept=[data], or in a new"
                " run directory"
            )
            self._size = size

    def kept(self, position: Position) -> dict[str, Any]:
        """Return the order if the checkpoint has to store it, else {}."""
        order = (
            self.plan.order.kept(position, self.plan.ordered)
            if isinstance(self.plan.order, GivenOrder)
            else {}
        )
        return {"kinds": {"order": KEPT}, "order": order} if order else {}

    def state(self) -> None:
        """Return None: the position is the whole state."""

    def restore(self, state: None) -> None:
        """Do nothing: the position is the whole state."""


class OwnSource(InThisProcess):
    """A source for a loop that finds its data itself.

    It counts steps as the samples of one endless epoch.
    """

    is_own = True

    def steps_after(self, position: Position, epochs: int) -> None:
        """Return None: the number of steps is unknown."""

    def shares(self, position: Position, epochs: int) -> Batches:
        """Yield one share for each step, without micro-batches, and without end."""
        for made in itertools.count(position.sample):
            yield Share(0, made, (), (1.0,), Position(0, made + 1), last=False), []

    def state(self) -> None:
        """Return None: the position is the whole state."""

    def restore(self, state: None) -> None:
        """Do nothing: the position is the whole state."""


def source(
    dataset: Any,
    world: World,
    seed: int,
    global_batch_size: int,
    accumulate: int,
    batching: Batching,
    *,
    seeds_held: bool = True,
) -> StreamSource | MapSource:
    """Return a `StreamSource` for an iterable dataset, else a `MapSource`.

    Args:
        dataset: The dataset.
        world: The ranks over which it is dealt out.
        seed: The seed of the order and of each sample's randomness.
        global_batch_size: The samples in one step, over all ranks.
        accumulate: The micro-batches in a rank's share of a step.
        batching: How the dataset is batched, ordered and loaded.
        seeds_held: Whether held generators are seeded too, as the global ones are.

    Raises:
        UsageError: A run could not resume exactly with this dataset or this batch size.
    """
    if is_iterable(dataset):
        check_resumable(dataset)
        rank, size = world.data_rank, world.data_size
        Plan(global_batch_size, global_batch_size, accumulate, rank, size, seed).check()
        items = global_batch_size // size // batching.samples_each
        collate, each = batching.collate or default_collate, batching.samples_each
        return StreamSource(dataset, world, items, accumulate, collate, seed, each, seeds_held)
    order = batching.order
    if order is not None and not isinstance(order, GivenOrder):
        order = GivenOrder(order, dataset=dataset)
    plan = Plan(
        len(dataset) if order is None else 0,
        global_batch_size,
        accumulate,
        world.data_rank,
        world.data_size,
        seed,
        batching.shuffle,
        batching.drop_last,
        order,
    )
    if order is not None:
        plan = dataclasses.replace(plan, size=order.length(plan.ordered))
    plan.check()
    pin = world.device.type == "cuda"
    return MapSource(dataset, plan, batching.collate, batching.workers, pin, world, seeds_held)
