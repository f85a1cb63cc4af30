"""Copy the state of one step in the background while training continues.

Between two updates hardly anything changes what an optimizer owns: its parameters and its own
state. These are therefore copied in the background, during the next forward and backward passes,
and the next `optimizer.step()` waits until the copy has ended. All other state is copied at once,
because it may change earlier (buffers change in the forward pass). GPU tensors are copied on a side
stream (`GpuCopy`). "Steady" in the names of this module means: constant until the
next update.

Some programs do write to parameters between updates: for example, they swap averaged weights in at
the head of the loop. A write that PyTorch counts changes the tensor's version. A write that
bypasses the count (`parameter.data`) can be found only by comparing the copy with data that is
known to be from the boundary, and that data must be read before the training thread continues.
Reading all of it costs more than half as much as a copy (11 ms against 15 ms for 100 MB, measured),
so background copying would gain nothing. There are therefore three rules:

* A state of up to 8 MiB is copied whole at the boundary. In a larger state, every tensor of less
  than 16 KiB is copied at the boundary. Nothing is assumed about these tensors.
* From all other memory, eight bytes of each MiB, and of each tensor, are read at the boundary, at
  an offset that differs each time. They are compared with the copy before it is committed, and, if
  they lie on the CPU, with the memory itself before the update. This finds with certainty every
  write on the CPU of a whole tensor, or of any run of 1 MiB, that lasts until the update. One that
  is undone before (as in a swap) is found if its time covers the copy of any run of 1 MiB; a file
  that mixes two states is possible only if it covers less. The samples are read by address: making
  a view of a tensor takes ten times as long as reading the bytes.
* The first copy of an attempt is made at once and compared whole before the next update. This finds
  loops that write single elements each time. A loop that begins to do so later, and bypasses
  PyTorch's count, is found only with `snapshot="checked"`, which compares every copy in this way.

If the state was mutated during the copy, the copy is dropped. The state of the next boundary is
saved instead, by a copy that is made at once, as are all later ones.

The copy is placed where it will lie in the file: `torch.save` writes everything but the bytes of
the tensors into the staging buffer, and the bytes are copied into the gaps that it leaves. The
buffer then holds exactly the file that `torch.save` would have written, and is written to disk as
it is.
"""

from __future__ import annotations

import ctypes
import random
import threading
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch

from harness.state.capturing import is_finite, not_finite
from harness.state.file_layout import Turns, UnsupportedStateError, tensors_in, write_outline
from harness.state.gpu_copy import GpuCopy
from harness.state.raw_bytes import Samples, bytes_of, copy, equal, is_same, raw, versions_of
from harness.store.staging_buffer import StagingBuffer

__all__ = ["Snapshot", "UnsupportedStateError"]

WHOLE_BYTES = 8 << 20  # a state up to this size is copied whole at its boundary
SMALL_BYTES = 16 << 10  # a smaller tensor is copied whole at the boundary
READ_BYTES = 64 << 10  # reading less memory is faster than making a tensor for its copy
OFFSETS = random.Random(0)  # a separate generator, so that the program's draws stay the same


class Snapshot:
    """The state of one step, captured at its boundary and copied before the next update."""

    def __init__(
        self,
        payload: Mapping[str, Any],
        steady: Collection[int],
        gpu_sources: Mapping[int, torch.Tensor] | None = None,
        gpu_copy: GpuCopy | None = None,
        watched: Mapping[int, torch.Tensor] | None = None,
    ) -> None:
        """Register the memory of all tensors in the payload.

        Args:
            payload: the state as plain data on the CPU.
            steady: addresses of the memory that is constant until the next update.
            gpu_sources: GPU tensors, by the address of the unfilled CPU memory for their bytes.
            gpu_copy: makes the device-to-host copies.
            watched: sharded tensors, which count the writes to this rank's part, by its address.

        Raises:
            UnsupportedStateError: if there are tensors that are not plain.
        """
        self.copied = threading.Event()  # GPU copies are queued by then, and end in `arrive`
        self.copy_s, self._thread = 0.0, threading.get_ident()
        self.places: dict[int, int] = {}  # by address: the offset in the file
        self.size_bytes = self.rest_bytes = 0  # of all tensors; of those that are not steady
        self._payload: Any = payload
        self._steady, self._gpu_sources = set(steady), dict(gpu_sources or {})
        self._gpu_copy = gpu_copy or GpuCopy()
        # By identity, in the order of the file: memory, address and size in bytes.
        self._storages: dict[int, tuple[torch.UntypedStorage, int, int]] = {}
        self._copies: dict[int, torch.Tensor] = {}  # by address: the copy in the staging buffer
        self._sources: dict[int, torch.Tensor] = {}  # by address: what a copy was made from
        self._counted: list[torch.Tensor] = []  # torch counts the writes to each
        # By identity: the bytes at the boundary of memory that is not steady.
        self._taken: dict[int, bytes | torch.Tensor] = {}
        self._at = OFFSETS.random()  # the position of the samples in each stride, from 0 to 1
        self._small: list[int] = []  # identities of steady memory that is copied at the boundary
        self._samples: Samples | None = None  # of all other steady memory, at the boundary
        storages, seen = self._storages, self._gpu_sources | dict(watched or {})
        for tensor in tensors_in(payload, []):
            storage = tensor.untyped_storage()
            if (identity := storage._cdata) not in storages:
                address, size_bytes = storage.data_ptr(), storage.nbytes()
                self.size_bytes += size_bytes
                storages[identity] = storage, address, size_bytes
                if address in steady:
                    self._counted.append(seen.get(address, tensor))
                else:
                    self.rest_bytes += size_bytes
        self._versions = versions_of(self._counted)
        self._gpu_copy.join({source.device for source in self._gpu_sources.values()})

    @property
    def is_small(self) -> bool:
        """Return whether copying all at once takes negligible time: at most 8 MiB are steady."""
        return self.size_bytes - self.rest_bytes <= WHOLE_BYTES

    def distrust(self) -> None:
        """Do not treat small tensors as steady, and take samples of all other steady memory.

        The training thread calls it before `copy_rest`.
        """
        whole_bytes = self.size_bytes + 1 if self.is_small else SMALL_BYTES
        in_memory, on_gpus = dict[int, torch.UntypedStorage](), dict[int, torch.Tensor]()
        steady, is_small = self._steady, self.is_small
        for identity, (storage, address, size_bytes) in self._storages.items():
            if address not in steady:
                continue
            if size_bytes >= whole_bytes:
                if (live := self._gpu_sources.get(address)) is None:
                    in_memory[address] = storage
                else:
                    on_gpus[address] = raw(live)
                continue
            steady.remove(address)
            if not is_small:  # if it changes, other memory has probably changed too
                self._small.append(identity)
        if is_small:
            self._counted, self._versions = [], []
        self._samples = Samples(in_memory, on_gpus, self._at)

    def _live(self, storage: torch.UntypedStorage, address: int) -> torch.Tensor:
        """Return the live bytes of a piece of memory, on the GPU if they are there."""
        return (
            raw(self._gpu_sources[address]) if address in self._gpu_sources else bytes_of(storage)
        )

    def _copy_of(self, identity: int) -> bytes | torch.Tensor:
        """Return a copy of the present bytes of a piece of memory."""
        storage, address, size_bytes = self._storages[identity]
        if size_bytes < READ_BYTES and address not in self._gpu_sources:
            return ctypes.string_at(address, size_bytes)
        return copy(self._live(storage, address))

    def copy_rest(self) -> None:
        """Copy all memory that is not steady at once. The training thread calls it."""
        steady, sources = self._steady, self._gpu_sources
        self._taken = {
            identity: ctypes.string_at(address, size_bytes)  # most of them
            if size_bytes < READ_BYTES and address not in sources
            else copy(self._live(storage, address))
            for identity, (storage, address, size_bytes) in self._storages.items()
            if address not in steady
        }
        self._gpu_copy.begin()

    def copy_at_once(self, staging: StagingBuffer) -> None:
        """Copy all state at once, instead of `copy_rest` and `copy_into`.

        The training thread calls it.

        Raises:
            UnsupportedStateError: as `copy_into` raises it.
            StorageError: as `copy_into` raises it.
        """
        self._gpu_copy.begin()
        self.copy_into(staging)
        self._gpu_copy.hold()

    def copy_into(self, staging: StagingBuffer) -> None:
        """Build the file in the staging buffer, and set `copied` at the end, also after an error.

        The saving thread calls it after `copy_rest`.

        Raises:
            UnsupportedStateError: if torch.save writes the tensors in an unexpected order.
            StorageError: if there is not enough memory.
        """
        began = time.perf_counter()
        is_beside = threading.get_ident() != self._thread  # beside the thread that trains
        pause = Turns().pause if is_beside else lambda: None
        try:
            places = self._places(staging, pause)
            self.places = {self._storages[identity][1]: at for at, identity in places}
            assert staging.memory is not None
            self._gpu_copy.pin(staging.memory)
            with self._gpu_copy.copying():
                for at, identity in places:
                    pause()
                    storage, address, size_bytes = self._storages[identity]
                    memory = torch.frombuffer(
                        staging.memory, dtype=torch.uint8, count=size_bytes, offset=at
                    )
                    if isinstance(taken := self._taken.get(identity), bytes):
                        staging.memory[at : at + len(taken)] = taken
                    else:
                        source = self._live(storage, address) if taken is None else taken
                        memory.copy_(source, non_blocking=True)
                        self._sources[address] = source
                    self._copies[address] = memory
        finally:
            self.copy_s = time.perf_counter() - began
            self.copied.set()

    def _places(self, staging: StagingBuffer, pause: Callable[[], object]) -> list[tuple[int, int]]:
        """Let `torch.save` write all but the tensors' bytes into the staging buffer.

        Returns:
            The offset in the file and the identity of each piece of memory whose bytes are missing.
        """
        payload, self._payload = self._payload, None
        parts = {
            identity: size_bytes
            for identity, (_, _, size_bytes) in self._storages.items()
            if size_bytes
        }
        offsets = write_outline(payload, list(parts.values()), staging, pause)
        return list(zip(offsets, parts, strict=True))

    def arrive(self) -> None:
        """Wait until the staging buffer is complete and no GPU copy into it is in flight."""
        self.copied.wait()
        self._gpu_copy.arrive()
        self.copy_s = max(self.copy_s, self._gpu_copy.copy_s())

    def held_s(self) -> float:
        """Return for how long GPUs have waited for device-to-host copies, in seconds."""
        return self._gpu_copy.held_s()

    def is_torn(self, *, compare: bool) -> bool:
        """Return True if a tensor assumed constant changed during the copy.

        The training thread calls it before an update. It waits for the copy, but only until the
        device-to-host copies are queued: later work of the GPUs is ordered after them.

        Args:
            compare: whether to compare all bytes too. A write that PyTorch counts changes the
                version of the tensor. Of writes that bypass the count (`parameter.data`), the
                samples find those of whole tensors that last, and only the comparison finds all.
                It waits for the device-to-host copies.
        """
        self.copied.wait()
        self._gpu_copy.hold()
        if versions_of(self._counted) != self._versions:
            return True
        if not compare:
            # The copy of a tensor may mix two states where no word was sampled. If the write has
            # lasted until now, the memory itself shows it.
            samples = self._samples
            return samples is not None and samples.is_rewritten()
        self.arrive()
        self._gpu_copy.begin()
        fetch = self._gpu_copy.fetch
        if any(not is_same(self._copy_of(of), self._taken[of], fetch) for of in self._small):
            return True
        sources = {
            address: source for address, source in self._sources.items() if address in self._steady
        }
        return any(
            not equal(self._copies[address], fetch(source)) for address, source in sources.items()
        )

    def is_stirred(self) -> bool:
        """Return True if the copy differs from the samples that were taken at the boundary.

        The saving thread calls it after `arrive`.
        """
        return self._samples is not None and self._samples.differ(
            self._copies, self._gpu_copy.fetch
        )

    def check_finite(self, parameters: Mapping[int, tuple[str, torch.dtype]]) -> None:
        """Check that all parameters are finite in the copy. The saving thread calls it.

        Args:
            parameters: name and dtype of each parameter by the address of its memory.

        Raises:
            NonFiniteError: if a parameter is not finite.
        """
        typed = [
            (copy, *parameters[address])
            for address, copy in self._copies.items()
            if address in parameters
        ]
        if broken := [name for copy, name, dtype in typed if not is_finite(copy.view(dtype))]:
            raise not_finite(broken)

    def forget(self) -> None:
        """Drop all references to live tensors."""
        self._copies = {}
        self._sources = {}
        self._counted, self._versions = [], []
        self._storages = {}
        self._gpu_sources = {}
        self._samples, self._small, self._taken, self._payload = None, [], {}, None
