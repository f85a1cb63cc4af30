"""The leaves of captured state: where they lie, how large they are, and a digest of each."""

from __future__ import annotations

import hashlib
import marshal
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from harness.state.capturing import Captured, raw

Path = tuple[Any, ...]  # keys and numbers, from the outermost on
WORDS = 1 << 20  # summed up at once
SUMMED_FROM_BYTES = 4 << 10


@dataclass(frozen=True)
class Leaf:
    """A tensor, or plain values; what is on a GPU still lies there."""

    live: Any

    @property
    def is_on_device(self) -> bool:
        return isinstance(self.live, torch.Tensor) and not self.live.is_cpu

    @property
    def size_bytes(self) -> int:
        """How much memory it takes; of plain values, about."""
        if isinstance(self.live, torch.Tensor):
            return self.live.nbytes if self.live.layout is torch.strided else self.live.to_dense().nbytes
        return len(_spelled(self.live))

    def value(self) -> Any:
        """What it is now, on the CPU. It may be live memory: copy it before it changes."""
        return self.live.cpu() if isinstance(self.live, torch.Tensor) else self.live

    def digest(self) -> bytes:
        """A short digest of kind, shape and content. What lies on a GPU is summed up there."""
        if not isinstance(self.live, torch.Tensor):
            return short_digest(_spelled(self.live))
        tensor = self.live if self.live.layout is torch.strided else self.live.to_dense()
        content = raw(tensor)
        bits = repr(_sums(content)).encode() if self.is_on_device else _checksums(content.numpy())
        return short_digest(repr((str(tensor.dtype), tuple(tensor.shape), tensor.stride())).encode() + bits)


class Leaves(dict[Path, Leaf]):
    """All leaves of one object's state by path, and the `whole` of it."""

    def __init__(self, captured: Captured) -> None:
        self._captured = captured
        elsewhere = captured.elsewhere()
        (value,) = captured.payload.values()
        for path, leaf in _walk(value, ()):
            is_tensor = isinstance(leaf, torch.Tensor)
            live = elsewhere.get(leaf.data_ptr(), leaf) if is_tensor and leaf.layout is torch.strided and elsewhere else leaf
            self[path] = Leaf(live)

    @property
    def whole(self) -> Any:
        """The state with nothing left out of it, on the CPU."""
        (value,) = self._captured.fill().values()
        return value


def short_digest(content: bytes) -> bytes:
    """Of 16 bytes."""
    return hashlib.blake2b(content, digest_size=16).digest()


def leaves_of(captured: Captured) -> Leaves:
    """The leaves of what was captured of one object. Rows of numbers and strings are leaves, and so is what is empty."""
    return Leaves(captured)


def put_leaf(value: Any, path: Path, leaf: Any) -> Any:
    """Put a leaf where it belongs; returns the whole, which is changed in place where it can be."""
    if not path:
        return leaf
    changed = put_leaf(value[path[0]], path[1:], leaf)
    if isinstance(value, tuple):
        return (*value[: path[0]], changed, *value[path[0] + 1 :])
    value[path[0]] = changed
    return value


def _walk(value: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _walk(item, (*path, key))
    elif isinstance(value, list | tuple) and value and not _is_row(value):
        for at, item in enumerate(value):
            yield from _walk(item, (*path, at))
    else:
        yield path, value


def _is_row(value: list[Any] | tuple[Any, ...]) -> bool:
    return all(item is None or type(item) in (bool, int, float, complex, str, bytes) for item in value)


def _spelled(value: Any) -> bytes:
    """Plain values in bytes, the same for the same values in every process."""
    try:
        return marshal.dumps(value, 0)  # of this version nothing depends on which strings are one object
    except ValueError:
        return f"{type(value).__name__}:{value!r}".encode()


def _checksums(content: Any) -> bytes:
    """Of a run of bytes: small ones as they are, of large ones sums that take a fraction of a digest's time; nobody means to deceive."""
    if len(content) < SUMMED_FROM_BYTES:
        return bytes(content)
    return repr((zlib.crc32(content), zlib.adler32(content))).encode()


def _sums(content: torch.Tensor) -> list[int]:
    """Two sums of a run of bytes on a GPU, of which one knows their order, and the bytes that are no whole word."""
    whole = len(content) // 8 * 8 if content.data_ptr() % 8 == 0 and content.storage_offset() % 8 == 0 else 0
    sums = [torch.zeros(2, dtype=torch.int64, device=content.device)]
    words = content[:whole].view(torch.int64)
    for at in range(0, len(words), WORDS):
        part = words[at : at + WORDS]
        numbers = torch.arange(at + 1, at + 1 + len(part), device=content.device)
        sums.append(torch.stack((part.sum(), (part * (2 * numbers + 1)).sum())))
    rest = content[whole:].to(torch.int64)
    sums.append(torch.stack((rest.sum(), (rest * torch.arange(1, 1 + len(rest), device=content.device)).sum())))
    return [int(number) for number in torch.stack(sums).sum(0).tolist()]
