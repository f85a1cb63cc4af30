"""Turn a snapshot into a checkpoint on the writer's saving thread while training goes on."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from harness import state
from harness.checkpoint.commit import HEAD, About
from harness.errors import StorageError
from harness.preemption import children
from harness.saving.save_job import Ended, Finish, Job, MutatedDuringCopyError, warm_up
from harness.saving.writer_process import WriterProcess
from harness.state import Captured
from harness.state.gpu_copy import GpuCopy
from harness.state.snapshot import Snapshot, UnsupportedStateError
from harness.store.staging_buffer import StagingBuffer
from harness.text import say, size

# Limit of the state that may change at any time. Up to this size it gets a copy of its own.
MOST_REST_BYTES = 64 << 20
TOUCHED_BYTES = 16 << 20
SEALED_WITHIN_S = 5.0
CHANGES = "the state changes between two updates"


def _no_writer(why: str) -> None:
    say(
        f"harness: warning: the process that writes checkpoints cannot be used ({why}): "
        "the one that trains writes them itself",
        sys.stderr,
    )


class AsyncSaver:
    """A saver that handles one job at a time; its staging buffer is reused from job to job."""

    def __init__(
        self,
        *,
        overlapped: bool,
        compare: bool,
        waiting: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        """Initialise the saver; its thread and the writer process start when they are needed.

        Unless the state is small, the first copy is made at once and compared with the state before
        the next update. If they differ, the state of this loop cannot be copied while the loop
        runs.

        Args:
            overlapped: copy in the background while training goes on; if False, copy everything
                at once, at the step boundary.
            compare: compare every copy in this way, not only the first one.
            waiting: a context that the training thread enters while it waits for a copy.
        """
        self._overlapped, self._waiting = overlapped, waiting
        self._compare, self._compare_all = overlapped, compare
        self._staging = StagingBuffer()
        self.writer, self._gpu_copy = WriterProcess(_no_writer), GpuCopy()
        self._job: Job | None = None
        self.is_unable = False  # True if states cannot be saved in the background
        self.slow_reason = ""  # why saves make training wait, if they do
        self.must_repeat = False  # True if a save was dropped and should be repeated
        self._room_bytes, self._is_used, self._touching = 0, False, threading.Lock()
        self._gpu: torch.device | None = None
        self._closing, self._sealing = False, threading.Lock()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, daemon=True, name="saver")

    @property
    def is_busy(self) -> bool:
        """Return whether a save is in flight."""
        return self._job is not None and not self._job.done.is_set()

    def is_busy_with(self, finish: Finish) -> bool:
        """Return whether a save is in flight that `finish` will commit."""
        return self.is_busy and self._job is not None and self._job.finish == finish

    @property
    def has_failed(self) -> bool:
        """Return whether `wait` would raise."""
        return self._job is not None and self._job.failure is not None

    def saved_otherwise(self) -> None:
        """Note that a save that was dropped need not be repeated."""
        self.must_repeat = False

    def start(
        self,
        captured: Captured,
        about: About,
        began_at: float,
        finish: Finish,
        ended: Ended | None = None,
    ) -> None:
        """Begin to save a captured state.

        For the training thread, at a step boundary, with no save in flight. If `is_unable` is True
        afterwards, no save has begun.

        Args:
            captured: the state to save.
            about: the manifest entries that are not part of the state.
            began_at: when the save began, by `time.perf_counter`.
            finish: on the saving thread, `finish(job, write, check)` commits what `write` writes.
            ended: called there as `ended(job)` when the save is over, also after an error.
        """
        self._is_used = True
        compared, self._compare = self._compare, self._compare_all
        try:
            snapshot = self._snapshot(captured)
            self._staging.check_room(snapshot.size_bytes)
            if snapshot.rest_bytes > MOST_REST_BYTES:
                self._take_at_once(
                    f"nothing tells when {size(snapshot.rest_bytes)} of the state change"
                )
            compared = compared and not snapshot.is_small
            if self._overlapped and not compared:
                snapshot.distrust()
                snapshot.copy_rest()
            else:
                with self._touching:
                    snapshot.copy_at_once(self._staging)
        except (UnsupportedStateError, StorageError) as error:
            self.slow_reason, self.is_unable = " ".join(str(error).split()), True
            return
        self.must_repeat = False
        head = {name: captured.payload[name] for name in HEAD if name in captured.payload}
        job = Job(head, about, captured.parameters, snapshot, began_at, finish, compared, ended)
        if not self._overlapped:
            job.sealed.set()
        with self._changed:
            self._job = job
            self._notify()
        job.blocked_s = time.perf_counter() - began_at

    def _snapshot(self, captured: Captured) -> Snapshot:
        sources, watched = captured.gpu_sources(), captured.watched
        return Snapshot(captured.payload, captured.steady, sources, self._gpu_copy, watched)

    def make_room(self, size_bytes: int, device: torch.device) -> None:
        """Prepare the staging buffer in the background, before it is needed.

        The first use of each page takes longer than a copy into it.

        Args:
            size_bytes: the size of the state.
            device: the device of the state; for a GPU the buffer is pinned.
        """
        self._gpu = device if device.type == "cuda" else None
        with self._changed:
            # One percent and 1 MiB more, for headers, generator states and so on.
            self._room_bytes = size_bytes + size_bytes // 100 + (1 << 20)
            self._notify()

    def _notify(self) -> None:
        if not self._thread.is_alive():
            warm_up()
            self._thread.start()
        self._changed.notify()

    def release(self) -> None:
        """Allow the copy to begin; call it when the training thread is about to compute.

        If the copy began earlier, the two threads would compete for the GIL.
        """
        if (job := self._job) is not None:
            job.released.set()

    def watch_updates(self, tracked: Mapping[str, Any]) -> None:
        """Have `before_update` called before each update of tracked state."""
        state.before_update(tracked, self.before_update)

    def before_update(self) -> None:
        """Wait until the state is copied, as the update that follows changes it.

        For the training thread, which waits inside the `waiting` context. A copy from a GPU need
        only be enqueued: the GPU makes the update after it. Nothing is done while a CUDA graph is
        recorded.
        """
        if self._gpu_copy.is_capturing_graph():
            return
        if self._job is not None and not self._job.sealed.is_set():
            with self._waiting():
                self._seal()
        self._gpu_copy.hold()  # a second optimizer may update on another stream
        self._gpu_copy.updates()

    def _seal(self, *, is_unchanged: bool = True) -> None:
        """Determine whether the state was mutated during the copy, and seal the job.

        `is_unchanged` means that there was certainly no update since the capture. Otherwise there
        may have been one that no optimizer has announced and PyTorch has not counted, as by a CUDA
        graph or by hand. The copy is then compared with the state.
        """
        self.release()
        with self._sealing:
            if (job := self._job) is not None and not job.sealed.is_set():
                began = time.perf_counter()
                if job.snapshot.is_torn(compare=job.is_compared or not is_unchanged):
                    self._take_at_once(CHANGES)
                    job.is_torn = not job.is_compared
                job.blocked_s += time.perf_counter() - began
                job.sealed.set()

    def _take_at_once(self, why: str) -> None:
        self._overlapped, self.slow_reason = False, f"{why}, so all is copied at once"

    def at_boundary(self) -> None:
        """Seal a copy that is complete, if no update has sealed it.

        It may be long until the next update.
        """
        if (job := self._job) is not None:
            job.is_passed = True
            if job.snapshot.copied.is_set():
                self._seal(is_unchanged=False)

    def wait(self) -> str:
        """Wait for the save in flight.

        Returns:
            "" if the checkpoint is committed or there was nothing to wait for; else why there is no
            checkpoint, if training may go on.

        Raises:
            BaseException: the error of the save, if it ends training.
        """
        if (job := self._job) is None:
            return ""
        self._seal(is_unchanged=not job.is_passed)
        job.done.wait()
        if job.failure is not None:
            raise job.failure
        return job.problem

    def close(self, limit_s: float | None = None) -> None:
        """Wait for the save in flight, whatever its result, and free the memory.

        The copy and the commit are waited for, each for at most `limit_s` seconds. If the save is
        still in flight then, nothing is freed.
        """
        self.release()  # of a loop that was left between its boundary and its next batch
        if (job := self._job) is not None:
            if job.snapshot.copied.wait(limit_s):
                # A failed GPU raises on the training thread, too. The exit may have more to record.
                with contextlib.suppress(RuntimeError):
                    self._seal(is_unchanged=not job.is_passed)
            if not job.done.wait(limit_s):
                return
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()
        self.writer.close()
        self._gpu_copy.unpin()
        self._staging.close()

    def _run(self) -> None:
        children.hold_back()
        while True:
            with self._changed:
                while not (self.is_busy or self._room_bytes or self._closing):
                    self._changed.wait()
                if self._closing:
                    return
                job = self._job if self.is_busy else None
            if job is None:
                self._touch()
            else:
                self._save(job)
                if job.ended is not None:
                    self._end(job, job.ended)
                with self._sealing:  # a seal may compare the copy at this moment
                    job.sealed.set()
                    job.snapshot.forget()
                job.done.set()

    def _touch(self) -> None:
        """Touch every page of the staging buffer once and pin it, unless it is in use already."""
        room_bytes, self._room_bytes = self._room_bytes, 0
        for at in range(0, room_bytes, TOUCHED_BYTES):
            with self._touching:
                if self._is_used or self._closing:
                    return
                try:
                    self._staging.reserve(room_bytes)
                except StorageError:
                    return  # the next save reports it
                torch.frombuffer(self._staging.memory, dtype=torch.uint8)[
                    at : at + TOUCHED_BYTES
                ].zero_()
        with self._touching:
            if not (self._is_used or self._closing) and self._staging.memory is not None:
                self._gpu_copy.pin(self._staging.memory, self._gpu)

    def _save(self, job: Job) -> None:
        job.released.wait()
        try:
            if not job.snapshot.copied.is_set():
                job.snapshot.copy_into(self._staging)
            job.snapshot.arrive()
            if job.snapshot.is_stirred():
                self._take_at_once(CHANGES)
                raise MutatedDuringCopyError("the state changed while it was copied")
            job.snapshot.check_finite(job.parameters)
            job.lease = self._staging.lend()
            job.finish(
                job,
                lambda sink: sink.write_staged(self._staging, self.writer.write_staged),
                lambda: self._check_whole(job),
            )
        # Raised by the copy; `finish` reports errors of writing itself.
        except (UnsupportedStateError, StorageError) as error:
            job.problem = self.slow_reason = " ".join(str(error).split())
            self.is_unable = self.must_repeat = True
        except MutatedDuringCopyError:
            job.problem, self.must_repeat = self.slow_reason, True
        except BaseException as error:  # noqa: BLE001 - `wait` raises it on the training thread
            job.failure = error

    def _end(self, job: Job, ended: Ended) -> None:
        try:
            job.problem, must_repeat = ended(job)
            self.must_repeat = self.must_repeat or must_repeat
        except BaseException as error:  # noqa: BLE001 - `wait` raises it on the training thread
            job.failure = job.failure or error

    def _check_whole(self, job: Job) -> None:
        # It may be long until the next update, and PyTorch has counted any write until now.
        if not job.sealed.wait(SEALED_WITHIN_S):
            self._seal(is_unchanged=False)
        if job.is_torn:
            raise MutatedDuringCopyError("the state changed while it was copied")
