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

import collections
import hashlib
import itertools
import time
import types
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

import harness.untracked.array_changes as array_changes
import harness.untracked.library_values as library_values
from harness.data.held_generators import tells_its_class
from harness.state.kinds import PLAIN
from harness.untracked.array_changes import ATTRIBUTE, MODULE, ArrayMark
from harness.untracked.loop_variables import carried_attributes, told_attributes
from harness.untracked.object_walk import DEPTH, FEW, MOST_OBJECTS, parts
from harness.untracked.program_frames import is_programs_file
from harness.untracked.unkept_values import is_of_program, is_programs

WITHIN_S = 1.0  # limit of a search
IMPORTED_AT = time.perf_counter()
HASHED_BYTES = 1 << 20  # of a larger array some numbers are compared
ITERATORS = (zip, map, enumerate, itertools.cycle, itertools.islice, itertools.chain)
SEARCHED = ("builtins", "collections", "functools", "itertools", "types", "argparse")
CONTAINERS = (dict, list, set, collections.deque)

Root = tuple[str, Any]  # a value of the program, after its path
Enters = Callable[[Any, Any], bool]  # of a holder and a value: whether to search the value
Marks = dict[str, Any]  # by path: a fingerprint, or an `ArrayMark`


class ProgramValues:
    """The values of the program at the last look."""

    def __init__(self) -> None:
        self._before: Marks = {}
        self._is_first = True
        self._reported: set[str] = set()
        self.is_whole = True  # the limits of a search were not reached

    def begin(self, roots: Iterable[Root], enters: Enters, held: Collection[int]) -> None:
        """Record the values before the first step; for the arguments see `changed`."""
        self._before, self.is_whole = marks(roots, enters, held, {})

    def changed(
        self,
        roots: Iterable[Root],
        enters: Enters,
        held: Collection[int],
        known: Iterable[str],
        is_spared: Callable[[Any, Any, bool], bool],
    ) -> list[str]:
        """Return the paths of values that have changed since the last look, each only once.

        A value that was empty or None before the first step is taken to be set up by that step.

        Args:
            roots: The variables of the program, after their paths.
            enters: Whether to search a value, by its holder and itself.
            held: Addresses of the memory of tracked objects.
            known: Paths that were reported otherwise; what they hold is left out.
            is_spared: Whether a change need not be reported, by the holder, the value, and whether
                it was empty or None.
        """
        found = dict[str, tuple[Any, Any]]()
        before, (now, is_whole) = self._before, marks(roots, enters, held, found)
        self._before, self.is_whole = now, self.is_whole and is_whole
        paths = [
            path
            for path, mark in now.items()
            if path in before
            and _differs(before[path], mark)
            and not (self._is_first and before[path] in EMPTY)
            and not is_spared(*found[path], before[path] in EMPTY)
        ]
        self._is_first = False
        reported = (*known, *self._reported)
        names = [
            name
            for name in _names(paths)
            if not any(
                name == path or name.startswith((f"{path}.", f"{path}[")) for path in reported
            )
        ]
        self._reported.update(names)
        return names


def marks(
    roots: Iterable[Root],
    enters: Enters,
    held: Collection[int],
    found: dict[str, tuple[Any, Any]],
) -> tuple[Marks, bool]:
    """Return a fingerprint of each value that the roots hold, and whether all were reached.

    The holder of each value and itself are put into `found`, by path.
    """
    by_path: Marks = {}
    walk = _Walk(roots, enters)
    for path, value, holder in walk:
        try:
            mark = _mark(value, holder, path, held)
        except Exception:  # noqa: BLE001 - another thread may change it, or a class may raise
            continue
        if mark is not None:
            by_path[path] = mark
            found[path] = holder, value
    return by_path, not walk.is_cut


class _Walk:
    """An iterator over path, value and holder of everything that the roots hold, breadth first."""

    def __init__(self, roots: Iterable[Root], enters: Enters) -> None:
        self._enters, self._until = enters, time.perf_counter() + WITHIN_S
        self._waiting = collections.deque((path, value, None, 0) for path, value in roots)
        self._last = collections.deque[tuple[str, Any, Any, int]]()  # of large containers
        self.is_cut = False  # a limit was reached

    def __iter__(self) -> Iterator[tuple[str, Any, Any]]:
        seen: set[int] = set()
        while self._waiting or self._last:
            if len(seen) >= MOST_OBJECTS or time.perf_counter() > self._until:
                self.is_cut = True
                return
            path, value, holder, depth = (self._waiting or self._last).popleft()
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


def is_told_the_epoch(value: Any) -> bool:
    """Return whether an object has a `set_epoch`, which is called again after a restart."""
    own = getattr(value, "__dict__", {})
    return not isinstance(value, type) and callable(
        own.get("set_epoch") or getattr(type(value), "set_epoch", None)
    )


def _carried_parts(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield what a value holds, except for what its `set_epoch` sets."""
    kind: Any = type(value)
    told = (told_attributes(kind) or ()) if is_told_the_epoch(value) else ()
    yield from (item for item in _parts(value) if item[0].removeprefix(".") not in told)


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield what a value holds, each after its path."""
    if isinstance(value, type):
        yield from (
            (f".{name}", item)
            for name, item in list(vars(value).items())
            if not name.startswith("__") and not callable(item) and not hasattr(item, "__get__")
        )
    elif isinstance(value, types.GeneratorType):
        if not value.gi_running and value.gi_frame and is_programs_file(value.gi_code.co_filename):
            local = [item for item in value.gi_frame.f_locals.values() if type(item) in PLAIN]
            yield " (its position)", str((value.gi_frame.f_lasti, local))
    elif isinstance(value, ITERATORS):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated for those of itertools
            reduced: Any = value.__reduce__()
        _, made_of, *more = reduced
        items = [item for part in (made_of, *more) if isinstance(part, tuple) for item in part]
        yield " (its position)", str([_place(item) for item in items])
        yield from ((f" ({at})", item) for at, item in enumerate(items) if _place(item) is None)
    elif library_values.is_library_object(value):
        yield from library_values.parts(value)
    else:
        yield from parts(value)


def _is_clock(value: float) -> bool:
    """Return whether a number is a reading of a clock within the last hour.

    Small numbers are none, unless the machine has started only now, as its clocks then have.
    """
    clocks = (time.time(), time.perf_counter(), time.monotonic())
    is_possible = value > 1000.0 or value >= IMPORTED_AT
    return is_possible and any(0.0 <= clock - value < 3600.0 for clock in clocks)


def _place(item: Any) -> Any:
    """Return how far an iterator of Python's own is, or a number or the length of a list."""
    if isinstance(item, list | tuple):
        return len(item)
    if type(item).__module__ == "builtins" and hasattr(item, "__length_hint__"):
        return item.__length_hint__()
    return item if type(item) in PLAIN else None


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
        if type(value) is float and _is_clock(value):
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
            address = array_changes.mark(0, value).address
            some = f"{value.shape} {digest.hexdigest()}"
            return ArrayMark(_where(holder, path), address, 0, some)
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


def _carried(holder: Any) -> Collection[str]:
    kind: Any = type(holder)
    return carried_attributes(kind)


def _where(holder: Any, path: str) -> int:
    if library_values.is_library_object(holder):
        return ATTRIBUTE
    is_attribute = is_of_program(holder) or isinstance(holder, nn.Module)
    name = path.rpartition(".")[2]
    return ATTRIBUTE if is_attribute and name not in _carried(holder) else MODULE


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
