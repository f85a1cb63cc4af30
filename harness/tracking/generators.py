"""Save and restore generators: tracked ones, and those that tracked objects and the data hold.

A generator may lie in an attribute, or in containers, functions and objects of the program's own
that the module holds, and in modules there that are no children of it. The search is repeated at
each save, because some are made when they are first drawn from. Such a one is made again when its
state is restored, in the same place, so that the program finds it there and does not make another.
"""

from __future__ import annotations

import argparse
import ast
import collections
import functools
import types
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, Sampler

from harness.data.generator_objects import (
    GLOBAL_GENERATORS,
    generator_of,
    generator_state,
    is_generator,
    set_generator_state,
)
from harness.data.held_generators import tells_its_class
from harness.errors import UsageError
from harness.state import restore_rng_state, rng_state
from harness.state.kinds import PLAIN
from harness.state.plain_values import is_same
from harness.tracking.attribute_values import joined
from harness.tracking.watched_part import PartList
from harness.untracked.object_walk import FEW, OF_MODULES, OF_OPTIMIZERS
from harness.untracked.object_walk import parts as inside
from harness.untracked.program_frames import is_programs_file
from harness.untracked.unkept_values import is_of_program

DEPTH, MOST_ITEMS = 5, 10_000  # limits of the search in one module
CONTAINERS = (
    dict,
    list,
    tuple,
    collections.OrderedDict,
    collections.defaultdict,
    collections.deque,
)
SEARCHED = (
    *CONTAINERS,
    functools.partial,
    types.MethodType,
    types.SimpleNamespace,
    argparse.Namespace,
)
# Generators in data are seeded for each sample, or saved with its order.
ELSEWHERE = (Optimizer, Dataset, Sampler, DataLoader)
HOLDS_NOTHING = frozenset(PLAIN)
NOT_HELD = (
    "the loop over epochs draws random numbers before its inner loop, and the checkpoint does not"
    " hold the generators as they were then: what it draws for the rest of this epoch differs from"
    " what it drew"
)
GLOBAL = ""  # the name of the global generators among those of `HeadDraws`


class Generators:
    """Tracked generators, and those that tracked modules and optimizers hold, by name."""

    def __init__(self) -> None:
        self.tracked: dict[str, Any] = {}
        self.restored: set[str] = set()
        self._of_data: Mapping[str, Any] = {}
        self.messages: list[str] = []  # about what could not be restored
        self._parts: dict[str, PartList] = {}  # of each tracked object
        self._held: dict[str, Any] = {}
        # The state of each held generator at the start of the loop; only a changed state is kept.
        self._built: dict[str, Any] = {}
        self._begun: list[tuple[str, Any, Any]] = []  # each generator, and its state, as restored

    def ids(self) -> set[int]:
        """Search again, and return the ids of the generators whose state is kept."""
        return set(self.places())

    def places(self) -> dict[int, str]:
        """Search again, and return the names of the generators whose state is kept, by id."""
        self._find()
        shared = {id(obj): f"generator {at}" for at, obj in enumerate(GLOBAL_GENERATORS)}
        return shared | {id(obj): name for name, obj in self._all.items()}

    @property
    def _all(self) -> dict[str, Any]:
        return self._held | self.tracked

    def begin(self, tracked: Mapping[str, Any], of_data: Mapping[str, Any]) -> None:
        """Find the generators that tracked objects hold, and record their state.

        Those of the loop's data are held, too: the program may draw from them beside the samples.
        """
        self._of_data = of_data
        self._parts = {name: PartList(obj) for name, obj in tracked.items()}
        self._find()
        self._built = {name: generator_state(obj) for name, obj in self._held.items()}

    def _find(self) -> dict[str, Any]:
        """Search all modules and optimizers; return what was searched inside them, by path."""
        holders = dict[str, Any]()
        known = {id(obj) for obj in (*self.tracked.values(), *GLOBAL_GENERATORS)}
        self._held = {name: obj for name, obj in self._of_data.items() if id(obj) not in known}
        known |= {id(obj) for obj in self._held.values()}
        listed = {name: of_object.now() for name, of_object in self._parts.items()}
        seen = {id(of_object.obj) for of_object in self._parts.values()}
        seen |= {id(part) for parts in listed.values() for _, part in parts}
        for name, parts in listed.items():
            for path, part in parts:
                if _holds_none(part):
                    continue  # most modules: this runs at each save
                for place, value in _search(joined(name, path), _own(part), seen, holders):
                    if id(value) not in known and place not in self._held:
                        known.add(id(value))
                        self._held[place] = value
        return holders

    def note_begun(self) -> None:
        """Record the state of each generator, for `put_back`."""
        self._begun = self._present()

    def present(self) -> list[tuple[str, Any, Any]]:
        """Search again, and return the name and the state of each generator, and itself."""
        self._find()
        return self._present()

    def _present(self) -> list[tuple[str, Any, Any]]:
        return [(name, obj, generator_state(obj)) for name, obj in self._all.items()]

    def put_back(self) -> None:
        """Set each generator to the state in which the loop began."""
        for begun in self._begun:
            set_generator_state(*begun)

    def state(self) -> dict[str, Any] | None:
        """Return the states of tracked generators, and of held ones that have changed or are new.

        See `payload.Part`.
        """
        self._find()
        states = {name: generator_state(generator) for name, generator in self._all.items()}
        return {
            name: state
            for name, state in states.items()
            if name in self.tracked
            or name not in self._built
            or not is_same(state, self._built[name])
        } or None

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Restore the state of each generator; make those that a module does not hold yet.

        Raises:
            UsageError: if a tracked generator is missing, or if one is of another kind.
        """
        inside_parts = self._find()
        holders = {
            joined(name, path): part
            for name, of_object in self._parts.items()
            for path, part in of_object.now()
        } | inside_parts
        missing = [name for name in state or {} if name not in self._all]
        if named := [name for name in missing if "." not in name]:
            raise UsageError(
                f"the checkpoint holds what is not tracked: {', '.join(named)}",
                f"found: {', '.join(self._all) or 'no generator'}",
                "Track the same names as before, or take a new run directory.",
            )
        for name, kept in (state or {}).items():
            generator = self._all.get(name) or _made(name, kept, holders)
            if generator is None:
                self.messages.append(
                    f"the generator {name} is not there when training begins, so its state is "
                    "lost: let its module make it, and what holds it, in __init__"
                )
            else:
                set_generator_state(name, generator, kept)
                self.restored.add(name)


class HeadDraws:
    """The generators before the head of an epoch, in a loop over epochs, if the head draws.

    A resume inside the epoch executes the head again, from these states. A checkpoint holds them
    beside those of its own step.
    """

    def __init__(self, generators: Generators, rank: int) -> None:
        self._generators, self._rank = generators, rank
        self._before, self._is_again = list[tuple[str, Any, Any]](), False
        self._kept: dict[str, Any] | None = None
        self._restored: Mapping[str, Any] | None = None

    def begins(self, *, is_again: bool) -> None:
        """Record the states before the head; restore the recorded ones if it is executed again."""
        restored, self._restored = (self._restored or {}) if is_again else {}, None
        self._is_again, self._kept = is_again and not restored, None
        for name, obj, _ in self._present() if restored else ():
            if name in restored and obj is None:
                restore_rng_state(restored[name], self._rank)
            elif name in restored:
                set_generator_state(name, obj, restored[name])
        self._before = self._present()

    def _present(self) -> list[tuple[str, Any, Any]]:
        return [(GLOBAL, None, rng_state(self._rank)), *self._generators.present()]

    def over(self) -> str:
        """Compare the states with those before the head, and keep those that it has changed.

        Returns:
            A warning if the head was executed again and has drawn from unknown states, else "".
        """
        self._kept = {
            name: before
            for name, obj, before in self._before
            if not is_same(before, rng_state(self._rank) if obj is None else generator_state(obj))
        } or None
        return NOT_HELD if self._is_again and self._kept is not None else ""

    def state(self) -> dict[str, Any] | None:
        """Return the states before the head; see `payload.Part`."""
        return self._kept

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Keep the states until the head is executed again."""
        self._restored = state


def _is_searched(value: Any) -> bool:
    if type(value) is types.FunctionType:
        return is_programs_file(value.__code__.co_filename)
    return type(value) in SEARCHED or (
        tells_its_class(value)
        and (is_of_program(value) or isinstance(value, nn.Module))
        and not isinstance(value, ELSEWHERE)
    )


def _search(
    path: str, own: list[tuple[str, Any]], seen: set[int], holders: dict[str, Any]
) -> Iterator[tuple[str, Any]]:
    """Yield the generators among the attributes of a module and inside them, each with its path.

    Args:
        path: the path of the module.
        own: its attributes (see `_own`).
        seen: ids of objects that are not searched; those that are searched now are added.
        holders: what is searched, by path, to which the objects inside the module are added.
    """
    items = own
    waiting = collections.deque[tuple[str, Any, int]]()
    last = collections.deque[tuple[str, Any, int]]()  # large containers
    depth = count = 0
    while True:
        count += len(items)
        for name, value in items:
            if type(value) in HOLDS_NOTHING:
                continue
            if is_generator(value):
                yield path + name, value
            elif depth < DEPTH and id(value) not in seen and _is_searched(value):
                seen.add(id(value))
                is_large = type(value) in CONTAINERS and len(value) > FEW
                (last if is_large else waiting).append((path + name, value, depth + 1))
        if not (waiting or last) or count >= MOST_ITEMS:
            return
        path, holder, depth = (waiting or last).popleft()
        holders[path] = holder
        try:
            items = _of_hidden(holder) if isinstance(holder, nn.Module) else list(inside(holder))
        except Exception:  # noqa: BLE001 - a class of the program may raise
            items = []


def _of_hidden(module: nn.Module) -> list[tuple[str, Any]]:
    """List what may hold a generator in a module that lies in a list, say, and is no child."""
    return _own(module) + [(f".{name}", child) for name, child in module._modules.items()]


def _holds_none(part: Any) -> bool:
    """Return True if `_own` lists nothing, or tuples of plain values only."""
    left_out, own = OF_MODULES if isinstance(part, nn.Module) else OF_OPTIMIZERS, vars(part)
    for key in own.keys() - left_out:
        value = own[key]
        # The shape of a LayerNorm, say.
        is_plain = type(value) is tuple and HOLDS_NOTHING.issuperset(map(type, value))
        if not (type(value) in HOLDS_NOTHING or is_plain):
            return False
    return True


def _own(part: Any) -> list[tuple[str, Any]]:
    """List the attributes of a module or optimizer that may hold a generator.

    Left out are those that torch's own have, and plain values.
    """
    left_out = OF_MODULES if isinstance(part, nn.Module) else OF_OPTIMIZERS
    return [
        (f".{key}", value)
        for key, value in list(vars(part).items())
        if type(value) not in HOLDS_NOTHING and key not in left_out
    ]


def _made(name: str, kept: Mapping[str, Any], holders: Mapping[str, Any]) -> Any:
    """Make a generator and put it into its place; None if there is no such place."""
    path, _, key = name.rpartition("[" if name.endswith("]") else ".")
    holder, generator = holders.get(path), generator_of(kept)
    if holder is None or generator is None:
        return None
    if not name.endswith("]"):
        if getattr(holder, "__dict__", {}).get(key) is not None:
            return None
        try:
            setattr(holder, key, generator)
        except AttributeError:
            return None
        return generator
    try:
        at = ast.literal_eval(key.removesuffix("]"))
    except (ValueError, SyntaxError):  # another object than a string or a number
        return None
    if isinstance(holder, dict) and holder.get(at) is None:
        holder[at] = generator
    elif isinstance(holder, list) and at == len(holder):
        holder.append(generator)
    else:
        return None
    return generator
