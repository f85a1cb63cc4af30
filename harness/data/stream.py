"""Iterable datasets: read in the main process, each rank its own, with a state of their own."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from harness.data.held_generators import Randomness
from harness.data.plan import Position, Share, kept_generators, seed_cpu, seed_of
from harness.data.source import Unasked
from harness.distributed.ranks import World
from harness.errors import UsageError

ENDLESS = sys.maxsize  # passes
BY_NUMBER = "or bring a dataset with __len__ and __getitem__"
ADVICE = {  # by the package that a stream comes from
    "torchdata": f"What its workers draw is in no state: num_workers=0 reads here, under the run's own generators; {BY_NUMBER}.",
    "datasets": f"Leave out .shuffle(): the content of its buffer is in no state. Shuffle the list of files or shards; {BY_NUMBER}.",
    "webdataset": f"torchdata's StatefulDataLoader(dataset, batch_size, …) counts what was read and skips it; {BY_NUMBER}.",
    "streaming": "Read it through streaming's StreamingDataLoader, which has both.",
}


@dataclass
class StreamSource(Unasked):
    """An iterable dataset with `state_dict` and `load_state_dict`."""

    dataset: Any
    world: World
    share_size: int  # items of a rank's share
    accumulate: int
    collate: Callable[[list[Any]], Any]
    seed: int
    samples_each: int = 1  # of an item: those of a loader are batches
    seeds_held: bool = True  # whether generators that the collate function holds are seeded for each share, as the global ones are
    tells_epoch: bool = True  # whether a dataset that can be told its epoch is told
    reading: Randomness = field(init=False)
    _collating: Randomness = field(init=False)
    _state: Any = None
    is_own = False

    def __post_init__(self) -> None:
        self.reading = Randomness({"dataset": self.dataset}, seeds_held=False)  # they may give the order, unless tried and found otherwise
        self._collating = Randomness({"collate_fn": self.collate}, self.seeds_held)

    def steps_after(self, position: Position, epochs: int) -> int | None:
        return None

    def state(self) -> Any:
        """The dataset's state right after the samples of the last share that was handed out."""
        return self._state

    def restore(self, state: Any) -> None:
        self._state = state
        if state is not None:
            self.dataset.load_state_dict(state)

    def shares(self, position: Position, epochs: int) -> Iterator[tuple[Share, list[Any]]]:
        """A pass ends on all ranks as soon as one has too little left for a share; what is left over is not used.

        To know whether a share is the last, the next one is read before it is handed out; the state is taken in between.
        """
        weights = (1 / self.accumulate,) * self.accumulate
        held: tuple[Position, list[Any], Any] | None = None
        for epoch in range(position.epoch, epochs):
            used = position.sample if epoch == position.epoch else 0
            iterator = begin_pass(self.dataset, epoch, self.seed, self.world.rank, tells_epoch=self.tells_epoch)
            self.reading.look(), self._collating.look()
            while (samples := self._next(iterator, epoch, used)) is not None:
                if held is not None:
                    yield self._hand_out(held, weights, last=False)
                used += self.share_size * self.samples_each * self.world.size
                held = Position(epoch, used), samples, copy.deepcopy(self.dataset.state_dict())
            for _ in iterator:  # the rest, on a rank whose stream is longer: the next pass begins at the beginning everywhere
                pass
            if held is not None:  # a pass is over: go on from the end of it, not from before the unused rest
                held = Position(epoch + 1, 0), held[1], copy.deepcopy(self.dataset.state_dict())
            elif epochs == ENDLESS and used == 0:
                raise UsageError(
                    f"a pass over {type(self.dataset).__name__} gives less than one step's share",
                    f"found: fewer than {self.share_size} item(s), on at least one rank",
                    "Take a smaller batch, or more data.",
                )
        if held is not None:
            yield self._hand_out(held, weights, last=True)

    def _next(self, iterator: Iterator[Any], epoch: int, used: int) -> list[Any] | None:
        """A share's samples, under randomness of their own: they are read before the step before them is made."""
        with kept_generators():
            self.reading.seed(self.seed, "stream", self.world.rank, epoch, used)
            samples = [sample for _, sample in zip(range(self.share_size), iterator, strict=False)]
        short = int(len(samples) < self.share_size)
        return None if self.world.agree([short])[0] else samples

    def _hand_out(self, held: tuple[Position, list[Any], Any], weights: tuple[float, ...], *, last: bool) -> tuple[Share, list[Any]]:
        after, samples, self._state = held
        size = self.share_size // self.accumulate
        with self._collating.kept():
            self._collating.seed_held(self.seed, "collate", self.world.rank, after.epoch, after.sample)
            batches = [self.collate(samples[at : at + size]) for at in range(0, self.share_size, size)]
        epoch = after.epoch - (after.sample == 0)
        return Share(epoch, after.sample, (), weights, after, last), batches


def begin_pass(dataset: Any, epoch: int, *parts: int | str, tells_epoch: bool) -> Iterator[Any]:
    """Its iterator over an epoch. What that draws at once, as a loader does for its workers, follows from epoch and parts: a run that goes
    on makes it anew."""
    if tells_epoch and (tell := told_epoch(dataset)) is not None:
        tell(epoch)
    with kept_generators():
        seed_cpu(seed_of("pass", epoch, *parts))
        return iter(dataset)


def told_epoch(dataset: Any) -> Callable[[int], object] | None:
    """How an iterable dataset, or the one that a loader reads, is told its epoch; None if it has no way."""
    return getattr(dataset, "set_epoch", getattr(getattr(dataset, "dataset", None), "set_epoch", None))


def check_resumable(dataset: Any) -> None:
    """Raises UsageError for an iterable dataset that cannot tell where it stands."""
    if not (hasattr(dataset, "load_state_dict") and _takes_nothing(getattr(dataset, "state_dict", None))):
        raise UsageError(
            f"{type(dataset).__name__} cannot resume: an iterable dataset needs state_dict() and load_state_dict()",
            remedy=advice(dataset)
            or "Add both (where the iterator stands, as plain values), or bring a dataset with __len__ and __getitem__.",
        )


def _takes_nothing(function: Any) -> bool:
    try:
        inspect.signature(function).bind()
    except TypeError:  # nothing to call, or not without arguments
        return False
    except ValueError:  # it does not tell
        return True
    return True


def advice(dataset: Any) -> str:
    """What to do about a stream of a package that many use, or ""."""
    packages = {owner.__module__.partition(".")[0] for owner in type(dataset).__mro__}
    return next((words for package, words in ADVICE.items() if package in packages), "")
