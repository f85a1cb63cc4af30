"""Define the store interface and the parts that all stores share."""

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
# The name of a temporary file carries the number of the attempt that wrote it.
TEMP = re.compile(r"^.+\.tmp-(?P<attempt>[0-9]+)-[0-9a-f]+\Z")
SET_ASIDE = ".damaged"  # suffix of a damaged file, or of the mark for one


@dataclass(frozen=True)
class Entry:
    """One file of a store."""

    key: str
    size_bytes: int


class Seekable(io.RawIOBase):
    """A read-only, seekable file of known size.

    Args:
        size_bytes: Size of the file in bytes.
        span: Function that returns the bytes from a start offset up to, excluding, an end offset.
    """

    def __init__(self, size_bytes: int, span: Callable[[int, int], bytes]) -> None:
        self.size_bytes, self.span, self.at = size_bytes, span, 0
        # Keep the original error: torch.load replaces it with an error of its own.
        self.failure: HarnessError | None = None

    def readable(self) -> bool:
        """Return True: the file can be read."""
        return True

    def seekable(self) -> bool:
        """Return True: the file can be read from any offset."""
        return True

    def tell(self) -> int:
        """Return the current offset in bytes."""
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to an offset and return it. Raises OSError if it would be negative."""
        target = (
            offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size_bytes}[whence]
        )
        if target < 0:
            raise OSError(errno.EINVAL, f"cannot seek to {target}")
        self.at = target
        return self.at

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` from the current offset and return the number of bytes read, 0 at the end.

        A HarnessError of `span` is also kept in `failure`.
        """
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
        """Return the offset at which a read of `wanted_bytes` bytes ends."""
        return min(self.at + wanted_bytes, self.size_bytes)


class Sink(io.RawIOBase):
    """A file being written, which appears under its key only on `commit`.

    The sink counts the bytes written and computes their BLAKE3 digest. It is a context manager:
    leaving the block without `commit`, or by an exception, leaves nothing behind.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self.size_bytes = 0
        self.expected_bytes = 0  # see `expect`
        # Keep the original error: torch.save replaces it with a RuntimeError of its own.
        self.failure: StorageError | None = None
        self._digest = blake3()

    def __enter__(self) -> Sink:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.discard()
        self.close()

    def writable(self) -> bool:
        """Return True: the file can be written."""
        return True

    def expect(self, size_bytes: int) -> None:
        """Take the size that the file will have, which allows parts of one size; before a write."""
        self.expected_bytes = size_bytes

    def write(self, data: object) -> int:
        """Append all of `data`, a bytes-like object, and return its length in bytes.

        Raises:
            StorageError: The data cannot be written; the error is also kept in `failure`.
        """
        view = memoryview(data).cast("B")  # type: ignore[arg-type]
        try:
            self.take(view)
        except OSError as error:
            self.failure = storage_error("write", self.key, error)
            raise self.failure from error
        except StorageError as error:
            self.failure = error
            raise
        self._digest.update(view)
        self.size_bytes += len(view)
        return len(view)

    def write_staged(
        self, staging: StagingBuffer, write: Callable[[StagingBuffer, Path], str]
    ) -> None:
        """Write a staging buffer as the whole content of the file.

        Args:
            staging: The staging buffer.
            write: Function that writes the buffer to a local path and returns its digest. A local
                sink calls it; any other sink writes the buffer piece by piece instead.

        Raises:
            StorageError: The file cannot be written.
        """
        self.expect(staging.size_bytes)
        for chunk in staging.chunks():
            self.write(chunk)

    def digest(self) -> str:
        """Return the digest of the bytes written so far, as "blake3:" and hex digits."""
        return f"blake3:{self._digest.hexdigest()}"

    def take(self, view: memoryview) -> None:
        """Store all bytes of `view`, which is valid only during this call."""
        raise NotImplementedError

    def make_durable(self) -> None:
        """Make the bytes written so far durable, if they are written to a disk.

        Raises:
            StorageError: The disk fails.
        """

    def commit(self, *, exclusive: bool = False) -> None:
        """Make the written bytes durable and let the file appear under its key.

        Args:
            exclusive: Fail if a file exists under the key, instead of replacing it.

        Raises:
            FileExistsError: `exclusive` is set and the key is taken.
            StorageError: Any other failure.
        """
        raise NotImplementedError

    def discard(self) -> None:
        """Remove an uncommitted upload or temporary file.

        The method does nothing after `commit` and never raises.
        """
        raise NotImplementedError


class Store(abc.ABC):
    """A directory or URL that holds a run's files; the package docstring states the contract."""

    is_local = False

    @abc.abstractmethod
    def where(self, key: str) -> str:
        """Return the path or URL of a key, for messages.

        Raises:
            StorageError: The key leads out of the store.
        """

    def with_retry_limit(
        self,
        limit_s: float,
        give_up: Callable[[], object] = lambda: None,
        drop: Callable[[], object] = lambda: None,
    ) -> Store:
        """Return the same store with another retry limit.

        A remote store retries each request for `limit_s` seconds, or until `give_up` returns a true
        value. Once `drop` returns a true value, the upload of a file fails at once, without waiting
        for the requests in flight. A local store does not retry and returns itself.
        """
        return self

    def together(self) -> Store:
        """Return the same store for requests that are of use only together, as parts of a file.

        Once one of them has failed, a remote store does not retry the others: they would each wait
        for a limit of their own.
        """
        return self

    def listen(  # noqa: B027 - a local store reports nothing
        self, on_retry: Callable[[str, RetryEvent], object], on_success: Callable[[], object]
    ) -> None:
        """Set the callbacks for request failures that are retried and for requests that succeed.

        They are called from the thread that makes the request. A local store never calls them.
        """

    @abc.abstractmethod
    def entries(self, folder: str) -> list[Entry]:
        """Return every file directly in `folder`, sorted by key.

        It is [] if there is no such folder. Symbolic links are not followed.
        """

    @abc.abstractmethod
    def listing(self, folder: str) -> tuple[list[Entry], list[str]]:
        """Return the files directly in `folder` as `entries` does, and the keys of its folders."""

    def make_folder(self, folder: str) -> None:  # noqa: B027 - a bucket needs none
        """Create a folder durably in one that exists. Raises StorageError."""

    def drop_folder(self, folder: str) -> None:  # noqa: B027 - a bucket has none
        """Delete a folder if it is there and empty. Raises StorageError."""

    @abc.abstractmethod
    def exists(self, key: str) -> bool:
        """Return whether there is a file under this key now."""

    @abc.abstractmethod
    def read(self, key: str) -> bytes:
        """Return the content of a small file. Raises FileNotFoundError if it does not exist."""

    @abc.abstractmethod
    def open(self, key: str) -> BinaryIO:
        """Open a file for reading and seeking.

        Raises:
            FileNotFoundError: The file does not exist or is not a regular file.
        """

    @abc.abstractmethod
    def chunks(self, key: str, start: int = 0) -> Iterator[bytes]:
        """Yield the content of a large file from offset `start` on, in order, in pieces.

        Raises:
            FileNotFoundError: The file does not exist.
        """

    @abc.abstractmethod
    def writer(self, key: str, attempt: int) -> Sink:
        """Return a context manager that writes a file of any size; see `Sink`."""

    def write(self, key: str, data: bytes, attempt: int) -> None:
        """Write a small file, replacing a file that exists under the key."""
        with self.writer(key, attempt) as sink:
            sink.write(data)
            sink.commit()

    @abc.abstractmethod
    def create(self, key: str, data: bytes, attempt: int) -> None:
        """Write a small file that must not exist yet.

        Raises:
            FileExistsError: The key is taken. A remote store accepts an object that holds exactly
                `data`, since the reply to its own first request may have been lost.
        """

    @abc.abstractmethod
    def delete(self, *keys: str) -> None:
        """Delete files durably; a file that does not exist is no error."""

    @abc.abstractmethod
    def set_aside(self, keys: Sequence[str]) -> None:
        """Mark or rename the files of a damaged checkpoint, manifest first; delete nothing.

        A local store renames them, so that they are no longer found. A remote store adds a mark.
        """

    def lift_mark(self, key: str) -> None:  # noqa: B027 - a local store renames and never marks
        """Remove the mark of `set_aside` next to a key, if there is one; the copy is whole again.

        Raises:
            StorageError: The store fails; the mark may have stayed.
        """

    @abc.abstractmethod
    def prepare(self, folders: tuple[str, ...]) -> None:
        """Create the folders durably.

        Call it only at the start of an attempt: a run directory that vanishes later must not be
        recreated.
        """

    @abc.abstractmethod
    def sweep(self, folders: tuple[str, ...], below_attempt: int) -> list[str]:
        """Delete temporary files of attempts before `below_attempt` and return their keys."""


def delete_all(store: Store, keys: Sequence[str]) -> None:
    """Delete the files; raise the first StorageError after every deletion was tried."""
    failed = []
    for key in keys:
        try:
            store.delete(key)
        except StorageError as error:
            failed.append(error)
    if failed:
        raise failed[0]


def check_key(store: object, key: str) -> list[str]:
    """Split a key into its parts. Raises StorageError if the key leads out of the store."""
    parts = key.split("/")
    if (
        not all(parts)
        or key.startswith("/")
        or any(part in (".", "..") for part in parts)
        or "\0" in key
    ):
        raise StorageError(
            f"{store}: {key!r} is not a key of this store",
            remedy="Keys are relative paths without '..'.",
        )
    return parts


def storage_error(verb: str, subject: str, error: OSError) -> StorageError:
    """Convert an OSError to a StorageError that names the operation, the error and a remedy."""
    return StorageError(
        f"cannot {verb} {subject}: {error.strerror or error}",
        f"found: errno {error.errno}",
        REMEDY.get(error.errno or 0, ""),
    )


REMEDY = {
    errno.ENOSPC: (
        "The disk is full: free some space, or keep fewer checkpoints (checkpoint.keep_last)."
    ),
    errno.EDQUOT: (
        "The quota is used up: free some space, or keep fewer checkpoints (checkpoint.keep_last)."
    ),
    errno.EROFS: "The file system is read-only: choose another run.dir, or mount it for writing.",
    errno.EACCES: "No permission: choose another run.dir, or ask for the right to write there.",
    errno.EPERM: "No permission: choose another run.dir, or ask for the right to write there.",
    errno.ENOTDIR: "A file is in the way of the folder: choose another run.dir.",
    errno.EIO: "The disk reports an error: see the system's log.",
}
