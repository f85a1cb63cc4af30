"""Save and restore attributes that training changes and that no `state_dict` contains.

For a module these are frozen parameters (`requires_grad`), the mode (`training`), plain attributes
and non-persistent buffers. An optimizer is treated in the same way if its class is not torch's own.

A checkpoint keeps the difference between the current values and the module as built. Each current
value is stored together with the value as built:

    {"model": {"body.0": {"training": {"built": True, "now": False},
                          "p": {"built": 0.1, "now": 0.3}},
               "body.1": {"weight.requires_grad": …,
                          "buffer mask": {"built": DIGEST, "now": tensor}}}}

"As built" means the value at the start of the loop, because a program may freeze a part after
`track`. Values from a checkpoint do not count: if a module's own `load_state_dict` has set a value,
the value from before the load counts as built. A restore sets an attribute only if it had changed,
and only if its value as built is the same as at the time of the save. Otherwise the program itself
has changed, and its new value stands. A dict or list that was changed in place is filled in place,
because other parts and variables of the program may hold the same one.

Only plain values, and tensors that exist at the start of the loop, are kept. Any other attribute
that changes is reported by name (`unkept`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch

from harness.distributed import wrappers
from harness.tracking.attribute_values import (
    ABSENT,
    BUFFER,
    REQUIRES_GRAD,
    Classes,
    Part,
    Values,
    class_of,
    containers_of,
    current_value,
    digest_of,
    home_device,
    is_at,
    is_looked_at,
    is_mutable,
    is_plain,
    is_simple,
    is_small,
    joined,
    own_dict,
    parts,
    place_of,
    replaced_parts,
    set_value,
    small_copy,
    spelled,
    tensor_of,
    tensors_of,
    values_of,
)
from harness.tracking.sameness import is_same
from harness.untracked.array_changes import addresses
from harness.untracked.unkept_values import UnkeptValues, is_programs

Built = dict[str, dict[str, Values]]  # by object name and module path
# By object name, module path and attribute: the values "built" and "now". A missing key means that
# there was no such attribute as built, or that there is none now.
Changed = dict[str, dict[str, dict[str, dict[str, Any]]]]


def as_built(tracked: Mapping[str, Any]) -> Built:
    """Record the plain values of all tracked objects, and digests of their other tensors."""
    return {
        name: {
            path: values_of(part)
            | {key: digest_of(tensor) for key, tensor in tensors_of(part).items()}
            for path, part in parts(obj)
        }
        for name, obj in tracked.items()
    }


class Attributes:
    """The attributes of all tracked modules and optimizers, on one rank.

    Args:
        generators: returns the ids of the generators whose state is kept.
    """

    def __init__(self, generators: Callable[[], set[int]]) -> None:
        self._generators = generators
        self._before: Built = {}  # when tracked, before the restore
        self._after: Built = {}  # when tracked, after the restore
        self._built: Built = {}
        self._tracked: Mapping[str, Any] = {}
        self._watched: dict[str, list[_Watched]] = {}
        self._classes: dict[str, Classes] = {}  # as built, by object name
        self.replaced: dict[str, str] = {}  # by path: how a module is not as built
        self.unkept = UnkeptValues()

    def before_restore(self, tracked: Mapping[str, Any]) -> None:
        """Record newly tracked objects as built, before a checkpoint is loaded into them."""
        self._before |= as_built(tracked)

    def after_restore(self, tracked: Mapping[str, Any]) -> None:
        """Record all tracked objects after a checkpoint was loaded into them."""
        self._after = as_built(tracked)

    def begin(self, tracked: Mapping[str, Any]) -> None:
        """Start to track changes, at the start of the loop."""
        self._tracked, self._built = tracked, as_built(tracked)
        for name, of_parts in self._before.items():
            for path, before in of_parts.items():
                here = self._built.get(name, {}).get(path, {})
                after = self._after.get(name, {}).get(path, {})
                for key, value in before.items():
                    if key in here and key in after and is_same(here[key], after[key]):
                        # If the two differ, the module's own load_state_dict has set the new one.
                        here[key] = value
        self._watched = {
            name: [_Watched(path, part) for path, part in parts(obj)]
            for name, obj in tracked.items()
        }
        self._classes = {name: _classes(watched) for name, watched in self._watched.items()}
        held = self._kept()
        for name, watched in self._watched.items():
            for watch in watched:
                # Kept tensors too: one may become a value that cannot be kept.
                kept = {
                    key: value
                    for key in watch.tensors
                    if (value := current_value(watch.part, key)) is not None
                }
                self.unkept.begin(joined(name, watch.path), watch.odd_values() | kept, held)

    def _kept(self) -> set[int]:
        """Return the addresses of the parameters of tracked modules, and the ids of generators."""
        objects = map(wrappers.unwrap, self._tracked.values())
        return addresses(objects, with_buffers=False) | self._generators()

    def state(self) -> Changed | None:
        """Return the differences from the modules as built, or None if there are none.

        Tensors are copied to the CPU. At some of the saves (see `UnkeptValues.is_time`) the
        attributes that cannot be kept are checked as well.
        """
        changed = {
            name: differences for name in self._tracked if (differences := self._changed(name))
        }
        if self.unkept.is_time():
            held = self._kept()
            for name, watched in self._watched.items():
                for watch in watched:
                    self.unkept.look(joined(name, watch.path), watch.odd_values(), held)
        return changed or None

    def _changed(self, name: str) -> dict[str, dict[str, dict[str, Any]]]:
        """Return the differences of one tracked object, by module path."""
        if any(watch.has_other_parts() for watch in self._watched[name]):
            known = {(watch.path, id(watch.part)): watch for watch in self._watched[name]}
            self._watched[name] = [
                known.get((path, id(part))) or _Watched(path, part, is_late=True)
                for path, part in parts(self._tracked[name])
            ]
        changed, classes = {}, _classes(self._watched[name])
        if classes != self._classes[name]:
            self.replaced |= replaced_parts(name, self._classes[name], classes)
        for watch in self._watched[name]:
            built = self._built[name].get(watch.path)
            if (
                built is not None
                # The attributes of another class mean nothing to the module as built.
                and classes[watch.path] is self._classes[name].get(watch.path)
                and watch.may_have_changed()
                and (differs := watch.differences(built))
            ):
                changed[watch.path] = differs
        return changed

    def restore(self, changed: Changed) -> list[str]:
        """Set the changed attributes; return a message for each that keeps the program's value.

        An attribute is set only if its value as built is the same now as at the time of the save.
        """
        messages = []
        for name, of_parts in changed.items():
            modules = dict(parts(self._tracked.get(name)))
            for path, of_part in of_parts.items():
                here = self._built.get(name, {}).get(path, {})
                for key, kept in of_part.items():
                    then = kept.get("built", ABSENT)
                    now = kept.get("now", ABSENT)
                    built = here.get(key, ABSENT)
                    if path in modules and is_same(then, built):
                        set_value(modules[path], key, copy.deepcopy(now), kept)
                    elif not is_same(now, built):
                        was = f"was built as {spelled(then)} and had become {spelled(now)}"
                        messages.append(
                            f"{joined(name, path, key)} {was}; "
                            f"it is built as {spelled(built)} now, and that stands"
                        )
        return messages

    def put_back(self, kept: Changed) -> None:
        """Set the attributes once more that were changed since they were restored from `kept`.

        An attribute that is not in `kept` gets its value as built, unless that is a tensor: of
        tensors as built there are only digests.
        """
        for name, obj in self._tracked.items():
            now, then, modules = self._changed(name), kept.get(name, {}), dict(parts(obj))
            tensors = {watch.path: watch.tensors for watch in self._watched[name]}
            for path in [path for path in {**now, **then} if path in modules]:
                built, here = self._built[name].get(path, {}), now.get(path, {})
                wanted = {
                    key: {"built": built[key], "now": built[key]} if key in built else {}
                    for key in here
                    if key not in tensors[path]
                } | then.get(path, {})
                for key, entry in wanted.items():
                    as_built, value = built.get(key, ABSENT), entry.get("now", ABSENT)
                    live = here[key].get("now", ABSENT) if key in here else as_built
                    is_other = not is_same(entry.get("built", ABSENT), as_built)
                    if not (is_other or is_same(live, value)):
                        set_value(modules[path], key, copy.deepcopy(value), entry)


def _classes(watched: list[_Watched]) -> Classes:
    return {watch.path: class_of(watch.part) for watch in watched}


class _Watched:
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
        self._mutable = {
            key: containers_of(value)
            for key, value in own.items()
            if key not in odd and is_mutable(value)
        }
        self._same = {
            key: value for key, value in own.items() if key not in odd and key not in self._mutable
        }
        self._odd = [(key, number) for key, number in odd.items() if key not in self.tensors]
        self._kinds = list(map(type, vars(part).values()))
        self._children = list(own_dict(part, "_modules").values())
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

    def has_other_parts(self) -> bool:
        """Return whether child modules were added, removed or replaced."""
        return list(own_dict(self.part, "_modules").values()) != self._children

    def may_have_changed(self) -> bool:
        """Return whether anything may have changed since the start of the loop."""
        now = vars(self.part)
        return (
            self._is_late
            or bool(self._mutable)
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
            return {"now": now[key]} | ({"replaced": True} if self._is_replaced(key) else {})
        is_gone = current_value(self.part, key) is None and key not in vars(self.part)
        return {} if is_gone else None

    def _is_replaced(self, key: str) -> bool:
        """Return whether a dict or list in a value was replaced: the one as built is not changed.

        Then a restore must not fill that one, because others may hold it.
        """
        built, now = self._mutable.get(key, {}), containers_of(vars(self.part).get(key))
        return (self._is_late and bool(now)) or any(
            now[path] is not built[path] for path in built.keys() & now.keys()
        )

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
