"""Step records: samples and losses of each step, so that a recomputed step can be compared with it.

    <run>/events/0003.steps           records of attempt 3, in the run directory
    <run>/events/0003-000001.steps    the same in a bucket, in segments, because an object cannot be
                                      appended to
    <run>/attempts/0004.replay.json   result of comparing the steps that attempt 4 recomputed

A file begins with a line of JSON that describes the machine and software of the attempt. Records of
40 bytes follow, each with a checksum of its own. In the worst case the records are lost with the
machine. They are never needed for a resume, and are deleted as soon as every store holds a newer
checkpoint. An incomplete record, a record with a wrong checksum and a file of another version are
ignored.
"""

from __future__ import annotations

import contextlib
import json
import re
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

from harness.checkpoint import format as fmt
from harness.checkpoint import records
from harness.checkpoint.catalog import Catalog
from harness.checkpoint.known import read_files
from harness.errors import StorageError
from harness.store import Entry, Store

VERSION = 1
# Step, digest of the samples, loss, rank, CRC-32 of the loss's name, flags for the values that are
# present, CRC-32 of the preceding bytes.
RECORD = struct.Struct("<Q8sdIIHxxI")
SAMPLES, LOSS = 1, 2
MOST_BYTES = 16 << 20  # limit per attempt: 400,000 steps since the last checkpoint
MOST_HEADER_BYTES = 1 << 16
MOST_ATTEMPTS = 100  # only the newest ones are read
NAME = re.compile(r"^events/(?P<attempt>[0-9]{4,})(-(?P<segment>[0-9]{6,}))?\.steps\Z")
VERDICT_NAME = re.compile(r"^attempts/(?P<attempt>[0-9]{4,})\.replay\.json\Z")


def key(attempt: int) -> str:
    """Return the key of an attempt's step records in the run directory."""
    return f"{fmt.EVENTS}/{attempt:04d}.steps"


def segment_key(attempt: int, number: int) -> str:
    """Return the key of one segment of an attempt's step records in a bucket."""
    return f"{fmt.EVENTS}/{attempt:04d}-{number:06d}.steps"


def verdict_key(attempt: int) -> str:
    """Return the key of the result of an attempt's comparison."""
    return f"{fmt.ATTEMPTS}/{attempt:04d}.replay.json"


class Line(NamedTuple):
    """The recorded values of one step on one rank."""

    step: int
    # Digest of the sample numbers of the global batch; None for a stream and for data of the user's
    # own loop.
    samples: bytes | None = None
    rank: int = 0
    name: int = 0  # CRC-32 of the name under which the loss was logged
    loss: float | None = None


def name_of(loss: str) -> int:
    """Return the short name of a loss in a record: the CRC-32 of its name."""
    return zlib.crc32(loss.encode())


def head(about: Mapping[str, Any]) -> bytes:
    """Return the first line of a file, which describes the machine and software of the attempt."""
    return (json.dumps({"steps": VERSION, **about}) + "\n").encode()


def pack(line: Line) -> bytes:
    """Serialise a line to a record of a file."""
    kinds = (SAMPLES if line.samples is not None else 0) | (LOSS if line.loss is not None else 0)
    body = RECORD.pack(
        line.step, line.samples or bytes(8), line.loss or 0.0, line.rank, line.name, kinds, 0
    )[:-4]
    return body + zlib.crc32(body).to_bytes(4, "little")


def unpack(packed: bytes) -> Iterator[Line]:
    """Yield the lines in the records that follow the head of a file.

    Records with a wrong checksum and an incomplete record at the end are left out.
    """
    whole = len(packed) - len(packed) % RECORD.size
    for at, (step, samples, loss, rank, name, kinds, checksum) in enumerate(
        RECORD.iter_unpack(packed[:whole])
    ):
        if (
            zlib.crc32(memoryview(packed)[at * RECORD.size : (at + 1) * RECORD.size - 4])
            == checksum
        ):
            yield Line(
                step,
                samples if kinds & SAMPLES else None,
                rank,
                name,
                loss if kinds & LOSS else None,
            )


def parse(content: bytes) -> tuple[dict[str, Any], list[Line]]:
    """Parse a file; return the description of its attempt and its lines.

    Returns ({}, []) for a file that is not of this version.
    """
    first, newline, packed = content.partition(b"\n")
    try:
        about = json.loads(first) if newline and len(first) <= MOST_HEADER_BYTES else None
    except (ValueError, RecursionError):
        about = None
    if not isinstance(about, dict) or about.get("steps") != VERSION:
        return {}, []
    return about, list(unpack(packed))


@dataclass
class Log:
    """The lines of one attempt that a store still has."""

    about: dict[str, Any] = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)

    @property
    def last(self) -> int:
        """Return the greatest step of any line, or 0."""
        return max((line.step for line in self.lines), default=0)


def files(entries: Iterable[Entry]) -> dict[int, list[Entry]]:
    """Return the step record files of each attempt, from the files in the folder of events."""
    by_attempt: dict[int, list[Entry]] = {}
    for entry in entries:
        if match := NAME.match(entry.key):
            by_attempt.setdefault(int(match["attempt"]), []).append(entry)
    return by_attempt


def read(store: Store, entries: Sequence[Entry]) -> Log:
    """Read the lines of an attempt's files, at most `MOST_BYTES` of them.

    Beyond the limit the first ones are kept, because they follow the last checkpoint. Raises
    StorageError.
    """
    log, left = Log(), MOST_BYTES
    for entry in entries:
        if left <= 0:
            break
        with (
            contextlib.suppress(FileNotFoundError),
            contextlib.closing(store.open(entry.key)) as file,
        ):
            content = file.read(min(left, entry.size_bytes))
            left -= len(content)
            about, lines = parse(content)
            log.about = log.about or about
            log.lines += lines
    return log


@dataclass
class Before:
    """The step records of earlier attempts that still exist."""

    logs: dict[int, Log] = field(default_factory=dict)
    # One dict per store: key of a file -> last step that its attempt has recorded.
    keys: list[dict[str, int]] = field(default_factory=list)

    def after(self, step: int) -> dict[int, list[tuple[int, Line]]]:
        """Return the lines of the steps after `step`, by step.

        Each line is paired with the number of its attempt; the newest attempt comes last.
        """
        by_step: dict[int, list[tuple[int, Line]]] = {}
        for number in sorted(self.logs):
            for line in self.logs[number].lines:
                if line.step > step:
                    by_step.setdefault(line.step, []).append((number, line))
        return by_step


def before(
    stores: Iterable[Store],
    attempt: int,
    event_files: Callable[[Store], list[Entry]] = lambda store: store.entries(fmt.EVENTS),
) -> tuple[Before, str]:
    """Read the step records of all attempts before `attempt`.

    The lines of an attempt come from the first store that has any of them.

    Args:
        stores: Stores of the run.
        attempt: Number of the current attempt.
        event_files: Lists the folder of events of a store.

    Returns:
        The records, and a description of the last read error, or "".
    """
    earlier, problem = Before(), ""
    for store in stores:
        keys: dict[str, int] = {}
        earlier.keys.append(keys)
        try:
            by_attempt = {
                number: entries
                for number, entries in files(event_files(store)).items()
                if number < attempt
            }
            for number in sorted(by_attempt, reverse=True)[:MOST_ATTEMPTS]:
                if number not in earlier.logs or not earlier.logs[number].lines:
                    earlier.logs[number] = read(store, by_attempt[number])
        except (StorageError, OSError) as error:
            problem = f"{store}: {error}".splitlines()[0]
            continue
        for number, entries in by_attempt.items():
            keys |= {
                entry.key: earlier.logs[number].last if number in earlier.logs else 0
                for entry in entries
            }
    return earlier, problem


def verdicts(stores: Iterable[Store]) -> dict[int, dict[str, Any]]:
    """Read the results of the comparisons, by attempt. Raises StorageError."""
    by_attempt: dict[int, dict[str, Any]] = {}
    for store in stores:
        names = [VERDICT_NAME.match(entry.key) for entry in store.entries(fmt.ATTEMPTS)]
        numbers = {match.string: int(match["attempt"]) for match in names if match}
        missing = [key for key, number in numbers.items() if number not in by_attempt]
        for key, text in read_files(store, missing):
            # Its fields have other types than those of the same names in other records.
            if record := records.fields(text):
                by_attempt[numbers[key]] = record
    return by_attempt


def last_steps(catalog: Catalog, verdicts: Mapping[int, Mapping[str, Any]]) -> dict[int, int]:
    """Return the last step that each attempt has made, as far as step records show it.

    These are its own, or what the attempt after it has recomputed. A loop that logs nothing has no
    events of its steps.

    Args:
        catalog: Catalog of the run's stores.
        verdicts: See `verdicts`.
    """
    logs = before(catalog.stores, catalog.greatest + 1, catalog.event_files)[0].logs
    steps = {number: log.last for number, log in logs.items()}
    numbers = sorted(catalog.attempts)
    for earlier, number in pairwise(numbers):
        recomputed = verdicts.get(number, {}).get("recomputed")
        if records.is_count(recomputed):
            origin = (catalog.attempts[number].get("from") or {}).get("step", 0)
            steps[earlier] = max(steps.get(earlier, 0), origin + recomputed)
    return steps
