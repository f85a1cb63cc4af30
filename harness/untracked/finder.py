"""What lives and is not tracked: named at the first step boundary with the path to it, as its state would be lost at a restart.

It is looked for once, on the writer, from the locals of the program's frames and from what the loop goes over, in attributes and
containers; never in what libraries keep globally. A generator is named when it has been drawn from since; a module (a teacher, a loss with
a running centre), an object of the program's (an average by hand, a memory) or a tensor when numbers in it have changed that no tracked
object holds.
"""

from __future__ import annotations

import collections
import contextlib
import inspect
import random
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import DataLoader, Dataset, Sampler

import harness.untracked.array_changes as array_changes
from harness.data.generator_objects import GLOBAL_GENERATORS
from harness.data.held_generators import is_library, tells_its_class
from harness.distributed import ddp
from harness.untracked.loop_variables import LoopVariables, values_of
from harness.untracked.object_walk import ATOMS, parts
from harness.untracked.unkept_values import PLAIN, fingerprint, is_of_program

DEPTH, WITHIN_S, MOST_OBJECTS = 4, 0.2, 20_000
OPTIMIZER, SCHEDULER, SCALER, AVERAGE, GENERATOR, OTHER = "optimizer", "scheduler", "scaler", "average", "generator", "with state_dict"
NUMBERS = "numbers"
MOST_NAMES = 10  # in one line
PACKAGE = Path(__file__).resolve().parents[1]
OURS = ("harness.task", "harness.tasks", "harness.step")  # instances of our classes that hold what is the program's
PLAIN_LIBRARY = ("builtins", "collections", "functools", "types", "argparse", "random", "__main__")


@dataclass
class _Candidate:
    """Something that has a state, and where it was found."""

    path: str
    ask: Callable[[], Any]  # for the thing; None when the program has let it go
    kind: str
    of_workers: bool  # only worker processes draw from it
    before: Any = None  # of a generator, and of numbers: as it was when it was found

    values: dict[str, Any] = field(default_factory=dict)  # of one of the program's objects: its plain attributes

    @property
    def thing(self) -> Any:
        return self.ask()

    def values_changed(self) -> list[str]:
        """The names of plain attributes that are not what they were, each once."""
        now = _values(self.thing)
        names = [name for name, value in self.values.items() if name in now and now[name] != value]
        for name in names:
            del self.values[name]
        return [f"{self.path}.{name}" for name in names]


class UntrackedFinder:
    """What of the program's lives and is not tracked, by the path to it; `names` grows as it is found."""

    def __init__(self, names: list[str], say: Callable[[str], None], note: Callable[..., None]) -> None:
        self.names = names
        self.handled: set[int] = set()  # by identity: what somebody else keeps, or seeds anew for each sample
        self._say, self._note = say, note
        self._candidates: list[_Candidate] = []
        self._stepped: dict[int, Any] = {}
        self._steps, self._next = 0, 0
        self._tracked: Mapping[str, Any] = {}
        self._unhook: Callable[[], None] = lambda: None
        self._held, self._carried = set[int](), LoopVariables(())

    def begin(self, tracked: Mapping[str, Any], source: Any) -> None:
        """Look for what lives, before the first step; `source` is where the loop's steps come from."""
        self._tracked, self._next, frame = tracked, 1, sys._getframe(1)
        self._unhook = register_optimizer_step_pre_hook(lambda optimizer, *_: self._stepped.update({id(optimizer): optimizer})).remove
        with self._harmless():
            self._carried = LoopVariables(_program_frames(frame))
            roots = [*_frames(frame), *_of_source(source)]
            self._candidates = _find(roots, {id(thing) for thing in tracked.values()}, source)

    @contextlib.contextmanager
    def _harmless(self) -> Iterator[None]:
        """What a program's objects raise when they are looked at is told, and no more is looked for: it is never the run's failure."""
        try:
            yield
        except Exception as error:  # noqa: BLE001
            self._candidates, self._carried = [], LoopVariables(())
            self._say(f"harness: warning: what is not tracked cannot be looked for in this program: {type(error).__name__}: {error}")
            self._note("not_looked", error=f"{type(error).__name__}: {error}")

    def at_boundary(self) -> None:
        """A step is over. After steps 1, 2, 4, 8 … generators are looked at again."""
        self._steps += 1
        if self._steps != self._next:
            return
        self._next *= 2
        self._unhook()
        with self._harmless():
            self._look(sys._getframe(1))
        self._stepped = {}

    def _look(self, frame: FrameType) -> None:
        carried = self._carried.changed(frame)
        if self._candidates:
            kept = self._kept()
            self._held = self._addresses()
            found = [one for one in self._candidates if id(one.thing) not in kept and self._is_lost(one)]
            self._tell(found)
            carried += [name for one in self._candidates if one not in found and id(one.thing) not in kept for name in one.values_changed()]
            self._candidates = [one for one in self._candidates if one.kind in (GENERATOR, NUMBERS) and one not in found]
        if carried:
            names = [*carried[:MOST_NAMES], *[f"{len(carried) - MOST_NAMES} more"] * (len(carried) > MOST_NAMES)]
            anew = "what the loop itself carries from step to step begins anew after a restart"
            self._say(f"harness: {anew}: {', '.join(names)}. What training depends on belongs in run.state.")
            self._note("carried", names=carried)

    def _kept(self) -> set[int]:
        """What is tracked, what that holds, and what is handled otherwise, by identity."""
        kept, until = set(self.handled), time.perf_counter() + WITHIN_S
        things = [("", ddp.plain(thing)) for thing in self._tracked.values()]
        kept |= {id(thing) for thing in self._tracked.values()}
        for _, thing, _ in _walk(
            things, until, lambda holder, name, _: not (name == ".optimizer" and _kind(holder) in (SCHEDULER, SCALER))
        ):
            kept.add(id(thing))
        return kept

    def _is_lost(self, one: _Candidate) -> bool:
        thing, tracked = one.thing, {id(ddp.plain(thing)) for thing in self._tracked.values()}
        if one.kind == OPTIMIZER:
            return id(thing) in self._stepped
        if one.kind == SCHEDULER:
            optimizer = getattr(thing, "optimizer", None)
            return optimizer is None or id(optimizer) in tracked or id(optimizer) in self._stepped
        if one.kind == NUMBERS:
            return thing is not None and bool(one.before.changed(array_changes.of(thing), self._held))
        return one.kind != GENERATOR or one.of_workers or _drawn(thing) != one.before

    def _addresses(self) -> set[int]:
        """Where the numbers of tracked objects lie."""
        if not any(one.kind == NUMBERS for one in self._candidates):
            return set()
        return {mark.address for thing in map(ddp.plain, self._tracked.values()) for mark in array_changes.of(thing).arrays.values()}

    def _tell(self, found: Iterable[_Candidate]) -> None:
        names = [f"{one.path} ({type(one.thing).__name__})" for one in found]
        if names:
            self.names += names
            self._note("untracked", names=names)
            self._say(
                f"harness: warning: not tracked, so lost at a restart: {', '.join(names)}. Name it in run.track(…), and keep tensors and "
                "arrays in run.state; of a generator: draw from the global ones, which are saved."
            )


def _find(roots: list[tuple[str, Any]], tracked: set[int], source: Any) -> list[_Candidate]:
    """Everything that has a state, with the shortest path to it."""
    until = time.perf_counter() + WITHIN_S
    own_dataset = getattr(source, "dataset", None)
    in_workers = bool(getattr(getattr(source, "workers", None), "number", 0))
    is_dealt = not source.is_own

    def enters(holder: Any, _: str, part: Any) -> bool:
        """Whether to look at it: what is another dataset's, or a loader's, is an evaluation's, unless the loop finds its data itself."""
        is_others = is_dealt and isinstance(part, DataLoader | Dataset) and part is not own_dataset and not isinstance(holder, Dataset)
        return id(part) not in tracked and not is_others

    of_data = {id(thing) for _, thing, _ in _walk(_of_source(source), until, enters)} if in_workers else set()
    found, inside = [], set[int]()  # the parts of modules that were found
    for path, thing, _ in _walk(roots, until, enters):
        kind = _kind(thing)
        is_stream = thing is own_dataset and not hasattr(source, "plan")  # whose state is saved for each rank
        if not kind or is_stream or id(thing) in inside or any(thing is one for one in GLOBAL_GENERATORS):
            continue
        if isinstance(thing, nn.Module):
            inside |= {id(part) for part in thing.modules()}
        before = _drawn(thing) if kind == GENERATOR else array_changes.of(thing) if kind == NUMBERS else None
        values = _values(thing) if kind == NUMBERS else {}
        found.append(_Candidate(path, _asked(thing, kind), kind, id(thing) in of_data, before, values))
    return found


def _values(thing: Any) -> dict[str, Any]:
    """The plain attributes of one of the program's objects, as they are now."""
    if not is_of_program(thing):
        return {}
    own = getattr(thing, "__dict__", {})
    return {name: fingerprint(value) for name, value in list(own.items()) if isinstance(value, (*PLAIN, list, dict, deque))}


def _asked(thing: Any, kind: str) -> Callable[[], Any]:
    """How to get at a thing later; what may be large is not kept alive by that."""
    return weakref.ref(thing) if kind == NUMBERS else lambda: thing


def _walk(roots: Iterable[tuple[str, Any]], until: float, enters: Callable[[Any, str, Any], bool]) -> Iterator[tuple[str, Any, int]]:
    """What the roots hold, breadth first: path, object, depth. What `enters(holder, name, object)` refuses is left out."""
    seen: set[int] = set()
    waiting = collections.deque((path, thing, 0) for path, thing in roots if tells_its_class(thing) and enters(None, "", thing))
    while waiting and len(seen) < MOST_OBJECTS and time.perf_counter() < until:
        path, thing, depth = waiting.popleft()
        if id(thing) in seen or _is_a_librarys(thing):
            continue
        seen.add(id(thing))
        yield path, thing, depth
        if depth < DEPTH and not _is_generator(thing):
            waiting += [
                (path + name, part, depth + 1)
                for name, part in parts(thing)
                if tells_its_class(part) and not isinstance(part, ATOMS) and enters(thing, name, part)
            ]


def _is_a_librarys(thing: Any) -> bool:
    """What belongs to a library's own workings, or to the harness's."""
    if isinstance(thing, ATOMS):
        return True
    module = getattr(type(thing), "__module__", "") or ""
    if module.startswith("harness."):
        return not module.startswith(OURS)
    top = module.partition(".")[0]
    return top in sys.stdlib_module_names and top not in PLAIN_LIBRARY


def _kind(thing: Any) -> str:
    """What it is, if it has a state that a loop changes; else ""."""
    name = type(thing).__name__
    if isinstance(thing, torch.optim.Optimizer):
        return OPTIMIZER
    if isinstance(thing, LRScheduler | ReduceLROnPlateau):
        return SCHEDULER
    if _is_generator(thing):
        return GENERATOR
    if isinstance(thing, nn.Module):
        return AVERAGE if isinstance(thing, torch.optim.swa_utils.AveragedModel) or "EMA" in name.upper() else NUMBERS
    if isinstance(thing, torch.Tensor | np.ndarray):
        return NUMBERS if type(thing) in (torch.Tensor, np.ndarray) and array_changes.is_array(thing) else ""
    if isinstance(thing, DataLoader):
        return ""
    if not (_has_method(thing, "state_dict") and _has_method(thing, "load_state_dict")):
        is_its_own = is_of_program(thing) and hasattr(thing, "__weakref__") and not isinstance(thing, Dataset | Sampler)
        return NUMBERS if is_its_own else ""
    if name == "GradScaler":
        return SCALER if thing.is_enabled() else ""
    return SCHEDULER if name.endswith("Scheduler") else OTHER


def _has_method(thing: Any, name: str) -> bool:
    return callable(getattr(type(thing), name, None))


def _is_generator(thing: Any) -> bool:
    if isinstance(thing, random.SystemRandom):
        return False
    return isinstance(thing, torch.Generator | np.random.Generator | np.random.RandomState | random.Random)


def _drawn(generator: Any) -> str:
    """How far a generator has come."""
    if isinstance(generator, torch.Generator):
        return str(hash(generator.get_state().numpy().tobytes()))
    if isinstance(generator, random.Random):
        return str(hash(generator.getstate()))
    state = generator.bit_generator.state if isinstance(generator, np.random.Generator) else generator.get_state(legacy=False)
    return str({key: _plain(value) for key, value in state.items()})


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return hash(value.tobytes()) if isinstance(value, np.ndarray) else value


def _program_frames(frame: FrameType | None) -> Iterator[tuple[str, FrameType]]:
    """The frames of the program's own code, innermost first, with the beginning of how a variable of theirs is written."""
    while frame is not None:
        code = frame.f_code
        if _is_programs(code.co_filename):
            file, is_function = Path(code.co_filename).name, bool(code.co_flags & inspect.CO_OPTIMIZED)
            yield f"{file}: {code.co_name}(): " if is_function else f"{file}: ", frame
        frame = frame.f_back


def _frames(frame: FrameType | None) -> Iterator[tuple[str, Any]]:
    """The variables of the program's frames, innermost first, each with its name behind the frame's."""
    seen = set[int]()
    for spelled, inner in _program_frames(frame):
        code, module = inner.f_code, inner.f_globals
        if code.co_flags & inspect.CO_OPTIMIZED:
            yield from [(spelled + name, value) for name, value in values_of(inner).items()]
        if id(module) not in seen and not str(module.get("__file__") or code.co_filename).startswith(str(PACKAGE)):
            seen.add(id(module))
            file = Path(code.co_filename).name
            yield from [(f"{file}: {name}", value) for name, value in list(module.items()) if not name.startswith("__")]


def _is_programs(file: str) -> bool:
    if file.startswith("<"):
        return not file.startswith("<frozen")
    path = Path(file)
    if path.is_relative_to(PACKAGE):
        return path == PACKAGE / "train.py" or path.parent == PACKAGE / "tasks"
    return not is_library(file)


def _of_source(source: Any) -> list[tuple[str, Any]]:
    """What the loop goes over."""
    plan, workers = getattr(source, "plan", None), getattr(source, "workers", None)
    held = {
        "dataset": getattr(source, "dataset", None), "collate_fn": getattr(source, "collate", None),
        "order": getattr(plan, "order", None), "worker_init_fn": getattr(workers, "init", None),
    }  # fmt: skip
    return [(name, thing) for name, thing in held.items() if thing is not None]
