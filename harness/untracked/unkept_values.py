"""Find attributes of tracked objects that change in training but cannot be kept.

Such an attribute is in no `state_dict` and is no plain data, so only its name is reported. It is an
attribute that becomes another object, a container whose tensors or values change (an optimizer's
own `self.moments = {}`), or an object of one of the program's classes whose attributes change. An
attribute that is empty at first and does not change once it has a value is a cache, not state. The
result of a forward pass is not state either, because it is computed again. A module that is hidden
from its parent, in a list, is searched attribute by attribute.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import hashlib
import itertools
import os
import sys
import types
from collections.abc import Collection, Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, Sampler

from harness.data.generator_objects import drawn_from, is_generator
from harness.data.held_generators import is_library
from harness.source_code.methods import detached_attributes
from harness.state.kinds import PLAIN
from harness.untracked.array_changes import address_of
from harness.untracked.object_walk import FEW, OF_MODULES, parts

MOST_ITEMS = 5000  # limit of items that are examined for one value
HASHED_BYTES = 1 << 20  # of a larger array the beginning is compared
DEPTH = 3
PACKAGE = f"{Path(__file__).resolve().parents[1]}{os.sep}"

NONE: Mapping[int, str] = types.MappingProxyType({})
Print = Any  # the fingerprint of a value; None if it is empty, or computed again


class UnkeptValues:
    """The names of attributes that change and cannot be kept, each once."""

    def __init__(self) -> None:
        self.names: list[str] = []  # not reported yet
        self.graphs: list[str] = []  # likewise: those carried from step to step with their graph
        self.lost: dict[str, str] = {}  # likewise: those that were kept before, with the reason
        self._before: dict[str, Print] = {}
        self._reported: set[str] = set()
        self._looks, self._next = 0, 1

    def begin(self, name: str, values: Mapping[str, Any], held: Mapping[int, str]) -> None:
        """Record an object at the start of the loop: its attributes that are no plain data.

        `held` are the addresses of the tensors that are saved, and the ids of such modules and
        generators, the latter each with the name under which it is saved.
        """
        for key, value in _with_hidden(values, held):
            self._before[f"{name}.{key}"] = fingerprint(value, held)

    def lose(self, name: str, reason: str) -> None:
        """Take the name of an attribute that was kept until now, and why it is not any more."""
        if name not in self._reported:
            self._reported.add(name)
            self.lost[name] = reason

    def is_due(self) -> bool:
        """Return whether to check at this save: at saves 1, 2, 4, 8 … of the attempt.

        Checks become less frequent because it takes a while to examine all objects.
        """
        self._looks += 1
        if self._looks < self._next:
            return False
        self._next *= 2
        return True

    def look(
        self, name: str, values: Mapping[str, Any], held: Mapping[int, str], kind: type
    ) -> None:
        """Compare an object's attributes with the last check; collect the names of changed ones.

        Args:
            name: the path of the object.
            values: the attributes.
            held: as in `begin`.
            kind: the class of the object.
        """
        for key in filter(lambda key: has_graph(values[key]), values) if is_programs(kind) else ():
            spelled = f"{name}.{key}"
            if spelled not in self._reported and key in detached_attributes(kind):
                self._reported.add(spelled)
                self.graphs.append(spelled)
        for key, value in _with_hidden(values, held):
            spelled = f"{name}.{key}"
            before, now = self._before.get(spelled), fingerprint(value, held)
            if (
                before is not None
                and now is not None
                and before != now
                and spelled not in self._reported
            ):
                self._reported.add(spelled)
                self.names.append(spelled)
            self._before[spelled] = now


def fingerprint(value: Any, held: Mapping[int, str] = NONE) -> Print:
    """Return a fingerprint that differs when the value has changed.

    No device is read, and at most some thousand objects are examined; a change elsewhere is not
    detected. Tensors at the addresses in `held`, and modules and generators with an id there, are
    saved by others: their changes do not count, but that the value is another one of them does.
    """
    try:
        return _print(value, DEPTH, [MOST_ITEMS], held)
    except Exception:  # noqa: BLE001
        # Another thread may change the value just now, or a class of the program may raise.
        return None


def _with_hidden(values: Mapping[str, Any], held: Collection[int]) -> Iterator[tuple[str, Any]]:
    """Yield attributes, and those of the modules that are hidden in them, each after its path.

    A module in a list, say, is no child: neither its attributes nor its mode are saved. Modules
    with an id in `held` are children elsewhere.
    """
    yield from values.items()
    waiting = collections.deque((key, value, 0) for key, value in values.items())
    seen, left = set[int](), MOST_ITEMS
    while waiting and left > 0:
        path, value, depth = waiting.popleft()
        if id(value) in seen or id(value) in held:
            continue
        seen.add(id(value))
        inside = list[tuple[str, Any]]()
        with contextlib.suppress(Exception):  # a class of the program may raise at any question
            if isinstance(value, nn.Module):
                inside = list(itertools.islice(_of_hidden(value, seen, held), left))
                modes = str([part.training for part in value.modules()])
                yield from ((path + name, item) for name, item in (*inside, (".training", modes)))
            elif isinstance(value, dict | list | tuple | collections.deque) or is_of_program(value):
                inside = list(itertools.islice(parts(value), left))
        left -= len(inside)
        if depth < DEPTH:
            waiting.extend((path + name, item, depth + 1) for name, item in inside)


def _of_hidden(
    module: nn.Module, seen: set[int], held: Collection[int]
) -> Iterator[tuple[str, Any]]:
    """Yield the attributes of a module and of its children, but for private ones of a library's."""
    for path, part in module.named_modules():
        if part is module or not (id(part) in seen or id(part) in held):
            seen.add(id(part))
            is_own, computed = is_programs(type(part)), recomputed(part)
            yield from (
                (f"{path and '.'}{path}.{name}", item)
                for name, item in list(vars(part).items())
                if name not in OF_MODULES
                and name not in computed
                and (is_own or not name.startswith("_"))
            )


def _print(value: Any, depth: int, left: list[int], held: Mapping[int, str]) -> Print:
    """Return the fingerprint of a value to a depth; `left` counts down the items to examine."""
    left[0] -= 1
    if isinstance(value, torch.Tensor | np.ndarray):
        return _print_of_array(value, held)
    if isinstance(value, nn.Module):
        if id(value) in held:
            return "held"
        tensors = [*value.parameters(), *value.buffers()]
        return id(value), *[_print_of_array(tensor, held) for tensor in tensors]
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, itertools.count):
        return repr(value)
    if is_generator(value):
        # By its name: one that is made anew in its place gets the state that is saved there.
        is_held = id(value) in held
        return ("held", held[id(value)]) if is_held else (id(value), drawn_from(value))
    if isinstance(value, Dataset | Sampler):  # what they hold is seeded, saved or named as data
        return id(value)
    if depth == 0 or left[0] < 0:
        return id(value)

    def within(items: Iterable[Any]) -> list[Print]:
        return [_print(item, depth - 1, left, held) for item in itertools.islice(items, left[0])]

    if isinstance(value, dict):
        keys = [key if isinstance(key, PLAIN) else id(key) for key in value]
        return (len(value), *zip(keys, within(value.values()), strict=False)) if value else None
    if isinstance(value, list | tuple | collections.deque):
        return (len(value), *within(value)) if len(value) else None
    if isinstance(value, Set):
        return (
            (len(value), hash(frozenset(map(id, value))) if len(value) <= MOST_ITEMS else 0)
            if value
            else None
        )
    if is_of_program(value) or isinstance(value, types.SimpleNamespace | argparse.Namespace):
        own = dict(parts(value))
        return id(value), *zip(own, within(own.values()), strict=False)
    return id(value)


def _print_of_array(value: torch.Tensor | np.ndarray[Any, Any], held: Collection[int]) -> Print:
    """Return the fingerprint of an array; None for the result of a forward pass."""
    if isinstance(value, np.ndarray):
        if value.dtype == object:
            return id(value), b""
        some = value.reshape(-1)[: HASHED_BYTES // max(1, value.itemsize)]
        return id(value), hashlib.blake2b(some.tobytes(), digest_size=8).digest()
    if address_of(value) in held:
        return "held"
    if value.grad_fn is not None:
        return None
    return id(value), 0 if value.is_inference() else value._version


def is_of_program(value: Any) -> bool:
    """Return whether a value is an object of one of the program's own classes.

    Modules are left out, because they have a `state_dict`.
    """
    return not isinstance(value, nn.Module | type) and is_programs(type(value))


def has_graph(value: Any) -> bool:
    """Return whether this is the result of a forward pass, or a small container of such."""
    if isinstance(value, torch.Tensor):
        return value.grad_fn is not None
    is_small = isinstance(value, list | tuple | dict) and len(value) <= FEW
    items = value.values() if isinstance(value, dict) else value
    return is_small and any(isinstance(item, torch.Tensor) and has_graph(item) for item in items)


def recomputed(module: Any) -> set[str]:
    """Return the attributes that hooks of torch compute from parameters before each forward pass.

    These are the weights of `weight_norm`, `spectral_norm` and `prune` (in `torch.nn.utils`).
    """
    hooks = getattr(module, "_forward_pre_hooks", None) or {}
    return {
        str(getattr(hook, "_tensor_name", None) or getattr(hook, "name", ""))
        for hook in hooks.values()
        if any(base.__module__.startswith("torch.nn.utils.") for base in type(hook).__mro__)
    }


def is_programs(kind: type) -> bool:
    """Return whether a class is the program's own, neither a library's nor the harness's."""
    return _is_programs_module(kind.__module__)


@functools.lru_cache(1000)
def _is_programs_module(name: str) -> bool:
    file = getattr(sys.modules.get(name), "__file__", None)
    return name == "__main__" or bool(
        file and not is_library(file) and not str(Path(file).resolve()).startswith(PACKAGE)
    )
