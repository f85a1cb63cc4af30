"""Commit the checkpoints of an attempt and prune old ones; for the writer (rank 0)."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from harness import preemption, state
from harness.checkpoint import format as fmt
from harness.checkpoint import retention
from harness.checkpoint.catalog import going_on_from
from harness.checkpoint.commit import About, commit
from harness.config import stored_form
from harness.errors import HarnessError, SaveError, StorageError
from harness.saving.current_attempt import CurrentAttempt, Parts
from harness.saving.save_job import Job
from harness.sharding.save_protocols import WAIT, Request
from harness.sharding.sharded_save import sharded_save
from harness.state import Captured
from harness.store import Sink, Store

SAVE_S = 30.0  # retry limit of one request of a save that training may have to wait for


class Checkpointer(CurrentAttempt):
    """The checkpoints of the attempt of this process, and everything else that it writes.

    Args:
        parts: what the attempt is made of.
        at_save: called in the background with the step of each checkpoint that is about to be
            written.
    """

    def __init__(self, parts: Parts, at_save: Callable[[int], None] = lambda step: None) -> None:
        super().__init__(parts)
        self.save_s = 0.0  # how long the last save took, in seconds
        self._at_save, self._verified = at_save, self._resume_point.read_from(0)
        self._save_status = (
            "nothing saved yet" if self.saved_step is None else f"saved step {self.saved_step}"
        )
        self._committed, self._has_room, self._said = False, False, {""}

    @property
    def status_line(self) -> str:
        """Return the state of saving and uploading, for the progress line."""
        return (
            f"{self._save_status}, {self._uploader.status_line}"
            if self._uploader and len(self.stores) > 1
            else self._save_status
        )

    @property
    def to_save_s(self) -> float:
        """Return how long a save would take now, after the one in flight, in seconds."""
        return self.save_s * (2 if self.background.is_busy else 1)

    @property
    def upload_s(self) -> float:
        """Return how long the last upload took, in seconds."""
        return self._uploader.upload_s if self._uploader else 0.0

    @property
    def is_saving(self) -> bool:
        """Return whether a save is in flight that is not for the memory tier."""
        return self.background.is_busy and not self.tier.is_writing

    def failure(self, problem: str, remedy: str) -> HarnessError:
        """Return the error that ends the run after a failed save.

        It is a SaveError if the store is a disk, and a StorageError if it is a remote store, which
        may be reachable again later.
        """
        kind = SaveError if self.store.is_local else StorageError
        return kind(problem, self._save_status, remedy)

    def is_due(self, left_s: float) -> bool:
        """Return whether to save now: by the clock, or because the resume point is gone.

        Also if a background task has failed, as `save` raises or reports that, and if the resume
        point is only in memory. `left_s` is the time until the end of the run, in seconds.
        """
        if (
            self.background.has_failed
            or self.background.must_repeat
            or (self._resume_point.in_memory and not self._committed)
        ):
            return True  # `save` raises or reports what failed
        if self.save_policy.is_due(left_s, self.save_s, self.is_saving):
            return True
        if self.recomputed.has_failed or (
            self._uploader and (self._uploader.has_failed or self._uploader.origin_is_gone)
        ):
            return True  # `save` raises what failed
        if self.origin is None or self._committed or not self._origin_is_here:
            return False
        # Until the first commit only the resume point holds the state of the run. A stale process
        # that still runs may have deleted it.
        with contextlib.suppress(StorageError):
            return not self.store.exists(self.origin.key)
        return False

    def save(
        self,
        capture: Callable[[], Captured],
        about: Callable[[], About],
        give_up: Callable[[], object],
        *,
        wait: bool,
    ) -> bool:
        """Begin to commit a checkpoint, after waiting for the save in flight.

        Collective: every rank must call it.

        Args:
            capture: returns the state to save; called on the writer, and where ranks hold parts.
            about: returns the manifest entries that are not part of the state; for the writer.
            give_up: see `begin`.
            wait: wait until the checkpoint is committed.

        Returns:
            False if there is no checkpoint although training may go on; `status_line` holds the
            reason.

        Raises:
            SupersededError: a newer attempt has begun. This and the next error may come from the
                previous save.
            NonFiniteError: a parameter is NaN or infinite.
            UsageError: recomputed steps differ and the settings end the run, or the state cannot be
                loaded again.
        """
        began_at = time.perf_counter()
        if self.sharded:
            reply = self.sharded.save(self, Request(capture, about, began_at, wait), give_up)
        else:
            begin = partial(self._begin, capture, about, began_at, wait)
            reply = self.world.on_writer(begin, give_up=give_up)
        self.save_policy.begun()
        return self._apply_reply(reply)

    def settle(self, give_up: Callable[[], object]) -> None:
        """Wait until the save in flight is committed or has failed.

        `saved_step` is then the newest committed step. Raises the errors of a save, as `save` does.
        Collective: every rank must call it.
        """
        self._apply_reply(
            self.world.on_writer(lambda: self.reply(self.background.wait()), give_up=give_up)
            if self.sharded is None
            else self.sharded.settle(self, give_up)
        )

    def _apply_reply(self, reply: list[Any]) -> bool:
        """Store the writer's reply on the other ranks; return whether the save had no problem.

        The state of the writer itself may be newer than its reply.
        """
        problem, saved_step, status_line = reply
        if not self.world.is_writer:
            self.saved_step, self._save_status = saved_step, status_line
        return not problem

    def reply(self, problem: str) -> list[Any]:
        """Return what the other ranks learn of a save, with its problem or ""."""
        return [problem, self.saved_step, self._save_status]

    def _begin(
        self,
        capture: Callable[[], Captured],
        about: Callable[[], About],
        began_at: float,
        wait: bool,
    ) -> list[Any]:
        self.background.wait()
        self.check()
        captured, details, problem = capture(), about(), ""
        self._rehearsal.take(captured)
        if not self.background.is_unable:
            self.background.start(captured, details, began_at, self._finish)
            problem = self.background.wait() if wait else ""
        self.say_once(WAIT.format(reason) if (reason := self.background.slow_reason) else "")
        # There is no memory for a copy of the state, or the state holds more than plain tensors.
        if self.background.is_unable:
            self.background.saved_otherwise()
            state.check_finite(captured.tracked)
            problem = self.commit(captured.fill(), details, began_at)
        return self.reply(problem)

    def check(self) -> None:
        """Raise the error of the background work that ends the run, if there is one."""
        self.recomputed.check()
        if self._uploader:
            self._uploader.check()

    def say_once(self, text: str) -> None:
        """Print a line, once; "" for nothing."""
        if text not in self._said:
            self._said.add(text)
            self._say(f"harness: {text}")

    def _finish(self, job: Job, write: Callable[[Sink], None], check: Callable[[], None]) -> None:
        """Commit a copied state; called in the background."""
        assert self.attempt is not None and job.lease is not None
        key = fmt.data_key(job.head["step"], self.attempt.number)
        is_final = job.about.final is not None
        with (
            self._uploader.ahead(key, job.lease, is_final=is_final)
            if self._uploader
            else contextlib.nullcontext()
        ):
            job.problem = self.commit(
                job.head, job.about, job.began_at, write, check, job.costs, job.snapshot.places
            )

    def commit(
        self,
        payload: Mapping[str, Any],
        about: About,
        began_at: float,
        write: Callable[[Sink], None] | None = None,
        check: Callable[[], None] = lambda: None,
        costs: Callable[[], dict[str, float]] | None = None,
        places: Mapping[int, int] | None = None,
    ) -> str:
        """Commit a checkpoint and prune old ones, in any thread; return "" or why there is none.

        Args:
            payload: the state, or only what the manifest repeats of it if `write` is given.
            about: the manifest entries that are not part of the state.
            began_at: when the save began, by `time.perf_counter`.
            write: writes the data file; None to write `payload` with `torch.save`.
            check: called when the data is durable; its errors pass through.
            costs: returns what the save has cost, for the event; None if training has waited.
            places: where each tensor's memory begins in the file, by address; for the rehearsal.
        """
        assert self.attempt is not None and self.event_log is not None
        self._at_save(payload["step"])
        store = self.store_for(about)
        try:
            manifest = commit(store, self.attempt, payload, about, write, check)
        except SaveError as error:
            return self.not_saved(payload["step"], str(error), is_final=about.final is not None)
        self.save_s = time.perf_counter() - began_at
        self.saved_step, self._committed = manifest.step, True
        self._save_status = f"saved step {manifest.step} in {self.save_s:.2g} s"
        self._verified.add(manifest.name)
        self._known.wrote(manifest)
        self.tier.drop(before=(manifest.attempt, manifest.step + 1))
        written = {"size_bytes": manifest.size_bytes, "seconds": round(self.save_s, 6)}
        written |= costs() if costs else {"blocked_s": written["seconds"]}
        self.event_log.write("saved", step=manifest.step, checkpoint=manifest.name, **written)
        if self._uploader:
            self._uploader.offer(manifest)
        self._prune(store)
        self._rehearsal.begin(self.store, manifest, places or {})
        return ""

    def store_for(self, about: About) -> Store:
        """Return the store of a save; only for the last one are requests retried for long."""
        limit_s = self.settings.wait_s if about.final else min(SAVE_S, self.settings.wait_s)
        return self.store.with_retry_limit(limit_s)

    def not_saved(self, step: int, error: str, *, is_final: bool = False) -> str:
        """Report that a save has failed and return why; on the writer."""
        self.note("not_saved", step=step, error=error)
        self._save_status = " ".join(error.split("\n"))
        if not is_final:
            self._say(f"harness: NOT SAVED, training goes on: {self._save_status}")
        return self._save_status

    def _prune(self, store: Store) -> None:
        assert self.attempt is not None and self.event_log is not None
        policy = self.settings.policy if store.is_local else self.settings.remote_policy
        pinned = self._uploader.pinned() if self._uploader else ()
        try:
            gone = retention.apply(store, self.attempt, self._verified, policy, pinned, self._known)
        except StorageError as error:
            self.event_log.write("not_deleted", error=str(error))
            return
        if gone:
            self.event_log.write("deleted", names=gone)
        if self._uploader:
            self._uploader.forget(gone)

    def look_at(self, tracked: Mapping[str, Any]) -> None:
        """Note whether tracked state is sharded. Raises UsageError if it cannot be saved so."""
        self.sharded = sharded_save(tracked, self.world, self.stores, self.settings)
        self.tier.save_by_shards(self.world, self, self.sharded)

    def watch_updates(self, tracked: Mapping[str, Any]) -> None:
        """Finish each copy before the optimizers change the state."""
        if self.world.is_writer or self.sharded:
            self.background.watch_updates(tracked)

    def at_boundary(self, tracked: Mapping[str, Any]) -> None:
        """Count a finished step for the save interval, and check a complete copy for changes.

        After the first step all state exists: rank 0 then reserves the memory for saves.
        """
        self.save_policy.step(self.is_saving, self.save_s)
        if not self._has_room and (self.world.is_writer or self.sharded):
            self._has_room = True
            size_bytes = state.size_bytes(tracked)
            if self.sharded is None or self.sharded.has_room(size_bytes):
                self.background.make_room(size_bytes, self.world.device)
            self.recomputed.look_at(tracked)
        self.background.at_boundary()

    def about(
        self,
        classes: dict[str, str],
        metrics: dict[str, float],
        final: dict[str, int | None] | None,
    ) -> About:
        """Return the manifest entries that are not part of the state.

        Args:
            classes: the class names of the tracked objects.
            metrics: the metrics that were measured at this step.
            final: what the run was finished for, in epochs and steps; None if it is not finished.
        """
        lineage, digest = going_on_from(self.origin), stored_form.digest(self.settings.config)
        return About(
            self.world.size, lineage, classes, digest, final, metrics, read_back=not self._committed
        )

    def close(self) -> None:
        """End the background work, also after an error; what is committed is still uploaded."""
        with self.sharded or contextlib.nullcontext():
            super().close()

    def best_file(self) -> str | None:
        """Return the path or URL of the best checkpoint so far, or None.

        Collective: every rank must call it.

        Raises:
            StorageError: a store cannot be listed or read.
        """
        return self.world.on_writer(
            lambda: retention.best_file(self.stores, self.settings.policy),
            give_up=preemption.requested,
        )
