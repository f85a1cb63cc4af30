"""Watch the parts of a tracked object, and the attributes of each, for changes."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from harness.state.plain_values import is_same
from harness.tracking.attribute_values import (
    ABSENT,
    BUFFER,
    IS_PLAIN,
    MOST_KEPT,
    REQUIRES_GRAD,
    Part,
    Values,
    bookkeeping_of,
    containers_of,
    current_value,
    home_device,
    is_at,
    is_kept,
    is_looked_at,
    is_mutable,
    is_plain,
    is_simple,
    is_small,
    memory_of,
    own_dict,
    parts,
    place_of,
    small_copy,
    tensor_of,
    tensors_of,
    values_of,
)
from harness.untracked.unkept_values import is_programs, recomputed

Copies = dict[tuple[object, ...], torch.Tensor]
Path = tuple[Any, ...]  # keys and indices, from an attribute's value to a container in it


class WatchedPart:
    """One module or optimizer at the start of the loop, with a quick check for changes.

    If it has come into its place later (`is_late`), it is never known to be as built.
    """

    def __init__(self, path: str, part: Part, *, is_late: bool = False) -> None:
        self.path, self.part, self._is_late = path, part, is_late
        own = {key: value for key, value in vars(part).items() if is_looked_at(part, key)}
        self.tensors = {
            key: (place_of(tensor), small_copy(tensor))
            for key, tensor in ({} if is_late else tensors_of(part)).items()
        }
        self._memory = {
            key: tensor.data_ptr()
            for key in self.tensors
            if (tensor := tensor_of(part, key)) is not None
        }
        odd = {key: id(value) for key, value in own.items() if not is_plain(value)}
        self.containers = {
            key: containers_of(value)
            for key, value in own.items()
            if key not in odd and is_mutable(value)
        }
        self._same = {
            key: value
            for key, value in own.items()
            if key not in odd and key not in self.containers
        }
        self._odd = [(key, number) for key, number in odd.items() if key not in self.tensors]
        self._not_plain = odd.keys()  # as built
        self.kept = set[str]()  # the attributes that a checkpoint has held
        self.lost = dict[str, str]()  # those of them that it cannot hold now, with the reason
        self._kinds = list(map(type, vars(part).values()))
        self._trained = self._which_are_trained()

    def _which_are_trained(self) -> list[bool]:
        return [
            parameter is not None and parameter.requires_grad
            for parameter in own_dict(self.part, "_parameters").values()
        ]

    def odd_values(self) -> dict[str, Any]:
        """Return the attributes that the program may change and that cannot be kept.

        These are neither plain data nor kept tensors. Private attributes of a library's class are
        left out.
        """
        buffers = {
            key: current_value(self.part, key) for key in self.tensors if key.startswith(BUFFER)
        }
        bookkeeping = bookkeeping_of(self.part) | recomputed(self.part)
        return {
            key: value
            for key, value in buffers.items()
            if value is not None and not is_simple(value)
        } | {
            key: value
            for key, value in vars(self.part).items()
            if key not in bookkeeping
            and type(value) not in IS_PLAIN  # most are left out here
            and is_looked_at(self.part, key)
            and not (is_simple(value) if key in self.tensors else is_small(value))
            and not (key.startswith("_") and not is_programs(type(self.part)))
            and not is_kept(value, key not in self._not_plain)
        }

    def may_have_changed(self) -> bool:
        """Return whether anything may have changed since the start of the loop."""
        now = vars(self.part)
        return (
            self._is_late
            or bool(self.containers)
            or list(map(type, now.values())) != self._kinds  # True is equal to 1
            or not self._same.items() <= now.items()
            or (bool(self._odd) and any(id(now.get(key)) != number for key, number in self._odd))
            or (bool(self._trained) and self._which_are_trained() != self._trained)
            or (bool(self.tensors) and any(map(self._is_another, self.tensors)))
        )

    def differences(self, built: Values, copies: Copies) -> dict[str, dict[str, Any]]:
        """Return the attributes that differ from `built`, each with both values.

        `copies` are the tensors that were copied already, by `memory_of`: shared ones stay so.
        """
        now, differing = values_of(self.part, self._not_plain), dict[str, dict[str, Any]]()
        made = [
            key
            for key, value in vars(self.part).items()
            if key not in self.tensors and is_small(value) and is_looked_at(self.part, key)
        ]
        for key in dict.fromkeys((*built, *now, *made)):
            if (key in made or self._has_changed(key, built, now)) and (
                kept := self._kept(key, now, copies)
            ) is not None:
                differing[key] = ({"built": built[key]} if key in built else {}) | kept
        self.lost = {
            key: f"has more than {MOST_KEPT:,} items"
            if is_plain(value, sys.maxsize)
            else "is not plain data any more"
            for key in self.kept - differing.keys() - now.keys()
            if type(value := vars(self.part).get(key)) in (list, tuple, dict)
        }
        self.kept |= differing.keys()
        return differing

    def _has_changed(self, key: str, built: Values, now: Values) -> bool:
        if key in self.tensors:
            return self._is_another(key)
        if key in now:
            return not is_same(built.get(key, ABSENT), now[key])
        return key not in vars(self.part) and not key.endswith(REQUIRES_GRAD)

    def _kept(self, key: str, now: Values, copies: Copies) -> dict[str, Any] | None:
        """Return the present value of an attribute in the form in which a checkpoint stores it.

        Returns {} for an attribute that no longer exists, and None for one that cannot be stored.
        """
        if (tensor := tensor_of(self.part, key)) is not None:
            elsewhere = (
                {"device": tensor.device.type}
                if home_device(self.part, tensor).type != tensor.device.type
                else {}
            )
            if (at := memory_of(tensor)) not in copies:
                copies[at] = tensor.detach().to("cpu", copy=True)
            place, _ = self.tensors.get(key, (None, None))
            is_built = place is not None and place[0]() is tensor and at[0] == self._memory.get(key)
            return {"now": copies[at]} | elsewhere | ({} if is_built else {"replaced": True})
        if key in now:
            return {"now": now[key]}
        is_gone = current_value(self.part, key) is None and key not in vars(self.part)
        return {} if is_gone else None

    def other_containers(self, key: str) -> list[tuple[Path, Any, bool]]:
        """List the dicts and lists in an attribute's value that are not those as built there.

        Each comes with its path and whether there was one as built in its place: a restore must not
        fill that one, because others may hold it. If the part itself has come later, its whole
        value is another one.
        """
        built = {} if self._is_late else self.containers.get(key, {})
        return [
            (path, container, path in built or (self._is_late and path == ()))
            for path, container in containers_of(vars(self.part).get(key)).items()
            if container is not built.get(path)
        ]

    def _is_another(self, key: str) -> bool:
        """Return whether a tensor was replaced or written to; compare a small one by value."""
        now, (place, before) = tensor_of(self.part, key), self.tensors[key]
        if (
            now is None
            or before is None
            or (now.shape, now.dtype, now.device) != (before.shape, before.dtype, before.device)
        ):
            return not is_at(place, now)
        return not torch.equal(now.detach(), before)


class PartList:
    """The parts of one tracked object with their paths (see `parts`)."""

    def __init__(self, obj: Any) -> None:
        self.obj = obj
        self._take()

    def _take(self) -> None:
        self._parts = parts(self.obj)
        self._modules = [part for _, part in self._parts if isinstance(part, nn.Module)]
        self._children = self._present_children()

    def _present_children(self) -> list[list[nn.Module | None]]:
        return [[*module._modules.values()] for module in self._modules]

    def now(self) -> list[tuple[str, Part]]:
        """Return the present parts; the same list as long as no part was added or replaced."""
        if self._present_children() != self._children:
            self._take()
        return self._parts
