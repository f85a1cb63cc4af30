"""An object store: each object appears whole or not at all; there is no rename, and any request may fail or seem to.

Every request goes through `RemoteStore.ask`: tried again while that may help, its last error put in words. What makes the rest safe:

* `create` is one small conditional PUT. When its reply is lost, the client's second try finds the key taken, by itself: so what is
  there is read back, and counts as ours if it is ours to the byte (records hold a nonce).
* A large file goes in parts, each with its checksum. Afterwards the object's size and checksum are compared, by the server's
  checksum where that is one of the content, else by reading it back.
* A file is read in parallel ranges; who reads a checkpoint compares the whole's digest.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import datetime
import functools
import io
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import BinaryIO, TypeVar

from blake3 import blake3

from harness.errors import HarnessError, StorageError
from harness.retry import RetryEvent, retrying
from harness.store.base import SET_ASIDE, Entry, Seekable, Sink, Store, check_key
from harness.store.bucket import Found, MissingError, ObjectClient, Part, TakenError, Unfinished
from harness.store.explain import explained

T = TypeVar("T")
RANGE_BYTES, READ_AHEAD = 8 << 20, 6
READY = 2  # parts in memory beside those on their way: one that takes long must not hold up the others
REQUEST_S = 120.0  # the longest that a single request may take, however patient we are: a part of 8 MiB at 70 kB/s


def nothing(*ignored: object) -> None:
    """Who needs not be told."""


class RemoteStore(Store):
    """A prefix in a bucket, or a folder of another remote file system."""

    def __init__(self, url: str, bucket: ObjectClient, limit_s: float) -> None:
        self.url, self.bucket, self.limit_s = url.rstrip("/"), bucket, limit_s
        self.on_trouble: Callable[[str, RetryEvent], object] = nothing
        self.on_success: Callable[[], object] = nothing
        self.give_up: Callable[[], object] = nothing
        self._records: dict[str, bytes] = {}

    def __str__(self) -> str:
        return self.url

    def patient(self, limit_s: float, give_up: Callable[[], object] = nothing) -> RemoteStore:
        twin = copy.copy(self)
        twin.limit_s, twin.give_up = limit_s, give_up
        return twin

    def listen(self, on_trouble: Callable[[str, RetryEvent], object], on_success: Callable[[], object]) -> None:
        self.on_trouble, self.on_success = on_trouble, on_success

    def ask(self, verb: str, what: str, request: Callable[[float], T]) -> T:
        """Make one request, again if need be. Raises StorageError; MissingError and TakenError pass through."""
        try:
            result = retrying(
                lambda left_s: request(min(left_s, REQUEST_S)),
                self.limit_s,
                on_trouble=lambda trouble: self.on_trouble(f"{verb} {what}", trouble),
                renew=self.bucket.renew,
                give_up=self.give_up,
            )
        except (MissingError, TakenError, HarnessError):
            raise
        except Exception as error:  # every library below has errors of its own kind
            raise explained(f"cannot {verb} {what}", error) from error
        self.on_success()
        return result

    def where(self, key: str) -> str:
        check_key(self, key)
        return f"{self.url}/{key}"

    def entries(self, folder: str) -> list[Entry]:
        where, found, token = self.where(folder), list[Found](), None
        while True:
            page, token = self.ask("list", where, functools.partial(self.bucket.list_page, folder, token))
            found += page
            if token is None:
                break
        return sorted((Entry(o.key, o.size_bytes) for o in found if not o.key.endswith("/")), key=lambda entry: entry.key)

    def head(self, key: str) -> Found | None:
        """What the server tells of an object, or None."""
        return self.ask("look up", self.where(key), functools.partial(self.bucket.head, key))

    def exists(self, key: str) -> bool:
        return self.head(key) is not None

    def read(self, key: str) -> bytes:
        return self.ask("read", self.where(key), functools.partial(self.bucket.get, key, 0, None))

    def read_once(self, key: str) -> bytes:
        if key not in self._records:
            self._records[key] = self.read(key)
        return self._records[key]

    def span(self, found: Found, start: int, end: int) -> bytes:
        """The bytes from `start` to before `end` of this very object. Raises ChangedError, where the server tells, for another one."""
        key = found.key

        def request(left_s: float) -> bytes:
            data = self.bucket.get(key, start, end, left_s, found.version)
            if len(data) != end - start:
                raise ConnectionError(f"found: {len(data)} bytes, expected: {end - start}")
            return data

        data = self.ask("read", self.where(key), request)
        if found.version:
            self.ask("read", self.where(key), functools.partial(self.bucket.check_version, key, found.version))
        return data

    def open(self, key: str) -> BinaryIO:
        found = self.head(key)
        if found is None:
            raise MissingError(self.where(key))
        return io.BufferedReader(RangeFile(self, found), buffer_size=1 << 17)

    def chunks(self, key: str, start: int = 0) -> Iterator[bytes]:
        found = self.head(key)
        if found is None:
            raise MissingError(self.where(key))
        yield from self.spans(found, [(at, min(at + RANGE_BYTES, found.size_bytes)) for at in range(start, found.size_bytes, RANGE_BYTES)])

    def spans(self, found: Found, ranges: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        """Ranges of an object, in order, several on their way at once."""
        ahead: collections.deque[Future[bytes]] = collections.deque()
        with ThreadPoolExecutor(READ_AHEAD, thread_name_prefix="download") as pool:
            try:
                for start, end in ranges:
                    ahead.append(pool.submit(self.span, found, start, end))
                    if len(ahead) == READ_AHEAD:
                        yield ahead.popleft().result()
                while ahead:
                    yield ahead.popleft().result()
            finally:
                for future in ahead:
                    future.cancel()

    def writer(self, key: str, attempt: int) -> RemoteSink:
        return RemoteSink(self, key)

    def create(self, key: str, data: bytes, attempt: int) -> None:
        try:
            self.ask("create", self.where(key), lambda left_s: self.bucket.put(key, data, True, left_s))
        except TakenError:
            try:
                is_ours = self.read(key) == data  # our own first try, whose reply was lost
            except MissingError:
                is_ours = False
            if not is_ours:
                raise

    def delete(self, key: str) -> None:
        with contextlib.suppress(MissingError):
            self.ask("delete", self.where(key), functools.partial(self.bucket.delete, key))

    def set_aside(self, keys: Sequence[str]) -> None:
        """A remote copy is marked: the mark says that it is the last choice. What was seen broken here may be whole elsewhere."""
        check_key(self, keys[0])
        mark = json.dumps({"damaged": keys[0], "time": datetime.datetime.now(datetime.timezone.utc).isoformat()})
        self.write(keys[0] + SET_ASIDE, mark.encode(), 0)

    def prepare(self, folders: tuple[str, ...]) -> None:
        """There are no folders to make."""

    def sweep(self, folders: tuple[str, ...], below_attempt: int) -> list[str]:
        """There are no temporary files; what uploads left behind is for `harness prune`, as its owner may be alive elsewhere."""
        return []

    def unfinished(self) -> list[Unfinished]:
        """The uploads under this prefix that were never completed."""
        return self.ask("list the uploads of", self.url, self.bucket.unfinished)

    def abort(self, upload: Unfinished) -> None:
        """End an upload that was never completed, and free what it holds."""
        self.ask("abort the upload of", self.where(upload.key), functools.partial(self.bucket.abort, upload.key, upload.id))

    def now(self) -> datetime.datetime:
        """The server's clock."""
        return self.ask("reach", self.url, self.bucket.now)


class RangeFile(Seekable):
    """An object as a file to read from anywhere."""

    def __init__(self, store: RemoteStore, found: Found) -> None:
        super().__init__(found.size_bytes, lambda start, end: store.span(found, start, end))
        self.store, self.found = store, found

    def spans(self, ranges: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        """Ranges of it, in order, several on their way at once."""
        return self.store.spans(self.found, ranges)

    def readall(self) -> bytes:
        starts = range(self.at, self.size_bytes, RANGE_BYTES)
        data = b"".join(self.span(at, min(at + RANGE_BYTES, self.size_bytes)) for at in starts)
        self.at += len(data)
        return data


def _as_bytes(piece: memoryview) -> bytes:
    """Without a copy, if it is a view of all of them."""
    return piece.obj if isinstance(piece.obj, bytes) and len(piece.obj) == len(piece) else bytes(piece)


class RemoteSink(Sink):
    """An upload: one request for a small file, parts in parallel for a large one, never more of it in memory than is on its way."""

    def __init__(self, store: RemoteStore, key: str) -> None:
        super().__init__(key)
        self.store, self.where = store, store.where(key)
        self._buffer = bytearray()
        self._upload: str | None = None
        self._parts: list[Future[Part]] = []
        self._pool: ThreadPoolExecutor | None = None
        self._done = False

    def take(self, view: memoryview) -> None:
        while len(view):
            wanted = self.store.bucket.part_bytes(len(self._parts) + 1) - len(self._buffer)
            piece, view = view[:wanted], view[wanted:]
            if self._buffer or len(piece) < wanted:
                self._buffer += piece
            if len(piece) == wanted:
                self._send(bytes(self._buffer) if self._buffer else _as_bytes(piece))
                self._buffer.clear()

    def _send(self, data: bytes) -> None:
        bucket = self.store.bucket
        if self._upload is None:
            self._upload = self.store.ask("begin to upload", self.where, functools.partial(bucket.begin, self.key))
            self._pool = ThreadPoolExecutor(bucket.parallel, thread_name_prefix="upload")
        assert self._pool is not None
        if len(self._parts) >= (most := bucket.parallel + READY):
            self._parts[-most].result()  # wait until there is room, and hear of an error at once
        send = functools.partial(bucket.part, self.key, self._upload, len(self._parts) + 1, data)
        self._parts.append(self._pool.submit(self.store.ask, "upload a part of", self.where, send))

    def commit(self, *, exclusive: bool = False) -> None:
        bucket = self.store.bucket
        if self._upload is None:
            data = bytes(self._buffer)
            tag = self.store.ask("upload", self.where, lambda left_s: bucket.put(self.key, data, exclusive, left_s))
        else:
            if exclusive:
                raise StorageError(f"{self.where} is too large to be created exclusively", f"found: {self.size_bytes} bytes")
            if self._buffer:
                self._send(bytes(self._buffer))
            tag = self._complete(self._upload, [part.result() for part in self._parts])
        self._check_arrived(tag)
        self._done = True

    def _complete(self, upload: str, parts: list[Part]) -> str:
        bucket = self.store.bucket
        try:
            return self.store.ask("complete the upload of", self.where, lambda left_s: bucket.complete(self.key, upload, parts, left_s))
        except MissingError:  # done by our own first try, whose reply was lost; or gone: what has arrived will tell
            return bucket.tag_of(parts)

    def _check_arrived(self, tag: str) -> None:
        found = self.store.head(self.key)
        if found is not None and found.size_bytes == self.size_bytes and found.tag in (tag, "") and self.store.bucket.tells_tags:
            return
        digest = blake3()
        if found is not None and found.size_bytes == self.size_bytes:
            for chunk in self.store.chunks(self.key):
                digest.update(chunk)
        if f"blake3:{digest.hexdigest()}" != self.digest():
            raise StorageError(
                f"{self.where} did not arrive as it was sent",
                f"found: {found.size_bytes if found else 'no'} bytes, expected: {self.size_bytes} with {self.digest()}",
            )

    def discard(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        if self._upload is not None and not self._done:
            try:
                abort = functools.partial(self.store.bucket.abort, self.key, self._upload)
                self.store.patient(min(self.store.limit_s, 5.0)).ask("abort the upload of", self.where, abort)
            except (StorageError, MissingError):  # the first error is the one to report; `harness prune` finds what stays
                pass
        self._done = True
        self._buffer.clear()
