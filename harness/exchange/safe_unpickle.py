"""Inspect a pickle that names classes of its own, without loading any of them.

A stand-in replaces every class or function that is not known to be harmless. It does nothing and
keeps the data that it receives. The parameters of a pickled module can therefore be shown, and so
can the contents of a checkpoint that also holds somebody's options object. This works on any
machine and runs no code of the file.
"""

from __future__ import annotations

import collections
import functools
import io
import json
import pickle
import pickletools
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from harness.text import muted

# These functions only make tensors and parameters from their arguments. Inspection needs no other
# functions of `torch._utils`.
REBUILD = (
    "_rebuild_tensor",
    "_rebuild_tensor_v2",
    "_rebuild_parameter",
    "_rebuild_parameter_with_state",
)
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


class StandIn:
    """Stands in for an object whose class is not loaded; `state` holds the object's data."""

    called = "an object"

    def __init__(self, *given: Any, **named: Any) -> None:
        self.state: Any = named or (list(given) if given else {})

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        if isinstance(self.state, dict):
            self.state[key] = value

    def append(self, value: Any) -> None:
        """Discard the value."""

    def extend(self, values: Any) -> None:
        """Discard the values."""


class NotLoaded(str):
    """A text in place of an object that was not loaded."""


def _stand_in(name: str) -> type[StandIn]:
    return type(name.rpartition(".")[2], (StandIn,), {"called": name})


class Unpickler(pickle.Unpickler):
    """The `pickle_module.Unpickler` of this module for `torch.load`; it loads no unsafe class."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a harmless constructor or dtype of that name, else a new stand-in class."""
        # A `partial` keeps the pickle from reaching the class or function that it wraps.
        if (module, name) == ("collections", "OrderedDict"):
            return functools.partial(collections.OrderedDict)
        if module == "torch._utils" and name in REBUILD:
            return functools.partial(getattr(torch._utils, name))
        if module == "torch" and (
            name in ("Size", "device") or isinstance(vars(torch).get(name), torch.dtype)
        ):
            obj = vars(torch)[name]  # `getattr` could trigger a lazy import of torch
            return obj if isinstance(obj, torch.dtype) else functools.partial(obj)
        return _stand_in(f"{module}.{name}")


class ScriptUnpickler(Unpickler):
    """Reads the main pickle of a TorchScript file, with its tensors' data only if `with_data`."""

    def __init__(self, archive: zipfile.ZipFile, main: str, *, with_data: bool) -> None:
        super().__init__(io.BytesIO(archive.read(main)))
        self._archive = archive
        self._folder = f"{main.removesuffix('data.pkl')}data"
        self._with_data = with_data

    def persistent_load(self, saved: Any) -> Any:
        """Return the storage that a persistent id names; a meta storage without `with_data`."""
        kind, number, count = saved[1], saved[2], saved[4]
        dtype = torch.storage._storage_type_to_dtype_map()[kind.called.rpartition(".")[2]]
        size_bytes = count * dtype.itemsize
        if self._with_data:
            raw = bytearray(self._archive.read(f"{self._folder}/{number}"))
            if len(raw) < size_bytes:
                raise EOFError(f"{len(raw)} bytes of {size_bytes}")
            storage = (
                torch.frombuffer(raw, dtype=torch.uint8).untyped_storage()
                if raw
                else torch.UntypedStorage(0)  # type: ignore[no-untyped-call]
            )
        else:
            storage = torch.UntypedStorage(  # type: ignore[no-untyped-call]
                size_bytes,
                device="meta",
            )
        return torch.storage.TypedStorage(  # type: ignore[no-untyped-call]
            wrap_storage=storage,
            dtype=dtype,
            _internal=True,
        )


def torchscript(
    archive: zipfile.ZipFile, *, with_data: bool
) -> tuple[dict[str, torch.Tensor], bool]:
    """Return a TorchScript file's tensors by qualified name, and whether it is in training mode.

    `torch.jit.load` is not used because it would run the file's own code (`__setstate__`), which
    can write to the disk.
    """
    main = min(
        (name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"), key=len
    )
    root = ScriptUnpickler(archive, main, with_data=with_data).load()
    is_training = (
        isinstance(root, StandIn)
        and isinstance(root.state, dict)
        and bool(root.state.get("training"))
    )
    return collections.OrderedDict(_attributes(root)), is_training


def _attributes(
    module: Any, prefix: str = "", depth: int = 0
) -> Iterator[tuple[str, torch.Tensor]]:
    state = (
        module.state
        if isinstance(module, StandIn) and isinstance(module.state, dict) and depth < 100
        else {}
    )
    for name, item in state.items():
        if isinstance(item, torch.Tensor):
            yield f"{prefix}{name}", item
        else:
            yield from _attributes(item, f"{prefix}{name}.", depth + 1)


def wanted(opened: BinaryIO, *, is_zip: bool) -> list[str]:
    """Return the globals in a torch.save file's pickle that PyTorch does not consider safe."""
    return sorted(
        torch.serialization.get_unsafe_globals_in_checkpoint(opened if is_zip else _as_zip(opened))
    )


def _as_zip(opened: BinaryIO) -> BinaryIO:
    """Repack the main pickle of a legacy file, its fourth, as a zip file that torch can scan."""
    for _ in range(3):
        for _ in pickletools.genops(opened):
            pass
    start = opened.tell()
    for _ in pickletools.genops(opened):
        pass
    length = opened.tell() - start
    opened.seek(start)
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("old/data.pkl", opened.read(length))
        archive.writestr("old/version", "3\n")
    made.seek(0)
    return made


def load(file: Any, **options: Any) -> Any:
    """Load a pickle like `pickle.load`, with this module's `Unpickler`."""
    return Unpickler(file, **options).load()


def check_nesting(value: Any, most: int = 3_000_000, deepest: int = 200) -> None:
    """Raise ValueError for a structure that is too large or too deep to traverse.

    A small pickle may nest a list in another a thousand times over, or in itself.

    Args:
        value: The structure.
        most: Greatest number of items; an item that is reached twice counts twice.
        deepest: Greatest depth.
    """
    todo, seen = [(value, 0)], 0
    while todo:
        item, depth = todo.pop()
        seen += 1
        if seen > most or depth > deepest:
            raise ValueError("it is nested beyond reason")
        inner = item.state if isinstance(item, StandIn) else item
        if isinstance(inner, Mapping):
            todo += [(each, depth + 1) for each in inner.values()]
        elif isinstance(inner, list | tuple):
            todo += [(each, depth + 1) for each in inner]


def opened(value: Any) -> Any:
    """Replace the stand-in of each module by its state dict, and other stand-ins by a text.

    Tuples become lists.
    """
    if isinstance(value, StandIn):
        if isinstance(value.state, dict) and "_parameters" in value.state:
            return collections.OrderedDict(_parameters(value))
        return NotLoaded(f"{value.called}, not loaded")
    if isinstance(value, dict):
        made = {key: opened(item) for key, item in value.items()}
        return collections.OrderedDict(made) if isinstance(value, collections.OrderedDict) else made
    if isinstance(value, list | tuple):
        return [opened(item) for item in value]
    return value


def _parameters(
    module: StandIn, prefix: str = "", depth: int = 0
) -> Iterator[tuple[str, torch.Tensor]]:
    for kind in ("_parameters", "_buffers"):
        held = module.state.get(kind)
        for name, tensor in held.items() if isinstance(held, dict) else ():
            if isinstance(tensor, torch.Tensor):
                yield f"{prefix}{name}", tensor
    inner = module.state.get("_modules")
    for name, child in inner.items() if isinstance(inner, dict) and depth < 100 else ():
        if isinstance(child, StandIn) and isinstance(child.state, dict):
            yield from _parameters(child, f"{prefix}{name}.", depth + 1)


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


def without_data(opened: BinaryIO) -> Any:
    """Load a file of torch.save with fake tensors, as far as these can stand for its own."""
    with muted():
        try:
            with FakeTensorMode():
                return torch.load(opened, weights_only=True, mmap=False)
        except NotImplementedError:  # fake tensors cannot be quantized or have some sparse layouts
            opened.seek(0)
            return torch.load(opened, map_location="cpu", weights_only=True, mmap=False)
