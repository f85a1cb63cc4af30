"""A place that keeps a run's files: the only door to the file system.

The contract, whatever the store:

* A key is a relative path with forward slashes. What is written under a key appears whole or not at all, and is durable
  when the call returns.
* `create` is exclusive: of any number of rivals exactly one succeeds, also when a reply is lost.
* `entries` either returns everything that is there or raises; an unreachable store never looks like an empty one.
* Any failure of the medium is a `StorageError` that names the key and the system's own words.

`LocalStore` is for POSIX file systems. A file is written as: temporary name in the same folder, write, fsync, rename,
fsync of the folder. Each step is needed: without the first fsync ext4 showed a file full of zeros after a power loss,
without the second the old file came back.
"""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import os
import re
import secrets
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from blake3 import blake3

from harness.errors import StorageError

CHUNK_BYTES = 4 << 20
TEMP = re.compile(r"^.+\.tmp-(?P<attempt>[0-9]+)-[0-9a-f]+\Z")


@dataclass(frozen=True)
class Entry:
    """One file of a store."""

    key: str
    size_bytes: int


class Sink(io.RawIOBase):
    """A file being written: counts and digests what passes through, and appears under its key only on `commit`.

    It is a context manager: leaving the block without `commit`, or by an exception, leaves nothing behind.
    """

    def __init__(self, store: LocalStore, key: str, attempt: int) -> None:
        self.store, self.key = store, key
        self.size_bytes = 0
        self.error: OSError | None = None  # torch.save hides the OSError behind a RuntimeError of its own
        self._digest = blake3()
        self._path = store.path(key)
        # The number tells who may sweep it; the rest keeps two rivals for one key apart.
        self._temp = self._path.with_name(f"{self._path.name}.tmp-{attempt:04d}-{secrets.token_hex(4)}")
        self._fd = -1

    def __enter__(self) -> Sink:
        with _said(self.key, "write"):
            self._fd = os.open(self._temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        return self

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        """Append all of `data`, a bytes-like object; returns its length in bytes."""
        view = memoryview(data).cast("B")  # type: ignore[arg-type]
        try:
            done = 0
            while done < len(view):
                done += os.write(self._fd, view[done:])
        except OSError as error:
            self.error = error
            raise
        self._digest.update(view)
        self.size_bytes += len(view)
        return len(view)

    def digest(self) -> str:
        return f"blake3:{self._digest.hexdigest()}"

    def commit(self, *, exclusive: bool = False) -> None:
        """Make what was written durable and let it appear under its key, `exclusive`ly if so asked.

        Raises FileExistsError when `exclusive` and the key is taken, StorageError on any other failure.
        """
        with _said(self.key, "write"):
            os.fsync(self._fd)
            fd, self._fd = self._fd, -1
            os.close(fd)
            if exclusive:
                self._link()
            else:
                os.replace(self._temp, self._path)
            _fsync_folder(self._path.parent)

    def _link(self) -> None:
        """`link` refuses to overwrite, where `rename` would not. NFS may lose its reply: then the link count tells."""
        try:
            os.link(self._temp, self._path)
        except OSError:
            if os.stat(self._temp).st_nlink != 2:
                raise

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        # The first error is the one to report, and a later attempt sweeps what stays.
        with contextlib.suppress(OSError):
            if self._fd >= 0:
                os.close(self._fd)
        with contextlib.suppress(OSError):
            os.unlink(self._temp)
        self._fd = -1
        self.close()


class LocalStore:
    """A directory of a POSIX file system."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).expanduser().absolute()

    def __str__(self) -> str:
        return str(self.root)

    def path(self, key: str) -> Path:
        """Where a key lies. Raises StorageError for a key that leads out of the store."""
        parts = key.split("/")
        if not all(parts) or key.startswith("/") or any(part in (".", "..") for part in parts) or "\0" in key:
            raise StorageError(f"{self}: {key!r} is not a key of this store", remedy="Keys are relative paths without '..'.")
        return self.root.joinpath(*parts)

    def entries(self, folder: str) -> list[Entry]:
        """Every regular file directly in `folder`, sorted by key; links are not followed. Empty if there is no folder."""
        found = []
        with _said(f"{self.root}/{folder}", "list"):
            try:
                with os.scandir(self.path(folder)) as entries:
                    for entry in entries:
                        with contextlib.suppress(FileNotFoundError):  # deleted by its owner while we looked
                            if entry.is_file(follow_symlinks=False):
                                found.append(Entry(f"{folder}/{entry.name}", entry.stat(follow_symlinks=False).st_size))
            except FileNotFoundError:
                return []
        return sorted(found, key=lambda entry: entry.key)

    def exists(self, key: str) -> bool:
        with _said(key, "look up"):
            try:
                return stat.S_ISREG(os.lstat(self.path(key)).st_mode)
            except FileNotFoundError:
                return False

    def read(self, key: str) -> bytes:
        """The whole of a small file. Raises FileNotFoundError if it is not there."""
        with _said(key, "read"), self.open(key) as file:
            return file.read()

    def open(self, key: str) -> BinaryIO:
        """Open for reading, for seeking too. Raises FileNotFoundError if it is not there or is not a regular file."""
        path = self.path(key)
        with _said(key, "open"):
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

    def writer(self, key: str, attempt: int) -> Sink:
        """A context manager to write a file of any size; see `Sink`."""
        return Sink(self, key, attempt)

    def write(self, key: str, data: bytes, attempt: int) -> None:
        """Write a small file whole, replacing what was there."""
        with self.writer(key, attempt) as sink, _said(key, "write"):
            sink.write(data)
            sink.commit()

    def create(self, key: str, data: bytes, attempt: int) -> None:
        """Write a small file that must not exist yet. Raises FileExistsError if the key is taken."""
        with self.writer(key, attempt) as sink, _said(key, "create"):
            sink.write(data)
            sink.commit(exclusive=True)

    def append(self, key: str, line: bytes) -> None:
        """Add a line to a file; not made durable, and the only thing that ever grows under a key."""
        with _said(key, "write"):
            fd = os.open(self.path(key), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            try:
                os.write(fd, line)
            finally:
                os.close(fd)

    def rename(self, key: str, new_key: str) -> None:
        """Give a file another name in the same folder, durably."""
        with _said(key, "rename"):
            os.rename(self.path(key), self.path(new_key))
            _fsync_folder(self.path(key).parent)

    def delete(self, key: str) -> None:
        """Delete a file durably; one that is gone already is no error."""
        with _said(key, "delete"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path(key))
            _fsync_folder(self.path(key).parent)

    def prepare(self, folders: tuple[str, ...]) -> None:
        """Make the folders, durably. Only at the start of an attempt: a run directory that vanishes is not made anew."""
        for folder in folders:
            with _said(f"{self.root}/{folder}", "make"):
                path = self.path(folder)
                missing = list(itertools.takewhile(lambda made: not made.is_dir(), (path, *path.parents)))
                path.mkdir(parents=True, exist_ok=True)
                for made in missing:
                    _fsync_folder(made.parent)

    def sweep(self, folders: tuple[str, ...], below_attempt: int) -> list[str]:
        """Delete the temporary files that attempts before `below_attempt` left; returns their keys."""
        swept = []
        for entry in (entry for folder in folders for entry in self.entries(folder)):
            match = TEMP.match(entry.key)
            if match and int(match["attempt"]) < below_attempt:
                self.delete(entry.key)
                swept.append(entry.key)
        return swept


def _fsync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _said(what: str, verb: str) -> Iterator[None]:
    """Turn a failure of the medium into a StorageError; what callers decide by passes through."""
    try:
        yield
    except (FileNotFoundError, FileExistsError) as error:
        if verb in ("write", "create", "delete") and isinstance(error, FileNotFoundError):
            raise StorageError(f"cannot {verb} {what}: the folder has vanished ({error})", remedy="Is the disk still mounted?") from error
        raise
    except OSError as error:
        raise in_words(verb, what, error) from error


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
