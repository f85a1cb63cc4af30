"""What the headers of formats tell that are not torch's own: names, types and shapes, without the data."""

from __future__ import annotations

import json
import struct
import zipfile
from typing import Any, BinaryIO

import torch

from harness.errors import DamagedError
from harness.text import size

HEADER_BYTES = 100 << 20  # of a safetensors file, at most, as in its specification


def safetensors(where: str, size_bytes: int, opened: BinaryIO) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors without data, and the metadata, from the header: 8 bytes that tell its length, and JSON.

    Source: https://huggingface.co/docs/safetensors/index#format
    """
    (length,) = struct.unpack("<Q", opened.read(8))
    if length > min(HEADER_BYTES, size_bytes - 8):
        raise DamagedError(f"{where} is damaged: its header claims {size(length)}", f"found: a file of {size(size_bytes)}")
    header = json.loads(opened.read(length))
    metadata = {str(name): str(value) for name, value in header.pop("__metadata__", {}).items()}
    found: dict[str, torch.Tensor] = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        dtype = SAFETENSORS_DTYPES[entry["dtype"]]
        tensor = torch.empty(entry["shape"], dtype=dtype, device="meta")
        if not 0 <= start <= end <= size_bytes - 8 - length or tensor.numel() * tensor.element_size() != end - start:
            raise DamagedError(f"{where} is damaged, or cut short: {name} does not lie in it as its header says")
        found[name] = tensor
    return found, metadata


SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
}  # fmt: skip
EXPORT_DTYPES = {
    1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64, 6: torch.float16, 7: torch.float32, 8: torch.float64,
    10: torch.complex64, 11: torch.complex128, 12: torch.bool, 13: torch.bfloat16,
}  # fmt: skip


def exported(archive: zipfile.ZipFile) -> dict[str, torch.Tensor]:
    """The weights of a program of torch.export, without data; {} for one of an older layout.

    Source: `ScalarType` and `PayloadConfig` in torch/_export/serde/schema.py.
    """
    found: dict[str, torch.Tensor] = {}
    for name in archive.namelist():
        if name.endswith("data/weights/model_weights_config.json"):
            config: dict[str, Any] = json.loads(archive.read(name))["config"]
            for weight, entry in config.items():
                shape = [number["as_int"] for number in entry["tensor_meta"]["sizes"]]
                found[weight] = torch.empty(shape, dtype=EXPORT_DTYPES[entry["tensor_meta"]["dtype"]], device="meta")
    return found
