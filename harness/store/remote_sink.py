"""A file on its way to a remote store: parts, and their end."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, TypeVar

from blake3 import blake3

from harness.errors import StorageError
from harness.store.base import Sink
from harness.store.bucket import MissingError, Part

if TYPE_CHECKING:
    from harness.store.remote import RemoteStore

T = TypeVar("T")
DROP_S = 0.1  # how often a wait for a part checks whether the upload is dropped
# Parts kept in memory in addition to those in flight, so that a slow part does not stall the rest.
READY = 2


def _as_bytes(piece: memoryview) -> bytes:
    """Return the view as bytes, without a copy if it covers a whole bytes object."""
    return (
        piece.obj if isinstance(piece.obj, bytes) and len(piece.obj) == len(piece) else bytes(piece)
    )


class RemoteSink(Sink):
    """An upload of one object.

    A small file is sent in one request, a large one in parallel parts. Memory holds only the parts
    in flight, `READY` further parts, and the part being filled.
    """

    def __init__(self, store: RemoteStore, key: str) -> None:
        super().__init__(key)
        self.store, self.where = store.together(), store.where(key)
        self._buffer = bytearray()
        self._upload: str | None = None
        self._parts: list[Future[Part]] = []
        self._pool: ThreadPoolExecutor | None = None
        self._done = False

    def take(self, view: memoryview) -> None:
        """Buffer the bytes of `view` and send each part that is full."""
        while len(view):
            part_bytes = self.store.bucket.part_bytes(len(self._parts) + 1, self.expected_bytes)
            wanted = part_bytes - len(self._buffer)
            piece, view = view[:wanted], view[wanted:]
            if self._buffer or len(piece) < wanted:
                self._buffer += piece
            if len(piece) == wanted:
                self._send(bytes(self._buffer) if self._buffer else _as_bytes(piece))
                self._buffer.clear()

    def _send(self, data: bytes) -> None:
        """Queue one part for upload; begin the multipart upload before the first part."""
        bucket = self.store.bucket
        if self._upload is None:
            self._upload = self.store.ask(
                "begin to upload", self.where, functools.partial(bucket.begin, self.key)
            )
        if len(self._parts) >= (most := bucket.parallel + READY):
            # Limit the parts in memory, and raise the error of a failed part early.
            self._result(self._parts[-most])
        send = functools.partial(bucket.part, self.key, self._upload, len(self._parts) + 1, data)
        self._parts.append(self._submit("upload a part of", send))

    def _submit(self, verb: str, request: Callable[[float], T]) -> Future[T]:
        """Make a request in the background, so that it need not be waited for."""
        if self._pool is None:
            parallel = self.store.bucket.parallel
            self._pool = ThreadPoolExecutor(parallel, thread_name_prefix="upload")
        return self._pool.submit(self.store.ask, verb, self.where, request)

    def _result(self, sent: Future[T]) -> T:
        """Wait for a request that sends data and return its result.

        Raises StorageError, also if the upload is dropped, or is gone: then all of the file must be
        sent again.
        """
        while not wait([sent], DROP_S).done:
            if self.store.drop():
                raise StorageError(f"the upload of {self.where} was dropped")
        try:
            return sent.result()
        except MissingError as error:
            raise StorageError(f"the upload of {self.where} is gone", f"found: {error}") from error

    def commit(self, *, exclusive: bool = False) -> None:
        """Complete the upload and verify the object.

        Args:
            exclusive: Fail if an object exists under the key. Only possible for a small file.

        Raises:
            TakenError: `exclusive` is set and the key is taken.
            StorageError: The upload failed, the object differs from the data, or the file is too
                large to be created exclusively.
        """
        bucket = self.store.bucket
        if self._upload is None:
            data = bytes(self._buffer)
            tag = self._result(
                self._submit("upload", lambda left_s: bucket.put(self.key, data, exclusive, left_s))
            )
        else:
            if exclusive:
                raise StorageError(
                    f"{self.where} is too large to be created exclusively",
                    f"found: {self.size_bytes} bytes",
                )
            if self._buffer:
                self._send(bytes(self._buffer))
            tag = self._complete(self._upload, [self._result(part) for part in self._parts])
        self._check_arrived(tag)
        self._done = True

    def _complete(self, upload: str, parts: list[Part]) -> str:
        """Complete the multipart upload and return the tag that the object should have."""
        bucket = self.store.bucket
        try:
            return self.store.ask(
                "complete the upload of",
                self.where,
                lambda left_s: bucket.complete(self.key, upload, parts, left_s),
            )
        except MissingError:
            # The upload was completed by a first request whose reply was lost, or it was aborted.
            # `_check_arrived` finds out which.
            return bucket.tag_of(parts)

    def _check_arrived(self, tag: str) -> None:
        """Compare the stored object with the data that was sent.

        The size and the server's tag are compared if the client reports tags that can be compared.
        Otherwise, or if only the tags differ, the object is read back and its digest is compared.

        Raises:
            StorageError: The object is missing or differs.
        """
        metadata = self.store.head(self.key)
        if (
            metadata is not None
            and metadata.size_bytes == self.size_bytes
            and metadata.tag in (tag, "")
            and self.store.bucket.tells_tags
        ):
            return
        digest = blake3()
        if metadata is not None and metadata.size_bytes == self.size_bytes:
            with contextlib.suppress(MissingError):  # deleted since
                for chunk in self.store.chunks(self.key):
                    digest.update(chunk)
        if f"blake3:{digest.hexdigest()}" != self.digest():
            raise StorageError(
                f"{self.where} did not arrive as it was sent",
                f"found: {metadata.size_bytes if metadata else 'no'} bytes, "
                f"expected: {self.size_bytes} with {self.digest()}",
            )

    def discard(self) -> None:
        """Wait for the parts in flight and abort an upload that was not committed.

        The parts of an upload that is dropped are not waited for. The server refuses those that
        arrive after the upload was aborted.
        """
        if self._pool is not None:
            self.store.stop()  # no part is of use any more
            self._pool.shutdown(wait=not self.store.drop(), cancel_futures=True)
        if self._upload is not None and not self._done:
            try:
                abort = functools.partial(self.store.bucket.abort, self.key, self._upload)
                self.store.with_retry_limit(min(self.store.limit_s, 5.0)).ask(
                    "abort the upload of", self.where, abort
                )
            except (StorageError, MissingError):
                # The first error is the one to report. `harness prune` finds the remaining upload.
                pass
        self._done = True
        self._buffer.clear()
