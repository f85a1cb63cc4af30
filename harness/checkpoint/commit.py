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
from typing import Any

import torch

from harness.checkpoint import format as fmt
from harness.checkpoint.attempts import Attempt, check_fence, now
from harness.checkpoint.catalog import extended
from harness.checkpoint.format import DataFile, Lineage, Manifest
from harness.checkpoint.load import UNPARSEABLE, outline, reason, verified_chunks
from harness.errors import SaveError, StorageError, UsageError
from harness.store import Sink, Store


@dataclass(frozen=True)
class About:
    """What the manifest repeats of the state, and the state cannot tell."""

    world_size: int
    lineage: Lineage
    classes: dict[str, str]
    config_digest: str
    final: dict[str, int | None] | None = None
    metrics: dict[str, float] | None = None  # measured on these very weights; None: those of the state
    read_back: bool = False  # parse the file before it becomes a checkpoint


def commit(
    store: Store,
    attempt: Attempt,
    payload: Mapping[str, Any],
    about: About,
    write: Callable[[Sink], None] | None = None,
    check: Callable[[], None] = lambda: None,
) -> Manifest:
    """Write `payload` as the checkpoint of its step; when this returns it is durable, and it exists.

    With `write`, which writes the data in its own way, the payload need only hold what the manifest repeats. `check` is called when
    the data is durable; what it raises passes through. Raises SaveError if the store fails, SupersededError if a newer attempt has
    begun; then no checkpoint exists, and no file of it is left if the store lets us delete it.
    """
    step = int(payload["step"])

    def build(file: DataFile) -> Manifest:
        if about.read_back:
            _check_readable(store, step, attempt)
        check()
        return _manifest(attempt, payload, about, file)

    return _commit(store, attempt, step, write or (lambda sink: torch.save(payload, sink)), build)  # type: ignore[arg-type]


def _check_readable(store: Store, step: int, attempt: Attempt) -> None:
    """Raises UsageError for a file that is whole, but that `torch.load` refuses: nobody could go on from it."""
    try:
        outline(store, fmt.data_key(step, attempt.number))
    except UNPARSEABLE as error:
        raise UsageError(
            "what is tracked can be saved, but not loaded again", f"found: {reason(error)}",
            "Keep to tensors, numbers, strings, lists and dicts in every state_dict() and in run.state.",
        ) from error  # fmt: skip


def adopt(source: Store, manifest: Manifest, store: Store, attempt: Attempt, lineage: Lineage) -> Manifest:
    """Copy a whole checkpoint, of this run or of another, as the first one of `attempt`.

    Raises DamagedError if the source does not verify, SaveError as `commit` does.
    """

    def write(sink: Any) -> None:
        for chunk in verified_chunks(source, manifest):  # complains at the end, before anything is committed
            sink.write(chunk)

    def build(file: DataFile) -> Manifest:
        fields = {name: getattr(manifest, name) for name in manifest.__dataclass_fields__}
        changed = {"run_id": attempt.run_id, "attempt": attempt.number, "files": (file,), "final": None, "time": now()}
        return Manifest(**(fields | changed | {"lineage": extended(lineage, attempt.number, manifest.step)}))

    return _commit(store, attempt, manifest.step, write, build)


def _commit(store: Store, attempt: Attempt, step: int, write: Callable[[Sink], None], build: Callable[[DataFile], Manifest]) -> Manifest:
    key, manifest_key = fmt.data_key(step, attempt.number), fmt.manifest_key(step, attempt.number)
    try:
        if store.exists(manifest_key):
            raise FileExistsError(manifest_key)
        with store.writer(key, attempt.number) as sink:
            try:
                write(sink)
            except (RuntimeError, OSError, AttributeError) as error:  # torch's own words for a file that refuses
                if sink.failure is None:
                    raise
                raise sink.failure from error
            sink.commit()
            file = DataFile(f"{fmt.stem(step, attempt.number)}.pt", sink.size_bytes, sink.digest())
        manifest = build(file)
        check_fence(store, attempt)
        store.create(manifest.key, fmt.to_bytes(manifest), attempt.number)
    except FileExistsError as error:
        raise SaveError(f"step {step} of attempt {attempt.number} is committed already: {error}") from error
    except BaseException as error:
        with contextlib.suppress(StorageError):  # in this order: what keeps its manifest must keep its data
            store.delete(manifest_key)
            store.delete(key)
        if isinstance(error, StorageError):
            raise SaveError(f"the checkpoint of step {step} was not saved: {error.what}", error.found, error.remedy) from error
        raise
    return manifest


def _manifest(attempt: Attempt, payload: Mapping[str, Any], about: About, file: DataFile) -> Manifest:
    own = sys.modules["harness"].__version__  # that it stands there also tells that the file has all names that do not follow from it
    metrics = payload["metrics"] if about.metrics is None else about.metrics
    return Manifest(
        run_id=attempt.run_id,
        attempt=attempt.number,
        step=payload["step"],
        epoch=payload["epoch"],
        loss=payload["loss"] if payload["loss"] is not None and math.isfinite(payload["loss"]) else None,  # JSON has no NaN
        metrics={name: value for name, value in metrics.items() if math.isfinite(value)},
        world_size=about.world_size,
        lineage=extended(about.lineage, attempt.number, payload["step"]),
        files=(file,),
        classes=about.classes,
        final=about.final,
        time=now(),
        host=f"{socket.gethostname()}:{os.getpid()}",
        versions={"torch": torch.__version__, "python": platform.python_version(), "harness": own},
        config_digest=about.config_digest,
        format_version=payload.get("format_version", 1),
    )
