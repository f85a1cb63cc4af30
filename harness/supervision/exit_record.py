"""How an attempt ends: in its end record, and in words for people.

An uncaught error is recorded by the rank that has it first. The record is created exclusively, so the first word stands: what
the other ranks then see, a peer that is gone, does not hide the cause.
"""

from __future__ import annotations

import atexit
import os
import sys
import time
import traceback
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any

import harness.supervision.hang_report as hang_report
from harness import preemption
from harness.checkpoint import attempts
from harness.checkpoint.attempts import Attempt
from harness.distributed.ranks import World, is_lost_peer, last_collective, own_rank
from harness.errors import EXIT_FINISHED, HarnessError, LostRankError, OvertakenError, StorageError, SupersededError, report
from harness.store import Store
from harness.supervision import launches
from harness.supervision.error_hints import hint
from harness.text import say

AFTER_OTHERS_S = 1.0
FINISH_S = 20.0  # for how long a checkpoint that is on its way is waited for; torchrun kills after 30 s
RECORD_S = 5.0  # for how long a remote store is asked to take the record
MOST_TRACE = 6000  # characters


class ExitRecord:
    """Watches over the end of this process's attempt, from now on."""

    def __init__(self) -> None:
        self._stores: tuple[Store, ...] = ()
        self._attempt: Attempt | None = None
        self._world: World | None = None
        self.failed = False
        self.step: Callable[[], int | None] = lambda: None  # where the run stands
        self.finish: Callable[[float], object] = lambda limit_s: None  # what may be on its way to the disk
        self._default = sys.excepthook
        self.take_hook()

    def take_hook(self) -> None:
        """Be the one who is told of an uncaught error. Joining a process group puts torch's hook around ours, and what we print
        is lost in its buffer when we leave the process from there: then take it back."""
        sys.excepthook = self._on_error

    def of(self, run: Any) -> None:
        """Whose `step` is told. The run is not kept for that: each thread keeps the hook that it was started under."""
        kept = weakref.ref(run)
        self.step = lambda: getattr(kept(), "step", None)

    def watch(self, stores: tuple[Store, ...]) -> None:
        """From here on there is a place for a record, if a supervisor has started this process."""
        self._stores = stores

    def begun(self, stores: tuple[Store, ...], attempt: Attempt, world: World) -> None:
        """From here on there is an attempt to record the end of."""
        self._stores, self._attempt, self._world = stores, attempt, world

    def left(self, say: Callable[[str], None], *, is_finishing: bool) -> None:
        """The loop was broken off, by the program's own wish or by an error, which is told of later. If none is, that was the end."""
        if not self.failed:
            what = (
                "ends the run when the loop asks for its next batch: go on to there, without a break"
                if is_finishing
                else "would end the run"
            )
            words = f"the loop was left at step {self.step()}: nothing more is saved; run.finish() {what}"
            say(f"harness: {words}")
            atexit.register(self._left, words)

    def _left(self, words: str) -> None:
        if not self.failed:
            self.record("failed", self._stores, error=words)

    def leave_alone(self) -> None:
        """End this process, which was asked to stop and waits for ranks that do not come. From any thread."""
        say("harness: stopped before training began: the other ranks did not come; start again")
        self.record("stopped", self._stores)
        os._exit(EXIT_FINISHED)

    def record(self, why: str, stores: tuple[Store, ...], **details: Any) -> None:
        """Record the end, of the attempt or of a launch that got to none, on the writer. Nothing is raised: the checkpoints tell
        what can be gone on from."""
        if self._world is None or self._world.is_writer:
            self._create(why, stores, details)

    def _create(self, why: str, stores: tuple[Store, ...], details: dict[str, Any]) -> bool:
        """Whether the record is there, and ours."""
        made = False
        for store in stores:
            try:
                made = self._create_in(store.patient(RECORD_S), why, details) or made
            except StorageError as error:
                say(f"harness: this end is not recorded: {error.what}", sys.stderr)
        return made

    def _create_in(self, store: Store, why: str, details: dict[str, Any]) -> bool:
        if self._attempt is not None:
            is_writer = self._world is not None and self._world.is_writer
            if store.is_local and not is_writer and not attempts.holds(store, self._attempt):
                return False  # another node's disk
            return attempts.end(store, self._attempt, why, **details)
        name = launches.own()
        if name is None:
            return False
        if why == "failed":
            return launches.failed(store, name, **details)
        return store.exists(launches.key(name)) and launches.end(store, name, why, **details)

    def _on_error(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        sys.excepthook, self.failed = self._default, True
        self.finish(FINISH_S)
        if is_lost_peer(error):
            until = time.monotonic() + AFTER_OTHERS_S  # whoever really failed has the first word,
            while time.monotonic() < until and not preemption.requested():  # and has ended when torchrun stops the others
                time.sleep(0.01)
            if not isinstance(error, LostRankError):
                error = LostRankError("another rank of this attempt is lost", f"found: {str(error).splitlines()[0][:200]}")
        why = "superseded" if isinstance(error, SupersededError) else "failed"
        lines = traceback.format_exception(kind, error, trace)
        details = {"step": self.step(), "rank": own_rank()}
        if isinstance(error, OvertakenError):  # the attempt has its end record; its launch may go on, with another attempt
            report(error)
        elif isinstance(error, HarnessError):
            lost = {"lost": True} if isinstance(error, LostRankError) else {}
            made = self._create(why, self._stores, details | {"error": str(error), "code": error.exit_code} | lost)
            if not (made and launches.own()):  # else the supervisor shows it, last
                report(error)
        else:
            told = f"harness: hint: {words}" if (words := hint(error)) else ""
            trace_text = "".join(lines)[-MOST_TRACE:] + told
            made = self._create(why, self._stores, details | {"error": lines[-1].strip(), "trace": trace_text})
            say(f"harness: uncaught error on rank {own_rank()}: {lines[-1].strip()}\n{told}".rstrip(), sys.stderr)
            if not (made and launches.own()):  # else the supervisor shows it, last
                self._default(kind, error, trace)
            return
        sys.stdout.flush()
        os._exit(error.exit_code)  # a hook cannot choose the exit code otherwise

    def hung(self, what: str, limit_s: float, stacks: str) -> None:
        """Say and record where this process stands, and where the others do; for its watchdog, which ends it then."""
        rank, step, attempt, found = own_rank(), self.step(), self._attempt, hang_report.place(stacks)
        error = f"{what} took longer than {limit_s:.0f} s" + ("" if found.waits else f": stuck in {found.words}")
        say(f"harness: rank {rank} hangs at step {step}: {error}; its stacks:\n{stacks}", sys.stderr)
        say("harness: if that is work and no hang: raise run.step_timeout_s, or run.timeout_s", sys.stderr)
        line = hang_report.line(rank, step, error, stacks, last_collective())
        for store in self._stores if attempt else ():
            try:
                attempts.add_event(store.patient(RECORD_S), attempt, rank, line)  # type: ignore[arg-type]
            except (StorageError, FileExistsError) as problem:
                say(f"harness: not recorded: {problem.what if isinstance(problem, StorageError) else problem}", sys.stderr)
        if found.waits:
            time.sleep(AFTER_OTHERS_S)  # the one that hangs has the first word
        self._create("failed", self._stores, {"error": error, "rank": rank, "step": step, "trace": stacks[-MOST_TRACE:]})
        if attempt is not None and self._world is not None:
            words, where = hang_report.report(self._stores, attempt, self._world.size, RECORD_S)
            say(f"harness: {words}; all stacks: {where}", sys.stderr)
