"""Detect changes of arrays: those of a module, those of one of the program's objects, or a tensor.

Nothing is copied and no device is read. PyTorch's version counters are compared and, for arrays in
CPU memory, some of the numbers. An attribute that is a different tensor each time is a batch or a
result. An attribute that is written to in place is state, and so are arrays in a container that
persists.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from harness.distributed.dtensors import plain
from harness.untracked.object_walk import spelled

MOST = 5000  # limit of arrays per object
SAMPLES = 8  # at least this many numbers of an array are compared, or all
# Where an array was found. For an array in a container, this is the id of the container instead.
MODULE, ATTRIBUTE = -1, 0


class ArrayMark(NamedTuple):
    """A record of an array: where it was found, its address, its version counter, some numbers.

    `some` is None if the numbers cannot be read cheaply: on a GPU, say.
    """

    where: int
    address: int
    version: int
    some: str | None
    ask: Callable[[], Any] | None = None  # of one in an attribute: returns it, or None once freed

    def is_other(self, now: ArrayMark) -> bool:
        """Return whether the array has changed.

        A different array in an attribute counts as no change. A different array in a module or a
        container counts as a change, unless the compared numbers are the same.
        """
        if self.where != now.where or (self.ask is not None and self.ask() is None):
            return False  # another one may have the memory of one that was freed
        if self.address == now.address:
            return (self.version, self.some) != (now.version, now.some)
        return self.where != ATTRIBUTE and (self.some is None or self.some != now.some)


@dataclass
class ArrayMarks:
    """The arrays of an object by name, and the ids of its containers."""

    arrays: dict[str, ArrayMark] = field(default_factory=dict)
    containers: set[int] = field(default_factory=set)

    def changed(self, now: ArrayMarks, held: Collection[int]) -> list[str]:
        """Return the names of arrays that have changed, or are new in a container known before.

        Arrays at an address in `held` are left out: their memory belongs to another object.
        """
        return [
            name
            for name, mark in now.arrays.items()
            if mark.address not in held
            and (
                self.arrays[name].is_other(mark)
                if name in self.arrays
                else mark.where in self.containers
            )
        ]


def of(obj: Any) -> ArrayMarks:
    """Mark the arrays of an object, at most MOST.

    These are a module's parameters and buffers, or the arrays in the attributes of another object
    and in containers there. A tensor or NumPy array is marked itself.
    """
    marks = ArrayMarks()
    # Another thread may change the object just now, or a class of the program may raise.
    with contextlib.suppress(Exception):
        for name, where, array in itertools.islice(_arrays(obj, marks.containers), MOST):
            marks.arrays[name] = mark(where, array)
    return marks


def arrays_of(obj: Any) -> dict[str, Any]:
    """Return the arrays of an object by their names in `ArrayMarks.arrays`, at most MOST."""
    with contextlib.suppress(Exception):
        found = itertools.islice(_arrays(obj, set()), MOST)
        return {name: array for name, _, array in found}
    return {}


def _arrays(obj: Any, containers: set[int]) -> Iterator[tuple[str, int, Any]]:
    if isinstance(obj, torch.Tensor | np.ndarray):
        yield "", ATTRIBUTE, obj
    elif isinstance(obj, nn.Module):
        yield from (
            (name, MODULE, tensor)
            for name, tensor in (*obj.named_parameters(), *obj.named_buffers())
            if is_marked(tensor)
        )
    else:
        for name, value in list(getattr(obj, "__dict__", {}).items()):
            if is_array(value):
                yield name, ATTRIBUTE, value
            elif isinstance(value, dict | list | collections.deque):
                containers.add(id(value))
                items = value.items() if isinstance(value, dict) else enumerate(value)
                yield from (
                    (f"{name}[{spelled(key, at)}]", id(value), item)
                    for at, (key, item) in enumerate(itertools.islice(items, MOST))
                    if is_array(item)
                )


def is_array(value: Any) -> bool:
    """Return whether a value is an array of more than one number, outside any autograd graph.

    A single number is usually a running sum for display. A tensor in a graph is the result of a
    forward pass.
    """
    if isinstance(value, np.ndarray):
        return value.size > 1 and value.dtype != object
    return (
        isinstance(value, torch.Tensor)
        and is_marked(value)
        and value.numel() > 1
        and value.grad_fn is None
    )


def is_marked(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is strided and has data."""
    return tensor.layout is torch.strided and not (is_lazy(tensor) or tensor.is_meta)


def mark(where: int, array: Any) -> ArrayMark:
    """Return the address, version counter and some numbers of an array.

    Args:
        where: MODULE, ATTRIBUTE, or the id of the container that holds it.
        array: A strided tensor that has data, or a NumPy array. Of a tensor subclass the id stands
            for the address.
    """
    if isinstance(array, np.ndarray):
        return ArrayMark(
            where,
            array.__array_interface__["data"][0],
            0,
            str(array.flat[:: max(1, array.size // SAMPLES)].tolist()),
            _asked(where, array),
        )
    version, ask = 0 if array.is_inference() else array._version, _asked(where, array)
    if type(array) not in (torch.Tensor, nn.Parameter):
        return ArrayMark(where, id(array), version, None, ask)
    is_read = array.is_cpu and array.is_contiguous()
    some = (
        str(array.detach().reshape(-1)[:: max(1, array.numel() // SAMPLES)].tolist())
        if is_read
        else None
    )
    return ArrayMark(where, array.data_ptr(), version, some, ask)


def _asked(where: int, array: Any) -> Callable[[], Any] | None:
    return weakref.ref(array) if where == ATTRIBUTE else None


def address_of(value: Any) -> int | None:
    """Return the address of a tensor's data; None for any other value, or if it has none."""
    value = plain(value)
    is_plain = type(value) in (torch.Tensor, nn.Parameter) and is_marked(value)
    return value.data_ptr() if is_plain else None


def addresses(objects: Iterable[Any], *, with_buffers: bool = True) -> set[int]:
    """Return the addresses of the parameters and buffers of modules; other objects are ignored."""
    return {
        address
        for obj in objects
        if isinstance(obj, nn.Module)
        for tensor in (*obj.parameters(), *(obj.buffers() if with_buffers else ()))
        if (address := address_of(tensor)) is not None
    }
