"""Read a checkpoint: verified first, parsed afterwards, or not at all."""

from __future__ import annotations

import copy
import errno
import json
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from blake3 import blake3

from harness.checkpoint import format as fmt
from harness.checkpoint import memory_copy
from harness.checkpoint.broadcast import broadcast
from harness.checkpoint.catalog import Catalog, read_catalog
from harness.checkpoint.format import DataFile, Manifest
from harness.distributed.ranks import World
from harness.errors import DamagedError, HarnessError, StorageError, UsageError
from harness.retry import reading
from harness.store import Handle, LocalStore, SealedMemory, Store, keep

LISTINGS = 5  # how often a store is listed anew because what was listed is gone
Tell = Callable[[int], object]  # is told of so many bytes more

# What torch.load was seen to raise for bytes that are no checkpoint.
UNPARSEABLE = (
    RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile, EOFError, ValueError, LookupError, TypeError, AttributeError, struct.error
)  # fmt: skip
ESCAPES = re.compile(r"\x1b\[[0-9;]*m")  # that make text bold in a terminal
NEWER, DAMAGED, UNREAD = "newer", "damaged", "unread"
UNREAD_REMEDY = "It may be whole. Start again when it can be read; to leave it behind for good: harness rollback RUN STEP."
NO_ROOM = ("not enough memory", os.strerror(errno.ENOMEM))


def first_line(error: BaseException) -> str:
    """An error's kind and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0][:200]}"


def reason(error: BaseException) -> str:
    """The line of a long message that tells why: torch's own, of a file that it does not load, is pages of advice with escape codes."""
    told = re.search(r"WeightsUnpickler error: ([^\n]*)", str(error))
    return ESCAPES.sub("", told[1])[:200] if told else ESCAPES.sub("", first_line(error))


def _not_told(size_bytes: int) -> None:
    """Nobody waits for it in front of a terminal."""


def checked(chunks: Iterator[bytes], expected: DataFile, where: str, tell: Tell = _not_told) -> Iterator[bytes]:
    """The chunks of a data file, passed on. Raises DamagedError at their end, or as soon as there are too many, if they are not what
    the manifest says: until then nothing may be done with them that cannot be undone."""
    digest, size_bytes = blake3(), 0
    for chunk in chunks:
        size_bytes += len(chunk)
        if size_bytes > expected.size_bytes:
            break
        digest.update(chunk)
        tell(len(chunk))
        yield chunk
    compare(size_bytes, f"blake3:{digest.hexdigest()}", expected, where)


def compare(size_bytes: int, digest: str, expected: DataFile, where: str) -> None:
    """Raises DamagedError if a data file is not what the manifest says."""
    if size_bytes != expected.size_bytes:
        more = " or more" if size_bytes > expected.size_bytes else ""
        raise DamagedError(f"{where} has the wrong size", f"found: {size_bytes} bytes{more}, expected: {expected.size_bytes}")
    if digest != expected.digest:
        raise DamagedError(f"{where} is damaged: its checksum does not match", f"found: {digest}, expected: {expected.digest}")


def chunks(store: Store, key: str, start: int = 0) -> Iterator[bytes]:
    """A checkpoint's data from `start` on, piece by piece, not verified. Raises DamagedError if it is not there, StorageError."""
    try:
        yield from store.chunks(key, start)
    except FileNotFoundError as error:
        raise DamagedError(f"{key} is missing, or no regular file", remedy="Its manifest is there: somebody deleted the data.") from error


def verified_chunks(store: Store, manifest: Manifest, tell: Tell = _not_told) -> Iterator[bytes]:
    """A checkpoint's data, piece by piece; see `checked`. Raises DamagedError, StorageError."""
    return checked(chunks(store, manifest.data_key), manifest.data, manifest.data_key, tell)


def verified(store: Store, manifest: Manifest, tell: Tell = _not_told) -> SealedMemory:
    """A checkpoint's data in memory, after comparing size and digest of those very bytes: what happens to the file afterwards does not
    matter.

    Raises DamagedError if it is not what the manifest says, StorageError if it cannot be read, HarnessError if there is no room.
    """
    return keep(verified_chunks(store, manifest, tell), manifest.size_bytes, manifest.data.name)


def parse(memory: SealedMemory, manifest: Manifest) -> dict[str, Any]:
    """The whole checkpoint in verified memory, on the CPU, nothing but plain data. Raises DamagedError.

    The tensors in `..._state_dict` are views of that memory: no second copy is made unless they are written to, and it is free when the
    last of them is. All else is small, and a copy, so that who keeps it does not keep the memory.
    """
    name = manifest.data.name
    try:
        payload = torch.load(memory.path, mmap=is_plain_zip(memory), map_location="cpu", weights_only=True)
    except UNPARSEABLE as error:
        if any(words in str(error) for words in NO_ROOM):  # torch's own; the file is whole
            raise HarnessError(f"there is not enough memory to load {name}", first_line(error)) from error
        raise DamagedError(f"{name} cannot be parsed", f"found: {reason(error)}") from None
    if not isinstance(payload, dict) or payload.get("step") != manifest.step:
        raise DamagedError(f"{name} is not the checkpoint that its manifest describes")
    _check_version(payload, name)
    return {key: value if str(key).endswith("_state_dict") else copy.deepcopy(value) for key, value in payload.items()}


def is_plain_zip(memory: SealedMemory) -> bool:
    """Whether tensors lie in it as they are; torch would map what is compressed as well, and does not map what is no zip file."""
    with memory.open() as file:
        try:
            return all(record.compress_type == zipfile.ZIP_STORED for record in zipfile.ZipFile(file).infolist())
        except UNPARSEABLE:
            return False


def load(store: Store, manifest: Manifest, tell: Tell = _not_told) -> dict[str, Any]:
    """The whole checkpoint, on the CPU, nothing but plain data. Raises DamagedError or StorageError."""
    with verified(store, manifest, tell) as memory:
        return parse(memory, manifest)


def outline(store: Store, key: str) -> dict[str, Any]:
    """What is in a checkpoint, with tensors of the right type and shape whose data is not read. Raises StorageError, and
    what `torch.load` raises."""
    with store.open(key) as file:
        try:
            return torch.load(file, map_location="meta", weights_only=True)  # type: ignore[no-any-return]
        except UNPARSEABLE as error:
            if failure := getattr(getattr(file, "raw", None), "failure", None):
                raise failure from error
            raise


def check(store: Store, manifest: Manifest, tell: Tell = _not_told) -> None:
    """Read and compare every byte, keeping none. Raises DamagedError, StorageError."""
    for _ in verified_chunks(store, manifest, tell):
        pass
    try:
        content = outline(store, manifest.data_key)
    except UNPARSEABLE as error:
        raise DamagedError(f"{manifest.data.name} cannot be parsed", f"found: {reason(error)}") from None
    _check_version(content, manifest.data.name)


def _check_version(payload: Any, name: str) -> None:
    """Raises NewerFormatError if a file is of another version than this harness reads, whatever its manifest says."""
    version = payload.get("format_version", 1) if isinstance(payload, dict) else 1
    if type(version) is not int or version not in fmt.READABLE:
        raise fmt.newer(name, version)


@dataclass(frozen=True)
class Problem:
    """Why a checkpoint is not gone on from."""

    words: str = ""
    kind: str = ""  # NEWER: only another harness can read it; DAMAGED: it is not what was written; UNREAD: it may be whole
    remedy: str = ""


@dataclass
class ResumePoint:
    """What a run goes on from, and what was passed over on the way."""

    survey: Catalog | None  # the writer's listing; None on the other ranks
    manifest: Manifest | None = None  # None: step 0
    payload: dict[str, Any] | None = None
    place: int = 0  # which store it was read from
    in_memory: bool = False  # it was none of them, but the tier: nothing on a disk has come so far
    damaged: list[tuple[int, str]] = field(default_factory=list)  # which store's copy, by manifest key, to set aside once claimed
    notes: list[str] = field(default_factory=list)

    def read_from(self, place: int) -> set[str]:
        """The name of what was chosen, if it was read whole from this very store."""
        return {self.manifest.name} if self.manifest and self.place == place else set()


class Chooser:
    """Finds and loads what a run goes on from, on all ranks together."""

    def __init__(
        self, stores: tuple[Store, ...], world: World, give_up: Callable[[], object], steps_back: Callable[[], bool], memory: LocalStore
    ) -> None:
        self.stores, self.world, self.give_up, self.steps_back = stores, world, give_up, steps_back
        self.sources: tuple[Store, ...] = (*stores, memory)
        self.tier = memory
        self._memory: SealedMemory | None = None  # the writer's

    def once(self) -> tuple[ResumePoint, bool]:
        """One listing and what comes of it; also whether something listed was deleted meanwhile, so that only a new listing tells."""
        choice = ResumePoint(None)
        for text, places in self._on_writer(partial(self._look, choice)):
            manifest, unread = _parse_manifest(text), list[str]()
            for place in places:
                source, in_memory = self.sources[place], place == len(self.stores)
                payload, problem = self._try(source, manifest)
                if payload is not None:
                    choice.manifest, choice.payload, choice.place, choice.in_memory = manifest, payload, place, in_memory
                    choice.notes += self._why(choice.survey, manifest, source)
                    return choice, False
                if not self._on_writer(partial(source.exists, manifest.key)):
                    return choice, True
                words = problem.words + (f" in {source}" if len(self.stores) > 1 or in_memory else "")
                if problem.kind == NEWER:
                    raise UsageError(words, remedy=problem.remedy)
                choice.notes.append(f"passed over: {words}")
                if problem.kind == UNREAD:
                    unread.append(words)
                elif not in_memory:
                    choice.damaged.append((place, manifest.key))
            if unread:  # it may be whole, and going on from an older one would cut it off
                raise StorageError(f"{manifest.name} cannot be read", "; ".join(unread), UNREAD_REMEDY)
        self._on_writer(partial(self._check_fresh, choice))
        return choice, False

    def _on_writer(self, work: Callable[[], Any]) -> Any:
        return self.world.on_writer(work, give_up=self.give_up)

    def _look(self, choice: ResumePoint) -> list[tuple[str, list[int]]]:
        found = choice.survey = read_catalog(*self.stores)
        found.check_one_run()
        found.check_readable()
        choice.damaged = [(place, key) for place, part in enumerate(found.parts) for key in part.damaged if key not in part.marked]
        choice.notes = [f"passed over: {why}" for part in found.parts for why in part.damaged.values()]
        choice.notes += [f"ignored, not of this run: {' '.join(key.split())}" for key in found.foreign + found.strangers]
        candidates = [(m, [self.stores.index(copy) for copy in found.copies(m)]) for m in found.candidates]
        memory_copy.check_readable(self.tier, found)
        if (kept := memory_copy.newest(self.tier, found)) is not None:
            candidates.insert(0, (kept, [len(self.stores)]))
        if len(candidates) > 1 and self.steps_back():
            choice.notes.append(f"going back behind {candidates[0][0].name}: every attempt to go on from it has died")
            candidates = [*candidates[1:], candidates[0]]
        return [(fmt.to_bytes(m).decode(), places) for m, places in candidates]

    def _check_fresh(self, choice: ResumePoint) -> None:
        if choice.survey is not None:
            choice.survey.check_fresh_start(" and ".join(map(str, self.stores)), choice.notes)

    def _why(self, found: Catalog | None, manifest: Manifest, source: Store) -> list[str]:
        if found is not None and source is self.tier:
            return [f"taking {manifest.name} from this machine's memory: the disk has {found.head.name if found.head else 'nothing'}"]
        if found is None or len(self.stores) < 2:
            return []
        heads = [f"{part.head.name if part.head else 'nothing'} in {store}" for store, part in zip(found.stores, found.parts, strict=True)]
        return [f"taking {manifest.name} from {source}: the newest that verifies ({', '.join(heads)})"]

    def _try(self, store: Store, manifest: Manifest) -> tuple[dict[str, Any] | None, Problem]:
        """The payload on every rank, or on none, and then what was wrong."""
        offer, said = self._on_writer(partial(self._open, store, manifest))
        if said:
            return None, Problem(*said)
        payload: dict[str, Any] | None = None
        memory, self._memory = self._memory, None
        said = list[str]()
        try:
            with self._spread(store, manifest, memory, Handle(**offer)) as own:
                payload = parse(own, manifest)
        except HarnessError as error:
            said = _said(error)
        problems = [(rank, Problem(*said)) for rank, said in enumerate(self.world.gather(said)) if said]
        if not problems:
            return payload, Problem()
        rank, first = min(problems, key=lambda problem: (NEWER, DAMAGED, UNREAD).index(problem[1].kind))
        return None, Problem(f"{first.words} (rank {rank})", first.kind, first.remedy)

    def _open(self, store: Store, manifest: Manifest) -> tuple[dict[str, str] | None, list[str]]:
        """Where other processes of this machine find the verified data, or what is wrong with it."""
        for last in (store.is_local, True):
            try:
                self._memory = reading(partial(verified, store, manifest)) if store.is_local else verified(store, manifest)
                return vars(self._memory.offer), []
            except HarnessError as error:
                if last or not isinstance(error, DamagedError):  # what came over a network may be whole when it is read again
                    return None, _said(error)
        raise AssertionError("the last try returns")

    def _spread(self, store: Store, manifest: Manifest, memory: SealedMemory | None, offer: Handle) -> SealedMemory:
        expected, where = manifest.data, f"{manifest.data.name}, as it was sent to this rank,"

        def receive(chunks: Iterator[bytes]) -> SealedMemory:
            return keep(checked(chunks, expected, where), expected.size_bytes, expected.name)

        def read() -> SealedMemory | None:
            return reading(partial(verified, store, manifest)) if store.is_local else None

        return broadcast(self.world, memory, offer, expected.size_bytes, read, receive)


def choose(
    stores: Store | tuple[Store, ...],
    world: World,
    give_up: Callable[[], object] = lambda: None,
    steps_back: Callable[[], bool] = lambda: False,
) -> ResumePoint:
    """Find and load the newest checkpoint of the run's history that verifies on every rank. Nothing is changed.

    The bytes leave a remote store once: the writer fetches them, the others map its memory or are sent them. A copy that is damaged on one
    store is looked for on the other one first. `steps_back`, asked on the writer, makes the newest the last choice.
    Raises DamagedError if there is a history but nothing in it loads, StorageError if a store cannot be listed. Collective: every rank
    must call it.
    """
    places = (stores,) if isinstance(stores, Store) else stores
    chooser = Chooser(places, world, give_up, steps_back, memory_copy.place(places[0]))
    for _ in range(LISTINGS):
        choice, vanished = chooser.once()
        if not vanished:
            return choice
    raise StorageError(f"checkpoints of {chooser.stores[-1]} vanish while they are read", remedy="Is another process deleting them?")


def _parse_manifest(text: str) -> Manifest:
    fields = json.loads(text)
    return fmt.from_bytes(fmt.manifest_key(fields["step"], fields["attempt"]), text.encode())


def _said(error: HarnessError) -> list[str]:
    """The fields of a Problem, which can be sent."""
    kind = NEWER if isinstance(error, fmt.NewerFormatError) else DAMAGED if isinstance(error, DamagedError) else UNREAD
    return [error.what + (f" ({error.found})" if error.found else ""), kind, error.remedy]


def set_aside(store: Store, manifest_key: str) -> None:
    """Take a damaged checkpoint out of the run without deleting it; the manifest first, so that it exists no more at once."""
    store.set_aside((manifest_key, f"{manifest_key.removesuffix('.json')}.pt"))
