"""How a dataset, or that of a DataLoader, is dealt out to the ranks; and what has to be said of it before training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from harness import state
from harness.data import dataset_source, loading, stream_check
from harness.data.dataloader import adopt
from harness.data.fingerprint import DIFFER, describe, drawn_from, named
from harness.data.held_generators import find
from harness.data.source import Source
from harness.data.stream import StreamSource, check_resumable, told_epoch
from harness.distributed.ranks import World
from harness.errors import UsageError

IN_STREAM = "held in the stream"  # generators that a stream holds are seeded for each share
TOLD = "told the epoch"  # a stream that has set_epoch


@dataclass(frozen=True)
class Described:
    """What a checkpoint keeps of the data, and what has to be said of it."""

    data: dict[str, Any]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Dealt:
    """Where samples come from, what a checkpoint keeps of that, and what has to be said."""

    source: Source
    global_batch_size: int
    described: Callable[[], Described]  # the dataset is asked for samples, the first time


@dataclass(frozen=True)
class DataSharding:
    """What all sources of one loop have in common."""

    world: World
    accumulate: int
    shuffle: bool
    drop_last: bool
    check_stream: bool
    as_drilled: Callable[[int], int]  # how many workers there are, where so many are wanted

    def deal(
        self, dataset: Any, seed: int, global_batch_size: int | None, collate: loading.Collate | None, num_workers: int,
        order: Callable[[int], Sequence[int]] | None, before: Mapping[str, Any] | None, *, is_beside: bool = False,
    ) -> Dealt:  # fmt: skip
        """Deal out a dataset, or that of a DataLoader, `is_beside` in whole batches only; `before` is what the checkpoint has of it.

        Raises UsageError. Collective: every rank must call it.
        """
        shuffle, drop_last, workers, samples_each = self.shuffle, self.drop_last, loading.Workers(num_workers), 1
        adopted = adopt(dataset)
        if adopted is not None:
            if global_batch_size is not None or collate is not None or num_workers or order is not None:
                raise UsageError(
                    "a DataLoader says itself how its dataset is dealt out",
                    "found: a DataLoader, and global_batch_size, collate_fn, num_workers or order beside it",
                    "Give the DataLoader alone, or its dataset.",
                )
            global_batch_size, samples_each = adopted.batch_size * self.world.size * self.accumulate, adopted.samples_each
            dataset, shuffle, drop_last, order = adopted.dataset, adopted.shuffle, adopted.drop_last, adopted.order
            collate, workers = adopted.collate, adopted.workers
        elif loading.is_iterable(dataset):
            check_resumable(dataset)
        if not (is_beside or loading.is_iterable(dataset)):
            workers = dataclasses.replace(workers, number=self.as_drilled(workers.number))
        drop_last = drop_last or is_beside  # a short batch of those would have no weights in the loop
        if global_batch_size is None:
            raise UsageError(
                "batches() of a dataset needs global_batch_size",
                remedy="Give the number of samples in one update, over all ranks: batches(dataset, 64, …).",
            )
        seeds_held = before is None or "sample_rng" in before.get("kinds", {}) or not find(drawn_from(dataset, collate))
        source = dataset_source.source(
            dataset, self.world, seed, global_batch_size, accumulate=self.accumulate, shuffle=shuffle, drop_last=drop_last, order=order,
            collate=collate, workers=workers, seeds_held=seeds_held, samples_each=samples_each,
        )  # fmt: skip
        about = partial(describe, dataset, global_batch_size, shuffle and order is None, drop_last, seed, before=before)
        if isinstance(source, StreamSource):
            proven = self._proven(source, about(collate=collate), is_new=before is None)
            return Dealt(source, global_batch_size, lambda: proven)

        def described() -> Described:
            asked = source.asked(partial(named, collate=collate, seeds_held=seeds_held))
            data = about(asked=asked)
            return Described(data, _notes(dataset, data, asked[1], seeds_held=seeds_held))

        return Dealt(source, global_batch_size, cache(described))

    def _proven(self, source: StreamSource, data: dict[str, Any], *, is_new: bool) -> Described:
        """Try the stream; generators that it holds are seeded only where that makes it exact."""
        kinds = data.get("kinds", {}) | ({"order": TOLD} if is_new and told_epoch(source.dataset) is not None else {})
        source.reading.seeds_held, source.tells_epoch = kinds.get("sample_rng") == IN_STREAM, kinds.get("order") == TOLD
        note = ""
        if self.check_stream:
            may_seed = is_new or source.reading.seeds_held
            note = stream_check.prove(source, lambda kept: state.plain_data({"stream": kept})["stream"], seeds_held=may_seed)
        kinds |= {"sample_rng": IN_STREAM} if source.reading.seeds_held else {}
        return Described(data | ({"kinds": kinds} if kinds else {}), (note,) if note else ())


def _notes(dataset: Any, data: Mapping[str, Any], held: list[str], *, seeds_held: bool) -> tuple[str, ...]:
    """What is not exact after a kill, in words."""
    if not seeds_held:
        words = "this run began before generators that are held were seeded for each sample, and goes on as it began"
        return (f"{words}: what is drawn from {', '.join(held[:3])} is other after a kill; a new run seeds it",)
    if not data["fingerprint"].endswith(DIFFER):
        return ()
    seeded = ", ".join(["those of Python, NumPy and torch", *held[:3]])
    return (
        f"samples of {type(dataset).__name__} differ each time they are loaded, although all generators that are found were seeded"
        f" alike ({seeded}): after a kill they are other ones. Draw from the global generators, or from one that is held in an attribute.",
    )
