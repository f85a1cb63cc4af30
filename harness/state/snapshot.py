"""The state of one step, taken while training goes on.

Between two updates hardly anything changes what an optimizer owns: its parameters and its own state. So these are copied in the
background, during the next forward and backward passes, and the next `optimizer.step()` waits until that is done. What else there
is (buffers change in the forward pass) is copied at once. What is on a GPU is copied on a stream of its own (`crossing`).

Some programs do write to parameters in between: they swap averaged weights in at the head of the loop, say. What PyTorch counts shows in
a tensor's version. A write behind its back (`parameter.data`) shows only where the copy is compared with something that is known to be of
the boundary, and that has to be read before the training thread goes on. To read all of it costs half of what a copy does (11 ms beside 15
for 100 MB, measured), and nothing would be left of copying in the background. So there are three rules:

* A state of up to 8 MB is copied whole at the boundary, and of a greater one every tensor of less than 16 KiB: nothing is assumed of them.
* Of all else eight bytes of each 64 KiB, and of each tensor, are read at the boundary, at an offset that is another one each time, and
  are looked for in the copy before it is committed. Whoever writes whole tensors, as a swap does, or any run of 64 KiB, is found for
  certain, whether he undoes it before the update or not; so no file is committed that is half of one and half of another. Most of its
  price is that of a view of each tensor (some 2 us): all are read by one call.
* The first copy of an attempt is made at once and compared whole before the next update: that finds loops which write single elements
  each time. Those that begin to do so later, and behind PyTorch's back, are found only with `snapshot="checked"`, which does this always.

A copy that was written into is dropped, and the state of the next boundary saved in its place, at once, as are all that follow.

The copy goes to where it will lie in the file: `torch.save` is asked for everything but the tensors' bytes, and where it left room
for them they are put. So the memory holds the very file that `torch.save` would have written, and is written as it is.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Collection, Mapping
from typing import Any

import torch

from harness.state.capturing import is_finite, not_finite, raw
from harness.state.crossing import Crossing
from harness.store.image import Image

WHOLE_BYTES = 8 << 20  # up to which a state is copied whole at its boundary
SMALL_BYTES = 16 << 10  # below which a tensor is copied whole at the boundary
STRIDE_BYTES = 64 << 10  # of so many, of a tensor that is copied later, eight are compared
OFFSETS = random.Random(0)  # of its own: a program's draws are not to be disturbed


class UnevenError(Exception):
    """The state holds more than plain tensors: it cannot be taken in the background."""


class Snapshot:
    """The state of one step: made at its boundary, copied in the background, sealed before anything may change."""

    def __init__(
        self, payload: Mapping[str, Any], steady: Collection[int], elsewhere: Mapping[int, torch.Tensor] | None = None,
        crossing: Crossing | None = None,
    ) -> None:  # fmt: skip
        """`steady` are the addresses of memory that does not change before the next update; of what is `elsewhere`, on a GPU, the
        address tells where it belongs. Raises UnevenError."""
        self.copied = threading.Event()  # or, from a GPU, asked for: `crossing` tells the rest
        self.copy_s = 0.0
        self.places: dict[int, int] = {}  # by address: where in the file
        self.size_bytes = self.rest_bytes = 0  # of all tensors; of those that are not steady
        self._payload: Any = payload
        self._steady, self._elsewhere = set(steady), dict(elsewhere or {})
        self._crossing = crossing or Crossing()
        self._storages: dict[int, tuple[torch.UntypedStorage, int]] = {}  # by identity, in the order of the file: memory, address
        self._copies: list[tuple[torch.Tensor, torch.Tensor, int]] = []  # of each: in the image, what it is of, where that lay
        self._versions: dict[int, tuple[torch.Tensor, int]] = {}  # by address
        self._taken: dict[int, torch.Tensor] = {}  # by identity: the bytes of memory that is not steady, as they were at the boundary
        self._at = OFFSETS.random()  # where in each stride
        self._small: dict[int, torch.Tensor] = {}  # by identity: bytes that should be steady, where the program has them
        self._samples: list[tuple[list[int], torch.Tensor]] = []  # of each device: addresses, and what there was at the boundary
        for tensor in tensors_in(payload, []):
            storage = tensor.untyped_storage()
            if (identity := storage._cdata) not in self._storages:
                address, size_bytes = storage.data_ptr(), storage.nbytes()
                self.size_bytes += size_bytes
                self._storages[identity] = storage, address
                if address in steady:
                    live = self._elsewhere.get(address, tensor)
                    self._versions[address] = live, _version(live)
                else:
                    self.rest_bytes += size_bytes
        self._crossing.join({source.device for source in self._elsewhere.values()})

    @property
    def is_small(self) -> bool:
        """Whether it can be copied at once without being noticed."""
        return self.size_bytes - self.rest_bytes <= WHOLE_BYTES

    def distrust(self) -> None:
        """Take nothing small for steady, and look at samples of all else. For the training thread, before `copy_rest`."""
        sampled: dict[torch.device, dict[int, torch.Tensor]] = {}
        whole_bytes = self.size_bytes + 1 if self.is_small else SMALL_BYTES
        for identity, (storage, address) in self._storages.items():
            if address not in self._steady:
                continue
            if storage.nbytes() >= whole_bytes:
                live = self._elsewhere.get(address)
                sample = _sample(storage, 0, storage.nbytes(), self._at) if live is None else _sample_of(raw(live), self._at)
                sampled.setdefault(sample.device, {})[address] = sample
                continue
            self._steady.discard(address)
            if self.is_small:
                self._versions.pop(address, None)
            else:  # a change of it tells that more has changed
                self._small[identity] = self._live(storage, address)
        self._samples = [(list(of), torch.cat(list(of.values()))) for of in sampled.values()]

    def _live(self, storage: torch.UntypedStorage, address: int) -> torch.Tensor:
        """The bytes of what is to be saved, where the program has them."""
        return raw(self._elsewhere[address]) if address in self._elsewhere else _bytes_of(storage)

    def copy_rest(self) -> None:
        """Copy what is not steady, at once. For the training thread."""
        here: dict[int, torch.Tensor] = {}
        for identity, (storage, address) in self._storages.items():
            if address not in self._steady:
                live = self._small[identity] if identity in self._small else self._live(storage, address)
                (self._taken if address in self._elsewhere else here)[identity] = live
        self._taken = {identity: _copy(live) for identity, live in self._taken.items()}
        if here:
            copies = torch.split(torch.cat(list(here.values())), [len(live) for live in here.values()])
            self._taken.update(zip(here, copies, strict=True))
        self._crossing.begin()

    def copy_at_once(self, image: Image) -> None:
        """Copy all, in place of `copy_rest` and `copy_into`, before the training thread goes on. Raises as `copy_into`."""
        self._crossing.begin()
        self.copy_into(image)
        self._crossing.hold()

    def copy_into(self, image: Image) -> None:
        """Form the file in the image; `copied` is set in the end, whatever comes of it. For the background, after `copy_rest`. Raises
        UnevenError, StorageError."""
        began = time.perf_counter()
        try:
            places = self._places(image)
            self.places = {self._storages[identity][1]: at for at, identity in places}
            assert image.memory is not None
            self._crossing.pin(image.memory)
            with self._crossing.copying():
                for at, identity in places:
                    storage, address = self._storages[identity]
                    memory = torch.frombuffer(image.memory, dtype=torch.uint8, count=storage.nbytes(), offset=at)
                    source = self._live(storage, address) if (taken := self._taken.get(identity)) is None else taken
                    memory.copy_(source, non_blocking=True)
                    self._copies.append((memory, source, address))
        finally:
            self.copy_s = time.perf_counter() - began
            self.copied.set()

    def _places(self, image: Image) -> list[tuple[int, int]]:
        """Let `torch.save` write all but the tensors' bytes into the image; returns where those belong, and of which memory they are."""
        outline = _Outline()
        with torch.serialization.skip_data():
            torch.save(self._payload, outline)  # type: ignore[arg-type]
        self._payload = None
        parts = {identity: storage.nbytes() for identity, (storage, _) in self._storages.items() if storage.nbytes()}
        if [size_bytes for _, size_bytes in outline.holes] != list(parts.values()):
            raise UnevenError("torch.save writes the tensors in another order than they are listed in")
        image.reserve(outline.at)
        assert image.memory is not None
        for at, data in outline.written:
            image.memory[at : at + len(data)] = data
        return [(at, identity) for (at, _), identity in zip(outline.holes, parts, strict=True)]

    def arrive(self) -> None:
        """Wait until all is in the image, and nothing of it still comes from a GPU."""
        self.copied.wait()
        self._crossing.arrive()
        self.copy_s = max(self.copy_s, self._crossing.copy_s())

    def held_s(self) -> float:
        """For how long a GPU has waited for copies out of it, in seconds."""
        return self._crossing.held_s()

    def is_torn(self, *, compare: bool) -> bool:
        """Whether what was taken to be steady has changed while it was copied. Waits for the copy; of what is on a GPU, until it has
        been asked for: what that computes from now on comes after it.

        What PyTorch knows to have been written to tells by its version; what was written to behind its back (`parameter.data`)
        only a comparison, for which `compare` asks. For the training thread, before an update.
        """
        self.copied.wait()
        self._crossing.hold()
        if any(_version(tensor) != version for tensor, version in self._versions.values()):
            return True
        if not compare:
            return False
        self.arrive()
        self._crossing.begin()
        fetch = self._crossing.fetch
        if any(not _equal(fetch(live), fetch(self._taken[identity])) for identity, live in self._small.items()):
            return True
        return any(address in self._steady and not _equal(copy, fetch(source)) for copy, source, address in self._copies)

    def is_stirred(self) -> bool:
        """Whether what was copied is not what there was at the boundary, by the samples of it. For the background, after `arrive`."""
        copies = {address: copy for copy, _, address in self._copies}
        found = ((torch.cat([_sample_of(copies[address], self._at) for address in of]), samples) for of, samples in self._samples)
        return any(not torch.equal(copied, self._crossing.fetch(samples)) for copied, samples in found)

    def check_finite(self, parameters: Mapping[int, tuple[str, torch.dtype]]) -> None:
        """Raises NonFiniteError if a parameter, which its memory's address tells, is not finite in the copy. For the background."""
        typed = [(copy, *parameters[address]) for copy, _, address in self._copies if address in parameters]
        if broken := [name for copy, name, dtype in typed if not is_finite(copy.view(dtype))]:
            raise not_finite(broken)

    def forget(self) -> None:
        """Look at live tensors no more."""
        self._copies, self._versions, self._storages, self._elsewhere, self._payload = [], {}, {}, {}, None
        self._samples, self._small, self._taken = [], {}, {}


class _Outline:
    """A file for `torch.save` that keeps what is written, and where room was left."""

    def __init__(self) -> None:
        self.at = 0
        self.written: list[tuple[int, bytes]] = []
        self.holes: list[tuple[int, int]] = []  # where, how long

    def write(self, data: memoryview) -> int:
        self.written.append((self.at, bytes(data)))
        self.at += len(data)
        return len(data)

    def seek(self, offset: int, whence: int) -> int:
        self.holes.append((self.at, offset))
        self.at += offset
        return self.at

    def flush(self) -> None:
        pass


def tensors_in(value: Any, found: list[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors of plain data, added to those found, in the order in which pickle comes to them. Raises UnevenError."""
    if isinstance(value, torch.Tensor):
        if type(value) is not torch.Tensor or value.layout is not torch.strided or value.is_quantized or not value.is_cpu:
            raise UnevenError("there is more in the state than plain tensors, such as sparse or quantized ones")
        found.append(value)
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            tensors_in(item, found)
    return found


def _copy(source: torch.Tensor) -> torch.Tensor:
    try:
        return source.clone()
    except torch.OutOfMemoryError:  # a GPU that is full is no reason to end training: there is room here
        return source.cpu()


def _sample_of(run: torch.Tensor, where: float) -> torch.Tensor:
    """As `_sample`, of a run of bytes; a copy, if words may not begin where the run does."""
    if run.storage_offset() % 8 or run.data_ptr() % 8:
        run = run.clone()
    return _sample(run.untyped_storage(), run.storage_offset() // 8, len(run), where)


def _sample(storage: torch.UntypedStorage, first: int, size_bytes: int, where: float) -> torch.Tensor:
    """A view of eight bytes of each stride, of one at least, from that word on; `where` in the stride, from 0 to 1."""
    words, stride = size_bytes // 8, STRIDE_BYTES // 8
    at = int(where * min(words, stride))
    count = -((at - words) // stride)
    return torch.empty(0, dtype=torch.int64, device=storage.device).set_(storage, first + at, (count,), (stride,))


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage)


def _version(tensor: torch.Tensor) -> int:
    """How often PyTorch has seen it written to; those that were made for inference do not count it."""
    return 0 if tensor.is_inference() else tensor._version


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two runs of bytes are the same; eight at a time where they may be, as comparing single ones takes eight times as long."""
    whole = len(a) // 8 * 8
    if all(run.data_ptr() % 8 == 0 and run.storage_offset() % 8 == 0 for run in (a, b)):
        return torch.equal(a[:whole].view(torch.int64), b[:whole].view(torch.int64)) and torch.equal(a[whole:], b[whole:])
    return torch.equal(a, b)
