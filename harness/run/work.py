"""The work of a loop: sharded data, or numbered steps for a loop that produces its own data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch.utils.data import DataLoader

from harness.arguments import check
from harness.data import loading
from harness.data.dataset_source import OwnSource
from harness.data.plan import Position, end_step, seed_of
from harness.data.source import Bordered, CombinedSource, Source
from harness.distributed.ranks import World
from harness.run.data_sharding import DataSharding, Described
from harness.untracked.stray_loaders import StrayLoaders


@dataclass(frozen=True)
class Work:
    """The source of the steps of a run, with the limits that end the run."""

    source: Source
    described: Callable[[], Described]
    epochs: int | None
    max_steps: int | None
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

    def shares(
        self, position: Position, tracked: Mapping[str, Any], warn: Callable[[str], object]
    ) -> Bordered:
        """Yield the share of each step from a position on.

        After each step, warn if the program reads a DataLoader beside the run.
        """
        strays = StrayLoaders()
        for share in self.source.shares(position, self.epochs or 0):
            yield share
            if words := strays.at_boundary(tracked):
                warn(f"harness: warning: {words}")

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


def of_data(
    dataset: Any,
    world: World,
    seed: int,
    global_batch_size: int | None,
    as_drilled: Callable[[int], int],
    *,
    accumulate: int,
    epochs: int,
    max_steps: int | None,
    shuffle: bool,
    drop_last: bool,
    collate: loading.Collate | None,
    num_workers: int,
    order: Callable[[int], Sequence[int]] | None,
    beside: Mapping[str, Any],
    check_stream: bool,
    before: Mapping[str, Any] | None,
) -> Work:
    """Build the work of a loop over a dataset, or over the dataset of a DataLoader.

    Collective: every rank must call it.

    Args:
        dataset: As in `Run.batches`.
        world: The ranks of this attempt.
        seed: Seed of the order of samples.
        global_batch_size: As in `Run.batches`.
        as_drilled: Function from the requested number of loader processes to the one to use.
        accumulate: As in `Run.batches`.
        epochs: As in `Run.batches`.
        max_steps: As in `Run.batches`.
        shuffle: As in `Run.batches`.
        drop_last: As in `Run.batches`.
        collate: `collate_fn` of `Run.batches`.
        num_workers: As in `Run.batches`.
        order: As in `Run.batches`.
        beside: As in `Run.batches`; {} for none.
        check_stream: As in `Run.batches`.
        before: The description of the data in the checkpoint at the resume point, or None.

    Raises:
        UsageError: An argument is invalid, or a run could not resume exactly with this data.
    """
    check(locals())
    dealing = DataSharding(world, accumulate, shuffle, drop_last, check_stream, as_drilled)
    main = dealing.deal(dataset, seed, global_batch_size, collate, num_workers, order, before)
    work = Work(
        main.source, main.described, epochs, max_steps, loading.as_is if accumulate > 1 else _only
    )
    if not beside and "beside" not in (before or {}):
        return work
    dealt = {}
    for name, other in beside.items():
        size = None if isinstance(other, DataLoader) else main.global_batch_size
        described = (before or {}).get("beside", {}).get(name)
        dealt[name] = dealing.deal(
            other, seed_of(seed, "beside", name), size, None, 0, None, described, is_beside=True
        )
    at = {
        name: Position(*position) for name, position in (before or {}).get("beside_at", {}).items()
    }

    def together() -> Described:
        others = {name: one.described() for name, one in dealt.items()}
        data = main.described().data | {"beside": {name: one.data for name, one in others.items()}}
        return Described(
            data,
            main.described().notes + tuple(note for one in others.values() for note in one.notes),
        )

    source = CombinedSource(main.source, {name: one.source for name, one in dealt.items()}, at)
    return dataclasses.replace(work, source=source, described=cache(together))


def of_own(seed: int, max_steps: int, number: Callable[[], int]) -> Work:
    """Build the work of a loop that produces its own data; it yields `number()` in each step.

    Raises:
        UsageError: `max_steps` is invalid.
    """
    check({"max_steps": max_steps})
    dealt = {"global_batch_size": None, "shuffle": None, "drop_last": None, "seed": seed}
    data = {"fingerprint": "found by the loop itself", "size": None} | dealt
    return Work(OwnSource(), lambda: Described(data), None, max_steps, lambda _: number())


def _only(micro_batches: list[Any]) -> Any:
    return micro_batches[0]
