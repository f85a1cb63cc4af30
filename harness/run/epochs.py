"""Iterators for the training loop: the batches of all epochs, or epochs of batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from harness.data.plan import Border, Share
from harness.errors import UsageError
from harness.run.work import Work

END: Any = object()


class Lasting(Iterator[Any]):
    """An iterator that does not look complete after an error has ended it.

    A generator is over once it has raised an error. The next request would raise StopIteration, and
    a program that catches the error and goes on would take the run for complete.
    """

    def __init__(self, items: Iterator[Any], step: Callable[[], int]) -> None:
        """Wrap a generator; `step` returns the number of the present step, for the message."""
        self._items, self._step = items, step
        self._ended_by: BaseException | None = None

    def __next__(self) -> Any:
        if isinstance(self._ended_by, SystemExit):
            raise SystemExit(self._ended_by.code)
        if self._ended_by is not None:
            raise UsageError(
                "the loop asks for another batch after an error has ended it",
                f"found: at step {self._step()}, {type(self._ended_by).__name__}: {self._ended_by}",
                "Let the error end the program, and start it again: it resumes from the newest "
                "checkpoint. Handle errors of single samples in the dataset.",
            ) from self._ended_by
        try:
            return next(self._items)
        except StopIteration:
            raise
        except BaseException as error:
            self._ended_by = error
            raise

    def close(self) -> None:
        """Leave the loop."""
        self._items.close()  # type: ignore[attr-defined] # it is a generator


class Batches(Iterator[Any]):
    """The batches of a run, from its resume point to its end.

    The loop starts when the first batch is requested. The length is the number of steps of the
    whole run: it is the same in all attempts, and known before any object is tracked.
    """

    def __init__(
        self,
        begin: Callable[[], Work],
        loop: Callable[[Callable[[], Work], bool], Iterator[Any]],
        step: Callable[[], int],
    ) -> None:
        self.work, self._loop, self._step = cache(begin), loop, step
        # The generator holds no reference to this object: dropping this object ends the loop.
        self._items: Lasting | None = None
        self._by_epoch = False

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._items is None:
            self._items = Lasting(self._loop(self.work, self._by_epoch), self._step)
        return next(self._items)

    def __len__(self) -> int:
        return _known(self.work().steps)

    def __bool__(self) -> bool:
        return True

    def with_borders(self) -> None:
        """Put a `Border` before the batches of each epoch, if the source supports it."""
        self._by_epoch = True

    def close(self) -> None:
        """Leave the loop."""
        if self._items is not None:
            self._items.close()


def by_epoch(
    batches: Iterator[Any],
    at: Callable[[], Share],
    at_head: Callable[[bool], object],
    before_first: Callable[[], object],
    step: Callable[[], int],
) -> Iterator[tuple[int, Iterator[Any]]]:
    """Return an iterator over the epochs, each with an iterator over its batches.

    A step ends when the next batch is requested. The batch after the last one of an epoch is
    therefore requested only when the outer loop continues: the user's code at the end of the epoch
    has run by then. An epoch is yielded before any of its samples is loaded, unless `batches` is a
    wrapper around the iterator of `Run.batches`.

    Args:
        batches: The batches of all epochs.
        at: Returns the share that was yielded last.
        at_head: Called before an epoch is yielded; whether its first batch was requested already.
        before_first: Called when the first batch of an epoch is requested.
        step: Returns the number of the present step.

    Raises:
        UsageError: The loop over the batches of an epoch was left before its end.
    """
    return Lasting(_epochs(batches, at, at_head, before_first, step), step)


def _epochs(
    batches: Iterator[Any],
    at: Callable[[], Share],
    at_head: Callable[[bool], object],
    before_first: Callable[[], object],
    step: Callable[[], int],
) -> Iterator[tuple[int, Iterator[Any]]]:
    work = batches.work if isinstance(batches, Batches) else None
    if isinstance(batches, Batches):
        batches.with_borders()
    bordered = Lasting(_bordered(batches, at, at_head), step)
    border = next(bordered, END)
    while border is not END:
        epoch = _Epoch(bordered, at, before_first, work)
        yield border.epoch, epoch
        if not epoch.is_over:
            raise UsageError(
                f"the loop over the batches of epoch {border.epoch} was left before its end, or "
                "never begun",
                remedy="Leave no loop with `break`. To end the run early, call run.finish() and "
                "let the loop go on: it ends after this step.",
            )
        border = END if epoch.was_last else next(bordered, END)


def _bordered(
    batches: Iterator[Any], at: Callable[[], Share], at_head: Callable[[bool], object]
) -> Iterator[Any]:
    """Yield the batches, and add a border before each epoch that has none."""
    epoch = -1
    for batch in batches:
        if isinstance(batch, Border):
            epoch = batch.epoch
            at_head(False)
        elif at().epoch != epoch:
            epoch = at().epoch
            at_head(True)
            yield Border(epoch)
        yield batch


class _Epoch:
    """The rest of one epoch; its length is that of a whole epoch."""

    def __init__(
        self,
        batches: Iterator[Any],
        at: Callable[[], Share],
        before_first: Callable[[], object],
        work: Callable[[], Work] | None,
    ) -> None:
        self._batches, self._at, self._work = batches, at, work
        self._before_first = before_first
        self._begun = self.is_over = self.was_last = False

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self.is_over:
            raise StopIteration
        if self._begun and self._at().after.sample == 0:  # the outer loop requests the next batch
            self.is_over = True
            raise StopIteration
        if not self._begun:
            self._before_first()
        batch = next(self._batches, END)
        if batch is END or isinstance(batch, Border):
            # The run is complete in the middle of an epoch, or the epoch has no batch left.
            self.is_over, self.was_last = True, batch is END
            raise StopIteration
        self._begun = True
        return batch

    def __len__(self) -> int:
        return _known(self._work().steps_per_epoch if self._work else None)

    def __bool__(self) -> bool:
        return True


def _known(length: int | None) -> int:
    """Return the length. Raise TypeError if it is unknown, as `len` does."""
    if length is None:
        raise TypeError("how many steps there are is not known before they are made")
    return length
