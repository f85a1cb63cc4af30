"""List what an object holds: its attributes, and the contents of containers.

Python modules, classes, and what a library keeps globally are never searched.
"""

from __future__ import annotations

import collections
import functools
import inspect
import itertools
import time
import types
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from harness.state.kinds import PLAIN
from harness.untracked.program_frames import is_programs_file

MOST_ITEMS = 1000  # items per container
DEPTH, MOST_OBJECTS = 8, 20_000  # limits of a search
FEW = 50  # what a container of more items holds is searched last
# Types whose instances are not searched.
ATOMS = (
    str,
    bytes,
    bytearray,
    int,
    float,
    complex,
    bool,
    type(None),
    type,
    types.ModuleType,
    np.generic,
    torch.dtype,
    torch.device,
)
ITERATORS = (zip, map, enumerate, itertools.cycle, itertools.islice, itertools.chain)
# The attributes of every nn.Module. Child modules are listed by their own names.
OF_MODULES = frozenset(vars(nn.Module()))
# The attributes of every optimizer of torch's. LR schedulers set the last two.
OF_OPTIMIZERS = frozenset(vars(torch.optim.SGD([torch.zeros(1, device="cpu")], 0.1))) | {
    "step",
    "_opt_called",
}


class TimeLimit:
    """The end of a search, after so many seconds in which its thread computes.

    On a busy machine these are more seconds of the clock, which is read alone until then.
    """

    def __init__(self, seconds: float) -> None:
        self._until_s, self._own_s = time.perf_counter() + seconds, time.thread_time() + seconds

    def is_over(self) -> bool:
        """Return whether the time is over."""
        return time.perf_counter() > self._until_s and time.thread_time() > self._own_s


def parts(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the objects that a value holds directly, each after its path: ".rng", "[0]"."""
    if isinstance(value, (*ATOMS, torch.Tensor, np.ndarray)):
        return
    if isinstance(value, Mapping) and type(value).__module__ in ("builtins", "collections"):
        for at, (key, item) in enumerate(list(value.items())):
            if at == MOST_ITEMS:
                return
            yield f"[{spelled(key, at)}]", item
    elif isinstance(value, list | tuple | set | frozenset | collections.deque):
        for at, item in enumerate(list(value)[:MOST_ITEMS]):
            yield f"[{at}]", item
    elif isinstance(value, functools.partial):
        yield from ((".func", value.func), (".args", value.args), (".keywords", value.keywords))
    elif isinstance(value, types.MethodType):
        yield ".__self__", value.__self__
    elif isinstance(value, types.FunctionType):
        yield from _of_function(value)
    else:
        held = getattr(value, "__dict__", None)
        for name, item in list(held.items()) if isinstance(held, dict) else ():
            if not isinstance(value, nn.Module) or name not in OF_MODULES:
                yield f".{name}", item
        for name, item in list(value._modules.items()) if isinstance(value, nn.Module) else ():
            yield f".{name}", item
        for kind in type(value).__mro__:
            slots = vars(kind).get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else slots:
                if (
                    name not in ("__dict__", "__weakref__")
                    and hasattr(type(value), name)
                    and isinstance(vars(kind).get(name), types.MemberDescriptorType)
                ):
                    try:
                        yield f".{name}", getattr(value, name)
                    except AttributeError:
                        continue


def _of_function(value: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield what a function holds: its closure, its defaults and its attributes."""
    for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=False):
        try:
            yield f".{name}", cell.cell_contents
        except ValueError:  # not set yet
            continue
    defaults = inspect.signature(value).parameters if value.__defaults__ else {}
    yield from (
        (f".{name}", parameter.default)
        for name, parameter in defaults.items()
        if parameter.default is not parameter.empty
    )
    yield from (
        (f".{name}", item)
        for name, item in ((value.__kwdefaults__ or {}) | value.__dict__).items()
        if name != "__wrapped__"
    )


def parts_with_places(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield what `parts` does; of a class its values, of an iterator its position and what it has.

    Each comes after its path.
    """
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
    else:
        yield from parts(value)


def _place(item: Any) -> Any:
    """Return how far an iterator of Python's own is, or a number or the length of a list."""
    if isinstance(item, list | tuple):
        return len(item)
    if type(item).__module__ == "builtins" and hasattr(item, "__length_hint__"):
        return item.__length_hint__()
    return item if type(item) in PLAIN else None


def plain_in(value: Any) -> Iterator[Any]:
    """Yield the values in nested dicts, lists and tuples that are none of these."""
    if isinstance(value, dict | list | tuple):
        for item in list(value.values() if isinstance(value, dict) else value)[:MOST_ITEMS]:
            yield from plain_in(item)
    else:
        yield value


def spelled(key: Any, at: int) -> str:
    """Return the key at a place of a dict in words; a tensor is not read for that."""
    items = key if isinstance(key, tuple) else (key,)
    is_plain = all(isinstance(item, str | int | float | bytes | type(None)) for item in items)
    return f"{key!r:.40}" if is_plain else f"{type(key).__name__} {at}"


def holds(value: Any, most_bytes: int, most_objects: int) -> str:
    """Return why a value should not be copied: "tensors", or "too much …"; "" if it can be.

    Args:
        value: the value to search, with everything that it holds.
        most_bytes: limit of the estimated size.
        most_objects: limit of the number of objects.
    """
    seen: set[int] = set()
    waiting, size_bytes = [value], 0
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor) or (
            isinstance(item, nn.Module) and (item._parameters or item._buffers)
        ):
            return "tensors"
        if isinstance(item, np.ndarray):
            size_bytes += item.nbytes
        elif isinstance(item, str | bytes | bytearray | list | tuple | dict | set):
            size_bytes += len(item) * 8
        if (
            size_bytes > most_bytes
            or len(seen) > most_objects
            or (isinstance(item, list | dict) and len(item) > MOST_ITEMS * 20)
        ):
            return "too much to be copied"
        waiting += [part for _, part in parts(item)]
    return ""
