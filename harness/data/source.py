"""The interface of a source, which provides the steps of a loop, and several sources in one loop.

In a loop over several sources, such as labelled and unlabelled data, each has epochs of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch.utils.data import ConcatDataset, StackDataset, Subset

from harness.data.plan import Border, Position, Share

Batches = Iterator[tuple[Share, list[Any]]]
Bordered = Iterator[tuple[Share | Border, list[Any]]]
Say = Callable[[str], object]

ENDLESS = sys.maxsize  # as the number of epochs
ORDERS = "beside_orders"


class Source(Protocol):
    """A provider of the steps of a loop."""

    is_own: bool  # whether the loop finds its data itself

    def begin(
        self,
        position: Position,
        epochs: int | None,
        before: Mapping[str, Any] | None,
        say: Say,
        *,
        by_epoch: bool,
    ) -> None:
        """Prepare the source; called before the methods below.

        Args:
            position: The position of the run in its data.
            epochs: The number of epochs of the whole run; None if it is not limited.
            before: The data record of the checkpoint; None in a new run.
            say: A function that shows a warning to the user.
            by_epoch: Whether the user's loop is one over epochs.
        """

    def put_back(self) -> None:
        """Restore the state of samplers once more, as it was after `begin` of a resumed run.

        Called before the first share is requested, after code of the user's that runs again where
        a run resumes inside an epoch.
        """

    def steps_after(self, position: Position, epochs: int) -> int | None:
        """Return the number of steps to the end of the last epoch, or None if it is unknown."""

    def shares(self, position: Position, epochs: int) -> Bordered:
        """Yield this rank's share of each of these steps, with its micro-batches.

        In a loop over epochs, a border comes before the shares of each epoch. If an epoch has no
        share left, as with a larger batch than before, another border comes in their place.
        """

    def kept(self, position: Position) -> dict[str, Any]:
        """Return what a checkpoint's data record needs besides the position.

        The result is the same for all ranks. Every rank calls this, at a step boundary.
        """

    def close(self) -> None:
        """End the loading processes; nothing more will be requested."""

    def state(self) -> Any:
        """Return what this rank needs to resume, besides the position, as plain data."""

    def restore(self, state: Any) -> None:
        """Restore a state that `state` returned."""


class InThisProcess:
    """Defaults for a source that reads its dataset, if any, in this process."""

    def begin(
        self,
        position: Position,
        epochs: int | None,
        before: Mapping[str, Any] | None,
        say: Say,
        *,
        by_epoch: bool,
    ) -> None:
        """Do nothing."""

    def put_back(self) -> None:
        """Do nothing: there is no sampler."""

    def kept(self, position: Position) -> dict[str, Any]:
        """Return {}: the position is enough."""
        return {}

    def close(self) -> None:
        """Do nothing: there are no processes to end."""


@dataclass
class CombinedSource:
    """A main source, whose epochs count, and other sources by name.

    Each micro-batch of the main source comes with one micro-batch of every other source.
    """

    main: Source
    others: Mapping[str, Source]
    # The position of each other source after the step that was handed out last.
    positions: dict[str, Position] = field(default_factory=dict)
    is_own = False

    def begin(
        self,
        position: Position,
        epochs: int | None,
        before: Mapping[str, Any] | None,
        say: Say,
        *,
        by_epoch: bool,
    ) -> None:
        """Begin the main source at `position`, and every other source at its own position."""
        self.main.begin(position, epochs, before, say, by_epoch=by_epoch)
        orders = (before or {}).get(ORDERS, {})
        for name, source in self.others.items():
            own = None if before is None else orders.get(name, {})
            at = self.positions.get(name, Position())
            source.begin(at, None, own, say, by_epoch=False)

    def put_back(self) -> None:
        """Restore the state of the samplers of all sources once more."""
        for source in (self.main, *self.others.values()):
            source.put_back()

    def close(self) -> None:
        """Close all sources."""
        for source in (self.main, *self.others.values()):
            source.close()

    def kept(self, position: Position) -> dict[str, Any]:
        """Return the main source's entries, and the others' positions and orders to be kept."""
        orders = {
            name: source.kept(self.positions.get(name, Position()))
            for name, source in self.others.items()
        }
        kept = {name: order for name, order in orders.items() if order}
        at = {name: [its.epoch, its.sample] for name, its in self.positions.items()}
        return self.main.kept(position) | {"beside_at": at} | ({ORDERS: kept} if kept else {})

    def steps_after(self, position: Position, epochs: int) -> int | None:
        """Return the number of steps left, which the main source determines."""
        return self.main.steps_after(position, epochs)

    def shares(self, position: Position, epochs: int) -> Bordered:
        """Yield the main source's shares; pair each micro-batch with one of every other source."""
        beside = {
            name: source.shares(self.positions.get(name, Position()), ENDLESS)
            for name, source in self.others.items()
        }
        for share, batches in self.main.shares(position, epochs):
            if not batches:  # an epoch border, not a step
                yield share, batches
                continue
            # The other sources yield no borders: they begin with by_epoch=False.
            taken: dict[str, Any] = {name: next(shares) for name, shares in beside.items()}
            self.positions = {name: its.after for name, (its, _) in taken.items()}
            yield (
                share,
                [
                    (batch, {name: more[at] for name, (_, more) in taken.items()})
                    for at, batch in enumerate(batches)
                ],
            )

    def state(self) -> Any:
        """Return the states of all sources, or None if no source has one."""
        states = {name: source.state() for name, source in self.others.items()}
        main = self.main.state()
        return (
            None
            if main is None and not any(state is not None for state in states.values())
            else {"main": main, "beside": states}
        )

    def restore(self, state: Any) -> None:
        """Restore all sources from what `state` returned."""
        parts = state if state is not None else {"main": None, "beside": {}}
        self.main.restore(parts["main"])
        for name, source in self.others.items():
            source.restore(parts["beside"].get(name))


def takes_epoch(dataset: Any) -> bool:
    """Return whether the dataset, or a dataset that it is made of, has a `set_epoch`."""
    return any(True for _ in _listeners(dataset))


def tell(dataset: Any, epoch: int) -> None:
    """Call `set_epoch` of the dataset or, if it has none, of the datasets that it is made of."""
    for listener in _listeners(dataset):
        listener.set_epoch(epoch)


def _listeners(dataset: Any) -> Iterator[Any]:
    """Yield the datasets whose `set_epoch` has to be called."""
    if callable(getattr(dataset, "set_epoch", None)):
        yield dataset
    elif isinstance(dataset, Subset):
        yield from _listeners(dataset.dataset)
    elif isinstance(dataset, ConcatDataset | StackDataset):
        parts = dataset.datasets
        for part in parts.values() if isinstance(parts, dict) else parts:
            yield from _listeners(part)
