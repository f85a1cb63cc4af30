"""The state of one step, taken while training goes on.

Between two updates hardly anything changes what an optimizer owns: its parameters and its own state. So these are copied in the
background, during the next forward and backward passes, and the next `optimizer.step()` waits until that is done. What else there
is (buffers change in the forward pass) is copied at once. What is on a GPU is copied on a stream of its own (`crossing`).

Some programs do write to parameters in between: they swap averaged weights in at the head of the loop, say. What PyTorch counts shows in
a tensor's version. A write behind its back (`parameter.data`) shows only where the copy is compared with something that is known to be of
the boundary, and that has to be read before the training thread goes on. To read all of it costs half of what a copy does (11 ms beside 15
for 100 MB, measured), and nothing would be left of copying in the background. So there are three rules:

* A state of up to 8 MB is copied whole at the boundary, and of a greater one every tensor of less than 16 KiB: nothing is assumed of them.
* Of all else eight bytes of each MiB, and of each tensor, are read at the boundary, at an offset that is another one each time, and
  are looked for in the copy before it is committed. Whoever writes whole tensors, as a swap does, or any run of 1 MiB, is found for
  certain, whether he undoes it before the update or not; so no file is committed that is half of one and half of another. They are read
  by their address: to make a tensor that is a view of another takes ten times as long as to read what is there.
* The first copy of an attempt is made at once and compared whole before the next update: that finds loops which write single elements
  each time. Those that begin to do so later, and behind PyTorch's back, are found only with `snapshot="checked"`, which does this always.

A copy that was written into is dropped, and the state of the next boundary saved in its place, at once, as are all that follow.

The copy goes to where it will lie in the file: `torch.save` is asked for everything but the tensors' bytes, and where it left room
for them they are put. So the memory holds the very file that `torch.save` would have written, and is written as it is.
"""

from __future__ import annotations

import ctypes
import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch

from harness.state.capturing import is_finite, not_finite, raw
from harness.state.gpu_copy import GpuCopy
from harness.store.staging_buffer import StagingBuffer

WHOLE_BYTES = 8 << 20  # up to which a state is copied whole at its boundary
SMALL_BYTES = 16 << 10  # below which a tensor is copied whole at the boundary
STRIDE_BYTES = 1 << 20  # of so many, of a tensor that is copied later, eight are compared
WORD_BYTES = 8
READ_BYTES = 64 << 10  # below which memory is read faster than a tensor for its copy is made
OFFSETS = random.Random(0)  # of its own: a program's draws are not to be disturbed


class UnsupportedStateError(Exception):
    """The state holds more than plain tensors: it cannot be taken in the background."""


class Snapshot:
    """The state of one step: made at its boundary, copied in the background, sealed before anything may change."""

    def __init__(
        self, payload: Mapping[str, Any], steady: Collection[int], elsewhere: Mapping[int, torch.Tensor] | None = None,
        crossing: GpuCopy | None = None,
    ) -> None:  # fmt: skip
        """`steady` are the addresses of memory that does not change before the next update; of what is `elsewhere`, on a GPU, the
        address tells where it belongs. Raises UnevenError."""
        self.copied = threading.Event()  # or, from a GPU, asked for: `crossing` tells the rest
        self.copy_s = 0.0
        self.places: dict[int, int] = {}  # by address: where in the file
        self.size_bytes = self.rest_bytes = 0  # of all tensors; of those that are not steady
        self._payload: Any = payload
        self._steady, self._elsewhere = set(steady), dict(elsewhere or {})
        self._crossing = crossing or GpuCopy()
        self._storages: dict[int, tuple[torch.UntypedStorage, int]] = {}  # by identity, in the order of the file: memory, address
        self._copies: dict[int, torch.Tensor] = {}  # by address: the copy in the image
        self._sources: dict[int, torch.Tensor] = {}  # by address: what is copied of it after the boundary
        self._versions: dict[int, tuple[torch.Tensor, int]] = {}  # by address
        self._taken: dict[int, bytes | torch.Tensor] = {}  # by identity: the bytes of memory that is not steady, at the boundary
        self._at = OFFSETS.random()  # where in each stride
        self._small: list[int] = []  # identities of what should be steady, and is copied at the boundary all the same
        self._samples: list[tuple[list[int], bytes | torch.Tensor]] = []  # of each device: addresses, what there was at the boundary
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
        whole_bytes = self.size_bytes + 1 if self.is_small else SMALL_BYTES
        here, elsewhere = dict[int, bytes](), defaultdict[torch.device, dict[int, torch.Tensor]](dict)
        for identity, (storage, address) in self._storages.items():
            if address not in self._steady:
                continue
            if (size_bytes := storage.nbytes()) >= whole_bytes:
                if (live := self._elsewhere.get(address)) is None:
                    here[address] = _read(address, size_bytes, self._at)
                else:
                    elsewhere[live.device][address] = _sample(raw(live), self._at)
                continue
            self._steady.discard(address)
            if self.is_small:
                self._versions.pop(address, None)
            else:  # a change of it tells that more has changed
                self._small.append(identity)
        self._samples = [(list(of), torch.cat(list(of.values()))) for of in elsewhere.values()]
        self._samples.append((list(here), b"".join(here.values())))

    def _live(self, storage: torch.UntypedStorage, address: int) -> torch.Tensor:
        """The bytes of what is to be saved, where the program has them."""
        return raw(self._elsewhere[address]) if address in self._elsewhere else _bytes_of(storage)

    def _copy_of(self, identity: int) -> bytes | torch.Tensor:
        """A copy of what is to be saved, as it is just now."""
        storage, address = self._storages[identity]
        if address not in self._elsewhere and storage.nbytes() < READ_BYTES:
            return ctypes.string_at(address, storage.nbytes())
        return _copy(self._live(storage, address))

    def copy_rest(self) -> None:
        """Copy what is not steady, at once. For the training thread."""
        rest = (identity for identity, (_, address) in self._storages.items() if address not in self._steady)
        self._taken = {identity: self._copy_of(identity) for identity in rest}
        self._crossing.begin()

    def copy_at_once(self, image: StagingBuffer) -> None:
        """Copy all, in place of `copy_rest` and `copy_into`, before the training thread goes on. Raises as `copy_into`."""
        self._crossing.begin()
        self.copy_into(image)
        self._crossing.hold()

    def copy_into(self, image: StagingBuffer) -> None:
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
                    if isinstance(taken := self._taken.get(identity), bytes):
                        image.memory[at : at + len(taken)] = taken
                    else:
                        source = self._live(storage, address) if taken is None else taken
                        memory.copy_(source, non_blocking=True)
                        self._sources[address] = source
                    self._copies[address] = memory
        finally:
            self.copy_s = time.perf_counter() - began
            self.copied.set()

    def _places(self, image: StagingBuffer) -> list[tuple[int, int]]:
        """Let `torch.save` write all but the tensors' bytes into the image; returns where those belong, and of which memory they are."""
        outline = _Outline()
        with torch.serialization.skip_data():
            torch.save(self._payload, outline)  # type: ignore[arg-type]
        self._payload = None
        parts = {identity: storage.nbytes() for identity, (storage, _) in self._storages.items() if storage.nbytes()}
        if [size_bytes for _, size_bytes in outline.holes] != list(parts.values()):
            raise UnsupportedStateError("torch.save writes the tensors in another order than they are listed in")
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
        if any(not _is_same(self._copy_of(of), self._taken[of], fetch) for of in self._small):
            return True
        sources = {address: source for address, source in self._sources.items() if address in self._steady}
        return any(not _equal(self._copies[address], fetch(source)) for address, source in sources.items())

    def is_stirred(self) -> bool:
        """Whether what was copied is not what there was at the boundary, by the samples of it. For the background, after `arrive`."""
        for of, samples in self._samples:
            known = samples if isinstance(samples, bytes) else self._crossing.fetch(samples).numpy().tobytes()
            copies = (self._copies[address] for address in of)
            if b"".join(_read(copy.data_ptr(), len(copy), self._at) for copy in copies) != known:
                return True
        return False

    def check_finite(self, parameters: Mapping[int, tuple[str, torch.dtype]]) -> None:
        """Raises NonFiniteError if a parameter, which its memory's address tells, is not finite in the copy. For the background."""
        typed = [(copy, *parameters[address]) for address, copy in self._copies.items() if address in parameters]
        if broken := [name for copy, name, dtype in typed if not is_finite(copy.view(dtype))]:
            raise not_finite(broken)

    def forget(self) -> None:
        """Look at live tensors no more."""
        self._copies, self._sources, self._versions, self._storages, self._elsewhere = {}, {}, {}, {}, {}
        self._samples, self._small, self._taken, self._payload = [], [], {}, None


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
            raise UnsupportedStateError("there is more in the state than plain tensors, such as sparse or quantized ones")
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


def _words(size_bytes: int, where: float) -> range:
    """Which words of a memory are looked at: one of each stride, and one at least; `where` in the stride, from 0 to 1."""
    words, stride = size_bytes // WORD_BYTES, STRIDE_BYTES // WORD_BYTES
    return range(int(where * min(words, stride)), words, stride)


def _read(address: int, size_bytes: int, where: float) -> bytes:
    """Those words, of memory of this process."""
    words = _words(size_bytes, where)
    return memoryview((ctypes.c_int64 * words.stop).from_address(address))[words.start :: words.step].tobytes()


def _sample(run: torch.Tensor, where: float) -> torch.Tensor:
    """Those words of a run of bytes, wherever it is; of a copy, if words may not begin where the run does."""
    whole = run[: len(run) // WORD_BYTES * WORD_BYTES]
    if whole.storage_offset() % WORD_BYTES or whole.data_ptr() % WORD_BYTES:
        whole = whole.clone()
    words = _words(len(run), where)
    return whole.view(torch.int64)[words.start :: words.step]


def _is_same(now: bytes | torch.Tensor, then: bytes | torch.Tensor, fetch: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    if isinstance(now, bytes) or isinstance(then, bytes):
        return now == then
    return _equal(fetch(now), fetch(then))


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
