"""Iterable datasets: each rank reads its own in the main process, and saves the dataset's state."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from harness.data.fingerprint import content_digest
from harness.data.held_generators import Randomness
from harness.data.plan import Border, Position, Share, kept_generators, seed_cpu, seed_of
from harness.data.source import ENDLESS, Bordered, InThisProcess, Say
from harness.distributed.ranks import World
from harness.errors import UsageError

BY_NUMBER = "or bring a dataset with __len__ and __getitem__"
ADVICE = {  # by the package that a stream comes from
    "torchdata": "What its workers draw is in no state: num_workers=0 reads here, under the run's"
    f" own generators; {BY_NUMBER}.",
    "datasets": "Leave out .shuffle(): the content of its buffer is in no state. Shuffle the list"
    f" of files or shards; {BY_NUMBER}.",
    "webdataset": "torchdata's StatefulDataLoader(dataset, batch_size, …) counts what was read and"
    f" skips it; {BY_NUMBER}.",
    "streaming": "Read it through streaming's StreamingDataLoader, which has both.",
}


@dataclass
class StreamSource(InThisProcess):
    """A source for an iterable dataset with `state_dict` and `load_state_dict`."""

    dataset: Any
    world: World
    share_size: int  # items in a rank's share of a step
    accumulate: int
    collate: Callable[[list[Any]], Any]
    seed: int
    samples_each: int = 1  # samples in an item; the items of a loader are batches
    # Whether generators held by the collate function are seeded for each share, as the global ones.
    seeds_held: bool = True
    tells_epoch: bool = True  # whether to call the dataset's `set_epoch`, if it has one
    reading: Randomness = field(init=False)
    _collating: Randomness = field(init=False)
    _state: Any = None
    _by_epoch: bool = False
    _is_compared: bool = False
    is_own = False

    def __post_init__(self) -> None:
        # Held generators may determine the order: they are seeded only if the stream check shows
        # that this is exact.
        self.reading = Randomness({"dataset": self.dataset}, seeds_held=False)
        self._collating = Randomness({"collate_fn": self.collate}, self.seeds_held)

    def begin(
        self,
        position: Position,
        epochs: int | None,
        before: Mapping[str, Any] | None,
        say: Say,
        *,
        by_epoch: bool,
    ) -> None:
        """Store whether the user's loop is one over epochs."""
        self._by_epoch = by_epoch

    def steps_after(self, position: Position, epochs: int) -> int | None:
        """Return None: the length of a stream is unknown."""
        return None

    def state(self) -> Any:
        """Return the dataset's state right after the samples of the share handed out last."""
        return self._state

    def restore(self, state: Any) -> None:
        """Load a state into the dataset, unless it is None."""
        self._state = state
        if state is not None:
            # A dataset may go on in the very containers that it is given.
            self.dataset.load_state_dict(copy.deepcopy(state))

    def shares(self, position: Position, epochs: int) -> Bordered:
        """Yield this rank's share of each step with its micro-batches, pass after pass.

        A pass ends on all ranks as soon as one of them has too few items left for a share. The
        remaining items are not used. To know whether a share is the last one, the next share is
        read before it is handed out. The state is captured in between.

        In a loop over epochs, a border comes before anything of a pass is read.

        Raises:
            UsageError: `epochs` is `ENDLESS`, and the first pass gives less than one share.
        """
        weights = (1 / self.accumulate,) * self.accumulate
        held: tuple[Position, list[Any], Any] | None = None
        for epoch in range(position.epoch, epochs):
            used = position.sample if epoch == position.epoch else 0
            if self._by_epoch:
                if held is not None:
                    yield self._hand_out(held, weights, last=False)
                    held = None
                yield Border(epoch), []
                if used:  # the outer loop has begun this pass once more; the state is from after
                    self.restore(self._state)
            iterator = self._pass(epoch)
            while (samples := self._next(iterator, epoch, used)) is not None:
                self._check_alike(samples)
                if held is not None:
                    yield self._hand_out(held, weights, last=False)
                used += self.share_size * self.samples_each * self.world.data_size
                held = Position(epoch, used), samples, copy.deepcopy(self.dataset.state_dict())
            # Read the rest on a rank whose stream is longer, so that the next pass begins at the
            # beginning on every rank.
            for _ in iterator:
                pass
            # The pass is over: a resume starts from its end, not from before the unused rest.
            if held is not None:
                held = Position(epoch + 1, 0), held[1], copy.deepcopy(self.dataset.state_dict())
            elif self._by_epoch:
                yield Border(epoch), []
            elif epochs == ENDLESS and used == 0:
                raise self._too_few()
        if held is not None:
            yield self._hand_out(held, weights, last=True)

    def _pass(self, epoch: int) -> Iterator[Any]:
        """Begin a pass over the dataset."""
        iterator = begin_pass(
            self.dataset, epoch, self.seed, self.world.data_rank, tells_epoch=self.tells_epoch
        )
        self.reading.look(), self._collating.look()
        return iterator

    def _check_alike(self, samples: list[Any]) -> None:
        """Check that ranks which compute a step together read the same samples, at their first.

        Collective: every rank must call it.

        Raises:
            UsageError: They read others.
        """
        if self._is_compared or self.world.data_size == self.world.size:
            return
        self._is_compared = True
        found = self.world.gather((self.world.data_rank, content_digest(samples)))
        if len(set(found)) > self.world.data_size:
            raise UsageError(
                f"ranks that compute each step together read other samples of "
                f"{type(self.dataset).__name__}",
                f"found: data ranks {list(self.world.data_ranks)}, and a first share for each rank",
                "Split the stream over the ranks of the data-parallel mesh, not over all: "
                "mesh['dp'].get_local_rank() and .size().",
            )

    def _too_few(self) -> UsageError:
        return UsageError(
            f"a pass over {type(self.dataset).__name__} gives less than one step's share",
            f"found: fewer than {self.share_size} item(s), on at least one rank",
            "Take a smaller batch, or more data.",
        )

    def _next(self, iterator: Iterator[Any], epoch: int, used: int) -> list[Any] | None:
        """Read the items of a share, or return None if any rank has too few left.

        They are read before the previous step is executed, so they get their own seed.
        """
        with kept_generators():
            self.reading.seed(self.seed, "stream", self.world.data_rank, epoch, used)
            samples = [sample for _, sample in zip(range(self.share_size), iterator, strict=False)]
        short = int(len(samples) < self.share_size)
        return None if self.world.agree([short])[0] else samples

    def _hand_out(
        self, held: tuple[Position, list[Any], Any], weights: tuple[float, ...], *, last: bool
    ) -> tuple[Share, list[Any]]:
        """Set the state to that after a share, and return the share with its micro-batches."""
        after, samples, self._state = held
        size = self.share_size // self.accumulate
        with self._collating.kept():
            self._collating.seed_held(
                self.seed, "collate", self.world.data_rank, after.epoch, after.sample
            )
            batches = [
                self.collate(samples[at : at + size]) for at in range(0, self.share_size, size)
            ]
        epoch = after.epoch - (after.sample == 0)
        return Share(epoch, after.sample, (), weights, after, last), batches


def begin_pass(dataset: Any, epoch: int, *parts: int | str, tells_epoch: bool) -> Iterator[Any]:
    """Return the dataset's iterator over a pass.

    What iter() draws at once, as a loader does for its workers, follows from the epoch and the
    parts, because a resumed run creates the iterator anew.

    Args:
        dataset: The iterable dataset or loader.
        epoch: The number of the pass.
        parts: Further parts of the seed.
        tells_epoch: Whether to call `set_epoch`, if there is one.
    """
    if tells_epoch and (tell := set_epoch_of(dataset)) is not None:
        tell(epoch)
    with kept_generators():
        seed_cpu(seed_of("pass", epoch, *parts))
        return iter(dataset)


def set_epoch_of(dataset: Any) -> Callable[[int], object] | None:
    """Return the `set_epoch` of an iterable dataset, or of the dataset that a loader reads.

    None means that neither has one.
    """
    return getattr(
        dataset, "set_epoch", getattr(getattr(dataset, "dataset", None), "set_epoch", None)
    )


def check_resumable(dataset: Any) -> None:
    """Raise UsageError for an iterable dataset that cannot save and restore its position."""
    if not (
        hasattr(dataset, "load_state_dict") and _takes_nothing(getattr(dataset, "state_dict", None))
    ):
        raise UsageError(
            f"{type(dataset).__name__} cannot resume: an iterable dataset needs state_dict() and"
            " load_state_dict()",
            remedy=advice(dataset)
            or "Add both (where the iterator stands, as plain values), or bring a dataset with"
            " __len__ and __getitem__.",
        )


def _takes_nothing(function: Any) -> bool:
    """Return whether a function can be called without arguments."""
    try:
        inspect.signature(function).bind()
    except TypeError:  # it is not callable, or needs arguments
        return False
    except ValueError:  # it has no readable signature
        return True
    return True


def advice(dataset: Any) -> str:
    """Return a remedy for a stream that comes from a widely used package, else ""."""
    packages = {owner.__module__.partition(".")[0] for owner in type(dataset).__mro__}
    return next((remedy for package, remedy in ADVICE.items() if package in packages), "")
