"""Read and write the weights in a folder as Hugging Face lays it out.

They are in one file, or in several that an index names.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from harness.errors import DamagedError
from harness.hf.safetensors_file import mapped_safetensors, save_safetensors

HF_FILE, HF_INDEX = "model.safetensors", "model.safetensors.index.json"


def hf_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder as Hugging Face lays it out; [] if it is none.

    Raises:
        DamagedError: The index is not valid, or names a file that is not there.
    """
    return _files(folder, _weight_map(folder))


def _files(folder: Path, of_index: Mapping[str, str]) -> list[Path]:
    return sorted({folder / name for name in of_index.values()})


def _weight_map(folder: Path) -> dict[str, str]:
    """Return the file of each tensor by its name; {"": HF_FILE} if one file holds all.

    Source: https://huggingface.co/docs/huggingface_hub/package_reference/serialization

    Raises:
        DamagedError: As `hf_files`.
    """
    index = folder / HF_INDEX
    if os.path.isfile(folder / HF_FILE):  # comes first in transformers, too
        return {"": HF_FILE}
    if not os.path.isfile(index):
        return {}
    try:
        found = dict(json.loads(index.read_bytes())["weight_map"])
        strange = [name for name in found.values() if name != os.path.basename(name)]
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError, OSError) as error:
        raise DamagedError(f"{index} is no index", f"found: {error}") from None
    lacking = strange or [name for name in found.values() if not (folder / name).is_file()]
    if lacking:
        raise DamagedError(f"{index} names {len(lacking)} file(s) that are not there: {lacking[0]}")
    return found


def mapped(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a folder by name, as views of its files; see `mapped_safetensors`.

    One file may be given in place of a folder.

    Raises:
        DamagedError: As `hf_files`; or a file lacks a tensor that the index places there.
    """
    if folder.is_file():
        return mapped_safetensors(folder)
    of_index = _weight_map(folder)
    files = {file.name: mapped_safetensors(file) for file in _files(folder, of_index)}
    if of_index.keys() == {""}:
        return files[HF_FILE]
    if lacking := [key for key, name in of_index.items() if key not in files[name]]:
        raise DamagedError(
            f"{folder / HF_INDEX} places {lacking[0]} in {of_index[lacking[0]]}, which lacks it"
        )
    return {key: files[name][key] for key, name in of_index.items()}


def save_hf(
    folder: Path, state: Mapping[str, Any], metadata: dict[str, str], most_bytes: int
) -> dict[str, dict[str, torch.Tensor]]:
    """Write a state dict into a folder as Hugging Face lays it out.

    Args:
        folder: The folder, which is there and empty.
        state: The state dict.
        metadata: Facts for the header of each file.
        most_bytes: Size of the tensors in one file; a single tensor may be larger.

    Returns:
        The tensors of each file as they were written, by its name.

    Raises:
        UsageError, OSError: As `save_safetensors`.
    """
    groups, held_bytes = list[dict[str, Any]]([{}]), 0
    for key, item in state.items():
        size_bytes = getattr(item, "nbytes", 0)
        if held_bytes and held_bytes + size_bytes > most_bytes:
            groups.append({})
            held_bytes = 0
        groups[-1][key] = item
        held_bytes += size_bytes
    count = len(groups)
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    written = {
        name: save_safetensors(folder / name, group, metadata)
        for name, group in zip(names if count > 1 else [HF_FILE], groups, strict=True)
    }
    for name in written:  # safetensors makes files that their owner alone can read
        (folder / name).chmod(folder.stat().st_mode & 0o666)
    if count > 1:
        total = sum(item.nbytes for group in written.values() for item in group.values())
        files = {key: name for name, group in written.items() for key in group}
        index = {"metadata": {"total_size": total}, "weight_map": files}
        (folder / HF_INDEX).write_text(json.dumps(index, indent=2))
    for path in (*folder.iterdir(), folder):
        _make_durable(path)
    return written


def _make_durable(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
