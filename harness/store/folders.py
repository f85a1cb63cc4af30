"""Give files and folders their names durably, on any file system; of files, also exclusively.

Hard links do that, and most file systems have them. Some network and FUSE file systems (gcsfuse,
vfat, exFAT) do not, and some cannot fsync a folder.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import os
import sys
from pathlib import Path

from harness.errors import StorageError
from harness.text import say

AT_FDCWD, RENAME_NOREPLACE = -100, 1
# What file systems answer that do not support an operation.
UNSUPPORTED = frozenset(
    {errno.EPERM, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK}
)
_warned = set[int]()  # devices that were named in a warning


def take_name(temp: Path, path: Path) -> None:
    """Give a durable temporary file its final name, unless that name is taken.

    Of several callers exactly one succeeds. With a hard link or an exclusive rename, the file
    appears whole. Where the file system supports neither, it is created under the final name: a
    kill then leaves an empty or torn file, whose name stays taken.

    Raises:
        FileExistsError: The name is taken.
        StorageError: The file system supports none of the three.
        OSError: Any other failure.
    """
    for way in (_link, _rename, _copy):
        try:
            return way(temp, path)
        except FileExistsError:
            raise
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            refused = error
    raise StorageError(
        f"the file system of {path.parent} cannot create a file exclusively",
        f"found: {refused.strerror}, also for a hard link and for renameat2",
        "Two starts could both take one attempt's number. If you may write there, put run.dir on "
        "another file system; object stores are reached by run.remote.",
    ) from refused


def _link(temp: Path, path: Path) -> None:
    """Link the file. NFS may lose the reply of a link that was made: the file has two then."""
    try:
        os.link(temp, path)
    except OSError:
        if os.stat(temp).st_nlink != 2:
            raise


def _rename(temp: Path, path: Path) -> None:
    """Rename the file without replacing another, by the Linux system call."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    names = os.fsencode(temp), os.fsencode(path)
    if rename(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_NOREPLACE) == 0:
        return
    code = ctypes.get_errno()
    # A server may have lost the reply: nobody else renames this file.
    if os.path.lexists(temp):
        raise OSError(code, os.strerror(code), str(path))


def _copy(temp: Path, path: Path) -> None:
    """Create the file under its final name, and write it there."""
    data = temp.read_bytes()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        while data:
            data = data[os.write(fd, data) :]
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_folder(path: Path) -> None:
    """Make the names in a folder durable; warn once where the file system cannot."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise
        _warn(path, os.fstat(fd).st_dev)
    finally:
        with contextlib.suppress(OSError):
            os.close(fd)


def _warn(path: Path, device: int) -> None:
    if device not in _warned:
        _warned.add(device)
        say(
            f"harness: warning: the file system of {path} cannot fsync a folder: "
            "after a power loss there the last files may be missing",
            sys.stderr,
        )


def make(path: Path) -> None:
    """Create a folder durably in one that exists, if it is not there. Raises OSError."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(path)
    fsync_folder(path.parent)


def make_all(path: Path) -> None:
    """Create a folder and those above it durably, as far as they are not there.

    An earlier process may have been killed when it had created one, and before that was durable.
    Each is durable before another is created in it, so that this can only be the innermost.

    Raises:
        FileExistsError: A file is in the way.
        OSError: Any other failure.
    """
    missing = list(itertools.takewhile(lambda made: not made.is_dir(), (path, *path.parents)))
    innermost = missing[-1].parent if missing else path
    if not innermost.is_mount():
        with contextlib.suppress(PermissionError):  # then others have created it
            fsync_folder(innermost.parent)
    for made in reversed(missing):
        made.mkdir(exist_ok=True)
        fsync_folder(made.parent)


def drop(path: Path) -> None:
    """Delete a folder if it is there and empty. Raises OSError for any other failure."""
    try:
        os.rmdir(path)
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    fsync_folder(path.parent)
