"""What each step was: short lines of fixed length, so that a step that is made again can be compared with what it was.

    <run>/events/0003.steps           those of attempt 3, in the run directory
    <run>/events/0003-000001.steps    the same in a bucket, where nothing can be appended: segments
    <run>/attempts/0004.replay.json   what came of comparing the steps that attempt 4 made again

A file begins with a line of JSON that says on what the attempt ran; then comes one record of 40 bytes after another, each with a check
sum of its own. They are lost with the machine at worst, and never needed to go on: as soon as every store holds a newer checkpoint they
are dropped. A record that is torn or does not check is passed over, and so is a file of another version.
"""

from __future__ import annotations

import contextlib
import json
import re
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from harness.checkpoint import format as fmt
from harness.errors import StorageError
from harness.store import Entry, Store

VERSION = 1
RECORD = struct.Struct("<Q8sdIIHxxI")  # step, digest of the samples, loss, rank, CRC-32 of the loss's name, what is there, CRC-32 of it all
SAMPLES, LOSS = 1, 2
MOST_BYTES = 16 << 20  # of one attempt: 400,000 steps since the last checkpoint
MOST_HEADER_BYTES = 1 << 16
MOST_ATTEMPTS = 100  # the newest
NAME = re.compile(r"^events/(?P<attempt>[0-9]{4,})(-(?P<segment>[0-9]{6,}))?\.steps\Z")
VERDICT_NAME = re.compile(r"^attempts/(?P<attempt>[0-9]{4,})\.replay\.json\Z")


def key(attempt: int) -> str:
    return f"{fmt.EVENTS}/{attempt:04d}.steps"


def segment_key(attempt: int, number: int) -> str:
    return f"{fmt.EVENTS}/{attempt:04d}-{number:06d}.steps"


def verdict_key(attempt: int) -> str:
    return f"{fmt.ATTEMPTS}/{attempt:04d}.replay.json"


class Line(NamedTuple):
    """What is known of one step on one rank."""

    step: int
    samples: bytes | None = None  # the digest of the numbers of its global batch's samples; None of a stream, and of a loop's own data
    rank: int = 0
    name: int = 0  # the CRC-32 of what the loss was logged as
    loss: float | None = None


def name_of(loss: str) -> int:
    """The short name of a loss in a line."""
    return zlib.crc32(loss.encode())


def head(about: Mapping[str, Any]) -> bytes:
    """The beginning of a file, which says on what the attempt runs."""
    return (json.dumps({"steps": VERSION, **about}) + "\n").encode()


def pack(line: Line) -> bytes:
    """A line as it lies in a file."""
    kinds = (SAMPLES if line.samples is not None else 0) | (LOSS if line.loss is not None else 0)
    body = RECORD.pack(line.step, line.samples or bytes(8), line.loss or 0.0, line.rank, line.name, kinds, 0)[:-4]
    return body + zlib.crc32(body).to_bytes(4, "little")


def unpack(records: bytes) -> Iterator[Line]:
    """The lines in what follows the head; those that do not check are left out, and so is what was torn at the end."""
    whole = len(records) - len(records) % RECORD.size
    for at, (step, samples, loss, rank, name, kinds, said) in enumerate(RECORD.iter_unpack(records[:whole])):
        if zlib.crc32(memoryview(records)[at * RECORD.size : (at + 1) * RECORD.size - 4]) == said:
            yield Line(step, samples if kinds & SAMPLES else None, rank, name, loss if kinds & LOSS else None)


def parse(content: bytes) -> tuple[dict[str, Any], list[Line]]:
    """What a file says of its attempt, and its lines; nothing of a file that is none of this version."""
    first, newline, records = content.partition(b"\n")
    try:
        about = json.loads(first) if newline and len(first) <= MOST_HEADER_BYTES else None
    except (ValueError, RecursionError):
        about = None
    if not isinstance(about, dict) or about.get("steps") != VERSION:
        return {}, []
    return about, list(unpack(records))


@dataclass
class Log:
    """The lines of one attempt, as far as a store still has them."""

    about: dict[str, Any] = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)

    @property
    def last(self) -> int:
        """The last step that any of them is of."""
        return max((line.step for line in self.lines), default=0)


def files(store: Store) -> dict[int, list[Entry]]:
    """The files of each attempt in a store. Raises StorageError."""
    found: dict[int, list[Entry]] = {}
    for entry in store.entries(fmt.EVENTS):
        if match := NAME.match(entry.key):
            found.setdefault(int(match["attempt"]), []).append(entry)
    return found


def read(store: Store, entries: Sequence[Entry]) -> Log:
    """The lines in an attempt's files; of very many, the first, which follow on the last checkpoint. Raises StorageError."""
    log, left = Log(), MOST_BYTES
    for entry in entries:
        if left <= 0:
            break
        with contextlib.suppress(FileNotFoundError), contextlib.closing(store.open(entry.key)) as file:
            content = file.read(min(left, entry.size_bytes))
            left -= len(content)
            about, lines = parse(content)
            log.about = log.about or about
            log.lines += lines
    return log


@dataclass
class Before:
    """What is still there of what earlier attempts made."""

    logs: dict[int, Log] = field(default_factory=dict)
    keys: list[dict[str, int]] = field(default_factory=list)  # of each store the files, and the last step that their attempt told of

    def after(self, step: int) -> dict[int, list[tuple[int, Line]]]:
        """The lines of the steps after that one, by step, each with its attempt, the newest attempt's last."""
        found: dict[int, list[tuple[int, Line]]] = {}
        for number in sorted(self.logs):
            for line in self.logs[number].lines:
                if line.step > step:
                    found.setdefault(line.step, []).append((number, line))
        return found


def before(stores: Iterable[Store], attempt: int) -> tuple[Before, str]:
    """What the attempts before that one have left in all stores, each from the first store that has any of it; and what could not be read,
    in words."""
    found, problem = Before(), ""
    for store in stores:
        keys: dict[str, int] = {}
        found.keys.append(keys)
        try:
            by_attempt = {number: entries for number, entries in files(store).items() if number < attempt}
            for number in sorted(by_attempt, reverse=True)[:MOST_ATTEMPTS]:
                if number not in found.logs or not found.logs[number].lines:
                    found.logs[number] = read(store, by_attempt[number])
        except (StorageError, OSError) as error:
            problem = f"{store}: {error}".splitlines()[0]
            continue
        for number, entries in by_attempt.items():
            keys |= {entry.key: found.logs[number].last if number in found.logs else 0 for entry in entries}
    return found, problem


def verdicts(stores: Iterable[Store]) -> dict[int, dict[str, Any]]:
    """What came of comparing, by attempt. Raises StorageError."""
    found: dict[int, dict[str, Any]] = {}
    for store in stores:
        for entry in store.entries(fmt.ATTEMPTS):
            if (match := VERDICT_NAME.match(entry.key)) and int(match["attempt"]) not in found:
                with contextlib.suppress(FileNotFoundError, ValueError):
                    record = json.loads(store.read(entry.key))
                    if isinstance(record, dict):
                        found[int(match["attempt"])] = record
    return found
