"""Any other file system that fsspec opens (`gs://`, `abfs://`, `memory://` …), through fsspec's common interface.

Less is known of these than of S3: there is no checksum that all of them tell, so what was uploaded is read back, and an upload goes
part after part. Whether exclusive creation is really exclusive is tried out at the start of each attempt (`probe.py`).
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import threading
from collections.abc import Callable
from typing import Any

import fsspec
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractBufferedFile

from harness.errors import ChangedError
from harness.store.bucket import Found, MissingError, Part, TakenError, Unfinished

PART_BYTES = 16 << 20
# What the file systems of fsspec tell of a file that changes when it is written anew.
VERSIONS = ("ETag", "etag", "generation", "md5Hash", "content_md5", "mtime", "last_modified", "LastModified", "updated", "created")
MEMORY = threading.Lock()  # fsspec's own looks first and writes then


def _version(info: dict[str, Any]) -> str:
    told = [str(info[name]) for name in VERSIONS if info.get(name) is not None]
    return " ".join([str(info["size"]), *told]) if told else ""


class Collected:
    """A file that is kept until it is committed."""

    def __init__(self, put: Callable[[bytes], object]) -> None:
        self._put, self._data = put, bytearray()

    def write(self, data: bytes) -> None:
        self._data += data

    def close(self) -> None:
        """Nothing has been sent, and nothing is."""

    def commit(self) -> None:
        self._put(bytes(self._data))

    def discard(self) -> None:
        self._data.clear()


class FsspecClient:
    """A folder of a file system that fsspec opens."""

    parallel = 1  # fsspec's files are written in order
    tells_tags = False

    def __init__(self, url: str) -> None:
        self.fs, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
        self.root = path.rstrip("/")
        self._open: dict[str, Any] = {}
        self._lock = threading.Lock()

    def _path(self, key: str) -> str:
        return f"{self.root}/{key}"

    def renew(self) -> None:
        self.fs.clear_instance_cache()

    def now(self, limit_s: float) -> datetime.datetime:
        return datetime.datetime.now(datetime.timezone.utc)  # not told by fsspec

    def list_page(self, folder: str, token: str | None, limit_s: float) -> tuple[list[Found], str | None]:
        self.fs.invalidate_cache()
        try:
            entries = self.fs.ls(self._path(folder), detail=True)
        except FileNotFoundError:
            return [], None
        inside = f"{self._path(folder)}/"  # `ls` of a file names the file itself
        files = [entry for entry in entries if entry["type"] == "file" and entry["name"].startswith(inside)]
        return [Found(f"{folder}/{entry['name'][len(inside) :]}", entry["size"], "") for entry in files], None

    def head(self, key: str, limit_s: float) -> Found | None:
        self.fs.invalidate_cache()
        try:
            info = self.fs.info(self._path(key))
        except FileNotFoundError:
            return None
        return Found(key, info["size"], "", _version(info)) if info["type"] == "file" else None

    def get(self, key: str, start: int, end: int | None, limit_s: float, version: str = "") -> bytes:
        """The bytes, of whichever version: fsspec knows no conditional read."""
        try:
            return bytes(self.fs.cat_file(self._path(key), start=start, end=end))
        except FileNotFoundError as error:
            raise MissingError(key) from error

    def check_version(self, key: str, version: str, limit_s: float) -> None:
        try:
            if _version(self.fs.info(self._path(key))) != version:
                raise ChangedError(self._path(key))
        except FileNotFoundError as error:
            raise MissingError(key) from error

    def put(self, key: str, data: bytes, exclusive: bool, limit_s: float) -> str:
        try:
            with MEMORY if isinstance(self.fs, MemoryFileSystem) else contextlib.nullcontext():
                self.fs.pipe_file(self._path(key), data, mode="create" if exclusive else "overwrite")
        except FileExistsError as error:
            raise TakenError(key) from error
        return ""

    def delete(self, key: str, limit_s: float) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self._path(key))

    def begin(self, key: str, limit_s: float) -> str:
        if isinstance(self.fs, MemoryFileSystem):  # its files can be seen while they are written
            file: Any = Collected(functools.partial(self.put, key, exclusive=False, limit_s=limit_s))
        else:
            file = self.fs.open(self._path(key), "wb", autocommit=False, block_size=PART_BYTES)
            if not isinstance(file, AbstractBufferedFile):
                raise NotImplementedError(f"{type(self.fs).__name__} cannot upload a large file whole or not at all")
        with self._lock:
            self._open[str(id(file))] = file
        return str(id(file))

    def part_bytes(self, number: int) -> int:
        return PART_BYTES

    def part(self, key: str, upload: str, number: int, data: bytes, limit_s: float) -> Part:
        try:
            self._open[upload].write(data)
        except OSError as error:  # how much of it was taken is not known: the whole upload has to be done again
            raise RuntimeError(f"part {number} was not taken: {error}") from None  # without its cause: nobody may try just this again
        return Part(number, "", b"")

    def complete(self, key: str, upload: str, parts: list[Part], limit_s: float) -> str:
        file = self._open[upload]
        file.close()  # sends what is still held
        file.commit()
        with self._lock:
            del self._open[upload]
        return ""

    def tag_of(self, parts: list[Part]) -> str:
        return ""

    def abort(self, key: str, upload: str, limit_s: float) -> None:
        with self._lock:
            file = self._open.pop(upload, None)
        if file is not None:
            file.discard()

    def unfinished(self, limit_s: float) -> list[Unfinished]:
        return []  # fsspec cannot tell
