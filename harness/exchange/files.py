"""Read any file that holds a model, whoever wrote it; nothing that is in it is executed.

What a file is, its first bytes tell, not its name: torch.save's format, its format before PyTorch 1.6, safetensors, TorchScript, or a
program of torch.export. Its outline, every tensor without its data, is read first: it shows what nobody should try to load.
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

from harness.checkpoint import load
from harness.checkpoint.format import Manifest
from harness.checkpoint.load import UNPARSEABLE, first_line
from harness.errors import DamagedError, HarnessError, UsageError
from harness.exchange import headers, safe_unpickle
from harness.exchange.single_read import SingleRead
from harness.monitoring.console import ProgressBar
from harness.store import SealedMemory, Store, check_url, is_url, open_store, redacted
from harness.supervision import run_address
from harness.supervision.run_address import WAIT_S
from harness.text import muted, size

TORCH, LEGACY, SAFETENSORS, TORCHSCRIPT, EXPORTED = "torch.save", "torch.save, before 1.6", "safetensors", "TorchScript", "torch.export"
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
SLACK_BYTES = 64 << 20  # what a file's parts may be larger than the file
UNREADABLE = (*UNPARSEABLE, ArithmeticError, AssertionError, MemoryError)
STRANGERS = (
    (b"version https://git-lfs", "a pointer of Git LFS: the file itself was not fetched (git lfs pull)"),
    (b"<", "a web page, or XML: the download went wrong"),
    (b"\x89HDF", "an HDF5 file, of Keras perhaps"),
    (b"GGUF", "a GGUF file"),
    (b"\x1f\x8b", "compressed by gzip: unpack it first"),
    (b"\x80", "a plain pickle, not of torch.save"),
)


class WantsCodeError(UsageError):
    """A pickle names classes or functions that are not known to be harmless."""


@dataclass(frozen=True)
class File:
    """One file in a store, and what kind it is."""

    store: Store
    key: str
    kind: str
    size_bytes: int
    once: SingleRead | None = field(default=None, compare=False, repr=False)  # its bytes, as far as they have been read

    @property
    def where(self) -> str:
        return self.store.where(self.key)


@dataclass(frozen=True)
class Loaded:
    """What is in a file: for most kinds a nested structure; `metadata` is what safetensors keeps beside the tensors, `manifest` belongs
    to a checkpoint of a run."""

    file: File
    value: Any
    metadata: Mapping[str, str] = field(default_factory=dict)
    manifest: Manifest | None = None


def find(path: str | Path) -> File:
    """The file at a path or URL. Raises UsageError for what is none or holds no model, DamagedError for what is cut short."""
    text = str(path)
    if not is_url(text):
        text = str(_there(Path(text)).resolve())  # a link may lead to it
    folder, _, key = text.rpartition("/")
    store = open_store(folder or "/", WAIT_S)
    try:
        once = SingleRead(store.open(key), store.where(key))
        return dataclasses.replace(_identified(store, key, once.view()), once=once)
    except FileNotFoundError:
        raise UsageError(f"there is no file {text}", remedy="Give a path or a URL.") from None


def _there(path: Path) -> Path:
    name = str(path)[:200]
    try:
        if path.is_file():
            return path
        what = f"{name} is a directory, and no run" if path.is_dir() else f"there is no file {name}"
    except OSError as error:  # a folder on the way that may not be looked into, or no path at all
        what = f"{name} cannot be looked at: {error.strerror}"
    raise UsageError(what, f"found: from {Path.cwd()}", "Give a run, one of its checkpoints, or a file: a path or a URL.")


def _identified(store: Store, key: str, file: BinaryIO) -> File:
    size_bytes, where = file.seek(0, os.SEEK_END), store.where(key)
    file.seek(0)
    head = file.read(512)
    if not head:
        raise DamagedError(f"{where} is empty")
    if head.startswith(b"PK\x03\x04"):
        return _identified_zip(store, key, file, size_bytes)
    if head.startswith(LEGACY_MAGIC):
        return File(store, key, LEGACY, size_bytes)
    if head[8:9] == b"{" and len(head) > 8:
        return File(store, key, SAFETENSORS, size_bytes)
    what = next((what for start, what in STRANGERS if head.startswith(start)), f"found: it begins with {head[:16]!r}")
    if head[257:262] == b"ustar":
        what = "an archive of tar, or a file of PyTorch 0.1, which nothing but running its pickle can read"
    raise UsageError(f"{where} holds no model: {what}", remedy="Expected: a file of torch.save, safetensors, TorchScript or torch.export.")


def _identified_zip(store: Store, key: str, file: BinaryIO, size_bytes: int) -> File:
    where = store.where(key)
    try:
        records = zipfile.ZipFile(file).infolist()
    except (zipfile.BadZipFile, *UNREADABLE) as error:
        raise DamagedError(f"{where} is damaged or cut short: {first_line(error)}", f"found: {size(size_bytes)}") from None
    total = sum(record.file_size for record in records)
    if total > 4 * size_bytes + SLACK_BYTES:
        raise UsageError(f"{where} would unpack to {size(total)}", f"found: a file of {size(size_bytes)}", "No checkpoint is like that.")
    names = [record.filename for record in records]
    ends = {name.rpartition("/")[2] for name in names}
    kind = TORCHSCRIPT if {"data.pkl", "constants.pkl"} <= ends else TORCH if "data.pkl" in ends else EXPORTED
    if kind == EXPORTED and "archive_format" not in ends:
        raise UsageError(f"{where} holds no model", f"found: a zip file with {', '.join(names[:3])}", "Expected: a file of torch.save.")
    return File(store, key, kind, size_bytes)


def read_any(path: str | Path, which: str | int = run_address.NEWEST, *, trust: bool = False) -> Loaded:
    """All that is in a checkpoint of a run, verified, or in any other file. Raises UsageError, DamagedError, StorageError."""
    if not is_ours(str(path)):
        if which != run_address.NEWEST:
            raise UsageError(f"{path} is one file: there is nothing to choose from", f"found: {which}", "Name a run to choose from it.")
        return read(find(path), trust=trust)
    store, manifest = run_address.checkpoint(str(path), which)
    bar = ProgressBar(f"reading {manifest.name} from {store}", manifest.size_bytes)
    payload = load.load(store, manifest, bar)
    bar.end()
    return Loaded(_file_of(store, manifest), payload, manifest=manifest)


def outline_any(path: str | Path, which: str | int = run_address.NEWEST) -> Loaded:
    """What is in a checkpoint of a run, or in any other file, without the tensors' data. Raises as `read_any` does, but for a pickle
    that wants to run code: then there are words where its objects would be."""
    if not is_ours(str(path)):
        file = find(path)
        try:
            return outline(file)
        except WantsCodeError:
            return _inert(file)
    store, manifest = run_address.checkpoint(str(path), which)
    file = _file_of(store, manifest)
    return Loaded(file, outline(_once(file)).value, manifest=manifest)


def is_ours(path: str) -> bool:
    """Whether a path or URL means a run or one of its checkpoints; in a bucket a file may be called anything."""
    if is_url(path) and (problem := check_url(path)):
        raise UsageError(f"{redacted(path)} is not a place for a file", f"expected: {problem}")
    if not run_address.is_run(path):
        return run_address.is_checkpoint(path)
    folder, _, key = path.rstrip("/").rpartition("/")
    return not is_url(path) or folder.endswith(("/", ":")) or not open_store(folder, WAIT_S).exists(key)


def _file_of(store: Store, manifest: Manifest) -> File:
    return File(store, manifest.data_key, TORCH, manifest.size_bytes)


def outline(file: File) -> Loaded:
    """What is in a file, with tensors of the right type and shape whose data is not read. Raises UsageError, DamagedError, StorageError."""
    with _opened(file) as opened, _said(file, opened):
        if file.kind == SAFETENSORS:
            return Loaded(file, *headers.safetensors(file.where, file.size_bytes, opened))
        if file.kind == TORCHSCRIPT:
            return _checked(_script(file, opened, with_data=False))
        if file.kind == EXPORTED:
            return Loaded(file, headers.exported(zipfile.ZipFile(opened)))
        value = _without_data(opened)
        safe_unpickle.check_nesting(value)
        return _checked(Loaded(file, value))


def _opened(file: File) -> BinaryIO:
    once = _once(file).once
    assert once is not None, "it has just been opened"
    return once.view()


def _once(file: File) -> File:
    """The same, opened."""
    if file.once is not None:
        return file
    try:
        return dataclasses.replace(file, once=SingleRead(file.store.open(file.key), file.where))
    except FileNotFoundError:
        raise DamagedError(
            f"{file.where} is missing", remedy="Somebody has deleted it. harness verify says what else is damaged."
        ) from None


def _script(file: File, opened: BinaryIO, *, with_data: bool) -> Loaded:
    with muted():
        value, is_training = safe_unpickle.torchscript(zipfile.ZipFile(opened), with_data=with_data)
    return Loaded(file, value, {"mode": "training: call eval() before using it" if is_training else "eval"})


def _inert(file: File) -> Loaded:
    """What is in a pickle that wants to run code, which it does not get."""
    with _opened(file) as opened, _said(file, opened), muted(), FakeTensorMode():
        if file.kind == TORCH and "constants.pkl" in torch._C.PyTorchFileReader(opened).get_all_records():
            raise DamagedError(f"{file.where} is TorchScript to one reader and not to another", remedy="Do not load it.")
        opened.seek(0)
        whole = torch.load(opened, weights_only=False, pickle_module=safe_unpickle)
        safe_unpickle.check_nesting(whole)
        value = safe_unpickle.opened(whole)
    return _checked(Loaded(file, value, {"needs code": f"{', '.join(_wanted(file))} (not loaded)"}))


def _without_data(opened: BinaryIO) -> Any:
    with muted():
        try:
            with FakeTensorMode():
                return torch.load(opened, weights_only=True)
        except NotImplementedError:  # quantized and some sparse tensors are never without data
            opened.seek(0)
            return torch.load(opened, map_location="cpu", weights_only=True)


def read(file: File, *, trust: bool = False) -> Loaded:
    """All that is in a file, on the CPU. Only with `trust` may a pickle run the code that it names. Raises as `outline` does."""
    if file.kind == EXPORTED and not trust:
        raise UsageError(
            f"{file.where} is a program of torch.export, and PyTorch's own loader runs pickles that may be in it",
            remedy="If you trust whoever wrote it: --trust (trust=True). harness show works without.",
        )
    with _sealed(file) as memory:
        whole = dataclasses.replace(file, once=SingleRead(memory.open(), file.where))
        if not trust:
            outline(whole)  # what claims more than it holds is not tried
        with _said(whole, trust=trust), muted():
            return _loaded(dataclasses.replace(file, once=None), memory, trust=trust)


def _loaded(file: File, memory: SealedMemory, *, trust: bool) -> Loaded:
    """What is in a file whose bytes are all in memory."""
    if file.kind == SAFETENSORS:
        from safetensors import safe_open

        with safe_open(memory.path, "pt") as opened:
            return Loaded(file, {name: opened.get_tensor(name) for name in opened.keys()}, dict(opened.metadata() or {}))  # noqa: SIM118
    if file.kind == TORCH and load.is_plain_zip(memory):  # its tensors are views of that memory
        return Loaded(file, torch.load(memory.path, mmap=True, map_location="cpu", weights_only=not trust))
    with memory.open() as plain:
        if file.kind == TORCHSCRIPT:
            return _script(file, plain, with_data=True)
        if file.kind == EXPORTED:
            return Loaded(file, dict(torch.export.load(plain).state_dict))
        return Loaded(file, torch.load(plain, map_location="cpu", weights_only=not trust))


def _sealed(file: File) -> SealedMemory:
    """The whole file, in memory that nobody can change: what was looked at is what is loaded."""
    once = _once(file).once
    assert once is not None, "it has just been opened"
    bar = ProgressBar(f"reading {file.where}", file.size_bytes)
    try:
        return once.sealed(bar)
    finally:
        bar.end()


@contextlib.contextmanager
def _said(file: File, opened: BinaryIO | None = None, *, trust: bool = False) -> Iterator[None]:
    """Turn what a reader raises for a file that it cannot read into words."""
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
        if "not enough memory" in str(error):  # torch's own words; the file is whole
            raise HarnessError(f"there is not enough memory to load {file.where}", first_line(error)) from error
        if wanted := _wanted(file):
            raise WantsCodeError(
                f"{file.where} wants to run code when it is loaded",
                f"found: {', '.join(wanted[:8])}{' …' if len(wanted) > 8 else ''}",
                "If you trust whoever wrote it: `harness export FILE OUT --trust` makes a harmless file of it; import takes --trust too.",
            ) from None
        raise DamagedError(f"{file.where} is damaged, or cut short: {load.reason(error)}") from None


def _wanted(file: File) -> list[str]:
    """The classes and functions that a pickle names beyond those that are safe."""
    if file.kind not in (TORCH, LEGACY):
        return []
    with _opened(file) as opened:
        try:
            return safe_unpickle.wanted(opened, is_zip=file.kind == TORCH)
        except UNREADABLE:
            return []


def _checked(loaded: Loaded) -> Loaded:
    """The same. Raises DamagedError for tensors that are larger than the file that claims to hold them."""
    file = loaded.file
    storages: dict[int, int] = {}
    shown_bytes = 0
    for _, tensor in tensors(loaded.value):
        if tensor.layout is torch.strided:
            storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            shown_bytes += tensor.numel() * tensor.element_size()
    held_bytes = sum(storages.values())
    if held_bytes > file.size_bytes or shown_bytes > 16 * file.size_bytes + SLACK_BYTES:
        claimed = size(max(held_bytes, shown_bytes))
        raise DamagedError(f"{file.where} is damaged, or cut short: it claims tensors of {claimed}", f"found: {size(file.size_bytes)}")
    return loaded


def tensors(value: Any, where: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor in a nested structure, with the path that leads to it."""
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
