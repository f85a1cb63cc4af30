"""Generators of random numbers that a dataset, its transforms or a collate function hold: found, and seeded for each sample.

They are found by walking what is reached from there: attributes, lists, tuples, dicts, partial functions, closures, what a function
takes by default, and the globals that the program's own functions read. The walk is bounded by numbers, not by a clock: it must find
the same in each life of a run.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import hashlib
import itertools
import os
import random
import site
import sys
import sysconfig
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch

from harness.data.plan import seed_cpu, seed_of

OBJECTS, DEPTH, FIRST = 20_000, 12, 64  # looked at in all; how deep; and of each list or dict
LEAVES = (str, bytes, bytearray, int, float, complex, type(None), type, ModuleType, CodeType, torch.dtype, torch.device, torch.Size)
AT_START = {"__init__", "__new__", "__len__", "__init_subclass__"}  # what these draw from is not drawn from for a sample
INSTALLED = {"site-packages", "dist-packages"}  # folders of libraries, whichever Python they are of
_FOLDERS = (*(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")), site.getusersitepackages())
LIBRARIES = tuple({f"{path}{os.sep}" for folder in _FOLDERS for path in (folder, Path(folder).resolve())})


@dataclass(frozen=True)
class HeldGenerator:
    """A generator, and the path to it from the dataset or the collate function."""

    path: str
    generator: Any


def find(roots: Mapping[str, Any]) -> list[HeldGenerator]:
    """The generators that are reached from the roots, but for those of Python, NumPy and torch themselves."""
    known = {id(torch.default_generator), id(random._inst), id(np.random.mtrand._rand)}
    found = []
    for path, thing in walk(roots):
        engine = _engine(thing)
        if engine is not None and known.isdisjoint((id(thing), id(engine))):
            known |= {id(thing), id(engine)}
            found.append(HeldGenerator(path, thing))
    return found


def walk(roots: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Everything that is reached from the roots within the bounds, nearest first, each once, with the path to it."""
    seen: dict[int, Any] = {}  # holds what it has seen: the number of an object that is gone would be another's
    ahead = deque((name, root, 0) for name, root in roots.items())
    while ahead and len(seen) < OBJECTS:
        path, thing, depth = ahead.popleft()
        if not tells_its_class(thing) or isinstance(thing, LEAVES) or id(thing) in seen or type(thing).__module__.startswith("harness.run"):
            continue
        seen[id(thing)] = thing
        yield path, thing
        if depth < DEPTH and _engine(thing) is None:
            ahead.extend((path + step, inner, depth + 1) for step, inner in _inside(thing))


def _inside(thing: Any) -> Iterator[tuple[str, Any]]:
    """What an object is made of, and how it is reached from there; no code of the object's is run."""
    if isinstance(thing, torch.Tensor | np.ndarray):
        return
    if isinstance(thing, dict):
        yield from ((f"[{key!r}]", value) for key, value in itertools.islice(dict.items(thing), FIRST))
    elif isinstance(thing, list | tuple | deque):
        yield from ((f"[{at}]", value) for at, value in enumerate(itertools.islice(iter(thing), FIRST)))
    elif isinstance(thing, functools.partial):
        yield from ((".func", thing.func), (".args", thing.args), (".keywords", thing.keywords))
    elif isinstance(thing, MethodType):
        yield from (("", thing.__self__), ("", thing.__func__))
    elif isinstance(thing, FunctionType):
        yield from _inside_function(thing)
    if not isinstance(thing, FunctionType | MethodType):
        yield from _attributes(thing)


def _attributes(thing: Any) -> Iterator[tuple[str, Any]]:
    with contextlib.suppress(AttributeError):
        yield from ((f".{name}", value) for name, value in dict(object.__getattribute__(thing, "__dict__")).items())
    for owner in type(thing).__mro__:
        slots = owner.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            with contextlib.suppress(AttributeError):
                yield f".{name}", object.__getattribute__(thing, name)
        if is_library(getattr(_module(owner), "__file__", None) or "") or owner is object:
            continue
        for name, value in list(owner.__dict__.items()):
            if name not in AT_START and not (name.startswith("__") and not callable(value)):
                yield f".{name}", getattr(value, "__func__", getattr(value, "fget", value))  # of a class method, or a property


def _inside_function(function: FunctionType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
        with contextlib.suppress(ValueError):  # not filled yet
            yield f": {name}", cell.cell_contents
    yield from ((": a default", value) for value in function.__defaults__ or ())
    yield from ((f": {name}", value) for name, value in (function.__kwdefaults__ or {}).items())
    if not is_library(function.__code__.co_filename):
        for name in _globals_read(function.__code__):
            if name in function.__globals__:
                yield f": {name}", function.__globals__[name]


def _globals_read(code: CodeType) -> list[str]:
    names = [step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"]
    within = [name for inner in code.co_consts if isinstance(inner, CodeType) for name in _globals_read(inner)]
    return list(dict.fromkeys(names + within))


def _module(owner: type) -> ModuleType | None:
    return sys.modules.get(owner.__module__)


def tells_its_class(thing: Any) -> bool:
    """Whether an object may be asked what it is; a proxy of what is not there yet raises, and nothing is to be found in it."""
    try:
        return thing.__class__ is not None
    except Exception:  # noqa: BLE001 - whatever it raises
        return False


@functools.lru_cache(10_000)
def is_library(file: str) -> bool:
    """Whether code is not the program's own, by the file that it is in."""
    if file.startswith("<"):
        return file.startswith("<frozen")
    return bool(INSTALLED.intersection(Path(file).parts)) or file.startswith(LIBRARIES) or str(Path(file).resolve()).startswith(LIBRARIES)


def _engine(thing: Any) -> Any:
    """What holds the numbers of a generator that can be seeded; None for anything else."""
    if isinstance(thing, np.random.Generator):
        return _engine(thing.bit_generator)
    if isinstance(thing, np.random.BitGenerator):
        return thing if type(thing).__module__.startswith("numpy.") else None
    if isinstance(thing, np.random.RandomState):
        return thing._bit_generator if isinstance(thing._bit_generator, np.random.MT19937) else None
    if isinstance(thing, random.Random):
        return None if isinstance(thing, random.SystemRandom) else thing
    return thing if isinstance(thing, torch.Generator) and thing.device.type == "cpu" else None


def seed_generator(generator: Any, seed: int) -> None:
    """Seed a generator of any kind that is found."""
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, random.Random):
        generator.seed(seed)
    elif isinstance(generator, np.random.RandomState):
        generator.seed(seed % 2**32)
    else:
        engine = _engine(generator)
        engine.state = _pcg64(seed) if type(engine) is np.random.PCG64 else type(engine)(seed).state


def _pcg64(seed: int) -> dict[str, Any]:
    """A state of NumPy's default generator, in a quarter of the time that NumPy takes to seed one; the increment has to be odd."""
    words = hashlib.blake2b(str(seed).encode(), digest_size=32).digest()
    state = {"state": int.from_bytes(words[:16], "big"), "inc": int.from_bytes(words[16:], "big") | 1}
    return {"bit_generator": "PCG64", "state": state, "has_uint32": 0, "uinteger": 0}


def _state_of(generator: Any) -> Any:
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, torch.Generator | np.random.RandomState):
        return generator.get_state()
    return _engine(generator).state


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, torch.Generator | np.random.RandomState):
        generator.set_state(state)
    else:
        _engine(generator).state = state


@dataclass
class Randomness:
    """All that a sample may draw from: the global generators of the process, and those that are held, if these are to be seeded."""

    roots: Mapping[str, Any]
    seeds_held: bool = True
    held: list[HeldGenerator] = field(default_factory=list)

    def look(self) -> bool:
        """Look for generators, again too; whether there are some that were not there before."""
        before = {id(one.generator) for one in self.held}
        self.held = find(self.roots) if self.seeds_held else []
        return any(id(one.generator) not in before for one in self.held)

    def seed(self, *parts: int | str) -> None:
        """Seed all of them from the parts."""
        seed_cpu(seed_of(*parts))
        self.seed_held(*parts)

    def seed_held(self, *parts: int | str) -> None:
        """Seed those that are held, each in its own way, by its path."""
        for one in self.held:
            seed_generator(one.generator, seed_of(*parts, one.path))

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """What happens inside leaves those that are held as they were."""
        before = [(one.generator, _state_of(one.generator)) for one in self.held]
        try:
            yield
        finally:
            for generator, state in before:
                _set_state(generator, state)
