"""What of a tracked object changes while it trains, is in no `state_dict`, and cannot be kept as plain data: its name is to be told.

That is an attribute that becomes another object, a container whose tensors or values change (an optimizer's own `self.moments = {}`), and
an object of one of the program's classes whose attributes do. What is empty at first and then stays what it became is a cache, and
nobody's state; what a forward pass has computed is computed anew.
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

MOST_ITEMS = 5000  # that are looked at for one value
DEPTH = 3
PLAIN = (bool, int, float, complex, str, bytes, type(None))
PACKAGE = f"{Path(__file__).resolve().parents[1]}{os.sep}"

Print = Any  # of a value; None of what is empty, or computed anew


class UnkeptValues:
    """The names of attributes that change and cannot be kept, each once."""

    def __init__(self) -> None:
        self.names: list[str] = []  # that are still to be told
        self._before: dict[str, Print] = {}
        self._told: set[str] = set()
        self._looks, self._next = 0, 1

    def begin(self, name: str, values: Mapping[str, Any]) -> None:
        """An object as the loop found it: its attributes that are no plain data."""
        for key, value in values.items():
            self._before[f"{name}.{key}"] = fingerprint(value)

    def is_time(self) -> bool:
        """Whether to look this time; ever more rarely, as to look at all objects takes a while: at the saves 1, 2, 4, 8 …"""
        self._looks += 1
        if self._looks < self._next:
            return False
        self._next *= 2
        return True

    def look(self, name: str, values: Mapping[str, Any]) -> None:
        """The same object now."""
        for key, value in values.items():
            spelled = f"{name}.{key}"
            before, now = self._before.get(spelled), fingerprint(value)
            if before is not None and now is not None and before != now and spelled not in self._told:
                self._told.add(spelled)
                self.names.append(spelled)
            self._before[spelled] = now


def fingerprint(value: Any) -> Print:
    """Something that is another one when the value has changed, as far as that shows without reading a device, or looking at more than
    some thousand objects."""
    try:
        return _print(value, DEPTH, [MOST_ITEMS])
    except Exception:  # noqa: BLE001 - a thread of the program's changes it just now, or a class of its own answers with an error
        return None


def _print(value: Any, depth: int, left: list[int]) -> Print:
    left[0] -= 1
    if isinstance(value, torch.Tensor):
        return None if value.grad_fn is not None else (id(value), 0 if value.is_inference() else value._version)
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
            (len(value), *[(k if isinstance(k, PLAIN) else id(k), _print(item, depth - 1, left)) for k, item in items]) if value else None
        )
    if isinstance(value, list | tuple | collections.deque):
        return (len(value), *[_print(item, depth - 1, left) for item in itertools.islice(value, left[0])]) if len(value) else None
    if isinstance(value, Set):
        return (len(value), hash(frozenset(map(id, value))) if len(value) <= MOST_ITEMS else 0) if value else None
    if is_of_program(value) and isinstance(own := getattr(value, "__dict__", None), dict):
        return (id(value), *[(key, _print(item, depth - 1, left)) for key, item in list(own.items())])
    return id(value)


def is_of_program(value: Any) -> bool:
    """Whether a value is an object of one of the program's own classes; not a module, which has a `state_dict`."""
    return not isinstance(value, nn.Module | type) and is_programs(type(value))


def is_programs(kind: type) -> bool:
    """Whether a class is the program's own: no library's, and none of the harness's."""
    return _is_programs_module(kind.__module__)


@functools.lru_cache(1000)
def _is_programs_module(name: str) -> bool:
    file = getattr(sys.modules.get(name), "__file__", None)
    return name == "__main__" or bool(file and not is_library(file) and not str(Path(file).resolve()).startswith(PACKAGE))
