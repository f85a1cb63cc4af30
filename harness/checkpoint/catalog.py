"""List and parse the files of a run and derive its history. This module never writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from harness.checkpoint import format as fmt
from harness.checkpoint.format import Lineage, Manifest
from harness.checkpoint.known import Known
from harness.errors import UsageError
from harness.store import SET_ASIDE, TEMP, Entry, Store


@dataclass
class Catalog:
    """One parsed listing of each of a run's stores.

    A file that cannot be parsed is listed by its name; its content is never guessed.
    """

    stores: tuple[Store, ...] = ()
    parts: list[Catalog] = field(default_factory=list)  # one catalog per store
    known: Known = field(default_factory=Known)  # what was read; only in the catalog of one store
    manifests: list[Manifest] = field(default_factory=list)  # readable ones, oldest first
    damaged: dict[str, str] = field(default_factory=dict)  # manifest key -> why it cannot be read
    # Manifest key -> error: intact, but in a format that only a newer harness can read.
    newer: dict[str, fmt.NewerFormatError] = field(default_factory=dict)
    set_aside: list[str] = field(default_factory=list)
    # Manifest keys whose copy was found damaged, on a store that cannot rename.
    marked: set[str] = field(default_factory=set)
    orphans: list[str] = field(default_factory=list)  # data without a manifest
    orphan_folders: list[str] = field(default_factory=list)  # shards without a manifest
    foreign: list[str] = field(default_factory=list)  # files in the folder that are no checkpoint
    strangers: list[str] = field(default_factory=list)  # checkpoints of another run
    sizes: dict[str, int] = field(default_factory=dict)  # data key -> bytes; see `size_of`
    unlisted: set[str] = field(default_factory=set)  # folders of shards, see `size_of`
    # Attempt number -> record; {} if the record cannot be read.
    attempts: dict[int, dict[str, Any]] = field(default_factory=dict)
    ends: dict[int, dict[str, Any]] = field(default_factory=dict)  # attempt number -> end record
    greatest: int = 0  # greatest attempt number in any file name
    events: dict[str, list[Entry]] = field(default_factory=dict)  # store -> see `event_files`
    unread: str = ""  # why the run's remote store is not in the catalog, though it has one

    @property
    def run_id(self) -> str | None:
        """Return the ID of the run that the stores belong to, or None.

        The ID comes from the first readable attempt record, else from the newest checkpoint.
        """
        for number in sorted(self.attempts):
            if "run_id" in self.attempts[number]:
                return str(self.attempts[number]["run_id"])
        return self.manifests[-1].run_id if self.manifests else None

    @property
    def head(self) -> Manifest | None:
        """Return the newest readable manifest by (attempt, step), never by step alone."""
        return self.manifests[-1] if self.manifests else None

    @property
    def unreadable_head(self) -> fmt.NewerFormatError | None:
        """Return the error if the run's newest checkpoint has a newer format, else None.

        A resume from an older checkpoint would cut the newest one off.
        """
        key = max(self.newer, key=fmt.order_of, default=None)
        if key is None or (self.head is not None and self.head.order >= fmt.order_of(key)):
            return None
        return self.newer[key]

    @property
    def history(self) -> list[Manifest]:
        """Return the checkpoints within the head's lineage, newest first.

        The others were cut off. Either an attempt wrote them after its successor's first commit, or
        a later attempt resumed from an older checkpoint.
        """
        if self.head is None:
            return []
        limits = dict(self.head.lineage)
        return [m for m in reversed(self.manifests) if m.step <= limits.get(m.attempt, -1)]

    @property
    def _rollbacks(self) -> list[int]:
        """Return the numbers of the rollbacks that took effect, the newest last."""
        known = {number for m in self.manifests for number, _ in m.lineage} | {
            number for number, end in self.ends.items() if end.get("saved_step") is not None
        }
        return sorted(n for n in known if self.attempts.get(n, {}).get("kind") == "rollback")

    @property
    def reached(self) -> int:
        """Return the greatest step that was ever committed, as far as any file still shows it.

        After a rollback, steps of attempts before it do not count.
        """
        since = max(self._rollbacks, default=0)
        keys = (*self.damaged, *self.newer, *self.set_aside)
        matches = [match for key in keys if (match := fmt.CHECKPOINT_NAME.match(key))]
        steps = [(int(match["attempt"]), int(match["step"])) for match in matches]
        steps += [entry for m in self.manifests for entry in m.lineage]
        steps += [(n, int(end.get("saved_step") or 0)) for n, end in self.ends.items()]
        # The record of the rollback itself tells what was reached before it.
        steps += [(n - 1, int(r.get("reached") or 0)) for n, r in self.attempts.items()]
        return max((step for number, step in steps if number >= since), default=0)

    def has_progressed(self, greatest: int, reached: int) -> bool:
        """Return whether the run has got further since a time, or further since a later rollback.

        Args:
            greatest: The greatest attempt at that time.
            reached: `reached` at that time.
        """
        for number in (number for number in self._rollbacks if number > greatest):
            if int(self.attempts[number].get("reached", -1)) > reached:
                return True
            reached = int((self.attempts[number].get("from") or {}).get("step", -1))
        return self.reached > reached

    def event_files(self, store: Store) -> list[Entry]:
        """Return the files in the folder of events of a store, which is listed by the first call.

        Raises StorageError if it cannot be listed; the next call then tries again.
        """
        if str(store) not in self.events:
            self.events[str(store)] = store.entries(fmt.EVENTS)
        return self.events[str(store)]

    def size_of(self, store: Store, file: fmt.DataFile) -> int | None:
        """Return the size of a data file in the only store of this catalog; None: it is not there.

        A folder of shards is listed when the size of one of them is asked for.

        Raises StorageError.
        """
        folder = file.key.rpartition("/")[0]
        if folder in self.unlisted:
            self.sizes |= {entry.key: entry.size_bytes for entry in store.entries(folder)}
            self.unlisted.remove(folder)
        return self.sizes.get(file.key)

    def has_all(self, store: Store, manifest: Manifest) -> bool:
        """Return whether the only store of this catalog has each shard of a checkpoint.

        Raises StorageError.
        """
        return all(self.size_of(store, file) == file.size_bytes for file in manifest.shards)

    def may_be_apart(self, manifest: Manifest) -> bool:
        """Return whether shards of a checkpoint may be in directories of other machines."""
        record = self.attempts.get(manifest.attempt, {})
        return bool(manifest.shards) and record.get("is_scratch") is True

    def copies(self, manifest: Manifest) -> list[Store]:
        """Return the stores that have exactly this checkpoint, in store order (local first).

        Stores whose copy was found damaged come last.
        """
        pairs = [
            (store, part)
            for store, part in zip(self.stores, self.parts, strict=True)
            if manifest in part.manifests
        ]
        return [
            store for store, _ in sorted(pairs, key=lambda pair: manifest.key in pair[1].marked)
        ]

    def whole_copies(self, manifest: Manifest) -> list[Store]:
        """Return the stores that have exactly this checkpoint and its data in full size."""
        return [
            store
            for store, part in zip(self.stores, self.parts, strict=True)
            if manifest in part.manifests
            and all(part.size_of(store, file) == file.size_bytes for file in manifest.files)
        ]

    @property
    def candidates(self) -> list[Manifest]:
        """Return the checkpoints to resume from, best first: the history, newest first.

        A checkpoint that was found damaged in every store that has it comes last.
        """
        return sorted(self.history, key=lambda m: m.key in self.marked)

    def check_same_run(self) -> None:
        """Raise UsageError if the stores hold different runs, or different attempts of one number.

        The latter happens if the run was trained on each store separately.
        """
        runs = {
            str(store): part.run_id
            for store, part in zip(self.stores, self.parts, strict=True)
            if part.run_id
        }
        nonces = [
            {n: record["nonce"] for n, record in part.attempts.items() if "nonce" in record}
            for part in self.parts
        ]
        apart = [
            n
            for n in sorted(set().union(*nonces))
            if len({own[n] for own in nonces if n in own}) > 1
        ]
        if len(set(runs.values())) > 1 or apart:
            raise UsageError(
                "run.dir and run.remote hold different runs",
                "found: "
                + (
                    ", ".join(f"{run} in {store}" for store, run in runs.items())
                    if not apart
                    else f"two attempts {apart[0]}"
                ),
                "Take another run.dir, or the run.remote that belongs to it.",
            )

    def check_readable(self) -> None:
        """Raise NewerFormatError if the run's newest checkpoint has a newer format."""
        if (error := self.unreadable_head) is not None:
            raise error


def read_catalog(*stores: Store, known: Sequence[Known] = ()) -> Catalog:
    """List and parse a run in all of its stores.

    Args:
        stores: The run's stores.
        known: What was read of each store before; it is brought up to date. None of it is read
            again.

    Raises:
        StorageError: One of the stores cannot be listed or read.
    """
    each = known or [Known() for _ in stores]
    return joined(stores, [_list(store, own) for store, own in zip(stores, each, strict=True)])


def joined(stores: tuple[Store, ...], parts: list[Catalog]) -> Catalog:
    """Return the catalog of a run whose stores have been listed already, each in its own part."""
    if len(parts) == 1:
        parts[0].stores, parts[0].parts = stores, parts
        return parts[0]
    whole = Catalog(stores, parts)
    for part in parts:  # the remote part is last and takes precedence
        whole.attempts |= part.attempts
        whole.ends |= part.ends
        whole.newer |= part.newer
        whole.greatest = max(whole.greatest, part.greatest)
        for name in ("set_aside", "orphans", "orphan_folders", "foreign", "strangers"):
            setattr(whole, name, sorted({*getattr(whole, name), *getattr(part, name)}))
    readable = {m.key: m for part in parts for m in part.manifests}
    whole.manifests = sorted(
        (m for m in readable.values() if m.run_id == whole.run_id), key=lambda m: m.order
    )
    whole.damaged = {
        key: why for part in parts for key, why in part.damaged.items() if key not in readable
    }
    whole.marked = {
        key
        for key in readable
        if all(key in part.marked for part in parts if any(m.key == key for m in part.manifests))
    }
    return whole


def _list(store: Store, known: Known) -> Catalog:
    catalog = Catalog(known=known)
    checkpoints, folders = store.listing(fmt.CHECKPOINTS)
    keys, manifests = {entry.key for entry in checkpoints}, list[str]()
    catalog.sizes = {
        entry.key: entry.size_bytes for entry in checkpoints if entry.key.endswith(".pt")
    }
    folders = [folder for folder in folders if fmt.FOLDER_NAME.match(folder)]
    for entry in checkpoints:
        match = fmt.CHECKPOINT_NAME.match(entry.key)
        if match is None:
            if not TEMP.match(entry.key):
                catalog.foreign.append(entry.key)
            continue
        catalog.greatest = max(catalog.greatest, int(match["attempt"]))
        if match["aside"] and (marked := entry.key.removesuffix(match["aside"])) in keys:
            catalog.marked.add(marked)
        elif match["aside"]:
            catalog.set_aside.append(entry.key)
        elif match["kind"] == "json":
            manifests.append(entry.key)
    catalog.manifests, catalog.newer, catalog.damaged = known.read_manifests(store, manifests)
    _read_attempts(store, catalog)
    catalog.strangers = [m.key for m in catalog.manifests if m.run_id != catalog.run_id]
    catalog.manifests = sorted(
        (m for m in catalog.manifests if m.run_id == catalog.run_id), key=lambda m: m.order
    )
    named = {key.removesuffix(".json") for key in keys if key.endswith(".json")}
    alone = [
        key
        for key in catalog.sizes
        if fmt.CHECKPOINT_NAME.match(key) and key.removesuffix(".pt") not in named
    ]
    # A kill between the two renames of `set_aside` leaves the data under its name.
    halves = {key for key in alone if f"{key.removesuffix('.pt')}.json{SET_ASIDE}" in keys}
    catalog.set_aside += sorted(halves)
    catalog.orphans = [key for key in alone if key not in halves]
    catalog.orphan_folders = [
        folder for folder in folders if not {f"{folder}.json", f"{folder}.json{SET_ASIDE}"} & keys
    ]
    catalog.unlisted = set(folders)
    return catalog


def _read_attempts(store: Store, catalog: Catalog) -> None:
    matches = {
        entry.key: match
        for entry in store.entries(fmt.ATTEMPTS)
        if (match := fmt.ATTEMPT_NAME.match(entry.key))
    }
    for match in matches.values():
        catalog.greatest = max(catalog.greatest, int(match["attempt"]))
        if not match["end"]:
            catalog.attempts[int(match["attempt"])] = {}
    for key, record in catalog.known.read_records(store, list(matches)).items():
        match = matches[key]
        (catalog.ends if match["end"] else catalog.attempts)[int(match["attempt"])] = record


def going_on_from(manifest: Manifest | None) -> Lineage:
    """Return the lineage of an attempt that resumes from this checkpoint.

    It cuts off every later checkpoint of all attempts.
    """
    return manifest.lineage if manifest else ()


def extended(lineage: Lineage, attempt: int, step: int) -> Lineage:
    """Return the lineage that a manifest of `attempt` at `step` carries."""
    return (*(entry for entry in lineage if entry[0] != attempt), (attempt, step))


def reaches(final: Mapping[str, int | None], end: Mapping[str, int | None]) -> bool:
    """Return whether a run that finished with the limits `final` also satisfies the limits `end`.

    None means no limit.
    """
    return all(
        (final.get(name) or float("inf")) >= (end[name] or float("inf"))
        for name in ("epochs", "max_steps")
    )
