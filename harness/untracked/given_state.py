"""What the program's own tracked objects give to a checkpoint, of all that they hold.

An object of one of the program's classes is saved by its `state_dict`. Whatever else it holds is
lost at a restart. A `state_dict` may return what the object holds itself, or copies of it, in other
containers. A value is therefore looked up by its identity, by the address of its memory, and last
by its numbers.
"""

from __future__ import annotations

import collections
import itertools
import random
import re
from collections.abc import Collection, Iterator, Mapping, Set
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

import harness.untracked.array_changes as array_changes
from harness.data.generator_objects import drawn_from, is_generator
from harness.distributed import wrappers
from harness.distributed.dtensors import plain
from harness.state.kinds import PLAIN
from harness.untracked.candidates import OPTIMIZER, WITHIN_S, kind_of, walk
from harness.untracked.object_walk import TimeLimit
from harness.untracked.unkept_values import is_of_program

MOST_NUMBERS = 20_000  # of a larger container or array only some are compared
LONG = 50  # a longer text may hold a whole state
SEQUENCES = (list, tuple, collections.deque)


def are_searched(tracked: Mapping[str, Any]) -> dict[str, Any]:
    """Select the tracked objects of the program's own classes.

    What data and samplers hold is left out: much of it is computed anew for each epoch.
    """
    return {
        name: inner
        for name, obj in tracked.items()
        if is_of_program(inner := wrappers.unwrap(obj))
        and not isinstance(inner, torch.optim.Optimizer | DataLoader | Dataset | Sampler)
    }


class GivenState:
    """The values in the state dicts of some objects, as they are now.

    Args:
        objects: tracked objects of the program's own classes.
    """

    def __init__(self, objects: Mapping[str, Any]) -> None:
        self._objects = [("", obj) for obj in objects.values()]
        self._states = [obj.state_dict() for obj in objects.values()]
        self._within = set[int]()  # ids of what the objects hold
        self.ids = set[int]()  # of the containers and arrays in them
        self.addresses = set[int]()  # of the memory of these arrays
        self._plain = set[Any]()
        self._texts: list[str] = []
        self._packed: list[Any] = []  # bytes and arrays of whole numbers, which may be a generator
        self._contents = set[Any]()  # of containers
        # By shape: some numbers of each array, and the array.
        self._arrays = collections.defaultdict[Any, list[tuple[Any, Any]]](list)
        self._lengths = set[int]()
        self._add(self._states)

    def _add(self, value: Any) -> None:
        if isinstance(value, torch.Tensor | np.ndarray):
            self._add_array(value)
        elif isinstance(value, (Mapping, Set, *SEQUENCES)):
            self.ids.add(id(value))
            self._lengths.add(len(value))
            self._contents.add(_content(value))
            for item in _items(value):
                self._add(item)
        elif not _is_plain(value):
            self.ids.add(id(value))
        else:
            self._plain.add(_spelled(value))
            if isinstance(value, bytes):
                self._packed.append(value)
            elif isinstance(value, str) and len(value) > LONG:
                self._texts.append(value)

    def _add_array(self, value: Any) -> None:
        self.ids.add(id(value))
        value = plain(value)
        if (address := _address(value)) is not None:
            self.addresses.add(address)
        self._arrays[tuple(value.shape)].append((_some(value), value))
        if value.ndim:
            self._lengths.add(len(value))
        if _is_whole(value) and _count(value) > 1:
            self._packed.append(value)
        if _is_read(value):
            self._contents.add(_content(value))
            if _count(value) == 1:
                self._plain.add(_spelled(value.item()))

    def search(self, kept: Collection[int]) -> set[int]:
        """Search the objects for what they hold; return the ids of the optimizers in them.

        `kept` are ids of values that are not searched.
        """
        optimizers = set[int]()
        limit = TimeLimit(WITHIN_S)
        for _, obj, _ in walk(self._objects, limit, lambda *item: id(item[-1]) not in kept):
            self._within.add(id(obj))
            if kind_of(obj) == OPTIMIZER:
                optimizers.add(id(obj))
        return optimizers

    def keeps(self, holder: Any, value: Any) -> bool:
        """Return whether a value lies in one of the objects, and a checkpoint holds it."""
        if self._within.isdisjoint((id(holder), id(value))):
            return False
        is_item = isinstance(holder, (Mapping, Set, *SEQUENCES))
        return self.has(value) or (is_item and self.has(holder))

    def keeps_arrays(self, obj: Any, names: list[str]) -> bool:
        """Return whether a part of one of the objects has these arrays, and a checkpoint too.

        The names are those of `array_changes.of`.
        """
        arrays = array_changes.arrays_of(obj) if id(obj) in self._within else {}
        return all(name in arrays and self.has(arrays[name]) for name in names)

    def has(self, value: Any) -> bool:
        """Return whether a checkpoint holds a value of one of the objects, as it is now."""
        if id(value) in self.ids:
            return True
        if _is_plain(value):
            return self._has_plain(value)
        if isinstance(value, torch.Tensor | np.ndarray):
            return self._has_array(value)
        if is_generator(value):
            return self._has_generator(value)
        if isinstance(value, (Mapping, Set, *SEQUENCES)):
            return self._has_container(value)
        state_dict = getattr(value, "state_dict", None)
        return callable(state_dict) and all(map(self.has, _leaves(state_dict())))

    def _has_plain(self, value: Any) -> bool:
        spelled = _spelled(value)
        if not self._plain.isdisjoint((spelled, _short(spelled))):
            return True
        if self._texts and (value is None or isinstance(value, bool)):
            return True  # there is more than one way to write these
        word = rf"(?<![\w.]){re.escape(str(value))}(?![\w.])"
        return any(re.search(word, text) for text in self._texts)

    def _has_array(self, value: Any) -> bool:
        value = plain(value)
        if _address(value) in self.addresses:
            return True
        some = _some(value)
        if any(
            (some == other or None in (some, other)) and _is_equal(value, array)
            for other, array in self._arrays.get(tuple(value.shape), ())
        ):
            return True
        return _is_read(value) and (
            _content(value) in self._contents
            or (_count(value) == 1 and self._has_plain(value.item()))
        )

    def _has_container(self, value: Any) -> bool:
        items = _items(value)
        if not items or _content(value) in self._contents:
            return True
        if all(map(_is_plain, items)):
            return bool(self._texts) and all(map(self._has_plain, items))
        arrays = [item for item in items if isinstance(item, torch.Tensor | np.ndarray)]
        if arrays:
            return all(map(self._has_array, arrays))
        # Records may be given in another form.
        return len(value) > 1 and len(value) in self._lengths

    def _has_generator(self, value: Any) -> bool:
        """Return whether the state of a generator may be held, which may have any form."""
        is_pythons = isinstance(value, random.Random)
        first = value.getstate()[1][:3] if is_pythons else drawn_from(value)
        numbers = re.findall(r"\d{3,}", str(first))
        return bool(self._packed) or any(
            number in text for number in numbers for text in (*self._texts, *map(str, self._plain))
        )


def _spelled(value: Any) -> Any:
    """Return a key that is equal for equal numbers, whatever their types."""
    if isinstance(value, np.generic):
        value = value.item()
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) < 2.0**53 else repr(value)


def _short(spelled: Any) -> Any:
    """Return a number as an array of 32 bits gives it back."""
    return float(np.float32(spelled)) if isinstance(spelled, float) else spelled


def _content(value: Any) -> Any:
    """Return a key that is equal for containers and arrays of equal items, in any order."""
    if isinstance(value := plain(value), torch.Tensor | np.ndarray):
        if not _is_read(value):
            return tuple(value.shape), _some(value)
        value = value.tolist()
    if isinstance(value, (Mapping, Set, *SEQUENCES)):
        counts = collections.Counter(map(_content, _items(value)))
        return len(value), hash(frozenset(counts.items()))
    return _short(_spelled(value)) if _is_plain(value) else id(value)


def _items(value: Any) -> list[Any]:
    """List the first items of a container; of a mapping, its values."""
    items = value.values() if isinstance(value, Mapping) else value
    return list(itertools.islice(items, MOST_NUMBERS))


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (*PLAIN, np.generic))


def _leaves(value: Any) -> Iterator[Any]:
    """Yield the values in nested data."""
    if isinstance(value, (Mapping, *SEQUENCES)):
        for item in _items(value):
            yield from _leaves(item)
    else:
        yield value


def _count(value: Any) -> int:
    return value.numel() if isinstance(value, torch.Tensor) else int(value.size)


def _is_whole(value: Any) -> bool:
    """Return whether an array holds whole numbers, as the state of a generator does."""
    if isinstance(value, torch.Tensor):
        return not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    return value.dtype.kind in "ui"


def _is_read(value: Any) -> bool:
    """Return whether the numbers of an array can be listed without much work."""
    if isinstance(value, np.ndarray):
        return bool(value.size <= MOST_NUMBERS and value.dtype != object)
    return value.numel() <= MOST_NUMBERS and value.is_cpu and array_changes.is_marked(value)


def _address(value: Any) -> int | None:
    if isinstance(value, np.ndarray):
        return array_changes.mark(0, value).address if value.size else None
    return array_changes.address_of(value)


def _some(value: Any) -> Any:
    """Return some numbers of an array, or None if they cannot be read cheaply."""
    if isinstance(value, torch.Tensor) and not array_changes.is_marked(value):
        return None
    return array_changes.mark(0, value).some


def _is_equal(a: Any, b: Any) -> bool:
    """Return whether arrays of one shape are equal; of arrays in two places, some numbers."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if not (array_changes.is_marked(a) and array_changes.is_marked(b)):
            return True
        if a.device == b.device and a.dtype == b.dtype:
            return torch.equal(a, b)
        step = max(1, a.numel() // array_changes.SAMPLES)
        one, other = (tensor.detach().reshape(-1)[::step].cpu().double() for tensor in (a, b))
        return torch.allclose(one, other, rtol=1e-2, equal_nan=True)
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return bool(np.array_equal(a, b))
    return True
