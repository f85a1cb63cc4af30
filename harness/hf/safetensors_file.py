"""Read and write a safetensors file. Its header alone shows what is in it."""

from __future__ import annotations

import json
import mmap
import struct
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from harness.errors import DamagedError, UsageError
from harness.text import size

# The maps of files that tensors are views of, by address.
_maps = weakref.WeakValueDictionary[int, mmap.mmap]()
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


def mapped_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file, as views of the file: what is used is read.

    What was read of it stays in memory until `let_go`.

    Raises the same errors as `safetensors_outline`.
    """
    size_bytes = path.stat().st_size
    with path.open("rb") as opened:
        shapes, _ = safetensors_outline(str(path), size_bytes, opened)
        opened.seek(0)
        (length,) = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(length))
        memory = mmap.mmap(opened.fileno(), size_bytes, access=mmap.ACCESS_COPY)
    held = torch.frombuffer(memory, dtype=torch.uint8)
    _maps[held.data_ptr()] = memory
    begin = {name: header[name]["data_offsets"][0] + 8 + length for name in shapes}
    tensors = {}
    for name, meta in shapes.items():
        data = held[begin[name] : begin[name] + meta.nbytes]
        if data.storage_offset() % meta.itemsize:
            data = data.clone()
        tensors[name] = data.view(meta.dtype).view(meta.shape)
    return tensors


def read_alone(part: torch.Tensor) -> None:
    """Read a contiguous part of a tensor of a mapped file ahead, and nothing that lies beside it.

    The kernel would read megabytes around each page. Nothing is done for any other tensor.
    """
    storage = part.untyped_storage()
    if (memory := _maps.get(storage.data_ptr())) is not None and part.nbytes:
        memory.madvise(mmap.MADV_RANDOM)
        if part.is_contiguous():
            begin = part.data_ptr() - storage.data_ptr()
            page = begin // mmap.PAGESIZE * mmap.PAGESIZE
            memory.madvise(mmap.MADV_WILLNEED, page, begin + part.nbytes - page)


def let_go(tensor: torch.Tensor) -> None:
    """Let go of the memory that holds what was read of a mapped file through one of its tensors.

    It would be read again. Nothing is done for any other tensor.
    """
    if (memory := _maps.get(tensor.untyped_storage().data_ptr())) is not None:
        memory.madvise(mmap.MADV_DONTNEED)


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
