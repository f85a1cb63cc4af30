"""What is in a store, and what of it is the run's history. Everything here only reads."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from harness.checkpoint import format as fmt
from harness.checkpoint.format import Lineage, Manifest
from harness.errors import DamagedError, StorageError
from harness.store import TEMP, LocalStore

REFUSED_FRESH = (
    "To go on, put a good checkpoint back (harness verify RUN names what is damaged) or import one into a new run directory; "
    "to start over, take a new run.dir."
)


@dataclass
class Survey:
    """One listing of a store, parsed. What cannot be parsed is named, never guessed."""

    manifests: list[Manifest] = field(default_factory=list)  # readable ones, oldest first
    damaged: dict[str, str] = field(default_factory=dict)  # manifest key -> why it cannot be read
    newer: dict[str, str] = field(default_factory=dict)  # whole, but of a format we do not know
    set_aside: list[str] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)  # data without a manifest
    foreign: list[str] = field(default_factory=list)  # in the folder, but no checkpoint
    strangers: list[str] = field(default_factory=list)  # checkpoints of another run
    sizes: dict[str, int] = field(default_factory=dict)  # data key -> bytes on the store
    attempts: dict[int, dict[str, Any]] = field(default_factory=dict)  # number -> record; {} if it cannot be read
    ends: dict[int, dict[str, Any]] = field(default_factory=dict)
    greatest: int = 0  # the greatest attempt number that any name bears

    @property
    def run_id(self) -> str | None:
        """The run that the directory belongs to, by its first readable attempt record, else by its newest checkpoint."""
        for number in sorted(self.attempts):
            if "run_id" in self.attempts[number]:
                return str(self.attempts[number]["run_id"])
        return self.manifests[-1].run_id if self.manifests else None

    @property
    def head(self) -> Manifest | None:
        """The newest readable manifest by (attempt, step), never by step alone."""
        return self.manifests[-1] if self.manifests else None

    @property
    def history(self) -> list[Manifest]:
        """The checkpoints within the head's lineage, newest first. Others were cut off: written by an attempt after its
        successor's first commit, or left behind when a later attempt went on from an older one."""
        if self.head is None:
            return []
        limits = dict(self.head.lineage)
        return [m for m in reversed(self.manifests) if m.step <= limits.get(m.attempt, -1)]

    def check_fresh_start(self, where: str, notes: list[str]) -> None:
        """Raises DamagedError unless nothing at all hints at a history: then, and only then, step 0 is right.

        `notes` say what was found wrong with each checkpoint that was tried.
        """
        unusable = bool(self.manifests or self.damaged or self.newer or self.strangers)
        hints = (notes if unusable else []) + [f"{key} is set aside" for key in self.set_aside]
        for number, record in self.attempts.items():
            if record.get("from", "unreadable") is not None:
                hints.append(f"{fmt.attempt_key(number)}: went on from {record.get('from', 'an unreadable record')}")
        hints += [f"{fmt.end_key(n)}: saved step {end['saved_step']}" for n, end in self.ends.items() if end.get("saved_step")]
        if hints:
            raise DamagedError(
                f"{where} has a history, but no checkpoint that can be loaded; not starting from step 0",
                "\n".join(f"  {hint}" for hint in hints),
                REFUSED_FRESH,
            )


def survey(store: LocalStore) -> Survey:
    """List and parse a run. Raises StorageError when the store cannot be listed or read."""
    found = Survey()
    checkpoints = store.entries(fmt.CHECKPOINTS)
    found.sizes = {entry.key: entry.size_bytes for entry in checkpoints if entry.key.endswith(".pt")}
    for entry in checkpoints:
        match = fmt.CHECKPOINT_NAME.match(entry.key)
        if match is None:
            if not TEMP.match(entry.key):
                found.foreign.append(entry.key)
            continue
        found.greatest = max(found.greatest, int(match["attempt"]))
        if match["aside"]:
            found.set_aside.append(entry.key)
        elif match["kind"] == "json":
            _read_manifest(store, entry.key, found)
    _read_attempts(store, found)
    found.strangers = [m.key for m in found.manifests if m.run_id != found.run_id]
    found.manifests = sorted((m for m in found.manifests if m.run_id == found.run_id), key=lambda m: m.order)
    named = {entry.key.removesuffix(".json") for entry in checkpoints if entry.key.endswith(".json")}
    found.orphans = [key for key in found.sizes if fmt.CHECKPOINT_NAME.match(key) and key.removesuffix(".pt") not in named]
    return found


def _read_manifest(store: LocalStore, key: str, found: Survey) -> None:
    try:
        found.manifests.append(fmt.from_bytes(key, store.read(key)))
    except FileNotFoundError:  # retention deleted it between the listing and the reading
        return
    except fmt.NewerFormatError as error:
        found.newer[key] = error.what
    except DamagedError as error:
        found.damaged[key] = error.what


def _read_attempts(store: LocalStore, found: Survey) -> None:
    for entry in store.entries(fmt.ATTEMPTS):
        match = fmt.ATTEMPT_NAME.match(entry.key)
        if match is None:
            continue
        number = int(match["attempt"])
        found.greatest = max(found.greatest, number)
        try:
            record = json.loads(store.read(entry.key))
        except (ValueError, FileNotFoundError, StorageError):
            record = {}
        (found.ends if match["end"] else found.attempts)[number] = record if isinstance(record, dict) else {}


def going_on_from(manifest: Manifest | None) -> Lineage:
    """The lineage of an attempt that goes on from this checkpoint: everything after it, of all attempts, is cut off."""
    return manifest.lineage if manifest else ()


def extended(lineage: Lineage, attempt: int, step: int) -> Lineage:
    """The lineage that a manifest of `attempt` at `step` carries."""
    return (*(entry for entry in lineage if entry[0] != attempt), (attempt, step))
