"""Find attributes of tracked objects that change in training but cannot be kept.

Such an attribute is in no `state_dict` and is no plain data, so only its name is reported. It is an
attribute that becomes another object, a container whose tensors or values change (an optimizer's
own `self.moments = {}`), or an object of one of the program's classes whose attributes change. An
attribute that is empty at first and does not change once it has a value is a cache, not state. The
result of a forward pass is not state either, because it is computed again.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import itertools
import os
import sys
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from harness.data.held_generators import is_library

MOST_ITEMS = 5000  # limit of items that are examined for one value
DEPTH = 3
PLAIN = (bool, int, float, complex, str, bytes, type(None))
PACKAGE = f"{Path(__file__).resolve().parents[1]}{os.sep}"

Print = Any  # the fingerprint of a value; None if it is empty, or computed again


class UnkeptValues:
    """The names of attributes that change and cannot be kept, each once."""

    def __init__(self) -> None:
        self.names: list[str] = []  # not reported yet
        self._before: dict[str, Print] = {}
        self._told: set[str] = set()
        self._looks, self._next = 0, 1

    def begin(self, name: str, values: Mapping[str, Any]) -> None:
        """Record an object at the start of the loop: its attributes that are no plain data."""
        for key, value in values.items():
            self._before[f"{name}.{key}"] = fingerprint(value)

    def is_time(self) -> bool:
        """Return whether to check at this save: at saves 1, 2, 4, 8 … of the attempt.

        Checks become less frequent because it takes a while to examine all objects.
        """
        self._looks += 1
        if self._looks < self._next:
            return False
        self._next *= 2
        return True

    def look(self, name: str, values: Mapping[str, Any]) -> None:
        """Compare an object's attributes with the last check; collect the names of changed ones."""
        for key, value in values.items():
            spelled = f"{name}.{key}"
            before, now = self._before.get(spelled), fingerprint(value)
            if (
                before is not None
                and now is not None
                and before != now
                and spelled not in self._told
            ):
                self._told.add(spelled)
                self.names.append(spelled)
            self._before[spelled] = now


def fingerprint(value: Any) -> Print:
    """Return a fingerprint that differs when the value has changed.

    No device is read, and at most some thousand objects are examined; a change elsewhere is not
    detected.
    """
    try:
        return _print(value, DEPTH, [MOST_ITEMS])
    except Exception:  # noqa: BLE001
        # Another thread may change the value just now, or a class of the program may raise.
        return None


def _print(value: Any, depth: int, left: list[int]) -> Print:
    """Return the fingerprint of a value to a depth; `left` counts down the items to examine."""
    left[0] -= 1
    if isinstance(value, torch.Tensor):
        return (
            None
            if value.grad_fn is not None
            else (id(value), 0 if value.is_inference() else value._version)
        )
    if isinstance(value, np.ndarray):
        return id(value), b"" if value.dtype == object else hashlib.blake2b(
            value.reshape(-1)[:MOST_ITEMS].tobytes(), digest_size=8
        ).digest()
    if isinstance(value, PLAIN):
        return value
    if depth == 0 or left[0] < 0:
        return id(value)
    if isinstance(value, dict):
        items = itertools.islice(value.items(), left[0])
        return (
            (
                len(value),
                *[
                    (k if isinstance(k, PLAIN) else id(k), _print(item, depth - 1, left))
                    for k, item in items
                ],
            )
            if value
            else None
        )
    if isinstance(value, list | tuple | collections.deque):
        return (
            (
                len(value),
                *[_print(item, depth - 1, left) for item in itertools.islice(value, left[0])],
            )
            if len(value)
            else None
        )
    if isinstance(value, Set):
        return (
            (len(value), hash(frozenset(map(id, value))) if len(value) <= MOST_ITEMS else 0)
            if value
            else None
        )
    if is_of_program(value) and isinstance(own := getattr(value, "__dict__", None), dict):
        return (
            id(value),
            *[(key, _print(item, depth - 1, left)) for key, item in list(own.items())],
        )
    return id(value)


def is_of_program(value: Any) -> bool:
    """Return whether a value is an object of one of the program's own classes.

    Modules are left out, because they have a `state_dict`.
    """
    return not isinstance(value, nn.Module | type) and is_programs(type(value))


def is_programs(kind: type) -> bool:
    """Return whether a class is the program's own, neither a library's nor the harness's."""
    return _is_programs_module(kind.__module__)


@functools.lru_cache(1000)
def _is_programs_module(name: str) -> bool:
    file = getattr(sys.modules.get(name), "__file__", None)
    return name == "__main__" or bool(
        file and not is_library(file) and not str(Path(file).resolve()).startswith(PACKAGE)
    )
