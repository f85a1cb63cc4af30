"""Keep dicts, lists and tensors that several parts hold shared, in checkpoints and restores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from harness.distributed.dtensors import plain
from harness.state.buffers import is_equal
from harness.state.plain_values import is_same
from harness.tracking.attribute_values import own_dict, plain_copy
from harness.tracking.watched_part import Path, WatchedPart
from harness.untracked.array_changes import address_of

Place = tuple[str, str, str, Path]  # object name, module path, attribute, path in its value


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
        self.tensors: dict[Any, torch.Tensor] = {}  # those made in one restore, see `set_value`
        self._watched = watched
        # In one restore: the parameters and persistent buffers, by the address of their memory.
        self._saved: dict[int, list[torch.Tensor]] = {}

    def parted(self, held: Any, now: Any, kept: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Return the entry of an attribute to set; None if `load_state_dict` has restored it.

        What shares memory with a parameter or a persistent buffer, and has another value than
        theirs there, had parted from them. It is not written to that memory.

        Args:
            held: the present value.
            now: the value from a checkpoint.
            kept: the entry of the checkpoint.
        """
        if not address_of(held) or not (
            saved := self._saved.get(plain(held).untyped_storage().data_ptr())
        ):
            return kept
        if isinstance(now, torch.Tensor):
            if is_same(held.detach().cpu(), now):
                return None
            if (held.shape, held.dtype) == (now.shape, now.dtype) and _fits(held, now, saved):
                return kept
        return {**kept, "replaced": True}

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
        """List the memory of all parameters and persistent buffers; call `end_restore` after."""
        self.end_restore()
        for watch in (watch for of_object in self._watched.values() for watch in of_object):
            for tensor in _saved_tensors(watch.part):
                if tensor is not None and address_of(tensor):
                    memory = plain(tensor).untyped_storage().data_ptr()
                    self._saved.setdefault(memory, []).append(tensor)

    def end_restore(self) -> None:
        """Forget what the restore has filled and made: the program may free it."""
        self._filled.clear()
        self.tensors.clear()
        self._saved.clear()

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
            return plain_copy(value)
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
                return target if same else plain_copy(value)
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


def _saved_tensors(part: Any) -> list[torch.Tensor | None]:
    """Return the parameters and buffers in the `state_dict` of a module itself."""
    others = own_dict(part, "_non_persistent_buffers_set")
    own = [tensor for key, tensor in own_dict(part, "_buffers").items() if key not in others]
    return [*own_dict(part, "_parameters").values(), *own]


@torch.no_grad()
def _fits(held: torch.Tensor, now: torch.Tensor, saved: list[torch.Tensor]) -> bool:
    """Return whether a value, written to a tensor, leaves others in the same memory as they are."""
    before, others = held.detach().clone(), [tensor.detach().clone() for tensor in saved]
    held.copy_(now)
    if all(map(is_equal, saved, others)):
        return True
    held.copy_(before)
    return False


def _pairs(value: Any, held: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Yield each key or index in a container with its item and the one in another container."""
    if type(value) is dict:
        for key, item in value.items():
            yield key, item, held.get(key)
    else:
        for at, item in enumerate(value):
            yield at, item, held[at] if at < len(held) else None
