"""What a loop goes over: data that is dealt out to it, or steps for which it finds the data itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch.utils.data import DataLoader

from harness.arguments import check_numbers
from harness.data import loading
from harness.data.beside import CombinedSource
from harness.data.dataset_source import OwnSource
from harness.data.plan import Position, end_step, seed_of
from harness.data.source import Bordered, Source
from harness.distributed.ranks import World
from harness.run.data_sharding import DataSharding, Described
from harness.untracked.stray_loaders import StrayLoaders


@dataclass(frozen=True)
class Work:
    """Where the steps of a run come from, and where they end."""

    source: Source
    described: Callable[[], Described]
    epochs: int | None
    max_steps: int | None
    handed_out: Callable[[list[Any]], Any]  # what the user's loop gets, of a step's micro-batches

    @property
    def data(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, to be compared when the run goes on. The dataset is asked for samples, the first time."""
        return self.described().data

    @property
    def notes(self) -> tuple[str, ...]:
        """What has to be said of it before training."""
        return self.described().notes

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

    def shares(self, position: Position, tracked: Mapping[str, Any], warn: Callable[[str], object]) -> Bordered:
        """One step after another, from there on; and a look, after each, at what the program reads beside them."""
        strays = StrayLoaders()
        for share in self.source.shares(position, self.epochs or 0):
            yield share
            if words := strays.at_boundary(tracked):
                warn(f"harness: warning: {words}")

    def at(self, position: Position) -> dict[str, Any]:
        """What a checkpoint keeps of the data, of where a run stands in it, and of what the source keeps. On every rank."""
        kept = self.source.kept(position)
        kinds = self.data.get("kinds", {}) | kept.get("kinds", {})
        return self.data | {"epoch": position.epoch, "sample": position.sample} | kept | ({"kinds": kinds} if kinds else {})

    def rate(self, steps_per_s: float) -> str:
        """How fast that is, in words."""
        size = self.data["global_batch_size"]
        return f"{steps_per_s * size:,.0f} samples/s" if size else f"{steps_per_s:.3g} steps/s"


def of_data(
    dataset: Any, world: World, seed: int, global_batch_size: int | None, as_drilled: Callable[[int], int], *,
    accumulate: int, epochs: int, max_steps: int | None, shuffle: bool, drop_last: bool, collate: loading.Collate | None,
    num_workers: int, order: Callable[[int], Sequence[int]] | None, beside: Mapping[str, Any], check_stream: bool,
    before: Mapping[str, Any] | None,
) -> Work:  # fmt: skip
    """Steps over a dataset, or over that of a DataLoader; `before` is what the checkpoint has of them. Raises UsageError. Collective:
    every rank must call it."""
    check_numbers(locals())
    dealing = DataSharding(world, accumulate, shuffle, drop_last, check_stream, as_drilled)
    main = dealing.deal(dataset, seed, global_batch_size, collate, num_workers, order, before)
    work = Work(main.source, main.described, epochs, max_steps, loading.as_is if accumulate > 1 else _only)
    if not beside and "beside" not in (before or {}):
        return work
    dealt = {}
    for name, other in beside.items():
        size = None if isinstance(other, DataLoader) else main.global_batch_size
        described = (before or {}).get("beside", {}).get(name)
        dealt[name] = dealing.deal(other, seed_of(seed, "beside", name), size, None, 0, None, described, is_beside=True)
    at = {name: Position(*position) for name, position in (before or {}).get("beside_at", {}).items()}

    def together() -> Described:
        others = {name: one.described() for name, one in dealt.items()}
        data = main.described().data | {"beside": {name: one.data for name, one in others.items()}}
        return Described(data, main.described().notes + tuple(note for one in others.values() for note in one.notes))

    source = CombinedSource(main.source, {name: one.source for name, one in dealt.items()}, at)
    return dataclasses.replace(work, source=source, described=cache(together))


def of_own(seed: int, max_steps: int, number: Callable[[], int]) -> Work:
    """Steps of a loop that finds its data itself, and gets their `number`. Raises UsageError."""
    check_numbers({"max_steps": max_steps})
    dealt = {"global_batch_size": None, "shuffle": None, "drop_last": None, "seed": seed}
    data = {"fingerprint": "found by the loop itself", "size": None} | dealt
    return Work(OwnSource(), lambda: Described(data), None, max_steps, lambda _: number())


def _only(micro_batches: list[Any]) -> Any:
    return micro_batches[0]
