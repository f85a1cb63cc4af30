"""Read and write the folders of torch.distributed.checkpoint (DCP), without running what they hold.

A folder has a file `.metadata`, a pickle that says where each piece of each tensor lies, and files
with the pieces, each of them a file of torch.save. PyTorch's own reader executes the pickle; here
it is read with stand-ins for the few classes that it may name.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import Any

import torch

from harness.distributed.layout import Box, uncovered
from harness.errors import DamagedError, UsageError
from harness.text import size

METADATA = ".metadata"
MOST_TIMES = 4  # a piece that would unpack to more than this times its size is refused
_MODULES = (
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.filesystem",
    "torch.distributed.checkpoint._storage_utils",
    "torch.distributed._shard.sharded_tensor.metadata",
)
_CLASSES = (
    "Metadata",
    "TensorStorageMetadata",
    "BytesStorageMetadata",
    "TensorProperties",
    "ChunkStorageMetadata",
    "MetadataIndex",
    "StorageMeta",
    "_MEM_FORMAT_ENCODING",
    "MEM_FORMAT_ENCODING",
    "_StorageInfo",
)
_IGNORED = {("torch.serialization", "_get_layout")} | {
    (module, name)
    for module in ("pathlib", "pathlib._local")
    for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
}


class _Node(dict[Any, Any]):
    """A dict of the nested state, as the metadata tells; what a piece holds is none."""


class _Record:
    """Stands for an object of a class of DCP, with its attributes."""

    def __init__(self, *ignored: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"values": state})


class _Reader(pickle.Unpickler):
    """An unpickler that makes no object but stand-ins and plain values."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a class. Raises DamagedError for one that DCP does not write."""
        if (module, name) == ("torch", "Size"):
            return tuple
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if (module, name) in _IGNORED or (module in _MODULES and name in _CLASSES):
            return _Record
        raise DamagedError(
            f"a {METADATA} of DCP names {module}.{name}",
            "expected: classes of torch.distributed.checkpoint alone",
            "Do not load it: it may be made to run code.",
        )


def dcp_files(folder: Path) -> list[Path]:
    """Return the files of a folder of DCP, the metadata first; [] if it is none."""
    if not os.path.isfile(folder / METADATA):
        return []
    return [folder / METADATA, *sorted(folder.glob("*.distcp"))]


def read_dcp(folder: Path, *, with_data: bool = True) -> tuple[dict[str, Any], dict[str, str]]:
    """Read a folder of DCP; return its nested state, and a fact about values that need code.

    Each tensor is made whole from its pieces. State of an optimizer in DCP's flat form gets the
    usual one, with parameters by name.

    Args:
        folder: The folder.
        with_data: False: tensors are meta tensors.

    Raises:
        DamagedError: The metadata or a piece is not valid, or pieces are missing.
        UsageError: The pieces are stored in a way that is not supported (compressed).
    """
    known, left_out, state = _metadata(folder), list[str](), _Node()
    _check_claims(folder, known)
    pieces = dict[str, list[tuple[Any, Any]]]()
    for index, info in known.storage_data.items():
        pieces.setdefault(index.fqn, []).append((index, info))
    for name, described in known.state_dict_metadata.items():
        held = pieces.get(name, [])
        if hasattr(described, "chunks"):
            value = _tensor(folder, name, described, held, with_data=with_data)
        else:
            try:
                value = _value(folder, name, held)
            except pickle.UnpicklingError as error:
                if "lobal" not in str(error):  # it names none that is not allowed
                    raise DamagedError(f"{folder}: {name} is damaged") from None
                left_out.append(name)
                continue
        _put(state, (known.planner_data or {}).get(name, (name,)), value)
    facts = {"needs code": f"{', '.join(left_out)} (not loaded)"} if left_out else {}
    usual, numbered = _usual(_as_lists(state))
    if numbered:
        told = f"{', '.join(numbered)}: the order of its numbered parameters is not known"
        facts["left out"] = told
    return usual, facts


def _metadata(folder: Path) -> Any:
    path = folder / METADATA
    try:
        content = path.read_bytes()
        if any(
            isinstance(argument, int) and code.name.endswith("PUT") and argument > len(content)
            for code, argument, _ in pickletools.genops(content)
        ):
            raise ValueError("it numbers more objects than it can hold")
        known = _Reader(io.BytesIO(content)).load()
        for part in (known.state_dict_metadata, known.storage_data):
            if not isinstance(part, dict):
                raise TypeError(f"{type(part).__name__} in place of a dict")
        known.planner_data = getattr(known, "planner_data", None)
    except (DamagedError, OSError):
        raise
    except Exception as error:  # noqa: BLE001 - a pickle that is damaged may raise anything
        text = f"{type(error).__name__}: {error}"
        raise DamagedError(f"{path} is no metadata of DCP: {text}") from None
    return known


def _check_claims(folder: Path, known: Any) -> None:
    """Raise DamagedError if the tensors are larger than the files that should hold them."""
    held_bytes = sum(path.stat().st_size for path in dcp_files(folder))
    claimed_bytes = 0
    for name, described in known.state_dict_metadata.items():
        if not hasattr(described, "chunks"):
            continue
        of_chunks = [n for chunk in described.chunks for n in (*chunk.offsets, *chunk.sizes)]
        if not all(type(n) is int and n >= 0 for n in (*described.size, *of_chunks)):
            raise DamagedError(f"{folder / METADATA}: {name} has lengths that are none")
        claimed_bytes += math.prod(described.size) * _dtype(described).itemsize
    if claimed_bytes > held_bytes:
        raise DamagedError(
            f"{folder / METADATA} claims {size(claimed_bytes)} of tensors",
            f"found: {size(held_bytes)} in the folder",
        )


def _bytes(folder: Path, name: str, info: Any) -> bytes:
    """Return one stored piece.

    Raises:
        DamagedError: It lies outside of the folder, or is cut short.
        UsageError: It is compressed.
    """
    if getattr(info, "transform_descriptors", None):
        raise UsageError(
            f"{folder} holds compressed pieces, which are not read",
            f"found: {name}, {info.transform_descriptors}",
            "Save it without extensions of the writer.",
        )
    file = str(info.relative_path)
    path = folder / file
    if file != os.path.basename(file) or not path.is_file() or path.is_symlink():
        raise DamagedError(f"{folder / METADATA} places {name} in {file!r}, which is not there")
    if not all(isinstance(number, int) and number >= 0 for number in (info.offset, info.length)):
        raise DamagedError(f"{folder / METADATA} places {name} at no place in {file}")
    with path.open("rb") as opened:
        opened.seek(info.offset)
        content = opened.read(info.length)
    if len(content) != info.length:
        raise DamagedError(f"{path} is cut short: {name} ends beyond it")
    return content


def _loaded(folder: Path, name: str, info: Any) -> Any:
    content = _bytes(folder, name, info)
    try:
        records = zipfile.ZipFile(io.BytesIO(content))
        unpacked = sum(part.file_size for part in records.infolist())
        if unpacked > MOST_TIMES * len(content):
            raise ValueError(f"it would unpack to {size(unpacked)}")
        if (bad := records.testzip()) is not None:
            raise ValueError(f"the checksum of {bad} does not fit")
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # noqa: BLE001 - what is damaged may raise anything
        text = str(error).partition("\n")[0]
        raise DamagedError(f"{folder / str(info.relative_path)}: {name}: {text}") from None


def _value(folder: Path, name: str, held: list[tuple[Any, Any]]) -> Any:
    if len(held) != 1:
        raise DamagedError(f"{folder / METADATA} places {name} {len(held)} times, not once")
    return _loaded(folder, name, held[0][1])


def _tensor(
    folder: Path, name: str, described: Any, held: list[tuple[Any, Any]], *, with_data: bool
) -> torch.Tensor:
    """Return a whole tensor, made from its pieces.

    Args:
        folder: The folder.
        name: Name of the tensor.
        described: Its metadata.
        held: Where its pieces lie.
        with_data: False: return a meta tensor.
    """
    shape, dtype = tuple(described.size), _dtype(described)
    boxes = [Box(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in described.chunks]
    if problem := uncovered(boxes, shape):
        raise DamagedError(f"{folder / METADATA}: {name}: {problem}")
    if not with_data:
        return torch.empty(shape, dtype=dtype, device="meta")
    found = {tuple(index.offset or (0,) * len(shape)): info for index, info in held}
    whole = torch.empty(shape, dtype=dtype)
    for box in boxes:
        if not box.numel:
            continue
        if box.begin not in found:
            raise DamagedError(f"{folder / METADATA} lacks the piece of {name} at {box.begin}")
        piece = _loaded(folder, name, found[box.begin])
        if not isinstance(piece, torch.Tensor) or (piece.shape, piece.dtype) != (box.size, dtype):
            raise DamagedError(f"{folder}: the piece of {name} at {box.begin} is another one")
        whole[box.within(Box((0,) * len(shape), shape))].copy_(piece)
    return whole


def _dtype(described: Any) -> torch.dtype:
    properties = vars(described.properties)
    found = properties.get("dtype") or properties["values"][0]
    if not isinstance(found, torch.dtype):
        raise DamagedError("the metadata of DCP tells no dtype of a tensor")
    return found


def _put(state: _Node, path: Any, value: Any) -> None:
    is_path = isinstance(path, tuple) and path and all(type(key) in (str, int) for key in path)
    for key in path[:-1] if is_path else ():
        state = state.setdefault(key, _Node())
        is_path = is_path and isinstance(state, _Node)
        if not is_path:
            break
    if not is_path or path[-1] in state:
        raise DamagedError(f"the metadata of DCP places a value at no place: {path!r:.80}")
    state[path[-1]] = value


def _as_lists(value: Any) -> Any:
    """Return nested dicts with those that are keyed by 0, 1, 2 … as lists."""
    if not isinstance(value, _Node):
        return value
    if value and all(type(key) is int for key in value) and sorted(value) == [*range(len(value))]:
        return [_as_lists(value[number]) for number in range(len(value))]
    made = {key: _as_lists(item) for key, item in value.items()}
    if isinstance(made.get("param_groups"), list):  # a dict that is empty has no entry
        of_state = value.get("state", _Node())
        if isinstance(of_state, _Node):
            made["state"] = {key: _as_lists(item) for key, item in of_state.items()}
    return made


def _usual(state: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the state as scripts have it, and the names of optimizers that are left out.

    Optimizers get their usual form; a model at the top gets a name. Numbers of parameters are of
    no use here: DCP does not keep the order of a model's tensors.
    """
    if len(state) == 1 and any(isinstance(item, dict) for item in _items(state)):
        (state,) = state.values()  # of one object that holds all, as in DCP's tutorial
    made = {key: _unflattened(value) for key, value in state.items()}
    numbered = [key for key, value in made.items() if _is_numbered(value)]
    made = {key: value for key, value in made.items() if key not in numbered}
    named = {
        name
        for value in made.values()
        if isinstance(value, dict) and isinstance(value.get("param_groups"), list)
        for group in value["param_groups"]
        for name in group.get("params", ())
    }
    weights = {
        key: item
        for key, item in made.items()
        if isinstance(item, torch.Tensor) and ("." in key or key in named or item.dim())
    }
    nested = any(isinstance(item, dict) for item in made.values())
    if "model" in made or not nested or not any("." in key for key in weights):
        return made, numbered
    others = {key: item for key, item in made.items() if key not in weights}
    return {"model": weights} | others, numbered


def _items(state: dict[str, Any]) -> list[Any]:
    (value,) = state.values()
    return list(value.values()) if isinstance(value, dict) else []


def _is_numbered(value: Any) -> bool:
    """Return whether a value is the state of an optimizer whose parameters are numbers."""
    groups = value.get("param_groups") if isinstance(value, dict) else None
    return isinstance(groups, list) and any(
        not isinstance(name, str)
        for group in groups
        if isinstance(group, dict)
        for name in group.get("params") or ()
    )


def _unflattened(value: Any) -> Any:
    """Return an optimizer's state with groups, where it has an entry for each parameter's setting.

    Source: `flatten_optimizer_state_dict` of torch.distributed.checkpoint.state_dict.
    """
    flat = isinstance(value, dict) and all(isinstance(key, str) for key in value)
    if not (flat and value and all(k.startswith(("state.", "param_groups.")) for k in value)):
        return value
    state, settings = dict[str, dict[str, Any]](), dict[str, dict[str, Any]]()
    for key, item in value.items():
        kind, _, rest = key.partition(".")
        name, _, part = rest.rpartition(".")
        (state if kind == "state" else settings).setdefault(name, {})[part] = item
    groups = list[dict[str, Any]]()
    for name, own in settings.items():
        alike = (group for group in groups if {**group, "params": 0} == {**own, "params": 0})
        if (group := next(alike, None)) is None:
            groups.append(group := own | {"params": []})
        group["params"].append(name)
    return {"state": state, "param_groups": groups}
