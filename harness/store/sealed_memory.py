"""A file's bytes in memory, once on each machine: kept while they are verified, sealed, and mapped by every process that parses them.

It is an anonymous file of Linux (memfd): no disk is written, it has a path (`/proc/self/fd/N`) for what wants to map a file, and its
pages are the same ones in each process that maps it. A sealed one is changed by nobody any more, so what was verified is what is parsed.
Its memory is free when its last descriptor is closed and its last mapping is gone.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from harness.errors import HarnessError

NO_EXEC = 0x0008  # MFD_NOEXEC_SEAL: where vm.memfd_noexec=2 nothing else is allowed, and before Linux 6.3 it is unknown
SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


@dataclass(frozen=True)
class Handle:
    """Where other processes of this machine find a sealed memory, and how they know it.

    In another container, or on another machine, the path may lead to somebody else's file, even to one with the same numbers: the name
    is random, and the kernel tells it of the file that was really opened.
    """

    path: str
    name: str


class SealedMemory:
    """The bytes; a context manager that lets them go."""

    def __init__(self, fd: int, name: str) -> None:
        self.fd, self._name = fd, name

    @property
    def path(self) -> str:
        """What this process maps, or opens anew, while the memory is not closed."""
        return f"/proc/self/fd/{self.fd}"

    @property
    def offer(self) -> Handle:
        return Handle(f"/proc/{os.getpid()}/fd/{self.fd}", self._name)

    def append(self, chunk: bytes) -> None:
        """Written, not mapped and stored into: where there is no memory a write fails, but a store kills the process."""
        view = memoryview(chunk)
        while len(view):
            view = view[os.write(self.fd, view) :]

    def open(self) -> BinaryIO:
        """To be read from its beginning."""
        return open(self.path, "rb", buffering=1 << 16)

    def close(self) -> None:
        """What is mapped stays."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> SealedMemory:
        return self

    def __exit__(self, *ignored: object) -> None:
        self.close()


def keep(chunks: Iterable[bytes], size_bytes: int, what: str) -> SealedMemory:
    """All the chunks, at most `size_bytes` together, sealed.

    What `chunks` raises passes through, and nothing is kept then. Raises HarnessError if there is not enough memory for `what`.
    """
    name = f"harness-{secrets.token_hex(16)}"
    with _room(what, size_bytes):
        memory = SealedMemory(create(name), name)
    try:
        for chunk in chunks:  # by this very thread, which has the chunk in its processor's cache: a second one made it slower
            with _room(what, size_bytes):
                memory.append(chunk)
        with _room(what, size_bytes):
            fcntl.fcntl(memory.fd, fcntl.F_ADD_SEALS, SEALS)
    except BaseException:
        memory.close()
        raise
    return memory


@contextlib.contextmanager
def _room(what: str, size_bytes: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        found = f"found: {error.strerror}, expected: room for {size_bytes} bytes"
        raise HarnessError(f"there is not enough memory to load {what}", found) from error


def create(name: str) -> int:
    """The descriptor of a new anonymous file. Raises OSError."""
    try:
        return os.memfd_create(name, os.MFD_CLOEXEC | NO_EXEC)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)


def attached(offer: Handle, size_bytes: int) -> SealedMemory | None:
    """What another process of this machine has offered, without a copy; None if this process does not see it, or sees another file."""
    expected = f"/memfd:{offer.name} (deleted)"
    try:
        if os.readlink(offer.path) != expected:  # before it is opened: with a device that alone may do something
            return None
        fd = os.open(offer.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    memory = SealedMemory(fd, offer.name)
    with contextlib.suppress(OSError):
        sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & SEALS == SEALS
        if os.readlink(memory.path) == expected and sealed and os.fstat(fd).st_size == size_bytes:
            return memory
    memory.close()
    return None
