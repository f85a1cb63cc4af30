"""Read each range of a file in a store at most once.

A range is fetched from the store a single time and kept, so every later read sees the same bytes.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO, cast

from harness.errors import ChangedError, DamagedError
from harness.monitoring.console import ProgressBar
from harness.store import SealedMemory, Store, keep
from harness.store.base import Seekable, storage_error

# A zip reader reads 30 bytes before each tensor; a larger block would keep more memory for each.
BLOCK_BYTES = 4 << 10
AHEAD_BLOCKS = 256  # most blocks fetched at once in a sequential read
PIECE_BYTES = 8 << 20  # size of a request when the whole file is read

Range = tuple[int, int]  # byte offsets: first, and one after the last


class SingleRead:
    """The bytes of an open file, fetched block by block on demand and kept.

    No block is fetched twice, so a file that changes cannot return other bytes for a second read.
    """

    def __init__(self, source: BinaryIO, where: str) -> None:
        self.where = where
        self._source = source
        # Bypass the buffer, which would read more than is requested.
        self._raw = cast(
            io.RawIOBase, source.raw if isinstance(source, io.BufferedReader) else source
        )
        self.size_bytes = self._raw.seek(0, os.SEEK_END)
        self._known = self._identity()
        self._changed: ChangedError | None = None
        self._blocks: dict[int, bytes] = {}
        # The block after the last fetch, and the current number of blocks to read ahead.
        self._next = -1
        self._ahead = 0

    @property
    def kept_bytes(self) -> int:
        """Return the number of bytes of the file in memory."""
        return sum(map(len, self._blocks.values()))

    def view(self) -> BinaryIO:
        """Return a seekable reader, positioned at the beginning of the file."""
        return io.BufferedReader(View(self), buffer_size=BLOCK_BYTES)

    def span(self, start: int, end: int) -> bytes:
        """Return the bytes of the file from `start` to `end`, fetching the missing blocks.

        Raises:
            ChangedError: The file is no longer the one that was opened.
            StorageError: The file cannot be read.
        """
        numbers = range(start // BLOCK_BYTES, -(-end // BLOCK_BYTES))
        with self._asking():
            for number in numbers:
                if number not in self._blocks:
                    self._fetch(
                        number,
                        next(
                            (
                                known
                                for known in numbers[number - numbers[0] :]
                                if known in self._blocks
                            ),
                            numbers[-1] + 1,
                        ),
                    )
        whole = b"".join(self._blocks[number] for number in numbers)
        return whole[start - numbers[0] * BLOCK_BYTES :][: end - start]

    def _fetch(self, first: int, after: int) -> None:
        """Fetch blocks; for sequential reads, double the read-ahead up to `AHEAD_BLOCKS`."""
        self._ahead = (
            min(2 * max(self._ahead, after - first), AHEAD_BLOCKS) if first == self._next else 0
        )
        last = min(max(after, first + self._ahead), -(-self.size_bytes // BLOCK_BYTES))
        last = next((known for known in range(after, last) if known in self._blocks), last)
        data = self._read((first * BLOCK_BYTES, min(last * BLOCK_BYTES, self.size_bytes)))
        for number in range(first, last):
            at = (number - first) * BLOCK_BYTES
            self._blocks[number] = data[at : at + BLOCK_BYTES]
        self._next = last

    def _read(self, wanted: Range) -> bytes:
        start, end = wanted
        buffer, done = memoryview(bytearray(end - start)), 0
        try:
            self._raw.seek(start)
            while done < len(buffer) and (more := self._raw.readinto(buffer[done:])):
                done += more
        except OSError as error:
            raise storage_error("read", self.where, error) from error
        if done < len(buffer) or self._identity() != self._known:
            raise ChangedError(self.where)
        return bytes(buffer)

    def _identity(self) -> tuple[int, ...]:
        """Return inode, size and modification time of a local file; () for an object in a bucket.

        Requests to a bucket name the version of the object, so they need no such check.
        """
        try:
            status = os.fstat(self._raw.fileno())
        except (OSError, AttributeError):
            return ()
        return (status.st_ino, status.st_size, status.st_mtime_ns)

    def sealed(self, tell: Callable[[int], object]) -> SealedMemory:
        """Return the whole file in sealed memory; blocks that are present are not fetched again.

        Args:
            tell: Called with the number of bytes of each piece, for progress.

        Raises:
            ChangedError: The file is no longer the one that was opened.
            StorageError: The file cannot be read.
            HarnessError: There is not enough memory.
        """
        with self._asking():
            return keep(self._pieces(tell), self.size_bytes, self.where)

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        """Refuse all reads after the file has changed, by raising the same ChangedError again.

        A caller that falls back to another way of reading would request the same bytes again.
        """
        if self._changed is not None:
            raise self._changed
        try:
            yield
        except ChangedError as error:
            self._changed = error
            raise

    def _pieces(self, tell: Callable[[int], object]) -> Iterator[bytes]:
        gaps = list(self._gaps())
        spans = getattr(self._raw, "spans", None)  # concurrent requests, for a bucket
        fetched = zip(gaps, spans(gaps) if spans else map(self._read, gaps), strict=True)
        at = 0
        while at < self.size_bytes:
            if (known := self._blocks.get(at // BLOCK_BYTES)) is None:
                (start, end), known = next(fetched)
                if start != at or len(known) != end - start:
                    raise ChangedError(self.where)
            tell(len(known))
            yield known
            at += len(known)

    def _gaps(self) -> Iterator[Range]:
        """Yield the ranges that are not in memory, in pieces of at most `PIECE_BYTES`."""
        at = 0
        for known in [*sorted(self._blocks), -(-self.size_bytes // BLOCK_BYTES)]:
            end = min(known * BLOCK_BYTES, self.size_bytes)
            yield from (
                (start, min(start + PIECE_BYTES, end)) for start in range(at, end, PIECE_BYTES)
            )
            at = end + BLOCK_BYTES

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):
            self._source.close()


class View(Seekable):
    """A raw, seekable reader of a `SingleRead`."""

    def __init__(self, once: SingleRead) -> None:
        super().__init__(once.size_bytes, once.span)
        self.once = once  # keeps the file open: SingleRead closes it when it is freed

    def end_for(self, wanted_bytes: int) -> int:
        """Return the offset at which a read of up to `wanted_bytes` bytes ends."""
        end = super().end_for(wanted_bytes)
        if wanted_bytes <= BLOCK_BYTES:  # a buffer refill: stop at the end of the block
            end = min(end, (self.at // BLOCK_BYTES + 1) * BLOCK_BYTES)
        return end


@dataclass(frozen=True)
class File:
    """One file in a store, and its format (`kind`)."""

    store: Store
    key: str
    kind: str
    size_bytes: int
    # The bytes that have been read so far; None until the file is opened.
    once: SingleRead | None = field(default=None, compare=False, repr=False)

    @property
    def where(self) -> str:
        """Return the file's path or URL for messages."""
        return self.store.where(self.key)

    def opened(self) -> SingleRead:
        """Return the file's bytes, opened for reading if they are not open yet.

        Raises:
            DamagedError: The file is missing.
        """
        if self.once is not None:
            return self.once
        try:
            return SingleRead(self.store.open(self.key), self.where)
        except FileNotFoundError:
            raise DamagedError(
                f"{self.where} is missing",
                remedy="Somebody has deleted it. harness verify says what else is damaged.",
            ) from None

    def view(self) -> BinaryIO:
        """Return a seekable reader, positioned at the beginning of the file.

        Raises:
            DamagedError: The file is missing.
        """
        return self.opened().view()

    def sealed(self) -> SealedMemory:
        """Read the whole file into sealed memory, so that the bytes checked are the bytes loaded.

        Raises:
            DamagedError: The file is missing.
            ChangedError: The file is no longer the one that was opened.
            StorageError: The file cannot be read.
            HarnessError: There is not enough memory.
        """
        once = self.opened()
        bar = ProgressBar(f"reading {self.where}", self.size_bytes)
        try:
            return once.sealed(bar)
        finally:
            bar.end()
