"""Commit a checkpoint: the data first, the manifest last."""

from __future__ import annotations

import contextlib
import math
import os
import platform
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from harness.checkpoint import format as fmt
from harness.checkpoint import retention
from harness.checkpoint.attempts import Attempt, check_fence
from harness.checkpoint.catalog import extended
from harness.checkpoint.format import DataFile, Lineage, Manifest
from harness.checkpoint.load import UNPARSEABLE, outline, reason, verified_chunks
from harness.errors import SaveError, StorageError, SupersededError, UsageError
from harness.store import Sink, Store
from harness.text import now

HEAD = ("format_version", "step", "epoch", "loss", "metrics")  # what the manifest repeats
CLEAN_UP_S = 5.0  # retry limit for deleting what a failed save has left


@dataclass(frozen=True)
class About:
    """Manifest fields that the captured state does not contain, and options of the commit."""

    world_size: int
    lineage: Lineage
    classes: dict[str, str]
    config_digest: str
    final: dict[str, int | None] | None = None
    # Measured on exactly these weights; None: the metrics of the state.
    metrics: dict[str, float] | None = None
    read_back: bool = False  # parse the file before it becomes a checkpoint
    shards: tuple[DataFile, ...] = ()  # durable already, in the order of ranks


def commit(
    store: Store,
    attempt: Attempt,
    payload: Mapping[str, Any],
    about: About,
    write: Callable[[Sink], None] | None = None,
    check: Callable[[], None] = lambda: None,
) -> Manifest:
    """Write `payload` as the checkpoint of its step, durably.

    On return, the checkpoint exists and is durable. After an error no checkpoint exists, and none
    of its files remain if the store can delete them. The exceptions are a checkpoint that was
    committed already, which stays, and one whose manifest was asked for: see `_clean_up`.

    Args:
        store: Store that receives the checkpoint.
        attempt: Attempt that writes.
        payload: Content of the checkpoint. With `write` it need only hold the fields that the
            manifest repeats.
        about: Manifest fields that the payload does not contain.
        write: Writes the data file; by default `torch.save` writes `payload`.
        check: Called when the data is durable; its exceptions pass through.

    Raises:
        SaveError: The store fails, or this checkpoint is committed already.
        SupersededError: A newer attempt has begun.
        UsageError: `about.read_back` is set and `torch.load` refuses the file.
    """
    step = int(payload["step"])
    if payload.get("format_version") == fmt.SHARDED and not about.shards:
        raise UsageError(
            "sharded tensors are tracked, and their parts cannot be saved",
            "found: a state_dict with DTensors, of no module or optimizer that is tracked",
            "Track the sharded module and its optimizer themselves.",
        )

    def build(file: DataFile) -> Manifest:
        if about.read_back:
            check_readable(store, fmt.data_key(step, attempt.number), attempt)
        check()
        return _manifest(attempt, payload, about, file)

    return _commit(
        store,
        attempt,
        step,
        write or (lambda sink: torch.save(payload, sink)),  # type: ignore[arg-type]
        build,
    )


def check_readable(store: Store, key: str, attempt: Attempt) -> None:
    """Raise UsageError if a file is intact but `torch.load` refuses it.

    No run could resume from such a file. If it is gone: SupersededError, as a newer attempt deletes
    what earlier ones have not committed, or StorageError.
    """
    try:
        outline(store, key)
    except FileNotFoundError as error:
        check_fence(store, attempt)
        raise StorageError(f"{key} has vanished", f"found: {error}") from error
    except UNPARSEABLE as error:
        raise UsageError(
            "what is tracked can be saved, but not loaded again",
            f"found: {reason(error)}",
            "Keep to tensors, numbers, strings, lists and dicts "
            "in every state_dict() and in run.state.",
        ) from error


def adopt(
    source: Store, manifest: Manifest, store: Store, attempt: Attempt, lineage: Lineage
) -> Manifest:
    """Copy a checkpoint of this run or of another run as the first checkpoint of `attempt`.

    Args:
        source: Store that holds the checkpoint.
        manifest: Manifest of the checkpoint in `source`.
        store: Store that receives the copy.
        attempt: Attempt that writes the copy.
        lineage: Lineage of the attempt, without the entry of the copy.

    Returns:
        Manifest of the copy.

    Raises:
        DamagedError: The source does not verify.
        SaveError: As for `commit`.
        SupersededError: A newer attempt has begun.
    """
    shards = list[DataFile]()

    def write(sink: Sink) -> None:
        for rank, shard in enumerate(manifest.shards):
            copy = partial(_copy, source, shard)
            shards.append(write_shard(store, attempt, manifest.step, rank, copy))
        _copy(source, manifest.data, sink)

    def build(file: DataFile) -> Manifest:
        fields = {name: getattr(manifest, name) for name in manifest.__dataclass_fields__}
        changed = {
            "run_id": attempt.run_id,
            "attempt": attempt.number,
            "files": (file, *shards),
            "final": None,
            "time": now(),
        }
        return Manifest(
            **(fields | changed | {"lineage": extended(lineage, attempt.number, manifest.step)})
        )

    try:
        return _commit(store, attempt, manifest.step, write, build)
    except BaseException:
        with contextlib.suppress(StorageError):
            if not store.exists(fmt.manifest_key(manifest.step, attempt.number)):
                retention.delete_folder(store, fmt.folder_key(manifest.step, attempt.number))
        raise


def write_shard(
    store: Store, attempt: Attempt, step: int, rank: int, write: Callable[[Sink], None]
) -> DataFile:
    """Write one shard of a checkpoint durably and return its entry in the manifest.

    Raises:
        StorageError: The store fails; nothing is left under the name.
    """
    name = fmt.shard_name(step, attempt.number, rank)
    store.make_folder(fmt.folder_key(step, attempt.number))
    with store.writer(f"{fmt.CHECKPOINTS}/{name}", attempt.number) as sink:
        _fill(sink, write)
        sink.commit()
        return DataFile(name, sink.size_bytes, sink.digest())


def _fill(sink: Sink, write: Callable[[Sink], None]) -> None:
    """Call `write` with the sink; raise the sink's own error if it has one."""
    try:
        write(sink)
    # torch.save hides a failed write behind one of these errors.
    except (RuntimeError, OSError, AttributeError) as error:
        if sink.failure is None:
            raise
        raise sink.failure from error


def _copy(source: Store, file: DataFile, sink: Sink) -> None:
    sink.expect(file.size_bytes)
    # DamagedError is raised at the end of the data, before anything is committed.
    for chunk in verified_chunks(source, file):
        sink.write(chunk)


def _commit(
    store: Store,
    attempt: Attempt,
    step: int,
    write: Callable[[Sink], None],
    build: Callable[[DataFile], Manifest],
) -> Manifest:
    key, manifest_key = fmt.data_key(step, attempt.number), fmt.manifest_key(step, attempt.number)
    written = list[str]()  # what may be there, newest first
    try:
        if store.exists(manifest_key):
            raise FileExistsError(manifest_key)
        with store.writer(key, attempt.number) as sink:
            _fill(sink, write)
            written.insert(0, key)
            sink.commit()
            file = DataFile(f"{fmt.stem(step, attempt.number)}.pt", sink.size_bytes, sink.digest())
        manifest = build(file)
        check_fence(store, attempt)
        written.insert(0, manifest_key)
        store.create(manifest.key, fmt.to_bytes(manifest), attempt.number)
    except FileExistsError as error:
        raise SaveError(
            f"step {step} of attempt {attempt.number} is committed already: {error}"
        ) from error
    except BaseException as error:
        with contextlib.suppress(StorageError, SupersededError):
            _clean_up(store.with_retry_limit(CLEAN_UP_S), attempt, written)
        if isinstance(error, StorageError):
            raise SaveError(
                f"the checkpoint of step {step} was not saved: {error.what}",
                error.found,
                error.remedy,
            ) from error
        raise
    return manifest


def _clean_up(store: Store, attempt: Attempt, written: list[str]) -> None:
    """Delete what a failed commit may have left; the manifest goes first.

    If it cannot be deleted, its data must stay. So they must in a bucket, where the request to
    create it may still be carried out after it has failed. A newer attempt may have gone on from
    this checkpoint: then all of it stays.

    Raises:
        SupersededError: A newer attempt has begun.
        StorageError: The store fails.
    """
    if len(written) > 1:  # the manifest, too
        check_fence(store, attempt)
        written = written if store.is_local else written[:1]
    for name in written:
        store.delete(name)


def _manifest(
    attempt: Attempt, payload: Mapping[str, Any], about: About, file: DataFile
) -> Manifest:
    # Its presence also means that the file has all names that cannot be derived from the file.
    own = sys.modules["harness"].__version__
    metrics = payload["metrics"] if about.metrics is None else about.metrics
    return Manifest(
        run_id=attempt.run_id,
        attempt=attempt.number,
        step=payload["step"],
        epoch=payload["epoch"],
        # JSON has no NaN.
        loss=payload["loss"]
        if payload["loss"] is not None and math.isfinite(payload["loss"])
        else None,
        metrics={name: value for name, value in metrics.items() if math.isfinite(value)},
        world_size=about.world_size,
        lineage=extended(about.lineage, attempt.number, payload["step"]),
        files=(file, *about.shards),
        classes=about.classes,
        final=about.final,
        time=now(),
        host=f"{socket.gethostname()}:{os.getpid()}",
        versions={"torch": torch.__version__, "python": platform.python_version(), "harness": own},
        config_digest=about.config_digest,
        format_version=payload.get("format_version", 1),
    )
