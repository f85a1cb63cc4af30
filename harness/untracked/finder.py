"""Find untracked objects whose state would be lost at a restart, and name them by their paths.

Objects are searched for once, on the writer, before the first step. The search starts from the
variables of the program's frames and from the data that the loop iterates over, and follows
attributes and containers. It never follows what libraries keep globally. The objects found are
checked at the first step boundary; generators and arrays are checked again after steps 2, 4, 8 …,
and, where that is cheap, in the first step of an epoch and at a save:

* An optimizer is reported if it has made a step; a scheduler, if its optimizer has made one or is
  tracked.
* A generator is reported if it has been drawn from since, or if worker processes draw from it.
* A module (a teacher, a loss with a running centre), an object of the program's own classes (an
  average written by hand, a memory) or a tensor is reported if numbers in it have changed that no
  tracked object holds.
* A weight average, and any other object with a `state_dict`, is reported in any case.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any

from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import DataLoader, Sampler

import harness.untracked.array_changes as array_changes
from harness.distributed import wrappers
from harness.distributed.dtensors import holds_sharded, without_collectives
from harness.text import listed
from harness.untracked.candidates import (
    GENERATOR,
    NUMBERS,
    OPTIMIZER,
    SCALER,
    SCHEDULER,
    WITHIN_S,
    Candidate,
    LookTimes,
    Tracked,
    find_candidates,
    is_data,
    is_lost,
    is_of_evaluation,
    kind_of,
    walk,
)
from harness.untracked.foreign_optimizers import on_untracked_update
from harness.untracked.given_state import GivenState, are_searched
from harness.untracked.object_walk import MOST_OBJECTS, TimeLimit, plain_in
from harness.untracked.program_frames import of_source
from harness.untracked.program_roots import Roots, Sharing, of_torch, of_tracked
from harness.untracked.program_values import LOOK_S, ProgramValues, marks

OF_THE_RUN = ("harness.run", "harness.data", "harness.saving", "harness.distributed")


class UntrackedFinder:
    """A search for the program's untracked state; `names` collects the reported paths."""

    def __init__(
        self, names: list[str], say: Callable[[str], None], note: Callable[..., None]
    ) -> None:
        self.names = names
        # Ids of objects that are saved by other code, or seeded anew for each sample.
        self._handled: set[int] = set()
        self._say, self._note = say, note
        self._candidates: list[Candidate] = []
        self._stepped: dict[int, Any] = {}
        self._times = LookTimes()
        self._tracked: Mapping[str, Any] = {}
        # Updates of this step by optimizers that nobody tracks, and the ids of those named before.
        self._updates, self._named = list[tuple[Any, str]](), set[int]()
        self._unhook: Callable[[], None] = lambda: None
        self._unwatch: Callable[[], None] = lambda: None
        self._held = set[int]()
        self._given: GivenState | None = None
        # Ids of datasets that are not the loop's, and of what they hold.
        self._of_other_data = set[int]()
        self._source: Any = None
        self._roots, self._is_over = Roots(), False
        self._values, self._sharing = ProgramValues(), Sharing({})
        self._is_cut_reported, self._counters = False, 0
        self._saved: Any = None

    def begin(
        self, tracked: Mapping[str, Any], source: Any, handled: set[int]
    ) -> tuple[dict[str, tuple[Any, Any]], set[int]]:
        """Search for objects with state, before the first step.

        Return the holder of each value of the program and itself, by its path, and the addresses of
        tracked memory.

        Args:
            tracked: the tracked objects, by name.
            source: the source of the loop's steps.
            handled: ids of objects that are kept in other ways.
        """
        self._handled, self._source = handled, source
        self._tracked, frame = tracked, sys._getframe(1)
        self._times.begin()
        self._unhook = register_optimizer_step_pre_hook(
            lambda optimizer, *_: self._stepped.update({id(optimizer): optimizer})
        ).remove
        self._unwatch = on_untracked_update(
            tracked, lambda *update: self._updates.append(update), lambda: self._times.steps
        )
        with self._harmless():
            own = self._ask()
            others = {id(obj) for obj in tracked.values()} - own
            found = find_candidates(list(self._all_roots(frame)), others, source)
            self._candidates = [each for each in found if id(each.obj) not in own]
            enters = self._enters(self._kept())
            named = self._by_id(own)
            values = self._values.begin(self._all_roots(frame), enters, self._held, named)
            self._sharing = Sharing(tracked)
            self._given = None
            return values, self._held
        return {}, set()

    def made_by_head(self) -> tuple[dict[str, tuple[Any, Any]], set[int]]:
        """Search what the head of an epoch has made; return the same as `begin`."""
        found, frame = dict[str, tuple[Any, Any]](), sys._getframe(1)
        with self._harmless():
            if made := [] if self._is_over else list(self._roots.made(frame)):
                self._ask()
                marks(made, self._enters(self._kept()), self._held, found)
                self._given = None
        return found, self._held

    def _ask(self) -> set[int]:
        """Ask the program's own tracked objects for what they save; return their ids."""
        # A state_dict of a sharded model is a matter of all ranks, and only the writer searches.
        is_skipped = self._is_over or holds_sharded(self._tracked.values())
        own = {} if is_skipped else are_searched(self._tracked)
        self._given = GivenState(own)
        self._held = self._given.addresses | self._addresses(own)
        return {id(obj) for obj in own.values()}

    def _by_id(self, left_out: set[int]) -> dict[int, str]:
        """Return the names of the tracked objects by their ids and those of what they wrap."""
        return {
            key: name
            for name, obj in self._tracked.items()
            for key in (id(obj), id(wrappers.unwrap(obj)))
            if key not in left_out
        }

    @contextlib.contextmanager
    def _harmless(self) -> Iterator[None]:
        """Report an error of the program's objects inside the block, and end the search.

        Such an error must not make the run fail.
        """
        try:
            with without_collectives():
                yield
        except Exception as error:  # noqa: BLE001
            self._candidates, self._is_over = [], True
            self._say(
                "harness: warning: what is not tracked cannot be looked for in this program: "
                f"{type(error).__name__}: {error}"
            )
            self._note("not_looked", error=f"{type(error).__name__}: {error}")

    def at_boundary(self, saved: Any, epoch: int) -> None:
        """Check what was found, at the end of steps 1, 2, 4, 8 … of the attempt, and of some more.

        After the first check, only generators, arrays and values are checked again. `saved` is
        nested data that is saved: the program may hold parts of it in variables, too.
        """
        if self._times.at_boundary(epoch):
            self._unhook()
            self._check(saved, sys._getframe(1))
        if self._updates:
            self._tell_of_update()

    def at_save(self, saved: Any) -> None:
        """Check what was found, if that is cheap."""
        if self._times.at_save():
            self._check(saved, sys._getframe(1))

    def _check(self, saved: Any, frame: FrameType) -> None:
        self._saved, began_s = saved, time.thread_time()
        with self._harmless():
            self._look(frame)
        self._stepped = {}
        self._times.looked(time.thread_time() - began_s)

    def close(self) -> None:
        """Remove the hooks."""
        self._unhook(), self._unwatch()

    def _tell_of_update(self) -> None:
        """Report an update of this step by an optimizer that the search has not named, once."""
        problem = next((text for obj, text in self._updates if id(obj) not in self._named), None)
        self._updates.clear()
        if problem is not None:
            self._unwatch()
            self._say(
                f"harness: warning: an optimizer {problem}: its state is lost at a restart; "
                "name it in run.track(…)"
            )

    def _look(self, frame: FrameType) -> None:
        """Report candidates whose state would be lost, and values that the program carries on."""
        self._ask()
        kept, tracked = self._kept(), Tracked(self._tracked, self._held, self._given)
        if self._candidates:
            others = [each for each in self._candidates if id(each.obj) not in kept]
            lost = [each for each in others if is_lost(each, self._stepped, tracked)]
            self._tell(lost)
            again = [each for each in self._candidates if each.kind in (GENERATOR, NUMBERS)]
            self._candidates = [each for each in again if each not in lost]
        if not self._values.is_whole and not self._is_cut_reported:
            self._is_cut_reported = True
            self._say(
                "harness: warning: the program holds more objects than are searched for state that "
                f"is not tracked ({MOST_OBJECTS}, or as many as take {LOOK_S:g} s): some of it may "
                "be lost at a restart unnamed"
            )
        known = [name.rpartition(" (")[0] for name in self.names]
        enters = self._enters(kept)
        roots, spared, is_carried = self._all_roots(frame), self._is_spared, self._roots.is_carried
        carried = self._values.changed(roots, enters, self._held, known, spared, is_carried)
        self._given = None
        self._tell_of_counters()
        if carried := [*carried, *self._sharing.changed()]:
            anew = "what the program carries from step to step begins anew after a restart"
            self._say(
                f"harness: {anew}: {listed(carried)}. What training depends on belongs in "
                "run.state."
            )
            self._note("carried", names=carried)

    def _tell_of_counters(self) -> None:
        """Report what loops count beside the batches, once."""
        if names := [*self._roots.counted_anew][self._counters :]:
            self._counters += len(names)
            beside = "what a loop counts or reads beside the batches begins anew after a restart"
            self._say(f"harness: {beside}: {listed(names)}. run.enumerate(batches) counts on.")
            self._note("carried", names=names)

    def _all_roots(self, frame: FrameType) -> Iterator[tuple[str, Any]]:
        if not self._is_over:
            yield from self._roots.of_program(frame, self._times.epoch)
            yield from of_source(self._source)
            yield from of_tracked(self._tracked)
            yield from of_torch()

    def _enters(self, kept: set[int]) -> Callable[[Any, Any], bool]:
        """Return a function that tells whether to search a value of the program."""
        dataset = getattr(self._source, "dataset", None)
        is_stream = dataset is not None and not hasattr(self._source, "plan")
        others = self._of_other_data = set[int]()

        def enters(holder: Any, value: Any) -> bool:
            if (
                id(value) in kept
                or (is_stream and value is dataset)
                or isinstance(value, Sampler)
                or str(type(value).__module__).startswith(OF_THE_RUN)
                or (id(holder) in others and not is_data(value))
            ):
                return False
            is_other = is_of_evaluation(holder, value, self._source)
            if id(holder) in others or is_other:
                others.add(id(value))
            return not (is_other and isinstance(value, DataLoader))

        return enters

    def _kept(self) -> set[int]:
        """Return the ids of tracked objects, of their contents, and of objects kept otherwise.

        The optimizer of a scheduler or gradient scaler is not regarded as held by it. Of the
        program's own objects, only what their `state_dict` gives is kept; their optimizers are
        looked after by `foreign_optimizers`.
        """
        own = are_searched(self._tracked)
        kept, limit = set(self._handled), TimeLimit(WITHIN_S)
        others = [obj for name, obj in self._tracked.items() if name not in own]
        roots = [("", wrappers.unwrap(obj)) for obj in others]
        roots.append(("", self._saved))
        kept |= {id(obj) for obj in others}
        for _, obj, _ in walk(
            roots,
            limit,
            lambda holder, name, _: (
                not (name == ".optimizer" and kind_of(holder) in (SCHEDULER, SCALER))
                and not (name.startswith("._optimizer") and kind_of(holder) == OPTIMIZER)  # hooks
            ),
        ):
            kept.add(id(obj))
        return kept | (self._given.search(kept) if self._given is not None else set())

    def _is_spared(self, path: str, holder: Any, value: Any, was_empty: bool) -> bool:
        """Return whether a change is no loss.

        A cache of other data is filled, it is saved, or it is a variable of another call.
        """
        is_given = self._given is not None and self._given.keeps(holder, value)
        is_cache = was_empty and id(holder) in self._of_other_data
        is_saved = type(value) is float and any(value is item for item in plain_in(self._saved))
        is_anew = self._roots.is_anew(path, is_variable=holder is None)
        return is_given or is_cache or is_saved or is_anew

    def _addresses(self, left_out: Mapping[str, Any]) -> set[int]:
        """Return the addresses of the arrays of tracked objects, but for those with some names."""
        objects = [
            wrappers.unwrap(obj) for name, obj in self._tracked.items() if name not in left_out
        ]
        return array_changes.addresses(objects) | {
            mark.address
            for obj in objects
            if not isinstance(obj, nn.Module)
            for mark in array_changes.of(obj).arrays.values()
        }

    def _tell(self, candidates: list[Candidate]) -> None:
        """Report candidates to the user, with their paths and classes."""
        names = [f"{candidate.path} ({type(candidate.obj).__name__})" for candidate in candidates]
        if names:
            self.names += names
            self._named |= {id(candidate.obj) for candidate in candidates}
            self._note("untracked", names=names)
            self._say(
                f"harness: warning: not tracked, so lost at a restart: {listed(names)}. "
                "Name it in run.track(…), and keep tensors and arrays in run.state; "
                "of a generator: draw from the global ones, which are saved. What each step fills "
                "anew is not lost."
            )
