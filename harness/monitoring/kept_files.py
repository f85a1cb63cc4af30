"""The user's files: write one to a store, and queue them for their upload."""

from __future__ import annotations

import math
import threading
import time

from harness.checkpoint import format as fmt
from harness.checkpoint.attempts import Attempt, check_fence
from harness.errors import UsageError
from harness.monitoring.event_log import EventLog
from harness.monitoring.store_health import StoreHealth
from harness.store import Store

FENCE_S = 1.0  # interval at which the files of a run directory check for a newer attempt
MOST_KEPT_BYTES = 64 << 20  # limit of the files that are queued, as in an outage


def check_file(name: fmt.FileName, data: object, *, in_loop: bool) -> None:
    """Check the arguments of `Run.keep`, and that it is called while the loop runs.

    Raises:
        UsageError: The call is outside the loop, or the data is not bytes.
    """
    if not in_loop:
        raise UsageError(
            f"keep({name!r}) came outside the loop",
            remedy="Keep files between the first batch and the last.",
        )
    if not isinstance(data, bytes):
        raise UsageError(
            f"keep({name!r}) takes bytes", f"found: {type(data).__name__}", "Text: text.encode()."
        )


def write_file(
    store: Store, key: str, data: bytes, attempt: Attempt, swept: set[str] | None = None
) -> None:
    """Write one of the user's files to a store; create its folder in a run directory.

    A sweep of the folder lists it all, and a program may keep a file in each step.

    Args:
        store: The run directory or the remote store.
        key: The key of the file.
        data: The content of the file.
        attempt: The attempt that writes.
        swept: Folders that this attempt has swept already; the file's is added.

    Raises:
        StorageError: The file cannot be written.
    """
    swept = set() if swept is None else swept
    # A run directory that has vanished is not created again.
    if store.is_local and store.exists(fmt.attempt_key(attempt.number)):
        folders = (key.rpartition("/")[0],)
        store.prepare(folders)
        if not swept.issuperset(folders):
            store.sweep(folders, attempt.number)
            swept.update(folders)
    store.write(key, data, attempt.number)


class DirectoryFiles:
    """The user's files in the run directory, which are written at once.

    Args:
        store: The run's first store; if it is a remote store, nothing is written.
    """

    def __init__(self, store: Store) -> None:
        self._store, self._checked_at, self._swept = store, -math.inf, set[str]()

    def write(self, key: str, data: bytes, attempt: Attempt) -> None:
        """Write a file, unless a newer attempt has begun, whose files must not be replaced.

        That is checked at most once in `FENCE_S` seconds: a program may keep a file in each step,
        and the check lists all attempts. The clock goes on while the process or its machine is
        frozen, so that a process that wakes checks at once.

        Raises:
            SupersededError: A newer attempt has begun.
            StorageError: The attempts cannot be listed, or the file cannot be written.
        """
        if not self._store.is_local:
            return
        if time.clock_gettime(time.CLOCK_BOOTTIME) - self._checked_at >= FENCE_S:
            check_fence(self._store, attempt)
            self._checked_at = time.clock_gettime(time.CLOCK_BOOTTIME)
        write_file(self._store, key, data, attempt, self._swept)


class KeptFiles:
    """The user's files that wait for their upload, the oldest first.

    Only this process holds them, so no later start can send them.

    Args:
        remote: Remote store.
        attempt: Attempt that writes the files.
        event_log: Event log.
        store_health: Health of the remote store, which also prints warnings.
        changed: Condition that is notified when a file was sent.
    """

    def __init__(
        self,
        remote: Store,
        attempt: Attempt,
        event_log: EventLog,
        store_health: StoreHealth,
        changed: threading.Condition,
    ) -> None:
        self._remote, self._attempt, self._event_log = remote, attempt, event_log
        self._store_health, self._changed = store_health, changed
        self._waiting: dict[str, bytes] = {}

    @property
    def is_empty(self) -> bool:
        """Return whether no file is waiting."""
        return not self._waiting

    @property
    def _size_bytes(self) -> int:
        return sum(map(len, self._waiting.values()))

    def add(self, key: str, data: bytes) -> None:
        """Queue a file.

        The queue holds the newest data of each name. If it grows beyond MOST_KEPT_BYTES, the oldest
        files are dropped and reported.
        """
        with self._changed:
            self._waiting.pop(key, None)
            self._waiting[key] = data
            while len(self._waiting) > 1 and self._size_bytes > MOST_KEPT_BYTES:
                oldest = next(iter(self._waiting))
                del self._waiting[oldest]
                self._not_kept(oldest, "too much is waiting to be sent")

    def send_oldest(self, remote: Store) -> None:
        """Send one file; called by the upload thread while the queue is not empty.

        Args:
            remote: The remote store, with the retry limit of the upload thread.

        Raises:
            StorageError: The file cannot be sent; it stays in the queue.
            SupersededError: A newer attempt has begun.
        """
        with self._changed:
            key, data = next(iter(self._waiting.items()))
        check_fence(remote, self._attempt)  # do not replace a newer attempt's file
        write_file(remote, key, data, self._attempt)
        with self._changed:
            if self._waiting.get(key) is data:
                del self._waiting[key]
            self._changed.notify_all()

    def report_unsent(self, why: str) -> None:
        """Report each file that is still waiting as not sent."""
        for key in list(self._waiting):
            self._not_kept(key, why)

    def _not_kept(self, key: str, why: str) -> None:
        self._event_log.write("not_kept", file=key, store=str(self._remote), error=why)
        self._store_health.say(f"harness: warning: {key} is not in {self._remote}: {why}")
