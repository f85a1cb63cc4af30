"""When all ranks save, and when all leave: what only some may have heard of is agreed on at a step boundary."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Sequence
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

AGREE_EVERY_S, MOST_STEPS = 0.25, 100  # steps may become slower after they were counted
LOOK_LOCAL_S, LOOK_REMOTE_S = 1.0, 5.0  # how often requests are looked for
TIME_LIMIT = "time limit"


class StopAgreement:
    """What asks this run to save or to stop: signals, requests in its stores, the job's time limit, a cloud's notice."""

    def __init__(self, world: World, settings: Settings, clock: Callable[[], float]) -> None:
        self.world, self.settings = world, settings
        self.deadline = deadline.Deadline(settings.grace_s, clock=clock)
        self._next, self._interval = 0, 1
        self._saves_asked = threading.Event()
        self._over = threading.Event()

    def listen(self, stores: Sequence[Store], attempt: int) -> None:
        """Begin to look for what comes without a signal."""
        if self.settings.notices and os.environ.get("LOCAL_RANK", "0") == "0":
            from harness.preemption import spot_notices

            spot_notices.watch(self.settings.notices, preemption.request)
        if not self.world.is_writer:
            return
        self.deadline.ask()
        for store in stores:
            threading.Thread(target=self._look, args=(store, attempt), daemon=True, name="requests").start()

    def close(self) -> None:
        """Look no more."""
        self._over.set()

    def _look(self, store: Store, attempt: int) -> None:
        seen: set[str] = set()
        patient = store.patient(LOOK_REMOTE_S, self._over.is_set)
        while not self._over.wait(LOOK_LOCAL_S if store.is_local else LOOK_REMOTE_S):
            with contextlib.suppress(StorageError):  # saving and uploading say what is wrong with the store
                for key, what in control_requests.pending(patient, attempt).items():
                    if key not in seen:
                        seen.add(key)
                        self._saves_asked.set() if what == "save" else preemption.request(ASKED)

    def agree(self, step: int, end_step: int | None, pace: Throughput, saver: Checkpointer, watch: StepTimeouts) -> tuple[bool, bool, bool]:
        """Whether the ranks have met in this step, whether all stop now, whether all save now. Collective: every rank must call it."""
        if step < self._next:
            return False, False, False
        interval = 1 if self.world.size == 1 else min(pace.steps_within(AGREE_EVERY_S, step), 2 * self._interval, MOST_STEPS)
        saving = False
        if self.world.is_writer:
            saving = saver.is_due(pace.left_s(step, end_step)) or self._saves_asked.is_set()
            self._saves_asked.clear()
            needed_s = watch.longest_s + saver.to_save_s + saver.upload_s  # a step, a save, an upload, and gone
            if preemption.requested() is None and self.deadline.is_near(self.settings.margin_s + deadline.SAFETY * needed_s):
                preemption.request(TIME_LIMIT)
        words = [int(preemption.requested() is not None), int(saving), interval if self.world.is_writer else 0]
        stopping, save, interval = self.world.agree(words)
        self._next, self._interval = step + interval, interval
        return True, bool(stopping), bool(save)

    def agree_at_once(self) -> bool:
        """Whether any rank was asked to stop. Collective: every rank must call it."""
        return bool(self.world.agree([int(preemption.requested() is not None)])[0])

    def stop(self, saver: Checkpointer, step: int, save: Callable[[], bool], say: Callable[[str], None]) -> None:
        """Leave, on all ranks, with the state saved if there is time. Raises SystemExit(0), or SaveError. Collective: every rank must
        call it."""
        names = sorted({name for found in self.world.gather(preemption.requests()[:4]) for name in found})
        has_remote = len(saver.stores) > 1
        plan = deadline.plan(
            self.deadline.left_s(), saver.save_s, saver.upload_s, has_remote=has_remote, is_scratch=self.settings.is_scratch
        )
        if plan.words:
            say(f"harness: {plan.words}")
        if step not in (0, saver.saved_step) and self.world.agree([int(plan.save and self.world.is_writer)])[0]:
            save()
        saved, by = step in (0, saver.saved_step), "/".join(names)
        signals = [name for name in names if name.startswith("SIG")]
        others = [name for name in names if not name.startswith("SIG")]
        details: dict[str, Any] = {
            "saved": saved,
            "signals": signals,
            "by": ASKED if ASKED in others else next(iter(others), None),
            "plan": plan.words or None,
        }
        saver.end("stopped", preemption.requested, step=step, limit_s=self.deadline.left_s, **details)
        if not saved:
            raise saver.failure(f"stopped by {by} at step {step}, and not saved", "Start again: the previous checkpoint is whole.")
        what = "everything saved" if step else "before there was anything to save"
        self.leave(f"stopped by {by} at step {step}, {what}; start again to go on", say)

    def leave(self, words: str, say: Callable[[str], None]) -> None:
        """Raises SystemExit(0), on all ranks together. Collective: every rank must call it."""
        say(f"harness: {words}")
        self.world.agree([0])  # all leave together, after the writer has said all
        self.world.leave()
        raise SystemExit(0)
