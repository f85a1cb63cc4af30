"""Copy GPU tensors to host memory on a side stream of each GPU, overlapped with compute.

At a step boundary the training thread marks the point in its stream after which the copies may
begin. Before the update it makes its stream wait for their end. Both are stream dependencies that
the GPU observes: the training thread itself waits only until the copies have been queued.

`Snapshot.copy_into` makes the copies, between `begin` and `hold` of this class. State that cannot
be copied in the background takes another path, without streams: `plain_values.fill`.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Collection, Iterator

import torch

PORTABLE = 1  # cudaHostRegisterPortable: for every GPU of this process


class GpuCopy:
    """The device-to-host copies of successive snapshots, into memory that is pinned once.

    Without a GPU it does nothing.
    """

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._devices: Collection[torch.device] = ()  # the sources of the copies
        self._begun: dict[torch.device, torch.cuda.Event] = {}
        self._ended: dict[torch.device, torch.cuda.Event] = {}
        # The events before and after each wait of a training stream for the copies.
        self._held: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        # The streams on which updates were queued.
        self._updating: dict[torch.device, set[torch.cuda.Stream]] = {}
        self._pinned: mmap.mmap | None = None
        self._refused: mmap.mmap | None = None

    def join(self, devices: Collection[torch.device]) -> None:
        """Set the source devices; order later work of this thread after all queued updates."""
        self._devices, self._begun, self._ended, self._held = devices, {}, {}, []
        for device in devices:
            if device not in self._streams:
                self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            for stream in self._updating.pop(device, ()):
                torch.cuda.current_stream(device).wait_stream(stream)

    def begin(self) -> None:
        """Order the copies after all work that the training thread (the caller) has queued."""
        for device in self._devices:
            self._streams[device].wait_stream(torch.cuda.current_stream(device))

    @contextlib.contextmanager
    def copying(self) -> Iterator[None]:
        """Run the `non_blocking` copies of the block on the side streams, and time them."""
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
        """Make the current streams of the training thread (the caller) wait for the copies."""
        for device, ended in self._ended.items():
            if not ended.query():  # type: ignore[no-untyped-call]
                stream = torch.cuda.current_stream(device)
                before = _mark(stream)
                stream.wait_event(ended)
                self._held.append((before, _mark(stream)))

    def updates(self) -> None:
        """Note the current streams of the training thread: an update is queued there next."""
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            for device in self._devices or (torch.device("cuda", torch.cuda.current_device()),):
                self._updating.setdefault(device, set()).add(torch.cuda.current_stream(device))

    def is_capturing_graph(self) -> bool:
        """Return whether the current stream is being captured into a CUDA graph.

        Nothing is executed then, and no copy may be queued.
        """
        return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]

    def arrive(self) -> None:
        """Wait until all copies have ended."""
        for device, ended in self._ended.items():
            # Without this, the thread would also use memory of the first GPU.
            with torch.cuda.device(device):
                ended.synchronize()

    def fetch(self, source: torch.Tensor) -> torch.Tensor:
        """Copy a tensor to the CPU on the side stream, while the GPU continues to compute.

        The copy holds the content as of the last `begin`, or later.
        """
        with torch.cuda.stream(self._streams.get(source.device)):
            return source.cpu()

    def copy_s(self) -> float:
        """Return how long the copies took, in seconds; all must have ended."""
        return max(
            (_between_s(self._begun[device], ended) for device, ended in self._ended.items()),
            default=0.0,
        )

    def held_s(self) -> float:
        """Return for how long GPUs were idle because of `hold`, in seconds.

        Waits that are not over yet do not count.
        """
        over = [(before, after) for before, after in self._held if after.query()]  # type: ignore[no-untyped-call]
        return sum(_between_s(before, after) for before, after in over)

    def pin(self, memory: mmap.mmap, device: torch.device | None = None) -> None:
        """Pin this memory, so that GPUs write to it directly, which is several times as fast.

        It replaces the memory that was pinned before. If CUDA refuses, copies go through the CPU.
        """
        device = next(iter(self._devices), device)
        if device is None or memory in (self._pinned, self._refused):
            return
        self.unpin()
        with torch.cuda.device(device):
            if (
                int(torch.cuda.cudart().cudaHostRegister(_address(memory), len(memory), PORTABLE))  # type: ignore[no-untyped-call]
                == 0
            ):
                self._pinned = memory
                return
            self._refused = memory
            # Clears the CUDA error, which the next operation of this thread would raise otherwise.
            with contextlib.suppress(RuntimeError):
                torch.zeros(1, device=device)

    def unpin(self) -> None:
        """Unpin the pinned memory, after waiting for the copies into it."""
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
