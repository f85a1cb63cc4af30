"""Read a checkpoint: verify it first and parse it only if it verifies."""

from __future__ import annotations

import copy
import errno
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from blake3 import blake3

from harness.checkpoint import format as fmt
from harness.checkpoint.format import DataFile, Manifest
from harness.errors import EXIT_STORAGE, DamagedError, HarnessError
from harness.retry import reading
from harness.store import SealedMemory, Store, keep
from harness.text import size

Tell = Callable[[int], object]  # progress callback: number of further bytes

NO_ROOM = ("not enough memory", os.strerror(errno.ENOMEM))

# Errors that torch.load was seen to raise for bytes that are no checkpoint.
UNPARSEABLE = (
    RuntimeError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    struct.error,
)
ESCAPES = re.compile(r"\x1b\[[0-9;]*m")  # terminal escape codes for bold text


class GoneError(DamagedError):
    """A checkpoint was deleted, with its manifest, after it was listed."""

    exit_code = EXIT_STORAGE

    def __init__(self, key: str) -> None:
        super().__init__(
            f"{key} was deleted while it was read",
            "found: neither its data nor its manifest",
            "Retention deletes older checkpoints while a run trains: try again.",
        )


class AbsentError(DamagedError):
    """A checkpoint's manifest is in a store without its data."""

    def __init__(self, key: str) -> None:
        super().__init__(
            f"{key} is missing, or no regular file",
            "found: its manifest, without its data",
            "It was deleted from outside. `harness ls RUN` shows the others.",
        )


class ElsewhereError(HarnessError):
    """Files of a checkpoint are on the disks, or in the memory, of other machines."""

    exit_code = EXIT_STORAGE


def first_line(error: BaseException) -> str:
    """Return an error's type and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0][:200]}"


def reason(error: BaseException) -> str:
    """Return the line of an error message that contains the reason.

    For a file that torch refuses to load, its message is pages of advice with escape codes.
    """
    match = re.search(r"WeightsUnpickler error: ([^\n]*)", str(error))
    return ESCAPES.sub("", match[1])[:200] if match else ESCAPES.sub("", first_line(error))


def _ignore_progress(size_bytes: int) -> None:
    """Ignore progress, for callers that show none."""


def checked(
    chunks: Iterator[bytes], expected: DataFile, where: str, tell: Tell = _ignore_progress
) -> Iterator[bytes]:
    """Yield the chunks of a data file, and compare them with its manifest entry at their end.

    Until the iteration ends, a caller must do nothing with the chunks that cannot be undone.

    Args:
        chunks: Content of the data file.
        expected: Entry of the file in its manifest.
        where: Name of the data for error messages.
        tell: Progress callback.

    Raises:
        DamagedError: Size or digest do not match. An excess of bytes is reported at once.
    """
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
    """Raise DamagedError if a data file does not match its manifest entry.

    Args:
        size_bytes: Size that was found.
        digest: Digest that was found.
        expected: Entry of the file in its manifest.
        where: Name of the data for error messages.
    """
    if size_bytes != expected.size_bytes:
        more = " or more" if size_bytes > expected.size_bytes else ""
        raise DamagedError(
            f"{where} has the wrong size",
            f"found: {size_bytes} bytes{more}, expected: {expected.size_bytes}",
        )
    if digest != expected.digest:
        raise DamagedError(
            f"{where} is damaged: its checksum does not match",
            f"found: {digest}, expected: {expected.digest}",
        )


def chunks(store: Store, key: str, start: int = 0) -> Iterator[bytes]:
    """Yield the data file under `key` in chunks from byte `start` on, without verifying it.

    Raises:
        GoneError: There is neither such a file nor its manifest any more.
        DamagedError: The checkpoint's manifest is there without its data.
        StorageError: The store fails.
    """
    try:
        yield from store.chunks(key, start)
    except FileNotFoundError as error:
        raise _absent(store, key) from error


def _absent(store: Store, key: str) -> DamagedError:
    """Return the error for a data file that does not exist. Raises StorageError."""
    if not store.exists(fmt.manifest_of(key)):
        return GoneError(key)
    return AbsentError(key)


def verified_chunks(store: Store, file: DataFile, tell: Tell = _ignore_progress) -> Iterator[bytes]:
    """Return an iterator over a data file; after the last chunk, compare size and digest.

    Until then, do nothing with the chunks that cannot be undone. `tell` is called with the size of
    each chunk. Iterating raises DamagedError or StorageError.
    """
    return checked(chunks(store, file.key), file, file.key, tell)


def verified(store: Store, file: DataFile, tell: Tell = _ignore_progress) -> SealedMemory:
    """Read a data file into sealed memory and verify size and digest of those bytes.

    Later changes of the file have no effect.

    Raises:
        DamagedError: The data does not match the manifest.
        StorageError: The data cannot be read.
        HarnessError: There is not enough memory.
    """
    return keep(verified_chunks(store, file, tell), file.size_bytes, file.name)


def verified_at_start(store: Store, file: DataFile) -> SealedMemory:
    """Return the verified content of a data file, which is read again before it counts as damaged.

    Data that was damaged on the network may be intact in the second read; a disk is asked again
    where that may help.

    Raises:
        DamagedError: The data does not match the manifest.
        StorageError: The data cannot be read.
        HarnessError: There is not enough memory.
    """
    if store.is_local:
        return reading(partial(verified, store, file))
    try:
        return verified(store, file)
    except GoneError:
        raise
    except DamagedError:
        return verified(store, file)


def parse(memory: SealedMemory, manifest: Manifest) -> dict[str, Any]:
    """Parse a checkpoint's main file in verified memory into plain data on the CPU.

    The tensors in `..._state_dict` are views of that memory. They are copied only on write, and the
    memory is freed with the last of them. All other values are small and are copied, so that
    a reference to one of them does not keep the memory alive.

    Raises:
        DamagedError: The data cannot be parsed, or is not the checkpoint of the manifest.
        NewerFormatError: The format version is not readable.
        HarnessError: There is not enough memory.
    """
    name = manifest.data.name
    try:
        payload = torch.load(
            memory.path, mmap=is_plain_zip(memory), map_location="cpu", weights_only=True
        )
    except UNPARSEABLE as error:
        raise unparseable(manifest.data, error) from error
    if not isinstance(payload, dict) or payload.get("step") != manifest.step:
        raise DamagedError(f"{name} is not the checkpoint that its manifest describes")
    _check_version(payload, name)
    return {
        key: value if str(key).endswith("_state_dict") else copy.deepcopy(value)
        for key, value in payload.items()
    }


def unparseable(file: DataFile, error: Exception) -> HarnessError:
    """Return the error for a verified file that torch does not load: damage, or lack of memory."""
    if any(phrase in str(error) for phrase in NO_ROOM):  # the file itself is intact
        return HarnessError(
            f"there is not enough memory to load {file.name}, which has {size(file.size_bytes)}",
            f"found: {first_line(error)}",
            "Free memory on this machine, or ask for more (SLURM: --mem).",
        )
    return DamagedError(f"{file.name} cannot be parsed", f"found: {reason(error)}")


def is_plain_zip(memory: SealedMemory) -> bool:
    """Return whether the memory is a zip file with uncompressed records only.

    Only then can torch map the tensors: it would map compressed records too, and does not map
    a file that is no zip file.
    """
    with memory.open() as file:
        try:
            return all(
                record.compress_type == zipfile.ZIP_STORED
                for record in zipfile.ZipFile(file).infolist()
            )
        except UNPARSEABLE:
            return False


def load(store: Store, manifest: Manifest, tell: Tell = _ignore_progress) -> dict[str, Any]:
    """Read, verify and parse a checkpoint's main file into plain data on the CPU.

    Raises DamagedError, StorageError, or the other errors of `parse`.
    """
    with verified(store, manifest.data, tell) as memory:
        return parse(memory, manifest)


def outline(store: Store, key: str) -> dict[str, Any]:
    """Parse a checkpoint's structure on the meta device, without reading tensor data.

    The tensors have the correct dtype and shape. Raises StorageError, and the errors of
    `torch.load`.
    """
    with store.open(key) as file:
        try:
            return torch.load(  # type: ignore[no-any-return]
                file, map_location="meta", weights_only=True, mmap=False
            )
        except UNPARSEABLE as error:
            if failure := getattr(getattr(file, "raw", None), "failure", None):
                raise failure from error
            raise


def check_bytes(store: Store, files: Iterable[DataFile], tell: Tell = _ignore_progress) -> None:
    """Verify every byte of data files without keeping it. Raises DamagedError or StorageError."""
    for file in files:
        for _ in verified_chunks(store, file, tell):
            pass


def check(store: Store, manifest: Manifest, tell: Tell = _ignore_progress) -> None:
    """Verify every byte of a checkpoint, without keeping it, and that it can be parsed.

    Raises:
        DamagedError: The data does not match the manifest, or cannot be parsed.
        GoneError: The checkpoint was deleted after it was listed.
        StorageError: The data cannot be read.
        NewerFormatError: The format version is not readable.
    """
    check_bytes(store, manifest.files, tell)
    try:
        content = outline(store, manifest.data_key)
    except FileNotFoundError as error:
        raise _absent(store, manifest.data_key) from error
    except UNPARSEABLE as error:
        raise DamagedError(
            f"{manifest.data.name} cannot be parsed", f"found: {reason(error)}"
        ) from None
    _check_version(content, manifest.data.name)


def _check_version(payload: Any, name: str) -> None:
    """Raise NewerFormatError if a file's format version is not readable.

    The version comes from the file itself, not from the manifest.
    """
    version = payload.get("format_version", 1) if isinstance(payload, dict) else 1
    if type(version) is not int or version not in fmt.READABLE:
        raise fmt.newer(name, version)
