"""DataLoaders that a program reads beside the run: whose position is lost with the process, and is told once.

Only a pass that goes on from one step to the next has a position to lose. One that begins and ends within a step, as an evaluation's,
has none.
"""

from __future__ import annotations

import functools
import os
import sys
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from torch.utils.data.dataloader import _BaseDataLoaderIter

from harness.data import held_generators, loading

OWN = f"{Path(loading.__file__).parent}{os.sep}"
_begun: weakref.WeakKeyDictionary[Any, _Begun] = weakref.WeakKeyDictionary()  # what reads a loader now


@dataclass(frozen=True)
class _Begun:
    loader: weakref.ref[Any]
    where: str


def watch() -> None:
    """Know from now on which DataLoaders are read in this process: PyTorch has no hook for that, so the beginning of a pass gets one."""
    begin = _BaseDataLoaderIter.__init__
    if hasattr(begin, "__wrapped__"):
        return

    @functools.wraps(begin)
    def noted(self: Any, loader: Any, *others: Any) -> None:
        begin(self, loader, *others)
        if (where := _where()) is not None:
            _begun[self] = _Begun(weakref.ref(loader), where)

    _BaseDataLoaderIter.__init__ = noted  # type: ignore[method-assign]


def _where() -> str | None:
    """The line of the program that began to read; None if it was the run itself, for what it deals out."""
    frame: FrameType | None = sys._getframe(2)
    while (
        frame is not None and held_generators.is_library(file := frame.f_code.co_filename) and not file.startswith(OWN)
    ):  # it may be installed
        frame = frame.f_back
    if frame is None or frame.f_code.co_filename.startswith(OWN):
        return None
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


class StrayLoaders:
    """The passes that were under way at the last step boundary."""

    def __init__(self) -> None:
        self._under_way: dict[int, tuple[Any, int]] = {}
        self._is_told = False

    def at_boundary(self, tracked: Mapping[str, Any]) -> str:
        """At the end of a step: what to say of a pass that was under way at the end of the last one and has gone on since, or ""."""
        if self._is_told or not (_begun or self._under_way):
            return ""
        now = {id(reading): (reading._sampler_iter, reading._num_yielded) for reading in _begun if reading._num_yielded}
        for reading, begun in _begun.items():
            sampler, yielded = self._under_way.get(id(reading), (None, 0))
            is_same_pass = (
                sampler is not None and sampler is reading._sampler_iter
            )  # persistent workers begin the next one in the same object
            if is_same_pass and reading._num_yielded > yielded and not any(begun.loader() is thing for thing in tracked.values()):
                self._is_told = True
                return (
                    f"a DataLoader over {type(reading._dataset).__name__} that is not the run's is read across steps ({begun.where}):"
                    ' after a kill it begins anew. Give it to the run: batches(…, beside={"name": loader}), or read it whole within a step.'
                )
        self._under_way = now
        return ""
