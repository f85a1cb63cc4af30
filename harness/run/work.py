"""What a loop goes over: data that is dealt out to it, or steps for which it finds the data itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from harness.data import loading
from harness.data.adopted import adopt
from harness.data.fingerprint import describe, fingerprint
from harness.data.order import Position, end_step
from harness.errors import UsageError
from harness.ranks import World
from harness.run.settings import check_numbers


@dataclass(frozen=True)
class Work:
    """Where the steps of a run come from, and where they end."""

    source: loading.Source
    described: Callable[[], dict[str, Any]]
    epochs: int | None
    max_steps: int | None
    handed_out: Callable[[list[Any]], Any]  # what the user's loop gets, of a step's micro-batches

    @property
    def data(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, to be compared when the run goes on. The dataset is asked for samples, the first time."""
        return self.described()

    @property
    def steps_per_epoch(self) -> int | None:
        """How many steps a whole epoch has, if that is known."""
        return self.source.steps_after(Position(), 1)

    @property
    def steps(self) -> int | None:
        """How many steps the whole run has, in all its lives, if that is known."""
        of_data = self.steps_after(Position())
        return None if of_data is None and not self.source.is_own else end_step(0, of_data, self.max_steps)

    @property
    def end(self) -> dict[str, int | None]:
        """What has to be reached for the run to be finished."""
        return {"epochs": self.epochs, "max_steps": self.max_steps}

    def steps_after(self, position: Position) -> int | None:
        """How many steps are left of the data, if it tells."""
        return None if self.epochs is None else self.source.steps_after(position, self.epochs)

    def shares(self, position: Position) -> loading.Bordered:
        """One step after another, from there on."""
        return self.source.shares(position, self.epochs or 0)

    def at(self, position: Position, kept: dict[str, Any]) -> dict[str, Any]:
        """What a checkpoint keeps of the data, of where a run stands in it, and of what the source keeps."""
        return self.data | {"epoch": position.epoch, "sample": position.sample} | kept

    def rate(self, steps_per_s: float) -> str:
        """How fast that is, in words."""
        size = self.data["global_batch_size"]
        return f"{steps_per_s * size:,.0f} samples/s" if size else f"{steps_per_s:.3g} steps/s"


def of_data(
    dataset: Any, world: World, seed: int, global_batch_size: int | None, *,
    accumulate: int, epochs: int, max_steps: int | None, shuffle: bool, drop_last: bool, collate: loading.Collate | None,
    num_workers: int, order: Callable[[int], Sequence[int]] | None,
) -> Work:  # fmt: skip
    """Steps over a dataset, or over that of a DataLoader. Raises UsageError."""
    check_numbers(locals())
    adopted = adopt(dataset)
    if adopted is not None:
        if global_batch_size is not None or collate is not None or num_workers or order is not None:
            raise UsageError(
                "a DataLoader says itself how its dataset is dealt out",
                "found: a DataLoader, and global_batch_size, collate_fn, num_workers or order beside it",
                "Give the DataLoader alone, or its dataset.",
            )
        global_batch_size = adopted.batch_size * world.size * accumulate
        dataset, shuffle, drop_last, collate, order = adopted.dataset, adopted.shuffle, adopted.drop_last, adopted.collate, adopted.order
    if global_batch_size is None:
        raise UsageError(
            "batches() of a dataset needs global_batch_size",
            remedy="Give the number of samples in one update, over all ranks: batches(dataset, 64, …).",
        )
    source = loading.source(
        dataset, world, seed, global_batch_size, accumulate=accumulate, shuffle=shuffle, drop_last=drop_last, order=order,
        collate=collate, workers=adopted.workers if adopted else loading.Workers(num_workers),
    )  # fmt: skip
    size, shuffled = global_batch_size, shuffle and order is None
    described = cache(lambda: describe(dataset, size, shuffled, drop_last, seed, source.asked(fingerprint)))
    return Work(source, described, epochs, max_steps, loading.as_is if accumulate > 1 else _only)


def of_own(seed: int, max_steps: int, number: Callable[[], int]) -> Work:
    """Steps of a loop that finds its data itself, and gets their `number`. Raises UsageError."""
    check_numbers({"max_steps": max_steps})
    dealt = {"global_batch_size": None, "shuffle": None, "drop_last": None, "seed": seed}
    data = {"fingerprint": "found by the loop itself", "size": None} | dealt
    return Work(loading.OwnSource(), lambda: data, None, max_steps, lambda _: number())


def _only(micro_batches: list[Any]) -> Any:
    return micro_batches[0]
