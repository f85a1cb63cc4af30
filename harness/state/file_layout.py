"""Lay out the file that `torch.save` would write, with gaps for the bytes of the tensors."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from harness.state.kinds import PLAIN
from harness.store.staging_buffer import StagingBuffer

# How long a background thread keeps the GIL at most, and for how long it then leaves it to others.
TURN_S, PAUSE_S = 0.5e-3, 50e-6


class Turns:
    """Short turns of a thread that computes in Python while another one trains.

    A thread keeps the GIL for 5 ms (`sys.getswitchinterval`) if another one waits for it, so every
    operator of the training thread could take that much longer.
    """

    def __init__(self) -> None:
        self._end_s = time.perf_counter() + TURN_S

    def pause(self) -> None:
        """Leave the GIL to other threads if this turn is over."""
        if time.perf_counter() > self._end_s:
            time.sleep(PAUSE_S)
            self._end_s = time.perf_counter() + TURN_S


class UnsupportedStateError(Exception):
    """The state holds more than plain tensors, so it cannot be copied in the background."""


def tensors_in(value: Any, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Append the tensors in plain data to `tensors`, in the order in which pickle visits them.

    Tensors without data (on the device meta) are left out.

    Returns:
        `tensors`.

    Raises:
        UnsupportedStateError: for tensors that are not plain, such as sparse or quantized ones.
    """
    if isinstance(value, torch.Tensor):
        if value.is_meta:
            return tensors
        if not _is_plain(value):
            raise UnsupportedStateError(
                "there is more in the state than plain tensors, such as sparse or quantized ones"
            )
        for name, held in vars(value).items() if vars(value) else ():
            if isinstance(held, torch.Tensor):  # torch.save writes it as well, in between
                raise UnsupportedStateError(
                    f"a tensor in the state has an attribute {name!r} that is a tensor too. To "
                    "save in the background, make it an entry of its own in the state_dict"
                )
        tensors.append(value)
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            if type(item) is torch.Tensor and not vars(item) and _is_plain(item):
                tensors.append(item)  # most of them: a call less
            elif type(item) not in PLAIN:
                tensors_in(item, tensors)
    return tensors


def _is_plain(tensor: torch.Tensor) -> bool:
    """Return whether the file holds a tensor as the bytes of its memory on the CPU."""
    return (
        type(tensor) is torch.Tensor
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and not tensor.is_quantized
    )


def write_outline(
    payload: Any, sizes: list[int], staging: StagingBuffer, pause: Callable[[], object]
) -> list[int]:
    """Let `torch.save` write all but the tensors' bytes into the staging buffer.

    Args:
        payload: the state as plain data on the CPU.
        sizes: the size in bytes of each piece of memory that the tensors lie in, in the order in
            which pickle visits them; none is empty.
        staging: the staging buffer.
        pause: called for every tensor and every record.

    Returns:
        The offset in the file of each piece of memory.

    Raises:
        UnsupportedStateError: if torch.save writes the tensors in an unexpected order.
        StorageError: if there is not enough memory.
    """
    outline = _Outline(pause)

    class Pickler(pickle.Pickler):  # the way into the long loop over the objects
        def reducer_override(self, obj: Any) -> Any:
            pause()
            return NotImplemented

    with torch.serialization.skip_data():
        torch.save(
            payload,
            outline,  # type: ignore[arg-type]
            pickle_module=SimpleNamespace(__name__="pickle", Pickler=Pickler),
        )
    if [size_bytes for _, size_bytes in outline.holes] != sizes:
        raise UnsupportedStateError(
            f"torch {torch.__version__} writes the tensors of this state in another order than "
            "expected. The checkpoints are whole. To save in the background, take a version of "
            "PyTorch that is tested, and keep no tensors in attributes of tensors"
        )
    staging.reserve(outline.at)
    assert staging.memory is not None
    for at, data in outline.written:
        staging.memory[at : at + len(data)] = data
    return [at for at, _ in outline.holes]


class _Outline:
    """A file for `torch.save` that records what is written and where gaps are left."""

    def __init__(self, pause: Callable[[], object]) -> None:
        self.at, self._pause = 0, pause
        self.written: list[tuple[int, bytes]] = []
        self.holes: list[tuple[int, int]] = []  # offset and length

    def write(self, data: memoryview) -> int:
        self.written.append((self.at, bytes(data)))
        self.at += len(data)
        return len(data)

    def seek(self, offset: int, whence: int) -> int:
        self._pause()
        self.holes.append((self.at, offset))
        self.at += offset
        return self.at

    def flush(self) -> None:
        pass
