"""The writer's second thread: copies what is committed in the run directory to the remote store, while training goes on."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass

from harness.checkpoint import format as fmt
from harness.checkpoint import replicate, retention
from harness.checkpoint.attempts import Attempt, check_fence
from harness.checkpoint.format import Manifest
from harness.errors import DamagedError, StorageError
from harness.monitoring.event_log import EventLog
from harness.monitoring.store_health import StoreHealth
from harness.selfcheck.step_log import StepLog
from harness.store import LocalStore, Store
from harness.store.staging_buffer import ReadLease

REQUEST_S = 60.0  # for how long one request is tried; what fails then is done again as a whole
AGAIN_S = 10.0  # after a failed upload
IDLE_S = 20.0  # how often events are sent, and the origin is looked for, when there is nothing to upload
STALLED_S = 20.0  # after the limit, an upload without progress for so long is given up
END_S = 10.0  # how long the last events are worth a wait
MOST_KEPT_BYTES = 64 << 20  # of the user's files, in an outage


def write_file(store: Store, key: str, data: bytes, attempt: Attempt) -> None:
    """Write a file of the user's own, in a folder that may not be there yet. Raises StorageError."""
    if store.is_local and store.exists(fmt.attempt_key(attempt.number)):  # a run directory that has vanished is not made anew
        folders = (key.rpartition("/")[0],)
        store.prepare(folders)
        store.sweep(folders, attempt.number)
    store.write(key, data, attempt.number)


@dataclass(frozen=True)
class Route:
    """From where to where, and what is kept there. Without a run directory nothing but events goes this way."""

    local: LocalStore | None
    remote: Store
    policy: retention.Policy


@dataclass
class EarlyUpload:
    """A checkpoint that is being committed in the run directory: its bytes are in memory, as long as that is not needed."""

    key: str
    chunks: Iterable[bytes] = ()
    is_decided: bool = False  # whether it is committed, or will never be


class Uploader:
    """Runs from `start` to `close`. What it finds out is told by `check`, on the thread that trains."""

    def __init__(
        self, route: Route, attempt: Attempt, ledger: EventLog, outage: StoreHealth, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.route, self.attempt, self.ledger, self.outage, self.clock = route, attempt, ledger, outage, clock
        self.origin: Manifest | None = None  # looked after until there is something newer
        self.origin_is_gone = False
        self.step: int | None = None  # the newest that has arrived
        self.upload_s = 0.0  # how long the last one took
        self._failure: BaseException | None = None  # ends the run
        self._problem = ""  # why the last upload failed; it is tried again
        self._behind_since: str | None = None
        self._history: dict[str, Manifest] = {}
        self._newest: Manifest | None = None
        self._early: EarlyUpload | None = None
        self._there: set[str] = set()
        self._verified: set[str] = set()
        self._segments, self._segment = 0, b""
        self.steps: StepLog | None = None  # what it writes is sent, too
        self._kept: dict[str, bytes] = {}  # the user's files that are still to be sent, the oldest first
        self._state = threading.Condition()
        self._closing = False
        self._give_up_at = math.inf  # from then on nothing is tried again
        self._thread = threading.Thread(target=self._run, daemon=True, name="uploader")

    def start(self, history: Collection[Manifest], there: Collection[Manifest], origin: Manifest | None, verified: set[str]) -> None:
        """`history` lies in the run directory, `there` in the remote store, where those `verified` were read whole."""
        self._history = {m.name: m for m in history}
        self._there = {m.name for m in there}
        self._verified = set(verified)
        self.origin = origin
        self.step = max((m.step for m in there), default=None)
        self._thread.start()

    @contextlib.contextmanager
    def ahead(self, key: str, loan: ReadLease) -> Iterator[None]:
        """Begin to send the data that is being written under `key` here, and is in memory. When the context ends it has been offered, or
        will not be."""
        early = EarlyUpload(key, loan.chunks())
        with self._state:
            self._early = early if self.route.local is not None else None
            self._state.notify_all()
        try:
            yield
        finally:
            with self._state:
                early.is_decided = True
                self._state.notify_all()

    def offer(self, manifest: Manifest) -> None:
        """A checkpoint was committed: here, or, without a run directory, there."""
        with self._state:
            self.origin, self.origin_is_gone = None, False
            self._history[manifest.name] = self._newest = manifest
            if self.route.local is None:
                self._there.add(manifest.name)
                self.step = manifest.step
            self._state.notify_all()

    def forget(self, names: Collection[str]) -> None:
        """Retention has deleted these from the run directory."""
        with self._state:
            for name in names:
                self._history.pop(name, None)

    def keep(self, key: str, data: bytes) -> None:
        """Send a file of the user's with the next turn; until then, the newest data of each name, and of very much the newest files."""
        with self._state:
            self._kept.pop(key, None)
            self._kept[key] = data
            while len(self._kept) > 1 and sum(map(len, self._kept.values())) > MOST_KEPT_BYTES:
                oldest = next(iter(self._kept))
                del self._kept[oldest]
                self._not_kept(oldest, "too much is waiting to be sent")

    def pinned(self) -> set[str]:
        """What must not be deleted from the run directory yet."""
        return {manifest.name for manifest in self._wanted()}

    def check(self) -> None:
        """Raises what ends the run: SupersededError, or an error of our own."""
        if self._failure is not None:
            raise self._failure

    @property
    def has_failed(self) -> bool:
        """Whether `check` would raise."""
        return self._failure is not None

    @property
    def words(self) -> str:
        """For the progress line."""
        if self._behind_since:
            return f"NOT UPLOADED since {self._behind_since}"
        return f"uploaded {self.step}" if self.step is not None else "nothing uploaded yet"

    def settle(self, limit_s: float) -> str:
        """Wait until everything is in the remote store; returns "" or what is wrong. What fails is tried again for `limit_s`; an
        upload that makes progress then is waited for. Raises SupersededError.
        """
        with self._state:
            self._give_up_at = self.clock() + limit_s
            self._state.notify_all()
            while (self._wanted() or self._kept) and self._failure is None:
                late_s = self.clock() - self._give_up_at
                if late_s > 0 and (self._problem or self.clock() - self.outage.worked_at > min(STALLED_S, limit_s)):
                    if not self._wanted():  # no other start could send a file that only this process knows of
                        break
                    return self._problem or f"{self.outage.name} does not answer: {self.outage.last}"
                self._state.wait(0.2)
        self.check()
        for key in list(self._kept):
            self._not_kept(key, self._problem or self.outage.last)
        if self._newest is not None and self._newest.name not in self._there:  # the copy in the run directory is damaged
            return self._problem or f"{self._newest.name} cannot be uploaded: its copy in the run directory is damaged"
        return ""

    def close(self, limit_s: float) -> None:
        """Send the last events, if that is quick, and end."""
        with self._state:
            self._closing = True
            self._state.notify_all()
        if self._thread.is_alive():
            self._thread.join(limit_s)

    def _wanted(self) -> list[Manifest]:
        with self._state:
            return [] if self.route.local is None else replicate.wanted(list(self._history.values()), self._there, self.route.policy)

    def _run(self) -> None:
        try:
            while not self._closing:
                pause_s = self._turn()
                with self._state:
                    if not self._closing and not (pause_s == IDLE_S and (self._wanted() or self._early)):
                        self._state.wait(min(pause_s, 1.0) if self._give_up_at < math.inf else pause_s)
            with contextlib.suppress(StorageError):
                self._send_events()
        except BaseException as error:  # noqa: BLE001 - a thread's error is nobody's: `check` raises it where it is seen
            self._failure = error
            with self._state:
                self._state.notify_all()

    def _turn(self) -> float:
        """Do what is most urgent; returns how long to wait before the next."""
        remote = self._store()
        try:
            if (early := self._next()) is not None:
                self._upload(early, remote)
                return 0.0
            self._look_after_origin(remote)
            self._send_events()
            self._send_kept(remote)
        except StorageError as error:
            return self._failed(error)
        self._behind_since = None
        return IDLE_S

    def _next(self) -> EarlyUpload | None:
        """What to send: the newest, though it may not be committed yet."""
        with self._state:
            early, self._early = self._early, None
            keys = [manifest.data_key for manifest in self._wanted()]
            if early is not None and (not early.is_decided or early.key in keys):
                return early
            return EarlyUpload(keys[0], is_decided=True) if keys else None

    def _committed(self, early: EarlyUpload) -> Manifest | None:
        """The manifest, as soon as it is known that there is one, or None if there is none."""
        with self._state:
            while True:
                manifest = next((m for m in self._history.values() if m.data_key == early.key), None)
                if manifest is not None or early.is_decided or self._closing:
                    return manifest
                self._state.wait()

    def _send_kept(self, remote: Store) -> None:
        while self._kept and not self._wanted():
            with self._state:
                key, data = next(iter(self._kept.items()))
            check_fence(remote, self.attempt)  # a newer attempt's file is not replaced by ours
            write_file(remote, key, data, self.attempt)
            with self._state:
                if self._kept.get(key) is data:
                    del self._kept[key]
                self._state.notify_all()

    def _not_kept(self, key: str, why: str) -> None:
        self.ledger.write("not_kept", file=key, store=str(self.route.remote), error=why)
        self.outage.say(f"harness: warning: {key} is not in {self.route.remote}: {why}")

    def _look_after_origin(self, remote: Store) -> None:
        """Until the first commit nothing but the origin holds the run; and a newer attempt should be heard of early."""
        if (origin := self.origin) is None:
            return
        check_fence(remote, self.attempt)
        is_gone = not remote.exists(origin.key)
        with self._state:
            self.origin_is_gone = is_gone and self.origin is origin

    def _store(self) -> Store:
        return self.route.remote.patient(REQUEST_S, lambda: self._closing or self.clock() > self._give_up_at)

    def _upload(self, early: EarlyUpload, remote: Store) -> None:
        assert self.route.local is not None
        began, self._problem = self.clock(), ""
        try:
            manifest = replicate.send(self.route.local, early.key, early.chunks, lambda: self._committed(early), remote, self.attempt)
        except DamagedError as error:  # the run directory's copy: there is nothing to send
            name = early.key.rpartition("/")[2].removesuffix(".pt")
            self.forget([name])
            self._problem = f"{name} cannot be uploaded: {error.what}"
            self.ledger.write("not_uploaded", checkpoint=name, error=str(error))
            self.outage.say(f"harness: warning: {self._problem}")
            return
        if manifest is None:
            return
        with self._state:
            self._there.add(manifest.name)
            self._verified.add(manifest.name)
            self.step = max(manifest.step, self.step or 0)
            behind, self._behind_since = self._behind_since, None
            self._state.notify_all()
        self.upload_s = self.clock() - began
        seconds = round(self.upload_s, 2)
        self.ledger.write("uploaded", checkpoint=manifest.name, size_bytes=manifest.size_bytes, seconds=seconds)
        if behind:
            self.outage.say(f"harness: step {manifest.step} is in {self.route.remote}; nothing was uploaded since {behind}")
        self._send_events()
        self._let_go(remote)

    def _failed(self, error: StorageError) -> float:
        self.ledger.write("not_uploaded", error=str(error))
        with self._state:
            self._problem = " ".join(str(error).split("\n"))
            first, self._behind_since = self._behind_since is None, self._behind_since or time.strftime("%H:%M:%S")
        if first:
            stay = "training goes on" + (", checkpoints stay in run.dir" if self.route.local else "")
            self.outage.say(f"harness: warning: nothing can be uploaded since {self._behind_since}: {error.what} ({error.found}); {stay}")
        return AGAIN_S

    def _let_go(self, remote: Store) -> None:
        try:
            if gone := retention.apply(remote, self.attempt, self._verified, self.route.policy):
                self.ledger.write("deleted", names=gone, store=str(remote))
        except StorageError as error:
            self.ledger.write("not_deleted", error=str(error), store=str(remote))

    def _send_events(self) -> None:
        self._segment = self._segment or b"".join(self.ledger.take())  # the same bytes again: the last try may have arrived
        if self._segment:
            self._store().create(fmt.segment_key(self.attempt.number, self._segments + 1), self._segment, self.attempt.number)
            self._segments, self._segment = self._segments + 1, b""
        if self.steps:
            self.steps.send(self._store)
