"""The state of a user's sampler, or of a function that gives the order of samples.

The state consists of generators and of the plain attributes of a sampler, as far as they can be
found.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import inspect
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler

from harness.data.generator_objects import (
    generator_of,
    generator_state,
    is_generator,
    set_generator_state,
)
from harness.data.quantized import scale_of

PLAIN = (bool, int, float, str, type(None))
CONTAINERS = (dict, list, deque, set)
DEPTH, MOST_FUNCTIONS = 3, 20

State = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """A part of the state: a generator, or a plain attribute of a sampler."""

    path: str
    owner: Any  # the object that has the part as an attribute; None for a generator of a function
    name: str  # the attribute's name; "" for a generator of a function
    obj: Any

    def read(self) -> Any:
        """Return a copy of the part's state, as plain data."""
        return _value(self.obj)

    def digest(self) -> str:
        """Return a digest of the part's state."""
        return _digest(self.read())

    def reset(self, value: Any) -> None:
        """Put the object that was the part back in its place, with a state that `read` returned."""
        if self.owner is not None and getattr(self.owner, self.name, None) is not self.obj:
            setattr(self.owner, self.name, self.obj)
        if self.digest() != _digest(value):
            self.put_back(value)

    def put_back(self, value: Any, *, in_place: bool = True) -> None:
        """Set the part to a saved state, in place where possible.

        Otherwise, and without `in_place`, the attribute gets a new value made from the saved state.
        That is so if the two are of different kinds: a sampler may create its generator only when
        it gives its first order, so that a new process has None where the saved state is that of a
        generator.

        Raises:
            UsageError: A generator is of another kind than the saved one.
        """
        if is_generator(self.obj) and (self.owner is None or generator_of(value) is not None):
            set_generator_state(self.name or "of order=", self.obj, value)
            return
        obj = self.obj if in_place else _emptied(self.obj)
        if (made := _filled(obj, value)) is not self.obj:
            setattr(self.owner, self.name, made)


def _is_alike(obj: Any, value: Any) -> bool:
    """Return whether both are arrays or tensors, of one shape and dtype."""
    return (
        isinstance(obj, torch.Tensor | np.ndarray)
        and isinstance(value, type(obj))
        and obj.shape == value.shape
        and obj.dtype == value.dtype
    )


def _emptied(obj: Any) -> Any:
    """Return an empty container of the same kind, to be filled; None for anything else."""
    if not isinstance(obj, CONTAINERS):
        return None
    own = copy.copy(obj)
    own.clear()
    return own


def _filled(obj: Any, value: Any) -> Any:
    """Put a saved state into an object, which others may hold; return a new one if it cannot be.

    A container stays what it is, a `defaultdict` say, and so do those inside it.
    """
    if type(value) in PLAIN:
        return value
    if isinstance(obj, np.ndarray) and isinstance(value, torch.Tensor):
        value = value.numpy()  # a checkpoint holds tensors only
        value = value.astype(obj.dtype) if value.shape == obj.shape else value
    if _is_alike(obj, value):
        with torch.no_grad():
            obj[...] = value
    elif isinstance(obj, dict) and isinstance(value, Mapping) and generator_of(value) is None:
        by_key = {key: _filled(obj.get(key), item) for key, item in value.items()}
        obj.clear()
        for key, item in by_key.items():
            obj[key] = item
    elif isinstance(obj, list | deque) and isinstance(value, list):
        held = [*obj, *[None] * len(value)]
        items = [_filled(*pair) for pair in zip(held, value, strict=False)]
        obj.clear()
        obj.extend(items)
    elif isinstance(obj, set) and isinstance(value, list):
        obj.clear()
        obj.update(value)
    else:
        return _made(value)
    return obj


def _made(value: Any) -> Any:
    """Return what a part's saved state is the state of: a new generator, or a copy of the value."""
    if (generator := generator_of(value)) is not None:
        set_generator_state("", generator, value)
        return generator
    return _value(value)


Held = list[tuple[Part, Any]]


class SamplerState:
    """Access to the state of a sampler or function. Each part of the state has a path.

    Args:
        ask: The function from an epoch to its order, which is searched if there is no sampler.
        sampler: The sampler, or None.
        dataset: The dataset, which is not part of the sampler's state.
    """

    def __init__(self, ask: Callable[[int], Iterable[int]], sampler: Any, dataset: Any) -> None:
        self._ask, self._sampler, self._dataset = ask, sampler, dataset

    def digests(self) -> dict[str, str]:
        """Return a digest of each part of the state, by path."""
        return {part.path: part.digest() for part in self.parts()}

    def read(self) -> State:
        """Return a copy of each part of the state, by path."""
        return {part.path: part.read() for part in self.parts()}

    def held(self) -> Held:
        """Return each part with a copy of its state, for `reset` in the same process."""
        return [(part, part.read()) for part in self.parts()]

    def reset(self, held: Held) -> None:
        """Undo what has changed since `held`: each part is the same object again, as it was.

        What the sampler has put in its place meanwhile is not written to: that may be part of
        another one, as an order that is one of several plans.
        """
        for part, value in held:
            part.reset(value)

    def put_back(self, state: Mapping[str, Any]) -> list[str]:
        """Restore all parts that differ, in place where possible; return the paths now missing."""
        parts = {part.path: part for part in self.parts()}
        given = {path: value for path, value in state.items() if path in parts}
        wanted = {path: part.read() for path, part in parts.items()} | given
        for path, value in given.items():
            if parts[path].digest() != _digest(value):
                parts[path].put_back(value)
        # What shares memory with another part has now changed as well, or has changed it. It gets
        # memory of its own.
        for part in self.parts():
            if part.path not in wanted or is_generator(part.obj):
                continue
            if part.digest() != _digest(wanted[part.path]):
                part.put_back(wanted[part.path], in_place=False)
        return [path for path in state if path not in parts]

    def parts(self) -> Iterator[Part]:
        """Yield each part of the state."""
        if self._sampler is not None:
            yield from _attributes(self._sampler, "", {id(self._dataset)}, DEPTH)
        else:
            yield from _drawn_from(self._ask, set())


def _attributes(owner: Any, path: str, met: set[int], depth: int) -> Iterator[Part]:
    """Yield a sampler's generators and plain attributes, and those of samplers inside it.

    Of other objects that it holds, only the generators are yielded.

    Args:
        owner: The sampler, or an object that it holds.
        path: The prefix of the paths, "" for the sampler itself.
        met: The ids of the objects that are not visited (again).
        depth: How many more levels to visit.
    """
    if id(owner) in met or depth == 0:
        return
    met.add(id(owner))
    for name, value in getattr(owner, "__dict__", {}).items():
        if id(value) in met:
            continue
        if is_generator(value) or ((not path or isinstance(owner, Sampler)) and _is_plain(value)):
            yield Part(path + name, owner, name, value)
        elif (
            hasattr(value, "__dict__")
            and not isinstance(value, type | torch.nn.Module)
            and not callable(value)
        ):
            yield from _attributes(value, f"{path}{name}.", met, depth - 1)


def _drawn_from(function: Any, met: set[int]) -> Iterator[Part]:
    """Yield the generators that a function draws from.

    The search covers its closure, its defaults, its object, the arguments of a partial function,
    the globals that it names, and the functions found there. `met` holds the ids of the functions
    already visited.
    """
    if id(function) in met or len(met) > MOST_FUNCTIONS:
        return
    met.add(id(function))
    objects: dict[Any, Any] = dict(getattr(getattr(function, "__self__", function), "__dict__", {}))
    if isinstance(function, functools.partial):
        objects |= {"function": function.func} | dict(enumerate(function.args)) | function.keywords
    elif hasattr(function, "__code__"):
        scope = inspect.getclosurevars(inspect.unwrap(function))
        objects |= (
            dict(scope.globals)
            | dict(scope.nonlocals)
            | dict(enumerate(function.__defaults__ or ()))
        )
    for name, obj in objects.items():
        if is_generator(obj):
            yield Part(str(name), None, "", obj)
        elif inspect.isfunction(obj) or inspect.ismethod(obj) or isinstance(obj, functools.partial):
            for part in _drawn_from(obj, met):
                yield replace(part, path=f"{name}.{part.path}")


def _is_plain(value: Any) -> bool:
    """Return whether an attribute is plain data: scalars, strings, tensors, arrays, containers."""
    if isinstance(value, list | tuple | deque):
        return all(_is_plain(item) for item in value)
    if isinstance(value, set):
        return all(type(item) in PLAIN for item in value)
    if isinstance(value, dict):
        return all(isinstance(key, PLAIN) and _is_plain(item) for key, item in value.items())
    if isinstance(value, np.ndarray):
        return bool(value.dtype != object)
    return type(value) in PLAIN or type(value) is torch.Tensor


def _value(obj: Any) -> Any:
    """Return a copy of a part's state, as plain data."""
    if is_generator(obj):
        return generator_state(obj)
    if isinstance(obj, torch.Tensor):
        return obj.detach().clone()
    if isinstance(obj, np.ndarray):
        return obj.copy()
    if isinstance(obj, list | deque):
        return [_value(item) for item in obj]
    if isinstance(obj, set):
        return sorted(obj, key=repr)  # its own order is another one in each process
    if isinstance(obj, tuple):
        return tuple(_value(item) for item in obj) if type(obj) is tuple else obj
    return {key: _value(item) for key, item in obj.items()} if isinstance(obj, dict) else obj


def _digest(value: Any) -> str:
    """Return a digest of a part's state."""
    digest = hashlib.blake2b(digest_size=16)
    _into(digest, value)
    return digest.hexdigest()


def _into(digest: Any, value: Any) -> None:
    """Add plain data to a digest."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().contiguous()
        kind = f"{str(value.dtype).removeprefix('torch.')}{tuple(value.shape)}{scale_of(value)}"
        digest.update(kind.encode() + value.reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, np.ndarray):
        kind = f"{value.dtype}{value.shape}()"
        digest.update(kind.encode() + np.ascontiguousarray(value).tobytes())
    elif isinstance(value, list | tuple):
        for item in (len(value), *value):
            _into(digest, item)
    elif isinstance(value, dict):
        _into(digest, [part for item in value.items() for part in item])
    else:
        digest.update(repr(value).encode() + b"\0")
