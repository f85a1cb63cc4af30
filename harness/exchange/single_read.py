"""One file, read once: each range is fetched from its store a single time, kept, and is what every later look at it sees."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator
from typing import BinaryIO, cast

from harness.errors import ChangedError
from harness.store import SealedMemory, keep
from harness.store.base import Seekable, in_words

BLOCK_BYTES = 4 << 10  # a zip file's reader looks at 30 bytes before each tensor: more would be kept of each
AHEAD_BLOCKS = 256  # of what is read in order, the most that is fetched at once
PIECE_BYTES = 8 << 20  # of what is read whole

Range = tuple[int, int]  # in bytes: the first, and the one after the last


class SingleRead:
    """The bytes of an open file, by blocks, as many as were asked for. Whoever answers differently the second time is not asked again."""

    def __init__(self, source: BinaryIO, where: str) -> None:
        self.where = where
        self._source = source
        self._raw = cast(io.RawIOBase, source.raw if isinstance(source, io.BufferedReader) else source)  # its buffer would read more
        self.size_bytes = self._raw.seek(0, os.SEEK_END)
        self._known = self._identity()
        self._changed: ChangedError | None = None
        self._blocks: dict[int, bytes] = {}
        self._next, self._ahead = -1, 0  # the block after the last that was fetched, and how many those were

    @property
    def kept_bytes(self) -> int:
        """How much of the file is in memory."""
        return sum(map(len, self._blocks.values()))

    def view(self) -> BinaryIO:
        """The file from its beginning, to read and seek in."""
        return io.BufferedReader(View(self), buffer_size=BLOCK_BYTES)

    def span(self, start: int, end: int) -> bytes:
        """Bytes of the file. Raises ChangedError if it is no longer the one that was opened, StorageError."""
        numbers = range(start // BLOCK_BYTES, -(-end // BLOCK_BYTES))
        with self._asking():
            for number in numbers:
                if number not in self._blocks:
                    self._fetch(number, next((known for known in numbers[number - numbers[0] :] if known in self._blocks), numbers[-1] + 1))
        whole = b"".join(self._blocks[number] for number in numbers)
        return whole[start - numbers[0] * BLOCK_BYTES :][: end - start]

    def _fetch(self, first: int, after: int) -> None:
        """Fetch blocks; when they are read in order, more and more of them at once."""
        self._ahead = min(2 * max(self._ahead, after - first), AHEAD_BLOCKS) if first == self._next else 0
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
            raise in_words("read", self.where, error) from error
        if done < len(buffer) or self._identity() != self._known:
            raise ChangedError(self.where)
        return bytes(buffer)

    def _identity(self) -> tuple[int, ...]:
        """What tells a local file from a later one; in a bucket each request says which object it is for."""
        try:
            found = os.fstat(self._raw.fileno())
        except (OSError, AttributeError):
            return ()
        return (found.st_ino, found.st_size, found.st_mtime_ns)

    def sealed(self, tell: Callable[[int], object]) -> SealedMemory:
        """The whole file, in memory that nobody can change; what is known of it is not fetched again. `tell` is told of each piece's
        bytes. Raises as `span` does, and HarnessError if there is no room."""
        with self._asking():
            return keep(self._pieces(tell), self.size_bytes, self.where)

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        """Once the file has changed nothing of it is asked for: who tries to read it otherwise would ask for the same bytes again."""
        if self._changed is not None:
            raise self._changed
        try:
            yield
        except ChangedError as error:
            self._changed = error
            raise

    def _pieces(self, tell: Callable[[int], object]) -> Iterator[bytes]:
        gaps = list(self._gaps())
        spans = getattr(self._raw, "spans", None)  # several at once, from a bucket
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
        """What is not known yet."""
        at = 0
        for known in [*sorted(self._blocks), -(-self.size_bytes // BLOCK_BYTES)]:
            end = min(known * BLOCK_BYTES, self.size_bytes)
            yield from ((start, min(start + PIECE_BYTES, end)) for start in range(at, end, PIECE_BYTES))
            at = end + BLOCK_BYTES

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):
            self._source.close()


class View(Seekable):
    """A position in it."""

    def __init__(self, once: SingleRead) -> None:
        super().__init__(once.size_bytes, once.span)
        self.once = once  # which closes its file when nobody holds it any more

    def end_for(self, wanted_bytes: int) -> int:
        end = super().end_for(wanted_bytes)
        if wanted_bytes <= BLOCK_BYTES:  # what only fills a buffer: not two blocks for it
            end = min(end, (self.at // BLOCK_BYTES + 1) * BLOCK_BYTES)
        return end
