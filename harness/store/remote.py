"""Store a run's files in an object store.

An object appears whole or not at all. There is no rename, and any request may fail, or succeed and
lose its reply. Every request goes through `RemoteStore.ask`, which retries transient errors and
converts the last error to a StorageError. The remaining operations are made safe as follows:

* `create` is one small conditional PUT. If its reply is lost, the client's second request finds the
  key taken by its own first request. The object is therefore read back, and the creation counts as
  successful if the bytes are identical (records hold a nonce).
* A large file is uploaded in parts, each with its checksum. Afterwards the object's size and
  checksum are compared: with the server's checksum where that is a checksum of the content, else by
  reading the object back.
* A file is read in parallel ranges. The reader of a checkpoint verifies the digest of the whole
  file.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import datetime
import functools
import io
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import BinaryIO, TypeVar

from harness.errors import HarnessError, StorageError
from harness.retry import RetryEvent, retrying
from harness.store.base import SET_ASIDE, Entry, Seekable, Store, check_key
from harness.store.bucket import MissingError, ObjectClient, ObjectMetadata, TakenError, Unfinished
from harness.store.explain import explained
from harness.store.remote_sink import RemoteSink

T = TypeVar("T")
RANGE_BYTES, READ_AHEAD, DELETED_AT_ONCE = 8 << 20, 6, 8
# The longest time that a single request may take, whatever the retry limit: a part of 8 MiB at
# 70 kB/s.
REQUEST_S = 120.0


def nothing(*ignored: object) -> None:
    """Do nothing: the default callback."""


class RemoteStore(Store):
    """A store in a prefix of a bucket, or in a folder of another remote file system.

    Args:
        url: URL of the prefix or folder.
        bucket: Client that performs the requests.
        limit_s: Retry limit of each request in seconds.
    """

    def __init__(self, url: str, bucket: ObjectClient, limit_s: float) -> None:
        self.url, self.bucket, self.limit_s = url.rstrip("/"), bucket, limit_s
        self.on_retry: Callable[[str, RetryEvent], object] = nothing
        self.on_success: Callable[[], object] = nothing
        self.give_up: Callable[[], object] = nothing
        self.drop: Callable[[], object] = nothing
        self.stop: Callable[[], object] = nothing  # see `together`
        self.first_failure: Callable[[StorageError], StorageError] = lambda failure: failure

    def __str__(self) -> str:
        return self.url

    def with_retry_limit(
        self,
        limit_s: float,
        give_up: Callable[[], object] = nothing,
        drop: Callable[[], object] = nothing,
    ) -> RemoteStore:
        """Return a copy of the store with another retry limit.

        The copy retries each request for `limit_s` seconds, or until `give_up` returns a true
        value. Once `drop` returns a true value, the upload of a file fails at once. The copy shares
        the client with the original.
        """
        twin = copy.copy(self)
        twin.limit_s, twin.give_up, twin.drop = limit_s, give_up, drop
        return twin

    def together(self) -> RemoteStore:
        """Return a copy that retries no request once one of its requests has failed.

        Requests that were given up for it raise that first failure: it says what went wrong, and
        whether another attempt can help. Call `stop` of the copy if no request is of use any more.
        """
        twin, stopped, failures = copy.copy(self), threading.Event(), list[StorageError]()

        def first_failure(failure: StorageError) -> StorageError:
            failures.append(self.first_failure(failure))  # of a copy of a copy, too
            stopped.set()
            return failures[0]

        twin.give_up = lambda: stopped.is_set() or self.give_up()
        twin.stop, twin.first_failure = stopped.set, first_failure
        return twin

    def listen(
        self, on_retry: Callable[[str, RetryEvent], object], on_success: Callable[[], object]
    ) -> None:
        """Set the callbacks for request failures that are retried and for requests that succeed.

        They are called from the thread that makes the request.
        """
        self.on_retry, self.on_success = on_retry, on_success

    def ask(self, verb: str, subject: str, request: Callable[[float], T]) -> T:
        """Make one request, with retries, and return its result.

        Args:
            verb: Name of the operation, for messages.
            subject: Name of the object, for messages.
            request: Function that makes the request within the given number of seconds.

        Raises:
            StorageError: The request failed permanently or until the retry limit. MissingError,
                TakenError and every HarnessError pass through.
        """
        try:
            result = retrying(
                lambda left_s: request(min(left_s, REQUEST_S)),
                self.limit_s,
                on_retry=lambda event: self.on_retry(f"{verb} {subject}", event),
                renew=self.bucket.renew,
                give_up=self.give_up,
            )
        except (MissingError, TakenError, HarnessError):
            raise
        except Exception as error:  # noqa: BLE001 - each client has error classes of its own
            failure = self.first_failure(explained(f"cannot {verb} {subject}", error))
            raise failure from failure.__cause__ or error  # another request's has its own
        self.on_success()
        return result

    def where(self, key: str) -> str:
        """Return the URL of a key, for messages.

        Raises:
            StorageError: The key leads out of the store.
        """
        check_key(self, key)
        return f"{self.url}/{key}"

    def entries(self, folder: str) -> list[Entry]:
        """Return every object directly in `folder`, sorted by key."""
        return self.listing(folder)[0]

    def listing(self, folder: str) -> tuple[list[Entry], list[str]]:
        """Return the objects directly in `folder`, and the keys of its folders, both sorted."""
        where, objects, token = self.where(folder), list[ObjectMetadata](), None
        while True:
            page, token = self.ask(
                "list", where, functools.partial(self.bucket.list_page, folder, token)
            )
            objects += page
            if token is None:
                break
        found = sorted(objects, key=lambda metadata: metadata.key)
        files = [Entry(o.key, o.size_bytes) for o in found if not o.key.endswith("/")]
        return files, [o.key.rstrip("/") for o in found if o.key.endswith("/")]

    def drop_folder(self, folder: str) -> None:
        """Delete a folder if it is there and empty; a bucket has none."""
        self.ask("delete", self.where(folder), functools.partial(self.bucket.drop_folder, folder))

    def head(self, key: str) -> ObjectMetadata | None:
        """Return the metadata of an object, or None if it does not exist."""
        return self.ask("look up", self.where(key), functools.partial(self.bucket.head, key))

    def exists(self, key: str) -> bool:
        """Return whether there is an object under this key now."""
        return self.head(key) is not None

    def read(self, key: str) -> bytes:
        """Return the content of a small object. Raises MissingError if it does not exist."""
        return self.ask("read", self.where(key), functools.partial(self.bucket.get, key, 0, None))

    def span(self, metadata: ObjectMetadata, start: int, end: int) -> bytes:
        """Return the bytes of one version of an object from `start` up to, excluding, `end`.

        Raises:
            ChangedError: The key holds another version by now. This is detected only if the server
                reports a version of the object.
        """
        key = metadata.key

        def request(left_s: float) -> bytes:
            data = self.bucket.get(key, start, end, left_s, metadata.version)
            if len(data) != end - start:
                raise ConnectionError(f"found: {len(data)} bytes, expected: {end - start}")
            return data

        data = self.ask("read", self.where(key), request)
        if metadata.version:
            self.ask(
                "read",
                self.where(key),
                functools.partial(self.bucket.check_version, key, metadata.version),
            )
        return data

    def open(self, key: str) -> BinaryIO:
        """Open an object for reading and seeking. Raises MissingError if it does not exist."""
        metadata = self.head(key)
        if metadata is None:
            raise MissingError(self.where(key))
        return io.BufferedReader(RangeFile(self, metadata), buffer_size=1 << 17)

    def chunks(self, key: str, start: int = 0) -> Iterator[bytes]:
        """Yield the content of an object from offset `start` on, in order, in chunks of 8 MiB.

        Raises:
            MissingError: The object does not exist.
        """
        metadata = self.head(key)
        if metadata is None:
            raise MissingError(self.where(key))
        yield from self.spans(
            metadata,
            [
                (at, min(at + RANGE_BYTES, metadata.size_bytes))
                for at in range(start, metadata.size_bytes, RANGE_BYTES)
            ],
        )

    def spans(self, metadata: ObjectMetadata, ranges: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        """Yield ranges of an object in order, with up to `READ_AHEAD` requests in flight."""
        ahead: collections.deque[Future[bytes]] = collections.deque()
        store = self.together()
        with ThreadPoolExecutor(READ_AHEAD, thread_name_prefix="download") as pool:
            try:
                for start, end in ranges:
                    ahead.append(pool.submit(store.span, metadata, start, end))
                    if len(ahead) == READ_AHEAD:
                        yield ahead.popleft().result()
                while ahead:
                    yield ahead.popleft().result()
            finally:
                store.stop()  # the caller may have left early
                for future in ahead:
                    future.cancel()

    def writer(self, key: str, attempt: int) -> RemoteSink:
        """Return a context manager that uploads an object of any size."""
        return RemoteSink(self, key)

    def create(self, key: str, data: bytes, attempt: int) -> None:
        """Upload a small object that must not exist yet, in one conditional PUT.

        Raises:
            TakenError: The key is taken, and the object is not identical to `data`.
        """
        try:
            self.ask(
                "create", self.where(key), lambda left_s: self.bucket.put(key, data, True, left_s)
            )
        except TakenError:
            try:
                is_ours = self.read(key) == data  # created by a first request whose reply was lost
            except MissingError:
                is_ours = False
            if not is_ours:
                raise

    def delete(self, *keys: str) -> None:
        """Delete objects, several at a time; an object that does not exist is no error."""

        def delete(key: str) -> None:
            with contextlib.suppress(MissingError):
                self.ask("delete", self.where(key), functools.partial(self.bucket.delete, key))

        if len(keys) == 1:
            delete(*keys)
            return
        with ThreadPoolExecutor(DELETED_AT_ONCE) as pool:
            list(pool.map(delete, keys))

    def set_aside(self, keys: Sequence[str]) -> None:
        """Write a mark next to the first key, which makes this copy the last choice on a resume.

        The objects themselves are kept: an object that this machine read as damaged may be intact
        when it is read elsewhere.
        """
        check_key(self, keys[0])
        mark = json.dumps(
            {"damaged": keys[0], "time": datetime.datetime.now(datetime.timezone.utc).isoformat()}
        )
        self.write(keys[0] + SET_ASIDE, mark.encode(), 0)

    def lift_mark(self, key: str) -> None:
        """Remove the mark next to a key, if there is one.

        Where a bucket keeps versions, each delete of what is not there would add one: look first.
        """
        if self.exists(key + SET_ASIDE):
            self.delete(key + SET_ASIDE)

    def prepare(self, folders: tuple[str, ...]) -> None:
        """Do nothing: an object store has no folders to create."""

    def sweep(self, folders: tuple[str, ...], below_attempt: int) -> list[str]:
        """Return an empty list: an object store has no temporary files.

        Unfinished uploads are left to `harness prune`, since the process that began one may still
        run on another machine.
        """
        return []

    def unfinished(self) -> list[Unfinished]:
        """Return the uploads under this prefix that were never completed."""
        return self.ask("list the uploads of", self.url, self.bucket.unfinished)

    def abort(self, upload: Unfinished) -> None:
        """Abort an upload that was never completed, and free its stored parts."""
        self.ask(
            "abort the upload of",
            self.where(upload.key),
            functools.partial(self.bucket.abort, upload.key, upload.id),
        )

    def now(self) -> datetime.datetime:
        """Return the time of the server's clock."""
        return self.ask("reach", self.url, self.bucket.now)


class RangeFile(Seekable):
    """A read-only, seekable file over one version of an object."""

    def __init__(self, store: RemoteStore, metadata: ObjectMetadata) -> None:
        super().__init__(metadata.size_bytes, lambda start, end: store.span(metadata, start, end))
        self.store, self.metadata = store, metadata

    def spans(self, ranges: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        """Yield ranges of the object in order, with several requests in flight."""
        return self.store.spans(self.metadata, ranges)

    def readall(self) -> bytes:
        """Return the bytes from the current offset to the end, read in ranges of 8 MiB."""
        starts = range(self.at, self.size_bytes, RANGE_BYTES)
        data = b"".join(self.span(at, min(at + RANGE_BYTES, self.size_bytes)) for at in starts)
        self.at += len(data)
        return data
