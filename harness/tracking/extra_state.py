"""Save and restore the state that no tracked object's `state_dict` contains.

This extra state consists of:

* gradients in flight, changed attributes of modules, and the state of communication hooks;
* generators, which are tracked like any other object but have a different state on each rank;
* generators that tracked modules and optimizers hold;
* the generators before the head of the present epoch, if the head draws from them.

If a program has none of these, its checkpoints are the same as without this module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from harness.data.generator_objects import is_generator
from harness.distributed import data_ranks, ddp
from harness.distributed.ranks import World
from harness.errors import UsageError
from harness.state.buffers import PARAMETER_GROUP
from harness.state.checks import BEFORE_TRACK
from harness.tracking.attributes import Attributes, Changed
from harness.tracking.comm_hooks import Hooks, check_hooks
from harness.tracking.generators import Generators, HeadDraws
from harness.tracking.gradients import Gradients, Kept, digest
from harness.tracking.payload import ATTRIBUTES, HEAD, RankEntries, own_entry

ROUNDED = (
    "DDP with gradient_as_bucket_view and find_unused_parameters rounds the first gradients after a"
    " restart otherwise where zero_grad(set_to_none=False) lets them last: no exact resume on a"
    " number of ranks that is no power of two. Leave out one of the three"
)
# The key in a checkpoint: at the top level if all ranks have the same gradients, else in the entry
# of each rank.
GRADIENTS = "gradients"


class ExtraState:
    """The extra state of one rank.

    Args:
        world: the ranks of this attempt.
        own: the per-rank entries of a checkpoint, to which the parts of the extra state are added.
        step: returns the number of the current step.
        say: prints a message to the user.
    """

    def __init__(
        self, world: World, own: RankEntries, step: Callable[[], int], say: Callable[[str], None]
    ) -> None:
        self.world, self.own, self._step = world, own, step
        self._gradients, self._generators = Gradients(step), Generators()
        self._attributes = Attributes(self._generators.places)
        self._kept = _OwnGradients(self._gradients)
        self._changed = _OwnAttributes(self._attributes, say)
        self._hooks, self.head = Hooks(), HeadDraws(self._generators, world.rank)
        self._waits = False  # whether a due save waits for an update
        # The step in which the gradients were last examined, and whether any rank has some to keep.
        self._looked = (-1, False)
        self._is_resumed, self._say = False, say
        self._stateful = dict[str, Any]()
        for name, part in (
            (data_ranks.DATA_RANK, _OwnDataRank(world)),
            (GRADIENTS, self._kept),
            (ATTRIBUTES, self._changed),
            ("hooks", self._hooks),
            ("generators", self._generators),
            (HEAD, self.head),
        ):
            own.add(name, part)

    def track(self, objects: Mapping[str, Any], *, is_resumed: bool) -> dict[str, Any]:
        """Start to track the extra state of objects; return the objects with a `state_dict`.

        All objects but generators have one. DDP modules form their gradient buckets here.
        Collective: every rank must call it.

        Args:
            objects: the newly tracked objects, by name.
            is_resumed: whether the attempt resumes from a checkpoint.

        Raises:
            UsageError: if no resume could be exact (a sharded module, say, or a communication hook
                whose state cannot be saved), or if a name is in use by a generator.
        """
        stateful = {name: obj for name, obj in objects.items() if not is_generator(obj)}
        for name, obj in stateful.items():
            ddp.check_resumable(name, obj, self.world)
            self._hooks.known += check_hooks(name, obj, self.world)
        self._stateful |= stateful
        if notice := data_ranks.deal(self.world, self._stateful):
            self._say(f"harness: {notice}")
        if taken := [name for name in objects if name in self._generators.tracked]:
            raise UsageError(
                f"two objects are tracked as {taken[0]!r}",
                remedy="Give each one a name of its own.",
            )
        self._generators.tracked |= {
            name: obj for name, obj in objects.items() if is_generator(obj)
        }
        self._is_resumed = is_resumed
        self._attributes.note_layouts(stateful)
        if is_resumed:
            self._attributes.before_restore(stateful)
        for obj in stateful.values():
            ddp.fix_bucket_order(obj, self.world)
        return stateful

    @property
    def handled(self) -> set[int]:
        """Return the ids of the generators whose state is kept."""
        return self._generators.ids()

    def restored(self, tracked: Mapping[str, Any]) -> None:
        """Record the attributes of all tracked objects after a checkpoint was loaded into them."""
        self._attributes.after_restore(tracked)

    def begin(
        self, tracked: Mapping[str, Any], payload: Mapping[str, Any], of_data: Mapping[str, Any]
    ) -> list[str]:
        """Restore the extra state at the start of the loop, and track changes from then on.

        Args:
            tracked: the tracked objects, by name.
            payload: contents of the checkpoint at the resume point; {} for a new run.
            of_data: generators that are seeded for each sample of the data, by name.

        Returns:
            Warnings about state that could not be restored.

        Raises:
            UsageError: if the checkpoint holds state of a parameter, hook or generator that the
                program does not have, if a generator is of another kind, if the state of a hook
                cannot be saved, or if a hook was registered after `track`.
        """
        self._generators.begin(tracked, of_data)
        for part in (self._gradients, self._attributes, self._hooks):
            part.begin(tracked)
        notes = [note] if (note := self.own.restore(payload, self.world)) else []
        self._changed.restore(payload.get(ATTRIBUTES))
        self._gradients.restore(payload.get(GRADIENTS, {}))
        self._generators.note_begun()
        notes += [
            f"{name}: {ROUNDED}"
            for name, obj in tracked.items()
            if self._is_resumed and ddp.rounds_restored_gradients(obj, self.world)
        ]
        if self._is_resumed and (
            new := [
                name for name in self._generators.tracked if name not in self._generators.restored
            ]
        ):
            notes.append(
                f"the checkpoint does not hold the state of {', '.join(new)} for this rank: "
                "begins as it was made"
            )
        notes += [*self._changed.messages, *self._generators.messages]
        return [f"warning: {note}" for note in notes]

    def note_generators(self) -> None:
        """Have `put_back` set generators to their present states, and not to those at `begin`."""
        self._generators.note_begun()

    def put_back(self, payload: Mapping[str, Any]) -> None:
        """Restore once more what was changed since `begin`."""
        own = own_entry(payload, self.world)
        self._attributes.put_back(payload.get(ATTRIBUTES) or own.get(ATTRIBUTES) or {})
        self._gradients.put_back(payload.get(GRADIENTS) or own.get(GRADIENTS) or {})
        self._hooks.put_back(own.get("hooks"))
        self._generators.put_back()

    def is_idle(self, tracked: Mapping[str, Any]) -> bool:
        """Return whether there are optimizers, none with a step, and no gradient for any of them.

        Also False if a gradient scaler is tracked, which may leave out the first steps.
        """
        has_scaler = any(hasattr(obj, "get_scale") for obj in tracked.values())
        return not has_scaler and self._gradients.is_idle()

    def close(self) -> None:
        """Stop observing optimizers, at the end of the loop."""
        self._gradients.close()

    def may_save(self, is_due: bool, is_at_once: bool) -> bool:
        """Return whether to save at this step boundary.

        A save that is due, or was due earlier, waits as long as gradients are in flight that the
        next update will use (see `Gradients.look` for the limits).
        Collective: every rank must call it.

        Args:
            is_due: whether a save is due at this boundary.
            is_at_once: whether a save must not wait.
        """
        if not (is_due or self._waits):
            return False
        self._waits = self._look(may_wait=not is_at_once)
        if not self._waits:
            self._gradients.saves()
        return not self._waits

    def _look(self, *, may_wait: bool) -> bool:
        """Return whether the save should wait on any rank; note whether any rank has gradients.

        Collective: every rank must call it.
        """
        waits, has_some = self.world.agree(
            [int(flag) for flag in self._gradients.look(may_wait=may_wait)]
        )
        self._looked = self._step(), bool(has_some)
        return bool(waits)

    def hold(self) -> None:
        """Copy the gradients in flight for a save at this boundary, on disk or in memory.

        If all ranks have the same gradients, only the writer keeps its copy; otherwise each rank
        keeps its own. Collective: every rank must call it.
        """
        if self._looked[0] != self._step():
            self._look(may_wait=False)
        kept = self._gradients.kept() if self._looked[1] else {}
        # A digest of all gradients takes a second per gigabyte: a single rank needs none.
        self._kept.are_alike = (
            not self._looked[1]
            or self.world.size == 1
            or len(set(self.world.gather(digest(kept)))) == 1
        )
        self._kept.values = kept if not self._kept.are_alike or self.world.is_writer else {}

    def values(self) -> dict[str, Any]:
        """Return what a checkpoint holds of it at the top level, and forget it; for the writer."""
        kept, self._kept.values = self._kept.values, {}
        return {GRADIENTS: kept} if kept else {}


class _OwnDataRank:
    """The data rank of this rank, which is kept unless it is the rank itself."""

    def __init__(self, world: World) -> None:
        self._world = world

    def state(self) -> int | None:
        """Return the data rank; None if each rank trains on samples of its own."""
        is_own = self._world.data_ranks == tuple(range(self._world.size))
        return None if is_own else self._world.data_rank

    def restore(self, state: int | None) -> None:
        """Do nothing: the tracked modules set it."""


class _OwnGradients:
    """Gradients that differ from rank to rank, from backward passes without communication."""

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
    """Attributes that differ from rank to rank.

    If they are the same on all ranks, a checkpoint holds them once, at the top level.
    """

    def __init__(self, attributes: Attributes, say: Callable[[str], None]) -> None:
        self._attributes, self._say, self.messages = attributes, say, list[str]()
        self._replaced: set[str] = set()  # modules that were reported
        self._unfit: set[str] = set()  # objects whose tensors were reported

    def state(self) -> Changed | None:
        changed = self._attributes.state()
        for name in self._attributes.unkept.names:
            problem = "changes in training, and is not saved"
            self._say(
                f"harness: warning: {name} {problem}: "
                "if it is state, make it a plain value, a buffer or part of a state_dict"
            )
        for name in self._attributes.unkept.graphs:
            self._say(
                f"harness: warning: {name} is carried on to the next step, and is not saved: it "
                "has its graph. Detach it when it is stored, each tensor in an attribute of its "
                "own, or keep it in a buffer"
            )
        for name, reason in self._attributes.unkept.lost.items():
            self._say(
                f"harness: warning: {name} was saved until now and is not any more: it {reason}. "
                "A restart begins with the one as built: if it is state, keep less in it (the last "
                "items, a sum), or make it a buffer or part of a state_dict"
            )
        self._attributes.unkept.names.clear()
        self._attributes.unkept.graphs.clear()
        self._attributes.unkept.lost.clear()
        for path, problem in sorted(self._attributes.replaced.items()):
            if path not in self._replaced:
                self._replaced.add(path)
                self._say(
                    f"harness: warning: {path} {problem}, and a restart builds it as before: "
                    "let the program build it as it is now when it resumes, before run.track(…)"
                )
        for name, misfits in self._attributes.misfits.items():
            if misfits and name not in self._unfit:
                self._unfit.add(name)
                self._say(f"harness: warning: {_of_misfits(name, misfits)}")
        return changed

    def restore(self, state: Changed | None) -> None:
        self.messages += self._attributes.restore(state or {})


def _of_misfits(name: str, misfits: Mapping[str, str]) -> str:
    """Say which tensors of an object a restart could not load, and what it needs."""
    some = ", ".join(f"{key} {how}" for key, how in list(misfits.items())[:5])
    more = f", and {len(misfits) - 5} more" if len(misfits) > 5 else ""
    advice = f"let the program change it likewise when it resumes, {BEFORE_TRACK}"
    if not all(key.startswith(PARAMETER_GROUP) for key in misfits):
        advice += "; or register such a buffer in __init__, as None, and give it its value later"
    return (
        f"{name} does not have the tensors with which it was tracked: {some}{more}. A restart "
        f"that builds it as before is refused: {advice}"
    )
