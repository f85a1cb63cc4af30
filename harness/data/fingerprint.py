"""Fingerprints of a dataset's content, so that a run does not resume with another dataset.

Samples are loaded one by one. Whether a dataset would give others to a DataLoader, which asks for a
batch at once where there is a `__getitems__`, is found out here, too.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import StackDataset, Subset, default_collate

from harness.data.given_order import KEPT
from harness.data.held_generators import Randomness, find
from harness.data.loading import is_iterable
from harness.data.plan import kept_generators
from harness.data.quantized import scale_of

SAMPLES = 64
FEW = 8  # samples that are also loaded at once

DIFFER = ", its samples differ each time they are loaded"


def describe(
    dataset: Any,
    global_batch_size: int,
    shuffle: bool,
    drop_last: bool,
    seed: int,
    *,
    collate: Any = None,
    before: Mapping[str, Any] | None = None,
    asked: tuple[str, Sequence[str]] | None = None,
) -> dict[str, Any]:
    """Return the record of the data, and of how it is dealt out, for a checkpoint.

    A resumed run compares its own record with that of the checkpoint.

    Args:
        dataset: The dataset.
        global_batch_size: The samples in one step, over all ranks.
        shuffle: Whether the samples are shuffled.
        drop_last: Whether the incomplete last batch of an epoch is dropped.
        seed: The seed of the order.
        collate: The collate function, which may hold generators.
        before: The record in the checkpoint that the run resumes from; None in a new run. A run
            keeps its `kinds` to its end.
        asked: What `named` returned in a process that loads the dataset; None to call it here.
    """
    kinds = lasting((before or {}).get("kinds", {}))
    name, held = asked or named(
        dataset, collate, seeds_held=before is None or "sample_rng" in kinds
    )
    data = {"fingerprint": name, "size": None if is_iterable(dataset) else len(dataset)}
    data |= {
        "global_batch_size": global_batch_size,
        "shuffle": shuffle,
        "drop_last": drop_last,
        "seed": seed,
    }
    if before is None and held:
        kinds["sample_rng"] = "held"
    return data | ({"kinds": kinds} if kinds else {})


def lasting(kinds: Mapping[str, str]) -> dict[str, str]:
    """Return those kinds in a checkpoint's data record that hold for the whole run.

    The kind of a stored order is left out, because it holds for one checkpoint only.
    """
    return {name: kind for name, kind in kinds.items() if (name, kind) != ("order", KEPT)}


def named(dataset: Any, collate: Any, *, seeds_held: bool) -> tuple[str, list[str]]:
    """Return a dataset's fingerprint, and the paths of the generators that are found in it.

    The search comes after the fingerprint, because some generators are created with the first
    sample. It covers the roots of `drawn_from`.
    """
    name = fingerprint(dataset, seeds_held)
    return name, [held.path for held in find(drawn_from(dataset, collate))]


def drawn_from(dataset: Any, collate: Any) -> dict[str, Any]:
    """Return the roots of the search for generators that are seeded for each sample.

    An iterable dataset is no root: the generators that it holds may determine its order, so they
    are handled separately.
    """
    return {"collate_fn": collate} | ({} if is_iterable(dataset) else {"dataset": dataset})


def fingerprint(dataset: Any, seeds_held: bool = True) -> str:
    """Return a short name for the content of a dataset.

    The name is the dataset's own `fingerprint`, if it has one. Otherwise it is a digest of its
    length and of up to 64 samples, spread evenly, each loaded under fixed randomness. If the
    samples differ even so, the name is the class with a remark, without the content. An iterable
    dataset is named by its class only.
    """
    own = getattr(dataset, "fingerprint", None)
    if isinstance(own, str):
        return own
    if is_iterable(dataset):
        return type(dataset).__name__
    randomness = Randomness({"dataset": dataset}, seeds_held)
    randomness.look()
    first = _digest(dataset, randomness)
    if randomness.look():  # some are created with the first sample
        first = _digest(dataset, randomness)
    return first if first == _digest(dataset, randomness) else type(dataset).__name__ + DIFFER


def _digest(dataset: Any, randomness: Randomness) -> str:
    """Return a digest of a dataset's length and of up to `SAMPLES` samples, spread evenly."""
    size = len(dataset)
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    with kept_generators(), randomness.kept():
        for sample in _spread(size, SAMPLES):
            randomness.seed("fingerprint", sample)
            digest_into(digest, dataset[sample])
    return digest.hexdigest()


def _spread(size: int, number: int) -> list[int]:
    """Return up to `number` sample numbers of a dataset, spread evenly."""
    return sorted({at * (size - 1) // (number - 1) for at in range(number)}) if size else []


def batched(dataset: Any) -> Any:
    """Return the dataset whose own `__getitems__` a DataLoader calls, or None.

    torch's own datasets only pass the call on to those that they are made of.
    """
    if type(dataset) is Subset:
        return batched(dataset.dataset)
    if type(dataset) is StackDataset:
        parts = dataset.datasets
        inner = parts.values() if isinstance(parts, dict) else parts
        return next((found for part in inner if (found := batched(part)) is not None), None)
    is_own = not type(dataset).__module__.startswith("torch.utils.data.")
    return dataset if is_own and getattr(dataset, "__getitems__", None) else None


def batches_unlike(dataset: Any, collate: Any, *, seeds_held: bool) -> tuple[bool, bool]:
    """Return whether `__getitems__` gives other batches than `__getitem__`, and whether it must.

    The second value is False if the samples draw random numbers: both may be alike but for the
    order in which they draw. Batches are compared under equal seeds, first as lists of samples and
    then collated: what is unlike only before it is collated trains the same model.
    """
    few = _spread(len(dataset), FEW)
    if not few or batched(dataset) is None:
        return False, False
    randomness = Randomness({"dataset": dataset, "collate_fn": collate}, seeds_held)
    randomness.look()

    def digest(seed: int, load: Callable[[], Any], put_together: Callable[[Any], Any]) -> str:
        name = hashlib.blake2b(digest_size=16)
        randomness.seed("at once", seed)
        digest_into(name, put_together(load()))
        return name.hexdigest()

    def by_number() -> list[Any]:
        return [dataset[sample] for sample in few]

    with kept_generators(), randomness.kept():
        for put_together in (list, collate or default_collate):
            try:
                at_once = digest(0, lambda: dataset.__getitems__(few), put_together)
            except Exception:  # noqa: BLE001 # user code: a DataLoader could not load it either
                return False, False
            try:
                one_by_one = digest(0, by_number, put_together)
            except Exception:  # noqa: BLE001 # user code: samples that only fit as a batch
                return True, True
            if at_once == one_by_one:
                return False, False
        return True, one_by_one == digest(1, by_number, put_together)


def _kind(value: Any) -> bytes:
    """Return the name of a value's class."""
    return type(value).__name__.encode()


def _scale_text(scale: tuple[Any, ...]) -> str:
    return repr(scale) if scale else ""


def digest_into(digest: Any, value: Any, other: Callable[[Any], bytes] = _kind) -> None:
    """Add a sample to a digest.

    For an object of a class that has no rule here, the bytes that `other` returns are added.
    """
    if isinstance(value, torch.Tensor):
        value = (
            (value if value.layout is torch.strided else value.to_dense())
            .detach()
            .cpu()
            .contiguous()
        )
        digest.update(
            f"{value.dtype}{tuple(value.shape)}{_scale_text(scale_of(value))}".encode()
            + value.reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    elif isinstance(value, np.ndarray) and value.dtype == object:  # its buffer holds addresses
        digest_into(digest, value.tolist(), other)
    elif isinstance(value, np.ndarray):
        digest.update(
            f"{value.dtype}{value.shape}".encode() + np.ascontiguousarray(value).tobytes()
        )
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
    else:  # for example an image object, whose repr contains its address
        digest.update(other(value))


def content_digest(value: Any) -> bytes:
    """Return a digest of a sample or an item, with the content of objects of any class."""
    digest = hashlib.blake2b(digest_size=16)
    digest_into(digest, value, _pickled)
    return digest.digest()


def _pickled(value: Any) -> bytes:
    """Return the pickle of an object (an image, say), or its class name if it has no pickle."""
    try:
        return pickle.dumps(value)
    except (pickle.PicklingError, TypeError, AttributeError):
        return type(value).__name__.encode()
