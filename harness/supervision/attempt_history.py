"""Summarise attempts from their records and events: steps reached, saved, and to be recomputed."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from harness.checkpoint import format as fmt
from harness.checkpoint import records
from harness.checkpoint.catalog import Catalog
from harness.checkpoint.format import Manifest
from harness.errors import StorageError
from harness.store import Entry, Store

# How much is read from the end of an attempt's events. A million steps are tens of megabytes.
TAIL_BYTES = 1 << 18
# Enough to find the last step of an attempt that is not the newest one.
LAST_BYTES = 1 << 15
READERS = 16  # small files that are read concurrently from a remote store
# Without the separator, the name of attempt 1000 is the beginning of that of 10000. The step
# records (.steps) are in the same folder.
EVENTS_NAME = re.compile(rf"^{fmt.EVENTS}/(?P<attempt>[0-9]{{4,}})[.-].*jsonl\Z")
# Kinds of events and ends that hold the number of the step under way, not of a complete one.
IN_A_STEP = ("evaluated", "hang", "failed", "superseded")
FEW_FILES = 3  # segments of a bucket that are searched for an event of an attempt's beginning
FEW = 20  # number of last steps that the throughput is computed from


@dataclass(frozen=True)
class AttemptSummary:
    """Summary of one attempt; times are ISO texts, and None stands for what is not recorded."""

    attempt: int
    began: str | None
    kind: str | None
    launch: str | None
    went_on_from: int  # step of the resume point, 0 without one
    reached: int  # last step that is known to be complete
    saved: int  # last step that is committed, at least `went_on_from`
    ended: str | None
    end: dict[str, Any] | None  # end record
    next_from: int | None  # step that the next attempt resumed from; None without a next one

    @property
    def lost(self) -> int:
        """Return the number of complete steps that must be recomputed.

        For a killed attempt, only steps that its events or step records still show are counted.
        What is saved is lost too, if the next attempt had to resume from an older checkpoint.
        """
        return max(0, self.reached - (self.saved if self.next_from is None else self.next_from))


def summarise(
    catalog: Catalog, number: int, events: list[dict[str, Any]], made: int = 0
) -> AttemptSummary:
    """Summarise one attempt.

    Args:
        catalog: Catalog of the run's stores.
        number: Number of the attempt.
        events: Events of the attempt; needed if its end record does not contain the last step.
        made: A step that the attempt is known to have made otherwise, or 0.
    """
    record, end = catalog.attempts[number], catalog.ends.get(number)
    origin = (record.get("from") or {}).get("step", 0)
    committed = [m.step for m in catalog.manifests if m.attempt == number] + [
        s for m in catalog.manifests for a, s in m.lineage if a == number
    ]
    saved = max([origin, int((end or {}).get("saved_step") or 0), *committed])
    reached = max(
        [
            saved,
            made,
            _complete(str((end or {}).get("why")), end or {}),
            *(_complete(str(event.get("event")), event) for event in events),
        ]
    )
    names = record.get("time"), record.get("kind"), record.get("launch")
    ended = (end or {}).get("time")
    next_from = _next_from(catalog, number)
    return AttemptSummary(number, *names, origin, reached, saved, ended, end, next_from)


def _complete(kind: str, record: dict[str, Any]) -> int:
    """Return the last complete step that an event or an end record shows, 0 if it shows none."""
    if (made := record.get("made_step")) is not None:
        return int(made)
    step = int(record.get("step") or 0)
    return max(0, step - 1) if kind in IN_A_STEP else step


def _next_from(catalog: Catalog, number: int) -> int | None:
    """Return the step that the attempt after this one resumed from, or None if there is none.

    An attempt that was overtaken has not trained. After an import or a rollback a person has chosen
    the step, so that nothing was lost.
    """
    for later in sorted(catalog.attempts):
        record, end = catalog.attempts[later], catalog.ends.get(later, {})
        if later <= number or (end.get("why") == "stopped" and "error" in end):
            continue
        if record.get("kind") != "train" or "from" not in record:
            return None
        return int((record["from"] or {}).get("step", 0))
    return None


def events(
    stores: Sequence[Store],
    number: int,
    most_bytes: float = TAIL_BYTES,
    files: Callable[[Store], list[Entry]] = lambda store: store.entries(fmt.EVENTS),
) -> list[dict[str, Any]]:
    """Return the last events of an attempt from all the stores, one store after the other.

    The events are in one file in a run directory, and in segments in a remote store. A store that
    cannot be read is left out. An event that two stores hold is returned twice.

    Args:
        stores: Stores of the run.
        number: Number of the attempt.
        most_bytes: How much is read from the end of each store's events.
        files: Lists the folder of events of a store.
    """
    found = list[dict[str, Any]]()
    for store in stores:
        with contextlib.suppress(StorageError):
            found += _tails(store, files(store), {number: most_bytes}).get(number, [])
    return found


def logs(catalog: Catalog, wanted: Mapping[int, float]) -> dict[int, list[dict[str, Any]]]:
    """Return the last events of attempts, each from the first store that has any of it.

    Each store holds all events of an attempt, so one is enough, and no event is returned twice. A
    store is listed once, and the files of all the attempts are read concurrently.

    Args:
        catalog: Catalog of the run's stores.
        wanted: How much is read from the end of a store's events, in bytes, by attempt.
    """
    found = dict[int, list[dict[str, Any]]]()
    for store in catalog.stores:
        missing = {number: most for number, most in wanted.items() if not found.get(number)}
        with contextlib.suppress(StorageError):
            found |= _tails(store, catalog.event_files(store), missing) if missing else {}
    return {number: found.get(number, []) for number in wanted}


def first_log(
    catalog: Catalog, number: int, most_bytes: float = TAIL_BYTES
) -> list[dict[str, Any]]:
    """Return the last events of one attempt from the first store that has any; see `logs`."""
    return logs(catalog, {number: most_bytes})[number]


def _tails(
    store: Store, files: list[Entry], wanted: Mapping[int, float]
) -> dict[int, list[dict[str, Any]]]:
    """Return the last events of attempts in one store; without the attempts that cannot be read.

    Args:
        store: The store.
        files: The files in its folder of events, in key order.
        wanted: See `logs`.
    """
    entries = _by_attempt(files)
    pieces = list[tuple[int, str, int]]()  # attempt, key, start
    for number, most_bytes in wanted.items():
        own = list[tuple[int, str, int]]()
        for entry in reversed(entries.get(number, [])):
            if most_bytes <= 0:
                break
            own.append((number, entry.key, int(max(0, entry.size_bytes - most_bytes))))
            most_bytes -= entry.size_bytes
        pieces += reversed(own)
    texts = dict[int, list[bytes]]()
    failed = set[int]()
    for (number, _, _), text in zip(pieces, _read(store, pieces), strict=True):
        if text is None:
            failed.add(number)
        else:
            texts.setdefault(number, []).append(text)
    # {} for a line that the tail cuts off or that is not completely written.
    return {
        number: [event for line in b"".join(own).splitlines() if (event := records.parse(line))]
        for number, own in texts.items()
        if number not in failed
    }


def _by_attempt(files: list[Entry]) -> dict[int, list[Entry]]:
    """Return the files with events, in key order, by attempt."""
    entries: dict[int, list[Entry]] = {}
    for entry in files:
        if match := EVENTS_NAME.match(entry.key):
            entries.setdefault(int(match["attempt"]), []).append(entry)
    return entries


def first_of(catalog: Catalog, number: int, kind: str) -> dict[str, Any]:
    """Return an event of this kind from the beginning of an attempt's events; {} if there is none.

    The first store in which it is found counts. A store that cannot be read is left out.
    """
    for store in catalog.stores:
        with contextlib.suppress(StorageError, FileNotFoundError):
            for entry in _by_attempt(catalog.event_files(store)).get(number, [])[:FEW_FILES]:
                read = b""
                for chunk in store.chunks(entry.key):
                    read += chunk
                    if len(read) >= TAIL_BYTES:
                        break
                for event in map(records.parse, read.splitlines()):
                    if event.get("event") == kind:
                        return event
    return {}


def _read(store: Store, pieces: list[tuple[int, str, int]]) -> list[bytes | None]:
    """Return the ends of files, from their starts on; None for each one that cannot be read."""
    together = store.together()

    def read(piece: tuple[int, str, int]) -> bytes | None:
        _, key, start = piece
        try:
            return b"".join(together.chunks(key, start)) if start else together.read(key)
        except (StorageError, FileNotFoundError):
            return None

    if store.is_local or len(pieces) < 2:
        return [read(piece) for piece in pieces]
    with ThreadPoolExecutor(READERS, thread_name_prefix="events") as pool:
        return list(pool.map(read, pieces))


def steps_per_s(events: Sequence[dict[str, Any]]) -> float | None:
    """Return the throughput of the last `FEW` steps in an attempt's events, in steps per second.

    None if the events contain fewer than two steps with valid times.
    """
    timed = []
    for event in events:
        if event.get("event") == "step":
            at, step = records.seconds(event.get("time")), event.get("step")
            if at is not None and step is not None:
                timed.append((at, int(step)))
    (began, first), (ended, last) = (
        (timed[-FEW], timed[-1])
        if len(timed) >= FEW
        else (timed[0], timed[-1])
        if timed
        else ((0, 0), (0, 0))
    )
    return (last - first) / (ended - began) if last > first and ended > began else None


def steps_again(catalog: Catalog, origin: Manifest | None, newest: list[dict[str, Any]]) -> int:
    """Return how many steps must be recomputed, as far as records and events show.

    These are the steps that were complete after the resume point.

    Args:
        catalog: Catalog of the run's stores.
        origin: Checkpoint of the resume point; None for step 0.
        newest: Events of the newest attempt.
    """
    attempt, step = (origin.attempt, origin.step) if origin else (0, 0)
    later = [number for number in catalog.attempts if number >= attempt]
    unknown = [
        number
        for number in later
        if number != catalog.greatest and (catalog.ends.get(number) or {}).get("step") is None
    ]
    events = logs(catalog, dict.fromkeys(unknown, LAST_BYTES)) | {catalog.greatest: newest}
    reached = [summarise(catalog, number, events.get(number, [])).reached for number in later]
    return max([step, *reached]) - step


def age_s(manifest: Manifest) -> float:
    """Return the age of a checkpoint in seconds, or 0 if its manifest has no valid time.

    The time is from the clock of the machine that wrote the checkpoint, and this machine's clock
    may differ. The result is never negative.
    """
    at = records.seconds(manifest.time)
    return 0.0 if at is None else max(0.0, time.time() - at)
