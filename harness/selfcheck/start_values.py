"""Compare what the program holds before its first step with what it held when the run began.

A copy of a tracked model, or a mean that one computes, is another after a restart if it is made
after `track`, which restores the model: a teacher would be the trained student. Each attempt
records digests of the modules, tensors and arrays that the program holds and does not track, and
hands those of the run's beginning on.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

import harness.untracked.array_changes as array_changes
from harness.checkpoint.catalog import Catalog
from harness.checkpoint.format import Manifest
from harness.distributed.dtensors import plain, without_collectives
from harness.supervision import attempt_history
from harness.text import listed

EVENT = "held_at_start"
MOST = 1000  # tensors and arrays that are looked at
FEW_ATTEMPTS = 3  # attempts that are asked for what they have handed on
SAMPLES = 64  # numbers that are compared of each
CLOSE_S = 5.0  # how long the end of the loop waits for the comparison


class StartValues:
    """The comparison of an attempt's values at its start with those of the run's beginning.

    Args:
        catalog: Catalog of the run's stores; None on ranks other than the writer.
        origin: Manifest of the resume point, or None.
        say: Prints a line for the user.
        note: Adds an event to the event log.
    """

    def __init__(
        self,
        catalog: Catalog | None,
        origin: Manifest | None,
        say: Callable[[str], None],
        note: Callable[..., None],
    ) -> None:
        self._catalog, self._origin, self._say, self._note = catalog, origin, say, note
        self._thread: threading.Thread | None = None

    def begin(self, found: Mapping[str, tuple[Any, Any]], held: Collection[int]) -> None:
        """Digest the values before the first step; record and compare them in the background.

        Args:
            found: Holder and value, by the path of each value that the program holds.
            held: Addresses of the memory of tracked objects.
        """
        if digests := digests_of(found, held):
            self._thread = threading.Thread(
                target=self._compare, args=(digests,), daemon=True, name="harness start values"
            )
            self._thread.start()

    def _compare(self, now: dict[str, str]) -> None:
        before = self._recorded()
        if before is not None:
            self._note(EVENT, digests=now | before)
        if other := [path for path in now if (before or now).get(path, now[path]) != now[path]]:
            self._note("held_other", names=other)
            self._say(
                "harness: warning: not as when the run began: "
                f"{listed(other)}. It is made from what was restored, or "
                "from what differs at each start: make it before run.track, or track it (a tensor: "
                "in run.state)."
            )

    def _recorded(self) -> dict[str, str] | None:
        """Return the digests of the run's beginning; {} in a new run, None if they are unknown."""
        if self._origin is None or self._catalog is None:
            return {}
        for number, _ in [*reversed(self._origin.lineage)][:FEW_ATTEMPTS]:
            if record := attempt_history.first_of(self._catalog, number, EVENT):
                return dict(record.get("digests") or {})
        return None

    def close(self) -> None:
        """Wait for the comparison, for a while."""
        if self._thread is not None:
            self._thread.join(CLOSE_S)


@torch.no_grad()
def digests_of(found: Mapping[str, tuple[Any, Any]], held: Collection[int]) -> dict[str, str]:
    """Return a digest of each module, tensor, array and list of floats, by its path.

    Single numbers are left out, and so is what a dataset holds. For the arguments see
    `StartValues.begin`.
    """
    digests, left = dict[str, str](), MOST
    for path, (holder, value) in found.items():
        if isinstance(holder, Dataset) or left <= 0:
            continue
        try:
            with without_collectives():
                parts = [str(part) for part in _digested(holder, value, held, left)]
        except Exception:  # noqa: BLE001 - a class of the program may raise
            continue
        if parts:
            left -= len(parts)
            text = " ".join(parts).encode()
            digests[path] = hashlib.blake2b(text, digest_size=8).hexdigest()
    return digests


def _digested(holder: Any, value: Any, held: Collection[int], most: int) -> Iterator[Any]:
    """Yield shape, kind and some numbers of each array of a value, at most `most`."""
    if isinstance(value, nn.Module):
        if not isinstance(holder, nn.Module):
            own = (*value.parameters(), *value.buffers())
            some = [tensor for tensor in own if array_changes.is_marked(tensor)][:most]
            yield from (_some(each) for each in map(plain, some) if each.data_ptr() not in held)
    elif isinstance(value, torch.Tensor):
        if array_changes.is_marked(value) and value.numel() > 1 and value.data_ptr() not in held:
            yield _some(value)
    elif isinstance(value, np.ndarray):
        address = value.__array_interface__["data"][0]
        if value.size > 1 and value.dtype.kind in "biufc" and address not in held:
            spread = value.flat[:: max(1, value.size // SAMPLES)]
            yield value.shape, value.dtype, spread.tobytes().hex()
    elif isinstance(value, list) and len(value) > 1 and all(type(each) is float for each in value):
        yield value[:MOST]


def _some(tensor: torch.Tensor) -> tuple[Any, ...]:
    tensor = plain(tensor)
    spread = tensor.detach().reshape(-1)[:: max(1, tensor.numel() // SAMPLES)]
    return tuple(tensor.shape), tensor.dtype, spread.cpu().tolist()
