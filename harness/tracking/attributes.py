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
because other parts and variables of the program may hold the same one, and one that several parts
hold stays one.

Only plain values, and tensors that exist at the start of the loop, are kept. Any other attribute
that changes is reported by name (`unkept`), and so is one that was kept and cannot be any more, at
the first save without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

import harness.state.buffers as buffers
from harness.distributed import wrappers
from harness.state.plain_values import is_same
from harness.tracking.attribute_values import (
    ABSENT,
    Classes,
    Part,
    Values,
    add_outer_modes,
    class_of,
    current_value,
    digest_of,
    joined,
    parts,
    replaced_parts,
    set_outer_modes,
    set_value,
    spelled,
    tensors_of,
    values_of,
)
from harness.tracking.shared_containers import Containers
from harness.tracking.watched_part import Copies, PartList, WatchedPart
from harness.untracked.array_changes import addresses
from harness.untracked.unkept_values import UnkeptValues

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


def containers_in(tracked: Mapping[str, Any]) -> Containers:
    """Return the dicts and lists in the attributes of objects, for `restore_changed`."""
    return Containers(
        {name: [WatchedPart(*part) for part in parts(obj)] for name, obj in tracked.items()}
    )


def restore_changed(
    tracked: Mapping[str, Any], as_built: Built, changed: Changed, containers: Containers
) -> list[str]:
    """Set changed attributes of objects; return a message for each that keeps its own value.

    An attribute is set only if its value as built is the same now as at the time of the save.

    Args:
        tracked: the objects by name.
        as_built: their attributes as built.
        changed: what to set.
        containers: the dicts and lists in the attributes as built.
    """
    messages = []
    containers.begin_restore()
    for name, of_parts in changed.items():
        modules = dict(parts(tracked.get(name)))
        for path, of_part in of_parts.items():
            here = as_built.get(name, {}).get(path, {})
            for key, kept in of_part.items():
                then = kept.get("built", ABSENT)
                now = kept.get("now", ABSENT)
                built = here.get(key, ABSENT)
                if path in modules and is_same(then, built):
                    _set(containers, (name, path, key), modules[path], now, kept)
                elif not is_same(now, built):
                    was = f"was built as {spelled(then)} and had become {spelled(now)}"
                    messages.append(
                        f"{joined(name, path, key)} {was}; "
                        f"it is built as {spelled(built)} now, and that stands"
                    )
    containers.end_restore()
    set_outer_modes(tracked, changed)
    return messages


class Attributes:
    """The attributes of all tracked modules and optimizers, on one rank.

    Args:
        generators: returns the names of the generators whose state is kept, by id.
    """

    def __init__(self, generators: Callable[[], dict[int, str]]) -> None:
        self._generators = generators
        self._before: Built = {}  # when tracked, before the restore
        self._after: Built = {}  # when tracked, after the restore
        self._built: Built = {}
        self._tracked: Mapping[str, Any] = {}
        self._parts: dict[str, PartList] = {}
        self._listed: dict[str, list[tuple[str, Any]]] = {}  # the parts, when last asked
        self._watched: dict[str, list[WatchedPart]] = {}  # for each of these
        self._containers = Containers({})
        self._classes: dict[str, Classes] = {}  # as built, by object name
        self.replaced: dict[str, str] = {}  # by path: how a module is not as built
        self.unkept = UnkeptValues()
        self._layouts: dict[str, buffers.Layout] = {}  # when tracked, by object name
        self._tensors: dict[int, list[int]] = {}  # see `buffers.held_by`, by the id of the part
        self.misfits: dict[str, dict[str, str]] = {}  # by object name: see `buffers.misfits`

    def note_layouts(self, objects: Mapping[str, Any]) -> None:
        """Record which tensors newly tracked objects have: those that a restart would have."""
        self._layouts |= {
            name: buffers.layout_of(_laid_out(obj, parts(obj))) for name, obj in objects.items()
        }

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
        self._parts = {name: PartList(obj) for name, obj in tracked.items()}
        self._listed = {name: of_object.now() for name, of_object in self._parts.items()}
        self._watched = {
            name: [WatchedPart(path, part) for path, part in listed]
            for name, listed in self._listed.items()
        }
        self._containers = Containers(self._watched)
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

    def _kept(self) -> dict[int, str]:
        """Return the addresses of tracked modules' parameters, and the ids of what is kept.

        These are the ids of the modules themselves and of generators. The latter come with the
        names under which a checkpoint holds them.
        """
        objects = map(wrappers.unwrap, self._tracked.values())
        kept = addresses(objects, with_buffers=False)
        kept |= {id(part) for listed in self._listed.values() for _, part in listed}
        return dict.fromkeys(kept, "") | self._generators()

    def state(self) -> Changed | None:
        """Return the differences from the modules as built, or None if there are none.

        Tensors are copied to the CPU. At some of the saves (see `UnkeptValues.is_due`) the
        attributes that cannot be kept are checked as well.
        """
        copies: Copies = {}
        changed = {
            name: differences
            for name in self._tracked
            if (differences := self._changed(name, copies))
        }
        self._containers.refer(changed, self._watched)
        add_outer_modes(self._tracked, changed)
        for name, watched in self._watched.items():
            for watch in watched:
                for key, reason in watch.lost.items():
                    self.unkept.lose(joined(name, watch.path, key), reason)
        is_due = self.unkept.is_due()
        self._look_for_misfits(is_thorough=is_due)
        if is_due:
            odd = {
                joined(name, watch.path): (values, type(watch.part))
                for name, watched in self._watched.items()
                for watch in watched
                if (values := watch.odd_values())
            }
            held = self._kept() if odd else {}
            for where, (values, kind) in odd.items():
                self.unkept.look(where, values, held, kind)
        return changed or None

    def _changed(self, name: str, copies: Copies) -> dict[str, dict[str, dict[str, Any]]]:
        """Return the differences of one tracked object, by module path."""
        if (now := self._parts[name].now()) is not self._listed[name]:
            self._listed[name] = now
            known = {(watch.path, id(watch.part)): watch for watch in self._watched[name]}
            self._watched[name] = [
                known.get((path, id(part))) or WatchedPart(path, part, is_late=True)
                for path, part in now
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
                and (differs := watch.differences(built, copies))
            ):
                changed[watch.path] = differs
        return changed

    def _look_for_misfits(self, *, is_thorough: bool) -> None:
        """Find which tensors of each object a restart could not load, until there are some.

        Args:
            is_thorough: look at all parts, not only where a tensor is another object than before.
        """
        told = tuple(f"{path}." for path in self.replaced)
        for name, obj in self._tracked.items():
            if self.misfits.get(name):
                continue
            layout, changed = self._layouts.get(name, {}), []
            for path, part in _laid_out(obj, self._listed[name]):
                if path not in layout:
                    continue
                held = buffers.held_by(part)
                if is_thorough or held != self._tensors.get(id(part)):
                    changed.append((path, part))
                    self._tensors[id(part)] = held
            found = buffers.misfits(layout, changed)
            self.misfits[name] = {
                key: how for key, how in found.items() if not f"{name}.{key}".startswith(told)
            }

    def restore(self, changed: Changed) -> list[str]:
        """Set the changed attributes; return a message for each that keeps the program's value.

        An attribute is set only if its value as built is the same now as at the time of the save.
        """
        for name, of_parts in changed.items():
            for watch in self._watched.get(name, ()):
                watch.kept.update(of_parts.get(watch.path, ()))
        return restore_changed(self._tracked, self._built, changed, self._containers)

    def put_back(self, kept: Changed) -> None:
        """Set the attributes once more that were changed since they were restored from `kept`.

        An attribute that is not in `kept` gets its value as built, unless that is a tensor: of
        tensors as built there are only digests.
        """
        self._containers.begin_restore()
        set_back: Changed = {}
        for name, obj in self._tracked.items():
            now, then, modules = self._changed(name, {}), kept.get(name, {}), dict(parts(obj))
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
                        _set(self._containers, (name, path, key), modules[path], value, entry)
                        set_back.setdefault(name, {}).setdefault(path, {})[key] = entry
        self._containers.end_restore()
        set_outer_modes(self._tracked, set_back)


def _set(
    containers: Containers, at: tuple[str, str, str], part: Part, now: Any, kept: Mapping[str, Any]
) -> None:
    """Set one attribute; dicts and lists in it that were the same as built are filled.

    Args:
        containers: the dicts and lists in the attributes as built.
        at: object name, module path and attribute.
        part: the module or optimizer.
        now: the value.
        kept: the entry of a checkpoint.
    """
    held = current_value(part, at[2])
    value = containers.restored((*at, ()), now, kept, held)
    if (entry := containers.parted(held, now, kept)) is not None:
        set_value(part, at[2], value, entry, containers.tensors)


def _laid_out(obj: Any, listed: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Return the parts of an object that have a layout; of an optimizer it is itself."""
    inner = wrappers.unwrap(obj)
    return [("", inner)] if isinstance(inner, torch.optim.Optimizer) else listed


def _classes(watched: list[WatchedPart]) -> Classes:
    return {watch.path: class_of(watch.part) for watch in watched}
