"""Find the random generators held by datasets, transforms and collate functions, and seed them.

A held generator is seeded for each sample. The search walks over the objects reachable from the
dataset and the collate function: attributes, lists, tuples, dicts, partial functions, closures,
default arguments, and the globals that the program's own functions read. The walk is bounded by
counts, not by a clock, because it must find the same generators in each attempt of a run.
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

OBJECTS, DEPTH, FIRST = 20_000, 12, 64  # objects in all; depth; items of each list or dict
LEAVES = (
    str,
    bytes,
    bytearray,
    int,
    float,
    complex,
    type(None),
    type,
    ModuleType,
    CodeType,
    torch.dtype,
    torch.device,
    torch.Size,
)
# These methods do not run when a sample is loaded, so no sample draws from their generators.
AT_START = {"__init__", "__new__", "__len__", "__init_subclass__"}
INSTALLED = {"site-packages", "dist-packages"}  # folders of libraries, of any Python version
_FOLDERS = (
    *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
    site.getusersitepackages(),
)
LIBRARIES = tuple(
    {f"{path}{os.sep}" for folder in _FOLDERS for path in (folder, Path(folder).resolve())}
)


@dataclass(frozen=True)
class HeldGenerator:
    """A generator and the path to it from the dataset or the collate function."""

    path: str
    generator: Any


def find(roots: Mapping[str, Any]) -> list[HeldGenerator]:
    """Return the generators that are reachable from the roots, each once.

    The global generators of Python, NumPy and torch are left out.
    """
    known = {id(torch.default_generator), id(random._inst), id(np.random.mtrand._rand)}
    held = []
    for path, obj in walk(roots):
        engine = _engine(obj)
        if engine is not None and known.isdisjoint((id(obj), id(engine))):
            known |= {id(obj), id(engine)}
            held.append(HeldGenerator(path, obj))
    return held


def of_source(source: Any) -> tuple[dict[str, Any], set[int]]:
    """Find the generators of all data of a loop.

    Returns:
        Those that are seeded for each sample, by path: loading leaves them as they are, so they
        change only if the program draws from them elsewhere. And the ids of those that are saved
        with an order or a stream.
    """
    of_samples, saved = dict[str, Any](), set[int]()
    parts = {"": getattr(source, "main", source)} | {
        f"beside[{name!r}].": other for name, other in getattr(source, "others", {}).items()
    }
    for prefix, part in parts.items():
        roots = {
            f"{prefix}dataset": getattr(part, "dataset", None),
            f"{prefix}collate_fn": getattr(part, "collate", None),
        }
        found = find(roots) if getattr(part, "seeds_held", True) else []
        if plan := getattr(part, "plan", None):
            of_samples |= {held.path: held.generator for held in found}
            saved |= getattr(plan.order, "handled", set())
        else:
            saved |= {id(held.generator) for held in found}
    return {path: own for path, own in of_samples.items() if id(own) not in saved}, saved


def walk(roots: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield each object that is reachable from the roots within the bounds, with its path.

    The nearest objects come first. Each object comes once.
    """
    # Holds the objects themselves, because the id of a deleted object may be used again.
    seen: dict[int, Any] = {}
    ahead = deque((name, root, 0) for name, root in roots.items())
    while ahead and len(seen) < OBJECTS:
        path, obj, depth = ahead.popleft()
        if (
            not tells_its_class(obj)
            or isinstance(obj, LEAVES)
            or id(obj) in seen
            or type(obj).__module__.startswith("harness.run")
        ):
            continue
        seen[id(obj)] = obj
        yield path, obj
        if depth < DEPTH and _engine(obj) is None:
            ahead.extend((path + step, inner, depth + 1) for step, inner in _inside(obj))


def _inside(obj: Any) -> Iterator[tuple[str, Any]]:
    """Yield the parts of an object, each with its path from the object.

    No code of the object is run.
    """
    if isinstance(obj, torch.Tensor | np.ndarray):
        return
    if isinstance(obj, dict):
        yield from (
            (f"[{key!r}]", value) for key, value in itertools.islice(dict.items(obj), FIRST)
        )
    elif isinstance(obj, list | tuple | deque):
        yield from (
            (f"[{at}]", value) for at, value in enumerate(itertools.islice(iter(obj), FIRST))
        )
    elif isinstance(obj, functools.partial):
        yield from ((".func", obj.func), (".args", obj.args), (".keywords", obj.keywords))
    elif isinstance(obj, MethodType):
        yield from (("", obj.__self__), ("", obj.__func__))
    elif isinstance(obj, FunctionType):
        yield from _inside_function(obj)
    if not isinstance(obj, FunctionType | MethodType):
        yield from _attributes(obj)


def _attributes(obj: Any) -> Iterator[tuple[str, Any]]:
    """Yield an object's attributes and slots, and the attributes of its non-library classes."""
    with contextlib.suppress(AttributeError):
        yield from (
            (f".{name}", value)
            for name, value in dict(object.__getattribute__(obj, "__dict__")).items()
        )
    for owner in type(obj).__mro__:
        slots = owner.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            with contextlib.suppress(AttributeError):
                yield f".{name}", object.__getattribute__(obj, name)
        if is_library(getattr(_module(owner), "__file__", None) or "") or owner is object:
            continue
        for name, value in list(owner.__dict__.items()):
            if name not in AT_START and not (name.startswith("__") and not callable(value)):
                # The function of a class method or a property.
                yield f".{name}", getattr(value, "__func__", getattr(value, "fget", value))


def _inside_function(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield what a function has in its closure and defaults, and the globals that it reads."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
        with contextlib.suppress(ValueError):  # the cell is still empty
            yield f": {name}", cell.cell_contents
    yield from ((": a default", value) for value in function.__defaults__ or ())
    yield from ((f": {name}", value) for name, value in (function.__kwdefaults__ or {}).items())
    if not is_library(function.__code__.co_filename):
        for name in _globals_read(function.__code__):
            if name in function.__globals__:
                yield f": {name}", function.__globals__[name]


def _globals_read(code: CodeType) -> list[str]:
    """Return the names of the globals that code, and the code nested in it, reads."""
    names = [step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"]
    within = [
        name
        for inner in code.co_consts
        if isinstance(inner, CodeType)
        for name in _globals_read(inner)
    ]
    return list(dict.fromkeys(names + within))


def _module(owner: type) -> ModuleType | None:
    return sys.modules.get(owner.__module__)


def tells_its_class(obj: Any) -> bool:
    """Return whether the class of an object can be read.

    A proxy of an object that does not exist yet raises, and there is nothing to find in it.
    """
    try:
        return obj.__class__ is not None
    except Exception:  # noqa: BLE001 - a proxy may raise any error
        return False


@functools.lru_cache(10_000)
def is_library(file: str) -> bool:
    """Return whether the code in a file belongs to a library, not to the program itself."""
    if file.startswith("<"):
        return file.startswith("<frozen")
    return (
        not INSTALLED.isdisjoint(file.split(os.sep))
        or file.startswith(LIBRARIES)
        or str(Path(file).resolve()).startswith(LIBRARIES)
    )


def _engine(obj: Any) -> Any:
    """Return the object with the state of a generator that can be seeded; None for the rest."""
    if isinstance(obj, np.random.Generator):
        return _engine(obj.bit_generator)
    if isinstance(obj, np.random.BitGenerator):
        return obj if type(obj).__module__.startswith("numpy.") else None
    if isinstance(obj, np.random.RandomState):
        return obj._bit_generator if isinstance(obj._bit_generator, np.random.MT19937) else None
    if isinstance(obj, random.Random):
        return None if isinstance(obj, random.SystemRandom) else obj
    return obj if isinstance(obj, torch.Generator) and obj.device.type == "cpu" else None


def seed_generator(generator: Any, seed: int) -> None:
    """Seed a generator of any kind that `find` returns."""
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
    """Return a state of PCG64, NumPy's default generator, for a seed.

    This takes a quarter of the time that NumPy takes to seed one. The increment has to be odd.
    """
    digest = hashlib.blake2b(str(seed).encode(), digest_size=32).digest()
    state = {
        "state": int.from_bytes(digest[:16], "big"),
        "inc": int.from_bytes(digest[16:], "big") | 1,
    }
    return {"bit_generator": "PCG64", "state": state, "has_uint32": 0, "uinteger": 0}


def _state_of(generator: Any) -> Any:
    """Return the state of a generator."""
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, torch.Generator | np.random.RandomState):
        return generator.get_state()
    return _engine(generator).state


def _set_state(generator: Any, state: Any) -> None:
    """Set a generator to a state that `_state_of` returned."""
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, torch.Generator | np.random.RandomState):
        generator.set_state(state)
    else:
        _engine(generator).state = state


@dataclass
class Randomness:
    """All generators that a sample may draw from.

    These are the global generators of the process and, if they are to be seeded, those that are
    held by the roots.
    """

    roots: Mapping[str, Any]
    seeds_held: bool = True
    held: list[HeldGenerator] = field(default_factory=list)

    def look(self) -> bool:
        """Search for held generators (again); return whether there are new ones."""
        before = {id(held.generator) for held in self.held}
        self.held = find(self.roots) if self.seeds_held else []
        return any(id(held.generator) not in before for held in self.held)

    def seed(self, *parts: int | str) -> None:
        """Seed all generators, global and held, from the parts."""
        seed_cpu(seed_of(*parts))
        self.seed_held(*parts)

    def seed_held(self, *parts: int | str) -> None:
        """Seed each held generator from the parts and its own path."""
        for held in self.held:
            seed_generator(held.generator, seed_of(*parts, held.path))

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Restore the states of the held generators when the block ends."""
        before = [(held.generator, _state_of(held.generator)) for held in self.held]
        try:
            yield
        finally:
            for generator, state in before:
                _set_state(generator, state)
