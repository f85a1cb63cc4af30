"""The writer's saving thread: a snapshot becomes a checkpoint while training goes on."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from harness import preemption, state
from harness.checkpoint.commit import About
from harness.errors import StorageError
from harness.saving.writer_process import WriterProcess
from harness.state import Captured
from harness.state.gpu_copy import GpuCopy
from harness.state.snapshot import Snapshot, UnsupportedStateError
from harness.store import Sink
from harness.store.staging_buffer import ReadLease, StagingBuffer
from harness.text import say, size

HEAD = ("format_version", "step", "epoch", "loss", "metrics")  # what the manifest repeats of the state
MOST_REST_BYTES = 64 << 20  # of what may change at any time, the most that is worth a copy of its own
TOUCHED_BYTES = 16 << 20
SEALED_WITHIN_S = 5.0
CHANGES = "the state changes between two updates"


def _no_scribe(why: str) -> None:
    say(f"harness: warning: the process that writes checkpoints cannot be used ({why}): the one that trains writes them itself", sys.stderr)


class MutatedDuringCopyError(Exception):
    """The state changed while it was copied."""


Finish = Callable[["Job", Callable[[Sink], None], Callable[[], None]], None]


@dataclass
class Job:
    """One checkpoint on its way from the training thread to where it exists."""

    head: dict[str, Any]
    about: About
    parameters: dict[int, tuple[str, torch.dtype]]
    snapshot: Snapshot
    began_at: float
    finish: Finish  # commits what is copied
    is_compared: bool  # copied at once, to see whether it is still the same before the next update
    blocked_s: float = 0.0  # for how long training has waited for it
    problem: str = ""  # why there is no checkpoint, if training may go on all the same
    is_torn: bool = False
    is_passed: bool = False  # a step was made since
    released: threading.Event = field(default_factory=threading.Event)  # the copy may begin
    loan: ReadLease | None = None  # of the whole copy, once it is made
    sealed: threading.Event = field(default_factory=threading.Event)  # it is known whether it is whole
    done: threading.Event = field(default_factory=threading.Event)
    failure: BaseException | None = None

    def costs(self) -> dict[str, float]:
        """What it has cost training so far, and how long the copy took, in seconds."""
        return {"blocked_s": round(self.blocked_s + self.snapshot.held_s(), 6), "copy_s": round(self.snapshot.copy_s, 6)}


class AsyncSaver:
    """Takes one job at a time, in memory that is kept from one to the next."""

    def __init__(
        self, *, overlapped: bool, compare: bool, waiting: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
    ) -> None:  # fmt: skip
        """The first copy (`compare`: each one) is made at once, and compared before the next update: were it not the same any more,
        this loop's state could not be copied while it runs."""
        self._overlapped, self._waiting = overlapped, waiting
        self._compare, self._compare_all = overlapped, compare
        self._image, self._scribe, self._crossing = StagingBuffer(), WriterProcess(_no_scribe), GpuCopy()
        self._job: Job | None = None
        self.is_unable = False  # nothing can be saved in the background
        self.slow_words = ""  # why saves make training wait, if they do
        self.wants_again = False  # what was to be saved was not, and can be
        self._room_bytes, self._is_used, self._touching = 0, False, threading.Lock()
        self._gpu: torch.device | None = None
        self._unwatch: Callable[[], None] = lambda: None
        self._closing, self._sealing = False, threading.Lock()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, daemon=True, name="saver")

    @property
    def scribe(self) -> WriterProcess:
        """The process that writes."""
        return self._scribe

    @property
    def is_busy(self) -> bool:
        """Whether a checkpoint is on its way."""
        return self._job is not None and not self._job.done.is_set()

    def is_busy_with(self, finish: Finish) -> bool:
        """Whether what is on its way is to be committed by that."""
        return self.is_busy and self._job is not None and self._job.finish == finish

    @property
    def has_failed(self) -> bool:
        """Whether `wait` would raise."""
        return self._job is not None and self._job.failure is not None

    def start(self, captured: Captured, about: About, began_at: float, finish: Finish) -> None:
        """Begin to save, what began to be made at `began_at` (`time.perf_counter`); for the training thread, at a step boundary, when
        nothing is on its way. `finish(job, write, check)` commits what `write` writes. If it `is_unable` then, nothing was begun."""
        self._is_used = True
        compared, self._compare = self._compare, self._compare_all
        try:
            snapshot = Snapshot(captured.payload, captured.steady, captured.elsewhere(), self._crossing)
            self._image.check_room(snapshot.size_bytes)
            if snapshot.rest_bytes > MOST_REST_BYTES:
                self._take_at_once(f"nothing tells when {size(snapshot.rest_bytes)} of the state change")
            compared = compared and not snapshot.is_small
            if self._overlapped and not compared:
                snapshot.distrust()
                snapshot.copy_rest()
            else:
                with self._touching:
                    snapshot.copy_at_once(self._image)
        except (UnsupportedStateError, StorageError) as error:
            self.slow_words, self.is_unable = " ".join(str(error).split()), True
            return
        self.wants_again = False
        head = {name: captured.payload[name] for name in HEAD}
        job = Job(head, about, captured.parameters, snapshot, began_at, finish, compared)
        if not self._overlapped:
            job.sealed.set()
        with self._changed:
            self._job = job
            if not self._thread.is_alive():
                self._thread.start()
            self._changed.notify()
        job.blocked_s = time.perf_counter() - began_at

    def make_room(self, size_bytes: int, device: torch.device) -> None:
        """Have memory ready for a state of this size, of this device: the first use of each page takes longer than a copy into it."""
        self._gpu = device if device.type == "cuda" else None
        with self._changed:
            self._room_bytes = size_bytes + size_bytes // 100 + (1 << 20)  # headers, generators, and so on
            if not self._thread.is_alive():
                self._thread.start()
            self._changed.notify()

    def release(self) -> None:
        """Let the copy begin: the training thread is about to compute. Sooner, both would be after Python's lock."""
        if (job := self._job) is not None:
            job.released.set()

    def watch_updates(self, tracked: Mapping[str, Any], say: Callable[[str], None]) -> None:
        """Have each update of what is tracked come through `before_update`; of any other, what is lost by it is said."""
        state.before_update(tracked, self.before_update)
        lost = "its state is lost at a restart; name it in run.track(…)"
        self._unwatch = state.on_untracked_update(tracked, lambda words: say(f"harness: warning: an optimizer {words}: {lost}"))

    def before_update(self) -> None:
        """Wait until all is copied: what follows changes it. For the training thread, which says by `waiting` what it does meanwhile."""
        if self._crossing.is_recorded():
            return
        if self._job is not None and not self._job.sealed.is_set():
            with self._waiting():
                self._seal()
        self._crossing.hold()  # of an optimizer that is not the first, maybe on another stream
        self._crossing.updates()

    def _seal(self, *, is_told: bool = True) -> None:
        """Find out whether what is copied is whole. Unless it `is_told` that there was no update until now, there may have been one that
        no optimizer has announced and PyTorch has not counted: a CUDA graph's, or one that is made by hand."""
        self.release()
        with self._sealing:
            if (job := self._job) is not None and not job.sealed.is_set():
                began = time.perf_counter()
                if job.snapshot.is_torn(compare=job.is_compared or not is_told):
                    self._take_at_once(CHANGES)
                    job.is_torn = not job.is_compared
                job.blocked_s += time.perf_counter() - began
                job.sealed.set()

    def _take_at_once(self, why: str) -> None:
        self._overlapped, self.slow_words = False, f"{why}, so all is copied at once"

    def at_boundary(self) -> None:
        """Seal what is copied, if no update has: it may be long until the next."""
        if (job := self._job) is not None:
            job.is_passed = True
            if job.snapshot.copied.is_set():
                self._seal(is_told=False)

    def wait(self) -> str:
        """Wait until what is on its way has arrived; returns why it has not, if training may go on. Raises what is the end of it."""
        if (job := self._job) is None:
            return ""
        self._seal(is_told=not job.is_passed)
        job.done.wait()
        if job.failure is not None:
            raise job.failure
        return job.problem

    def close(self, limit_s: float | None = None) -> None:
        """Wait for what is on its way, at most so long and whatever comes of it, and give the memory back."""
        self._unwatch()
        self.release()  # of a loop that was left between its boundary and its next batch
        if (job := self._job) is not None:
            if job.snapshot.copied.wait(limit_s):
                with contextlib.suppress(RuntimeError):  # of a GPU that has failed: whoever trains is told, and there may be more to record
                    self._seal(is_told=not job.is_passed)
            if not job.done.wait(limit_s):
                return
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()
        self._scribe.close()
        self._crossing.unpin()
        self._image.close()

    def _run(self) -> None:
        preemption.hold_back()
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
                job.snapshot.forget()
                job.done.set()

    def _touch(self) -> None:
        """Use every page of the memory once, unless it is in use already."""
        room_bytes, self._room_bytes = self._room_bytes, 0
        for at in range(0, room_bytes, TOUCHED_BYTES):
            with self._touching:
                if self._is_used or self._closing:
                    return
                try:
                    self._image.reserve(room_bytes)
                except StorageError:
                    return  # who saves is told
                torch.frombuffer(self._image.memory, dtype=torch.uint8)[at : at + TOUCHED_BYTES].zero_()
        with self._touching:
            if not (self._is_used or self._closing) and self._image.memory is not None:
                self._crossing.pin(self._image.memory, self._gpu)

    def _save(self, job: Job) -> None:
        job.released.wait()
        try:
            if not job.snapshot.copied.is_set():
                job.snapshot.copy_into(self._image)
            job.snapshot.arrive()
            if job.snapshot.is_stirred():
                self._take_at_once(CHANGES)
                raise MutatedDuringCopyError("the state changed while it was copied")
            job.snapshot.check_finite(job.parameters)
            job.loan = self._image.lend()
            job.finish(job, lambda sink: sink.pour(self._image, self._scribe.pour), lambda: self._check_whole(job))
        except (UnsupportedStateError, StorageError) as error:  # of copying: whoever writes has words of his own
            job.problem = self.slow_words = " ".join(str(error).split())
            self.is_unable = self.wants_again = True
        except MutatedDuringCopyError:
            job.problem, self.wants_again = self.slow_words, True
        except BaseException as error:  # noqa: BLE001 - a thread's error is nobody's: `wait` raises it where it is seen
            job.failure = error

    def _check_whole(self, job: Job) -> None:
        if not job.sealed.wait(SEALED_WITHIN_S):  # it may be long until the next update, and what wrote meanwhile has been counted by now
            self._seal(is_told=False)
        if job.is_torn:
            raise MutatedDuringCopyError("the state changed while it was copied")
