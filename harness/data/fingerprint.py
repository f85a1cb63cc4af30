"""A short name for what is in a dataset, so that a run does not go on with another one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from harness.data.loading import is_iterable
from harness.data.order import kept_generators, seed_cpu, seed_of

SAMPLES = 64


def describe(
    dataset: Any, global_batch_size: int, shuffle: bool, drop_last: bool, seed: int, name: str | None = None
) -> dict[str, Any]:  # fmt: skip
    """What a checkpoint keeps of the data and how it is dealt out, to be compared when the run goes on; `name` is its fingerprint."""
    data = {"fingerprint": fingerprint(dataset) if name is None else name, "size": None if is_iterable(dataset) else len(dataset)}
    return data | {"global_batch_size": global_batch_size, "shuffle": shuffle, "drop_last": drop_last, "seed": seed}


def fingerprint(dataset: Any) -> str:
    """A short name for what is in a dataset.

    Its own `fingerprint` if it has one; else its length and up to 64 samples, spread evenly, each loaded under fixed
    randomness; a dataset with randomness of its own is named without its content. An iterable dataset is named by its class only.
    """
    own = getattr(dataset, "fingerprint", None)
    if isinstance(own, str):
        return own
    if is_iterable(dataset):
        return type(dataset).__name__
    first, second = _digest(dataset), _digest(dataset)
    return first if first == second else f"{type(dataset).__name__}, its samples differ each time they are loaded"


def _digest(dataset: Any) -> str:
    size = len(dataset)
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    spread = {at * (size - 1) // (SAMPLES - 1) for at in range(SAMPLES)} if size else set()
    with kept_generators():
        for sample in sorted(spread):
            seed_cpu(seed_of("fingerprint", sample))
            _digest_into(digest, dataset[sample])
    return digest.hexdigest()


def _digest_into(digest: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().contiguous()
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode() + value.reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, np.ndarray) and value.dtype == object:  # its bytes are addresses
        _digest_into(digest, value.tolist())
    elif isinstance(value, np.ndarray):
        digest.update(f"{value.dtype}{value.shape}".encode() + np.ascontiguousarray(value).tobytes())
    elif isinstance(value, Mapping):
        for key in value:
            _digest_into(digest, str(key))
            _digest_into(digest, value[key])
    elif isinstance(value, list | tuple):
        digest.update(f"{len(value)}:".encode())
        for item in value:
            _digest_into(digest, item)
    elif isinstance(value, str | bytes | int | float | bool | np.generic | None):
        digest.update(repr(value).encode() + b"\0")
    else:  # an image object, say: its repr would hold its address
        digest.update(type(value).__name__.encode())
