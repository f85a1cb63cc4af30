"""The attempt of this process: claim it, record what happens in it, and record how it ends."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from harness.arguments import Settings
from harness.checkpoint import format as fmt
from harness.checkpoint import memory_copy, resume
from harness.checkpoint.attempts import Attempt
from harness.checkpoint.catalog import Catalog, reaches
from harness.checkpoint.known import Known
from harness.distributed.ranks import World
from harness.errors import EXIT_FAILED, StorageError
from harness.monitoring.console import Console
from harness.monitoring.event_log import EventLog
from harness.monitoring.goodput import SAVE, Goodput
from harness.monitoring.kept_files import DirectoryFiles, check_file
from harness.monitoring.resume_notice import resumed
from harness.monitoring.store_health import StoreHealth
from harness.monitoring.trackers import Trackers
from harness.saving.async_saver import AsyncSaver
from harness.saving.claim import claim
from harness.saving.locations import check_shared, hand_in, hand_in_shards
from harness.saving.memory_tier import MemoryTier
from harness.saving.rehearsal import Rehearsal
from harness.saving.save_policy import SavePolicy
from harness.saving.upload_queue import Route
from harness.saving.uploader import END_S, Uploader
from harness.selfcheck.environment import Environment, check
from harness.selfcheck.recomputed import RecomputedSteps
from harness.sharding.sharded_save import ShardedSave
from harness.store import LocalStore, Store
from harness.supervision.exit_record import ExitRecord
from harness.supervision.machine_record import Difference

UPLOADED_THEN = "Start again: what is missing there is uploaded then."
LAST_S = 2.0  # the time before a kill that is reserved for the last records


@dataclass(frozen=True)
class Parts:
    """What an attempt is made of; `harness.run.assembly` puts it together."""

    # Checkpoints are committed in the first store and copied to the second one, if there is one.
    stores: tuple[Store, ...]
    world: World
    resume_point: resume.ResumePoint
    settings: Settings
    exit_record: ExitRecord  # records how the attempt ends
    store_health: StoreHealth  # of the remote store; also prints warnings
    goodput: Goodput
    clock: Callable[[], float] = time.monotonic
    # Possible causes of a difference between recomputed steps; more are added while it runs.
    suspects: list[str] = field(default_factory=list)


class CurrentAttempt:
    """The stores, the records and the background workers of the attempt of this process.

    Only the writer writes; the other ranks only keep track of the saved step.
    """

    def __init__(self, parts: Parts) -> None:
        self.stores, self.world = parts.stores, parts.world
        self.settings = settings = parts.settings
        self.is_apart = settings.is_scratch and len(parts.stores) > 1  # a directory a machine
        self.store = parts.stores[0]  # where a checkpoint is committed; a second store gets a copy
        self.origin, self.goodput = parts.resume_point.manifest, parts.goodput
        self.saved_step: int | None = (
            self.origin.step if self.origin and not parts.resume_point.in_memory else None
        )
        self.attempt: Attempt | None = None
        self.sharded: ShardedSave | None = None  # if tracked state is sharded
        self.event_log: EventLog | None = None
        self._known = Known()  # of the first store, from the claim on
        self.metrics: Trackers | None = None
        self._uploader: Uploader | None = None
        self._resume_point, self._exit_record = parts.resume_point, parts.exit_record
        self._store_health, self._suspects = parts.store_health, parts.suspects
        self._ended = self._origin_is_here = False
        self._files = DirectoryFiles(self.store)
        every_s, when_busy = settings.save_every_s, settings.when_busy
        self.save_policy = SavePolicy(every_s, when_busy, parts.clock, self.note)
        self.background = AsyncSaver(
            overlapped=settings.snapshot != "at_once",
            compare=settings.snapshot == "checked",
            waiting=partial(parts.goodput.during, SAVE),
        )
        self.tier = MemoryTier(
            memory_copy.place(self.store),
            self.background,
            self._say,
            is_on=bool(settings.memory_every_steps and parts.world.is_writer),
        )
        self.recomputed = RecomputedSteps(self.world, settings, self.tier.halt, parts.suspects)
        is_new = self.origin is None  # a resume has rehearsed already that the state loads
        self._rehearsal = Rehearsal(
            self.background.writer, self._say, self.note, is_on=settings.rehearse and is_new
        )
        self.resumed = ""
        # `differences` lists how the checkpoint's environment differed; on the writer only.
        self.environment, self.differences = Environment(parts.world), list[Difference]()
        self._print: Callable[[str], None] = lambda text: None

    def _say(self, text: str) -> None:
        """Print a line, once the attempt is claimed."""
        self._print(text)

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
        environment = self.environment.collect()

        def claim() -> list[Any]:
            attempt = self._claim(progress, environment)
            return [attempt.number, attempt.run_id, attempt.nonce]

        number, run_id, nonce = self.world.on_writer(claim, give_up=give_up)
        self.attempt = Attempt(number, run_id, nonce)
        self._exit_record.begun(self.stores, self.attempt, self.world, self.background.close)
        if self.sharded and self.is_apart:
            self.world.on_each(lambda: self.store.prepare((fmt.CHECKPOINTS,)))
        elif self.sharded or len(self.stores) == 1:
            check_shared(self.stores, self.attempt, self.world)
        if self.sharded:
            self.sharded.begin(self.attempt)
        self.save_policy.begun()
        return self.attempt

    def _claim(self, progress: Console, environment: dict[str, Any]) -> Attempt:
        catalog = self._resume_point.catalog
        assert catalog is not None, "the writer has listed the stores"
        self.differences = check(
            catalog, self.origin, environment, self.settings.environment, progress.say
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
            catalog,
            attempt.run_id,
            self.origin.step if self.origin else 0,
            progress.say,
        )
        self.tier.begin(attempt, self.origin)
        self._print, last = (
            progress.say,
            self.recomputed.read(catalog, self.origin, attempt, progress.say),
        )
        self.resumed = resumed(catalog, self.origin, self.goodput, last)
        self._listen(attempt, catalog)
        if self.differences:
            self.note("environment", differs=[vars(difference) for difference in self.differences])
            self._suspects += map(str, self.differences)
        return attempt

    def _listen(self, attempt: Attempt, catalog: Catalog) -> None:
        """Start the event log and the uploader."""
        local = self.store if isinstance(self.store, LocalStore) else None
        has_remote = local is None or len(self.stores) > 1
        self.save_policy.learn(catalog)
        usable = [m for m in catalog.history if m.name not in self._resume_point.elsewhere]
        here = [m for m in usable if local and m in catalog.parts[0].manifests]
        self._origin_is_here, self._known = self.origin in here, catalog.parts[0].known
        event_log = self.event_log = EventLog(
            local, fmt.events_key(attempt.number), kept=has_remote, spent=self.goodput.spent
        )
        event_log.listeners.extend([self.metrics.on_event] if self.metrics else [])
        event_log.write(
            "begun",
            step=self.saved_step or 0,
            world_size=self.world.size,
            went_on_from=self.origin and self.origin.name,
        )
        self.recomputed.begin(event_log, self.goodput.redone_until)
        if has_remote:
            self._store_health.record_to(event_log.write)
            shards = self.sharded.uploads if self.sharded else None
            route = Route(local, self.stores[-1], self.settings.remote_policy, shards)
            self._uploader = Uploader(
                route, attempt, event_log, self._store_health, self.recomputed.log
            )
            there = [
                m
                for m in catalog.parts[-1].manifests
                if m.key not in catalog.parts[-1].marked
                and catalog.parts[-1].has_all(self.stores[-1], m)
            ]
            verified = self._resume_point.read_from(len(self.stores) - 1)
            self._uploader.start(here, there, self.origin, verified, catalog.parts[-1].known)

    def keep(self, name: fmt.FileName, data: bytes) -> None:
        """Write one of the user's files, on the writer; other ranks only check the arguments.

        The run directory is written at once, and the remote store in the background. A failed write
        is reported and does not end training.

        Raises:
            UsageError: the call is outside the loop, the name leads out of the folder of files, or
                the data is not bytes.
            SupersededError: a newer attempt has begun.
        """
        key = fmt.file_key(name)
        check_file(name, data, in_loop=self.attempt is not None and not self._ended)
        if self.attempt is None or self.event_log is None:
            return
        try:
            self._files.write(key, data, self.attempt)
        except StorageError as error:
            self.event_log.write("not_kept", file=key, store=str(self.store), error=str(error))
            self._store_health.say(
                f"harness: warning: {key} is not in {self.store}: "
                f"{error.what} ({error.found}); training goes on"
            )
        if self._uploader:
            self._uploader.keep(key, data)

    def has_reached(self, end: dict[str, int | None]) -> bool:
        """Return whether the resume point is the end of a run of this length."""
        final = self.origin.final if self.origin else None
        return final is not None and reaches(final, end)

    def hand_in(self, give_up: Callable[[], object]) -> str:
        """Copy what the remote store of a finished run still lacks; see `locations.hand_in`.

        No attempt is claimed. Collective: every rank must call it.
        """
        catalog, policy = self._resume_point.catalog, self.settings.remote_policy
        if self.is_apart and self.origin is not None and self.origin.shards:
            hand_in_shards(self.stores, catalog, self.origin, self.world, give_up)
        return self.world.on_writer(lambda: hand_in(catalog, self.origin, policy), give_up=give_up)

    def note(self, kind: str, *rows: Mapping[str, Any], **fields: Any) -> None:
        """Add events to the log, see `EventLog.write`; does nothing but on the writer."""
        if self.event_log:
            self.event_log.write(kind, *rows, **fields)

    def alive(self, step: int) -> None:
        """Record that a step was made, if no event was written for long; only on the writer."""
        if self.event_log:
            self.event_log.alive(step)

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
                lambda: self._settle(limit_s() - LAST_S, why), give_up=give_up
            )
        failure = StorageError(
            f"{why} at step {step}, but not everything is in the remote store",
            problem,
            UPLOADED_THEN,
        )
        if problem and why == "finished":
            raise failure
        self.recomputed.close()
        self.note(why, **record)
        if self._uploader:
            self._uploader.close(1.0 if problem else END_S)
        if self.metrics:
            self.metrics.close()
        self._exit_record.record(why, self.stores, saved_step=self.saved_step, **record)
        if problem:
            raise failure

    def _settle(self, limit_s: float = math.inf, why: str = "finished") -> str:
        limit_s = max(0.0, min(self.settings.wait_s, limit_s))
        problem = (
            self._uploader.settle(limit_s, newest_first=why == "stopped") if self._uploader else ""
        )
        return problem and f"{problem} It lies in {self.store}."

    def close(self) -> None:
        """End the background work, also after an error; what is committed is still uploaded."""
        self.background.close()
        self.recomputed.close()
        if self._uploader:
            self._uploader.leave()
        if self.metrics:
            self.metrics.close(EXIT_FAILED)  # does nothing after `end`
