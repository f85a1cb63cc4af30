"""Where the steps of a loop come from: what every source is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from harness.data.plan import Border, Position, Share

Batches = Iterator[tuple[Share, list[Any]]]
Bordered = Iterator[tuple[Share | Border, list[Any]]]
Say = Callable[[str], object]


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


class Unasked:
    """A source whose dataset is read in this process, if there is any, and which is not told of borders."""

    def begin(self, position: Position, before: Mapping[str, Any] | None, say: Say, *, by_epoch: bool) -> None:
        """Nothing changes."""

    def kept(self, position: Position) -> dict[str, Any]:
        return {}

    def asked(self, ask: Callable[[Any], Any]) -> Any:
        return ask(getattr(self, "dataset", None))

    def close(self) -> None:
        """There is nothing to end."""
