"""Read a checkpoint file back in the process that wrote it, without torch.

The result is the digest of the file and a row for each item in it. The pickle in the file is parsed
with stand-ins: no class that it names is imported. A row is [path, kind, content]. The content of a
tensor is its dtype, shape, strides, storage offset, and the byte of the file at which its storage
begins.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import struct
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from blake3 import blake3

from harness.store.staging_buffer import DIRECT_FROM_BYTES

SLICE_BYTES, PIECE_BYTES = 16 << 20, 1 << 20  # how much is read per request, and per system call
# The local header of a record in a zip file; it ends with the lengths of name and extra field.
LOCAL_HEADER = struct.Struct("<26x2H")
MOST_ROWS = 200_000
MOST_TEXT = 80
DTYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexDoubleStorage": "complex128",
    "ComplexFloatStorage": "complex64",
}

Row = list[Any]
OfTensor = Callable[[Any], Any]  # returns the content of a tensor's row; None for anything else


class Reading:
    """A file that is read slice by slice."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - open until the last slice
        self._digest = blake3()
        # A large file is written around the page cache, and reading must not fill the cache either.
        self._is_large = os.fstat(self._file.fileno()).st_size >= DIRECT_FROM_BYTES

    def more(self) -> dict[str, Any]:
        """Read the next slice.

        Returns:
            {}, or after the last slice `digest`, `size_bytes` and `rows`.

        Raises:
            OSError: the file cannot be read.
            ValueError: the file is no checkpoint; see `file_rows` for other errors.
        """
        for _ in range(SLICE_BYTES // PIECE_BYTES):
            piece = self._file.read(PIECE_BYTES)
            self._digest.update(piece)
            if not piece:
                break
        else:
            if self._is_large:
                os.posix_fadvise(self._file.fileno(), 0, self._file.tell(), os.POSIX_FADV_DONTNEED)
            return {}
        with self._file:
            size_bytes = os.fstat(self._file.fileno()).st_size
            return {
                "digest": f"blake3:{self._digest.hexdigest()}",
                "size_bytes": size_bytes,
                "rows": file_rows(self._file),
            }


def file_rows(file: Any) -> list[Row]:
    """Return the rows of a checkpoint file.

    Raises:
        ValueError: the zip file has no data.pkl.
        zipfile.BadZipFile: the file is no zip file.
    """
    with zipfile.ZipFile(file) as records:
        infos = {info.filename.split("/", 1)[-1]: info for info in records.infolist()}
        if "data.pkl" not in infos:
            raise ValueError("there is no data.pkl in it")
        places: dict[str, int] = {}
        for name, info in infos.items():
            if name.startswith("data/"):
                header = os.pread(file.fileno(), LOCAL_HEADER.size, info.header_offset)
                places[name[5:]] = (
                    info.header_offset + LOCAL_HEADER.size + sum(LOCAL_HEADER.unpack(header))
                )
        with records.open(infos["data.pkl"]) as pickled:
            value = _Inert(pickled, places).load()
    return rows(value, lambda item: item.content() if isinstance(item, _Tensor) else None)


def rows(value: Any, of_tensor: OfTensor) -> list[Row]:
    """Return rows [path, kind, content] of a nested value, depth first, at most MOST_ROWS.

    There is one row for each container, tensor and plain value; a list or tuple of numbers and
    strings is one row. `of_tensor` returns the content of a tensor, None for anything else.
    """
    kept: list[Row] = []
    for row in _rows(value, "", of_tensor):
        kept.append(row)
        if len(kept) == MOST_ROWS:
            break
    return kept


def unlike(before: list[Row], after: list[Row]) -> list[str]:
    """Return a message for each difference between captured rows and rows read from the file."""
    read, differences = {row[0]: row for row in after}, []
    for path, kind, content in before:
        row = read.pop(path, None)
        if row is None:
            differences.append(f"{path} is not in the file")
        elif row[1:] != [kind, content] and row[1] != _Other.__name__:
            differences.append(f"{path} was {kind} {content} and is {row[1]} {row[2]} in the file")
    return differences + [f"{path} is in the file only" for path in read]


def _rows(value: Any, where: str, of_tensor: OfTensor) -> Iterator[Row]:
    if (content := of_tensor(value)) is not None:
        yield [where, "tensor", content]
    elif isinstance(value, Mapping):
        yield [where, type(value).__name__, len(value)]
        for key, item in value.items():
            yield from _rows(item, f"{where}[{key!r}]" if where else str(key), of_tensor)
    elif isinstance(value, list | tuple) and not all(
        type(item) in (bool, int, float, str) for item in value
    ):
        yield [where, type(value).__name__, len(value)]
        for at, item in enumerate(value):
            yield from _rows(item, f"{where}[{at}]", of_tensor)
    else:
        text = repr(value)
        short = (
            text
            if len(text) <= MOST_TEXT
            else hashlib.blake2b(text.encode(errors="replace"), digest_size=16).hexdigest()
        )
        yield [where, type(value).__name__, short]


@dataclass(frozen=True)
class _Storage:
    dtype: str
    place: int
    size: int


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    at: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str

    def content(self) -> list[Any]:
        place = self.storage.place if self.storage.size else 0
        return [self.dtype, list(self.shape), list(self.stride), self.at, place]


class dtype:  # noqa: N801 - rows contain the class name, which must be that of torch.dtype
    """A stand-in for `torch.dtype`, which holds only the name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"torch.{self.name}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, dtype) and other.name == self.name

    def __hash__(self) -> int:
        return hash(self.name)


def _rebuilt(
    storage: _Storage,
    at: int,
    shape: Any,
    stride: Any,
    requires_grad: bool = False,
    hooks: Any = None,
    *rest: Any,
) -> _Tensor:
    named = next((item.name for item in rest if isinstance(item, dtype)), storage.dtype)
    return _Tensor(storage, at, tuple(shape), tuple(stride), named)


class _Other:
    """A stand-in for every other class or function."""

    def __init__(self, *parts: Any) -> None:
        pass

    def __call__(self, *parts: Any) -> _Other:
        return self

    def __setstate__(self, state: Any) -> None:
        pass

    def __repr__(self) -> str:
        return "…"


class _Inert(pickle.Unpickler):
    """An unpickler that builds only plain data and stand-ins, and imports nothing."""

    def __init__(self, file: Any, places: Mapping[str, int]) -> None:
        super().__init__(file)
        self._places = places

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in for a class or function that the pickle names."""
        if module == "collections" and name in ("OrderedDict", "Counter"):
            return OrderedDict if name == "OrderedDict" else Counter
        if module in ("builtins", "__builtin__") and name in (
            "complex",
            "bytearray",
            "set",
            "frozenset",
        ):
            return {"complex": complex, "bytearray": bytearray, "set": set, "frozenset": frozenset}[
                name
            ]
        if (module, name) == ("_codecs", "encode"):
            return lambda text, encoding: text.encode("latin1")
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_tensor_v3"):
            return _rebuilt
        if (
            module == "torch"
            and not name.endswith("Storage")
            and name.islower()
            and name != "device"
        ):
            return dtype(name)
        return name if name.endswith("Storage") else _Other

    def persistent_load(self, pid: Any) -> Any:
        """Return a tensor's storage: its dtype, its position in the file and its size."""
        _, kind, key, _, size = pid
        return _Storage(DTYPES.get(kind, str(kind)), self._places.get(str(key), -1), int(size))
