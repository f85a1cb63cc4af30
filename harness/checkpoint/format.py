"""Names of a checkpoint's files, and the content of its manifest."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from blake3 import blake3

from harness.checkpoint import records
from harness.errors import DamagedError, StorageError, UsageError
from harness.store.base import TEMP, check_key

FileName = str | os.PathLike[str]  # of one of the user's own files
OTHERS = "`harness ls RUN` shows the other checkpoints."
# Format versions of a checkpoint with shards; in 3 the main file has what each rank has for itself.
WITH_SHARDS = (3, 4)
SHARDED = WITH_SHARDS[-1]
READABLE = (1, 2, *WITH_SHARDS)  # format versions that this harness reads
# Top-level keys that an older harness would drop silently.
WITH_MORE = ("names", "kinds", "gradients", "attributes", "own")
CHECKPOINTS, ATTEMPTS, EVENTS = "checkpoints", "attempts", "events"
FOLDERS = (CHECKPOINTS, ATTEMPTS, EVENTS)
# The user's own files, with subfolders. The folder is created with the first file and is never
# searched for checkpoints.
FILES = "files"

CHECKPOINT_NAME = re.compile(
    r"^checkpoints/step_(?P<step>[0-9]{8,})-(?P<attempt>[0-9]{4,})"
    r"\.(?P<kind>pt|json)(?P<aside>\.damaged)?\Z"
)
SHARD_NAME = re.compile(r"^checkpoints/step_[0-9]{8,}-[0-9]{4,}/[0-9]{5,}\.pt(\.damaged)?\Z")
FOLDER_NAME = re.compile(r"^checkpoints/(?P<stem>step_[0-9]{8,}-(?P<attempt>[0-9]{4,}))\Z")
ATTEMPT_NAME = re.compile(r"^attempts/(?P<attempt>[0-9]{4,})(?P<end>\.end)?\.json\Z")

Lineage = tuple[tuple[int, int], ...]


def version_of(payload: Mapping[str, Any]) -> int:
    """Return the format version of a checkpoint with this content.

    The version is SHARDED if there are shards beside it, 2 if the content has state that an older
    harness would drop silently, else 1.
    """
    if "layout" in payload:
        return SHARDED
    data, generators = payload.get("data", ()), payload.get("rng", ())
    has_more = (
        any(name in payload for name in WITH_MORE)
        or "kinds" in data
        or "beside" in data
        or any("own_gpu" in entry for entry in generators)
    )
    return 2 if has_more else 1


def stem(step: int, attempt: int) -> str:
    """Return the name of a checkpoint without a file extension."""
    return f"step_{step:08d}-{attempt:04d}"


def data_key(step: int, attempt: int) -> str:
    """Return the key of a checkpoint's data file."""
    return f"{CHECKPOINTS}/{stem(step, attempt)}.pt"


def folder_key(step: int, attempt: int) -> str:
    """Return the key of the folder of a checkpoint's shards."""
    return f"{CHECKPOINTS}/{stem(step, attempt)}"


def shard_name(step: int, attempt: int, rank: int) -> str:
    """Return the name of a rank's shard in the manifest."""
    return f"{stem(step, attempt)}/{rank:05d}.pt"


def manifest_key(step: int, attempt: int) -> str:
    """Return the key of a checkpoint's manifest."""
    return f"{CHECKPOINTS}/{stem(step, attempt)}.json"


def stem_of(data_key: str) -> str:
    """Return the name of the checkpoint that a data file belongs to."""
    return data_key.split("/")[1].removesuffix(".pt")


def manifest_of(data_key: str) -> str:
    """Return the key of the manifest that names a data file."""
    return f"{CHECKPOINTS}/{stem_of(data_key)}.json"


def attempt_key(attempt: int) -> str:
    """Return the key of an attempt's record."""
    return f"{ATTEMPTS}/{attempt:04d}.json"


def end_key(attempt: int) -> str:
    """Return the key of the record of how an attempt ended."""
    return f"{ATTEMPTS}/{attempt:04d}.end.json"


def events_key(attempt: int) -> str:
    """Return the key of an attempt's event log on a store that can append."""
    return f"{EVENTS}/{attempt:04d}.jsonl"


def segment_key(attempt: int, number: int) -> str:
    """Return the key of one segment of an attempt's event log on a store that cannot append."""
    return f"{EVENTS}/{attempt:04d}-{number:06d}.jsonl"


def rank_events_key(attempt: int, rank: int) -> str:
    """Return the key of the last event of a rank that does not write the event log."""
    return f"{EVENTS}/{attempt:04d}-rank{rank}.jsonl"


def file_key(name: FileName) -> str:
    """Return the key of a user's file.

    Raises UsageError for a name that leads out of the folder of these files, or that is reserved
    for temporary files.
    """
    name = os.fspath(name) if isinstance(name, os.PathLike) else name
    try:
        check_key(FILES, name)
    except (StorageError, AttributeError):  # the latter: it is no text
        raise UsageError(
            f"{name!r} cannot be kept",
            remedy="Give a relative path without '..', such as samples/a.png.",
        ) from None
    if TEMP.match(name):
        raise UsageError(
            f"{name!r} cannot be kept",
            remedy="Name it otherwise: .tmp-NUMBER-… marks an unfinished file.",
        )
    return f"{FILES}/{name}"


@dataclass(frozen=True)
class DataFile:
    """The entry of a data file in its manifest."""

    name: str
    size_bytes: int
    digest: str

    @property
    def key(self) -> str:
        """Return the key of the file."""
        return f"{CHECKPOINTS}/{self.name}"


@dataclass(frozen=True)
class Manifest:
    """The description of a checkpoint that people and listings use without opening its data.

    A checkpoint exists if and only if its manifest exists.
    """

    run_id: str
    attempt: int
    step: int
    epoch: int
    loss: float | None
    metrics: dict[str, float]
    world_size: int
    lineage: Lineage
    files: tuple[DataFile, ...]
    classes: dict[str, str]
    final: dict[str, int | None] | None
    time: str
    host: str
    versions: dict[str, str]
    config_digest: str
    format_version: int = 1
    # Fields that this harness does not know; in the file they are at the top level as well.
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def order(self) -> tuple[int, int]:
        """Return the sort key, greater for newer checkpoints: attempt first, never step alone."""
        return self.attempt, self.step

    @property
    def name(self) -> str:
        """Return the name of the checkpoint, without a file extension."""
        return stem(self.step, self.attempt)

    @property
    def key(self) -> str:
        """Return the key of the manifest."""
        return manifest_key(self.step, self.attempt)

    @property
    def data(self) -> DataFile:
        """Return the entry of the main file: the only one, unless the state is sharded."""
        return self.files[0]

    @property
    def shards(self) -> tuple[DataFile, ...]:
        """Return the entries of the shards, in the order of the ranks that wrote them."""
        return self.files[1:]

    @property
    def data_key(self) -> str:
        """Return the key of the main file."""
        return self.data.key

    @property
    def size_bytes(self) -> int:
        """Return the size of all data files together, in bytes."""
        return sum(file.size_bytes for file in self.files)


def to_bytes(manifest: Manifest) -> bytes:
    """Serialise a manifest to its only valid form, with the digest of all its fields."""
    fields = dataclasses.asdict(manifest)
    fields |= fields.pop("more")
    return _spell(fields | {"manifest_digest": _digest(fields)})


def from_bytes(key: str, text: bytes) -> Manifest:
    """Parse the manifest under `key`.

    Raises DamagedError unless every byte is as it was written, NewerFormatError if the manifest is
    intact but its format version is not readable.
    """
    try:
        fields = json.loads(text)
        expected = fields.pop("manifest_digest")
        version = fields["format_version"]
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise DamagedError(
            f"{key} is not a manifest",
            f"found: {type(error).__name__}: {str(error)[:100]}",
            OTHERS,
        ) from None
    if version not in READABLE and _digest(fields) == expected:
        raise newer(key, version)
    if (actual := _digest(fields)) != expected:
        raise DamagedError(
            f"{key}: the manifest's own checksum does not match",
            f"found: {actual}, expected: {expected}",
            OTHERS,
        )
    if _spell(fields | {"manifest_digest": expected}) != text:
        raise DamagedError(
            f"{key} was written again by another program",
            "found: the same values in other bytes",
            OTHERS,
        )
    try:
        manifest = _build(fields)
    except (TypeError, ValueError, KeyError, OverflowError, RecursionError) as error:
        raise DamagedError(
            f"{key} is not a manifest", f"found: {type(error).__name__}: {error}"
        ) from None
    if (
        manifest.key != key
        or [file.name for file in manifest.files] != _file_names(manifest)
        or manifest.lineage[-1:] != (manifest.order,)
    ):
        raise DamagedError(
            f"{key} speaks of another checkpoint",
            f"found: {manifest.key} with {[file.name for file in manifest.files]}",
        )
    return manifest


def _file_names(manifest: Manifest) -> list[str]:
    """Return the names that a manifest's files must have."""
    is_sharded = manifest.format_version in WITH_SHARDS
    ranks = range(max(1, len(manifest.shards)) if is_sharded else 0)
    shards = [shard_name(manifest.step, manifest.attempt, rank) for rank in ranks]
    return [f"{manifest.name}.pt", *shards]


class NewerFormatError(UsageError):
    """An intact checkpoint has a format version that this harness cannot read.

    Such a checkpoint is never set aside or deleted, and no run resumes from an older checkpoint by
    itself.
    """


def newer(key: str, version: object) -> NewerFormatError:
    """Return the error for a checkpoint whose format version this harness cannot read."""
    return NewerFormatError(
        f"{key} has format version {version}",
        f"expected: at most {READABLE[-1]}, all that this harness can read",
        f"Use a harness that reads format version {version}. "
        "To leave that checkpoint behind: harness rollback RUN STEP.",
    )


def order_of(key: str) -> tuple[int, int]:
    """Return the (attempt, step) in the name of a checkpoint's file."""
    match = CHECKPOINT_NAME.match(key)
    assert match is not None, "it was listed as one"
    return int(match["attempt"]), int(match["step"])


def _build(fields: dict[str, Any]) -> Manifest:
    lineage = tuple((int(attempt), int(step)) for attempt, step in fields.pop("lineage"))
    files = tuple(
        DataFile(str(file["name"]), int(file["size_bytes"]), str(file["digest"]))
        for file in fields.pop("files")
    )
    known = {
        name: fields.pop(name)
        for name in Manifest.__dataclass_fields__.keys() & fields.keys() - {"more"}
    }
    manifest = Manifest(lineage=lineage, files=files, more=fields, **known)
    strange = [name for name, holds in KINDS.items() if not holds(getattr(manifest, name))]
    if strange:
        raise ValueError(f"{strange[0]} is not of its kind")
    return manifest


def _are_numbers(value: object) -> bool:
    return isinstance(value, dict) and all(records.is_value(number) for number in value.values())


def _are_limits(value: object) -> bool:
    return value is None or (
        isinstance(value, dict)
        and all(limit is None or records.is_count(limit) for limit in value.values())
    )


def _are_texts(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


# Checks of field types: a manifest with a correct digest may still have wrong types.
KINDS: dict[str, Callable[[object], bool]] = {
    **dict.fromkeys(("attempt", "step", "epoch", "world_size"), records.is_count),
    "loss": lambda value: value is None or records.is_value(value),
    "metrics": _are_numbers,
    "final": _are_limits,
    "classes": _are_texts,
    "run_id": lambda value: isinstance(value, str),
    "time": lambda value: isinstance(value, str),
    "files": lambda value: all(
        records.is_count(file.size_bytes)
        for file in value  # type: ignore[attr-defined]
    ),
    "lineage": lambda value: all(
        records.is_count(number)
        for pair in value  # type: ignore[attr-defined]
        for number in pair
    ),
}


def _spell(fields: dict[str, Any]) -> bytes:
    return (json.dumps(fields, indent=1, sort_keys=True) + "\n").encode()


def _digest(fields: dict[str, Any]) -> str:
    return f"blake3:{blake3(json.dumps(fields, sort_keys=True).encode()).hexdigest()}"
