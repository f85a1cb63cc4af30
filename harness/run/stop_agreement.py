"""Agreement of all ranks, at a step boundary, on when to save and when to stop.

Only some ranks may have received a signal or a request.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from typing import Any

from harness import preemption
from harness.arguments import Settings
from harness.distributed.ranks import World
from harness.errors import StorageError
from harness.monitoring.step_timeouts import StepTimeouts
from harness.monitoring.throughput import Throughput
from harness.preemption import deadline
from harness.saving.checkpointer import Checkpointer
from harness.store import Store
from harness.supervision import control_requests
from harness.supervision.restart_policy import ASKED

AGREE_EVERY_S, MOST_STEPS = 0.25, 100  # a limit in steps, too: steps may become slower
ALONE_EVERY_S = 0.01
LOOK_LOCAL_S, LOOK_REMOTE_S = 1.0, 5.0  # how often requests are polled
TIME_LIMIT = "time limit"


class StopAgreement:
    """The requests to save or to stop this run, and the agreement of all ranks on them.

    Requests come from signals, control requests in the stores, the time limit of the job, and the
    spot notice of a cloud.

    Args:
        world: The ranks of this attempt.
        settings: Validated arguments of `harness.init`.
        checkpointer: Reports whether a save is due, and how long a save and an upload take; records
            the end of the attempt.
        step_timeouts: Reports how long a step takes.
        throughput: Throughput, from which the steps until the next agreement are computed.
        clock: Function that returns the current time in seconds.
    """

    def __init__(
        self,
        world: World,
        settings: Settings,
        checkpointer: Checkpointer,
        step_timeouts: StepTimeouts,
        throughput: Throughput,
        clock: Callable[[], float],
    ) -> None:
        self.world, self.settings = world, settings
        self._checkpointer, self._step_timeouts = checkpointer, step_timeouts
        self._throughput = throughput
        self.deadline = deadline.Deadline(settings.grace_s, clock=clock)
        self._next, self._interval = 0, 1
        self._held_back = 0  # steps by which a stop was put off, until the state can be saved
        self._clock, self._looks_at_s = clock, 0.0
        self._saves_asked = threading.Event()
        self._over = threading.Event()
        self._run = preemption.current_run()

    def listen(self, attempt: int) -> None:
        """Start to look for requests to save or to stop that are no signals.

        One rank of each node polls for the cloud's spot notice. Rank 0 polls the stores, and asks
        SLURM for the time limit of the job.
        """
        if self.settings.notices and os.environ.get("LOCAL_RANK", "0") == "0":
            from harness.preemption import spot_notices

            spot_notices.watch(self.settings.notices, preemption.request, self._saves_asked.set)
        if not self.world.is_writer:
            return
        self.deadline.ask()
        for store in self._checkpointer.stores:
            threading.Thread(
                target=self._look, args=(store, attempt), daemon=True, name="requests"
            ).start()

    def close(self, *, has_stopped: bool = False) -> None:
        """Stop polling: the run is over, and `has_stopped` if it was asked to stop and has."""
        self._over.set()
        preemption.over(self._run, has_acted=has_stopped)

    def _look(self, store: Store, attempt: int) -> None:
        seen: set[str] = set()
        retrying = store.with_retry_limit(LOOK_REMOTE_S, self._over.is_set)
        while not self._over.wait(LOOK_LOCAL_S if store.is_local else LOOK_REMOTE_S):
            with contextlib.suppress(StorageError):  # saves and uploads report store errors
                for key, request in control_requests.pending(retrying, attempt).items():
                    if key not in seen:
                        seen.add(key)
                        self._saves_asked.set() if request == "save" else preemption.request(ASKED)

    def agree(self, step: int, end_step: int | None) -> tuple[bool, bool, bool]:
        """Agree on whether to save and whether to stop, about every `AGREE_EVERY_S` seconds.

        In the steps between, nothing is communicated. A single rank looks for requests in every
        step, and at the clocks every `ALONE_EVERY_S` seconds.

        Collective: every rank must call it.

        Args:
            step: Number of the step that was just made.
            end_step: Number of the last step of the run, or None if unknown.

        Returns:
            Whether the ranks communicated in this step, whether all stop now, and whether all save
            now.
        """
        if step < self._next:
            return False, False, False
        if self.world.size == 1 and self._may_wait():
            return False, False, False
        checkpointer, throughput = self._checkpointer, self._throughput
        interval = (
            1
            if self.world.size == 1
            else min(throughput.steps_within(AGREE_EVERY_S, step), 2 * self._interval, MOST_STEPS)
        )
        saving = self._saves_asked.is_set()
        self._saves_asked.clear()
        if self.world.is_writer:
            saving = checkpointer.is_due(throughput.left_s(step, end_step)) or saving
            near_s = self.settings.margin_s + self._needed_s
            if preemption.requested() is None and self.deadline.is_near(near_s):
                preemption.request(TIME_LIMIT)
        is_asked, sharded = preemption.requested() is not None, checkpointer.sharded
        proposal = [
            int(is_asked),
            int(saving),
            interval if self.world.is_writer else 0,
            int(is_asked and sharded is not None and sharded.must_go_on()),
            int(self.world.is_writer and self.deadline.left_s() < self._needed_s),
        ]
        stopping, save, interval, goes_on, is_last = self.world.agree(proposal)
        if stopping and goes_on and not is_last and self._held_back < MOST_STEPS:
            self._held_back, stopping, interval = self._held_back + 1, 0, 1
        self._next, self._interval = step + interval, interval
        return True, bool(stopping), bool(save)

    @property
    def _needed_s(self) -> float:
        """Return how long one more step, a save and an upload take, in seconds, with a margin."""
        of_save_s = self._checkpointer.to_save_s + self._checkpointer.upload_s
        return deadline.SAFETY * (self._step_timeouts.longest_s + of_save_s)

    def _may_wait(self) -> bool:
        """Return whether a single rank has no request, and has looked at the clocks just now."""
        now = self._clock()
        if (
            now < self._looks_at_s
            and preemption.requested() is None
            and not self._saves_asked.is_set()
        ):
            return True
        self._looks_at_s = now + ALONE_EVERY_S
        return False

    def agree_at_once(self) -> bool:
        """Return whether any rank was asked to stop. Collective: every rank must call it."""
        return bool(self.world.agree([int(preemption.requested() is not None)])[0])

    def stop(self, step: int, save: Callable[[], bool], say: Callable[[str], None]) -> None:
        """Save if there is time, and leave on all ranks.

        Collective: every rank must call it.

        Args:
            step: Number of the last step that was made; 0 if there was none.
            save: Saves this step and waits for it.
            say: Prints a line on the writer.

        Raises:
            SystemExit: With code 0, if everything is saved or there was nothing to save.
            SaveError: The state could not be saved.
            StorageError: The same, if there is only a remote store; or the upload is incomplete.
        """
        checkpointer = self._checkpointer
        names = sorted(
            {name for requests in self.world.gather(preemption.requests()[:4]) for name in requests}
        )
        has_remote = len(checkpointer.stores) > 1
        plan = deadline.plan(
            self.deadline.left_s(),
            checkpointer.save_s,
            checkpointer.upload_s,
            has_remote=has_remote,
            is_scratch=self.settings.is_scratch,
        )
        if plan.message:
            say(f"harness: {plan.message}")
        if (
            step not in (0, checkpointer.saved_step)
            and self.world.agree([int(plan.save and self.world.is_writer)])[0]
        ):
            save()
        saved, by = step in (0, checkpointer.saved_step), "/".join(names)
        details = _causes(names) | {"saved": saved, "plan": plan.message or None}
        checkpointer.end(
            "stopped", preemption.requested, step=step, limit_s=self.deadline.left_s, **details
        )
        if not saved:
            raise checkpointer.failure(
                f"stopped by {by} at step {step}, and not saved",
                "Start again: the previous checkpoint is whole.",
            )
        outcome = "everything saved" if step else "before there was anything to save"
        self.leave(f"stopped by {by} at step {step}, {outcome}; start again to go on", say)

    def too_late(self) -> str:
        """Return an addition to the message of the run's end, if a signal came too late for it."""
        late = preemption.requested() or ""
        text = f"; {late} came too late to stop it: send it again to end the program"
        return text if late.startswith("SIG") else ""

    def leave(self, message: str, say: Callable[[str], None]) -> None:
        """Leave: raise SystemExit(0) on all ranks. Collective: every rank must call it."""
        say(f"harness: {message}")
        self.world.agree([0])  # all ranks leave together, after the writer has printed
        self.world.leave()
        self.close(has_stopped=True)
        raise SystemExit(0)


def _causes(names: list[str]) -> dict[str, Any]:
    """Return the details of an end record that tell who asked for the stop: signals, or others."""
    others = [name for name in names if not name.startswith("SIG")]
    return {
        "signals": [name for name in names if name.startswith("SIG")],
        "by": ASKED if ASKED in others else next(iter(others), None),
    }
