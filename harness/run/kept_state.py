"""What a run keeps of its program beside the position in the data, and what it finds of it that it cannot keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import harness.run.resume_checks as resume_checks
from harness.arguments import Settings
from harness.checkpoint.format import Manifest
from harness.data.given_order import GivenOrder
from harness.data.held_generators import find
from harness.data.source import Source
from harness.distributed.ranks import World
from harness.state import Captured
from harness.tracking.extra_state import ExtraState
from harness.tracking.payload import OfRank, captured
from harness.tracking.rank_differences import RankDifferences
from harness.tracking.rank_entries import RankEntries
from harness.tracking.user_state import UserState
from harness.untracked.finder import UntrackedFinder


class KeptState:
    """All of that, as seen from one rank."""

    def __init__(self, world: World, step: Callable[[], int], say: Callable[[str], None], note: Callable[..., None]) -> None:
        self.suspects: list[str] = []  # what lives in the program and is not tracked, by the path to it
        self._is_writer, own = world.is_writer, RankEntries()
        self._values, self._more, self._by_rank = UserState(), ExtraState(world, own, step, say), RankDifferences(world, own, say, note)
        self._untracked, self._built = UntrackedFinder(self.suspects, say, note), dict[str, Any]()

    def track(
        self, tracked: dict[str, Any], objects: Mapping[str, Any], origin: Manifest | None, payload: Mapping[str, Any] | None,
        settings: Settings, *, is_late: bool,
    ) -> list[str]:  # fmt: skip
        """Add the objects to what is tracked, and give all of it its state back; returns what is to be said. Raises UsageError.
        Collective: every rank must call it."""
        for name, thing in objects.items():
            resume_checks.check_trackable(name, thing, tracked, is_late=is_late)
        stateful = self._more.track(objects, is_resumed=payload is not None)
        tracked |= stateful
        said = resume_checks.give_back(tracked, stateful, self._built, origin, payload, settings)
        if payload is not None:
            self._more.restored(tracked)
        return said

    def begin(self, tracked: Mapping[str, Any], payload: Mapping[str, Any], source: Source) -> list[str]:
        """The loop begins: put back what is no object's state, and look for what lives untracked; returns what is to be said. Raises
        UsageError."""
        said = self._more.begin(tracked, payload)
        if self._is_writer:
            self._untracked.handled |= self._more.handled | _handled_by(source)
            self._untracked.begin(tracked, source)
        return said

    def at_boundary(self, values: Mapping[str, Any]) -> None:
        """A step is over; `values` are the user's own. Raises UsageError for what no checkpoint could give back."""
        self._values.look(values)
        self._untracked.at_boundary()

    def is_time(self, is_due: bool, cannot_wait: bool) -> bool:
        """Whether to save now what is due: with gradients under way a save may wait for the next update."""
        return self._more.is_time(is_due, cannot_wait)

    def of_ranks(self, tracked: Mapping[str, Any], values: Mapping[str, Any], iterator: Any) -> list[OfRank]:
        """What each rank gives of itself for a checkpoint; on the writer only. Collective: every rank must call it."""
        self._more.hold()
        return self._by_rank.of_ranks(tracked, values, iterator)

    def captured(
        self, of_ranks: Sequence[OfRank], data: dict[str, Any], values: dict[str, Any], tracked: Mapping[str, Any]
    ) -> Captured:  # fmt: skip
        """All of a checkpoint. Raises UsageError for what is not plain data, NonFiniteError."""
        return captured(of_ranks, data, values | self._more.values(), tracked)

    def close(self) -> None:
        """The loop is over."""
        self._more.close()


def _handled_by(source: Any) -> set[int]:
    """By identity what a source seeds for each sample, keeps with an order, or was seen to have in its state."""
    found: set[int] = set()
    for one in (getattr(source, "main", source), *getattr(source, "others", {}).values()):
        roots = {"dataset": getattr(one, "dataset", None), "collate_fn": getattr(one, "collate", None)}
        if getattr(one, "seeds_held", True):
            found |= {id(held.generator) for held in find(roots)}
        order = getattr(getattr(one, "plan", None), "order", None)
        found |= order.handled if isinstance(order, GivenOrder) else set()
    return found
