"""Find DataLoaders that a program reads in addition to the run, and report one of them, once.

Their position is lost with the process. Only a pass that continues from one step to the next has a
position to lose. A pass that begins and ends within one step, such as an evaluation's, has none.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.utils.data.dataloader import _BaseDataLoaderIter

from harness.data import held_generators, loading
from harness.data.plan import kept_generators

OWN = f"{Path(loading.__file__).parent}{os.sep}"
# The iterators that read a DataLoader now.
_begun: weakref.WeakKeyDictionary[Any, _Begun] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class _Begun:
    """The loader that an iterator reads, and the line of the program that created the iterator."""

    loader: weakref.ref[Any]
    where: str


def watch() -> None:
    """Record from now on which DataLoaders are read in this process.

    PyTorch has no hook for that, so the constructor of DataLoader iterators is wrapped. What it
    draws for persistent workers is put back.
    """
    begin = _BaseDataLoaderIter.__init__
    if hasattr(begin, "__wrapped__"):
        return

    @functools.wraps(begin)
    def noted(self: Any, loader: Any, *others: Any) -> None:
        where = _where()
        # Persistent workers are made once in a process, not once in each pass: after a restart
        # their seed would be drawn once more. The sampler draws in each pass, after this.
        once = where is not None and bool(getattr(loader, "persistent_workers", False))
        with _undrawn(loader.generator) if once else contextlib.nullcontext():
            begin(self, loader, *others)
        if where is not None:
            _begun[self] = _Begun(weakref.ref(loader), where)

    _BaseDataLoaderIter.__init__ = noted  # type: ignore[method-assign]


@contextlib.contextmanager
def _undrawn(generator: torch.Generator | None) -> Iterator[None]:
    """Put back the global generators, and a loader's own, when the block ends."""
    before = None if generator is None else generator.get_state()
    with kept_generators():
        yield
    if generator is not None and before is not None:
        generator.set_state(before)


def _where() -> str | None:
    """Return the line of the program that began a pass; None if the run's own data code did."""
    frame: FrameType | None = sys._getframe(2)
    while (
        frame is not None
        and held_generators.is_library(file := frame.f_code.co_filename)
        and not file.startswith(OWN)
    ):  # it may be installed
        frame = frame.f_back
    if frame is None or frame.f_code.co_filename.startswith(OWN):
        return None
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


class StrayLoaders:
    """The passes over DataLoaders that were in progress at the last step boundary."""

    def __init__(self) -> None:
        self._under_way: dict[int, tuple[Any, int]] = {}
        self._is_reported = False

    def at_boundary(self, tracked: Mapping[str, Any]) -> str:
        """Return a warning about a pass that continues across steps, or "".

        Such a pass was in progress at the end of the last step and has advanced since. Tracked
        DataLoaders are left out, and there is only one warning.
        """
        if self._is_reported or not (_begun or self._under_way):
            return ""
        now = {
            id(reading): (reading._sampler_iter, reading._num_yielded)
            for reading in _begun
            if reading._num_yielded
        }
        for reading, begun in _begun.items():
            sampler, yielded = self._under_way.get(id(reading), (None, 0))
            # With persistent workers, the next pass uses the same iterator.
            is_same_pass = sampler is not None and sampler is reading._sampler_iter
            if (
                is_same_pass
                and reading._num_yielded > yielded
                and not any(begun.loader() is obj for obj in tracked.values())
            ):
                self._is_reported = True
                return (
                    f"a DataLoader over {type(reading._dataset).__name__} "
                    f"that is not the run's is read across steps ({begun.where}):"
                    " after a kill it begins anew. Give it to the run: "
                    'batches(…, beside={"name": loader}), or read it whole within a step.'
                )
        self._under_way = now
        return ""
