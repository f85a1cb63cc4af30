"""Watch the parts of a tracked object, and the attributes of each, for changes."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from harness.distributed import wrappers
from harness.state.plain_values import is_same
from harness.tracking.attribute_values import (
    ABSENT,
    BUFFER,
    REQUIRES_GRAD,
    Part,
    Values,
    containers_of,
    current_value,
    home_device,
    is_at,
    is_looked_at,
    is_mutable,
    is_plain,
    is_simple,
    is_small,
    own_dict,
    parts,
    place_of,
    small_copy,
    tensor_of,
    tensors_of,
    values_of,
)
from harness.untracked.unkept_values import is_programs

Path = tuple[Any, ...]  # keys and indices, from an attribute's value to a container in it
Place = tuple[str, str, str, Path]  # object name, module path, attribute, path in its value


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
        return {
            key: value
            for key, value in buffers.items()
            if value is not None and not is_simple(value)
        } | {
            key: value
            for key, value in vars(self.part).items()
            if not (is_simple(value) if key in self.tensors else is_small(value))
            and is_looked_at(self.part, key)
            and not (key.startswith("_") and not is_programs(type(self.part)))
            and not is_plain(value)
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

    def differences(self, built: Values) -> dict[str, dict[str, Any]]:
        """Return the attributes that differ from `built`, each with both values."""
        now, differing = values_of(self.part), dict[str, dict[str, Any]]()
        made = [
            key
            for key, value in vars(self.part).items()
            if key not in self.tensors and is_small(value) and is_looked_at(self.part, key)
        ]
        for key in dict.fromkeys((*built, *now, *made)):
            if (key in made or self._has_changed(key, built, now)) and (
                kept := self._kept(key, now)
            ) is not None:
                differing[key] = ({"built": built[key]} if key in built else {}) | kept
        return differing

    def _has_changed(self, key: str, built: Values, now: Values) -> bool:
        if key in self.tensors:
            return self._is_another(key)
        if key in now:
            return not is_same(built.get(key, ABSENT), now[key])
        return key not in vars(self.part) and not key.endswith(REQUIRES_GRAD)

    def _kept(self, key: str, now: Values) -> dict[str, Any] | None:
        """Return the present value of an attribute in the form in which a checkpoint stores it.

        Returns {} for an attribute that no longer exists, and None for one that cannot be stored.
        """
        if (tensor := tensor_of(self.part, key)) is not None:
            elsewhere = (
                {"device": tensor.device.type}
                if home_device(self.part, tensor).type != tensor.device.type
                else {}
            )
            return {"now": tensor.detach().to("cpu", copy=True)} | elsewhere
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


class Containers:
    """Tell which dicts and lists in the parts of tracked objects are one, also after a restart.

    An entry of a checkpoint says under `replaced` which containers of its value are not those that
    were built in their places, as pairs of a path in the value and a reference: the place where
    that one was built, or else a number of its own.
    """

    def __init__(self, watched: Mapping[str, list[WatchedPart]]) -> None:
        self._built: dict[Place, Any] = {
            (name, watch.path, key, path): container
            for name, of_object in watched.items()
            for watch in of_object
            for key, containers in watch.containers.items()
            for path, container in containers.items()
        }
        self._places: dict[int, Place] = {}
        for place, container in self._built.items():
            self._places.setdefault(id(container), place)
        self._made: dict[int, Any] = {}  # by number: those that a restore has made
        self._filled: dict[int, Any] = {}  # by identity: the values, in one restore

    def refer(self, changed: Mapping[str, Any], watched: Mapping[str, list[WatchedPart]]) -> None:
        """Add `replaced` to the entries of changed values.

        A container in a new place that nothing else holds needs no reference.
        """
        others = [
            (entry, *other)
            for name, of_parts in changed.items()
            for watch in watched[name]
            for key, entry in of_parts.get(watch.path, {}).items()
            for other in watch.other_containers(key)
        ]
        counts = Counter(id(container) for _, _, container, _ in others)
        numbers: dict[int, int] = {}
        for entry, path, container, has_replaced in others:
            place = self._places.get(id(container))
            if place is not None or has_replaced or counts[id(container)] > 1:
                number = numbers.setdefault(id(container), len(numbers)) if place is None else 0
                entry.setdefault("replaced", []).append((path, place or number))

    def begin_restore(self) -> None:
        """Forget which containers were filled by the restore before."""
        self._filled.clear()

    def restored(self, place: Place, value: Any, kept: Mapping[str, Any], held: Any) -> Any:
        """Return a value to set, with each container filled that was the same one when saved.

        Args:
            place: the place of the attribute.
            value: the plain value from a checkpoint.
            kept: the entry of the checkpoint.
            held: the present value, whose containers are filled where none is known as built.
        """
        replaced = kept.get("replaced", ())
        if replaced is True:  # as older files say it: some of it
            return copy.deepcopy(value)
        references = {tuple(path): reference for path, reference in replaced}
        return self._restored(place, value, references, held)

    def _restored(self, place: Place, value: Any, references: Mapping[Path, Any], held: Any) -> Any:
        *owner, path = place
        target: Any
        if type(value) not in (dict, list, tuple):
            return value
        if type(value) is tuple:
            target = held if type(held) is tuple else ()
        else:
            target = self._target(place, references.get(path), type(value), held)
            if id(target) in self._filled:
                same = is_same(self._filled[id(target)], value)
                return target if same else copy.deepcopy(value)
            self._filled[id(target)] = value
        inner = {
            key: self._restored((*owner, (*path, key)), item, references, held_item)  # type: ignore[arg-type]
            for key, item, held_item in _pairs(value, target)
        }
        if type(value) is tuple:
            return tuple(inner.values())
        target.clear()
        target.update(inner) if type(value) is dict else target.extend(inner.values())
        return target

    def _target(self, place: Place, reference: Any, kind: type, held: Any) -> Any:
        """Return the dict or list that is filled with a value, a new one if there is none."""
        if isinstance(reference, int):
            found = self._made.setdefault(reference, kind())
        elif reference is not None:
            name, path, key, inner = reference
            found = self._built.get((name, path, key, tuple(inner)))
        else:
            found = self._built.get(place, held)
        return found if type(found) is kind else kind()


def _pairs(value: Any, held: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Yield each key or index in a container with its item and the one in another container."""
    if type(value) is dict:
        for key, item in value.items():
            yield key, item, held.get(key)
    else:
        for at, item in enumerate(value):
            yield at, item, held[at] if at < len(held) else None


class PartList:
    """The parts of one tracked object with their paths (see `parts`)."""

    def __init__(self, obj: Any) -> None:
        self.obj = obj
        self._take()

    def _take(self) -> None:
        self._parts = parts(self.obj)
        self._children = [_children(part) for _, part in self._parts]

    def now(self) -> list[tuple[str, Part]]:
        """Return the present parts; the same list as long as no part was added or replaced."""
        if [_children(part) for _, part in self._parts] != self._children:
            self._take()
        return self._parts


def _children(part: Part) -> list[Any]:
    return list(own_dict(part, "_modules").values())


def add_outer_modes(
    listed: Mapping[str, list[tuple[str, Any]]],
    tracked: Mapping[str, Any],
    changed: Mapping[str, Any],
) -> None:
    """Add `outside` to each changed mode: the modes of the wrappers around, if one differs.

    Args:
        listed: the parts of the tracked objects, with their paths.
        tracked: the objects by name.
        changed: the changed attributes, by object name, module path and attribute.
    """
    for name, of_parts in changed.items():
        if any("training" in entries for entries in of_parts.values()):
            around = wrappers.shells(tracked[name])
            for path, part in listed[name]:
                entry = of_parts.get(path, {}).get("training", {})
                modes = [shell.training for shell in around.get(id(part), ())]
                if entry and any(mode is not entry.get("now") for mode in modes):
                    entry["outside"] = modes


def set_outer_modes(tracked: Mapping[str, Any], changed: Mapping[str, Any]) -> None:
    """Set the modes of the wrappers around the modules whose mode was set.

    Args:
        tracked: the objects by name.
        changed: the attributes that were set, by object name, module path and attribute.
    """
    for name, of_parts in changed.items():
        if any("training" in entries for entries in of_parts.values()):
            around = wrappers.shells(tracked.get(name))
            for path, part in parts(tracked.get(name)):
                entry = of_parts.get(path, {}).get("training", {})
                if not entry or getattr(part, "training", None) is not entry.get("now"):
                    continue
                outer, modes = around.get(id(part), []), entry.get("outside", ())
                modes = modes if len(modes) == len(outer) else [entry["now"]] * len(outer)
                for shell, mode in zip(outer, modes, strict=True):
                    shell.training = mode
