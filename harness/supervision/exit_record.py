"""Record how an attempt ends, in its end record, and print it for people.

The rank that has the first uncaught error records it. The record is created exclusively, so later
ones are ignored: the errors of the other ranks, which only report a lost peer, do not hide the
cause.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any

import harness.supervision.hang_report as hang_report
from harness import preemption
from harness.checkpoint import attempts
from harness.checkpoint.attempts import Attempt
from harness.distributed.ranks import World, is_lost_peer, last_collective, own_rank
from harness.errors import (
    EXIT_FINISHED,
    HarnessError,
    LostRankError,
    OvertakenError,
    StorageError,
    SupersededError,
    UsageError,
    report,
)
from harness.store import Store
from harness.supervision import launches
from harness.supervision.error_hints import hint
from harness.text import say

AFTER_OTHERS_S = 1.0  # head start of the rank that caused the failure
# Limit for the copy of a checkpoint in flight, and for its commit. torchrun kills after 30 s.
FINISH_S = 20.0
RECORD_S = 5.0  # retry limit for a record in a remote store
MOST_TRACE = 6000  # characters


class ExitRecord:
    """Recorder of how this process's attempt ends.

    A new instance installs itself as `sys.excepthook` and `threading.excepthook`. In a process that
    the program forks it records nothing.
    """

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._stores: tuple[Store, ...] = ()
        self._attempt: Attempt | None = None
        self._ended = set[str]()  # the stores that have the attempt's end record, ours or another
        self._world: World | None = None
        self.failed = False  # True once an uncaught error was seen
        self.step: Callable[[], int | None] = lambda: None  # returns the run's current step
        # Returns the last step that is complete.
        self._made: Callable[[], int | None] = lambda: None
        # Waits for a checkpoint in flight; takes the limit in seconds.
        self._finish: Callable[[float], object] = lambda limit_s: None
        self._default, self._default_of_threads = sys.excepthook, threading.excepthook
        self.take_hook()

    @property
    def is_here(self) -> bool:
        """Return whether this is the process that joined the run, not one that it has forked."""
        return os.getpid() == self._pid

    def take_hook(self) -> None:
        """Install this object's hooks as `sys.excepthook` and `threading.excepthook`.

        Call it again after the process group is joined, because torch then wraps this hook in its
        own. Torch's hook buffers stderr, and the buffer is lost when this hook ends the process.
        """
        sys.excepthook, threading.excepthook = self._on_error, self._on_thread_error

    def count(self, step: Callable[[], int], made: Callable[[], int]) -> None:
        """Take the step under way, and the last complete one, for records from these functions.

        Each thread keeps the excepthook that it was started under, and so keeps the functions
        alive.
        """
        self.step, self._made = step, made

    def watch(self, stores: tuple[Store, ...]) -> None:
        """Set the stores, before there is an attempt.

        An end is recorded for the launch, if a supervisor has started this process.
        """
        self._stores = stores

    def begun(
        self,
        stores: tuple[Store, ...],
        attempt: Attempt,
        world: World,
        finish: Callable[[float], object],
    ) -> None:
        """Set the attempt whose end is recorded from now on.

        `finish` is called before the record of a failure, with the seconds that it may take.
        """
        self._stores, self._attempt, self._world, self._ended = stores, attempt, world, set()
        self._finish = finish

    def left(self, say: Callable[[str], None], *, is_finishing: bool) -> None:
        """Handle a loop that was left before its end.

        Either the program has left it, or an error, which the excepthook records later. If no
        error follows until the process exits, the attempt is recorded as failed.

        Args:
            say: Prints a line to the user.
            is_finishing: Whether `run.finish()` was called.
        """
        if not self.failed and self.is_here:
            consequence = (
                "ends the run when the loop asks for its next batch: "
                "go on to there, without a break"
                if is_finishing
                else "would end the run"
            )
            message = (
                f"the loop was left at step {self.step()}: "
                f"nothing more is saved; run.finish() {consequence}"
            )
            say(f"harness: {message}")
            atexit.register(self._left, message)

    def _left(self, message: str) -> None:
        if not self.failed:
            self.record("failed", self._stores, error=message)

    def leave_alone(self) -> None:
        """End this process after a stop request, because the other ranks did not join.

        Any thread may call this. The exit code is 0.
        """
        say("harness: stopped before training began: the other ranks did not come; start again")
        self.record("stopped", self._stores)
        os._exit(EXIT_FINISHED)

    def record(self, why: str, stores: tuple[Store, ...], **details: Any) -> None:
        """Record the end of the attempt, or of a launch that has no attempt yet.

        Only the writer records, or any rank before the process group is joined. A store that fails
        is reported and not raised, because a resume depends on the checkpoints alone.

        Args:
            why: "finished", "stopped", "failed" or "superseded".
            stores: Stores that receive the record.
            details: Additional fields of the record.
        """
        if self._world is None or self._world.is_writer:
            self._create(why, stores, details)

    def _create(self, why: str, stores: tuple[Store, ...], details: dict[str, Any]) -> bool:
        """Create the record in each store; return whether this call created it in any of them."""
        made = False
        for store in stores if self.is_here else ():
            try:
                made = self._create_in(store.with_retry_limit(RECORD_S), why, details) or made
            except StorageError as error:
                say(f"harness: this end is not recorded: {error.what}", sys.stderr)
        return made

    def _create_in(self, store: Store, why: str, details: dict[str, Any]) -> bool:
        if self._attempt is not None:
            is_writer = self._world is not None and self._world.is_writer
            if str(store) in self._ended:
                return False  # the first record stays, so a second one need not be tried
            if store.is_local and not is_writer and not attempts.holds(store, self._attempt):
                return False  # another node's disk
            is_first = attempts.end(store, self._attempt, why, **details)
            self._ended.add(str(store))
            return is_first
        name = launches.own()
        if name is None:
            return False
        if why == "failed":
            return launches.failed(store, name, **details)
        return store.exists(launches.key(name)) and launches.end(store, name, why, **details)

    def _on_thread_error(self, args: threading.ExceptHookArgs) -> None:
        """End a program that is refused in a thread before training; others would wait for it."""
        refused = isinstance(args.exc_value, UsageError) and self._attempt is None
        if refused and args.exc_value is not None and not hasattr(sys, "ps1"):
            self._on_error(args.exc_type, args.exc_value, args.exc_traceback)
        else:
            self._default_of_threads(args)

    def _on_error(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        sys.excepthook, self.failed = self._default, True
        if not self.is_here:
            self._default(kind, error, trace)
            return
        self._finish(FINISH_S)
        if is_lost_peer(error):
            # The rank that caused this must record its error first. When torchrun stops the other
            # ranks, that rank has already ended, so the wait is over.
            until = time.monotonic() + AFTER_OTHERS_S
            while time.monotonic() < until and not preemption.requested():
                time.sleep(0.01)
            if not isinstance(error, LostRankError):
                error = LostRankError(
                    "another rank of this attempt is lost",
                    f"found: {str(error).splitlines()[0][:200]}",
                )
        why = "superseded" if isinstance(error, SupersededError) else "failed"
        lines = traceback.format_exception(kind, error, trace)
        details = {"step": self.step(), "made_step": self._made(), "rank": own_rank()}
        # The attempt already has its end record. Its launch may continue with another attempt.
        if isinstance(error, OvertakenError):
            report(error)
        elif isinstance(error, HarnessError):
            lost = {"lost": True} if isinstance(error, LostRankError) else {}
            made = self._create(
                why, self._stores, details | {"error": str(error), "code": error.exit_code} | lost
            )
            if not (made and launches.own()):  # else the supervisor prints it at the end
                report(error)
        else:
            hint_line = f"harness: hint: {advice}" if (advice := hint(error)) else ""
            trace_text = "".join(lines)[-MOST_TRACE:] + hint_line
            made = self._create(
                why, self._stores, details | {"error": lines[-1].strip(), "trace": trace_text}
            )
            say(
                f"harness: uncaught error on rank {own_rank()}: "
                f"{lines[-1].strip()}\n{hint_line}".rstrip(),
                sys.stderr,
            )
            if not (made and launches.own()):  # else the supervisor prints it at the end
                self._default(kind, error, trace)
            return
        sys.stdout.flush()
        os._exit(error.exit_code)  # a hook cannot choose the exit code otherwise

    def hung(self, activity: str, limit_s: float, stacks: str) -> None:
        """Print and record the stacks of this process, and write the hang report of all ranks.

        The watchdog calls this and ends the process afterwards.

        Args:
            activity: Work that exceeded its time limit.
            limit_s: The limit in seconds.
            stacks: Stacks of all threads, the main thread's last.
        """
        rank = own_rank()
        step = self.step()
        attempt = self._attempt
        place = hang_report.place(stacks)
        error = f"{activity} took longer than {limit_s:.0f} s" + (
            "" if place.waits else f": stuck in {place.description}"
        )
        say(
            f"harness: rank {rank} hangs at step {step}: {error}; its stacks:\n{stacks}", sys.stderr
        )
        say(
            "harness: if that is work and no hang: raise run.step_timeout_s, or run.timeout_s",
            sys.stderr,
        )
        line = hang_report.line(rank, step, error, stacks, last_collective())
        for store in self._stores if attempt else ():
            try:
                attempts.add_event(
                    store.with_retry_limit(RECORD_S),
                    attempt,  # type: ignore[arg-type]
                    rank,
                    line,
                )
            except (StorageError, FileExistsError) as problem:
                say(
                    "harness: not recorded: "
                    f"{problem.what if isinstance(problem, StorageError) else problem}",
                    sys.stderr,
                )
        if place.waits:
            time.sleep(AFTER_OTHERS_S)  # the rank that is stuck must create the record first
        details = {"error": error, "rank": rank, "step": step, "made_step": self._made()}
        self._create("failed", self._stores, details | {"trace": stacks[-MOST_TRACE:]})
        if attempt is not None and self._world is not None:
            summary, where = hang_report.report(self._stores, attempt, self._world.size, RECORD_S)
            if where:
                say(f"harness: {summary}; all stacks: {where}", sys.stderr)
