"""Objects of a program that may hold state, found in its variables."""

from __future__ import annotations

import collections
import math
import sys
import time
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.data import DataLoader, Dataset, Sampler

import harness.untracked.array_changes as array_changes
from harness.data.generator_objects import GLOBAL_GENERATORS, drawn_from, is_generator
from harness.data.held_generators import tells_its_class
from harness.distributed import wrappers
from harness.untracked.object_walk import ATOMS, DEPTH, FEW, MOST_OBJECTS, TimeLimit, parts
from harness.untracked.program_frames import of_source
from harness.untracked.unkept_values import is_of_program

OPTIMIZER = "optimizer"
SCHEDULER = "scheduler"
SCALER = "scaler"
AVERAGE = "average"
GENERATOR = "generator"
OTHER = "with state_dict"
NUMBERS = "numbers"
# Modules of the harness whose instances hold objects of the program.
OURS = (
    "harness.task",
    "harness.tasks",
    "harness.step",
)
# Modules of the standard library whose instances are searched.
PLAIN_LIBRARY = ("builtins", "collections", "functools", "types", "argparse", "random", "__main__")
OF_DATA = (dict, list, tuple, set, collections.deque, np.ndarray, torch.Tensor)
WITHIN_S = 0.2  # limit of a search
MOST_CHEAP, CHEAP_S = 32, 0.03  # see `LookTimes`
MOST_OF_TIME, MOST_AT_SAVES = 0.01, 0.001  # likewise, as shares of the time


@dataclass
class Candidate:
    """An object with state, and where it was found."""

    path: str
    ask: Callable[[], Any]  # returns the object; None if the program has freed it
    kind: str
    of_workers: bool  # found in the data: only worker processes draw from it
    before: Any = None  # of kind GENERATOR or NUMBERS: the state when it was found

    @property
    def obj(self) -> Any:
        """Return the object, or None if the program has freed it."""
        return self.ask()


def find_candidates(
    roots: list[tuple[str, Any]], tracked: set[int], source: Any
) -> list[Candidate]:
    """Find every object with state, by the shortest path to it."""
    limit = TimeLimit(WITHIN_S)
    own_dataset = getattr(source, "dataset", None)
    in_workers = bool(getattr(getattr(source, "workers", None), "number", 0))

    def enters(holder: Any, _: str, part: Any) -> bool:
        return id(part) not in tracked and not is_of_evaluation(holder, part, source)

    of_workers = (
        {id(obj) for _, obj, _ in walk(of_source(source), limit, enters)} if in_workers else set()
    )
    candidates, inside = [], set[int]()  # `inside`: ids of the parts of modules that were found
    for path, obj, _ in walk(roots, limit, enters):
        kind = kind_of(obj)
        # The state of a stream is saved for each rank.
        is_stream = obj is own_dataset and not hasattr(source, "plan")
        if (
            not kind
            or is_stream
            or id(obj) in inside
            or any(obj is generator for generator in GLOBAL_GENERATORS)
        ):
            continue
        if isinstance(obj, nn.Module):
            inside |= {id(part) for part in obj.modules()}
        candidates.append(_candidate(path, obj, kind, of_workers=id(obj) in of_workers))
    return candidates


def is_of_evaluation(holder: Any, part: Any, source: Any) -> bool:
    """Return whether an object is data that belongs to an evaluation.

    A dataset other than the loop's, or a DataLoader, does, unless the loop finds its data itself. A
    dataset inside another dataset does not.
    """
    return (
        not source.is_own
        and isinstance(part, DataLoader | Dataset)
        and part is not getattr(source, "dataset", None)
        and not isinstance(holder, Dataset)
    )


def is_data(value: Any) -> bool:
    """Return whether to search a value in a dataset that may only be evaluated.

    Containers, arrays and the program's objects are; positions of iterators are not.
    """
    return isinstance(value, OF_DATA) or is_of_program(value)


def _candidate(path: str, obj: Any, kind: str, *, of_workers: bool) -> Candidate:
    """Return the candidate for an object, with its present state."""
    if kind == GENERATOR:
        return Candidate(path, _asked(obj, kind), kind, of_workers, drawn_from(obj))
    if kind == NUMBERS:
        return Candidate(path, _asked(obj, kind), kind, of_workers, array_changes.of(obj))
    return Candidate(path, _asked(obj, kind), kind, of_workers)


def _asked(obj: Any, kind: str) -> Callable[[], Any]:
    """Return a function that returns the object later.

    An object with arrays may be large, so it is referenced only weakly.
    """
    return weakref.ref(obj) if kind == NUMBERS else lambda: obj


def walk(
    roots: Iterable[tuple[str, Any]], limit: TimeLimit, enters: Callable[[Any, str, Any], bool]
) -> Iterator[tuple[str, Any, int]]:
    """Yield path, object and depth of everything that the roots hold, breadth first.

    Args:
        roots: paths and objects to start from.
        limit: when the search ends.
        enters: returns whether to search an object, given its holder, its name there and itself.
    """
    seen: set[int] = set()
    waiting = collections.deque(
        (path, obj, 0) for path, obj in roots if tells_its_class(obj) and enters(None, "", obj)
    )
    last = collections.deque[tuple[str, Any, int]]()  # of large containers
    while (waiting or last) and len(seen) < MOST_OBJECTS and not limit.is_over():
        path, obj, depth = (waiting or last).popleft()
        if id(obj) in seen or _is_a_librarys(obj):
            continue
        seen.add(id(obj))
        yield path, obj, depth
        if depth < DEPTH and not is_generator(obj):
            held = [
                (path + name, part, depth + 1)
                for name, part in parts(obj)
                if tells_its_class(part) and not isinstance(part, ATOMS) and enters(obj, name, part)
            ]
            (last if len(held) > FEW else waiting).extend(held)


def _is_a_librarys(obj: Any) -> bool:
    """Return whether an object is an atom, or internal to the standard library or the harness."""
    if isinstance(obj, ATOMS):
        return True
    module = getattr(type(obj), "__module__", "") or ""
    if module.startswith("harness."):
        return not module.startswith(OURS)
    top = module.partition(".")[0]
    return top in sys.stdlib_module_names and top not in PLAIN_LIBRARY


def kind_of(obj: Any) -> str:
    """Return the kind of an object with state that a loop changes; "" for any other."""
    name = type(obj).__name__
    if isinstance(obj, torch.optim.Optimizer):
        return OPTIMIZER
    if isinstance(obj, LRScheduler | ReduceLROnPlateau):
        return SCHEDULER
    if is_generator(obj):
        return GENERATOR
    if isinstance(obj, nn.Module):
        return (
            AVERAGE
            if isinstance(obj, torch.optim.swa_utils.AveragedModel) or "EMA" in name.upper()
            else NUMBERS
        )
    if isinstance(obj, torch.Tensor | np.ndarray):
        return (
            NUMBERS
            if type(obj) in (torch.Tensor, np.ndarray) and array_changes.is_array(obj)
            else ""
        )
    if isinstance(obj, DataLoader):
        return ""
    if not (_has_method(obj, "state_dict") and _has_method(obj, "load_state_dict")):
        is_its_own = (
            is_of_program(obj)
            and hasattr(obj, "__weakref__")
            and not isinstance(obj, Dataset | Sampler)
        )
        return NUMBERS if is_its_own else ""
    if name == "GradScaler":
        return SCALER if obj.is_enabled() else ""
    return SCHEDULER if name.endswith("Scheduler") else OTHER


def _has_method(obj: Any, name: str) -> bool:
    return callable(getattr(type(obj), name, None))


@dataclass
class Tracked:
    """What a checkpoint holds: tracked objects by name, addresses of their memory, `GivenState`."""

    objects: Mapping[str, Any]
    held: Collection[int]
    given: Any


def is_lost(candidate: Candidate, stepped: Collection[int], tracked: Tracked) -> bool:
    """Return whether a candidate has been used such that a restart would lose its state.

    `stepped` are the ids of the optimizers that have made a step.
    """
    obj, given = candidate.obj, tracked.given
    if candidate.kind == OPTIMIZER:
        return id(obj) in stepped
    if candidate.kind == SCHEDULER:
        optimizer = getattr(obj, "optimizer", None)
        objects = {id(wrappers.unwrap(each)) for each in tracked.objects.values()}
        return optimizer is None or id(optimizer) in objects or id(optimizer) in stepped
    if candidate.kind == NUMBERS:
        changed = candidate.before.changed(array_changes.of(obj), tracked.held)
        is_given = given is not None and given.keeps_arrays(obj, changed)
        return obj is not None and bool(changed) and not is_given
    if given is not None and given.keeps(None, obj):
        return False
    return (
        candidate.kind != GENERATOR or candidate.of_workers or drawn_from(obj) != candidate.before
    )


class LookTimes:
    """When to look at the candidates and values: after steps 1, 2, 4, 8 … of the attempt.

    In between also in the first step of an epoch, as often as that is cheap: each of the first
    `MOST_CHEAP` times if a look takes less than `CHEAP_S`, else while all of them take less than a
    hundredth of the time. At a save, which training waits for, while it is a thousandth.
    """

    def __init__(self) -> None:
        self.steps, self._next = 0, 0
        self.epoch, self._between, self._looked_at = -1, 0, 0
        self._took_s, self._ended_s = 0.0, 0.0

    def begin(self) -> None:
        """Begin to count; before, it is never time to look."""
        self._next = 1

    def at_boundary(self, epoch: int) -> bool:
        """Count a step, and return whether to look after it."""
        self.steps += 1
        is_new, self.epoch = epoch != self.epoch, epoch
        if self.steps == self._next:
            self._next *= 2
            return True
        is_few = self._between < MOST_CHEAP and self._took_s < CHEAP_S
        if not is_new or not self._is_within(math.inf if is_few else MOST_OF_TIME):
            return False
        self._between += 1
        return True

    def at_save(self) -> bool:
        """Return whether to look at a save after the last step."""
        return self._is_within(MOST_AT_SAVES)

    def _is_within(self, share: float) -> bool:
        """Return whether one more look after this step takes at most this share of the time."""
        if self._looked_at == 0 or self._looked_at == self.steps:
            return False
        return self._took_s <= share * (time.perf_counter() - self._ended_s)

    def looked(self, took_s: float) -> None:
        """Record a look after the last step, and how long this thread computed for it."""
        self._looked_at, self._took_s, self._ended_s = self.steps, took_s, time.perf_counter()
