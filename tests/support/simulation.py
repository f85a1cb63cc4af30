"""A deterministic simulation of processes that share a disk and a bucket.

Each process is a thread, and one of them runs at a time. Whenever one asks the disk, the bucket or
another rank for something, a seeded generator decides who runs next, and what befalls this one: it
is killed, frozen for a long time, refused, or its reply is lost. Only simulated time passes.
"""

from __future__ import annotations

import contextlib
import io
import random
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, BinaryIO

from harness.errors import StorageError
from harness.store import SET_ASIDE, Entry, Sink, Store
from harness.store.bucket import MissingError, ObjectMetadata, TakenError

SWITCH_S = 0.05  # how long each turn of a process takes
FROZEN_S = 500.0


class KilledError(BaseException):
    """The process is gone; raised in it at whatever it asks for next."""


class Process:
    """One simulated process: a rank of one life of a run."""

    def __init__(self, name: str, group: list[Process], work: Callable[[], object]) -> None:
        self.name, self.group, self.work = name, group, work
        self.turn = threading.Semaphore(0)
        self.wakes_at, self.is_killed, self.is_over = 0.0, False, False
        self.error: BaseException | None = None


class Simulation:
    """Processes in turns, and what befalls them.

    Args:
        seed: decides everything.
        trouble: the probability that something befalls a process at one request.
    """

    def __init__(self, seed: int, trouble: float) -> None:
        self.rng, self.trouble, self.now = random.Random(seed), trouble, 0.0
        self.trace = list[str]()
        self.late = list[Callable[[], object]]()  # requests that are still on their way
        self._processes, self._running = list[Process](), list[Process]()
        self._back = threading.Semaphore(0)

    def spawn(self, process: Process) -> None:
        """Begin a process; it runs in `run_until`."""

        def body() -> None:
            process.turn.acquire()
            try:
                if not process.is_killed:
                    process.work()
            except KilledError:
                pass
            except BaseException as error:  # noqa: BLE001 - the test looks at it
                process.error = error
            process.is_over = True
            self._back.release()

        process.group.append(process)
        self._processes.append(process)
        threading.Thread(target=body, daemon=True).start()

    def run_until(self, is_done: Callable[[], bool]) -> None:
        """Give processes turns until something is so, or none is left."""
        for _ in range(100_000):
            alive = [one for one in self._processes if not one.is_over]
            if is_done() or not alive:
                return
            if self.late and self.rng.random() < 0.1:
                self.late.pop(self.rng.randrange(len(self.late)))()
            ready = [one for one in alive if one.wakes_at <= self.now or one.is_killed]
            if not ready:
                self.now = min(one.wakes_at for one in alive)
                continue
            chosen = self.rng.choice(ready)
            self.now += SWITCH_S
            self._running = [chosen]
            chosen.turn.release()
            self._back.acquire()
            self._running = []
        raise AssertionError("the simulation does not come to its end")

    def is_answering(self, process: Process) -> bool:
        """Return whether a process gives signs of life."""
        return not (process.is_over or process.is_killed or process.wakes_at > self.now + 60)

    def sleep(self, seconds: float) -> None:
        """Let the process of this thread sleep."""
        for process in self._running:
            process.wakes_at = self.now + seconds
            self._switch(process)

    def monotonic(self) -> float:
        """Return the time."""
        return self.now

    def _switch(self, process: Process) -> None:
        self._back.release()
        process.turn.acquire()
        if process.is_killed:
            raise KilledError

    def ask(self, what: str, work: Callable[[], Any], *, is_remote: bool = False) -> Any:
        """Carry out a request of the process that runs, and whatever befalls it meanwhile.

        It may come from a helper thread, for which the process waits.
        """
        if not self._running:  # the test itself asks
            return work()
        (process,) = self._running
        if process.is_killed:
            raise KilledError
        self.trace.append(f"{process.name} {what}")
        fate = self._fate(is_remote=is_remote)
        if fate:
            self.trace.append(f"{process.name} {fate}")
        if fate in ("killed before", "killed after"):
            if fate == "killed after":
                work()
            self._kill(process)
        if fate == "frozen":
            process.wakes_at = self.now + FROZEN_S
        self._switch(process)
        if fate == "refused":
            raise StorageError(f"cannot {what}", "found: simulated")
        if fate == "late":
            self.late.append(lambda: _quietly(work))
            raise TimeoutError("simulated")
        result = work()
        if fate == "reply lost":
            raise TimeoutError("simulated")
        return result

    def _fate(self, *, is_remote: bool) -> str:
        if self.rng.random() >= self.trouble:
            return ""
        fates = ["killed before", "killed after", "frozen", "refused"]
        return self.rng.choice([*fates[:3], "late", "reply lost"] if is_remote else fates)

    def _kill(self, process: Process) -> None:
        """Kill a process; in most cases torchrun kills those of its group, too."""
        both = process.group if self.rng.random() < 0.7 else [process]
        for one in both:
            one.is_killed = True
        raise KilledError


def _quietly(work: Callable[[], object]) -> None:
    with contextlib.suppress(MissingError, TakenError):
        work()


class Messages:
    """What ranks of a life leave for one another, as a store of torch.distributed does."""

    def __init__(self, simulation: Simulation) -> None:
        self._simulation, self.values = simulation, dict[str, Any]()

    def set(self, key: str, value: Any) -> None:
        """Leave a value."""
        self._simulation.ask(f"tells {key}", lambda: self.values.__setitem__(key, value))

    def get(self, key: str) -> Any:
        """Return a value."""
        return self.values[key]

    def check(self, keys: Sequence[str]) -> bool:
        """Return whether all values are there."""
        return all(key in self.values for key in keys)

    def add(self, key: str, number: int) -> int:
        """Count."""
        self.values[key] = self.values.get(key, 0) + number
        return int(self.values[key])

    def delete_key(self, key: str) -> None:
        """Delete a value."""
        self.values.pop(key, None)


class Disk(Store):
    """A directory that all processes share: a file appears whole and durably, or not at all."""

    is_local = True

    def __init__(self, name: str, simulation: Simulation) -> None:
        self.name, self.files, self._simulation = name, dict[str, bytes](), simulation
        self._folders = set[str]()

    def __str__(self) -> str:
        return self.name

    def _ask(self, what: str, work: Callable[[], Any]) -> Any:
        return self._simulation.ask(f"{what} in {self.name}", work)

    def where(self, key: str) -> str:
        """Return a path."""
        return f"{self.name}/{key}"

    def with_retry_limit(self, *ignored: Any) -> Disk:
        """Return the same disk."""
        return self

    def entries(self, folder: str) -> list[Entry]:
        """Return the files in a folder."""
        return self.listing(folder)[0]

    def listing(self, folder: str) -> tuple[list[Entry], list[str]]:
        """Return the files and the folders in a folder."""

        def look() -> tuple[list[Entry], list[str]]:
            inner = sorted(key for key in self.files if key.startswith(f"{folder}/"))
            names = [key[len(folder) + 1 :] for key in inner]
            found = [
                Entry(f"{folder}/{n}", len(self.files[f"{folder}/{n}"]))
                for n in names
                if "/" not in n
            ]
            folders = {f"{folder}/{name.partition('/')[0]}" for name in names if "/" in name}
            folders |= {one for one in self._folders if one.rpartition("/")[0] == folder}
            return found, sorted(folders)

        return self._ask(f"list {folder}", look)

    def make_folder(self, folder: str) -> None:
        """Make a folder."""
        self._ask(f"make {folder}", lambda: self._folders.add(folder))

    def drop_folder(self, folder: str) -> None:
        """Delete an empty folder."""

        def drop() -> None:
            if not any(key.startswith(f"{folder}/") for key in self.files):
                self._folders.discard(folder)

        self._ask(f"drop {folder}", drop)

    def exists(self, key: str) -> bool:
        """Return whether there is a file."""
        return self._ask(f"look up {key}", lambda: key in self.files)

    def read(self, key: str) -> bytes:
        """Return a file."""

        def read() -> bytes:
            if key not in self.files:
                raise FileNotFoundError(key)
            return self.files[key]

        return self._ask(f"read {key}", read)

    def open(self, key: str) -> BinaryIO:
        """Open a file."""
        return io.BytesIO(self.read(key))

    def chunks(self, key: str, start: int = 0) -> Iterator[bytes]:
        """Yield a file."""
        yield self.read(key)[start:]

    def writer(self, key: str, attempt: int) -> Sink:
        """Write a file."""
        return Temporary(self, key)

    def create(self, key: str, data: bytes, attempt: int) -> None:
        """Write a file that must not exist."""
        with self.writer(key, attempt) as sink:
            sink.write(data)
            sink.commit(exclusive=True)

    def put(self, key: str, data: bytes, *, exclusive: bool) -> None:
        """Give a file its name."""

        def put() -> None:
            if exclusive and key in self.files:
                raise FileExistsError(key)
            self.files[key] = data

        self._ask(f"{'create' if exclusive else 'write'} {key}", put)

    def delete(self, *keys: str) -> None:
        """Delete files."""
        for key in keys:
            self._ask(f"delete {key}", partial(self.files.pop, key, None))

    def set_aside(self, keys: Sequence[str]) -> None:
        """Rename damaged files."""
        for key in keys:
            if key in self.files:
                self._ask(f"set aside {key}", partial(self._rename, key))

    def _rename(self, key: str) -> None:
        self.files[key + SET_ASIDE] = self.files.pop(key)

    def prepare(self, folders: tuple[str, ...]) -> None:
        """Do nothing."""

    def sweep(self, folders: tuple[str, ...], below_attempt: int) -> list[str]:
        """Do nothing: what is temporary is never seen."""
        return []


class Temporary(Sink):
    """A file of a `Disk` that has no name yet."""

    def __init__(self, disk: Disk, key: str) -> None:
        super().__init__(key)
        self._disk, self._data = disk, bytearray()

    def take(self, view: memoryview) -> None:
        """Keep the bytes."""
        self._data += view

    def commit(self, *, exclusive: bool = False) -> None:
        """Give the file its name."""
        self._disk.put(self.key, bytes(self._data), exclusive=exclusive)

    def discard(self) -> None:
        """Forget the file."""


class Bucket:
    """The requests of an object store (`ObjectClient`); small objects alone."""

    parallel, tells_tags = 1, False

    def __init__(self, simulation: Simulation) -> None:
        self.objects, self._simulation = dict[str, bytes](), simulation

    def _ask(self, what: str, work: Callable[[], Any]) -> Any:
        return self._simulation.ask(f"{what} in the bucket", work, is_remote=True)

    def renew(self) -> None:
        """Do nothing."""

    def list_page(
        self, folder: str, token: str | None, limit_s: float
    ) -> tuple[list[ObjectMetadata], str | None]:
        """Return all that is in a folder."""

        def look() -> list[ObjectMetadata]:
            sizes = defaultdict[str, int](int)
            for key, data in self.objects.items():
                if key.startswith(f"{folder}/"):
                    name, slash, _ = key[len(folder) + 1 :].partition("/")
                    sizes[f"{folder}/{name}{slash}"] = 0 if slash else len(data)
            return [ObjectMetadata(key, size, "") for key, size in sorted(sizes.items())]

        return self._ask(f"list {folder}", look), None

    def head(self, key: str, limit_s: float) -> ObjectMetadata | None:
        """Return an object's size, if there is one."""

        def look() -> ObjectMetadata | None:
            data = self.objects.get(key)
            return None if data is None else ObjectMetadata(key, len(data), "")

        return self._ask(f"look up {key}", look)

    def get(
        self, key: str, start: int, end: int | None, limit_s: float, version: str = ""
    ) -> bytes:
        """Return bytes of an object."""

        def get() -> bytes:
            if key not in self.objects:
                raise MissingError(key)
            return self.objects[key][start:end]

        return self._ask(f"get {key}", get)

    def check_version(self, key: str, version: str, limit_s: float) -> None:
        """Do nothing: a digest is compared."""

    def put(self, key: str, data: bytes, exclusive: bool, limit_s: float) -> str:
        """Put an object."""

        def put() -> None:
            if exclusive and key in self.objects:
                raise TakenError(key)
            self.objects[key] = bytes(data)

        self._ask(f"put {key}", put)
        return ""

    def delete(self, key: str, limit_s: float) -> None:
        """Delete an object."""
        self._ask(f"delete {key}", lambda: self.objects.pop(key, None))

    def drop_folder(self, folder: str, limit_s: float) -> None:
        """Do nothing: there are no folders."""

    def part_bytes(self, number: int, expected_bytes: int) -> int:
        """Return a size that no object here has."""
        return 1 << 30
