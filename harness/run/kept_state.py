"""The state of the program that a checkpoint holds beside the position in the data.

State that is found in the program but cannot be saved is reported.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import harness.selfcheck.resume_checks as resume_checks
from harness import state
from harness.arguments import Settings
from harness.checkpoint.resume import ResumePoint
from harness.config.changes import check_changes
from harness.data import held_generators
from harness.data.source import Source
from harness.distributed.ranks import World
from harness.errors import UsageError
from harness.run.build_work import AHEAD, TOO_LATE, not_of_the_run
from harness.run.protocols import StepCounter
from harness.selfcheck.data_checks import check_same_data
from harness.selfcheck.epoch_values import EpochValues
from harness.selfcheck.start_values import StartValues
from harness.state import Captured
from harness.state.kinds import PLAIN
from harness.state.plain_values import is_same
from harness.tracking.extra_state import ExtraState
from harness.tracking.own_values import give_own, renewed
from harness.tracking.payload import Given, RankEntries, captured
from harness.tracking.rank_differences import RankDifferences
from harness.tracking.tensor_leaves import has_changed
from harness.tracking.user_state import UserState
from harness.untracked.finder import UntrackedFinder
from harness.untracked.stray_loaders import StrayLoaders


class KeptState:
    """The state of the program that a run saves, as seen from one rank.

    Args:
        world: The ranks of this attempt.
        settings: Validated arguments of `harness.init`.
        resume_point: The resume point; the settings that objects begin with are noted in it.
        counter: The number of the step that is being made.
        say: Prints a line on the writer.
        note: Adds an event to the event log.
        suspects: Possible causes of a difference between recomputed steps; more are added.
    """

    def __init__(
        self,
        world: World,
        settings: Settings,
        resume_point: ResumePoint,
        counter: StepCounter,
        say: Callable[[str], None],
        note: Callable[..., None],
        suspects: list[str],
    ) -> None:
        own = RankEntries()
        self._world, self._settings, self._origin = world, settings, resume_point.manifest
        self._built_before, self._begun = resume_point.built_before, resume_point.built
        self._counter, self._say = counter, say
        self._thread = threading.get_ident()
        self._awaits_update = False  # whether the first step of a loop over data is still to come
        # The plain attributes of the dataset when an epoch was yielded after its first batch.
        self._before_head: dict[str, Any] | None = None
        self._dataset, self._is_told, self._is_begun = None, False, False
        self._values, self._built = UserState(), dict[str, Any]()
        self._more = ExtraState(world, own, lambda: counter.step, say)
        self._by_rank = RankDifferences(world, own, say, note)
        self._untracked, self._strays = UntrackedFinder(suspects, say, note), StrayLoaders()
        self._at_start = StartValues(resume_point.catalog, self._origin, say, note)
        self._of_epoch = EpochValues(say, note)

    def check_config(self, payload: Mapping[str, Any]) -> None:
        """Check the config against the checkpoint's; print what has changed.

        Raises:
            UsageError: A change would alter the training and is not accepted.
        """
        own = self._settings
        for change in check_changes(payload["config"], own.config, own.accept, own.override):
            self._say(f"harness: setting changed: {change}")

    def restored_values(self, payload: dict[str, Any]) -> dict[str, Any]:
        """Select this rank's values in the payload, in place, and return a copy of `run.state`."""
        own = give_own(payload, self._world)
        return state.copied(state.rebuilt(own, "state"))  # type: ignore[no-any-return]

    def track(
        self,
        tracked: dict[str, Any],
        objects: Mapping[str, Any],
        payload: Mapping[str, Any] | None,
        *,
        is_late: bool,
    ) -> list[str]:
        """Add objects to the tracked ones, restore the state of all of them, and return messages.

        Collective: every rank must call it.

        Args:
            tracked: The tracked objects by name; the new ones that have a `state_dict` are added.
            objects: The new objects, by name.
            payload: Contents of the checkpoint at the resume point, or None.
            is_late: True if training has begun.

        Returns:
            Warnings and notices to print.

        Raises:
            UsageError: An object cannot be tracked, or the checkpoint does not fit the objects.
        """
        for name, obj in objects.items():
            resume_checks.check_trackable(name, obj, tracked, is_late=is_late)
        stateful = self._more.track(objects, is_resumed=payload is not None)
        tracked |= stateful
        messages = resume_checks.give_back(
            tracked,
            stateful,
            self._built,
            self._origin,
            payload,
            self._settings,
            self._built_before,
        )
        anew = {name: state.digest_of_built(self._built[name]) for name in stateful}
        has_own = payload is None or self._settings.override
        self._begun.update(anew if has_own else self._built_before)
        if payload is not None:
            self._more.restored(tracked)
        return messages

    def check(
        self, tracked: Mapping[str, Any], payload: Mapping[str, Any], data: Mapping[str, Any]
    ) -> list[str]:
        """Refuse a run that could not resume exactly, and return warnings.

        For the arguments and further errors see `resume_checks.check` and `check_same_data`.

        Collective: every rank must call it.

        Raises:
            UsageError: The loop runs in another thread than `harness.init`.
        """
        if threading.get_ident() != self._thread:
            raise UsageError(
                "the first batch is requested in another thread than the one of harness.init",
                f"found: the thread {threading.current_thread().name!r}, which loads batches ahead "
                "of their use; a checkpoint would count batches that were not trained on",
                "Loop over run.batches(…) in the thread that trains; num_workers loads ahead.",
            )
        check_same_data(self._world, data, self._settings.accept)
        return resume_checks.check(tracked, payload, data, self._settings.accept)

    def begin(
        self, tracked: Mapping[str, Any], payload: Mapping[str, Any], source: Source
    ) -> list[str]:
        """Restore the generators and all state outside of `state_dict`s, and return messages.

        The search for untracked state begins here, too. The loop calls this once, before the first
        step.

        Raises:
            UsageError: The checkpoint holds a generator, gradient or communication hook that the
                program does not have, or a hook was registered after `track`; or the data is an
                iterable dataset and the number of ranks has changed.
        """
        messages = resume_checks.restore_generators(
            payload, self._world, source, self._settings.seed, self._counter.step
        )
        self._by_rank.begin(tracked)
        of_data, saved = held_generators.of_source(source)
        messages += self._more.begin(tracked, payload, of_data)
        self._awaits_update, self._is_begun = not source.is_own, True
        self._dataset = getattr(getattr(source, "main", source), "dataset", None)
        if self._world.is_writer:
            handled = self._more.handled | saved
            self._at_start.begin(*self._untracked.begin(tracked, source, handled))
        return messages

    def at_head(
        self,
        tracked: Mapping[str, Any],
        values: dict[str, Any],
        payload: dict[str, Any] | None,
        is_ahead: bool,
    ) -> dict[str, Any] | None:
        """Set the generators for the head of an epoch; return the checkpoint for `put_back`.

        An iterator of the program's around that of `batches` makes a batch before the head of the
        epoch runs. What it draws and changes belongs to the step, what the head does is put back.

        Args:
            tracked: The tracked objects, by name.
            values: `run.state`.
            payload: Contents of the checkpoint at the resume point; None if nothing is put back.
            is_ahead: Whether the first batch of the epoch was made already.

        Returns:
            The checkpoint, with what has changed since `begin` if the batch was made already.

        Raises:
            UsageError: The batch is not one of the run's: `begin` was not called.
        """
        if is_ahead:
            if not self._is_begun:
                raise not_of_the_run("found: an iterator that yielded a batch that is not theirs")
            self._before_head = _plain_attributes(self._dataset)
            payload = payload and self._renewed(tracked, values, payload)
        self._more.head.begins(is_again=payload is not None)
        self._of_epoch.begins(payload)
        return payload

    def _renewed(
        self, tracked: Mapping[str, Any], values: dict[str, Any], payload: dict[str, Any]
    ) -> dict[str, Any]:
        """Return the checkpoint with what has changed since `begin`."""
        self._more.note_generators()
        is_other = any(has_changed(*item, payload) for item in tracked.items())
        live = state.capture(tracked) if is_other else {}
        return renewed(payload, live, values, self._world.rank)

    def head_over(self) -> None:
        """Keep what the head of an epoch has drawn from and made; warn of what cannot be kept."""
        if warning := self._more.head.over():
            self._say(f"harness: warning: {warning}")
        if self._world.is_writer:
            self._of_epoch.head_over(*self._untracked.made_by_head())
        before, self._before_head = self._before_head, None
        if before is None or self._is_told:
            return
        now = _plain_attributes(self._dataset)
        if names := [
            name for name in now if name not in before or not is_same(now[name], before[name])
        ]:
            self._is_told = True
            self._say(f"harness: warning: {TOO_LATE.format(names=', '.join(names))}")

    def put_back(
        self, tracked: Mapping[str, Any], values: dict[str, Any], payload: dict[str, Any]
    ) -> None:
        """Restore once more, in place, what was changed since `begin`.

        The iterator over the data is left where it is.

        Collective: every rank must call it.

        Args:
            tracked: The tracked objects, by name.
            values: `run.state`.
            payload: Contents of the checkpoint at the resume point.

        Raises:
            UsageError: The checkpoint does not fit an object any more.
        """
        world, settings = self._world, self._settings
        flags = world.agree([int(has_changed(*item, payload)) for item in tracked.items()])
        # What has changed on one rank is restored on all of them.
        changed = {name: tracked[name] for name, flag in zip(tracked, flags, strict=True) if flag}
        built, before = self._built, self._built_before
        resume_checks.put_back(tracked, changed, built, self._origin, payload, settings, before)
        self._more.put_back(payload)
        state.put_into(values, self.restored_values(payload))
        # Last: code of the program that runs above may draw.
        resume_checks.set_generators(payload, world, settings.seed, payload["step"])

    def at_boundary(
        self, tracked: Mapping[str, Any], values: Mapping[str, Any], epoch: int
    ) -> None:
        """Check `run.state` (`values`) and untracked state at the boundary of a step in `epoch`.

        Raises:
            UsageError: A value cannot be restored from a checkpoint.
        """
        if self._awaits_update and self._more.is_idle(tracked):
            self._say(f"harness: warning: {AHEAD}")
        self._awaits_update = False
        for warning in self._values.look(values):
            self._say(f"harness: warning: {warning}")
        self._untracked.at_boundary(values, epoch)
        if warning := self._strays.at_boundary(tracked):
            self._say(f"harness: warning: {warning}")

    def may_save(self, is_due: bool, cannot_wait: bool) -> bool:
        """Return whether to save now; a save that is due may wait for the next update.

        It waits if there are accumulated gradients that the next update will use, unless
        `cannot_wait`.
        """
        return self._more.may_save(is_due, cannot_wait)

    def of_ranks(
        self, tracked: Mapping[str, Any], values: Mapping[str, Any], iterator: Any
    ) -> Given:
        """Collect the state of each rank for a checkpoint: see `Given` for who has it then.

        Collective: every rank must call it.

        Args:
            tracked: The tracked objects, by name.
            values: `run.state`.
            iterator: State of this rank's iterator over the data, as plain data.
        """
        self._untracked.at_save(values)
        self._more.hold()
        return self._by_rank.of_ranks(tracked, values, iterator)

    def captured(
        self,
        of_ranks: Given,
        data: dict[str, Any],
        values: dict[str, Any],
        tracked: Mapping[str, Any],
    ) -> Captured:
        """Capture the contents of a checkpoint.

        Args:
            of_ranks: The state of each rank, from `of_ranks`.
            data: Description of the data and the position in it.
            values: Values at the top level of the checkpoint, as plain data.
            tracked: The tracked objects, by name.

        Raises:
            UsageError: State is not plain data.
            NonFiniteError: A parameter is not finite.
        """
        values = values | self._more.values() | self._of_epoch.values()
        return captured(of_ranks, data, values, tracked)

    def class_names(self, tracked: Mapping[str, Any]) -> dict[str, str]:
        """Return the class of each tracked object, for the manifest."""
        return {name: state.class_name(obj) for name, obj in tracked.items()}

    def close(self) -> None:
        """Release the hooks; the loop calls it at its end."""
        self._more.close()
        self._untracked.close()
        self._at_start.close()


def _plain_attributes(obj: Any) -> dict[str, Any]:
    """Return the attributes of an object that are plain values."""
    return {
        key: value for key, value in getattr(obj, "__dict__", {}).items() if type(value) in PLAIN
    }
