"""A simulated disk under the module `os`: what was not made durable may be lost, or torn, when the
power fails.

A file's bytes are durable once it was fsynced; a name, a rename or a removal once its folder was.
Each call is a scheduling point, and may be refused.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path, PosixPath
from types import SimpleNamespace
from typing import Any, ClassVar

from simulator import Simulator

REFUSALS = (errno.EIO, errno.ENOSPC, errno.EROFS, errno.EDQUOT)


class File:
    def __init__(self) -> None:
        self.data, self.durable, self.links = bytearray(), b"", 1

    def crash(self, simulator: Simulator) -> None:
        """Keep what was durable; of the rest all, a part, zeros or nothing."""
        if self.data != self.durable:
            whole = bytes(self.data)
            torn = whole[: simulator.share_of(len(whole))]
            left = [self.durable, torn, bytes(len(whole)), whole]
            self.data = bytearray(left[simulator.share_of(len(left))])
            self.durable = bytes(self.data)


class Folder:
    def __init__(self) -> None:
        self.names, self.durable = dict[str, Any](), dict[str, Any]()
        self._changes = list[dict[str, Any]]()  # since the last fsync; each at once or not at all

    def change(self, **names: Any) -> None:
        """Give names, or take them away (None)."""
        self._apply(names)
        self._changes.append(names)

    def _apply(self, names: dict[str, Any]) -> None:
        self.names = {name: of for name, of in (self.names | names).items() if of is not None}

    def fsync(self) -> None:
        self.durable, self._changes = dict(self.names), []

    def crash(self, simulator: Simulator) -> None:
        """Keep what was durable, and some of the changes since."""
        self.names, changes = self.durable, self._changes
        for names in changes:
            if simulator.chance(0.5):
                self._apply(names)
        self.fsync()
        for inner in self.names.values():
            inner.crash(simulator)


class Disk:
    """The files of one machine, or of all machines of one file server."""

    def __init__(self, number: int) -> None:
        self.number, self.root = number, Folder()

    def crash(self, simulator: Simulator) -> None:
        self.root.crash(simulator)

    def files(self, root: str, *, durable: bool = False) -> dict[str, bytes]:
        """All files below a path, by key; if `durable`, what a power loss leaves at worst."""

        def within(folder: Folder, prefix: str) -> Iterator[tuple[str, bytes]]:
            for name, inner in (folder.durable if durable else folder.names).items():
                if isinstance(inner, Folder):
                    yield from within(inner, f"{prefix}{name}/")
                else:
                    yield prefix + name, bytes(inner.durable if durable else inner.data)

        everything = dict(within(self.root, "/"))
        below = f"{root}/"
        return {k.removeprefix(below): v for k, v in everything.items() if k.startswith(below)}

    def file(self, path: str) -> Any:
        *above, name = path.strip("/").split("/")
        folder = self.root
        for part in above:
            folder = folder.names[part]
        return folder.names[name]


class Open:
    """What a descriptor stands for."""

    def __init__(self, of: Any) -> None:
        self.of, self.at = of, 0


class System:
    """What the module `os` is to the program, on the disk of the machine that calls."""

    def __init__(self, simulator: Simulator) -> None:
        self._simulator, self._open, self._next = simulator, dict[int, Open](), 10_000
        self.refused = 0.0  # how often

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)  # constants, and what touches no file

    def _call(self, what: str, path: object, *, may_fail: bool = True) -> None:
        self._simulator.call(f"{what} {path}")
        if may_fail and self._simulator.chance(self.refused):
            code = self._simulator.random.choice(REFUSALS)
            self._simulator.note(f"  refused: {errno.errorcode[code]}")
            raise OSError(code, os.strerror(code), str(path))

    def _folder_of(self, path: object) -> tuple[Folder, str]:
        *above, name = str(path).strip("/").split("/")
        folder = self._simulator.process.machine.disk.root
        for part in above:
            folder = folder.names.get(part) if isinstance(folder, Folder) else None
            if folder is None:
                raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))
        if not isinstance(folder, Folder):
            raise NotADirectoryError(errno.ENOTDIR, "Not a directory", str(path))
        return folder, name

    def _at(self, path: object) -> Any:
        if str(path) == "/":
            return self._simulator.process.machine.disk.root
        folder, name = self._folder_of(path)
        if name not in folder.names:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))
        return folder.names[name]

    def has_folder(self, path: object) -> bool:
        with contextlib.suppress(OSError):
            return isinstance(self._at(path), Folder)
        return False

    def open(self, path: object, flags: int, mode: int = 0o777) -> int:
        self._call("open", path)
        if not flags & os.O_CREAT:
            of = self._at(path)
        else:
            folder, name = self._folder_of(path)
            if flags & os.O_EXCL and name in folder.names:
                raise FileExistsError(errno.EEXIST, "File exists", str(path))
            if name not in folder.names:
                folder.change(**{name: File()})
            of = folder.names[name]
        self._next += 1
        self._open[self._next] = Open(of)
        return self._next

    def close(self, fd: int) -> None:
        del self._open[fd]

    def write(self, fd: int, data: Any) -> int:
        # torch.save writes dozens of small pieces; a death between two of them is like another.
        if not self._open[fd].of.data or self._simulator.chance(0.1):
            self._call("write", fd)
        # All of it, or less: both are allowed.
        data = bytes(data)
        if len(data) > 1 and self._simulator.chance(0.05):
            data = data[: 1 + self._simulator.share_of(len(data) - 1)]
        self._open[fd].of.data += data
        return len(data)

    def read(self, fd: int, most: int) -> bytes:
        self._call("read", fd)
        opened = self._open[fd]
        data = bytes(opened.of.data[opened.at : opened.at + most])
        opened.at += len(data)
        return data

    def lseek(self, fd: int, offset: int, whence: int) -> int:
        self._open[fd].at = offset
        return offset

    def fsync(self, fd: int) -> None:
        self._call("fsync", fd)
        of = self._open[fd].of
        if isinstance(of, Folder):
            of.fsync()
        else:
            of.durable = bytes(of.data)

    fdatasync = fsync

    def fdopen(self, fd: int, mode: str, buffering: int) -> io.BytesIO:
        file = Opened(bytes(self._open[fd].of.data))
        file.number = fd
        return file

    def link(self, source: object, path: object) -> None:
        self._call("link", path)
        of, (folder, name) = self._at(source), self._folder_of(path)
        if name in folder.names:
            raise FileExistsError(errno.EEXIST, "File exists", str(path))
        of.links += 1
        folder.change(**{name: of})

    def replace(self, source: object, path: object) -> None:
        self._call("rename", path)
        of, (folder, name) = self._at(source), self._folder_of(path)
        folder.change(**{Path(str(source)).name: None, name: of})

    rename = replace

    def unlink(self, path: object) -> None:
        self._call("unlink", path)
        folder, name = self._folder_of(path)
        self._at(path).links -= 1
        folder.change(**{name: None})

    def mkdir(self, path: object, mode: int = 0o777) -> None:
        self._call("mkdir", path)
        folder, name = self._folder_of(path)
        if name in folder.names:
            raise FileExistsError(errno.EEXIST, "File exists", str(path))
        folder.change(**{name: Folder()})

    def rmdir(self, path: object) -> None:
        self._call("rmdir", path)
        folder, name = self._folder_of(path)
        if self._at(path).names:
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))
        folder.change(**{name: None})

    def listdir(self, path: object) -> list[str]:
        self._call("list", path)
        return list(self._at(path).names)

    def scandir(self, path: object) -> contextlib.nullcontext[list[Found]]:
        self._call("list", path)
        return contextlib.nullcontext([Found(*item) for item in self._at(path).names.items()])

    def lstat(self, path: object) -> SimpleNamespace:
        self._call("stat", path)
        return _status(self._at(path))

    stat = lstat

    def fstat(self, fd: int) -> SimpleNamespace:
        return _status(self._open[fd].of)


class Opened(io.BytesIO):
    number = -1

    def fileno(self) -> int:
        return self.number


class Found:
    """An entry of a folder."""

    def __init__(self, name: str, of: Any) -> None:
        self.name, self._of = name, of

    def is_file(self, *, follow_symlinks: bool) -> bool:
        return isinstance(self._of, File)

    def is_dir(self, *, follow_symlinks: bool) -> bool:
        return isinstance(self._of, Folder)

    def stat(self, *, follow_symlinks: bool) -> SimpleNamespace:
        return _status(self._of)


def _status(of: Any) -> SimpleNamespace:
    if isinstance(of, Folder):
        return SimpleNamespace(st_mode=stat.S_IFDIR, st_size=0, st_nlink=2, st_dev=1)
    size_bytes = len(of.data)
    return SimpleNamespace(st_mode=stat.S_IFREG, st_size=size_bytes, st_nlink=of.links, st_dev=1)


class SimulatedPath(PosixPath):
    """A path whose own methods go to the simulated disk, too."""

    system: ClassVar[System]

    def is_dir(self) -> bool:
        return self.system.has_folder(self)

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        if parents and not self.parent.is_dir():
            self.parent.mkdir(mode, parents, exist_ok)
        try:
            self.system.mkdir(self, mode)
        except FileExistsError:
            if not (exist_ok and self.is_dir()):
                raise

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            self.system.unlink(self)
        except FileNotFoundError:
            if not missing_ok:
                raise
