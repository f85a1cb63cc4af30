"""Store a run's files in a directory of a POSIX file system.

A file is written in these steps: create a temporary file in the same folder, write, fsync, rename,
fsync the folder. Each step is needed: without the first fsync, ext4 showed a file full of zeros
after a power loss; without the second, the old file came back.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from harness.errors import StorageError
from harness.store.base import (
    SET_ASIDE,
    TEMP,
    Entry,
    Sink,
    Store,
    check_key,
    delete_all,
    storage_error,
)
from harness.store.folders import drop, fsync_folder, make, make_all, take_name
from harness.store.urls import expanded

# Small enough that a chunk is still in the CPU cache when it is copied after being digested.
READ_BYTES = 1 << 20
DAY_S = 86_400.0

if TYPE_CHECKING:
    from harness.store.staging_buffer import StagingBuffer


class LocalSink(Sink):
    """A temporary file that is renamed to its final name on `commit`."""

    def __init__(self, store: LocalStore, key: str, attempt: int) -> None:
        super().__init__(key)
        self._path = store.path(key)
        # The attempt number decides when `sweep` may delete the file. The random part separates
        # two processes that write the same key.
        self.temp = self._path.with_name(
            f"{self._path.name}.tmp-{attempt:04d}-{secrets.token_hex(4)}"
        )
        self._fd = -1
        self._staged_digest = ""  # the digest of a staging buffer that `write_staged` wrote

    def __enter__(self) -> LocalSink:
        with _storage_errors(self.key, "write"):
            self._fd = os.open(
                self.temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666
            )
        return self

    def take(self, view: memoryview) -> None:
        """Write all bytes of `view` to the temporary file."""
        done = 0
        while done < len(view):
            done += os.write(self._fd, view[done:])

    def make_durable(self) -> None:
        """Make the bytes written so far durable. Raises StorageError if the disk fails."""
        with _storage_errors(self.key, "write"):
            os.fdatasync(self._fd)

    def write_staged(
        self, staging: StagingBuffer, write: Callable[[StagingBuffer, Path], str]
    ) -> None:
        """Write a staging buffer as the whole content of the file.

        Args:
            staging: The staging buffer.
            write: Function that writes the buffer to a local path and returns its digest.

        Raises:
            StorageError: The file cannot be written.
        """
        with _storage_errors(self.key, "write"):
            self._staged_digest = write(staging, self.temp)
        self.size_bytes = staging.size_bytes

    def digest(self) -> str:
        """Return the digest of the file: that of the staging buffer, if one was written."""
        return self._staged_digest or super().digest()

    def commit(self, *, exclusive: bool = False) -> None:
        """Fsync the temporary file, rename it to its final name and fsync the folder.

        Args:
            exclusive: Fail if a file exists under the key, instead of replacing it.

        Raises:
            FileExistsError: `exclusive` is set and the key is taken.
            StorageError: Any other failure.
        """
        with _storage_errors(self.key, "write"):
            os.fsync(self._fd)
            fd, self._fd = self._fd, -1
            os.close(fd)
            if exclusive:
                take_name(self.temp, self._path)
            else:
                os.replace(self.temp, self._path)
            fsync_folder(self._path.parent)

    def discard(self) -> None:
        """Close and delete the temporary file. Raises nothing."""
        # Suppress errors: the first error is the one to report. A later attempt deletes the file.
        with contextlib.suppress(OSError):
            if self._fd >= 0:
                os.close(self._fd)
        with contextlib.suppress(OSError):
            os.unlink(self.temp)
        self._fd = -1


class LocalStore(Store):
    """A directory of a POSIX file system."""

    is_local = True

    def __init__(self, root: str | Path) -> None:
        self.root = expanded(root)

    def __str__(self) -> str:
        return str(self.root)

    def path(self, key: str) -> Path:
        """Return the path of a key. Raises StorageError if the key leads out of the store."""
        return self.root.joinpath(*check_key(self, key))

    def where(self, key: str) -> str:
        """Return the path of a key, for messages.

        Raises:
            StorageError: The key leads out of the store.
        """
        return str(self.path(key))

    def entries(self, folder: str) -> list[Entry]:
        """Return every regular file directly in `folder`, sorted by key; links are not followed."""
        return self.listing(folder)[0]

    def listing(self, folder: str) -> tuple[list[Entry], list[str]]:
        """Return the files directly in `folder` as `entries` does, and the keys of the folders."""
        files, folders = list[Entry](), list[str]()
        with _storage_errors(f"{self.root}/{folder}", "list"):
            try:
                with os.scandir(self.path(folder)) as entries:
                    for entry in entries:
                        key = f"{folder}/{entry.name}"
                        # Another process may delete a file during the listing.
                        with contextlib.suppress(FileNotFoundError):
                            if entry.is_file(follow_symlinks=False):
                                size_bytes = entry.stat(follow_symlinks=False).st_size
                                files.append(Entry(key, size_bytes))
                            elif entry.is_dir(follow_symlinks=False):
                                folders.append(key)
            except FileNotFoundError:
                return [], []
        return sorted(files, key=lambda entry: entry.key), sorted(folders)

    def make_folder(self, folder: str) -> None:
        """Create a folder durably in one that exists, if it is not there."""
        with _storage_errors(folder, "create"):
            make(self.path(folder))

    def drop_folder(self, folder: str) -> None:
        """Delete a folder if it is there and empty."""
        with _storage_errors(folder, "delete"):
            drop(self.path(folder))

    def exists(self, key: str) -> bool:
        """Return whether there is a regular file under this key; links are not followed."""
        with _storage_errors(key, "look up"):
            try:
                return stat.S_ISREG(os.lstat(self.path(key)).st_mode)
            except FileNotFoundError:
                return False

    def read(self, key: str) -> bytes:
        """Return the whole content of a file. Raises FileNotFoundError if it does not exist."""
        with _storage_errors(key, "read", self.path(key)), self.open(key) as file:
            return file.read()

    def open(self, key: str) -> BinaryIO:
        """Open a file for reading and seeking.

        Raises:
            FileNotFoundError: The file does not exist, is a link, or is not a regular file.
            StorageError: Any other failure.
        """
        path = self.path(key)
        with _storage_errors(key, "open", path):
            try:
                fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            except OSError as error:
                if error.errno == errno.ELOOP:
                    raise FileNotFoundError(errno.ENOENT, "a link, not a file", str(path)) from None
                raise
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                os.close(fd)
                raise FileNotFoundError(errno.ENOENT, "not a regular file", str(path))
            return os.fdopen(fd, "rb", buffering=1 << 20)

    def chunks(self, key: str, start: int = 0) -> Iterator[bytes]:
        """Yield the content of a file from offset `start` on, in order, in chunks of up to 1 MiB.

        Raises:
            FileNotFoundError: The file does not exist, or was deleted on an NFS server meanwhile.
            StorageError: Any other failure.
        """
        with self.open(key) as file, _storage_errors(key, "read", self.path(key)):
            os.lseek(file.fileno(), start, os.SEEK_SET)
            while chunk := os.read(file.fileno(), READ_BYTES):
                yield chunk

    def writer(self, key: str, attempt: int) -> LocalSink:
        """Return a context manager that writes a file of any size through a temporary file."""
        return LocalSink(self, key, attempt)

    def create(self, key: str, data: bytes, attempt: int) -> None:
        """Write a small file that must not exist yet. Raises FileExistsError if it exists."""
        with self.writer(key, attempt) as sink:
            sink.write(data)
            sink.commit(exclusive=True)

    def append(self, key: str, line: bytes) -> None:
        """Append a line to a file and create the file if it does not exist.

        The line is not fsynced. No other method extends an existing file.
        """
        with _storage_errors(key, "write"):
            fd = os.open(
                self.path(key), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666
            )
            try:
                os.write(fd, line)
            finally:
                os.close(fd)

    def set_aside(self, keys: Sequence[str]) -> None:
        """Rename the files that exist, so that they are no longer taken for a checkpoint."""
        for key in filter(self.exists, keys):
            with _storage_errors(key, "rename"):
                os.rename(self.path(key), self.path(key + SET_ASIDE))
                fsync_folder(self.path(key).parent)

    def delete(self, *keys: str) -> None:
        """Delete files, then fsync each of their folders; a file that is not there is no error."""
        with _storage_errors(keys[0], "delete"):
            for path in map(self.path, keys):
                path.unlink(missing_ok=True)
            for folder in dict.fromkeys(self.path(key).parent for key in keys):
                fsync_folder(folder)

    def prepare(self, folders: tuple[str, ...]) -> None:
        """Create the folders durably, with those above them.

        Raises:
            StorageError: A folder cannot be created, for example because a file is in the way.
        """
        for folder in folders:
            with _storage_errors(f"{self.root}/{folder}", "make"):
                path = self.path(folder)
                try:
                    make_all(path)
                except FileExistsError as error:
                    raise storage_error(
                        "make", str(path), NotADirectoryError(errno.ENOTDIR, "a file is in the way")
                    ) from error

    def sweep(self, folders: tuple[str, ...], below_attempt: int) -> list[str]:
        """Delete temporary files of attempts before `below_attempt` and return their keys.

        The folder "" is the store's root. A file of number 0 belongs to no attempt (a supervisor or
        a command wrote it), and is deleted once it is a day old.
        """
        old = []
        for folder in folders:
            keys = self._keys_within(folder) if folder else self._root_keys()
            for key in keys:
                match = TEMP.match(key)
                number = int(match["attempt"]) if match else below_attempt
                if number < below_attempt and (number or self._is_old(key)):
                    old.append(key)
        delete_all(self, old)
        return old

    def _keys_within(self, folder: str) -> list[str]:
        """Return the keys of the files in a folder and in the folders of it (of shards)."""
        files, inner = self.listing(folder)
        return [entry.key for each in (files, *map(self.entries, inner)) for entry in each]

    def _root_keys(self) -> list[str]:
        with _storage_errors(str(self.root), "list"):
            return os.listdir(self.root)

    def _is_old(self, key: str) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return time.time() - os.lstat(self.path(key)).st_mtime > DAY_S
        return False


@contextlib.contextmanager
def _storage_errors(subject: str, verb: str, path: Path | None = None) -> Iterator[None]:
    """Convert an OSError of the block into a StorageError.

    FileNotFoundError and FileExistsError pass through, since callers act on them. A write, create
    or delete whose folder has vanished raises StorageError instead.

    Args:
        subject: Name of the file or folder, for the message.
        verb: Name of the operation, for the message.
        path: File that is read. If it is gone, ESTALE of NFS becomes FileNotFoundError.
    """
    try:
        yield
    except (FileNotFoundError, FileExistsError) as error:
        if verb in ("write", "create", "delete") and isinstance(error, FileNotFoundError):
            raise StorageError(
                f"cannot {verb} {subject}: the folder has vanished",
                f"found: {error}",
                "Put the folder back, or mount the disk again; then start again.",
            ) from error
        raise
    except OSError as error:
        if error.errno == errno.ESTALE and path is not None and _is_gone(path):
            raise FileNotFoundError(errno.ENOENT, "deleted while it was read", str(path)) from error
        raise storage_error(verb, subject, error) from error


def _is_gone(path: Path) -> bool:
    """Return True if the file is gone.

    It is called after ESTALE, which a file server also reports when it was only unreachable.
    """
    try:
        os.lstat(path)
    except FileNotFoundError:
        return True
    except OSError:
        pass
    return False
