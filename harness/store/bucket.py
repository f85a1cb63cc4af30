"""What an object store must be able to do, in single requests that may fail."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Protocol


class MissingError(FileNotFoundError):
    """There is no such object, or no such upload."""


class TakenError(FileExistsError):
    """The key of an exclusive request exists."""


@dataclass(frozen=True)
class Found:
    """An object as the server tells of it. `tag` is its checksum in the server's spelling, or "" if it tells none; `version` tells it from
    what may lie under its key later, "" if the server tells nothing that does."""

    key: str
    size_bytes: int
    tag: str
    version: str = ""


@dataclass(frozen=True)
class Part:
    """One part of an upload: its number from 1 on, what the server calls it, its digest, and the checksum that was sent with it, if any."""

    number: int
    tag: str
    digest: bytes
    checksum: str = ""


@dataclass(frozen=True)
class Unfinished:
    """An upload that was begun and never completed."""

    key: str
    id: str
    began: datetime.datetime


class ObjectClient(Protocol):
    """One request a method, each given the seconds that it may take. Errors are the library's own, but for MissingError and TakenError."""

    parallel: int  # how many parts may be on their way at once
    tells_tags: bool  # whether `head` tells a checksum that can be compared, or says "" where the server has compared it

    def renew(self) -> None: ...
    def now(self, limit_s: float) -> datetime.datetime: ...
    def list_page(self, folder: str, token: str | None, limit_s: float) -> tuple[list[Found], str | None]: ...
    def head(self, key: str, limit_s: float) -> Found | None: ...
    def get(self, key: str, start: int, end: int | None, limit_s: float, version: str = "") -> bytes: ...
    def check_version(self, key: str, version: str, limit_s: float) -> None:
        """Raises ChangedError if an object whose bytes have come is another version by now. A question of its own: if it gets no answer,
        the bytes are not asked for again."""

    def put(self, key: str, data: bytes, exclusive: bool, limit_s: float) -> str: ...
    def delete(self, key: str, limit_s: float) -> None: ...
    def begin(self, key: str, limit_s: float) -> str: ...
    def part_bytes(self, number: int) -> int: ...
    def part(self, key: str, upload: str, number: int, data: bytes, limit_s: float) -> Part: ...
    def complete(self, key: str, upload: str, parts: list[Part], limit_s: float) -> str: ...
    def tag_of(self, parts: list[Part]) -> str: ...
    def abort(self, key: str, upload: str, limit_s: float) -> None: ...
    def unfinished(self, limit_s: float) -> list[Unfinished]: ...
