"""The sample order from a user's sampler or function, and the state that a resume needs for it.

The first answer for an epoch is that epoch's order. A checkpoint stores it, as the sample numbers
that are left, whenever the order is not a function of (seed, epoch). That is the case if the
sampler draws from a generator of its own, has changed since the loop began, or would now return
another order.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from typing import Any

import torch
from torch.utils.data import (
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from harness.data.plan import Position
from harness.data.sampler_state import SamplerState
from harness.errors import UsageError

# The order of these samplers is not computed a second time to compare it.
TORCHS = (
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
CHEAP_S = 0.02  # an order that takes longer is stored, not computed again
MOST_BYTES = 2 << 30
# The numbers that are read of an order without a length; of large datasets, four times theirs.
UNCOUNTED = 1 << 22
KEPT = "kept"  # the kind of an order that the checkpoint stores


class GivenOrder:
    """A sampler or function that gives the order, with its state as far as it can be found."""

    def __init__(
        self, ask: Callable[[int], Iterable[int]], sampler: Any = None, dataset: Any = None
    ) -> None:
        self._ask, self._sampler = ask, sampler
        self._size = len(dataset) if isinstance(dataset, Sized) else 0
        self._state = SamplerState(ask, sampler, dataset)
        # The parts of the state that `set_epoch` changes; a digest of each part of the state.
        self._epoch_paths, self._as_built = set[str](), dict[str, str]()
        self._last: tuple[int, Sequence[int]] | None = None  # an epoch, and its order
        self._kept: tuple[int, Sequence[int]] | None = None  # the same, from the checkpoint
        self._at_begin: dict[str, Any] | None = None  # of a resumed run, in its first epoch
        # Whether an answer changes the state, and whether it takes longer than CHEAP_S.
        self._moves, self._is_costly = False, False

    def begin(
        self,
        answer: Callable[[int], list[int]],
        epoch: int,
        epochs: int | None,
        before: Mapping[str, Any] | None,
    ) -> str:
        """Check that the order can be reproduced, and restore what a checkpoint holds of it.

        `answer` is called twice from the same state. Equal results show that the state that was
        found is complete. A torch sampler and a slow order are not checked that way.

        Args:
            answer: A function that computes the order of an epoch.
            epoch: The epoch in which the run stands.
            epochs: The number of epochs of the whole run; None if it is not limited.
            before: The data record of the checkpoint; None in a new run.

        Returns:
            A notice if the order cannot be restored completely, else "".

        Raises:
            UsageError: The order could not be reproduced after a restart, or a saved generator
                state is of another kind than the generator.
        """
        self._as_built = self._state.digests()
        if hasattr(self._sampler, "set_epoch"):
            self._epoch_paths = self._set_by_epoch(epoch + 1 if epochs is None else epochs - 1)
        is_over = epochs is not None and epoch >= epochs  # then no order is needed any more
        if type(self._sampler) not in TORCHS and not (self._is_costly or is_over):
            self._prove(answer, epoch)
        return "" if before is None else self._restore(before.get("order"))

    def _set_by_epoch(self, epoch: int) -> set[str]:
        """Return the paths of the parts that `set_epoch` changes, found by a call with that epoch.

        A sampler may know only the epochs of the run, or those up to now. If it raises an error,
        the answer is unknown, and the state that it sets is stored as any other.
        """
        held = self._state.held()
        try:
            self._sampler.set_epoch(epoch)
            after = self._state.digests()
        except Exception:  # noqa: BLE001 # user code
            return set()
        finally:
            self._state.reset(held)
        return {path for path, digest in after.items() if digest != self._as_built.get(path)}

    def _restore(self, saved: Mapping[str, Any] | None) -> str:
        """Restore what a checkpoint holds of the order; return a notice, as `begin` does."""
        if saved is None:
            self._at_begin = self._state.read()
            return (
                "the checkpoint has not kept the order of its epoch: the rest of it is dealt out"
                " anew"
                if self._moves
                else ""
            )
        if left := [int(sample) for sample in saved["left"]]:
            self._kept = saved["epoch"], [left[0]] * saved["used"] + left
        lost = self._state.put_back(saved["state"])
        # What is missing now may be added before `put_back`.
        self._at_begin = self._state.read() | dict(saved["state"])
        return (
            f"the sampler has no {', '.join(lost)} any more, which the checkpoint holds"
            if lost
            else ""
        )

    def put_back(self) -> None:
        """Restore the state of a resumed run once more, as it was when its loop began.

        Nothing is done once a second epoch has begun.
        """
        if self._at_begin is not None:
            self._state.put_back(self._at_begin)
            self._at_begin = None

    @property
    def handled(self) -> set[int]:
        """Return the ids of the sampler and of its state that is stored with an order."""
        return {id(self._sampler), *(id(part.obj) for part in self._state.parts())}

    def length(self, answer: Callable[[int], list[int]]) -> int:
        """Return the number of samples in an epoch."""
        if (known := self._known_length()) is not None:
            return known
        held = self._state.held()
        samples = answer(0)
        self._state.reset(held)
        return len(samples)

    def _prove(self, answer: Callable[[int], list[int]], epoch: int) -> None:
        """Raise UsageError if two answers for an epoch, from the same state, differ."""
        held = self._state.held()
        first = answer(epoch)
        self._state.reset(held)
        second = [] if self._is_costly else answer(epoch)
        self._state.reset(held)
        if first != second and not self._is_costly:
            raise UsageError(
                "the order of samples cannot be found again after a restart",
                f"found: {self._name} gives two orders for epoch {epoch}, and no generator that it"
                " draws from",
                "Let it draw from the global generators, which are set for each epoch, from a"
                " generator that is an attribute of it, or from one made of the epoch's number.",
            )

    @property
    def _name(self) -> str:
        """Return the name of the sampler or the function for messages."""
        return f"a {type(self._sampler).__name__}" if self._sampler is not None else "order="

    def __call__(self, epoch: int) -> Sequence[int]:
        """Return the order of an epoch, from the checkpoint if it holds that epoch's order."""
        if self._kept is not None and self._kept[0] == epoch:
            return self._kept[1]
        before, began_at = self._state.digests(), time.perf_counter()
        samples = self._ask(epoch)
        if not isinstance(samples, Iterable):
            raise UsageError(
                f"order({epoch}) gives no order",
                f"found: a {type(samples).__name__}, expected: sample numbers",
                "Let it return the numbers of the epoch's samples, as a list.",
            )
        samples = self._read(samples)
        self._is_costly = time.perf_counter() - began_at > CHEAP_S
        self._moves = self._moves or bool(self._changed_since(before))
        return samples

    def _read(self, samples: Iterable[int]) -> Sequence[int]:
        """Return an order as a sequence.

        Raises:
            UsageError: It does not end where its length says, or without a length not at all.
        """
        if self._sampler is None and isinstance(samples, Sized):
            return samples  # type: ignore[return-value]
        known, longest = self._known_length(), max(UNCOUNTED, 4 * self._size)
        if known is None or known <= max(longest, MOST_BYTES // 4):
            limit = longest if known is None else known
            read = [int(sample) for sample in itertools.islice(samples, limit + 1)]
            if len(read) <= limit:
                return read
        about = (
            f"no len(), and more than {longest}" if known is None else f"len() {known}, and more"
        )
        raise UsageError(
            "the order of an epoch never ends, or not where it should",
            f"found: {self._name} with {about} numbers",
            "Give an order of one epoch: let the sampler stop after the samples of an epoch, and"
            " give their number as its len(). How many epochs there are is epochs=.",
        )

    def _known_length(self) -> int | None:
        """Return the length of the sampler; None for one without a length, and for a function."""
        try:
            return len(self._sampler)
        except (TypeError, NotImplementedError):
            return None

    def _changed_since(self, before: Mapping[str, str]) -> set[str]:
        """Return the paths of the parts that have changed, except those that `set_epoch` changes.

        `before` are the digests of the parts then.
        """
        return {
            path
            for path, digest in self._state.digests().items()
            if digest != before.get(path) and path not in self._epoch_paths
        }

    def begun(self, epoch: int, samples: Sequence[int]) -> None:
        """Record the order of an epoch that begins."""
        if self._last is not None:
            self._at_begin = None  # frees the memory: weights of samples may be large
        self._last = epoch, samples

    def kept(self, position: Position, again: Callable[[int], list[int]]) -> dict[str, Any]:
        """Return what a checkpoint at `position` has to store of the order.

        The result is {} if a new process would find the same order by itself. `again` computes
        the order of an epoch once more.

        Raises:
            UsageError: The rest of the order is longer than `MOST_BYTES`, at 4 bytes a number.
        """
        changed = self._changed_since(self._as_built)
        # Before its first step, a resumed run knows only the order from the checkpoint.
        known = self._last or self._kept
        inside = known is not None and position.sample > 0 and known[0] == position.epoch
        if not (changed or self._moves or (inside and self._is_other(position.epoch, again))):
            return {}
        left = known[1][position.sample :] if inside and known else []
        if 4 * len(left) > MOST_BYTES:
            raise UsageError(
                "the order of this epoch is too long to be kept",
                f"found: {len(left)} numbers are left of what {self._name} gave",
                "Let the order follow from the epoch's number alone.",
            )
        dtype = torch.int64 if left and max(left) >= 1 << 31 else torch.int32
        numbers = torch.tensor(left, dtype=dtype, device="cpu")
        state = {path: value for path, value in self._state.read().items() if path in changed}
        return {"epoch": position.epoch, "used": position.sample, "left": numbers, "state": state}

    def _is_other(self, epoch: int, again: Callable[[int], list[int]]) -> bool:
        """Return whether a new process might compute another order for the epoch that is in use."""
        if self._kept is not None and self._kept[0] == epoch:
            return True
        if type(self._sampler) in TORCHS:
            return False
        if self._is_costly:
            return True
        held = self._state.held()
        try:
            return self._last is None or again(epoch) != list(self._last[1])
        except Exception:  # noqa: BLE001 # user code: on any error the order is stored
            return True
        finally:
            self._state.reset(held)
