"""Claim an attempt, commit its checkpoints and prune old ones; for the writer (rank 0)."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from harness import config, state
from harness.arguments import Settings
from harness.checkpoint import format as fmt
from harness.checkpoint import memory_copy, resume, retention
from harness.checkpoint.attempts import Attempt
from harness.checkpoint.catalog import Catalog, going_on_from
from harness.checkpoint.commit import About, commit
from harness.distributed.ranks import World
from harness.errors import HarnessError, SaveError, StorageError, UsageError
from harness.monitoring.console import Console
from harness.monitoring.event_log import EventLog
from harness.monitoring.goodput import SAVE, Goodput
from harness.monitoring.kept_files import write_file
from harness.monitoring.resume_notice import resumed
from harness.monitoring.store_health import StoreHealth
from harness.monitoring.trackers import Trackers
from harness.saving.async_saver import AsyncSaver
from harness.saving.claim import claim
from harness.saving.locations import check_shared, hand_in
from harness.saving.memory_tier import MemoryTier
from harness.saving.rehearsal import Rehearsal
from harness.saving.save_job import Job
from harness.saving.save_policy import SavePolicy, kill_history
from harness.saving.uploader import END_S, Route, Uploader
from harness.selfcheck.environment import Environment, check
from harness.selfcheck.recomputed import RecomputedSteps
from harness.state import Captured
from harness.store import LocalStore, Sink, Store
from harness.supervision.exit_record import ExitRecord
from harness.supervision.machine_record import Difference

UPLOADED_THEN = "Start again: what is missing there is uploaded then."
LAST_S = 2.0  # the time before a kill that is reserved for the last records
SAVE_S = 30.0  # retry limit of one request of a save that training may have to wait for


class Checkpointer:
    """The checkpoints and records of one attempt.

    Everything that is written in an attempt goes through this class. Only the writer writes; the
    other ranks only keep track of the saved step.

    Args:
        stores: the stores of the run. Checkpoints are committed in the first one and copied to the
            second one, if there is one.
        world: the ranks of the attempt.
        resume_point: the resume point.
        settings: the validated settings of the run.
        exit_record: records how the attempt ends.
        store_health: the health of the remote store; also prints warnings.
        goodput: the goodput accounting.
        clock: returns the time in seconds, for the save policy.
    """

    def __init__(
        self,
        stores: tuple[Store, ...],
        world: World,
        resume_point: resume.ResumePoint,
        settings: Settings,
        exit_record: ExitRecord,
        store_health: StoreHealth,
        goodput: Goodput,
        clock: Callable[[], float],
    ) -> None:
        self.stores, self.world, self.settings = stores, world, settings
        self.store = stores[0]  # where a checkpoint is committed; a second store gets a copy
        self.origin = resume_point.manifest
        self.save_s = 0.0  # how long the last save took, in seconds
        self.saved_step: int | None = (
            resume_point.manifest.step
            if resume_point.manifest and not resume_point.in_memory
            else None
        )
        self.attempt: Attempt | None = None
        self.event_log: EventLog | None = None
        self._uploader: Uploader | None = None
        self._words = (
            "nothing saved yet" if self.saved_step is None else f"saved step {self.saved_step}"
        )
        self._resume_point, self._exit_record, self._store_health, self.goodput = (
            resume_point,
            exit_record,
            store_health,
            goodput,
        )
        self.timer = SavePolicy(settings.save_every_s, settings.when_busy, clock, self.note)
        self._committed, self._ended, self._origin_is_here = False, False, False
        self._verified = resume_point.read_from(0)
        overlapped, compare = settings.snapshot != "at_once", settings.snapshot == "checked"
        self.background = AsyncSaver(
            overlapped=overlapped, compare=compare, waiting=partial(goodput.during, SAVE)
        )
        in_memory = bool(settings.memory_every_steps and world.is_writer)
        self.tier = MemoryTier(
            memory_copy.place(self.store),
            self.background,
            lambda text: self._say(text),
            is_on=in_memory,
        )
        self.replay = RecomputedSteps(
            world, settings, halt=partial(setattr, self.tier, "is_on", False)
        )
        self._slow_words, self._has_room, self.resumed = "", False, ""
        self._rehearsal = self._new_rehearsal()
        self.metrics: Trackers | None = None
        # `differences` lists how the checkpoint's environment differed; on the writer only.
        self.environment, self.differences = Environment(world), list[Difference]()
        self._say: Callable[[str], None] = lambda text: None
        # Called in the background with the step of each checkpoint that is about to be written.
        self.at_save: Callable[[int], None] = lambda step: None

    def _new_rehearsal(self) -> Rehearsal:
        is_new = self.origin is None  # a resume has rehearsed already that the state loads
        is_on = self.settings.rehearse and is_new
        return Rehearsal(
            self.background.scribe, lambda text: self._say(text), self.note, is_on=is_on
        )

    @property
    def words(self) -> str:
        """Return the state of saving and uploading, for the progress line."""
        return (
            f"{self._words}, {self._uploader.words}"
            if self._uploader and len(self.stores) > 1
            else self._words
        )

    @property
    def to_save_s(self) -> float:
        """Return how long a save would take now, after the one in flight, in seconds."""
        return self.save_s * (2 if self.background.is_busy else 1)

    @property
    def upload_s(self) -> float:
        """Return how long the last upload took, in seconds."""
        return self._uploader.upload_s if self._uploader else 0.0

    def failure(self, what: str, remedy: str) -> HarnessError:
        """Return the error that ends the run after a failed save.

        It is a SaveError for a disk, and a StorageError for a remote store, which may answer again.
        """
        return (SaveError if self.store.is_local else StorageError)(what, self._words, remedy)

    def begin(self, progress: Console, give_up: Callable[[], object]) -> Attempt:
        """Claim the next attempt.

        Collective: every rank must call it.

        Args:
            progress: prints lines to the user.
            give_up: returns a true value if this process was asked to stop, so that a dead writer
                is waited for only a few seconds.

        Raises:
            SupersededError: another start has claimed this attempt.
            OvertakenError: the run has got further since the stores were listed.
            StorageError: a store cannot be read or written.
            UsageError: the environment differs and the settings refuse that, or the run directory
                is not shared by all ranks.
        """
        environment = self.environment.found()

        def claim() -> list[Any]:
            attempt = self._claim(progress, environment)
            return [attempt.number, attempt.run_id, attempt.nonce]

        number, run_id, nonce = self.world.on_writer(claim, give_up=give_up)
        self.attempt = Attempt(number, run_id, nonce)
        self._exit_record.begun(self.stores, self.attempt, self.world)
        self._exit_record.finish = self.background.close
        if len(self.stores) == 1 and self.store.is_local:
            check_shared(self.store, self.attempt, self.world)
        self.timer.begun()
        return self.attempt

    def _claim(self, progress: Console, environment: dict[str, Any]) -> Attempt:
        found = self._resume_point.survey
        assert found is not None, "the writer has listed the stores"
        self.differences = check(
            found, self.origin, environment, self.settings.environment, progress.say
        )
        attempt = claim(
            self.stores,
            self._resume_point,
            self.world.size,
            self.settings,
            progress.say,
            environment,
        )
        self.metrics = Trackers(
            self.settings.log_to,
            found,
            attempt.run_id,
            self.origin.step if self.origin else 0,
            progress.say,
        )
        self.tier.begin(attempt, self.origin)
        self._say, last = progress.say, self.replay.read(found, self.origin, attempt, progress.say)
        self.resumed = resumed(found, self.origin, self.goodput, last)
        self._listen(attempt, found)
        if self.differences:
            self.note("environment", differs=[vars(difference) for difference in self.differences])
            self.replay.suspects += map(str, self.differences)
        return attempt

    def _listen(self, attempt: Attempt, found: Catalog) -> None:
        """Start the event log and the uploader."""
        local = self.store if isinstance(self.store, LocalStore) else None
        has_remote = local is None or len(self.stores) > 1
        self.timer.lives = kill_history(found)
        here = [m for m in found.history if local and m in found.parts[0].manifests]
        self._origin_is_here = self.origin in here
        event_log = self.event_log = EventLog(
            local, fmt.events_key(attempt.number), kept=has_remote, spent=self.goodput.spent
        )
        event_log.listeners += [self.metrics.on_event] if self.metrics else []
        event_log.write(
            "begun",
            step=self.saved_step or 0,
            world_size=self.world.size,
            went_on_from=self.origin and self.origin.name,
        )
        self.replay.begin(event_log, self.goodput.redone_until)
        if has_remote:
            self._store_health.note = event_log.write
            route = Route(local, self.stores[-1], self.settings.remote_policy)
            self._uploader = Uploader(
                route, attempt, event_log, self._store_health, self.replay.log
            )
            there = [m for m in found.parts[-1].manifests if m.key not in found.parts[-1].marked]
            self._uploader.start(
                here, there, self.origin, self._resume_point.read_from(len(self.stores) - 1)
            )

    def is_due(self, left_s: float) -> bool:
        """Return whether to save now: by the clock, or because the resume point is gone.

        Also returns True if a background task has failed, as `save` raises or reports that, and if
        the state that the attempt resumed from is only in memory. `left_s` is the time until the
        end of the run, in seconds.
        """
        if (
            self.background.has_failed
            or self.background.wants_again
            or (self._resume_point.in_memory and not self._committed)
        ):
            return True  # `save` raises or reports what failed
        if self.timer.is_due(left_s, self.save_s, self.background.is_busy_with(self._finish)):
            return True
        if self.replay.has_failed or (
            self._uploader and (self._uploader.has_failed or self._uploader.origin_is_gone)
        ):
            return True  # `save` raises what failed
        if self.origin is None or self._committed or not self._origin_is_here:
            return False
        # Until the first commit only the resume point holds the state of the run. A stale process
        # that still runs may have deleted it.
        try:
            return not self.store.exists(self.origin.key)
        except StorageError:
            return False

    def save(
        self,
        capture: Callable[[], Captured],
        about: Callable[[], About],
        give_up: Callable[[], object],
        *,
        wait: bool,
    ) -> bool:
        """Begin to commit a checkpoint, after waiting for the save in flight.

        Collective: every rank must call it.

        Args:
            capture: returns the state to save; called on the writer.
            about: returns the manifest entries that are not part of the state; called on the
                writer.
            give_up: see `begin`.
            wait: wait until the checkpoint is committed.

        Returns:
            False if there is no checkpoint although training may go on; `words` holds the reason.

        Raises:
            SupersededError: a newer attempt has begun. This and the next error may come from the
                previous save.
            NonFiniteError: a parameter is NaN or infinite.
            UsageError: recomputed steps differ and the settings end the run, or the state cannot be
                loaded again.
        """
        began_at = time.perf_counter()
        is_saved = self._told(
            self.world.on_writer(
                lambda: self._begin(capture, about, began_at, wait), give_up=give_up
            )
        )
        self.timer.begun()
        return is_saved

    def settle(self, give_up: Callable[[], object]) -> None:
        """Wait until the save in flight is committed or has failed.

        `saved_step` is then the newest committed step. Raises the errors of a save, as `save` does.
        Collective: every rank must call it.
        """
        self._told(
            self.world.on_writer(lambda: self._reply(self.background.wait()), give_up=give_up)
        )

    def _told(self, reply: list[Any]) -> bool:
        """Store the writer's reply on the other ranks; return whether the save had no problem.

        The state of the writer itself may be newer than its reply.
        """
        problem, saved_step, words = reply
        if not self.world.is_writer:
            self.saved_step, self._words = saved_step, words
        return not problem

    def _reply(self, problem: str) -> list[Any]:
        return [problem, self.saved_step, self._words]

    def _begin(
        self,
        capture: Callable[[], Captured],
        about: Callable[[], About],
        began_at: float,
        wait: bool,
    ) -> list[Any]:
        self.background.wait()
        self.replay.check()
        if self._uploader:
            self._uploader.check()
        captured, told, problem = capture(), about(), ""
        self._rehearsal.take(captured)
        if not self.background.is_unable:
            self.background.start(captured, told, began_at, self._finish)
            problem = self.background.wait() if wait else ""
        if self.background.slow_words != self._slow_words:
            self._slow_words = self.background.slow_words
            self._say(f"harness: saves make training wait: {self._slow_words}")
        # There is no memory for a copy of the state, or the state holds more than plain tensors.
        if self.background.is_unable:
            self.background.wants_again = False
            state.check_finite(captured.tracked)
            problem = self._commit(captured.fill(), told, began_at, None, lambda: None, dict)
        return self._reply(problem)

    def _finish(self, job: Job, write: Callable[[Sink], None], check: Callable[[], None]) -> None:
        """Commit a copied state; called in the background."""
        assert self.attempt is not None and job.loan is not None
        self.at_save(job.head["step"])
        key = fmt.data_key(job.head["step"], self.attempt.number)
        with self._uploader.ahead(key, job.loan) if self._uploader else contextlib.nullcontext():
            job.problem = self._commit(
                job.head, job.about, job.began_at, write, check, job.costs, job.snapshot.places
            )

    def _commit(
        self,
        payload: Mapping[str, Any],
        about: About,
        began_at: float,
        write: Callable[[Sink], None] | None,
        check: Callable[[], None],
        costs: Callable[[], dict[str, float]],
        places: Mapping[int, int] | None = None,
    ) -> str:
        """Commit a checkpoint and prune old ones; may be called from any thread.

        Args:
            payload: the state, or only what the manifest repeats of it if `write` is given.
            about: the manifest entries that are not part of the state.
            began_at: when the save began, by `time.perf_counter`.
            write: writes the data file; None to write `payload` with `torch.save`.
            check: called when the data is durable; its errors pass through.
            costs: returns what the save has cost, for the event.
            places: where each tensor's memory begins in the file, by address; for the rehearsal.

        Returns:
            "", or why there is no checkpoint, if training may go on.
        """
        assert self.attempt is not None and self.event_log is not None
        store = self.store.patient(
            self.settings.wait_s if about.final else min(SAVE_S, self.settings.wait_s)
        )
        try:
            manifest = commit(store, self.attempt, payload, about, write, check)
        except SaveError as error:
            self.event_log.write("not_saved", step=payload["step"], error=str(error))
            self._words = " ".join(str(error).split("\n"))
            if not about.final:
                self._say(f"harness: NOT SAVED, training goes on: {self._words}")
            return self._words
        self.save_s = time.perf_counter() - began_at
        self.saved_step, self._committed = manifest.step, True
        self._words = f"saved step {manifest.step} in {self.save_s:.2g} s"
        self._verified.add(manifest.name)
        self.tier.drop(before=(manifest.attempt, manifest.step + 1))
        spent = {"seconds": round(self.save_s, 6)} | costs()
        self.event_log.write(
            "saved",
            step=manifest.step,
            checkpoint=manifest.name,
            size_bytes=manifest.size_bytes,
            **spent,
        )
        if self._uploader:
            self._uploader.offer(manifest)
        self._let_go(store)
        self._rehearsal.begin(self.store, manifest, places or {})
        return ""

    def _let_go(self, store: Store) -> None:
        assert self.attempt is not None and self.event_log is not None
        policy = self.settings.policy if store.is_local else self.settings.remote_policy
        pinned = self._uploader.pinned() if self._uploader else ()
        try:
            gone = retention.apply(store, self.attempt, self._verified, policy, pinned)
        except StorageError as error:
            self.event_log.write("not_deleted", error=str(error))
            return
        if gone:
            self.event_log.write("deleted", names=gone)
        if self._uploader:
            self._uploader.forget(gone)

    def at_boundary(self, tracked: Mapping[str, Any]) -> None:
        """Account for a finished step and seal a complete copy.

        After the first step all state exists, so its size is known and memory is reserved.
        """
        self.timer.step(self.background.is_busy_with(self._finish), self.save_s)
        if not self._has_room and self.world.is_writer:
            self._has_room = True
            self.background.make_room(state.size_bytes(tracked), self.world.device)
            self.replay.look_at(tracked)
        self.background.at_boundary()

    def keep(self, name: str, data: bytes) -> None:
        """Write one of the user's files, on the writer; other ranks only check the arguments.

        The run directory is written at once, and the remote store in the background. A failed write
        is reported and does not end training.

        Raises:
            UsageError: the call is outside the loop, the name leads out of the folder of files, or
                the data is not bytes.
        """
        key = fmt.file_key(name)
        if self.attempt is None or self._ended:
            raise UsageError(
                f"keep({name!r}) came outside the loop",
                remedy="Keep files between the first batch and the last.",
            )
        if not isinstance(data, bytes):
            raise UsageError(
                f"keep({name!r}) takes bytes",
                f"found: {type(data).__name__}",
                "Text: text.encode().",
            )
        if self.event_log is None:
            return
        try:
            if self.store.is_local:
                write_file(self.store, key, data, self.attempt)
        except StorageError as error:
            self.event_log.write("not_kept", file=key, store=str(self.store), error=str(error))
            self._store_health.say(
                f"harness: warning: {key} is not in {self.store}: "
                f"{error.what} ({error.found}); training goes on"
            )
        if self._uploader:
            self._uploader.keep(key, data)

    def hand_in(self, give_up: Callable[[], object]) -> str:
        """Copy the last checkpoint of a finished run to the remote store if it is missing there.

        No attempt is claimed. Collective: every rank must call it.

        Returns:
            A description of what was done, or "".

        Raises:
            StorageError: a store cannot be read or written. For other errors see
                `locations.hand_in`.
        """
        return self.world.on_writer(
            lambda: hand_in(self._resume_point.survey, self.origin), give_up=give_up
        )

    def about(
        self,
        classes: dict[str, str],
        metrics: dict[str, float],
        final: dict[str, int | None] | None,
    ) -> About:
        """Return the manifest entries that are not part of the state.

        Args:
            classes: the class names of the tracked objects.
            metrics: the metrics that were measured at this step.
            final: what the run was finished for, in epochs and steps; None if it is not finished.
        """
        lineage, digest = going_on_from(self.origin), config.digest(self.settings.config)
        return About(
            self.world.size, lineage, classes, digest, final, metrics, read_back=not self._committed
        )

    def note(self, kind: str, **fields: Any) -> None:
        """Add an event to the event log; does nothing on ranks other than the writer."""
        if self.event_log:
            self.event_log.write(kind, **fields)

    def end(
        self,
        why: str,
        give_up: Callable[[], object],
        *,
        step: int,
        saved: bool = True,
        limit_s: Callable[[], float] = lambda: math.inf,
        **details: Any,
    ) -> None:
        """Wait until the checkpoints are in every store, and record how the attempt ended.

        Nothing is written afterwards. Collective: every rank must call it.

        Args:
            why: how the attempt ended, such as "finished" or "stopped".
            give_up: see `begin`.
            step: the step at which the attempt ended.
            saved: whether this step is saved.
            limit_s: returns the time that is left, in seconds.
            **details: more fields of the record.

        Raises:
            StorageError: a checkpoint is still missing after `wait_s` or `limit_s()` seconds.
            SupersededError: a newer attempt has begun.
        """
        record, self._ended = {"step": step, "saved": saved} | details, True
        self._rehearsal.close()
        if why == "stopped":  # this process may be killed before the upload is complete
            self._exit_record.record(why, self.stores[:1], saved_step=self.saved_step, **record)
        with self.goodput.during(SAVE):
            problem = self.world.on_writer(
                lambda: self._settle(limit_s() - LAST_S), give_up=give_up
            )
        failure = StorageError(
            f"{why} at step {step}, but not everything is in the remote store",
            problem,
            UPLOADED_THEN,
        )
        if problem and why == "finished":
            raise failure
        self.replay.close()
        self.note(why, **record)
        if self._uploader:
            self._uploader.close(1.0 if problem else END_S)
        if self.metrics:
            self.metrics.close()
        self._exit_record.record(why, self.stores, saved_step=self.saved_step, **record)
        if problem:
            raise failure

    def _settle(self, limit_s: float = math.inf) -> str:
        problem = (
            self._uploader.settle(max(0.0, min(self.settings.wait_s, limit_s)))
            if self._uploader
            else ""
        )
        return problem and f"{problem} It lies in {self.store}."
