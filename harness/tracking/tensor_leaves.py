"""Split captured state into leaves, each with its path, its size and a digest."""

from __future__ import annotations

import functools
import hashlib
import marshal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from harness.data.quantized import scale_of
from harness.distributed.parts import PARTS, TakenParts
from harness.distributed.reshard import as_live
from harness.distributed.wrappers import unwrap
from harness.errors import UsageError
from harness.state.capturing import Captured, as_captured, captured_object
from harness.state.kinds import PLAIN
from harness.state.raw_bytes import raw

Path = tuple[Any, ...]  # keys and indices, outermost first
WORDS = 1 << 20  # 8-byte words that are summed at once
BLOCK_WORDS = 1 << 15  # 8-byte words in a checksum
SUMMED_FROM_BYTES = 4 << 10  # shorter content is compared as it is


@dataclass(frozen=True)
class Leaf:
    """One leaf of captured state: a tensor, or plain values.

    For a tensor on a GPU, `live` is that tensor itself, not a copy on the CPU.
    """

    live: Any

    @property
    def is_on_device(self) -> bool:
        """Return whether the leaf is a tensor that is not on the CPU."""
        return isinstance(self.live, torch.Tensor) and not self.live.is_cpu

    @property
    def size_bytes(self) -> int:
        """Return the memory size in bytes; of plain values, an estimate."""
        if isinstance(self.live, torch.Tensor):
            return (
                self.live.nbytes
                if self.live.layout is torch.strided
                else self.live.to_dense().nbytes
            )
        return len(_spelled(self.live))

    def value(self) -> Any:
        """Return the current value on the CPU.

        It may share memory with the live object: copy it before the object changes.
        """
        return self.live.cpu() if isinstance(self.live, torch.Tensor) else self.live

    def digest(self) -> bytes:
        """Return a digest of 16 bytes over dtype, shape, strides, scale and content.

        The checksums of a GPU tensor are computed on the GPU.
        """
        if not isinstance(self.live, torch.Tensor):
            return short_digest(_spelled(self.live))
        tensor = self.live if self.live.layout is torch.strided else self.live.to_dense()
        content = raw(tensor)
        bits = repr(_sums(content)).encode() if self.is_on_device else _checksums(content.numpy())
        kind = (str(tensor.dtype), tuple(tensor.shape), tensor.stride(), *scale_of(tensor))
        return short_digest(repr(kind).encode() + bits)


class Leaves(dict[Path, Leaf]):
    """All leaves of one object's state, by path; `whole` is the complete state."""

    def __init__(self, captured: Captured) -> None:
        self._captured, self._is_sharded = captured, False
        elsewhere = captured.gpu_sources()
        (value,) = captured.payload.values()
        for path, leaf in _walk(value, ()):
            is_tensor = isinstance(leaf, torch.Tensor)
            if is_tensor and leaf.is_meta:  # sharded: each rank has another part
                self._is_sharded = True
                continue
            live = (
                elsewhere.get(leaf.data_ptr(), leaf)
                if is_tensor and leaf.layout is torch.strided and elsewhere
                else leaf
            )
            self[path] = Leaf(live)

    @property
    def kinds(self) -> dict[str, str]:
        """Return the kinds of the values that are not plain, by path as in a checkpoint."""
        return dict(self._captured.seen.kinds)

    @property
    def structure(self) -> bytes:
        """Return a digest of the paths and kinds of all values."""
        return short_digest(repr((list(self), sorted(self.kinds.items()))).encode())

    @property
    def whole(self) -> Any:
        """Return the complete state on the CPU, with GPU tensors copied there.

        Raises:
            UsageError: Some of it is sharded.
        """
        if self._is_sharded:
            raise UsageError(
                "the state of a sharded object has other keys or kinds on other ranks",
                f"found: in {', '.join(self._captured.payload)}",
                "Let its state_dict have the same keys on every rank; run.state may differ.",
            )
        (value,) = self._captured.fill().values()
        return value


def short_digest(content: bytes) -> bytes:
    """Return a digest of 16 bytes."""
    return hashlib.blake2b(content, digest_size=16).digest()


def leaves_of(captured: Captured) -> Leaves:
    """Return the leaves of the captured state of one object.

    A list or tuple of only plain values (numbers, strings) is one leaf; so is an empty container.
    """
    return Leaves(captured)


def digests_of(captured: Captured) -> dict[Path, bytes]:
    """Return a digest of each leaf of one object's state, the same on whatever device it lies."""
    return {path: Leaf(leaf.value()).digest() for path, leaf in leaves_of(captured).items()}


def digest_of(name: str, value: Any) -> bytes:
    """Return a digest of one value that is plain data: of its paths, kinds and content."""
    leaves = leaves_of(as_captured(name, value))
    digests = sorted((repr(path), leaf.digest()) for path, leaf in leaves.items())
    return short_digest(repr((digests, sorted(leaves.kinds.items()))).encode())


def has_changed(name: str, obj: Any, payload: Mapping[str, Any]) -> bool:
    """Return whether the state of a tracked object is not that of the checkpoint."""
    key, parts = f"{name}_state_dict", payload.get(PARTS)
    live, saved = captured_object(name, obj), payload[key]
    if live.parts or parts is not None:
        saved = as_live({name: unwrap(obj)}, {name: saved}, parts)[name]
    before = as_captured(key, saved, TakenParts())
    return (
        digests_of(live) != digests_of(before)
        or live.parts.keys() != before.parts.keys()
        or any(
            Leaf(part.tensor).digest() != Leaf(before.parts[path].tensor).digest()
            for path, part in live.parts.items()
        )
    )


def put_leaf(value: Any, path: Path, leaf: Any) -> Any:
    """Put a leaf at its path in a nested value; return the whole value.

    Dicts and lists are changed in place; a tuple on the path is replaced.
    """
    if not path:
        return leaf
    changed = put_leaf(value[path[0]], path[1:], leaf)
    if isinstance(value, tuple):
        return (*value[: path[0]], changed, *value[path[0] + 1 :])
    value[path[0]] = changed
    return value


def _walk(value: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    """Yield the leaves of a nested value with their paths."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _walk(item, (*path, key))
    elif isinstance(value, list | tuple) and value and not _is_row(value):
        for at, item in enumerate(value):
            yield from _walk(item, (*path, at))
    else:
        yield path, value


def _is_row(value: list[Any] | tuple[Any, ...]) -> bool:
    """Return whether a list or tuple holds only plain values."""
    return all(type(item) in PLAIN for item in value)


def _spelled(value: Any) -> bytes:
    """Convert plain values to bytes; the same values give the same bytes in every process."""
    try:
        # In version 0 of the format, the bytes do not depend on which strings are the same object.
        return marshal.dumps(value, 0)
    except ValueError:
        return f"{type(value).__name__}:{value!r}".encode()


def _checksums(content: Any) -> bytes:
    """Return short content as it is, and a checksum of each BLOCK_WORDS words of longer content.

    A checksum is the sum of the words, each times a random odd number (multiply-add hashing:
    https://en.wikipedia.org/wiki/Universal_hashing#Hashing_vectors). It takes a fraction of a
    digest's time, and need not withstand deliberate forgery.

    Args:
        content: contiguous bytes, as an array of NumPy.
    """
    if len(content) < SUMMED_FROM_BYTES:
        return bytes(content)
    words = content[: len(content) // 8 * 8].view(np.int64)
    whole = len(words) // BLOCK_WORDS * BLOCK_WORDS
    sums = words[:whole].reshape(-1, BLOCK_WORDS) @ _factors()
    rest = words[whole:] @ _factors()[: len(words) - whole]
    return bytes(sums.tobytes() + rest.tobytes() + bytes(content[8 * len(words) :]))


@functools.cache
def _factors() -> Any:
    """Return the odd numbers of `_checksums`, the same in every process."""
    random = hashlib.shake_128(b"factors").digest(8 * BLOCK_WORDS)
    return np.frombuffer(random, np.int64) | 1


def _sums(content: torch.Tensor) -> list[int]:
    """Return two checksums of a byte tensor, computed on its GPU.

    The bytes are summed as words of 8 bytes, and the rest byte by byte (all of it if the memory is
    not aligned to words). The first checksum ignores the order, the second depends on it.
    """
    whole = (
        len(content) // 8 * 8
        if content.data_ptr() % 8 == 0 and content.storage_offset() % 8 == 0
        else 0
    )
    sums = [torch.zeros(2, dtype=torch.int64, device=content.device)]
    words = content[:whole].view(torch.int64)
    for at in range(0, len(words), WORDS):
        part = words[at : at + WORDS]
        numbers = torch.arange(at + 1, at + 1 + len(part), device=content.device)
        sums.append(torch.stack((part.sum(), (part * (2 * numbers + 1)).sum())))
    rest = content[whole:].to(torch.int64)
    sums.append(
        torch.stack(
            (rest.sum(), (rest * torch.arange(1, 1 + len(rest), device=content.device)).sum())
        )
    )
    return [int(number) for number in torch.stack(sums).sum(0).tolist()]
