"""Choose the checkpoint to resume from: the newest that verifies, the same on all ranks."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from harness.checkpoint import format as fmt
from harness.checkpoint import memory_copy
from harness.checkpoint.broadcast import broadcast
from harness.checkpoint.catalog import Catalog, joined, read_catalog
from harness.checkpoint.format import Manifest
from harness.checkpoint.fresh_start import check_fresh_start, newer_on_other_machines, passed_over
from harness.checkpoint.known import Known
from harness.checkpoint.load import ElsewhereError, checked, parse, verified, verified_at_start
from harness.distributed.ranks import World
from harness.errors import DamagedError, HarnessError, LostRankError, StorageError, UsageError
from harness.retry import reading
from harness.store import Handle, LocalStore, SealedMemory, Store, keep

LISTINGS = 5  # number of listings to try while listed checkpoints vanish
NEWER, DAMAGED, UNREAD, ELSEWHERE = "newer", "damaged", "unread", "elsewhere"
UNREAD_REMEDY = (
    "It may be whole. Start again when it can be read; "
    "to leave it behind for good: harness rollback RUN STEP."
)


# See `sharding.resume_shards.add_parts`.
Payload = dict[str, Any] | None
Found = tuple[list[str], list[str]]
AddParts = Callable[[tuple[Store, ...], Manifest, Payload, World, bool], Found]


@dataclass(frozen=True)
class Problem:
    """The reason why a run does not resume from a checkpoint."""

    message: str = ""
    # NEWER: only another harness can read it; DAMAGED: the data is not what was written; UNREAD:
    # it could not be read and may be intact; ELSEWHERE: other machines have it, or had it.
    kind: str = ""
    remedy: str = ""
    of_shards: bool = False  # all stores were asked


@dataclass
class ResumePoint:
    """The point that a run resumes from, and the checkpoints that were skipped."""

    catalog: Catalog | None  # listing on rank 0; None on the other ranks
    manifest: Manifest | None = None  # None: step 0
    payload: dict[str, Any] | None = None
    place: int = 0  # index of the store that it was read from
    in_memory: bool = False  # read from the memory tier; no store on a disk has this step
    is_mixed: bool = False  # some of its shards were read from another store
    elsewhere: set[str] = field(default_factory=set)  # names; not all is where it is needed
    # (index of the store, manifest key) of each damaged copy, to be set aside after the claim; or
    # the key of a single shard, which was read from another store.
    damaged: list[tuple[int, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    # Digests of the settings as built that optimizers and schedulers have begun with, by name: in
    # the checkpoint, and in this attempt, whose record keeps them.
    built_before: dict[str, str] = field(default_factory=dict)
    built: dict[str, str] = field(default_factory=dict)

    def read_from(self, place: int) -> set[str]:
        """Return the name of the chosen checkpoint as a set, if all of it is from this store."""
        is_it = self.manifest and self.place == place and not self.is_mixed
        return {self.manifest.name} if self.manifest and is_it else set()

    def take_payload(self) -> dict[str, Any] | None:
        """Return the payload; the caller then holds the only reference to it."""
        payload, self.payload = self.payload, None
        return payload


class Chooser:
    """Finds and loads the checkpoint that a run resumes from, on all ranks together."""

    def __init__(
        self,
        stores: tuple[Store, ...],
        world: World,
        give_up: Callable[[], object],
        steps_back: Callable[[Catalog, Manifest], bool],
        memory: LocalStore,
        check: Callable[[Catalog], object],
        add_parts: AddParts,
        are_apart: bool,
    ) -> None:
        self.stores, self.world, self.give_up, self.steps_back = stores, world, give_up, steps_back
        self.check, self.add_parts, self.are_apart = check, add_parts, are_apart
        self._known = [Known() for _ in stores]  # of all listings, on rank 0 only
        self.sources, self.tier = (*stores, memory), memory
        self._memory: SealedMemory | None = None  # on rank 0 only

    def once(self) -> tuple[ResumePoint, bool]:
        """List the stores once and try the candidates in order.

        Returns the resume point, and whether a listed checkpoint was deleted: then list again.
        """
        resume_point = ResumePoint(None)
        for text, places in self._on_writer(partial(self._look, resume_point)):
            manifest, unread = _parse_manifest(text), list[str]()
            for place in places:
                source, in_memory = self.sources[place], place == len(self.stores)
                is_apart = in_memory or (self.are_apart and places == [0])
                payload, problem, notes, bad = self._try(source, manifest, is_apart=is_apart)
                if payload is not None:
                    resume_point.manifest, resume_point.payload = manifest, payload
                    resume_point.place, resume_point.in_memory = place, in_memory
                    # With two stores, shards are read from the first one where it has them.
                    resume_point.is_mixed = bool(notes or (manifest.shards and place == 1))
                    resume_point.damaged += [(0, key) for key in bad]
                    resume_point.notes += self._why(resume_point.catalog, manifest, source) + notes
                    return resume_point, False
                if not self._on_writer(partial(source.exists, manifest.key)):
                    return resume_point, True
                is_named = in_memory or (len(self.stores) > 1 and not problem.of_shards)
                message = problem.message + (f" in {source}" if is_named else "")
                if problem.kind == NEWER:
                    raise UsageError(message, remedy=problem.remedy)
                resume_point.notes.append(f"skipped: {message}")
                if problem.kind == UNREAD:
                    unread.append(message)
                elif problem.kind == DAMAGED and not in_memory:
                    of_all = places if problem.of_shards else [place]
                    resume_point.damaged += [(each, manifest.key) for each in of_all]
                elif problem.kind == ELSEWHERE:
                    resume_point.elsewhere.add(manifest.name)
                if problem.of_shards:
                    break
            if unread:  # it may be intact, and a resume from an older one would cut it off
                raise StorageError(
                    f"{manifest.name} cannot be read", "; ".join(unread), UNREAD_REMEDY
                )
        self._on_writer(partial(self._check_fresh, resume_point))
        return resume_point, False

    def noting_newer(self, resume_point: ResumePoint) -> ResumePoint:
        """Note what only other machines have. Collective: every rank must call it."""
        if self.are_apart:
            order = resume_point.manifest.order if resume_point.manifest else (0, 0)
            resume_point.notes += newer_on_other_machines(self.stores[0], self.world, order)
        return resume_point

    def _on_writer(self, work: Callable[[], Any]) -> Any:
        return self.world.on_writer(work, give_up=self.give_up)

    def _look(self, resume_point: ResumePoint) -> list[tuple[str, list[int]]]:
        catalog = resume_point.catalog = self._list()
        catalog.check_same_run()
        catalog.check_readable()
        resume_point.damaged = [
            (place, key)
            for place, part in enumerate(catalog.parts)
            for key in part.damaged
            if key not in part.marked
        ]
        resume_point.notes = passed_over(catalog)
        candidates = [
            (m, [self.stores.index(copy) for copy in catalog.copies(m)]) for m in catalog.candidates
        ]
        there = memory_copy.listed(self.tier)
        memory_copy.check_readable(there, catalog)
        if (kept := memory_copy.newest(there, catalog)) is not None:
            candidates.insert(0, (kept, [len(self.stores)]))
        if len(candidates) > 1 and self.steps_back(catalog, candidates[0][0]):
            resume_point.notes.append(
                f"skipping {candidates[0][0].name}: every attempt that resumed from it has died"
            )
            candidates = [*candidates[1:], candidates[0]]
        return [(fmt.to_bytes(m).decode(), places) for m, places in candidates]

    def _list(self) -> Catalog:
        """List each store, and check the first one before the others are asked for anything."""
        parts = list[Catalog]()
        for store, known in zip(self.stores, self._known, strict=True):
            parts.append(read_catalog(store, known=[known]))
            if len(parts) == 1:
                self.check(parts[0])
        return joined(self.stores, parts)

    def _check_fresh(self, resume_point: ResumePoint) -> None:
        if resume_point.catalog is not None:
            where = " and ".join(map(str, self.stores))
            check_fresh_start(resume_point.catalog, where, resume_point.notes)

    def _why(self, catalog: Catalog | None, manifest: Manifest, source: Store) -> list[str]:
        if catalog is not None and source is self.tier:
            return [
                f"taking {manifest.name} from this machine's memory: "
                f"the disk has {catalog.head.name if catalog.head else 'nothing'}"
            ]
        if catalog is None or len(self.stores) < 2:
            return []
        heads = [
            f"{part.head.name if part.head else 'nothing'} in {store}"
            for store, part in zip(catalog.stores, catalog.parts, strict=True)
        ]
        return [
            f"taking {manifest.name} from {source}: the newest that verifies ({', '.join(heads)})"
        ]

    def _try(
        self, source: Store, manifest: Manifest, *, is_apart: bool
    ) -> tuple[Payload, Problem, list[str], list[str]]:
        """Load a checkpoint on all ranks: the main file from this store, shards from any.

        Returns the payload on every rank, or None on every rank and the problem; then what
        `add_parts` returns.
        """
        offer, fields = self._on_writer(partial(self._open, source, manifest))
        if fields:
            return None, Problem(*fields), [], []
        payload: dict[str, Any] | None = None
        memory, self._memory = self._memory, None
        fields, notes, bad = list[Any](), list[str](), list[str]()
        try:
            with self._spread(source, manifest, memory, Handle(**offer)) as own:
                payload = parse(own, manifest)
        except HarnessError as error:
            fields = _problem_fields(error)
            # Rank 0 has verified the stored bytes: what is wrong here alone happened on the way.
            if fields[1] == DAMAGED and not self.world.is_writer:
                fields[1:] = [UNREAD, ""]
        if manifest.shards:
            stores = (source,) if source is self.tier else self.stores
            try:
                notes, bad = self.add_parts(stores, manifest, payload, self.world, is_apart)
            except HarnessError as error:
                fields = fields or [*_problem_fields(error), True]
        problems = [
            (rank, Problem(*fields))
            for rank, fields in enumerate(self.world.gather(fields))
            if fields
        ]
        if not problems:
            return payload, Problem(), notes, bad
        rank, first = min(
            problems, key=lambda problem: (NEWER, DAMAGED, UNREAD, ELSEWHERE).index(problem[1].kind)
        )
        return None, dataclasses.replace(first, message=f"{first.message} (rank {rank})"), [], []

    def _open(self, store: Store, manifest: Manifest) -> tuple[dict[str, str] | None, list[str]]:
        """Verify the data on rank 0.

        Returns the handle by which other processes of this machine open it, or the problem.
        """
        try:
            self._memory = verified_at_start(store, manifest.data)
        except HarnessError as error:
            return None, _problem_fields(error)
        return vars(self._memory.offer), []

    def _spread(
        self, store: Store, manifest: Manifest, memory: SealedMemory | None, offer: Handle
    ) -> SealedMemory:
        expected, where = manifest.data, f"{manifest.data.name}, as it was sent to this rank,"

        def receive(chunks: Iterator[bytes]) -> SealedMemory:
            return keep(checked(chunks, expected, where), expected.size_bytes, expected.name)

        def read() -> SealedMemory | None:
            return reading(partial(verified, store, expected)) if store.is_local else None

        return broadcast(self.world, memory, offer, expected.size_bytes, read, receive)


def choose(
    stores: Store | tuple[Store, ...],
    world: World,
    give_up: Callable[[], object] = lambda: None,
    steps_back: Callable[[Catalog, Manifest], bool] = lambda catalog, newest: False,
    check: Callable[[Catalog], object] = lambda here: None,
    add_parts: AddParts = lambda *of_sharded: ([], []),
    *,
    are_apart: bool = False,
) -> ResumePoint:
    """Find and load the newest checkpoint of the run's history that verifies on every rank.

    No store is changed. The data is fetched from a remote store once, by rank 0 (the writer). The
    other ranks map its memory or receive the data from it. If a file is damaged in one store, that
    of the other store is tried before an older checkpoint.
    Collective: every rank must call it.

    Args:
        stores: The run's store, or its stores with the authority last.
        world: The process group.
        give_up: Returns a true value when the other ranks should not wait long for rank 0.
        steps_back: Called on rank 0 with the catalog and the newest checkpoint; if it returns True,
            that is the last choice.
        check: Called on rank 0 with the catalog of the first store, before another store is listed;
            its errors pass through.
        add_parts: Adds the parts of a checkpoint with shards to the content of its main file.
        are_apart: Whether the first store is a directory that each machine may have for itself.

    Returns:
        The resume point; its `manifest` is None for step 0.

    Raises:
        DamagedError: There is a history, but none of its checkpoints loads.
        StorageError: A store cannot be listed, or a checkpoint that may be intact cannot be read.
        UsageError: The stores hold different runs, or only a newer harness can read a checkpoint.
    """
    places = (stores,) if isinstance(stores, Store) else stores
    memory = memory_copy.place(places[0])
    chooser = Chooser(places, world, give_up, steps_back, memory, check, add_parts, are_apart)
    for _ in range(LISTINGS):
        resume_point, vanished = chooser.once()
        if not vanished:
            return chooser.noting_newer(resume_point)
    raise StorageError(
        f"checkpoints of {chooser.stores[-1]} vanish while they are read",
        f"{LISTINGS} times, the checkpoint that was chosen was gone when it was read",
        "Stop what deletes them (another job of this run, a clean-up, a lifecycle rule of the "
        "bucket), then start again.",
    )


def _parse_manifest(text: str) -> Manifest:
    fields = json.loads(text)
    return fmt.from_bytes(fmt.manifest_key(fields["step"], fields["attempt"]), text.encode())


def _problem_fields(error: HarnessError) -> list[str]:
    """Return the fields of a `Problem` in a form that can be sent to others; raise a lost rank."""
    if isinstance(error, LostRankError):  # there is nobody to decide with
        raise error
    kinds = {fmt.NewerFormatError: NEWER, ElsewhereError: ELSEWHERE, DamagedError: DAMAGED}
    kind = next((kind for of, kind in kinds.items() if isinstance(error, of)), UNREAD)
    return [error.what + (f" ({error.found})" if error.found else ""), kind, error.remedy]


def set_aside(store: Store, key: str) -> None:
    """Set a damaged checkpoint aside by the key of its manifest, or a single shard; delete nothing.

    The manifest comes first, so that the checkpoint ceases to exist at once.
    """
    data = [f"{key.removesuffix('.json')}.pt"] if key.endswith(".json") else []
    store.set_aside([key, *data])
