"""Whether arrays of numbers have changed since they were looked at: those of a module, of one of the program's objects, or a tensor.

Nothing is copied and no device is read: what PyTorch has counted is compared and, in the processor's memory, some of the numbers. An
attribute that is another tensor each time is a batch, or a result; one that is written to, and what lies in a container that stays, is a
state.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

MOST = 5000  # arrays of one object
SAMPLES = 8  # numbers of each array
MODULE, ATTRIBUTE = -1, 0  # where an array was found, if not in a container, whose identity it is else


class ArrayMark(NamedTuple):
    """An array as it was: where it was found, its address, how often PyTorch has seen it written to, and some of its numbers."""

    where: int
    address: int
    version: int
    some: str | None

    def is_other(self, now: ArrayMark) -> bool:
        """Whether it has changed."""
        if self.where != now.where:
            return False
        if self.address == now.address:
            return (self.version, self.some) != (now.version, now.some)
        return self.where != ATTRIBUTE and (self.some is None or self.some != now.some)


@dataclass
class ArrayMarks:
    """The arrays of an object by name, and which containers it has."""

    arrays: dict[str, ArrayMark] = field(default_factory=dict)
    containers: set[int] = field(default_factory=set)

    def changed(self, now: ArrayMarks, held: Collection[int]) -> list[str]:
        """The names of arrays that are not what they were, or are new in a container; but for those whose memory somebody else holds."""
        return [
            name
            for name, mark in now.arrays.items()
            if mark.address not in held and (self.arrays[name].is_other(mark) if name in self.arrays else mark.where in self.containers)
        ]


def of(thing: Any) -> ArrayMarks:
    """The marks of what an object holds: a module's parameters and buffers, or what lies in attributes and in containers there."""
    found = ArrayMarks()
    with contextlib.suppress(Exception):  # a thread of the program's changes it just now, or a class of its own answers with an error
        for name, where, array in itertools.islice(_arrays(thing, found.containers), MOST):
            found.arrays[name] = _mark(where, array)
    return found


def _arrays(thing: Any, containers: set[int]) -> Iterator[tuple[str, int, Any]]:
    if isinstance(thing, torch.Tensor | np.ndarray):
        yield "", ATTRIBUTE, thing
    elif isinstance(thing, nn.Module):
        yield from ((name, MODULE, tensor) for name, tensor in (*thing.named_parameters(), *thing.named_buffers()) if _is_marked(tensor))
    else:
        for name, value in list(getattr(thing, "__dict__", {}).items()):
            if is_array(value):
                yield name, ATTRIBUTE, value
            elif isinstance(value, dict | list | collections.deque):
                containers.add(id(value))
                items = value.items() if isinstance(value, dict) else enumerate(value)
                yield from ((f"{name}[{key!r:.40}]", id(value), item) for key, item in itertools.islice(items, MOST) if is_array(item))


def is_array(value: Any) -> bool:
    """Whether it is more than one number, which would be a sum for the eye, and not what a forward pass has computed."""
    if isinstance(value, np.ndarray):
        return value.size > 1 and value.dtype != object
    return isinstance(value, torch.Tensor) and _is_marked(value) and value.numel() > 1 and value.grad_fn is None


def _is_marked(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and not (is_lazy(tensor) or tensor.is_meta)


def _mark(where: int, array: Any) -> ArrayMark:
    if isinstance(array, np.ndarray):
        return ArrayMark(where, array.__array_interface__["data"][0], 0, str(array.flat[:: max(1, array.size // SAMPLES)].tolist()))
    version = 0 if array.is_inference() else array._version
    if type(array) not in (torch.Tensor, nn.Parameter):
        return ArrayMark(where, id(array), version, None)
    is_read = array.is_cpu and array.is_contiguous()
    some = str(array.detach().reshape(-1)[:: max(1, array.numel() // SAMPLES)].tolist()) if is_read else None
    return ArrayMark(where, array.data_ptr(), version, some)
