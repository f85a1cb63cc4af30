"""Assemble a large file in reusable shared memory and write it to disk without another copy.

The memory holds the bytes exactly as they will be in the file.
"""

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

# Bytes per write and per digest update. A thread that waits for this core waits for one of these.
PIECE_BYTES, DIGESTED_BYTES = (4 << 20, 256 << 10)
LENT_BYTES = 8 << 20  # bytes per read of a lease
BLOCK_BYTES = 4096  # O_DIRECT requires addresses, offsets and lengths that are multiples of this
# Smaller files go through the page cache, where the next start finds them.
DIRECT_FROM_BYTES = 256 << 20
WRITERS = 2  # writes in flight: with a single one the disk is idle between two writes
SPARE = 0.9  # the largest fraction of the free memory to use


class ReadLease:
    """A permission to read a staging buffer until the buffer is needed again."""

    def __init__(self, fd: int, size_bytes: int) -> None:
        self._fd, self.size_bytes = fd, size_bytes
        self._is_over, self._reading = False, threading.Lock()

    def chunks(self) -> Iterator[bytes]:
        """Yield the file's bytes in pieces.

        If the lease ends, the iterator ends early, without an error: the caller must count the
        bytes.
        """
        at = 0
        while at < self.size_bytes:
            with self._reading:
                if self._is_over:
                    return
                # Unlike a copy from the mapping, `pread` releases the GIL.
                chunk = os.pread(self._fd, min(LENT_BYTES, self.size_bytes - at), at)
            at += len(chunk)
            yield chunk

    def end(self) -> None:
        """Wait for a read in progress, then allow no further reads."""
        with self._reading:
            self._is_over = True


class StagingBuffer:
    """Anonymous shared memory, which another process can map by its descriptor `fd`."""

    def __init__(self) -> None:
        self.fd = -1
        self.size_bytes = 0
        self.capacity_bytes = 0
        self.memory: mmap.mmap | None = None
        self._lease = ReadLease(-1, 0)

    def reserve(self, size_bytes: int) -> None:
        """Make room for a file of `size_bytes` bytes; the previous content becomes invalid.

        An active read lease is ended first.

        Raises:
            StorageError: There is not enough memory.
        """
        self._lease.end()
        if size_bytes > self.capacity_bytes:
            capacity_bytes = -(-size_bytes // BLOCK_BYTES) * BLOCK_BYTES
            self.check_room(capacity_bytes)
            try:
                if self.fd < 0:
                    self.fd = create("checkpoint")
                os.ftruncate(self.fd, capacity_bytes)
                # The previous mapping stays valid until its last memoryview is released.
                self.memory = mmap.mmap(self.fd, capacity_bytes)
            except OSError as error:
                raise StorageError(
                    "there is not enough memory for a copy of the state", f"found: {error}"
                ) from error
            self.capacity_bytes = capacity_bytes
        self.size_bytes = size_bytes

    def check_room(self, size_bytes: int) -> None:
        """Raise StorageError if there is not enough memory for a file of `size_bytes` bytes."""
        more_bytes = size_bytes - self.capacity_bytes
        if more_bytes > 0 and more_bytes > SPARE * (free_bytes := free_memory_bytes()):
            raise StorageError(
                "there is not enough memory for a copy of the state",
                f"found: {free_bytes} bytes, needed: {more_bytes}",
            )

    def lend(self) -> ReadLease:
        """Return a lease to read the content, which ends at the next `reserve` or `close`."""
        self._lease = ReadLease(self.fd, self.size_bytes)
        return self._lease

    def chunks(self) -> Iterator[memoryview]:
        """Yield the file's bytes in pieces, without copying them."""
        assert self.memory is not None, "there is something in it"
        view = memoryview(self.memory)
        for at in range(0, self.size_bytes, PIECE_BYTES):
            yield view[at : min(at + PIECE_BYTES, self.size_bytes)]

    def close(self) -> None:
        """End the lease and free the memory once no mapping or memoryview is left."""
        self._lease.end()
        if self.fd >= 0:
            os.close(self.fd)
        self.fd, self.memory, self.size_bytes, self.capacity_bytes = -1, None, 0, 0


def free_memory_bytes(root: Path = Path("/")) -> int:
    """Return the memory in bytes that this process can still allocate.

    It is the minimum of MemAvailable and of what the job's control groups (version 1 and 2) leave,
    by Linux's own estimates.

    Args:
        root: Root of the file system with `proc` and `sys`.
    """
    free = 1 << 60
    with contextlib.suppress(OSError, ValueError, KeyError):
        free = 1024 * _numbers(root / "proc/meminfo")["MemAvailable:"]
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, kinds, own = line.split(":", 2)
            if kinds == "":
                free = min(
                    free,
                    _left_in(
                        root / "sys/fs/cgroup", own, "memory.max", "memory.current", "inactive_file"
                    ),
                )
            elif "memory" in kinds.split(","):
                names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
                free = min(free, _left_in(root / "sys/fs/cgroup/memory", own, *names))
    return max(0, free)


def _left_in(top: Path, own: str, most: str, used: str, cached: str) -> int:
    """Return the bytes that a control group and its parents leave of their limits.

    Inactive file cache counts as free, since the kernel reclaims it.

    Args:
        top: Mount point of the control groups.
        own: Path of the job's own group, relative to `top`.
        most: Name of the file with the limit.
        used: Name of the file with the usage.
        cached: Name of the field of `memory.stat` with the inactive file cache.
    """
    left, group = 1 << 60, top / own.strip("/")
    for folder in (group, *group.parents):
        with contextlib.suppress(OSError, ValueError, KeyError):  # a limit may be the word "max"
            limit = int((folder / most).read_text())
            left = min(
                left,
                limit - int((folder / used).read_text()) + _numbers(folder / "memory.stat")[cached],
            )
        if folder == top:
            break
    return left


def _numbers(file: Path) -> dict[str, int]:
    """Return the first number of each line of a file, by the line's first word."""
    return {
        fields[0]: int(fields[1])
        for line in file.read_text().splitlines()
        if len(fields := line.split()) > 1
    }


def write_to(
    memory: mmap.mmap, size_bytes: int, path: str, direct_from_bytes: int = DIRECT_FROM_BYTES
) -> str:
    """Write page-aligned memory to an existing file and return the digest of the bytes.

    A large file is written with O_DIRECT where the file system supports it, in whole blocks, and
    then truncated to its size. This saves the copy into the page cache and does not evict pages
    that others need. Digesting and writing run at the same time. The caller makes the file durable.

    Args:
        memory: The memory, aligned to pages.
        size_bytes: Number of bytes to write, from the beginning of the memory.
        path: Path of the existing file.
        direct_from_bytes: Size in bytes from which on O_DIRECT is used.

    Raises:
        OSError: The file cannot be opened or written.
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
    """Write the first `size_bytes` bytes of a view with `WRITERS` threads; return their digest."""
    padded_bytes = min(-(-size_bytes // BLOCK_BYTES) * BLOCK_BYTES, len(view))
    pieces = iter(range(0, padded_bytes, PIECE_BYTES))
    lock = threading.Lock()
    errors = list[OSError]()

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

    threads = [
        threading.Thread(target=write, daemon=True)
        for _ in range(WRITERS if padded_bytes > PIECE_BYTES else 0)
    ]
    for thread in threads:
        thread.start()
    digest = blake3()
    for at in itertools.takewhile(lambda _: not errors, range(0, size_bytes, DIGESTED_BYTES)):
        digest.update(view[at : min(at + DIGESTED_BYTES, size_bytes)])
        # Without this, a waiting rank on this core runs only at the next scheduler tick, some
        # milliseconds later.
        os.sched_yield()
    for thread in threads:
        thread.join()
    if not threads:
        write()
    if errors:
        raise errors[0]
    os.ftruncate(fd, size_bytes)
    return f"blake3:{digest.hexdigest()}"


def _write_piece(fd: int, piece: memoryview, at: int) -> None:
    """Write a piece at offset `at`; turn O_DIRECT off if the file system rejects the write."""
    done = 0
    while done < len(piece):
        try:
            done += os.pwrite(fd, piece[done:], at + done)
        except OSError as error:
            flags = fcntl.fcntl(fd, fcntl.F_GETFL)
            if error.errno != errno.EINVAL or not flags & os.O_DIRECT:
                raise
            # The file system requires another alignment or does not support O_DIRECT.
            fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)
