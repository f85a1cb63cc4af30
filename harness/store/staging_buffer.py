"""A large file as it will lie on the disk, in memory that is kept and used again; written from there without another copy."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from blake3 import blake3

from harness.errors import StorageError
from harness.store.sealed_memory import create

PIECE_BYTES, DIGESTED_BYTES = 4 << 20, 256 << 10  # written and digested at once: who waits for this core waits for one of these
LENT_BYTES = 8 << 20
BLOCK_BYTES = 4096  # what O_DIRECT wants addresses, offsets and lengths to be multiples of
DIRECT_FROM_BYTES = 256 << 20  # smaller files go through the page cache, where the next start finds them
WRITERS = 2  # requests on their way to the disk at once: one leaves it idle between two
SPARE = 0.9  # of the free memory, the most that is taken


class ReadLease:
    """Leave to read an image."""

    def __init__(self, fd: int, size_bytes: int) -> None:
        self._fd, self._size_bytes = fd, size_bytes
        self._is_over, self._reading = False, threading.Lock()

    def chunks(self) -> Iterator[bytes]:
        """The file's bytes, piece by piece, until all were read or the loan is over."""
        at = 0
        while at < self._size_bytes:
            with self._reading:
                if self._is_over:
                    return
                chunk = os.pread(self._fd, min(LENT_BYTES, self._size_bytes - at), at)  # which, unlike a copy, lets Python's lock go
            at += len(chunk)
            yield chunk

    def end(self) -> None:
        """Wait for whoever reads just now; nobody does afterwards."""
        with self._reading:
            self._is_over = True


class StagingBuffer:
    """Shared memory without a name, which another process can map by its descriptor `fd`."""

    def __init__(self) -> None:
        self.fd = -1
        self.size_bytes = 0
        self.capacity_bytes = 0
        self.memory: mmap.mmap | None = None
        self._loan = ReadLease(-1, 0)

    def reserve(self, size_bytes: int) -> None:
        """Make room for a file of this size; what was in it is no longer of use. Raises StorageError if there is no memory for it."""
        self._loan.end()
        if size_bytes > self.capacity_bytes:
            capacity_bytes = -(-size_bytes // BLOCK_BYTES) * BLOCK_BYTES
            self.check_room(capacity_bytes)
            try:
                if self.fd < 0:
                    self.fd = create("checkpoint")
                os.ftruncate(self.fd, capacity_bytes)
                self.memory = mmap.mmap(self.fd, capacity_bytes)  # the one before lives as long as somebody looks into it
            except OSError as error:
                raise StorageError("there is not enough memory for a copy of the state", f"found: {error}") from error
            self.capacity_bytes = capacity_bytes
        self.size_bytes = size_bytes

    def check_room(self, size_bytes: int) -> None:
        """Raises StorageError if there is no memory for a file of this size."""
        more_bytes = size_bytes - self.capacity_bytes
        if more_bytes > 0 and more_bytes > SPARE * (free_bytes := free_memory_bytes()):
            raise StorageError("there is not enough memory for a copy of the state", f"found: {free_bytes} bytes, needed: {more_bytes}")

    def lend(self) -> ReadLease:
        """Let somebody read what is in it, until it is needed for something else."""
        self._loan = ReadLease(self.fd, self.size_bytes)
        return self._loan

    def chunks(self) -> Iterator[memoryview]:
        """The file's bytes, piece by piece."""
        assert self.memory is not None, "there is something in it"
        view = memoryview(self.memory)
        for at in range(0, self.size_bytes, PIECE_BYTES):
            yield view[at : min(at + PIECE_BYTES, self.size_bytes)]

    def close(self) -> None:
        """Give the memory back, as soon as nobody looks into it any more."""
        self._loan.end()
        if self.fd >= 0:
            os.close(self.fd)
        self.fd, self.memory, self.size_bytes, self.capacity_bytes = -1, None, 0, 0


def free_memory_bytes(root: Path = Path("/")) -> int:
    """What the machine can give, and what the job's control groups, of either version, still allow; by Linux's own estimates."""
    free = 1 << 60
    with contextlib.suppress(OSError, ValueError, KeyError):
        free = 1024 * _numbers(root / "proc/meminfo")["MemAvailable:"]
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, kinds, own = line.split(":", 2)
            if kinds == "":
                free = min(free, _left_in(root / "sys/fs/cgroup", own, "memory.max", "memory.current", "inactive_file"))
            elif "memory" in kinds.split(","):
                names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
                free = min(free, _left_in(root / "sys/fs/cgroup/memory", own, *names))
    return max(0, free)


def _left_in(top: Path, own: str, most: str, used: str, cached: str) -> int:
    """What a control group and those that it is in leave of their limits; what is cached of files makes way."""
    left, group = 1 << 60, top / own.strip("/")
    for folder in (group, *group.parents):
        with contextlib.suppress(OSError, ValueError, KeyError):  # a limit may be the word "max"
            limit = int((folder / most).read_text())
            left = min(left, limit - int((folder / used).read_text()) + _numbers(folder / "memory.stat")[cached])
        if folder == top:
            break
    return left


def _numbers(file: Path) -> dict[str, int]:
    return {words[0]: int(words[1]) for line in file.read_text().splitlines() if len(words := line.split()) > 1}


def write_to(memory: mmap.mmap, size_bytes: int, path: str, direct_from_bytes: int = DIRECT_FROM_BYTES) -> str:
    """Write the first bytes of page-aligned memory, padded to whole blocks, to a file that is there; returns their digest.

    Around the page cache where the file system can do that: it neither costs the copy nor pushes out what others need. Digest and
    writing go on at the same time. It is for the caller to make the file durable. Raises OSError.
    """
    flags = os.O_WRONLY | os.O_CLOEXEC
    try:
        fd = os.open(path, flags | (os.O_DIRECT if size_bytes >= direct_from_bytes else 0))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        fd = os.open(path, flags)
    try:
        return _write_all(fd, memoryview(memory), size_bytes)
    finally:
        os.close(fd)


def _write_all(fd: int, view: memoryview, size_bytes: int) -> str:
    padded_bytes = min(-(-size_bytes // BLOCK_BYTES) * BLOCK_BYTES, len(view))
    pieces, lock, errors = iter(range(0, padded_bytes, PIECE_BYTES)), threading.Lock(), list[OSError]()

    def write() -> None:
        try:
            while not errors:
                with lock:
                    at = next(pieces, None)
                if at is None:
                    return
                _write_piece(fd, view[at : min(at + PIECE_BYTES, padded_bytes)], at)
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=write, daemon=True) for _ in range(WRITERS if padded_bytes > PIECE_BYTES else 0)]
    for thread in threads:
        thread.start()
    digest = blake3()
    for at in itertools.takewhile(lambda _: not errors, range(0, size_bytes, DIGESTED_BYTES)):
        digest.update(view[at : min(at + DIGESTED_BYTES, size_bytes)])
        os.sched_yield()  # else a rank whose turn it is waits until the kernel looks again, some milliseconds
    for thread in threads:
        thread.join()
    if not threads:
        write()
    if errors:
        raise errors[0]
    os.ftruncate(fd, size_bytes)
    return f"blake3:{digest.hexdigest()}"


def _write_piece(fd: int, piece: memoryview, at: int) -> None:
    done = 0
    while done < len(piece):
        try:
            done += os.pwrite(fd, piece[done:], at + done)
        except OSError as error:
            flags = fcntl.fcntl(fd, fcntl.F_GETFL)
            if error.errno != errno.EINVAL or not flags & os.O_DIRECT:
                raise
            fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)  # a file system that wants other multiples, or none of this
