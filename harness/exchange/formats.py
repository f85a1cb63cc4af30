"""Handle the file formats of models: detect them, and let a written file appear whole.

The first bytes of a file determine its format, not its name: torch.save's format, its format before
PyTorch 1.6, safetensors, TorchScript, or a program of torch.export. An outline holds a file's
tensors with their names, dtypes and shapes, without their data.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import torch

from harness.checkpoint.load import UNPARSEABLE, first_line
from harness.errors import DamagedError, UsageError
from harness.store import CHUNK_BYTES, LocalStore, Store, is_url, open_store
from harness.supervision.run_address import WAIT_S, is_checkpoint, is_shard
from harness.text import size

TORCH = "torch.save"
LEGACY = "torch.save, before 1.6"
SAFETENSORS = "safetensors"
TORCHSCRIPT = "TorchScript"
EXPORTED = "torch.export"
DCP = "torch.distributed.checkpoint"
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
SLACK_BYTES = 64 << 20  # allowance on top of the limits relative to a file's size
# What a reader raises for a file that it cannot read.
UNREADABLE = (*UNPARSEABLE, ArithmeticError, AssertionError, MemoryError)
STRANGERS = (
    (
        b"version https://git-lfs",
        "a pointer of Git LFS: the file itself was not fetched (git lfs pull)",
    ),
    (b"<", "a web page, or XML: the download went wrong"),
    (b"\x89HDF", "an HDF5 file, of Keras perhaps"),
    (b"GGUF", "a GGUF file"),
    (b"\x1f\x8b", "compressed by gzip: unpack it first"),
    (b"\x80", "a plain pickle, not of torch.save"),
)


def identify(opened: BinaryIO, where: str) -> str:
    """Determine the format of a file from its first bytes.

    Raises:
        UsageError: The file holds no model.
        DamagedError: The file is empty or cut short.
    """
    size_bytes = opened.seek(0, os.SEEK_END)
    opened.seek(0)
    head = opened.read(512)
    if not head:
        raise DamagedError(f"{where} is empty")
    if head.startswith(b"PK\x03\x04"):
        return _identify_zip(opened, where, size_bytes)
    if head.startswith(LEGACY_MAGIC):
        return LEGACY
    if head[8:9] == b"{" and len(head) > 8:
        return SAFETENSORS
    description = next(
        (description for start, description in STRANGERS if head.startswith(start)),
        f"found: it begins with {head[:16]!r}",
    )
    if head[257:262] == b"ustar":
        description = (
            "an archive of tar, or a file of PyTorch 0.1, "
            "which nothing but running its pickle can read"
        )
    raise UsageError(
        f"{where} holds no model: {description}",
        remedy="Expected: a file of torch.save, safetensors, TorchScript or torch.export.",
    )


def _identify_zip(opened: BinaryIO, where: str, size_bytes: int) -> str:
    try:
        records = zipfile.ZipFile(opened).infolist()
    except (zipfile.BadZipFile, *UNREADABLE) as error:
        raise DamagedError(
            f"{where} is damaged or cut short: {first_line(error)}",
            f"found: {size(size_bytes)}",
            "Copy or download it again; compare its size with that of the original.",
        ) from None
    total = sum(record.file_size for record in records)
    if total > 4 * size_bytes + SLACK_BYTES:
        raise UsageError(
            f"{where} would unpack to {size(total)}",
            f"found: a file of {size(size_bytes)}",
            "No checkpoint is like that.",
        )
    names = [record.filename for record in records]
    ends = {name.rpartition("/")[2] for name in names}
    kind = (
        TORCHSCRIPT
        if {"data.pkl", "constants.pkl"} <= ends
        else TORCH
        if "data.pkl" in ends
        else EXPORTED
    )
    if kind == EXPORTED and "archive_format" not in ends:
        raise UsageError(
            f"{where} holds no model",
            f"found: a zip file with {', '.join(names[:3])}",
            "Expected: a file of torch.save.",
        )
    return kind


def tensors(value: Any, where: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor in a nested structure with the path that leads to it."""
    if isinstance(value, torch.nn.Module):
        value = value.state_dict()
    if isinstance(value, torch.Tensor):
        yield where, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors(item, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list | tuple):
        for at, item in enumerate(value):
            yield from tensors(item, f"{where}[{at}]")


def check_claims(tensors: Iterable[torch.Tensor], where: str, size_bytes: int) -> None:
    """Check that a file's tensors are not larger than the file that claims to hold them.

    Raises:
        DamagedError: The tensors' storages exceed the file's size, or their views exceed it far.
    """
    storages: dict[int, int] = {}
    shown_bytes = 0
    for tensor in tensors:
        if tensor.layout is torch.strided:
            storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            shown_bytes += tensor.numel() * tensor.element_size()
    held_bytes = sum(storages.values())
    if held_bytes > size_bytes or shown_bytes > 16 * size_bytes + SLACK_BYTES:
        claimed = size(max(held_bytes, shown_bytes))
        raise DamagedError(
            f"{where} is damaged, or cut short: it claims tensors of {claimed}",
            f"found: {size(size_bytes)}",
        )


def save_torch(path: Path, value: Any, legacy: bool) -> None:
    """Write a file of torch.save, in the format before PyTorch 1.6 if `legacy`.

    Raises:
        OSError: The file cannot be written.
    """
    # Given a path, torch would open the file itself, and its error would not report a full disk.
    with path.open("wb") as file:
        try:
            torch.save(value, file, _use_new_zipfile_serialization=not legacy)
        except RuntimeError as error:
            # With the zip format, a later RuntimeError hides the original error.
            if isinstance(error.__context__, OSError | KeyboardInterrupt):
                raise error.__context__ from None
            if "write()" in str(error):  # the legacy format's message for a failed write
                raise OSError(str(error)) from error
            raise


def destination(out: str, overwrite: bool, *, is_folder: bool = False) -> tuple[Store, str]:
    """Return the store and the key of a file, or a folder, to be written.

    Raises:
        UsageError: It is there already, or nothing can be written there.
    """
    is_there = not is_url(out) and os.path.lexists(Path(out).expanduser())
    if is_folder and (is_url(out) or is_there):
        raise UsageError(
            f"{out} is {'a URL' if is_url(out) else 'there already'}",
            remedy="Name a new folder on a disk: a folder is never written over.",
        )
    if is_checkpoint(out) or is_shard(out):
        raise UsageError(
            f"{out} is where a run keeps its checkpoints", remedy="Name a file elsewhere."
        )
    if is_url(out):
        if not urlsplit(out).path.strip("/") or out.endswith("/"):
            raise UsageError(f"{out} names no file", remedy="Name one: s3://bucket/model.pt.")
        folder, _, key = out.rpartition("/")
        store = open_store(folder, WAIT_S)
        is_there = store.exists(key)
    else:
        path = Path(os.path.realpath(Path(out).expanduser()))  # write to the target of a link
        store, key = open_store(path.parent, WAIT_S), path.name
        if path.exists() and not path.is_file():
            raise UsageError(
                f"{out} is {'a directory' if path.is_dir() else 'no plain file'}",
                remedy="Name a file.",
            )
        if not path.parent.is_dir():
            raise UsageError(f"there is no folder {path.parent}", remedy="Make it first.")
    if is_there and not overwrite:
        raise UsageError(
            f"{out} is there already",
            remedy="Name another file, or insist: --force (overwrite=True).",
        )
    return store, key


@contextlib.contextmanager
def scratch(store: Store, key: str) -> Iterator[Path]:
    """Yield the path of a temporary file or folder, and delete it afterwards.

    The file lies beside its destination if the store is local, else in a temporary directory.
    """
    name = f"{key}.tmp-0000-{secrets.token_hex(4)}"
    with (
        tempfile.TemporaryDirectory()
        if not isinstance(store, LocalStore)
        else contextlib.nullcontext(store.root) as folder
    ):
        path = Path(folder, name)
        try:
            yield path
        finally:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def put(path: Path, store: Store, key: str) -> None:
    """Let a temporary file, or a folder, appear whole under its key."""
    if path.is_dir():
        os.rename(path, store.where(key))
        return
    with path.open("rb") as file, store.writer(key, 0) as sink:
        sink.expect(path.stat().st_size)
        while chunk := file.read(CHUNK_BYTES):
            sink.write(chunk)
        sink.commit()
