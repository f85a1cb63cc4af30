"""Shard a dataset, or the dataset of a DataLoader, over the ranks, and describe the data.

The description is stored in each checkpoint; its notes are the warnings to print before training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from harness import state
from harness.data import dataset_source, loading, stream_check
from harness.data.dataloader import adopt
from harness.data.fingerprint import (
    DIFFER,
    batched,
    batches_unlike,
    describe,
    drawn_from,
    named,
)
from harness.data.held_generators import find
from harness.data.source import Source
from harness.data.stream import StreamSource, check_resumable, set_epoch_of
from harness.distributed.ranks import World
from harness.errors import UsageError
from harness.run.work import Described
from harness.untracked.stray_loaders import WorkerValues

IN_STREAM = "held in the stream"  # generators inside a stream are seeded for each share
BY_SET_EPOCH = "told the epoch"  # the stream has set_epoch


@dataclass(frozen=True)
class Dealt:
    """A source of samples that is sharded over the ranks, with its global batch size."""

    source: Source
    global_batch_size: int
    described: Callable[[], Described]  # the first call loads samples of the dataset


@dataclass(frozen=True)
class LoadSettings:
    """A dataset, and how it is batched, ordered and loaded."""

    dataset: Any
    global_batch_size: int | None
    batching: loading.Batching


@dataclass(frozen=True)
class DataSharding:
    """The settings that all sources of one loop share."""

    world: World
    accumulate: int
    shuffle: bool
    drop_last: bool
    check_stream: bool
    as_drilled: Callable[[int], int]  # requested number of workers -> number to use

    def deal(
        self,
        dataset: Any,
        seed: int,
        global_batch_size: int | None,
        collate: loading.Collate | None,
        num_workers: int,
        order: Callable[[int], Sequence[int]] | None,
        before: Mapping[str, Any] | None,
        *,
        is_beside: bool = False,
    ) -> Dealt:
        """Shard a dataset, or the dataset of a DataLoader, over the ranks.

        Collective: every rank must call it.

        Args:
            dataset: A map-style dataset, a resumable iterable dataset, or a DataLoader.
            seed: Seed of the order of samples.
            global_batch_size: Samples in one optimizer step, over all ranks and micro-batches. None
                for a DataLoader: its batch size is that of a micro-batch on one rank.
            collate: Collate function; None for the default one, and for a DataLoader.
            num_workers: Number of loader processes of this rank; 0 for a DataLoader.
            order: Function from an epoch to its sample numbers, in place of a shuffle; None for a
                DataLoader.
            before: The description of this data in the checkpoint, or None.
            is_beside: True for data beside the main source: only whole batches are used.

        Raises:
            UsageError: These arguments do not go together, or a run could not resume exactly.
        """
        batching = loading.Batching(
            self.shuffle, self.drop_last, order, collate, loading.Workers(num_workers)
        )
        given = LoadSettings(dataset, global_batch_size, batching)
        settings = self._load_settings(given, is_beside=is_beside)
        if settings.global_batch_size is None:
            raise UsageError(
                "batches() of a dataset needs global_batch_size",
                remedy="Give the number of samples in one update, over all ranks: "
                "batches(dataset, 64, …).",
            )
        return self._sharded(settings, settings.global_batch_size, seed, before)

    def _load_settings(self, given: LoadSettings, *, is_beside: bool) -> LoadSettings:
        """Return the settings to load with: those given, or those of a DataLoader.

        Raises:
            UsageError: The dataset cannot resume, or settings are given beside a DataLoader.
        """
        settings = given
        _check_is_dataset(given.dataset)
        adopted = adopt(given.dataset)
        if adopted is not None:
            _check_alone(given)
            settings = LoadSettings(
                adopted.dataset,
                adopted.batch_size * self.world.data_size * self.accumulate,
                adopted.batching,
            )
        elif loading.is_iterable(given.dataset):
            check_resumable(given.dataset)
        workers = settings.batching.workers
        if not (is_beside or loading.is_iterable(settings.dataset)):
            workers = dataclasses.replace(workers, number=self.as_drilled(workers.number))
        workers = dataclasses.replace(workers, watch=WorkerValues)
        # `run.weights` holds the weights of the main source only: no short batches beside it.
        drop_last = settings.batching.drop_last or is_beside
        batching = dataclasses.replace(settings.batching, workers=workers, drop_last=drop_last)
        return dataclasses.replace(settings, batching=batching)

    def _sharded(
        self,
        settings: LoadSettings,
        global_batch_size: int,
        seed: int,
        before: Mapping[str, Any] | None,
    ) -> Dealt:
        """Return the source of a dataset, with the function that describes its data.

        Collective: every rank must call it.

        The arguments are as in `deal`; the batch size is that of a DataLoader too.

        Raises:
            UsageError: A run could not resume exactly with this dataset or this batch size.
        """
        dataset, batching = settings.dataset, settings.batching
        seeds_held = _seeds_held(dataset, batching.collate, before)
        source = dataset_source.source(
            dataset,
            self.world,
            seed,
            global_batch_size,
            self.accumulate,
            batching,
            seeds_held=seeds_held,
        )
        about = partial(
            describe,
            dataset,
            global_batch_size,
            batching.shuffle and batching.order is None,
            batching.drop_last,
            seed,
            before=before,
        )
        if isinstance(source, StreamSource):
            proven = self._proven(source, about(collate=batching.collate), is_new=before is None)
            return Dealt(source, global_batch_size, lambda: proven)

        def described() -> Described:
            asked, unlike = source.asked(partial(_examined, seeds_held=seeds_held))
            notes = _notes(dataset, data := about(asked=asked), asked[1], seeds_held=seeds_held)
            return Described(data, notes + _by_number(dataset, *unlike, is_new=before is None))

        return Dealt(source, global_batch_size, cache(described))

    def _proven(self, source: StreamSource, data: dict[str, Any], *, is_new: bool) -> Described:
        """Test whether the stream resumes exactly, and return its description.

        In a new run the generators that the stream holds are seeded only if that makes it exact; a
        resumed run reads the stream as it began.
        """
        kinds = data.get("kinds", {}) | (
            {"order": BY_SET_EPOCH} if is_new and set_epoch_of(source.dataset) is not None else {}
        )
        source.reading.seeds_held = kinds.get("sample_rng") == IN_STREAM
        source.tells_epoch = kinds.get("order") == BY_SET_EPOCH
        note = ""
        if self.check_stream:
            note = stream_check.prove(
                source,
                lambda kept: state.plain_data({"stream": kept})["stream"],
                is_new=is_new,
            )
        kinds |= {"sample_rng": IN_STREAM} if source.reading.seeds_held else {}
        return Described(data | ({"kinds": kinds} if kinds else {}), (note,) if note else ())


def _seeds_held(
    dataset: Any, collate: loading.Collate | None, before: Mapping[str, Any] | None
) -> bool:
    """Return whether held generators are seeded: not if the checkpoint was made without."""
    return (
        before is None
        or "sample_rng" in before.get("kinds", {})
        or not find(drawn_from(dataset, collate))
    )


def _examined(dataset: Any, collate: loading.Collate | None, *, seeds_held: bool) -> Any:
    """Return what `named` and `batches_unlike` do, in a process that loads the dataset."""
    return (
        named(dataset, collate, seeds_held=seeds_held),
        batches_unlike(dataset, collate, seeds_held=seeds_held),
    )


def _by_number(dataset: Any, is_unlike: bool, is_certain: bool, *, is_new: bool) -> tuple[str, ...]:
    """Return a warning if `__getitems__` of a dataset gives other samples than `__getitem__`.

    A DataLoader calls the former, a run the latter.

    Args:
        dataset: The dataset.
        is_unlike: The samples compared differ.
        is_certain: They differ under equal seeds too.
        is_new: The run has no checkpoint yet.

    Raises:
        UsageError: They certainly differ, and the run is new.
    """
    if not is_unlike:
        return ()
    kind = type(batched(dataset)).__name__
    what = (
        f"{kind}.__getitems__ gives a DataLoader other samples than {kind}.__getitem__, and a run"
        " loads samples by the latter, each under a seed of its own"
    )
    remedy = (
        "Do in collate_fn what __getitems__ does to a batch as a whole, as padding, or let both"
        " give the same samples."
    )
    if is_new and is_certain:
        found = "found: samples loaded both ways, under equal seeds, are unlike after collating"
        raise UsageError(what, found, remedy)
    draws = "" if is_certain else " (both draw random numbers: only their order may be unlike)"
    return (f"{what}{draws}. {remedy}",)


def _check_is_dataset(dataset: Any) -> None:
    """Refuse what has no samples, as a class, and a dict of datasets.

    Raises:
        UsageError: It is no dataset.
    """
    is_class, is_dict = isinstance(dataset, type), isinstance(dataset, dict) and 0 not in dataset
    if is_class or is_dict or not (hasattr(dataset, "__getitem__") or hasattr(dataset, "__iter__")):
        keys = f" with {', '.join(map(repr, list(dataset)[:3]))}" if is_dict else ""
        raise UsageError(
            "batches() takes a dataset or a DataLoader",
            f"found: {'the class' if is_class else 'a'} "
            f"{dataset.__name__ if is_class else type(dataset).__name__}{keys}",
            "Give one dataset with __len__ and __getitem__, an iterable one, or a DataLoader.",
        )


def _check_alone(given: LoadSettings) -> None:
    """Refuse a batch size, collate function, workers or order beside a DataLoader.

    Raises:
        UsageError: One of them is given; the DataLoader has its own.
    """
    if (
        given.global_batch_size is not None
        or given.batching.collate is not None
        or given.batching.workers.number
        or given.batching.order is not None
    ):
        raise UsageError(
            "a DataLoader says itself how its dataset is dealt out",
            "found: a DataLoader, and global_batch_size, collate_fn, num_workers or order "
            "beside it",
            "Give the DataLoader alone, or its dataset.",
        )


def _notes(
    dataset: Any, data: Mapping[str, Any], held: list[str], *, seeds_held: bool
) -> tuple[str, ...]:
    """Return warnings about what does not resume exactly after a kill.

    Args:
        dataset: The dataset, for its class name.
        data: Description of the data, with its fingerprint.
        held: Paths to the generators that the dataset or its collate function hold.
        seeds_held: Whether these generators are seeded for each sample.
    """
    if not seeds_held:
        reason = (
            "this run began before generators that are held were seeded for each sample, and goes "
            "on as it began"
        )
        return (
            f"{reason}: what is drawn from {', '.join(held[:3])} is other after a kill; a new run "
            "seeds it",
        )
    if not data["fingerprint"].endswith(DIFFER):
        return ()
    seeded = ", ".join(["those of Python, NumPy and torch", *held[:3]])
    return (
        f"samples of {type(dataset).__name__} differ each time they are loaded, although all "
        f"generators that are found were seeded alike ({seeded}): after a kill they are other ones."
        " Draw from the global generators, or from one that is held in an attribute.",
    )
