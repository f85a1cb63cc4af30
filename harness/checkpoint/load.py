"""Read a checkpoint: verified first, parsed afterwards, or not at all."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, BinaryIO

import torch
from blake3 import blake3

from harness.checkpoint import format as fmt
from harness.checkpoint.format import Manifest
from harness.checkpoint.history import Survey, survey
from harness.errors import DamagedError, HarnessError, StorageError
from harness.ranks import World
from harness.store import CHUNK_BYTES, LocalStore

LISTINGS = 5  # how often a store is listed anew because what was listed is gone

# What torch.load was seen to raise for bytes that are no checkpoint.
UNPARSEABLE = (
    RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile, EOFError, ValueError, LookupError, TypeError, AttributeError, struct.error
)  # fmt: skip


def first_line(error: BaseException) -> str:
    """An error's kind and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0][:200]}"


def verified(store: LocalStore, manifest: Manifest) -> BinaryIO:
    """Open a checkpoint's data after reading all of it and comparing size and digest; the file stands at its beginning.

    Raises DamagedError if it is not what the manifest says, StorageError if it cannot be read.
    """
    key = f"{fmt.CHECKPOINTS}/{manifest.data.name}"
    try:
        file = store.open(key)
    except FileNotFoundError as error:
        raise DamagedError(f"{key} is missing, or no regular file", remedy="Its manifest is there: somebody deleted the data.") from error
    try:
        size_bytes = os.fstat(file.fileno()).st_size
        if size_bytes != manifest.data.size_bytes:
            raise DamagedError(f"{key} has the wrong size", f"found: {size_bytes} bytes, expected: {manifest.data.size_bytes}")
        digest = blake3()
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
        if f"blake3:{digest.hexdigest()}" != manifest.data.digest:
            raise DamagedError(
                f"{key} is damaged: its checksum does not match",
                f"found: blake3:{digest.hexdigest()}, expected: {manifest.data.digest}",
            )
        file.seek(0)
    except OSError as error:
        file.close()
        raise StorageError(f"cannot read {key}: {error.strerror}", f"found: {error}") from error
    except BaseException:
        file.close()
        raise
    return file


def load(store: LocalStore, manifest: Manifest) -> dict[str, Any]:
    """The whole checkpoint, on the CPU, nothing but plain data. Raises DamagedError or StorageError."""
    with verified(store, manifest) as file:
        try:
            payload = torch.load(file, map_location="cpu", weights_only=True)
        except UNPARSEABLE as error:
            if "not enough memory" in str(error):  # torch's own words; the file is whole
                raise HarnessError(f"there is not enough memory to load {manifest.data.name}", first_line(error)) from error
            raise DamagedError(f"{manifest.data.name} cannot be parsed", f"found: {first_line(error)}") from None
    if not isinstance(payload, dict) or payload.get("step") != manifest.step:
        raise DamagedError(f"{manifest.data.name} is not the checkpoint that its manifest describes")
    return payload


@dataclass
class Choice:
    """What a run goes on from, and what was passed over on the way."""

    survey: Survey | None  # the writer's listing; None on the other ranks
    manifest: Manifest | None = None  # None: step 0
    payload: dict[str, Any] | None = None
    damaged: list[str] = field(default_factory=list)  # manifest keys to set aside once an attempt is claimed
    notes: list[str] = field(default_factory=list)


def choose(store: LocalStore, world: World, give_up: Callable[[], object] = lambda: None) -> Choice:
    """Find and load the newest checkpoint of the run's history that verifies on every rank. Reads only.

    Raises DamagedError if there is a history but nothing in it loads, StorageError if the store cannot be listed.
    Collective: every rank must call it.
    """
    for _ in range(LISTINGS):
        choice, vanished = _choose_once(store, world, give_up)
        if not vanished:
            return choice
    raise StorageError(f"checkpoints of {store} vanish while they are read", remedy="Is another process deleting them? Start again.")


def _choose_once(store: LocalStore, world: World, give_up: Callable[[], object]) -> tuple[Choice, bool]:
    """One listing and what comes of it; also whether something listed was deleted meanwhile, so that only a new listing tells."""
    choice = Choice(None)

    def look() -> list[str]:
        choice.survey = survey(store)
        return [fmt.to_bytes(manifest).decode() for manifest in choice.survey.history]

    manifests = [_parse(text) for text in world.on_writer(look, give_up=give_up)]
    if choice.survey:
        choice.damaged = list(choice.survey.damaged)
        choice.notes = [f"passed over: {why}" for why in (choice.survey.damaged | choice.survey.newer).values()]
        choice.notes += [f"ignored, not of this run: {key}" for key in choice.survey.foreign + choice.survey.strangers]
    for manifest in manifests:
        payload, problem, is_damaged = _try(store, manifest)
        problems = {rank: said for rank, said in enumerate(world.gather((problem, is_damaged))) if said[0]}
        if not problems:
            choice.manifest, choice.payload = manifest, payload
            return choice, False
        del payload
        if not world.on_writer(partial(store.exists, manifest.key), give_up=give_up):
            return choice, True
        choice.notes += [f"passed over: {said[0]} (rank {rank})" for rank, said in list(problems.items())[:1]]
        if any(said[1] for said in problems.values()):
            choice.damaged.append(manifest.key)

    def check_fresh() -> None:
        if choice.survey is not None:
            choice.survey.check_fresh_start(str(store), choice.notes)

    world.on_writer(check_fresh, give_up=give_up)
    return choice, False


def _parse(text: str) -> Manifest:
    fields = json.loads(text)
    return fmt.from_bytes(fmt.manifest_key(fields["step"], fields["attempt"]), text.encode())


def _try(store: LocalStore, manifest: Manifest) -> tuple[dict[str, Any] | None, str | None, bool]:
    try:
        return load(store, manifest), None, False
    except HarnessError as error:
        return None, error.what + (f" ({error.found})" if error.found else ""), isinstance(error, DamagedError)


def set_aside(store: LocalStore, manifest_key: str) -> None:
    """Take a damaged checkpoint out of the run without deleting it; the manifest first, so that it exists no more at once."""
    for key in (manifest_key, f"{manifest_key.removesuffix('.json')}.pt"):
        if store.exists(key):
            store.rename(key, key + fmt.SET_ASIDE)
