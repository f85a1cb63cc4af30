"""From the memory of GPUs into the processor's, beside what they compute: on a stream of each GPU's own.

The training thread says at a step boundary from where on the copies may begin, and before the update that they have to be over. Both
are told to the GPU, which keeps to it when it gets there: the training thread waits for nothing but that the copies were asked for.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Collection, Iterator

import torch

PORTABLE = 1  # cudaHostRegisterPortable: for every GPU of this process


class GpuCopy:
    """The copies of one snapshot after another, into memory that is pinned once. With no GPU it does nothing."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._devices: Collection[torch.device] = ()  # from which is copied
        self._begun: dict[torch.device, torch.cuda.Event] = {}
        self._ended: dict[torch.device, torch.cuda.Event] = {}
        self._held: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []  # before and after what training had to wait for
        self._updating: dict[torch.device, set[torch.cuda.Stream]] = {}  # where updates were asked for
        self._pinned: mmap.mmap | None = None
        self._refused: mmap.mmap | None = None

    def join(self, devices: Collection[torch.device]) -> None:
        """From these is copied next. Have all that updates them come before what the training thread asks for from now on."""
        self._devices, self._begun, self._ended, self._held = devices, {}, {}, []
        for device in devices:
            if device not in self._streams:
                self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            for stream in self._updating.pop(device, ()):
                torch.cuda.current_stream(device).wait_stream(stream)

    def begin(self) -> None:
        """What is copied is what there is after all that the training thread, who says this, has asked for until now."""
        for device in self._devices:
            self._streams[device].wait_stream(torch.cuda.current_stream(device))

    @contextlib.contextmanager
    def copying(self) -> Iterator[None]:
        """What is copied inside, with `non_blocking`, is copied meanwhile."""
        with contextlib.ExitStack() as streams:
            for device in self._devices:
                streams.enter_context(torch.cuda.stream(self._streams[device]))
                self._begun[device] = _mark(self._streams[device])
            try:
                yield
            finally:
                for device in self._devices:
                    self._ended[device] = _mark(self._streams[device])

    def hold(self) -> None:
        """What these GPUs are told to compute from now on, where the training thread tells it just now, comes after the copies."""
        for device, ended in self._ended.items():
            if not ended.query():  # type: ignore[no-untyped-call]
                stream = torch.cuda.current_stream(device)
                before = _mark(stream)
                stream.wait_event(ended)
                self._held.append((before, _mark(stream)))

    def updates(self) -> None:
        """An update comes next, where the training thread asks for it."""
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            for device in self._devices or (torch.device("cuda", torch.cuda.current_device()),):
                self._updating.setdefault(device, set()).add(torch.cuda.current_stream(device))

    def is_recorded(self) -> bool:
        """Whether what the training thread asks for is only recorded just now, for a CUDA graph: nothing happens, and nothing may."""
        return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]

    def arrive(self) -> None:
        """Wait until all is copied."""
        for device, ended in self._ended.items():
            with torch.cuda.device(device):  # else this thread would come to use the first GPU's memory too
                ended.synchronize()

    def fetch(self, source: torch.Tensor) -> torch.Tensor:
        """What is in one of the GPUs' memory since the last `begin`, or later; it computes on meanwhile."""
        with torch.cuda.stream(self._streams.get(source.device)):
            return source.cpu()

    def copy_s(self) -> float:
        """How long the copies took that have arrived, in seconds."""
        return max((_between_s(self._begun[device], ended) for device, ended in self._ended.items()), default=0.0)

    def held_s(self) -> float:
        """For how long GPUs had nothing to compute because of `hold`, as far as they have got there, in seconds."""
        over = [(before, after) for before, after in self._held if after.query()]  # type: ignore[no-untyped-call]
        return sum(_between_s(before, after) for before, after in over)

    def pin(self, memory: mmap.mmap, device: torch.device | None = None) -> None:
        """Let GPUs write into this memory by themselves, which is several times as fast, and in place of what was pinned before. Where
        that is refused they are helped by the processor."""
        device = next(iter(self._devices), device)
        if device is None or memory in (self._pinned, self._refused):
            return
        self.unpin()
        with torch.cuda.device(device):
            if int(torch.cuda.cudart().cudaHostRegister(_address(memory), len(memory), PORTABLE)) == 0:  # type: ignore[no-untyped-call]
                self._pinned = memory
                return
            self._refused = memory
            with contextlib.suppress(RuntimeError):  # who computes next in this thread would be told of it
                torch.zeros(1, device=device)

    def unpin(self) -> None:
        """Let the memory go that was pinned, once nothing is copied into it."""
        if self._pinned is not None:
            with contextlib.suppress(RuntimeError):  # a GPU that has failed copies nothing
                self.arrive()
            torch.cuda.cudart().cudaHostUnregister(_address(self._pinned))  # type: ignore[no-untyped-call]
        self._pinned = self._refused = None


def _mark(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
    event.record(stream)
    return event


def _between_s(first: torch.cuda.Event, second: torch.cuda.Event) -> float:
    return float(first.elapsed_time(second)) / 1000


def _address(memory: mmap.mmap) -> int:
    return torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
