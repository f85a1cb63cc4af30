"""What every store is: the contract, and what its implementations share."""

from __future__ import annotations

import abc
import errno
import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

from blake3 import blake3

from harness.errors import HarnessError, StorageError
from harness.retry import RetryEvent

if TYPE_CHECKING:
    from harness.store.staging_buffer import StagingBuffer

CHUNK_BYTES = 4 << 20
TEMP = re.compile(r"^.+\.tmp-(?P<attempt>[0-9]+)-[0-9a-f]+\Z")
SET_ASIDE = ".damaged"


@dataclass(frozen=True)
class Entry:
    """One file of a store."""

    key: str
    size_bytes: int


class Seekable(io.RawIOBase):
    """Something of a known size as a file to read from anywhere; `span` gives the bytes of a range."""

    def __init__(self, size_bytes: int, span: Callable[[int, int], bytes]) -> None:
        self.size_bytes, self.span, self.at = size_bytes, span, 0
        self.failure: HarnessError | None = None  # torch.load hides it behind an error of its own

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        target = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size_bytes}[whence]
        if target < 0:
            raise OSError(errno.EINVAL, f"cannot seek to {target}")
        self.at = target
        return self.at

    def readinto(self, buffer: Any) -> int:
        end = self.end_for(len(buffer))
        if end <= self.at:
            return 0
        try:
            data = self.span(self.at, end)
        except HarnessError as error:
            self.failure = error
            raise
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)

    def end_for(self, wanted_bytes: int) -> int:
        """Where a read of so many bytes ends."""
        return min(self.at + wanted_bytes, self.size_bytes)


class Sink(io.RawIOBase):
    """A file being written: counts and digests what passes through, and appears under its key only on `commit`.

    It is a context manager: leaving the block without `commit`, or by an exception, leaves nothing behind.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self.size_bytes = 0
        self.failure: StorageError | None = None  # torch.save hides what `write` raises behind a RuntimeError of its own
        self._digest = blake3()

    def __enter__(self) -> Sink:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.discard()
        self.close()

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        """Append all of `data`, a bytes-like object; returns its length in bytes. Raises StorageError."""
        view = memoryview(data).cast("B")  # type: ignore[arg-type]
        try:
            self.take(view)
        except OSError as error:
            self.failure = in_words("write", self.key, error)
            raise self.failure from error
        except StorageError as error:
            self.failure = error
            raise
        self._digest.update(view)
        self.size_bytes += len(view)
        return len(view)

    def pour(self, image: StagingBuffer, write: Callable[[StagingBuffer, Path], str]) -> None:
        """Take an image as the whole of the file. `write(image, path)` writes it to a local file, and returns its digest; a file that
        is no local one takes it piece by piece. Raises StorageError."""
        for chunk in image.chunks():
            self.write(chunk)

    def digest(self) -> str:
        return f"blake3:{self._digest.hexdigest()}"

    def take(self, view: memoryview) -> None:
        """Keep all of `view`, which is valid during this call only."""
        raise NotImplementedError

    def commit(self, *, exclusive: bool = False) -> None:
        """Make what was written durable and let it appear under its key, `exclusive`ly if so asked.

        Raises FileExistsError when `exclusive` and the key is taken, StorageError on any other failure.
        """
        raise NotImplementedError

    def discard(self) -> None:
        """Leave nothing of an upload or a temporary file behind; after `commit` it does nothing. Raises nothing."""
        raise NotImplementedError


class Store(abc.ABC):
    """A place that keeps a run's files; see the package's docstring for what all of them promise."""

    is_local = False

    @abc.abstractmethod
    def where(self, key: str) -> str:
        """The path or URL of a key, for people. Raises StorageError for a key that leads out of the store."""

    def patient(self, limit_s: float, give_up: Callable[[], object] = lambda: None) -> Store:
        """The same store, with each request tried for `limit_s` seconds, or until `give_up` returns something true."""
        return self  # a disk is asked once

    def listen(self, on_trouble: Callable[[str, RetryEvent], object], on_success: Callable[[], object]) -> None:  # noqa: B027 - a disk has nothing to tell
        """Tell of each failure that is tried again, and of each request that worked, from whichever thread makes it."""

    @abc.abstractmethod
    def entries(self, folder: str) -> list[Entry]:
        """Every file directly in `folder`, sorted by key; links are not followed. Empty if there is no folder."""

    @abc.abstractmethod
    def exists(self, key: str) -> bool:
        """Whether there is a file under this key now."""

    @abc.abstractmethod
    def read(self, key: str) -> bytes:
        """The whole of a small file. Raises FileNotFoundError if it is not there."""

    def read_once(self, key: str) -> bytes:
        """As `read`, for a record that never changes: a store that takes long to ask may remember it."""
        return self.read(key)

    @abc.abstractmethod
    def open(self, key: str) -> BinaryIO:
        """Open for reading, for seeking too. Raises FileNotFoundError if it is not there or is not a regular file."""

    @abc.abstractmethod
    def chunks(self, key: str, start: int = 0) -> Iterator[bytes]:
        """A large file from `start` on, in order, piece by piece. Raises FileNotFoundError if it is not there."""

    @abc.abstractmethod
    def writer(self, key: str, attempt: int) -> Sink:
        """A context manager to write a file of any size; see `Sink`."""

    def write(self, key: str, data: bytes, attempt: int) -> None:
        """Write a small file whole, replacing what was there."""
        with self.writer(key, attempt) as sink:
            sink.write(data)
            sink.commit()

    @abc.abstractmethod
    def create(self, key: str, data: bytes, attempt: int) -> None:
        """Write a small file that must not exist yet. Raises FileExistsError if the key is taken by anything but `data`."""

    @abc.abstractmethod
    def delete(self, key: str) -> None:
        """Delete a file durably; one that is gone already is no error."""

    @abc.abstractmethod
    def set_aside(self, keys: Sequence[str]) -> None:
        """Take the files of a damaged checkpoint, manifest first, out of the run without losing them."""

    @abc.abstractmethod
    def prepare(self, folders: tuple[str, ...]) -> None:
        """Make the folders, durably. Only at the start of an attempt: a run directory that vanishes is not made anew."""

    @abc.abstractmethod
    def sweep(self, folders: tuple[str, ...], below_attempt: int) -> list[str]:
        """Delete the temporary files that attempts before `below_attempt` left; returns their keys."""


def delete_all(store: Store, keys: Sequence[str]) -> None:
    """Delete as many of these files as can be. Raises StorageError, the first, if one cannot."""
    failed = []
    for key in keys:
        try:
            store.delete(key)
        except StorageError as error:
            failed.append(error)
    if failed:
        raise failed[0]


def check_key(store: object, key: str) -> list[str]:
    """The parts of a key. Raises StorageError for one that leads out of the store."""
    parts = key.split("/")
    if not all(parts) or key.startswith("/") or any(part in (".", "..") for part in parts) or "\0" in key:
        raise StorageError(f"{store}: {key!r} is not a key of this store", remedy="Keys are relative paths without '..'.")
    return parts


def in_words(verb: str, what: str, error: OSError) -> StorageError:
    """What the medium said, and what to do about it."""
    return StorageError(f"cannot {verb} {what}: {error.strerror or error}", f"found: errno {error.errno}", REMEDY.get(error.errno or 0, ""))


REMEDY = {
    errno.ENOSPC: "The disk is full: free some space, or keep fewer checkpoints (checkpoint.keep_last).",
    errno.EDQUOT: "The quota is used up: free some space, or keep fewer checkpoints (checkpoint.keep_last).",
    errno.EROFS: "The file system is read-only: choose another run.dir, or mount it for writing.",
    errno.EACCES: "No permission: choose another run.dir, or ask for the right to write there.",
    errno.EPERM: "No permission: choose another run.dir, or ask for the right to write there.",
    errno.ENOTDIR: "A file is in the way of the folder: choose another run.dir.",
    errno.EIO: "The disk reports an error: see the system's log.",
}
