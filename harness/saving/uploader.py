"""Upload committed checkpoints from the run directory to the remote store while training goes on.

The upload thread is the second thread of the writer (rank 0). It also uploads the events, the step
log and the user's files.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from functools import partial

from harness.checkpoint import format as fmt
from harness.checkpoint import replicate, retention
from harness.checkpoint.attempts import Attempt, check_fence
from harness.checkpoint.format import Manifest
from harness.checkpoint.known import Known
from harness.errors import DamagedError, StorageError
from harness.monitoring.event_log import EventLog
from harness.monitoring.kept_files import KeptFiles
from harness.monitoring.store_health import StoreHealth
from harness.monitoring.upload_status import UploadStatus
from harness.saving.upload_queue import EarlyUpload, Route, UploadQueue
from harness.selfcheck.step_log import StepLog
from harness.sharding.shard_uploads import Shipment, send_alone
from harness.store import Store
from harness.store.staging_buffer import ReadLease

RETRIED_S = 60.0  # retry limit of one request; after it the whole upload starts again
AGAIN_S = 10.0  # pause after a failed upload
# Interval at which events are sent, and the resume point is checked, with nothing to upload.
IDLE_S = 20.0
STALLED_S = 20.0  # after its time limit, an upload without progress for this long is given up
END_S = 10.0  # how long to wait for the last events to be sent


class Uploader:
    """The upload thread, which runs from `start` to `close`.

    Its errors are raised by `check` on the training thread.

    Args:
        route: the source and the target of the uploads.
        attempt: the attempt that uploads.
        event_log: the event log.
        store_health: the health of the remote store; also prints warnings.
        steps: the step log, whose records are uploaded, too.
        clock: returns the time in seconds.
    """

    def __init__(
        self,
        route: Route,
        attempt: Attempt,
        event_log: EventLog,
        store_health: StoreHealth,
        steps: StepLog | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.route, self.attempt, self.event_log = route, attempt, event_log
        self.store_health, self.steps, self.clock = store_health, steps, clock
        self.origin: Manifest | None = None  # the resume point, checked until the first commit
        self.origin_is_gone = False
        self._failure: BaseException | None = None  # the error that ends the run
        self._verified: set[str] = set()
        self._known = Known()  # of the remote store
        self._state = threading.Condition()
        self._queue = UploadQueue(route.policy, self._state, is_on=route.local is not None)
        self._files = KeptFiles(route.remote, attempt, event_log, store_health, self._state)
        self._status = UploadStatus(
            route.remote, event_log, store_health, self._state, has_local=route.local is not None
        )
        self._give_up_at = math.inf  # requests are not retried after this time
        self._newest_first = self._is_left = False  # see `settle` and `leave`
        # When the last request of this thread succeeded, or the store took a part of an upload.
        # What the store answers others meanwhile says nothing about an upload.
        self._worked_at = clock()
        self._thread = threading.Thread(target=self._run, daemon=True, name="uploader")

    def start(
        self,
        history: Collection[Manifest],
        there: Collection[Manifest],
        origin: Manifest | None,
        verified: set[str],
        known: Known,
    ) -> None:
        """Start the upload thread.

        Args:
            history: the checkpoints of the run's history that are in the run directory.
            there: the checkpoints that are in the remote store.
            origin: the resume point.
            verified: names of the checkpoints that were read whole from the remote store.
            known: what was read of the remote store; from now on only the thread uses it.
        """
        self._queue.begin(history, there)
        self._status.begin(there)
        # The resume point was verified here, and its copy when it was uploaded. Otherwise attempts
        # that upload a single checkpoint would never prune.
        self._verified, self._known = verified | {m.name for m in there if m == origin}, known
        self.origin = origin
        self._thread.start()

    def ahead(
        self, key: str, lease: ReadLease, *, is_final: bool = False
    ) -> AbstractContextManager[None]:
        """Begin to upload a checkpoint that is being written; see `UploadQueue.ahead`.

        Without a run directory nothing is uploaded early.
        """
        return self._queue.ahead(key, lease, is_final=is_final)

    def offer(self, manifest: Manifest) -> None:
        """Register a committed checkpoint for upload.

        Without a run directory it is committed in the remote store already.
        """
        with self._state:
            self.origin, self.origin_is_gone = None, False
            if self.route.local is None:
                self._status.committed_there(manifest.step)
            self._queue.add(manifest)

    def forget(self, names: Collection[str]) -> None:
        """Drop the checkpoints that retention has deleted from the run directory."""
        self._queue.forget(names)

    def keep(self, key: str, data: bytes) -> None:
        """Queue one of the user's files for upload; see `KeptFiles.add`."""
        self._files.add(key, data)

    def pinned(self) -> set[str]:
        """Return the names of checkpoints that must not be deleted from the run directory yet."""
        return self._queue.pinned()

    def check(self) -> None:
        """Raise the error that ends the run, if any: SupersededError, or an internal error."""
        if self._failure is not None:
            raise self._failure

    @property
    def has_failed(self) -> bool:
        """Return whether `check` would raise."""
        return self._failure is not None

    @property
    def status_line(self) -> str:
        """Return the state of the uploads, for the progress line."""
        return self._status.status_line

    @property
    def upload_s(self) -> float:
        """Return how long the last upload took, in seconds."""
        return self._status.upload_s

    def settle(self, limit_s: float, *, newest_first: bool = False) -> str:
        """Wait until every wanted checkpoint and every file of the user is in the remote store.

        Failed uploads are retried for `limit_s` seconds. After that, the wait goes on only while an
        upload makes progress. The user's files that could not be sent are reported.

        Args:
            limit_s: how long failed uploads are retried, in seconds.
            newest_first: drop an upload in flight that is not the most urgent one, as there may be
                time for one only. It is sent again if it is still wanted afterwards.

        Returns:
            "" on success, else a description of the problem.

        Raises:
            SupersededError: a newer attempt has begun.
        """
        with self._state:
            self._give_up_at, self._newest_first = self.clock() + limit_s, newest_first
            self._state.notify_all()
            while self._has_work and self._failure is None:
                late_s = self.clock() - self._give_up_at
                silent_s = self.clock() - self._worked_at
                if late_s > 0 and (self._status.problem or silent_s > min(STALLED_S, limit_s)):
                    # Only the user's files are left. No later start could send them, as only this
                    # process holds them.
                    if not self._queue.wanted():
                        break
                    silent = f"{self.store_health.name} does not answer: {self.store_health.last}"
                    return self._status.problem or silent
                self._state.wait(0.2)
        self.check()
        self._files.report_unsent(self._status.problem or self.store_health.last)
        # Nothing is left to upload, so the copy in the run directory must be damaged.
        if (missing := self._queue.missing_newest) is not None:
            return (
                self._status.problem
                or f"{missing.name} cannot be uploaded: its copy in the run directory is damaged"
            )
        return ""

    def leave(self) -> None:
        """End the thread once everything is uploaded, or an upload fails; do not wait for it."""
        with self._state:
            self._is_left = True
            self._state.notify_all()

    def close(self, limit_s: float) -> None:
        """End the thread; wait at most `limit_s` seconds for it to send the last events."""
        self._queue.close()
        if self._thread.is_alive():
            self._thread.join(limit_s)

    @property
    def _has_work(self) -> bool:
        """Return whether a checkpoint or one of the user's files is still to be sent."""
        return bool(self._queue.wanted()) or not self._files.is_empty

    def _run(self) -> None:
        try:
            while not self._queue.is_closed:
                pause_s = self._turn()
                with self._state:
                    goes_on = pause_s == 0 or (pause_s == IDLE_S and self._queue.has_next)
                    if self._is_left and not goes_on:
                        break
                    if not self._queue.is_closed and not goes_on:
                        self._state.wait(
                            min(pause_s, 1.0) if self._give_up_at < math.inf else pause_s
                        )
            with contextlib.suppress(StorageError):
                self._send_events()
        except BaseException as error:  # noqa: BLE001 - `check` raises it on the training thread
            self._failure = error
            with self._state:
                self._state.notify_all()

    def _turn(self) -> float:
        """Do the most urgent work; return how many seconds to wait before the next turn."""
        remote = self._store()
        try:
            if (early := self._queue.next()) is not None:
                self._upload(early)
                return 0.0
            self._look_after_origin(remote)
            self._send_events()
            while not self._files.is_empty and not self._queue.wanted():
                self._files.send_oldest(remote)
        except StorageError as error:
            self._status.report_failure(error)
            return AGAIN_S
        self._status.caught_up()
        return IDLE_S

    def _look_after_origin(self, remote: Store) -> None:
        """Check whether the resume point still exists, and whether a newer attempt has begun.

        Until the first commit only the resume point holds the state of the run. A newer attempt
        should be noticed early.
        """
        if (origin := self.origin) is None:
            return
        check_fence(remote, self.attempt)
        is_gone = not remote.exists(origin.key)
        with self._state:
            self.origin_is_gone = is_gone and self.origin is origin

    def _store(self, drop: Callable[[], object] = lambda: None) -> Store:
        store = self.route.remote.with_retry_limit(
            RETRIED_S,
            lambda: self._queue.is_closed or self.clock() > self._give_up_at or drop(),
            drop,
        )
        store.listen(self.store_health.on_retry, self._on_success)
        return store

    def _on_progress(self) -> None:
        self._worked_at = self.clock()

    def _on_success(self) -> None:
        self._on_progress()
        self.store_health.on_success()

    def _upload(self, early: EarlyUpload) -> None:
        def is_dropped() -> bool:
            return self._newest_first and self._queue.is_overtaken(early)

        assert self.route.local is not None
        began, remote = self.clock(), self._store(is_dropped)
        send_shards = partial(self._send_shards, remote, is_dropped)
        self._status.upload_begins()
        try:
            manifest = replicate.send(
                self.route.local,
                early.key,
                early.size_bytes,
                early.chunks,
                lambda: self._queue.committed(early, send_shards),
                remote,
                self.attempt,
                self._on_progress,
            )
        except DamagedError as error:  # the run directory's copy is damaged: nothing can be sent
            name = fmt.stem_of(early.key)
            self._queue.forget([name])
            self._status.report_damage(name, error)
            return
        except StorageError:
            if not is_dropped():
                raise
            return
        if manifest is None:
            return
        with self._state:
            self._verified.add(manifest.name)
            behind = self._status.arrived(manifest.step)
            self._queue.arrived(manifest)
        self._known.wrote(manifest)
        self._status.report_upload(manifest, self.clock() - began, behind)
        self._send_events()
        self._prune(self._store())

    def _send_shards(self, remote: Store, is_dropped: Callable[[], bool], of: Manifest) -> None:
        """Send the shards of a committed checkpoint, from all ranks if there are more."""
        assert self.route.local is not None
        send = self.route.shards.send if self.route.shards else send_alone

        def gives_up() -> bool:
            return is_dropped() or self._queue.is_closed

        send(Shipment(of, self.route.local, remote, self.attempt, self._on_progress, gives_up))

    def _prune(self, remote: Store) -> None:
        try:
            if gone := retention.apply(
                remote, self.attempt, self._verified, self.route.policy, known=self._known
            ):
                self.event_log.write("deleted", names=gone, store=str(remote))
        except StorageError as error:
            self.event_log.write("not_deleted", error=str(error), store=str(remote))

    def _send_events(self) -> None:
        self.event_log.send(self._store(), self.attempt.number)
        if self.steps:
            self.steps.send(self._store)
