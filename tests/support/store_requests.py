"""Count what a process asks of a run's stores: of its directory, and of a bucket of fsspec's."""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

DIRECTORY, BUCKET = "directory", "bucket"
_watching: list[Requests] = []


class Requests(Counter[tuple[str, str, str]]):
    """How often each (place, kind of request, key) was asked for, by any thread of this process."""

    def begin(self, directory: Path) -> None:
        """Count what this run directory and any bucket is asked for from now on."""
        self.directory = str(directory)
        _watching.append(self)

    def end(self) -> None:
        """Count no more; a second call does nothing."""
        if self in _watching:
            _watching.remove(self)

    def of(self, place: str, kind: str, begin: str = "", end: str = "") -> dict[str, int]:
        """The requests of one kind for the keys with this beginning and end, by key."""
        chosen = {
            key: n for (where, what, key), n in self.items() if (where, what) == (place, kind)
        }
        return {key: n for key, n in chosen.items() if key.startswith(begin) and key.endswith(end)}

    def by_folder(self, place: str, kind: str, *folders: str) -> dict[str, int]:
        """The number of requests of one kind for the files of each of these folders, or for it."""
        return {folder: sum(self.of(place, kind, folder).values()) for folder in folders}


def _saw(event: str, arguments: tuple[Any, ...]) -> None:
    """What the interpreter tells of each file that is opened and each folder that is listed."""
    for requests in _watching if event in ("os.scandir", "open") else ():
        path = os.fspath(arguments[0]) if isinstance(arguments[0], (str, os.PathLike)) else ""
        if not path.startswith(f"{requests.directory}/"):
            continue
        kind = "list"
        if event == "open":
            if arguments[2] & os.O_DIRECTORY:
                continue  # to make a new name durable
            kind = "write" if arguments[2] & (os.O_WRONLY | os.O_RDWR) else "read"
        key = path[len(requests.directory) + 1 :].partition(".tmp-")[0]
        requests[DIRECTORY, kind, key] += 1


class CountedBucket(MemoryFileSystem):
    """fsspec's memory, under a protocol of its own: it counts, and does nothing else."""

    protocol = ("counted",)
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return f"/{path.removeprefix('counted://').strip('/')}"

    def _count(self, kind: str, path: str) -> None:
        for requests in _watching:
            requests[BUCKET, kind, path.partition("/run/")[2]] += 1

    def ls(self, path: str, detail: bool = True, **more: Any) -> Any:
        self._count("list", path)
        return super().ls(path, detail=detail, **more)

    def cat_file(self, path: str, *range_: Any, **more: Any) -> Any:
        self._count("read", path)
        return super().cat_file(path, *range_, **more)

    def pipe_file(self, path: str, *value: Any, **more: Any) -> None:
        self._count("write", path)
        super().pipe_file(path, *value, **more)


sys.addaudithook(_saw)  # it stays for good, and is silent unless one counts
fsspec.register_implementation("counted", CountedBucket, clobber=True)
