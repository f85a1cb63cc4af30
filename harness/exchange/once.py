"""One file, read once: each range is fetched from its store a single time, kept, and is what every later look at it sees."""

from __future__ import annotations

import contextlib
import io
import os
from typing import Any, BinaryIO

from harness.errors import StorageError

BLOCK_BYTES = 128 << 10


class Once:
    """The bytes of an open file, by blocks. Whoever answers differently the second time is not asked a second time."""

    def __init__(self, source: BinaryIO, where: str) -> None:
        self.source, self.where = source, where
        self.size_bytes = source.seek(0, os.SEEK_END)
        self._known = self._identity()
        self._blocks: dict[int, bytes] = {}

    def view(self) -> BinaryIO:
        """The file from its beginning, to read and seek in."""
        return io.BufferedReader(View(self), buffer_size=BLOCK_BYTES)

    def _identity(self) -> tuple[int, ...]:
        try:
            found = os.fstat(self.source.fileno())
        except (OSError, AttributeError):  # in a bucket
            return ()
        return (found.st_ino, found.st_size, found.st_mtime_ns)

    def block(self, number: int) -> bytes:
        """One block. Raises StorageError if the file is no longer the one that was opened."""
        if number not in self._blocks:
            self.source.seek(number * BLOCK_BYTES)
            data = self.source.read(min(BLOCK_BYTES, self.size_bytes - number * BLOCK_BYTES))
            if self._identity() != self._known:
                raise StorageError(f"{self.where} changed while it was read", remedy="Try again when nobody writes to it.")
            self._blocks[number] = data
        return self._blocks[number]

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):
            self.source.close()


class View(io.RawIOBase):
    """A position in it."""

    def __init__(self, once: Once) -> None:
        self.once, self.at = once, 0
        self.failure: StorageError | None = None  # torch.load hides it behind an error of its own

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        target = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.once.size_bytes}[whence]
        if target < 0:
            raise OSError(f"cannot seek to {target}")
        self.at = target
        return self.at

    def readinto(self, buffer: Any) -> int:
        if self.at >= self.once.size_bytes:
            return 0
        number, start = divmod(self.at, BLOCK_BYTES)
        try:
            data = self.once.block(number)[start : start + len(buffer)]
        except StorageError as error:
            self.failure = error
            raise
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)
