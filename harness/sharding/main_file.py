"""The main file of a sharded checkpoint, copied at the boundary and written in the background."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch

from harness import state
from harness.errors import StorageError
from harness.state import Captured
from harness.state.gpu_copy import GpuCopy
from harness.state.snapshot import Snapshot, UnsupportedStateError
from harness.store import Sink
from harness.store.staging_buffer import StagingBuffer

MOST_BYTES = 64 << 20  # a larger one is copied into its file at once, and not first by itself


class MainFile:
    """A copy of everything that is not sharded; its memory is used again for the next one."""

    def __init__(self) -> None:
        # The tensors that stand for sharded ones have no data: that is what it warns of.
        warnings.filterwarnings("ignore", "Serializing tensors on the meta device under skip_data")
        self._staging, self._gpu_copy = StagingBuffer(), GpuCopy()
        self._snapshot: Snapshot | None = None
        self._parameters: Mapping[int, tuple[str, torch.dtype]] = {}
        self._live: Captured | None = None  # what could not be copied
        self.slow_reason = ""  # why training waits until the file is written, if it does

    def take(self, captured: Captured) -> None:
        """Copy the captured state but for the parts of sharded tensors. For the training thread.

        If `slow_reason` is set afterwards, the state must not change until `write` is over.
        """
        self._snapshot, self._live = None, captured
        if self.slow_reason:
            return
        try:
            snapshot = Snapshot(captured.payload, (), captured.gpu_sources(), self._gpu_copy)
            self._staging.check_room(snapshot.size_bytes)
            if snapshot.size_bytes > MOST_BYTES:
                snapshot.copy_at_once(self._staging)
            else:
                snapshot.copy_rest()
        except (UnsupportedStateError, StorageError) as error:
            self.slow_reason = " ".join(str(error).split())
        else:
            self._snapshot, self._live = snapshot, None
            self._parameters = captured.parameters

    def write(self, sink: Sink) -> None:
        """Write the copy. For the saving thread.

        Raises:
            NonFiniteError: a parameter in it is not finite.
            StorageError: the store fails; or the copy cannot be written, and the next save will
                make training wait (`slow_reason`).
        """
        try:
            if self._snapshot is not None:
                self._write_copy(self._snapshot, sink)
            elif self._live is not None:
                state.check_finite(self._live.tracked)
                torch.save(self._live.fill_payload(), sink)  # type: ignore[arg-type]
        finally:
            self.forget()

    def _write_copy(self, snapshot: Snapshot, sink: Sink) -> None:
        try:
            if not snapshot.copied.is_set():
                snapshot.copy_into(self._staging)
            snapshot.arrive()
        except (UnsupportedStateError, StorageError) as error:
            self.slow_reason = " ".join(str(error).split())
            raise StorageError("the main file cannot be written", self.slow_reason) from error
        snapshot.check_finite(self._parameters)
        sink.expect(self._staging.size_bytes)
        for chunk in self._staging.chunks():
            sink.write(chunk)

    def forget(self) -> None:
        """Drop the copy, and all references to live tensors."""
        if self._snapshot is not None:
            self._snapshot.forget()
        self._snapshot = self._live = None

    def close(self) -> None:
        """Free the memory."""
        self.forget()
        self._gpu_copy.unpin()
        self._staging.close()
