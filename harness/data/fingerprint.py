"""A short name for what is in a dataset, so that a run does not go on with another one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from harness.data.given_order import KEPT
from harness.data.held_generators import Randomness, find
from harness.data.loading import is_iterable
from harness.data.plan import kept_generators

SAMPLES = 64


DIFFER = ", its samples differ each time they are loaded"


def describe(
    dataset: Any, global_batch_size: int, shuffle: bool, drop_last: bool, seed: int, *,
    collate: Any = None, before: Mapping[str, Any] | None = None, asked: tuple[str, Sequence[str]] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What a checkpoint keeps of the data and how it is dealt out, to be compared when the run goes on.

    `before` is what the checkpoint that a run goes on from has of it: a run keeps its `kinds` to its end. `asked` is what `named` said of
    it, in a process that loads it.
    """
    kinds = lasting((before or {}).get("kinds", {}))
    name, held = asked or named(dataset, collate, seeds_held=before is None or "sample_rng" in kinds)
    data = {"fingerprint": name, "size": None if is_iterable(dataset) else len(dataset)}
    data |= {"global_batch_size": global_batch_size, "shuffle": shuffle, "drop_last": drop_last, "seed": seed}
    if before is None and held:
        kinds["sample_rng"] = "held"
    return data | ({"kinds": kinds} if kinds else {})


def lasting(kinds: Mapping[str, str]) -> dict[str, str]:
    """Of the kinds in a checkpoint's data those that hold for the whole run: that an order is kept is said of one checkpoint."""
    return {name: kind for name, kind in kinds.items() if (name, kind) != ("order", KEPT)}


def named(dataset: Any, collate: Any, *, seeds_held: bool) -> tuple[str, list[str]]:
    """A dataset's fingerprint, and the generators that are found in it afterwards: some are made with the first sample."""
    name = fingerprint(dataset, seeds_held)
    return name, [one.path for one in find(drawn_from(dataset, collate))]


def drawn_from(dataset: Any, collate: Any) -> dict[str, Any]:
    """Where to look for generators that are seeded for each sample. What a stream holds may give its order: that is another matter."""
    return {"collate_fn": collate} | ({} if is_iterable(dataset) else {"dataset": dataset})


def fingerprint(dataset: Any, seeds_held: bool = True) -> str:
    """A short name for what is in a dataset.

    Its own `fingerprint` if it has one; else its length and up to 64 samples, spread evenly, each loaded under fixed
    randomness; a dataset whose samples differ even so is named without its content. An iterable dataset is named by its class only.
    """
    own = getattr(dataset, "fingerprint", None)
    if isinstance(own, str):
        return own
    if is_iterable(dataset):
        return type(dataset).__name__
    randomness = Randomness({"dataset": dataset}, seeds_held)
    randomness.look()
    first = _digest(dataset, randomness)
    if randomness.look():  # made with the first sample
        first = _digest(dataset, randomness)
    return first if first == _digest(dataset, randomness) else type(dataset).__name__ + DIFFER


def _digest(dataset: Any, randomness: Randomness) -> str:
    size = len(dataset)
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    spread = {at * (size - 1) // (SAMPLES - 1) for at in range(SAMPLES)} if size else set()
    with kept_generators(), randomness.kept():
        for sample in sorted(spread):
            randomness.seed("fingerprint", sample)
            digest_into(digest, dataset[sample])
    return digest.hexdigest()


def _kind(value: Any) -> bytes:
    return type(value).__name__.encode()


def digest_into(digest: Any, value: Any, other: Callable[[Any], bytes] = _kind) -> None:
    """Add a sample to a digest; what is none of the kinds that samples are made of, by what `other` gives for it."""
    if isinstance(value, torch.Tensor):
        value = (value if value.layout is torch.strided else value.to_dense()).detach().cpu().contiguous()
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode() + value.reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, np.ndarray) and value.dtype == object:  # its bytes are addresses
        digest_into(digest, value.tolist(), other)
    elif isinstance(value, np.ndarray):
        digest.update(f"{value.dtype}{value.shape}".encode() + np.ascontiguousarray(value).tobytes())
    elif isinstance(value, Mapping):
        for key in value:
            digest_into(digest, str(key), other)
            digest_into(digest, value[key], other)
    elif isinstance(value, list | tuple):
        digest.update(f"{len(value)}:".encode())
        for item in value:
            digest_into(digest, item, other)
    elif isinstance(value, str | bytes | int | float | bool | np.generic | None):
        digest.update(repr(value).encode() + b"\0")
    else:  # an image object, say: its repr would hold its address
        digest.update(other(value))
