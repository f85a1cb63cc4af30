"""Find values that the program keeps from one step to the next, and that no checkpoint holds.

They begin anew after a restart. Many are only for display (a list of losses that is printed),
others affect training (the patience of early stopping, a replay buffer, the factor of a warm-up in
a closure). Only the author of the program knows which, so all of them are reported.

Every value is searched that can be reached from the variables of the program: its plain values,
arrays and tensors, the sizes of its containers, and the positions of its iterators. What the loop
sets anew in each step is left out, and what tracked objects hold. Of objects of libraries, only
those are searched that `library_values` tells of.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import itertools
import time
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

import harness.untracked.array_changes as array_changes
import harness.untracked.library_values as library_values
from harness.data.held_generators import tells_its_class
from harness.source_code.loops import carried_outside
from harness.source_code.methods import (
    carried_attributes,
    is_told_the_epoch,
    kept_attributes,
    told_attributes,
)
from harness.state.kinds import PLAIN
from harness.untracked.array_changes import ATTRIBUTE, MODULE, ArrayMark
from harness.untracked.object_walk import DEPTH, FEW, MOST_OBJECTS, TimeLimit, parts_with_places
from harness.untracked.program_frames import is_programs_file
from harness.untracked.unkept_values import is_of_program, is_programs

LOOK_S = 1.0  # limit of a search
IMPORTED_AT = time.perf_counter()
HASHED_BYTES = 1 << 20  # of a larger array some numbers are compared
SEARCHED = ("builtins", "collections", "functools", "itertools", "types", "argparse")
CONTAINERS = (dict, list, set, collections.deque)
OF_USE = (int, float, complex, np.generic, np.ndarray, torch.Tensor, nn.Module, dict)
NOTHING: Mapping[int, str] = types.MappingProxyType({})
NAMESPACES = (types.SimpleNamespace, argparse.Namespace)

Root = tuple[str, Any]  # a value of the program, after its path
Enters = Callable[[Any, Any], bool]  # of a holder and a value: whether to search the value
Marks = dict[str, Any]  # by path: a fingerprint, or an `ArrayMark`


class ProgramValues:
    """The values of the program at the last look."""

    def __init__(self) -> None:
        self._before: Marks = {}
        self._holders = set[int]()  # ids of what held a value at the last look
        self._is_first = True
        self._tracked: Mapping[int, str] = {}  # names of tracked objects, by id
        self._reported: set[str] = set()
        self.is_whole = True  # the limits of a search were not reached

    def begin(
        self,
        roots: Iterable[Root],
        enters: Enters,
        held: Collection[int],
        tracked: Mapping[int, str],
    ) -> dict[str, tuple[Any, Any]]:
        """Record the values before the first step, and return the holder of each and itself.

        For the arguments see `changed`; `tracked` are the names of tracked objects, by id.
        """
        found, self._tracked = dict[str, tuple[Any, Any]](), tracked
        self._before, self.is_whole = marks(roots, enters, held, found, tracked)
        self._holders = {id(holder) for holder, _ in found.values()}
        return found

    def changed(
        self,
        roots: Iterable[Root],
        enters: Enters,
        held: Collection[int],
        known: Iterable[str],
        is_spared: Callable[[str, Any, Any, bool], bool],
        is_carried: Callable[[str], bool],
    ) -> list[str]:
        """Return the paths of values that have changed since the last look, each only once.

        A value that was empty or None before the first step is taken to be set up by that step,
        unless the source code shows that later steps use what an earlier one has set.

        Args:
            roots: The variables of the program, after their paths.
            enters: Whether to search a value, by its holder and itself.
            held: Addresses of the memory of tracked objects.
            known: Paths that were reported otherwise; what they hold is left out.
            is_spared: Whether a change need not be reported, by path, holder and value, and whether
                that was empty or None.
            is_carried: Whether a loop or function carries a variable, by its path.
        """
        found = dict[str, tuple[Any, Any]]()
        before = self._before
        now, is_whole = marks(roots, enters, held, found, self._tracked)

        def is_new(path: str) -> bool:
            if path in before and not (self._is_first and before[path] in EMPTY):
                return _differs(before[path], now[path])
            mark, holder = before.get(path), id(found[path][0])
            if mark is None and not (self.is_whole and holder in self._holders):
                return False
            return mark != now[path] and _is_set_once(path, *found[path], mark, is_carried)

        paths = [
            path
            for path in now
            if is_new(path) and not is_spared(path, *found[path], before.get(path) in EMPTY)
        ]
        self._before, self.is_whole = now, self.is_whole and is_whole
        self._holders = {id(holder) for holder, _ in found.values()}
        self._is_first = False
        return self._new_names(paths, known, before)

    def _new_names(self, paths: list[str], known: Iterable[str], before: Marks) -> list[str]:
        """Return the names of changed values that were not reported yet."""
        reported = (*known, *self._reported)
        names = [
            name
            for name in _names(paths)
            if not any(
                name == path or name.startswith((f"{path}.", f"{path}[")) for path in reported
            )
        ]
        self._reported.update(names)
        was = {path: mark[1] for path, mark in before.items() if mark[0] == TRACKED}
        other = "another object than the tracked"
        return [f"{name} ({other} {was[name]})" if name in was else name for name in names]


def marks(
    roots: Iterable[Root],
    enters: Enters,
    held: Collection[int],
    found: dict[str, tuple[Any, Any]],
    tracked: Mapping[int, str] = NOTHING,
) -> tuple[Marks, bool]:
    """Return a fingerprint of each value that the roots hold, and whether all were reached.

    The holder of each value and itself are put into `found`, by path. Of tracked objects, whose
    names are given by id, only the name counts.
    """
    by_path: Marks = {}
    walk = _Walk(roots, enters, tracked)
    for path, value, holder in walk:
        try:
            name = tracked.get(id(value))
            mark = (TRACKED, name) if name else _mark(value, holder, path, held)
        except Exception:  # noqa: BLE001 - another thread may change it, or a class may raise
            continue
        if mark is not None:
            by_path[path] = mark
            found[path] = holder, value
    return by_path, not walk.is_cut


class _Walk:
    """An iterator over path, value and holder of everything that the roots hold, breadth first."""

    def __init__(
        self, roots: Iterable[Root], enters: Enters, tracked: Collection[int] = ()
    ) -> None:
        self._enters, self._limit = enters, TimeLimit(LOOK_S)
        self._tracked = tracked  # ids of what is not searched
        self._waiting = collections.deque((path, value, None, 0) for path, value in roots)
        self._last = collections.deque[tuple[str, Any, Any, int]]()  # of large containers
        self.is_cut = False  # a limit was reached

    def __iter__(self) -> Iterator[tuple[str, Any, Any]]:
        seen: set[int] = set()
        while self._waiting or self._last:
            if len(seen) >= MOST_OBJECTS or self._limit.is_over():
                self.is_cut = True
                return
            path, value, holder, depth = (self._waiting or self._last).popleft()
            if id(value) in self._tracked:
                yield path, value, holder
                continue
            is_plain = value is None or type(value) in PLAIN
            if not is_plain:
                is_new = tells_its_class(value) and id(value) not in seen
                if not is_new or not self._enters(holder, value):
                    continue
                seen.add(id(value))
            yield path, value, holder
            if not is_plain and depth < DEPTH and _is_searched(holder, value):
                try:
                    held = list(itertools.islice(_carried_parts(value), MOST_OBJECTS))
                except Exception:  # noqa: BLE001 - a class of the program may raise
                    continue
                (self._last if len(held) > FEW else self._waiting).extend(
                    (path + name, part, value, depth + 1) for name, part in held
                )


def _is_searched(holder: Any, value: Any) -> bool:
    """Return whether to search what a value holds.

    Searched are containers, what the program has defined, and some objects of libraries.
    """
    if isinstance(value, type):
        return is_programs(value)
    if isinstance(value, types.FunctionType):
        return is_programs_file(value.__code__.co_filename)
    kind = type(value)
    return (
        kind.__module__ in SEARCHED
        or isinstance(value, nn.Module)
        or is_of_program(value)
        or library_values.is_searched(holder, value)
    )


def _carried_parts(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield what a value holds, except for what its `set_epoch` sets."""
    kind: Any = type(value)
    told = (told_attributes(kind) or ()) if is_told_the_epoch(value) else ()
    is_library = library_values.is_library_object(value)
    held = library_values.parts(value) if is_library else parts_with_places(value)
    yield from (item for item in held if item[0].removeprefix(".") not in told)


def is_clock(value: float) -> bool:
    """Return whether a number is a reading of a clock within the last hour.

    Small numbers are none, unless the machine has started only now, as its clocks then have.
    """
    clocks = (time.time(), time.perf_counter(), time.monotonic())
    is_possible = value > 1000.0 or value >= IMPORTED_AT
    return is_possible and any(0.0 <= clock - value < 3600.0 for clock in clocks)


def _mark(value: Any, holder: Any, path: str, held: Collection[int]) -> Any:
    """Return the fingerprint of a value; None if its identity does not matter.

    An array in an attribute that a method sets before it reads it is a result, and compared only
    while it stays the same array.
    """
    if value is None or type(value) in PLAIN:
        if type(value) is int and is_told_the_epoch(holder):
            kind: Any = type(holder)
            if "epoch" in path.rpartition(".")[2] or told_attributes(kind) is None:
                return None
        if type(value) is float and is_clock(value):
            return None
        text = repr(value)
        return type(value).__name__, text if len(text) < 100 else hash(text)
    if isinstance(value, np.generic):
        return type(value).__name__, value.tobytes()
    if isinstance(value, np.ndarray) and value.dtype != object:
        if library_values.is_library_object(holder):
            return array_changes.mark(ATTRIBUTE, value)
        if value.nbytes <= HASHED_BYTES:
            digest = hashlib.blake2b(np.ascontiguousarray(value).data, digest_size=8)
            some = f"{value.shape} {digest.hexdigest()}"
            return array_changes.mark(_where(holder, path), value)._replace(some=some)
        return array_changes.mark(MODULE, value)
    if isinstance(value, torch.Tensor):
        if not array_changes.is_marked(value) or value.data_ptr() in held:
            return None
        return array_changes.mark(_where(holder, path), value)
    if isinstance(value, CONTAINERS):
        return "len", len(value)
    if isinstance(value, itertools.count):
        return "at", repr(value)
    if (count := library_values.count_of(value)) is not None:
        return type(value).__name__, count
    if type(value).__module__ == "builtins" and hasattr(value, "__length_hint__"):
        return "left", value.__length_hint__()
    # Elsewhere, objects of libraries may be made anew in each step.
    is_object = holder is None or isinstance(value, nn.Module | torch.optim.Optimizer)
    return (type(value).__name__, id(value)) if is_object else None


def _is_set_once(
    path: str, holder: Any, value: Any, before: Any, is_carried: Callable[[str], bool]
) -> bool:
    """Return whether a value that was not there before is one that later steps use.

    Args:
        path: The path of the value.
        holder: What holds it; None for a variable.
        value: The value.
        before: Its fingerprint at the last look, one of `EMPTY`; None if there was none.
        is_carried: Whether a loop or function carries a variable, by its path.
    """
    is_list = isinstance(value, list | tuple | collections.deque)
    items = itertools.islice(value, FEW) if is_list else [value]
    if isinstance(holder, Dataset) or not any(map(_is_state, items)):
        return False
    name = path.rpartition(".")[2]
    if holder is None:
        return (is_list and before == EMPTY[1]) or is_carried(path)
    if isinstance(holder, types.FunctionType):
        return name in carried_outside(holder)
    if isinstance(holder, type | nn.Module) or is_of_program(holder):
        return name in kept_attributes(holder if isinstance(holder, type) else type(holder))
    return before == EMPTY[0] and isinstance(holder, (*CONTAINERS, *NAMESPACES))


def _is_state(value: Any) -> bool:
    """Return whether a value may be of use to training: a number, an array, a module, its own."""
    return isinstance(value, OF_USE) or is_of_program(value)


def _carried(holder: Any) -> Collection[str]:
    kind: Any = type(holder)
    return carried_attributes(kind)


def _where(holder: Any, path: str) -> int:
    if library_values.is_library_object(holder):
        return ATTRIBUTE
    is_attribute = is_of_program(holder) or isinstance(holder, nn.Module)
    name = path.rpartition(".")[2]
    return ATTRIBUTE if is_attribute and name not in _carried(holder) else MODULE


TRACKED = "tracked as"
EMPTY = (("NoneType", "None"), ("len", 0))


def _differs(before: Any, now: Any) -> bool:
    if isinstance(before, ArrayMark) and isinstance(now, ArrayMark):
        return before.is_other(now)
    return bool(before != now)


def _names(paths: list[str]) -> list[str]:
    """Return the names to report: a container in place of several of its items."""
    by_container = collections.defaultdict[str, list[str]](list)
    for path in paths:
        cut = path.find("[", path.rfind(": ") + 1)
        by_container[path if cut < 0 else path[:cut]].append(path)
    return [own[0] if len(own) == 1 else name for name, own in by_container.items()]
