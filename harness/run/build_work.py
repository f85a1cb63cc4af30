"""Build the work of a loop: sharded data, or numbered steps for a loop with data of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

from torch.utils.data import DataLoader, Dataset

from harness.arguments import check_kinds
from harness.config.init_arguments import check
from harness.data import loading
from harness.data.dataset_source import OwnSource
from harness.data.plan import Position, seed_of
from harness.data.source import CombinedSource
from harness.distributed.ranks import World
from harness.errors import UsageError
from harness.run.data_sharding import DataSharding
from harness.run.work import DataArguments, Described, Work

AHEAD = (
    "the second batch was requested before the first one was trained on: no optimizer has made a "
    "step, and there is no gradient. Each restart loses the batches that the program has requested "
    "ahead: request one when the one before is used. num_workers loads ahead already"
)
TOO_LATE = (
    "the loop over epochs sets {names} of its dataset after the epoch's first batch was loaded,"
    " because run.by_epoch was given another iterator than that of run.batches: that batch is made"
    " as the dataset was before, and after a restart as it was built. Give run.batches(…) itself to"
    " run.by_epoch, and put your iterator around the inner one"
)


class WorkBuilder:
    """Builds what the loop of a run goes over.

    Args:
        world: The ranks of this attempt.
        seed: Seed of the order of samples.
        as_drilled: Function from the requested number of loader processes to the one to use.
    """

    def __init__(self, world: World, seed: int, as_drilled: Callable[[int], int]) -> None:
        self._world, self._seed, self._as_drilled = world, seed, as_drilled
        self._to_device = partial(loading.to_device, device=world.device)

    def of_data(
        self, dataset: Any, arguments: DataArguments, before: Mapping[str, Any] | None
    ) -> Work:
        """Build the work of a loop over a dataset, or over the dataset of a DataLoader.

        Collective: every rank must call it.

        Args:
            dataset: As in `Run.batches`.
            arguments: The other arguments of `Run.batches`.
            before: The description of the data in the checkpoint at the resume point, or None.

        Raises:
            UsageError: An argument is invalid, or a run could not resume exactly with this data.
        """
        check(vars(arguments))
        check_kinds(vars(arguments))
        dealing = DataSharding(
            self._world,
            arguments.accumulate,
            arguments.shuffle,
            arguments.drop_last,
            arguments.check_stream,
            self._as_drilled,
        )
        main = dealing.deal(
            dataset,
            self._seed,
            arguments.global_batch_size,
            arguments.collate_fn,
            arguments.num_workers,
            arguments.order,
            before,
        )
        work = Work(
            main.source,
            main.described,
            arguments.epochs,
            arguments.max_steps,
            self._to_device,
            loading.as_is if arguments.accumulate > 1 else _only,
        )
        if not arguments.beside and "beside" not in (before or {}):
            return work
        return self._with_beside(work, dealing, main.global_batch_size, arguments, before or {})

    def _with_beside(
        self,
        work: Work,
        dealing: DataSharding,
        global_batch_size: int,
        arguments: DataArguments,
        before: Mapping[str, Any],
    ) -> Work:
        """Return the work with the further datasets of `beside` read next to the main one."""
        dealt = {}
        for name, other in arguments.beside.items():
            size = None if isinstance(other, DataLoader) else global_batch_size
            described = before.get("beside", {}).get(name)
            seed = seed_of(self._seed, "beside", name)
            dealt[name] = dealing.deal(other, seed, size, None, 0, None, described, is_beside=True)
        at = {name: Position(*position) for name, position in before.get("beside_at", {}).items()}

        def together() -> Described:
            main = work.described()
            others = {name: beside.described() for name, beside in dealt.items()}
            data = main.data | {"beside": {name: beside.data for name, beside in others.items()}}
            notes = tuple(note for beside in others.values() for note in beside.notes)
            return Described(data, main.notes + notes)

        source = CombinedSource(
            work.source, {name: beside.source for name, beside in dealt.items()}, at
        )
        return dataclasses.replace(work, source=source, described=cache(together))

    def check_batches(self, batches: Any) -> None:
        """Refuse what cannot be the batches of a run, for a loop over epochs.

        Raises:
            UsageError: It is a DataLoader, a dataset, or nothing that can be iterated over.
        """
        if isinstance(batches, DataLoader | Dataset) or not hasattr(batches, "__iter__"):
            raise not_of_the_run(f"found: a {type(batches).__name__}")

    def of_own(self, max_steps: int, number: Callable[[], int]) -> Work:
        """Build the work of a loop that produces its own data; it yields `number()` in each step.

        Raises:
            UsageError: `max_steps` is invalid.
        """
        check({"max_steps": max_steps})
        dealt = {"global_batch_size": None, "shuffle": None, "drop_last": None, "seed": self._seed}
        data = {"fingerprint": "found by the loop itself", "size": None} | dealt
        return Work(
            OwnSource(),
            lambda: Described(data),
            None,
            max_steps,
            self._to_device,
            lambda _: number(),
        )


def not_of_the_run(found: str) -> UsageError:
    """Return the error for a loop over epochs around other batches than those of the run."""
    return UsageError(
        "by_epoch(…) goes around the batches of the run",
        found,
        "for epoch, batches in run.by_epoch(run.batches(loader, epochs=5)): an iterator of your own"
        " goes around the inner one.",
    )


def _only(micro_batches: list[Any]) -> Any:
    return micro_batches[0]
