"""Handle the file formats of models: detect them, read their headers, load and write them.

The first bytes of a file determine its format, not its name: torch.save's format, its format before
PyTorch 1.6, safetensors, TorchScript, or a program of torch.export. An outline holds a file's
tensors with their names, dtypes and shapes, without their data.
"""

from __future__ import annotations

import json
import os
import struct
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from harness.checkpoint.load import UNPARSEABLE, first_line
from harness.errors import DamagedError, UsageError
from harness.text import size

TORCH = "torch.save"
LEGACY = "torch.save, before 1.6"
SAFETENSORS = "safetensors"
TORCHSCRIPT = "TorchScript"
EXPORTED = "torch.export"
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
HEADER_BYTES = 100 << 20  # largest safetensors header that its specification allows
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
}
EXPORT_DTYPES = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    10: torch.complex64,
    11: torch.complex128,
    12: torch.bool,
    13: torch.bfloat16,
}


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


def safetensors_outline(
    where: str, size_bytes: int, opened: BinaryIO
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read the header of a safetensors file: 8 bytes with its length, then JSON.

    Source: https://huggingface.co/docs/safetensors/index#format

    Args:
        where: Name of the file in error messages.
        size_bytes: Size of the whole file.
        opened: The file, at its beginning.

    Returns:
        Meta tensors by name, and the file's metadata.

    Raises:
        DamagedError: The header claims more bytes than the file has, or a tensor's range does not
            match its dtype and shape. Other malformed headers raise errors such as KeyError or
            struct.error, which the caller converts.
    """
    (length,) = struct.unpack("<Q", opened.read(8))
    if length > min(HEADER_BYTES, size_bytes - 8):
        raise DamagedError(
            f"{where} is damaged: its header claims {size(length)}",
            f"found: a file of {size(size_bytes)}",
        )
    header = json.loads(opened.read(length))
    metadata = {str(name): str(value) for name, value in header.pop("__metadata__", {}).items()}
    tensors: dict[str, torch.Tensor] = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        dtype = SAFETENSORS_DTYPES[entry["dtype"]]
        tensor = torch.empty(entry["shape"], dtype=dtype, device="meta")
        if (
            not 0 <= start <= end <= size_bytes - 8 - length
            or tensor.numel() * tensor.element_size() != end - start
        ):
            raise DamagedError(
                f"{where} is damaged, or cut short: {name} does not lie in it as its header says"
            )
        tensors[name] = tensor
    return tensors, metadata


def load_safetensors(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors of a safetensors file by name, and the file's metadata."""
    from safetensors import safe_open

    with safe_open(path, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        return tensors, dict(opened.metadata() or {})


def save_safetensors(
    path: Path, state: Mapping[str, Any], metadata: dict[str, str]
) -> dict[str, torch.Tensor]:
    """Write a state dict as a safetensors file, and return the tensors as they were written.

    Raises:
        UsageError: The state dict holds something other than plain tensors.
        OSError: The file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    strange = [
        key
        for key, item in state.items()
        if not isinstance(item, torch.Tensor)
        or item.layout is not torch.strided
        or item.is_quantized
    ]
    if strange:
        raise UsageError(
            "safetensors holds plain tensors only",
            f"found: {', '.join(strange[:5])}",
            "Take --format weights.",
        )
    # safetensors refuses tensors that share memory, so tied tensors are written as copies.
    apart = {key: item.clone().contiguous() for key, item in state.items()}
    try:
        save_file(apart, path, metadata)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    return apart


def exported_outline(archive: zipfile.ZipFile) -> dict[str, torch.Tensor]:
    """Return the weights of a torch.export program as meta tensors; {} for an older file layout.

    Source: `ScalarType` and `PayloadConfig` in torch/_export/serde/schema.py.
    """
    weights: dict[str, torch.Tensor] = {}
    for name in archive.namelist():
        if name.endswith("data/weights/model_weights_config.json"):
            config: dict[str, Any] = json.loads(archive.read(name))["config"]
            for weight, entry in config.items():
                shape = [number["as_int"] for number in entry["tensor_meta"]["sizes"]]
                weights[weight] = torch.empty(
                    shape, dtype=EXPORT_DTYPES[entry["tensor_meta"]["dtype"]], device="meta"
                )
    return weights


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
