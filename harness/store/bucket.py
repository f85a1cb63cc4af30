"""Define the interface of an object-store client: single requests, each of which may fail."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Protocol


class MissingError(FileNotFoundError):
    """The object or the multipart upload does not exist."""


class TakenError(FileExistsError):
    """The key of an exclusive put already exists."""


@dataclass(frozen=True)
class ObjectMetadata:
    """An object as the server reports it.

    `tag` is the object's checksum in the server's notation, or "" if the server reports none.
    `version` distinguishes the object from one that is later stored under the same key; it is "" if
    the server reports nothing that does.
    """

    key: str
    size_bytes: int
    tag: str
    version: str = ""


@dataclass(frozen=True)
class Part:
    """One part of a multipart upload.

    `number` counts from 1, `tag` is the server's name for the part, `digest` is the digest of its
    bytes, and `checksum` is the checksum that was sent with it, or "".
    """

    number: int
    tag: str
    digest: bytes
    checksum: str = ""


@dataclass(frozen=True)
class Unfinished:
    """A multipart upload that was begun and neither completed nor aborted."""

    key: str
    id: str
    began: datetime.datetime


class ObjectClient(Protocol):
    """A client whose methods each perform one operation, without retries.

    `limit_s` is the time limit of a method in seconds. Methods raise the errors of the underlying
    library, except for MissingError, TakenError and ChangedError.
    """

    # The number of parts that may be in flight at once.
    parallel: int
    # True if `head` reports a checksum that can be compared with the expected tag, or "" for an
    # object whose content the server has verified itself.
    tells_tags: bool

    def renew(self) -> None:
        """Read the credentials again."""
        ...

    def now(self, limit_s: float) -> datetime.datetime:
        """Return the time of the server's clock."""
        ...

    def list_page(
        self, folder: str, token: str | None, limit_s: float
    ) -> tuple[list[ObjectMetadata], str | None]:
        """Return one page of what is directly in `folder`, and the token of the next page.

        The keys of folders end with a slash.
        """
        ...

    def head(self, key: str, limit_s: float) -> ObjectMetadata | None:
        """Return the metadata of an object, or None if it does not exist."""
        ...

    def get(
        self, key: str, start: int, end: int | None, limit_s: float, version: str = ""
    ) -> bytes:
        """Return the bytes of an object from `start` up to, excluding, `end`.

        Args:
            key: Key of the object.
            start: First byte offset.
            end: Byte offset after the last byte, or None for the end of the object.
            limit_s: Time limit of the request in seconds.
            version: Expected version, or "" for any.

        Raises:
            MissingError: The object does not exist.
            ChangedError: The object is another version, if the client supports conditional reads.
        """
        ...

    def check_version(self, key: str, version: str, limit_s: float) -> None:
        """Check that an object is still the given version after its bytes were read.

        This is a request of its own, so that a failure of it does not cause the bytes to be read
        again.

        Raises:
            ChangedError: The object is another version by now.
        """

    def put(self, key: str, data: bytes, exclusive: bool, limit_s: float) -> str:
        """Upload an object in one request and return the tag that it should have.

        Args:
            key: Key of the object.
            data: Content of the object.
            exclusive: Fail if an object exists under the key.
            limit_s: Time limit of the request in seconds.

        Raises:
            TakenError: `exclusive` is set and the key exists.
        """
        ...

    def delete(self, key: str, limit_s: float) -> None:
        """Delete an object."""
        ...

    def drop_folder(self, folder: str, limit_s: float) -> None:
        """Delete an empty folder, if there are folders."""

    def begin(self, key: str, limit_s: float) -> str:
        """Begin a multipart upload and return its id."""
        ...

    def part_bytes(self, number: int, expected_bytes: int) -> int:
        """Return the size in bytes of part `number`, from 1 on; the last part may be smaller.

        `expected_bytes` is the size of the whole file, or 0 if it is not known yet.
        """
        ...

    def part(self, key: str, upload: str, number: int, data: bytes, limit_s: float) -> Part:
        """Upload one part.

        Args:
            key: Key of the object.
            upload: Id that `begin` returned.
            number: Number of the part, counted from 1.
            data: Content of the part.
            limit_s: Time limit of the request in seconds.
        """
        ...

    def complete(self, key: str, upload: str, parts: list[Part], limit_s: float) -> str:
        """Complete a multipart upload, so that the object appears; return the tag it should have.

        Args:
            key: Key of the object.
            upload: Id that `begin` returned.
            parts: All parts, in order.
            limit_s: Time limit of the request in seconds.

        Raises:
            MissingError: The upload no longer exists: it was completed or aborted.
        """
        ...

    def tag_of(self, parts: list[Part]) -> str:
        """Return the tag of an object that was uploaded in these parts."""
        ...

    def abort(self, key: str, upload: str, limit_s: float) -> None:
        """Abort a multipart upload."""
        ...

    def unfinished(self, limit_s: float) -> list[Unfinished]:
        """Return the multipart uploads that were begun and never completed."""
        ...
