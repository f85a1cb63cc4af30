"""What a run keeps that no tracked object's `state_dict` tells: gradients under way, changed attributes of modules, communication hooks.

And generators, which are tracked as any object is, but are another one on each rank; or are attributes of tracked modules and optimizers,
whose `state_dict` does not tell of them. Where there is none of it, a checkpoint is as it would be without this.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from harness.data.generator_objects import GLOBAL_GENERATORS, generator_state, generators_of, is_generator, set_generator_state
from harness.distributed import ddp
from harness.distributed.ranks import World
from harness.errors import UsageError
from harness.tracking.attributes import Attributes, Changed, parts
from harness.tracking.comm_hooks import Hooks, check_hooks
from harness.tracking.gradients import Gradients, Kept, digest
from harness.tracking.rank_entries import ATTRIBUTES, RankEntries
from harness.tracking.sameness import is_same

GRADIENTS = "gradients"  # at the top level of a checkpoint if all ranks have the same, else each rank's own


class ExtraState:
    """All of it, as seen from one rank."""

    def __init__(self, world: World, own: RankEntries, step: Callable[[], int], say: Callable[[str], None]) -> None:
        self.world, self.own, self._step = world, own, step
        self._gradients, self._attributes = Gradients(step), Attributes()
        self._kept = _OwnGradients(self._gradients)
        self._changed = _OwnAttributes(self._attributes, say)
        self._hooks, self._generators = Hooks(), _Generators()
        self._waits = False  # whether a save waits
        self._looked = -1, False  # in which step gradients were last looked at, and if there are any
        self._is_resumed = False
        for name, part in ((GRADIENTS, self._kept), (ATTRIBUTES, self._changed), ("hooks", self._hooks), ("generators", self._generators)):
            own.add(name, part)

    def track(self, objects: Mapping[str, Any], *, is_resumed: bool) -> dict[str, Any]:
        """Look at these, which are tracked, from now on; returns those that have a `state_dict`. Raises UsageError. Collective:
        every rank must call it."""
        stateful = {name: thing for name, thing in objects.items() if not is_generator(thing)}
        for name, thing in stateful.items():
            ddp.check_resumable(name, thing, self.world)
            self._hooks.known += check_hooks(name, thing, self.world)
        if taken := [name for name in objects if name in self._generators.things]:
            raise UsageError(f"two objects are tracked as {taken[0]!r}", remedy="Give each one a name of its own.")
        self._generators.things |= {name: thing for name, thing in objects.items() if is_generator(thing)}
        self._is_resumed = is_resumed
        if is_resumed:
            self._attributes.before_restore(stateful)
        for thing in stateful.values():
            ddp.settle_buckets(thing, self.world)
        return stateful

    @property
    def handled(self) -> set[int]:
        """The generators that are kept, by identity."""
        return {id(thing) for thing in self._generators.all.values()}

    def restored(self, tracked: Mapping[str, Any]) -> None:
        """All of these have their state back."""
        self._attributes.after_restore(tracked)

    def begin(self, tracked: Mapping[str, Any], payload: Mapping[str, Any]) -> list[str]:
        """The loop begins: put back what was kept; returns in words what is not as it was. Raises UsageError."""
        for part in (self._gradients, self._attributes, self._hooks, self._generators):
            part.begin(tracked)
        notes = [note] if (note := self.own.restore(payload, self.world)) else []
        self._changed.restore(payload.get(ATTRIBUTES))
        self._gradients.restore(payload.get(GRADIENTS, {}))
        if self._is_resumed and (new := [name for name in self._generators.things if name not in self._generators.restored]):
            notes.append(f"the checkpoint does not hold the state of {', '.join(new)} for this rank: begins as it was made")
        return [f"warning: {note}" for note in (*notes, *self._changed.said)]

    def close(self) -> None:
        """The loop is over."""
        self._gradients.close()

    def is_time(self, is_due: bool, is_at_once: bool) -> bool:
        """Whether to save at this boundary: a save is due, or was, and no gradients are under way that an update will use; or it is to be
        made at once. Collective: every rank must call it."""
        if not (is_due or self._waits):
            return False
        self._waits = self._look(may_wait=not is_at_once)
        return not self._waits

    def _look(self, *, may_wait: bool) -> bool:
        waits, has_some = self.world.agree([int(found) for found in self._gradients.look(may_wait=may_wait)])
        self._looked = self._step(), bool(has_some)
        return bool(waits)

    def hold(self) -> None:
        """A save is made at this boundary: take what gradients are under way. Collective: every rank must call it."""
        if self._looked[0] != self._step():
            self._look(may_wait=False)
        self._waits, kept = False, self._gradients.kept() if self._looked[1] else {}
        self._kept.are_alike = not self._looked[1] or len(set(self.world.gather(digest(kept)))) == 1
        self._kept.values = kept if not self._kept.are_alike or self.world.is_writer else {}
        self._gradients.saved()

    def values(self) -> dict[str, Any]:
        """What a checkpoint holds of it at the top level; for the writer."""
        kept, self._kept.values = self._kept.values, {}
        return {GRADIENTS: kept} if kept else {}


class _OwnGradients:
    """Gradients that are others on each rank: of backward passes without communication."""

    def __init__(self, gradients: Gradients) -> None:
        self._gradients, self.values, self.are_alike = gradients, Kept(), True

    def state(self) -> Kept | None:
        if self.are_alike:
            return None
        kept, self.values = self.values, {}
        return kept or None

    def restore(self, state: Kept | None) -> None:
        self._gradients.restore(state or {})


class _OwnAttributes:
    """Attributes that are others on each rank; where all have the same, they lie at the top level."""

    def __init__(self, attributes: Attributes, say: Callable[[str], None]) -> None:
        self._attributes, self._say, self.said = attributes, say, list[str]()

    def state(self) -> Changed | None:
        changed = self._attributes.state()
        for name in self._attributes.unkept.names:
            what = "changes in training, and is not saved"
            self._say(f"harness: warning: {name} {what}: if it is state, make it a plain value, a buffer or part of a state_dict")
        self._attributes.unkept.names.clear()
        return changed

    def restore(self, state: Changed | None) -> None:
        self.said += self._attributes.restore(state or {})


class _Generators:
    """The generators that are tracked, and those that tracked modules and optimizers have as attributes, by name."""

    def __init__(self) -> None:
        self.things: dict[str, Any] = {}
        self.restored: set[str] = set()
        self._held: dict[str, Any] = {}
        self._built: dict[str, Any] = {}  # the state of each that is held, as the loop found it: only another one is kept

    @property
    def all(self) -> dict[str, Any]:
        return self._held | self.things

    def begin(self, tracked: Mapping[str, Any]) -> None:
        """Find those that are held."""
        known = {id(thing) for thing in (*self.things.values(), *GLOBAL_GENERATORS)}
        for name, thing in tracked.items():
            for path, part in parts(thing):
                for key, value in generators_of(part):
                    if id(value) not in known:
                        known.add(id(value))
                        self._held[".".join(filter(None, (name, path, key)))] = value
        self._built = {name: generator_state(thing) for name, thing in self._held.items()}

    def state(self) -> dict[str, Any] | None:
        found = {name: generator_state(thing) for name, thing in self.all.items()}
        return {name: state for name, state in found.items() if name in self.things or not is_same(state, self._built[name])} or None

    def restore(self, state: Mapping[str, Any] | None) -> None:
        if missing := [name for name in state or {} if name not in self.all]:
            raise UsageError(
                f"the checkpoint holds what is not tracked: {', '.join(missing)}", f"found: {', '.join(self.all) or 'no generator'}",
                "Track the same names as before, or take a new run directory.",
            )  # fmt: skip
        for name, kept in (state or {}).items():
            set_generator_state(name, self.all[name], kept)
            self.restored.add(name)
