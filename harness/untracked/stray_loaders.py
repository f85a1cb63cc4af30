"""Find DataLoaders that a program reads in addition to the run, and values that workers carry.

Of the loaders, one is reported, once. Their position is lost with the process. Only a pass that
continues from one step to the next has a position to lose. A pass that begins and ends within one
step, such as an evaluation's, has none.
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

import numpy as np
import torch
from torch.utils.data import Dataset
from torch.utils.data.dataloader import _BaseDataLoaderIter

from harness.data import held_generators, loading
from harness.data.generator_objects import is_generator
from harness.data.plan import kept_generators
from harness.source_code.methods import results
from harness.state.kinds import PLAIN
from harness.untracked.object_walk import parts
from harness.untracked.program_frames import is_programs_file
from harness.untracked.program_values import ProgramValues, Root

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


class WorkerValues:
    """The values that a loader worker carries from one batch to the next.

    They lie in the dataset, the collate function, and the numbers among the globals of the modules
    that define them. A dict that grows, and what was empty or None, is taken for a cache.
    """

    def __init__(self, dataset: Any, collate: Any) -> None:
        self._dataset, self._collate, self._values = dataset, collate, ProgramValues()
        with contextlib.suppress(Exception):  # a class of the program may raise at any question
            self._values.begin(self._roots(), self._enters, (), {})

    def __call__(self) -> list[str]:
        """Return the paths of what has changed since the last call."""
        with contextlib.suppress(Exception):  # likewise
            return self._values.changed(
                self._roots(), self._enters, (), (), self._is_cache, lambda path: False
            )
        return []

    def _roots(self) -> Iterator[Root]:
        datasets = list(_of_data("dataset", self._dataset))
        yield from (*datasets, ("collate_fn", self._collate))
        loads = [getattr(type(dataset), "__getitem__", None) for _, dataset in datasets]
        collate = getattr(self._collate, "__func__", self._collate)
        calls = [vars(kind).get("__call__") for kind in type(collate).__mro__]
        for function in (*loads, collate, *calls):
            own = getattr(function, "__globals__", {})
            if is_programs_file(file := str(own.get("__file__", "__main__"))):
                name = os.path.basename(file)
                yield from (
                    (f"{name}: {key}", own[key]) for key in [*own] if type(own[key]) in PLAIN
                )

    @staticmethod
    def _enters(_: Any, value: Any) -> bool:
        return not is_generator(value)

    @staticmethod
    def _is_cache(_: str, holder: Any, value: Any, was_empty: bool) -> bool:
        """Return whether a change is that of a cache, or an array that each sample makes anew."""
        if was_empty or isinstance(value, dict):
            return True
        kind: Any = type(holder)
        return isinstance(value, np.ndarray | torch.Tensor) and any(
            getattr(holder, name, None) is value for name in results(kind)
        )


def _of_data(path: str, dataset: Any) -> Iterator[Root]:
    """Yield a dataset, and those that a dataset of torch's is made of, each after its path."""
    yield path, dataset
    if str(type(dataset).__module__).startswith("torch.utils.data."):
        for name, part in parts(dataset):
            inner = parts(part) if isinstance(part, list | tuple | dict) else [("", part)]
            for at, item in inner:
                if isinstance(item, Dataset):
                    yield from _of_data(path + name + at, item)
