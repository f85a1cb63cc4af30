"""Report the uploads to the remote store: events, warnings and the words of the progress line."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection

from harness.checkpoint.format import Manifest
from harness.errors import DamagedError, StorageError
from harness.monitoring.event_log import EventLog
from harness.monitoring.store_health import StoreHealth
from harness.store import Store


class UploadStatus:
    """How far the uploads are, and why the last one has failed.

    Args:
        remote: Remote store, which messages name.
        event_log: Event log.
        store_health: Health of the remote store, which also prints warnings.
        changed: Condition under whose lock the status is changed.
        has_local: Whether checkpoints are in the run directory as well.
    """

    def __init__(
        self,
        remote: Store,
        event_log: EventLog,
        store_health: StoreHealth,
        changed: threading.Condition,
        *,
        has_local: bool,
    ) -> None:
        self.upload_s = 0.0  # how long the last upload took, in seconds
        self.problem = ""  # why the last upload failed; it is retried
        self._step: int | None = None  # the newest step in the remote store
        self._behind_since: str | None = None
        self._remote, self._event_log, self._store_health = remote, event_log, store_health
        self._changed, self._has_local = changed, has_local

    @property
    def status_line(self) -> str:
        """Return the state of the uploads, for the progress line."""
        if self._behind_since:
            return f"NOT UPLOADED since {self._behind_since}"
        return f"uploaded {self._step}" if self._step is not None else "nothing uploaded yet"

    def begin(self, there: Collection[Manifest]) -> None:
        """Set which checkpoints the remote store has before the upload thread starts."""
        self._step = max((m.step for m in there), default=None)

    def committed_there(self, step: int) -> None:
        """Record that a checkpoint was committed in the remote store itself."""
        self._step = step

    def upload_begins(self) -> None:
        """Drop the problem of the last upload."""
        self.problem = ""

    def arrived(self, step: int) -> str | None:
        """Record that a checkpoint was uploaded; return since when nothing was, or None."""
        with self._changed:
            self._step = max(step, self._step or 0)
            behind, self._behind_since = self._behind_since, None
        return behind

    def report_upload(self, manifest: Manifest, seconds: float, behind: str | None) -> None:
        """Write the event of an upload, and tell the user if it has ended an outage.

        Args:
            manifest: The checkpoint.
            seconds: How long the upload took.
            behind: What `arrived` has returned.
        """
        self.upload_s = seconds
        self._event_log.write(
            "uploaded",
            checkpoint=manifest.name,
            size_bytes=manifest.size_bytes,
            seconds=round(seconds, 2),
        )
        if behind:
            self._store_health.say(
                f"harness: step {manifest.step} is in {self._remote}; "
                f"nothing was uploaded since {behind}"
            )

    def report_damage(self, name: str, error: DamagedError) -> None:
        """Report that a checkpoint cannot be uploaded, as its copy here is damaged."""
        self.problem = f"{name} cannot be uploaded: {error.what}"
        self._event_log.write("not_uploaded", checkpoint=name, error=str(error))
        self._store_health.say(f"harness: warning: {self.problem}")

    def report_failure(self, error: StorageError) -> None:
        """Report a failed upload; only the first one of an outage is printed."""
        self._event_log.write("not_uploaded", error=str(error))
        with self._changed:
            self.problem = " ".join(str(error).split("\n"))
            is_first = self._behind_since is None
            self._behind_since = self._behind_since or time.strftime("%H:%M:%S")
        if is_first:
            stay = ", checkpoints stay in run.dir" if self._has_local else ""
            self._store_health.say(
                f"harness: warning: nothing can be uploaded since {self._behind_since}: "
                f"{error.what} ({error.found}); training goes on{stay}"
            )

    def caught_up(self) -> None:
        """Record that nothing is left to be sent."""
        self._behind_since = None
