"""What a training loop goes over: its steps, and the limits that end the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness.data.plan import Border, Position, Share, end_step

if TYPE_CHECKING:
    from harness.data.source import Source


@dataclass(frozen=True)
class Described:
    """The description of the data that a checkpoint stores, and the warnings about the data."""

    data: dict[str, Any]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class DataArguments:
    """The arguments of `Run.batches`, which documents them, other than the dataset."""

    global_batch_size: int | None
    accumulate: int
    epochs: int
    max_steps: int | None
    shuffle: bool
    drop_last: bool
    collate_fn: Callable[[list[Any]], Any] | None
    num_workers: int
    order: Callable[[int], Sequence[int]] | None
    beside: Mapping[str, Any]
    check_stream: bool


@dataclass(frozen=True)
class Work:
    """The source of the steps of a run, and the limits that end the run."""

    source: Source
    described: Callable[[], Described]
    epochs: int | None
    max_steps: int | None
    to_device: Callable[[list[Any]], list[Any]]  # for the micro-batches of a step
    handed_out: Callable[[list[Any]], Any]  # micro-batches of a step -> what the loop yields

    @property
    def data(self) -> dict[str, Any]:
        """The description of the data in a checkpoint, which is compared when the run resumes.

        The first access loads samples of the dataset.
        """
        return self.described().data

    @property
    def notes(self) -> tuple[str, ...]:
        """Warnings about the data, to print before training."""
        return self.described().notes

    @property
    def steps_per_epoch(self) -> int | None:
        """The number of steps in a whole epoch, or None if unknown."""
        return self.source.steps_after(Position(), 1)

    @property
    def steps(self) -> int | None:
        """The number of steps of the whole run, over all attempts, or None if unknown."""
        of_data = self.steps_after(Position())
        return (
            None
            if of_data is None and not self.source.is_own
            else end_step(0, of_data, self.max_steps)
        )

    @property
    def end(self) -> dict[str, int | None]:
        """The epochs and steps after which the run is finished."""
        return {"epochs": self.epochs, "max_steps": self.max_steps}

    def steps_after(self, position: Position) -> int | None:
        """Return the number of steps that are left in the data, or None if unknown."""
        return None if self.epochs is None else self.source.steps_after(position, self.epochs)

    def shares(self, position: Position) -> Iterator[tuple[Share | Border, list[Any]]]:
        """Yield the share of each step from a position on, with its micro-batches."""
        return self.source.shares(position, self.epochs or 0)

    def at(self, position: Position) -> dict[str, Any]:
        """Return the description of the data, the position, and the state of the source.

        All of it goes into the checkpoint. Call it on every rank.
        """
        kept = self.source.kept(position)
        kinds = self.data.get("kinds", {}) | kept.get("kinds", {})
        return (
            self.data
            | {"epoch": position.epoch, "sample": position.sample}
            | kept
            | ({"kinds": kinds} if kinds else {})
        )

    def rate(self, steps_per_s: float) -> str:
        """Format a throughput as samples/s, or as steps/s without a global batch size."""
        size = self.data["global_batch_size"]
        return f"{steps_per_s * size:,.0f} samples/s" if size else f"{steps_per_s:.3g} steps/s"
