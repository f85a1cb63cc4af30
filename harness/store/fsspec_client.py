"""Access any other file system that fsspec opens (`gs://`, `abfs://`, `memory://` …).

The client uses fsspec's common interface, which guarantees less than S3. There is no checksum that
all file systems report, so an uploaded file is read back. The parts of an upload are sent one after
another. A file system is refused if it creates a file exclusively only by fsspec's base method,
which first looks and then writes. Whether it then really refuses a second creation is tested at the
start of each attempt (`probe.py`).
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import threading
from collections.abc import Callable
from typing import Any

import fsspec
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from harness.errors import ChangedError, RefusedError
from harness.store.bucket import MissingError, ObjectMetadata, Part, TakenError, Unfinished

PART_BYTES = 16 << 20
# Fields of `info` that change when a file is rewritten; each file system reports some of them.
VERSIONS = (
    "ETag",
    "etag",
    "generation",
    "md5Hash",
    "content_md5",
    "mtime",
    "last_modified",
    "LastModified",
    "updated",
    "created",
)
# fsspec's memory file system checks and writes in two steps, so exclusive creation needs a lock.
MEMORY = threading.Lock()


def _version(info: dict[str, Any]) -> str:
    """Return a version string of a file from its `info`, or "" if no field of `VERSIONS` is set."""
    fields = [str(info[name]) for name in VERSIONS if info.get(name) is not None]
    return " ".join([str(info["size"]), *fields]) if fields else ""


def _creates_exclusively(fs: AbstractFileSystem) -> bool:
    """Return whether a file system has an exclusive creation of its own, as gs and abfs have.

    fsspec's base method looks whether the file exists and then writes it, so that two starts of a
    run could both succeed. The lock `MEMORY` makes up for that in memory, which no other process
    sees.
    """
    kind, base = type(fs), AsyncFileSystem._pipe_file
    return (
        isinstance(fs, MemoryFileSystem)
        or kind.pipe_file is not AbstractFileSystem.pipe_file
        or getattr(kind, "_pipe_file", base) is not base
    )


class Collected:
    """A file that is held in memory until it is committed."""

    def __init__(self, put: Callable[[bytes], object]) -> None:
        self._put, self._data = put, bytearray()

    def write(self, data: bytes) -> None:
        """Append to the data held in memory."""
        self._data += data

    def close(self) -> None:
        """Do nothing: the data is only sent by `commit`."""

    def commit(self) -> None:
        """Write the collected data to the file system."""
        self._put(bytes(self._data))

    def discard(self) -> None:
        """Drop the collected data."""
        self._data.clear()


class FsspecClient:
    """A client for a folder of a file system that fsspec opens."""

    parallel = 1  # fsspec writes a file in order
    tells_tags = False

    def __init__(self, url: str) -> None:
        self.fs, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
        self.root = path.rstrip("/")
        self._open: dict[str, Any] = {}
        self._lock = threading.Lock()

    def _path(self, key: str) -> str:
        return f"{self.root}/{key}"

    def renew(self) -> None:
        """Clear fsspec's cache of file system instances."""
        self.fs.clear_instance_cache()

    def now(self, limit_s: float) -> datetime.datetime:
        """Return the time of this machine's clock, since fsspec does not report the server's."""
        return datetime.datetime.now(datetime.timezone.utc)

    def list_page(
        self, folder: str, token: str | None, limit_s: float
    ) -> tuple[list[ObjectMetadata], str | None]:
        """Return all that is directly in `folder`, without tags, and no token: it is one page."""
        self.fs.invalidate_cache()
        try:
            entries = self.fs.ls(self._path(folder), detail=True)
        except FileNotFoundError:
            return [], None
        # The prefix excludes the entry that `ls` returns for a path that is a file.
        inside = f"{self._path(folder)}/"
        ends = {"file": "", "directory": "/"}
        return [
            ObjectMetadata(
                f"{folder}/{entry['name'].rstrip('/')[len(inside) :]}{ends[entry['type']]}",
                entry["size"] or 0,
                "",
            )
            for entry in entries
            if entry["type"] in ends and entry["name"].startswith(inside)
        ], None

    def head(self, key: str, limit_s: float) -> ObjectMetadata | None:
        """Return the size and version of a file, or None if there is no file under the key."""
        self.fs.invalidate_cache()
        try:
            info = self.fs.info(self._path(key))
        except FileNotFoundError:
            return None
        return (
            ObjectMetadata(key, info["size"], "", _version(info))
            if info["type"] == "file"
            else None
        )

    def get(
        self, key: str, start: int, end: int | None, limit_s: float, version: str = ""
    ) -> bytes:
        """Return the bytes from `start` up to, excluding, `end`; `version` is ignored.

        fsspec has no conditional read.

        Args:
            key: Key of the file.
            start: First byte offset.
            end: Byte offset after the last byte, or None for the end of the file.
            limit_s: Ignored.
            version: Ignored; `check_version` compares it afterwards.

        Raises:
            MissingError: The file does not exist.
        """
        try:
            return bytes(self.fs.cat_file(self._path(key), start=start, end=end))
        except FileNotFoundError as error:
            raise MissingError(key) from error

    def check_version(self, key: str, version: str, limit_s: float) -> None:
        """Check that a file is still the given version.

        Raises:
            ChangedError: The file is another version by now.
            MissingError: The file no longer exists.
        """
        try:
            if _version(self.fs.info(self._path(key))) != version:
                raise ChangedError(self._path(key))
        except FileNotFoundError as error:
            raise MissingError(key) from error

    def put(self, key: str, data: bytes, exclusive: bool, limit_s: float) -> str:
        """Write a small file at once and return "", since no tag is known.

        Args:
            key: Key of the file.
            data: Content of the file.
            exclusive: Fail if the file exists.
            limit_s: Ignored.

        Raises:
            TakenError: `exclusive` is set and the file exists.
            RefusedError: `exclusive` is set and the file system cannot create exclusively.
        """
        if exclusive and not _creates_exclusively(self.fs):
            raise RefusedError(
                f"{self.root} is on a file system that does not create exclusively",
                f"found: fsspec's {type(self.fs).__name__}, which looks first and then writes",
                "Two attempts of one run could both think that they are the only one: "
                "use another store, such as s3://, gs:// or abfs://.",
            )
        try:
            with MEMORY if isinstance(self.fs, MemoryFileSystem) else contextlib.nullcontext():
                self.fs.pipe_file(
                    self._path(key), data, mode="create" if exclusive else "overwrite"
                )
        except FileExistsError as error:
            raise TakenError(key) from error
        return ""

    def delete(self, key: str, limit_s: float) -> None:
        """Delete a file; a file that does not exist is no error."""
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self._path(key))

    def drop_folder(self, folder: str, limit_s: float) -> None:
        """Delete an empty folder, on a file system that has folders."""
        # Each file system has an error of its own for one that is not empty.
        with contextlib.suppress(Exception):
            self.fs.rmdir(self._path(folder))

    def begin(self, key: str, limit_s: float) -> str:
        """Open a file for writing and return an id for the upload.

        Raises:
            NotImplementedError: The file system cannot defer the commit of a large file.
        """
        # A file of the memory file system is visible while it is written, so collect it first.
        if isinstance(self.fs, MemoryFileSystem):
            file: Any = Collected(
                functools.partial(self.put, key, exclusive=False, limit_s=limit_s)
            )
        else:
            file = self.fs.open(self._path(key), "wb", autocommit=False, block_size=PART_BYTES)
            if not isinstance(file, AbstractBufferedFile):
                raise NotImplementedError(
                    f"{type(self.fs).__name__} cannot upload a large file whole or not at all"
                )
        with self._lock:
            self._open[str(id(file))] = file
        return str(id(file))

    def part_bytes(self, number: int, expected_bytes: int) -> int:
        """Return the size of every part in bytes, 16 MiB."""
        return PART_BYTES

    def part(self, key: str, upload: str, number: int, data: bytes, limit_s: float) -> Part:
        """Append one part to the open file.

        Args:
            key: Ignored.
            upload: Id that `begin` returned.
            number: Number of the part, counted from 1.
            data: Content of the part.
            limit_s: Ignored.

        Raises:
            RuntimeError: The part was not written completely; the whole upload has to be repeated.
        """
        try:
            self._open[upload].write(data)
        except OSError as error:
            # An unknown number of bytes was written, so this part alone must not be retried. Drop
            # the cause, since a transient cause would make `retrying` repeat the request.
            raise RuntimeError(f"part {number} was not taken: {error}") from None
        return Part(number, "", b"")

    def complete(self, key: str, upload: str, parts: list[Part], limit_s: float) -> str:
        """Close and commit the file; return "", since no tag is known.

        Args:
            key: Ignored.
            upload: Id that `begin` returned.
            parts: Ignored.
            limit_s: Ignored.
        """
        file = self._open[upload]
        file.close()  # sends the bytes that are still buffered
        file.commit()
        with self._lock:
            del self._open[upload]
        return ""

    def tag_of(self, parts: list[Part]) -> str:
        """Return "", since no tag is known."""
        return ""

    def abort(self, key: str, upload: str, limit_s: float) -> None:
        """Discard the open file of an upload; an unknown upload is no error."""
        with self._lock:
            file = self._open.pop(upload, None)
        if file is not None:
            file.discard()

    def unfinished(self, limit_s: float) -> list[Unfinished]:
        """Return an empty list, since fsspec cannot list unfinished uploads."""
        return []
