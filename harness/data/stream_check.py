"""Check before training that a stream's state restores what it would have read next.

The check reads copies of the dataset. What they share with it is restored afterwards. One copy
reads on past a saved state, another copy restores that state: both must read the same.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import numpy as np
import torch

from harness.data.fingerprint import content_digest
from harness.data.held_generators import Randomness, walk
from harness.data.plan import kept_generators
from harness.data.stream import StreamSource, advice, begin_pass
from harness.errors import UsageError

# Items before the saved state, and as many after it; items of another pass; seconds for the check.
MOST, AGAIN, BUDGET_S = 64, 4, 10.0
LARGE_BYTES, LONG = 1 << 20, 10_000  # arrays and lists that are not copied item by item
MOST_BYTES = 1 << 30  # of tensors in a copy
OFF = "batches(…, check_stream=False), or data.check_stream=false,"
END = b"end of a pass"


@dataclass(frozen=True)
class Tried:
    """The outcome of a check whether a restored stream reads what the original one reads next.

    `is_exact`: it does, or no check was possible (`untried` holds the reason). `seeds`: it does if
    the generators that the stream holds are seeded for each share. `unlike`: the first difference.
    """

    is_exact: bool = True
    seeds: bool = False
    untried: str = ""
    unlike: str = ""


@dataclass(frozen=True)
class _Item:
    """An item that was read, or the end of a pass, with the stream's state after it."""

    digest: bytes
    state: Any
    epoch: int  # of the next item


def prove(
    source: StreamSource,
    through: Callable[[Any], Any],
    *,
    is_new: bool = True,
    clock: Callable[[], float] = time.monotonic,
) -> str:
    """Check a stream on all ranks; return a warning if that was not possible, else "".

    In a new run the result also decides whether the generators that the stream holds are seeded
    while it is read. A run keeps this to its end, as another choice gives other samples, and the
    result depends on how fast the stream is.

    Args:
        source: The source of the stream; in a run that is not new, with the choice of that run.
        through: A function that turns a state into what a checkpoint restores.
        is_new: Whether the run is new.
        clock: A clock in seconds.

    Raises UsageError if a resumed stream would differ. Collective: every rank must call it.
    """
    tried = attempt(
        source.dataset,
        through,
        tells_epoch=source.tells_epoch,
        seeds=None if is_new else source.reading.seeds_held,
        clock=clock,
    )
    unlike, seeds, untried = source.world.agree(
        [int(not tried.is_exact), int(tried.seeds), int(bool(tried.untried))]
    )
    kind = type(source.dataset).__name__
    if unlike:
        remedy = (
            advice(source.dataset)
            or "Put all that decides what comes next (a buffer, a generator) into its state_dict,"
            " or leave it out."
        )
        raise UsageError(
            f"{kind} would not go on exactly: its state_dict does not bring back what it would have"
            " read next",
            f"found: {tried.unlike or 'on another rank'}",
            f"{remedy} {OFF} goes on all the same.",
        )
    if is_new:
        source.reading.seeds_held = bool(seeds)
    why = tried.untried or "on another rank it could not be tried"
    return (
        f"whether {kind} goes on exactly after a kill could not be tried: {why}" if untried else ""
    )


def attempt(
    dataset: Any,
    through: Callable[[Any], Any],
    *,
    tells_epoch: bool = True,
    seeds: bool | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Tried:
    """Check copies of the dataset.

    Args:
        dataset: The iterable dataset.
        through: A function that turns a state into what a checkpoint restores.
        tells_epoch: Whether to call the dataset's `set_epoch`, if it has one.
        seeds: Whether held generators are seeded for each item; None to check the dataset as it is
            and then, if needed, with its generators seeded.
        clock: A clock in seconds.
    """
    until = clock() + BUDGET_S
    # Copies have the generators of classes and modules in common.
    shared = Randomness({"dataset": dataset})
    shared.look()
    with shared.kept():
        if seeds is not None:
            tried = _once(_Reader(dataset, tells_epoch, seeds, until, clock), through)
            return dataclasses.replace(tried, seeds=seeds)
        tried = _once(_Reader(dataset, tells_epoch, False, until - BUDGET_S / 2, clock), through)
        if tried.is_exact or not shared.held:
            return tried
        seeded = _once(_Reader(dataset, tells_epoch, True, until, clock), through)
    if seeded.is_exact and not seeded.untried:
        return Tried(seeds=True)
    return dataclasses.replace(
        tried,
        unlike=f"{tried.unlike} (it draws from {', '.join(one.path for one in shared.held[:3])})",
    )


def _once(reader: _Reader, through: Callable[[Any], Any]) -> Tried:
    """Check one way of reading the dataset."""
    try:
        read, left_at = reader.whole()
    except Exception as error:  # noqa: BLE001 # any error in the dataset's code
        return Tried(
            untried="no copy of it can be made and read"
            f" ({type(error).__name__}: {str(error)[:200]})"
        )
    if not (cuts := _cuts(read, left_at)):
        return Tried(untried=f"it gives too little, or too slowly: {left_at} item(s)")
    for at in cuts:
        expected = [item.digest for item in read[at + 1 :]]
        state = through(read[at].state)
        try:
            restored = reader.restored(state, read[at].epoch, at + 1, left_at, len(read))
        except Exception as error:  # noqa: BLE001
            return Tried(
                is_exact=False,
                unlike="a copy cannot take the state up"
                f" ({type(error).__name__}: {str(error)[:200]})",
            )
        if not restored:
            return Tried(untried=f"it gives too slowly: {left_at} item(s) in {BUDGET_S / 6:.2g} s")
        for number, (item, digest) in enumerate(
            zip(restored, expected, strict=False), start=at + 1
        ):
            if item.digest != digest:
                saved = f"after item {at + 1}" if at < left_at else "in the second pass"
                which = (
                    f"item {number + 1}"
                    if number < left_at
                    else "what the next pass gives"
                    if at < left_at
                    else "what comes next"
                )
                return Tried(
                    is_exact=False,
                    unlike=f"saved {saved} and restored in a copy, {which} is another one",
                )
    return Tried()


def _cuts(read: list[_Item], left_at: int) -> list[int]:
    """Return the indices of the items after which to save the state.

    One lies in the middle of a pass, one at the end of a pass, and one is the first item of
    another pass.
    """
    inner = [
        at
        for at in range(len(read) - 1)
        if read[at].state is not None and END not in (read[at].digest, read[at + 1].digest)
    ]
    middle = [at for at in inner if at < left_at // 2]
    ends = [at for at in range(left_at - 1) if read[at].digest == END]
    return middle[-1:] + ends[:1] + [at for at in inner if at == left_at and (middle or ends)]


@dataclass(frozen=True)
class _Reader:
    """The way in which copies of a dataset are read."""

    dataset: Any
    tells_epoch: bool
    seeds: bool
    until: float
    clock: Callable[[], float]

    def whole(self) -> tuple[list[_Item], int]:
        """Read a copy from the beginning, as far as the time allows.

        Returns:
            The items, and the number of items after which the copy left its pass for another one.
        """
        copy_, read = _Copy(_copied(self.dataset), self), list[_Item]()
        until = self.clock() + BUDGET_S / 6
        while (
            len(read) < 2 * MOST
            and self.clock() < until
            and [item.digest for item in read[-2:]] != [END, END]
        ):
            number = len(read) + 1
            # A state may be large, so it is saved only after 1, 2, 4 … items.
            read.append(copy_.next(with_state=number & (number - 1) == 0))
        left_at = len(read)
        copy_.leave_pass()
        while left_at > 1 and len(read) < left_at + AGAIN and self.clock() < self.until:
            read.append(copy_.next(with_state=len(read) == left_at))
        return read, left_at

    def restored(self, state: Any, epoch: int, first: int, left_at: int, until: int) -> list[_Item]:
        """Read a copy that restores a state, and leave the pass after the same item as `whole`.

        Args:
            state: The state to restore.
            epoch: The pass to which the next item belongs.
            first: The number of the next item.
            left_at: The number of items after which `whole` left its pass.
            until: The number of items that `whole` read.
        """
        copy_, read = _Copy(_copied(self.dataset), self, first, epoch), list[_Item]()
        copy_.dataset.load_state_dict(state)
        while copy_.number < until and self.clock() < self.until:
            if copy_.number == left_at > first:
                copy_.leave_pass()
            read.append(copy_.next(with_state=False))
        return read


class _Copy:
    """A copy that is read, each item under a seed that follows from its number."""

    def __init__(self, dataset: Any, reader: _Reader, number: int = 0, epoch: int = 0) -> None:
        self.dataset, self.number, self.epoch, self._reader = dataset, number, epoch, reader
        self._randomness = Randomness({"dataset": dataset}, reader.seeds)
        self._iterator: Iterator[Any] | None = None

    def next(self, *, with_state: bool) -> _Item:
        """Read the next item; capture the state after it if asked to, or at the end of a pass."""
        if self._iterator is None:
            self._iterator = begin_pass(
                self.dataset, self.epoch, "proof", tells_epoch=self._reader.tells_epoch
            )
            self._randomness.look()
        with kept_generators():
            self._randomness.seed("proof", self.number)
            item = next(self._iterator, END)
        self.number += 1
        state = copy.deepcopy(self.dataset.state_dict()) if with_state or item is END else None
        if item is END:
            self.leave_pass()
        return _Item(END if item is END else content_digest(item), state, self.epoch)

    def leave_pass(self) -> None:
        """Leave the pass, so that the next item begins another one.

        The end of a pass is often too far away to be reached. Leaving the pass early still shows
        which state outlasts a pass.
        """
        self._iterator, self.epoch = None, self.epoch + 1


def _copied(dataset: Any) -> Any:
    """Return a copy of a dataset that shares its large arrays and list items, but no tensors.

    The copy cannot write to the arrays. Tensors are copied, because no view of one is read-only.

    Raises:
        TypeError: The copy would share more, or its tensors are too large to be copied.
    """
    memo, size_bytes = dict[int, Any](), 0
    for path, obj in walk({"dataset": dataset}):
        if isinstance(obj, SharedMemory):  # a copy attaches to the same memory
            raise TypeError(f"{path} is memory that all copies share")
        if isinstance(obj, np.memmap) or (isinstance(obj, np.ndarray) and obj.nbytes > LARGE_BYTES):
            memo[id(obj)] = obj.view()
            # If the stream shuffles the array in place, the copy raises an error.
            memo[id(obj)].flags.writeable = False
        elif isinstance(obj, torch.Tensor):  # no view of a tensor is read-only
            size_bytes += obj.nbytes
            if size_bytes > MOST_BYTES:
                raise TypeError(
                    f"{path} and what else there is are more than {MOST_BYTES >> 20} MiB"
                    " of tensors, too much to be copied"
                )
        elif type(obj) is list and len(obj) > LONG:
            memo[id(obj)] = list(obj)
    with kept_generators():
        return copy.deepcopy(dataset, memo)
