"""Read any file that holds a model, whoever wrote it, without executing anything in it.

The outline of a file (every tensor without its data) is read first; it shows whether the file is
safe to load.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from harness.checkpoint import format as fmt
from harness.checkpoint import load
from harness.checkpoint.format import Manifest
from harness.checkpoint.load import first_line
from harness.errors import DamagedError, HarnessError, UsageError
from harness.exchange import formats, safe_unpickle
from harness.exchange.formats import UNREADABLE
from harness.exchange.single_read import File, SingleRead
from harness.hf import hf_folder
from harness.hf.safetensors_file import load_safetensors, safetensors_outline
from harness.monitoring.console import ProgressBar
from harness.sharding import dcp_folder
from harness.sharding.shards import made_whole
from harness.store import LocalStore, SealedMemory, check_url, is_url, open_store, redacted
from harness.supervision import run_address
from harness.supervision.run_address import WAIT_S
from harness.text import muted


class WantsCodeError(UsageError):
    """A pickle names classes or functions that are not known to be harmless."""


@dataclass(frozen=True)
class Loaded:
    """The contents of a file: for most formats a nested structure.

    `metadata` holds facts stored beside the tensors, such as those of a safetensors header.
    `manifest` is set only for a checkpoint of a run.
    """

    file: File
    value: Any
    metadata: Mapping[str, str] = field(default_factory=dict)
    manifest: Manifest | None = None


def find(path: str | Path) -> File:
    """Find the file at a path or URL and determine its format.

    Raises:
        UsageError: The path leads to no file, or the file holds no model.
        DamagedError: The file is empty or cut short.
        StorageError: The store cannot be read.
    """
    text = str(path)
    if not is_url(text):
        text = str(_there(Path(text)).resolve())  # follow links
    folder, _, key = text.rpartition("/")
    store = open_store(folder or "/", WAIT_S)
    try:
        once = SingleRead(store.open(key), store.where(key))
        return File(store, key, formats.identify(once.view(), once.where), once.size_bytes, once)
    except FileNotFoundError:
        raise UsageError(f"there is no file {text}", remedy="Give a path or a URL.") from None


def _there(path: Path) -> Path:
    name = str(path)[:200]
    try:
        if path.is_file():
            return path
        problem = (
            f"{name} is a directory, and no run" if path.is_dir() else f"there is no file {name}"
        )
    except OSError as error:  # a parent folder without permission, or an invalid path
        problem = f"{name} cannot be looked at: {error.strerror}"
    raise UsageError(
        problem,
        f"found: from {Path.cwd()}",
        "Give a run, one of its checkpoints, or a file: a path or a URL.",
    )


def read_any(
    path: str | Path,
    which: str | int = run_address.NEWEST,
    *,
    trust: bool = False,
    weights_only: bool = False,
    maps: bool = False,
) -> Loaded:
    """Read a checkpoint of a run, which is verified, or any other file, with all data.

    Args:
        path: Path or URL of a run, a checkpoint or a file.
        which: Checkpoint of a run: "newest", "best" or a step.
        trust: Let a pickle run the code that it names.
        weights_only: Leave optimizer state that is sharded without data.
        maps: Read of a local safetensors file what is used alone, as of a folder of them.

    Raises:
        UsageError: There is no such file, it holds no model, or it wants to run code.
        DamagedError: The file is damaged or cut short.
        StorageError: The store cannot be read.
    """
    folder = _files_in(path, maps=maps)
    if folder or not is_ours(str(path)):
        if which != run_address.NEWEST:
            raise UsageError(
                f"{path} is one model: there is nothing to choose from",
                f"found: {which}",
                "Name a run to choose from it.",
            )
        return _of_folder(path, folder) if folder else read(find(path), trust=trust)
    store, manifest = run_address.checkpoint(str(path), which)
    bar = ProgressBar(f"reading {manifest.name} from {store}", manifest.size_bytes)
    payload = load.load(store, manifest, bar)
    if manifest.shards:
        payload = made_whole(store, manifest, payload, weights_only=weights_only)
    bar.end()
    file = File(store, manifest.data_key, formats.TORCH, manifest.size_bytes)
    return Loaded(file, payload, manifest=manifest)


def _files_in(path: str | Path, *, maps: bool = False) -> list[Path]:
    """Return the files of a folder of formats.DCP, or of Hugging Face; [] if it is neither."""
    if maps and str(path).endswith(".safetensors") and os.path.isfile(path):
        return [Path(path)]
    if is_url(str(path)) or os.path.isdir(f"{path}/{fmt.CHECKPOINTS}"):
        return []
    return dcp_folder.dcp_files(Path(path)) or hf_folder.hf_files(Path(path))


def _of_folder(path: str | Path, held: list[Path], *, with_data: bool = True) -> Loaded:
    """Return what the files `held` in a folder hold; those of Hugging Face are mapped."""
    is_dcp = held[0].name == dcp_folder.METADATA
    kind = formats.DCP if is_dcp else formats.SAFETENSORS
    file = File(
        LocalStore(held[0].parent), held[0].name, kind, sum(each.stat().st_size for each in held)
    )
    with _reader_errors(file):
        if not is_dcp:
            return Loaded(file, hf_folder.mapped(Path(path)))
        loaded = Loaded(file, *dcp_folder.read_dcp(Path(path), with_data=with_data))
        safe_unpickle.check_nesting(loaded.value)
    return _checked(loaded)


def outline_any(path: str | Path, which: str | int = run_address.NEWEST) -> Loaded:
    """Read a checkpoint of a run, or any other file, without the tensors' data.

    Raises the same errors as `read_any`, except for a pickle that wants to run code: its objects
    are replaced by texts (`NotLoaded`).
    """
    if folder := _files_in(path):
        return _of_folder(path, folder, with_data=False)
    if not is_ours(str(path)):
        file = find(path)
        try:
            return outline(file)
        except WantsCodeError:
            return _inert(file)
    store, manifest = run_address.checkpoint(str(path), which)
    file = File(store, manifest.data_key, formats.TORCH, manifest.size_bytes)
    opened = dataclasses.replace(file, once=file.opened())
    return Loaded(file, outline(opened).value, manifest=manifest)


def is_ours(path: str) -> bool:
    """Return whether a path or URL names a run or one of its checkpoints.

    A file in a bucket may have any name, so a URL without a known file suffix names a run only if
    no object has exactly that key.

    Raises:
        UsageError: The URL is not valid.
    """
    if is_url(path) and (problem := check_url(path)):
        raise UsageError(f"{redacted(path)} is not a place for a file", f"expected: {problem}")
    if _files_in(path) or not run_address.is_run(path):
        return run_address.is_checkpoint(path)
    folder, _, key = path.rstrip("/").rpartition("/")
    return (
        not is_url(path)
        or folder.endswith(("/", ":"))
        or not open_store(folder, WAIT_S).exists(key)
    )


def outline(file: File) -> Loaded:
    """Read the contents of a file with tensors of the right dtype and shape, without their data.

    Files with quantized or some kinds of sparse tensors are read with their data.

    Raises:
        UsageError: The file wants to run code (WantsCodeError).
        DamagedError: The file is damaged or cut short, or was deleted.
        StorageError: The store cannot be read.
    """
    with file.view() as opened, _reader_errors(file, opened):
        if file.kind == formats.SAFETENSORS:
            return Loaded(file, *safetensors_outline(file.where, file.size_bytes, opened))
        if file.kind == formats.TORCHSCRIPT:
            return _checked(_script(file, opened, with_data=False))
        if file.kind == formats.EXPORTED:
            return Loaded(file, safe_unpickle.exported_outline(zipfile.ZipFile(opened)))
        value = safe_unpickle.without_data(opened)
        safe_unpickle.check_nesting(value)
        return _checked(Loaded(file, value))


def _script(file: File, opened: BinaryIO, *, with_data: bool) -> Loaded:
    with muted():
        value, is_training = safe_unpickle.torchscript(zipfile.ZipFile(opened), with_data=with_data)
    return Loaded(
        file, value, {"mode": "training: call eval() before using it" if is_training else "eval"}
    )


def _inert(file: File) -> Loaded:
    """Read a pickle that wants to run code, with stand-ins in place of that code."""
    with file.view() as opened, _reader_errors(file, opened), muted(), FakeTensorMode():
        if (
            file.kind == formats.TORCH
            and "constants.pkl" in torch._C.PyTorchFileReader(opened).get_all_records()
        ):
            raise DamagedError(
                f"{file.where} is ambiguous",
                "found: constants.pkl of TorchScript, in PyTorch's list of the contents only",
                "torch writes no such file: it may be made to deceive. Do not load it; "
                "get it again from its source.",
            )
        opened.seek(0)
        whole = torch.load(opened, weights_only=False, pickle_module=safe_unpickle, mmap=False)
        safe_unpickle.check_nesting(whole)
        value = safe_unpickle.opened(whole)
    return _checked(Loaded(file, value, {"needs code": f"{', '.join(_wanted(file))} (not loaded)"}))


def read(file: File, *, trust: bool = False) -> Loaded:
    """Read all of a file to the CPU.

    A pickle may run the code that it names only with `trust`. Raises the same errors as `outline`,
    UsageError for a program of torch.export without `trust`, and HarnessError if memory is short.
    """
    if file.kind == formats.EXPORTED and not trust:
        raise UsageError(
            f"{file.where} is a program of torch.export, "
            "and PyTorch's own loader runs pickles that may be in it",
            remedy="If you trust whoever wrote it: --trust (trust=True). "
            "harness show works without.",
        )
    with file.sealed() as memory:
        whole = dataclasses.replace(file, once=SingleRead(memory.open(), file.where))
        if not trust:
            outline(whole)  # refuses a file that claims more data than it holds
        with _reader_errors(whole, trust=trust), muted():
            return _loaded(dataclasses.replace(file, once=None), memory, trust=trust)


def _loaded(file: File, memory: SealedMemory, *, trust: bool) -> Loaded:
    """Load a file whose bytes are all in memory."""
    if file.kind == formats.SAFETENSORS:
        return Loaded(file, *load_safetensors(memory.path))
    if file.kind == formats.TORCH and load.is_plain_zip(memory):
        # The tensors are views of `memory`.
        return Loaded(
            file, torch.load(memory.path, mmap=True, map_location="cpu", weights_only=not trust)
        )
    with memory.open() as plain:
        if file.kind == formats.TORCHSCRIPT:
            return _script(file, plain, with_data=True)
        if file.kind == formats.EXPORTED:
            return Loaded(file, dict(torch.export.load(plain).state_dict))
        return Loaded(
            file, torch.load(plain, map_location="cpu", weights_only=not trust, mmap=False)
        )


@contextlib.contextmanager
def _reader_errors(
    file: File, opened: BinaryIO | None = None, *, trust: bool = False
) -> Iterator[None]:
    """Convert the exceptions of a reader that cannot read the file into a HarnessError."""
    try:
        yield
    except HarnessError:
        raise
    except Exception as error:
        if failure := getattr(getattr(opened, "raw", None), "failure", None):
            raise failure from error
        if trust:
            raise UsageError(
                f"{file.where} cannot be loaded",
                f"found: {first_line(error)}",
                "The code that it names must be there: start where it lies.",
            ) from error
        if not isinstance(error, UNREADABLE) and "safetensor" not in type(error).__name__.lower():
            raise
        if "not enough memory" in str(error):  # torch's message; the file is intact
            raise HarnessError(
                f"there is not enough memory to load {file.where}", first_line(error)
            ) from error
        if wanted := _wanted(file):
            raise WantsCodeError(
                f"{file.where} wants to run code when it is loaded",
                f"found: {', '.join(wanted[:8])}{' …' if len(wanted) > 8 else ''}",
                "If you trust whoever wrote it: `harness export FILE OUT --trust` makes a harmless "
                "file of it; import takes --trust too.",
            ) from None
        raise DamagedError(f"{file.where} is damaged, or cut short: {load.reason(error)}") from None


def _wanted(file: File) -> list[str]:
    """Return the classes and functions that a pickle names and that are not known to be safe.

    The list is empty if the pickle cannot be scanned.
    """
    if file.kind not in (formats.TORCH, formats.LEGACY):
        return []
    with file.view() as opened:
        try:
            return safe_unpickle.wanted(opened, is_zip=file.kind == formats.TORCH)
        except UNREADABLE:
            return []


def _checked(loaded: Loaded) -> Loaded:
    """Return the argument if the tensors are not larger than the file that claims to hold them.

    Raises:
        DamagedError: The tensors' storages exceed the file's size, or their views exceed it far.
    """
    held = (tensor for _, tensor in formats.tensors(loaded.value))
    formats.check_claims(held, loaded.file.where, loaded.file.size_bytes)
    return loaded
