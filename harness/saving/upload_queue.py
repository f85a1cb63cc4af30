"""The checkpoints that the remote store still lacks, in the order in which they are uploaded."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass

from harness.checkpoint import format as fmt
from harness.checkpoint import replicate
from harness.checkpoint.format import Manifest
from harness.checkpoint.retention import Policy
from harness.sharding.shard_uploads import ShardUploads
from harness.store import LocalStore, Store
from harness.store.staging_buffer import ReadLease


@dataclass(frozen=True)
class Route:
    """The source and the target of the uploads, and the retention policy of the target.

    Without a run directory (`local` is None) no checkpoints are copied, as they are committed in
    the remote store. Events, the step log and the user's files are still uploaded. Without
    `shards`, this process alone sends the shards of a checkpoint.
    """

    local: LocalStore | None
    remote: Store
    policy: Policy
    shards: ShardUploads | None = None


@dataclass
class EarlyUpload:
    """An upload that may begin before its checkpoint is committed in the run directory.

    `chunks` are the bytes in the staging buffer; they end when the buffer is needed again. Bytes
    that are missing are read from the run directory.
    """

    key: str
    size_bytes: int
    chunks: Iterable[bytes] = ()
    is_decided: bool = False  # True once the checkpoint is committed, or never will be
    is_final: bool = False  # the run is finished with it


class UploadQueue:
    """The checkpoints of the run directory that are still to be uploaded.

    Its methods may be called from any thread.

    Args:
        policy: the retention policy of the remote store.
        changed: the condition that is notified of each change, shared with the other threads that
            wait for one.
        is_on: whether checkpoints are copied at all; False without a run directory, as they are
            committed in the remote store then.
    """

    def __init__(self, policy: Policy, changed: threading.Condition, *, is_on: bool) -> None:
        self.is_closed = False
        self._policy, self._changed, self._is_on = policy, changed, is_on
        self._history: dict[str, Manifest] = {}
        self._there: set[str] = set()
        self._newest: Manifest | None = None
        self._early: EarlyUpload | None = None
        self._current: EarlyUpload | None = None  # the last result of `next`

    def begin(self, history: Collection[Manifest], there: Collection[Manifest]) -> None:
        """Set which checkpoints exist before the upload thread starts.

        Args:
            history: the checkpoints of the run's history that are in the run directory.
            there: the checkpoints that are in the remote store.
        """
        self._history = {m.name: m for m in history}
        self._there = {m.name for m in there}

    @contextlib.contextmanager
    def ahead(self, key: str, lease: ReadLease, *, is_final: bool = False) -> Iterator[None]:
        """Add a checkpoint that is being written to the run directory.

        The bytes come from the staging buffer. When the context ends, the checkpoint has been
        passed to `add` or will never be.

        Args:
            key: the key of the data file.
            lease: the read lease on the staging buffer.
            is_final: whether it is the last checkpoint of a run that is finished.
        """
        early = EarlyUpload(key, lease.size_bytes, lease.chunks(), is_final=is_final)
        with self._changed:
            self._early = early if self._is_on else None
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                early.is_decided = True
                self._changed.notify_all()

    def add(self, manifest: Manifest) -> None:
        """Add a committed checkpoint."""
        with self._changed:
            self._history[manifest.name] = self._newest = manifest
            if not self._is_on:
                self._there.add(manifest.name)
            self._changed.notify_all()

    def forget(self, names: Collection[str]) -> None:
        """Drop checkpoints whose copy in the run directory is deleted or damaged."""
        with self._changed:
            for name in names:
                self._history.pop(name, None)

    def arrived(self, manifest: Manifest) -> None:
        """Record that the remote store has a checkpoint."""
        with self._changed:
            self._there.add(manifest.name)
            self._changed.notify_all()

    def wanted(self) -> list[Manifest]:
        """Return the committed checkpoints that are still to be uploaded, the most urgent first."""
        with self._changed:
            return (
                replicate.wanted(list(self._history.values()), self._there, self._policy)
                if self._is_on
                else []
            )

    def pinned(self) -> set[str]:
        """Return the names of the checkpoints that are still to be uploaded, or are on the way."""
        with self._changed:
            current = {fmt.stem_of(self._current.key)} if self._current else set[str]()
            return current | {manifest.name for manifest in self.wanted()}

    @property
    def has_next(self) -> bool:
        """Return whether `next` has an upload to return, as far as is known."""
        with self._changed:
            return bool(self.wanted() or self._early)

    def next(self) -> EarlyUpload | None:
        """Return the next upload, or None: the newest checkpoint, even if not committed yet.

        The last checkpoint of a finished run comes last; see `replicate.wanted`. If others are
        missing, this waits until it is committed, because only then is it known which of them are
        still wanted.
        """
        with self._changed:
            self._current = self._next()
            return self._current

    def _next(self) -> EarlyUpload | None:
        with self._changed:
            early, self._early = self._early, None
            while early is not None and early.is_final and self.wanted():
                if early.is_decided or self.is_closed:
                    break
                self._changed.wait()
            first = next(iter(self.wanted()), None)
            if early is not None and (
                not early.is_decided or (first is not None and early.key == first.data_key)
            ):
                return early
            if first is None:
                return None
            return EarlyUpload(first.data_key, first.data.size_bytes, is_decided=True)

    def is_overtaken(self, early: EarlyUpload) -> bool:
        """Return whether another checkpoint is more urgent than the one that is being uploaded."""
        with self._changed:
            first = next(iter(self.wanted()), None)
            return early.is_decided and first is not None and first.data_key != early.key

    def committed(
        self, early: EarlyUpload, send_shards: Callable[[Manifest], None]
    ) -> Manifest | None:
        """Wait until the checkpoint is committed, or never will be; return its manifest or None.

        Returns None as well if the queue is closed. `send_shards` is called if it has shards.
        """
        with self._changed:
            while True:
                manifest = next(
                    (m for m in self._history.values() if m.data_key == early.key), None
                )
                if manifest is not None or early.is_decided or self.is_closed:
                    break
                self._changed.wait()
        if manifest is not None and manifest.shards:
            send_shards(manifest)
        return manifest

    @property
    def missing_newest(self) -> Manifest | None:
        """Return the newest checkpoint of this attempt if the remote store lacks it, else None."""
        newest = self._newest
        return None if newest is None or newest.name in self._there else newest

    def close(self) -> None:
        """Stop to wait for checkpoints that are not committed yet."""
        with self._changed:
            self.is_closed = True
            self._changed.notify_all()
