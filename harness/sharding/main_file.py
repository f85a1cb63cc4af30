"""The main file of a sharded checkpoint, copied at the boundary and written in the background."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch

from harness.errors import StorageError
from harness.state import Captured
from harness.state.gpu_copy import GpuCopy
from harness.state.snapshot import Snapshot, UnsupportedStateError
from harness.store import Sink
from harness.store.staging_buffer import StagingBuffer


class MainFile:
    """A copy of everything that is not sharded; its memory is used again for the next one."""

    def __init__(self) -> None:
        # The tensors that stand for sharded ones have no data: that is what it warns of.
        warnings.filterwarnings("ignore", "Serializing tensors on the meta device under skip_data")
        self._staging, self._gpu_copy = StagingBuffer(), GpuCopy()
        self._snapshot: Snapshot | None = None
        self._payload: Any = None  # a copy of a state that holds more than plain tensors

    def take(self, captured: Captured) -> None:
        """Copy the captured state but for the parts of sharded tensors. For the training thread."""
        try:
            self._snapshot = Snapshot(captured.payload, (), captured.gpu_sources(), self._gpu_copy)
            self._snapshot.copy_rest()
        except UnsupportedStateError:
            self._snapshot, self._payload = None, copy.deepcopy(captured.fill())

    def write(self, sink: Sink) -> None:
        """Write the copy. For the saving thread.

        Raises:
            StorageError: there is no memory for the file, or the store fails.
        """
        if self._snapshot is None:
            payload, self._payload = self._payload, None
            torch.save(payload, sink)  # type: ignore[arg-type]
            return
        try:
            self._snapshot.copy_into(self._staging)
            self._snapshot.arrive()
        except UnsupportedStateError as error:
            raise StorageError("the main file cannot be written", str(error)) from error
        sink.expect(self._staging.size_bytes)
        for chunk in self._staging.chunks():
            sink.write(chunk)
        self._snapshot.forget()

    def close(self) -> None:
        """Free the memory."""
        self._gpu_copy.unpin()
        self._staging.close()
