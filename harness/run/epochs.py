"""A loop over epochs around the loop over their batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from harness.data.order import Share
from harness.errors import UsageError

END = object()


def by_epoch(batches: Iterator[Any], at: Callable[[], Share]) -> Iterator[tuple[int, Iterator[Any]]]:
    """Each epoch and an iterator over its batches; `at` tells the share that was handed out last.

    To ask for the batch after an epoch's last one is what ends that step. So it is asked for when the outer loop comes round, with all
    done that the user does once an epoch. Raises UsageError.
    """
    batch = next(batches, END)
    while batch is not END:
        epoch = _Epoch(batch, batches, at)
        yield at().epoch, epoch
        if not epoch.is_over:
            raise UsageError(
                f"the loop over the batches of epoch {at().epoch} was left before its end, or never begun",
                remedy="Run it to its end; run.finish() ends the run with this step.",
            )
        batch = END if epoch.was_last else next(batches, END)


class _Epoch:
    """What is left of one epoch."""

    def __init__(self, first: Any, batches: Iterator[Any], at: Callable[[], Share]) -> None:
        self._next, self._batches, self._at = first, batches, at
        self._begun = self.is_over = self.was_last = False

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self.is_over:
            raise StopIteration
        if self._begun:
            if self._at().after.sample == 0:  # the outer loop asks for what comes next
                self.is_over = True
                raise StopIteration
            self._next = next(self._batches, END)
            if self._next is END:  # the run is complete in the middle of an epoch
                self.is_over = self.was_last = True
                raise StopIteration
        self._begun = True
        return self._next
