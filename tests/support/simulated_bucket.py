"""A simulated bucket: an `ObjectClient` whose requests may be refused, applied without a reply, or
applied late, after other requests or after the death of whoever has sent them.

It is consistent as S3 is: a listing is the truth at the moment of each page. Pages are short, so
that others change the bucket between two.
"""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Callable
from typing import TypeVar

from blake3 import blake3
from simulator import Simulator

from harness.store.bucket import MissingError, ObjectMetadata, Part, TakenError, Unfinished

T = TypeVar("T")
PAGE, PART_BYTES = 5, 1500


class ServiceUnavailable(Exception):  # noqa: N818 - the name that a server gives it
    """503, as a client of fsspec's raises it."""

    status = 503


class Bucket:
    """What all clients of one bucket share."""

    def __init__(self, simulator: Simulator) -> None:
        self.simulator, self.objects = simulator, dict[str, bytes]()
        self.uploads = dict[str, dict[int, bytes]]()
        self.numbers = itertools.count(1)
        self.refused = self.unheard = self.late = 0.0  # how often
        self.away_until = 0.0
        self.pending = 0  # requests that are still to be applied
        self.deleted = dict[str, str]()  # key -> the life that has deleted it
        # Manifests whose PUT came when retention, or another life, had deleted some of the files.
        self.risen = set[str]()

    def has_lost_files_of(self, key: str, life: str) -> bool:
        stem = key.removesuffix(".json")
        others = (by != life for k, by in self.deleted.items() if k.startswith(stem))
        return key in self.deleted or any(others)


class BucketClient:
    """A client for one process."""

    parallel, tells_tags = 2, True

    def __init__(self, bucket: Bucket) -> None:
        self.bucket, self._simulator = bucket, bucket.simulator

    @property
    def _life(self) -> str:
        return self._simulator.process.name.split(".")[0]

    def _ask(self, what: str, apply: Callable[[], T], limit_s: float, *, writes: bool) -> T:
        bucket, simulator = self.bucket, self._simulator
        simulator.call(what)
        if simulator.now < bucket.away_until or simulator.chance(bucket.refused):
            simulator.note("  refused: 503")
            raise ServiceUnavailable("503 Slow Down")
        if writes and simulator.chance(bucket.late):
            later_s = simulator.random.choice([0.1, 1.0, limit_s + 1.0, 10 * limit_s])
            limit_s = simulator.random.choice([limit_s, limit_s, 1.0])
            simulator.note(f"  applied late, after {later_s:.1f} s")
            bucket.pending += 1
            simulator.at(simulator.now + later_s, lambda: self._apply_late(what, apply))
            simulator.wait(limit_s=limit_s)
            raise TimeoutError("no reply")
        result = apply()
        if writes and simulator.chance(bucket.unheard):
            simulator.note("  applied, the reply is lost")
            simulator.wait(limit_s=limit_s)
            raise TimeoutError("no reply")
        return result

    def _apply_late(self, what: str, apply: Callable[[], object]) -> None:
        self.bucket.pending -= 1
        try:
            apply()
        except (MissingError, TakenError) as error:
            self._simulator.note(f"late {what}: {type(error).__name__}")
        else:
            self._simulator.note(f"late {what}")

    def renew(self) -> None:
        pass

    def now(self, limit_s: float) -> datetime.datetime:
        return datetime.datetime.fromtimestamp(self._simulator.now, datetime.timezone.utc)

    def list_page(
        self, folder: str, token: str | None, limit_s: float
    ) -> tuple[list[ObjectMetadata], str | None]:
        def page() -> tuple[list[ObjectMetadata], str | None]:
            prefix, found = f"{folder}/", dict[str, ObjectMetadata]()
            for key, data in sorted(self.bucket.objects.items()):
                inner = key.removeprefix(prefix)
                if key.startswith(prefix):
                    name = prefix + inner.split("/")[0] + ("/" if "/" in inner else "")
                    if token is None or name > token:
                        found[name] = ObjectMetadata(name, len(data), _tag(data))
            names = list(found)[:PAGE]
            return [found[n] for n in names], names[-1] if len(found) > PAGE else None

        return self._ask(f"LIST {folder} {token or ''}", page, limit_s, writes=False)

    def head(self, key: str, limit_s: float) -> ObjectMetadata | None:
        def metadata() -> ObjectMetadata | None:
            data = self.bucket.objects.get(key)
            return None if data is None else ObjectMetadata(key, len(data), _tag(data))

        return self._ask(f"HEAD {key}", metadata, limit_s, writes=False)

    def get(
        self, key: str, start: int, end: int | None, limit_s: float, version: str = ""
    ) -> bytes:
        def content() -> bytes:
            if key not in self.bucket.objects:
                raise MissingError(key)
            return self.bucket.objects[key][start:end]

        return self._ask(f"GET {key}", content, limit_s, writes=False)

    def check_version(self, key: str, version: str, limit_s: float) -> None:
        pass

    def put(self, key: str, data: bytes, exclusive: bool, limit_s: float) -> str:
        life = self._life

        def store() -> str:
            if exclusive and key in self.bucket.objects:
                raise TakenError(key)
            self.bucket.objects[key] = data
            if self.bucket.has_lost_files_of(key, life):
                self.bucket.risen.add(key)
            return _tag(data)

        how = "PUT if none" if exclusive else "PUT"
        return self._ask(f"{how} {key}", store, limit_s, writes=True)

    def delete(self, key: str, limit_s: float) -> None:
        life = self._life

        def remove() -> None:
            if self.bucket.objects.pop(key, None) is not None:
                self.bucket.deleted[key] = life

        self._ask(f"DELETE {key}", remove, limit_s, writes=True)

    def drop_folder(self, folder: str, limit_s: float) -> None:
        pass

    def begin(self, key: str, limit_s: float) -> str:
        def start() -> str:
            name = f"{key}?{next(self.bucket.numbers)}"
            self.bucket.uploads[name] = {}
            return name

        return self._ask(f"BEGIN {key}", start, limit_s, writes=True)

    def part_bytes(self, number: int, expected_bytes: int) -> int:
        return PART_BYTES

    def part(self, key: str, upload: str, number: int, data: bytes, limit_s: float) -> Part:
        def store() -> Part:
            self._parts(upload)[number] = data
            return Part(number, _tag(data), blake3(data).digest())

        return self._ask(f"PART {number} {key}", store, limit_s, writes=True)

    def complete(self, key: str, upload: str, parts: list[Part], limit_s: float) -> str:
        def finish() -> str:
            there = self._parts(upload)
            self.bucket.objects[key] = b"".join(there[part.number] for part in parts)
            del self.bucket.uploads[upload]
            return _tag(self.bucket.objects[key])

        return self._ask(f"COMPLETE {key}", finish, limit_s, writes=True)

    def _parts(self, upload: str) -> dict[int, bytes]:
        if upload not in self.bucket.uploads:
            raise MissingError(upload)
        return self.bucket.uploads[upload]

    def tag_of(self, parts: list[Part]) -> str:
        return "of parts"  # comparable with no other: the object is read back

    def abort(self, key: str, upload: str, limit_s: float) -> None:
        def drop() -> None:
            self.bucket.uploads.pop(upload, None)

        self._ask(f"ABORT {key}", drop, limit_s, writes=True)

    def unfinished(self, limit_s: float) -> list[Unfinished]:
        return []


def _tag(data: bytes) -> str:
    return blake3(data).hexdigest()
