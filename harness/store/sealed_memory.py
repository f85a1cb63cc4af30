"""Hold a file's bytes in sealed memory, once per machine, for all processes that parse them.

The bytes are stored while they are verified, then sealed, and then mapped by every process that
parses them. The memory is an anonymous file of Linux (memfd). It writes no disk, it has a path
(`/proc/self/fd/N`) for code that maps a file by path, and all processes that map it share its
pages. A sealed memfd can no longer be changed by any process, so the parsed bytes are the verified
bytes. The memory is freed when the last descriptor is closed and the last mapping is gone.
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

# MFD_NOEXEC_SEAL: required where vm.memfd_noexec=2 is set, unknown before Linux 6.3.
NO_EXEC = 0x0008
SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


@dataclass(frozen=True)
class Handle:
    """The path and the name of a sealed memory, for other processes of this machine.

    In another container, or on another machine, the path may lead to a different file, since the
    process id and the descriptor number can be the same. The name is random, and the kernel reports
    the name of the file that was really opened.
    """

    path: str
    name: str


class SealedMemory:
    """A memfd with a file's bytes; as a context manager it closes its descriptor on exit."""

    def __init__(self, fd: int, name: str) -> None:
        self.fd, self._name = fd, name

    @property
    def path(self) -> str:
        """Return the path by which this process maps or reopens the memory until `close`."""
        return f"/proc/self/fd/{self.fd}"

    @property
    def offer(self) -> Handle:
        """Return the handle by which other processes of this machine attach the memory."""
        return Handle(f"/proc/{os.getpid()}/fd/{self.fd}", self._name)

    def append(self, chunk: bytes) -> None:
        """Append a chunk with `write`, not through a mapping.

        If memory runs out, `write` raises an OSError, but a store into a mapping kills the process.
        """
        view = memoryview(chunk)
        while len(view):
            view = view[os.write(self.fd, view) :]

    def open(self) -> BinaryIO:
        """Open the memory for reading, from its beginning."""
        return open(self.path, "rb", buffering=1 << 16)

    def close(self) -> None:
        """Close the descriptor; existing mappings stay valid."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> SealedMemory:
        return self

    def __exit__(self, *ignored: object) -> None:
        self.close()


def keep(chunks: Iterable[bytes], size_bytes: int, subject: str) -> SealedMemory:
    """Write all chunks to a new memfd and seal it.

    Args:
        chunks: The content. Its errors pass through, and the memory is freed.
        size_bytes: Upper bound of the total size, for the message.
        subject: Name of the content, for the message.

    Raises:
        HarnessError: There is not enough memory.
    """
    name = f"harness-{secrets.token_hex(16)}"
    with _room(subject, size_bytes):
        memory = SealedMemory(create(name), name)
    try:
        # Write in this thread, which has the chunk in its CPU cache: a second thread was slower.
        for chunk in chunks:
            with _room(subject, size_bytes):
                memory.append(chunk)
        with _room(subject, size_bytes):
            fcntl.fcntl(memory.fd, fcntl.F_ADD_SEALS, SEALS)
    except BaseException:
        memory.close()
        raise
    return memory


@contextlib.contextmanager
def _room(subject: str, size_bytes: int) -> Iterator[None]:
    """Convert an OSError of the block into a HarnessError about missing memory."""
    try:
        yield
    except OSError as error:
        details = f"found: {error.strerror}, expected: room for {size_bytes} bytes"
        raise HarnessError(f"there is not enough memory to load {subject}", details) from error


def create(name: str) -> int:
    """Create an anonymous file (memfd) and return its descriptor. Raises OSError."""
    try:
        return os.memfd_create(name, os.MFD_CLOEXEC | NO_EXEC)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)


def attached(offer: Handle, size_bytes: int) -> SealedMemory | None:
    """Open a sealed memory of another process on this machine, without a copy.

    Returns:
        The memory, or None if this process cannot open the path, or if the path leads to another
        file, to one that is not sealed, or to one of another size.
    """
    expected = f"/memfd:{offer.name} (deleted)"
    try:
        # Check the name before opening the file, since opening a device may have side effects.
        if os.readlink(offer.path) != expected:
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
