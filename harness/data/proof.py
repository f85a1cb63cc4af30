"""Does a stream's state bring back what it would have read next? Tried before training, in copies, with what is read put back.

One copy reads on over a saved state, another one takes that state up: both must read the same.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import pickle
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from harness.data.fingerprint import digest_into
from harness.data.held import Randomness, walk
from harness.data.order import kept_generators
from harness.data.stream import StreamSource, advice, begin_pass
from harness.errors import UsageError

MOST, BUDGET_S = 64, 10.0  # items before the saved state, and as many after it; for all of it
LARGE_BYTES, LONG = 1 << 20, 10_000  # arrays and lists that are not copied item by item
OFF = "batches(…, check_stream=False), or data.check_stream=false,"
END = b"end of a pass"


@dataclass(frozen=True)
class Tried:
    """How it went: exact, exact if generators that the stream holds are seeded for each share, or not; and why, in words."""

    is_exact: bool = True
    seeds: bool = False
    untried: str = ""
    unlike: str = ""


@dataclass(frozen=True)
class _Item:
    """Something read, or the end of a pass; and where the stream stood after it."""

    digest: bytes
    state: Any
    passes: int


def prove(source: StreamSource, through: Callable[[Any], Any], *, seeds_held: bool, clock: Callable[[], float] = time.monotonic) -> str:
    """Try it; returns a warning if that was not possible, or "". `through` makes of a state what a checkpoint brings back.

    Raises UsageError if the stream would not go on as it was. Collective: every rank must call it.
    """
    tried = attempt(source.dataset, through, seeds_held=seeds_held, clock=clock)
    unlike, seeds, untried = source.world.agree([int(not tried.is_exact), int(tried.seeds), int(bool(tried.untried))])
    kind = type(source.dataset).__name__
    if unlike:
        remedy = (
            advice(source.dataset) or "Put all that decides what comes next (a buffer, a generator) into its state_dict, or leave it out."
        )
        raise UsageError(
            f"{kind} would not go on exactly: its state_dict does not bring back what it would have read next",
            f"found: {tried.unlike or 'on another rank'}",
            f"{remedy} {OFF} goes on all the same.",
        )
    source.reading.seeds_held = bool(seeds)
    why = tried.untried or "on another rank it could not be tried"
    return f"whether {kind} goes on exactly after a kill could not be tried: {why}" if untried else ""


def attempt(dataset: Any, through: Callable[[Any], Any], *, seeds_held: bool, clock: Callable[[], float] = time.monotonic) -> Tried:
    """Try it in copies of the dataset, as it is; then, with `seeds_held`, with the generators that it holds seeded for each item."""
    until = clock() + BUDGET_S
    shared = Randomness({"dataset": dataset})  # what copies have in common: generators of classes and modules
    shared.look()
    with shared.kept():
        tried = _once(dataset, through, False, until - BUDGET_S / 2, clock)
        if tried.is_exact or not (seeds_held and shared.held):
            return tried
        seeded = _once(dataset, through, True, until, clock)
    if seeded.is_exact and not seeded.untried:
        return Tried(seeds=True)
    return dataclasses.replace(tried, unlike=f"{tried.unlike} (it draws from {', '.join(one.path for one in shared.held[:3])})")


def _once(dataset: Any, through: Callable[[Any], Any], seeds: bool, until: float, clock: Callable[[], float]) -> Tried:
    reading_until = clock() + BUDGET_S / 6
    try:
        with _copied(dataset) as one:
            read = _read(one, 0, 0, 2 * MOST, lambda: clock() < reading_until, seeds, with_states=True)
    except Exception as error:  # noqa: BLE001 # of the dataset's own code, or of what it is made of
        return Tried(untried=f"a copy of it cannot be made and read ({type(error).__name__}: {str(error)[:200]})")
    if not (cuts := _cuts(read)):
        return Tried(untried=f"it gives too little, or too slowly: {len(read)} item(s)")
    for at in cuts:
        expected = [item.digest for item in read[at + 1 : at + 1 + MOST]]
        try:
            with _copied(dataset) as other:
                other.load_state_dict(through(read[at].state))
                found = _read(other, at + 1, read[at].passes, len(expected), lambda: clock() < until, seeds, with_states=False)
        except UsageError:
            raise
        except Exception as error:  # noqa: BLE001
            return Tried(is_exact=False, unlike=f"a copy cannot take the state up ({type(error).__name__}: {str(error)[:200]})")
        if not found:
            return Tried(untried=f"it gives too slowly: {len(read)} item(s) in {BUDGET_S / 6:.2g} s")
        for number, (item, digest) in enumerate(zip(found, expected, strict=False), start=at + 2):
            if item.digest != digest:
                return Tried(is_exact=False, unlike=f"saved after item {at + 1} and restored in a copy, item {number} is another one")
    return Tried()


def _cuts(read: list[_Item]) -> list[int]:
    """After which items to save: one in the middle of a pass, and one at the end of a pass."""
    middle = [
        at
        for at in range(min(MOST, len(read) // 2))
        if read[at].state is not None and read[at].digest != END and read[at + 1].digest != END
    ]
    ends = [at for at, item in enumerate(read[:-1]) if item.digest == END]
    return middle[-1:] + ends[:1]


def _read(
    dataset: Any, first: int, passes: int, count: int, has_time: Callable[[], bool], seeds: bool, *, with_states: bool
) -> list[_Item]:  # fmt: skip
    """Up to `count` items, the first of which has the number `first`, over the ends of passes."""
    read: list[_Item] = []
    randomness = Randomness({"dataset": dataset}, seeds)
    while not (len(read) >= 2 and read[-1].digest == read[-2].digest == END):  # a pass that gave nothing
        iterator = begin_pass(dataset, "proof", passes)
        randomness.look()
        is_over = False
        while not is_over:
            if len(read) == count or not has_time():
                return read
            number = first + len(read)
            with kept_generators():
                randomness.seed("proof", number)
                item = next(iterator, END)
            is_over = item is END
            passes += is_over
            is_cut = with_states and (is_over or number & (number + 1) == 0)  # after 1, 2, 4 … items: a state may be large
            state = copy.deepcopy(dataset.state_dict()) if is_cut else None
            read.append(_Item(END if is_over else _digest(item), state, passes))
    return read


def _digest(item: Any) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    digest_into(digest, item, _pickled)
    return digest.digest()


def _pickled(value: Any) -> bytes:
    """An image object, say."""
    try:
        return pickle.dumps(value)
    except (pickle.PicklingError, TypeError, AttributeError):
        return type(value).__name__.encode()


@contextlib.contextmanager
def _copied(dataset: Any) -> Iterator[Any]:
    """A copy that shares with the dataset what is large and is not written to when it is read."""
    memo: dict[int, Any] = {}
    for _, thing in walk({"dataset": dataset}):
        if isinstance(thing, np.memmap) or (isinstance(thing, np.ndarray) and thing.nbytes > LARGE_BYTES):
            memo[id(thing)] = thing.view()
            memo[id(thing)].flags.writeable = False  # a stream that shuffles it in place is told so, in the copy
        elif isinstance(thing, torch.Tensor) and thing.nbytes > LARGE_BYTES:
            memo[id(thing)] = thing
        elif type(thing) is list and len(thing) > LONG:
            memo[id(thing)] = list(thing)
    with kept_generators():
        yield copy.deepcopy(dataset, memo)
