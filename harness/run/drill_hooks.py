"""Hooks for a run under `harness drill`: redirect its stores, trace each step, wait for faults.

    HARNESS_REDIRECT=DIR    The stores of the run are DIR/run and, if the program names a remote,
                            DIR/remote, whatever directory and remote the program names. Trackers
                            and cloud notices (log_to, notices) are off.
    HARNESS_DRILL=1         Set beside HARNESS_REDIRECT, so that a program can detect a drill.
                            DIR/plan.json holds the last step, the save interval and the faults.

Each process writes DIR/traces-TIME-RANK.jsonl: the attempt that it belongs to, and for each step
digests of its samples, the batch, the logged loss, the generators, and all tracked state. When a
fault is due, the writer creates DIR/reached-N.json. At the end of that step it waits for DIR/go-N,
or until the fault ends it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness import state
from harness.arguments import Settings
from harness.data.fingerprint import digest_into
from harness.data.plan import Share
from harness.distributed.ranks import World
from harness.supervision.launches import REDIRECT
from harness.tracking.tensor_leaves import leaves_of

DRILL, PLAN = "HARNESS_DRILL", "plan.json"
RUN, REMOTE = "run", "remote"
MOST_BYTES = 64 << 20  # of state to digest in each step; larger state is digested less often
WAITS_S = 60.0  # the longest wait for `harness drill` to cause the fault


def redirected(
    directory: str | Path | None, remote: str | None, settings: Settings
) -> tuple[str | Path | None, str | None, Settings]:
    """Return the stores and settings of the run: the program's own, or those of a drill."""
    if REDIRECT not in os.environ:
        return directory, remote, settings
    folder = Path(os.environ[REDIRECT]).absolute()
    every_steps = settings.save_every_steps or plan().get("save_every_steps")
    settings = dataclasses.replace(settings, log_to=(), notices=None, save_every_steps=every_steps)
    return str(folder / RUN), None if remote is None else f"file://{folder / REMOTE}", settings


def plan() -> dict[str, Any]:
    """Return the plan of `harness drill` for this run; {} without a drill."""
    if DRILL not in os.environ or REDIRECT not in os.environ:
        return {}
    return json.loads(Path(os.environ[REDIRECT], PLAN).read_text())  # type: ignore[no-any-return]


class Traces:
    """The traces that this process writes for `harness drill`; without a drill, nothing."""

    def __init__(self, world: World) -> None:
        self._plan = plan()
        self.is_on = bool(self._plan)
        if not self.is_on:
            return
        self.folder, self._is_writer = Path(os.environ[REDIRECT]), world.is_writer
        self._file = (self.folder / f"traces-{time.time_ns()}-{world.rank}.jsonl").open(
            "a", buffering=1
        )
        self._every, self._step_s, self._began, self._is_first = 1, 0.0, time.monotonic(), True
        self._waits_for: int | None = None
        self._is_hurt = False  # at most one fault per process
        self._write(pid=os.getpid(), rank=world.rank, writes=world.is_writer)

    def _write(self, **fields: Any) -> None:
        self._file.write(json.dumps({"time": time.time()} | fields) + "\n")

    def end_step(self, end_step: int | None) -> int | None:
        """Return the number of the last step; a drill may end the run earlier."""
        wanted = self._plan.get("steps")
        return end_step if wanted is None else wanted if end_step is None else min(wanted, end_step)

    def workers(self, number: int) -> int:
        """Return the number of loader processes; `number` is the one that the program requests."""
        wanted = self._plan.get("workers")
        used = number if wanted is None else int(wanted)
        if self.is_on:
            self._write(has="workers", number=used)
        return used

    def begun(self, attempt: int, step: int) -> None:
        """Record that an attempt resumes from a step."""
        if self.is_on:
            self._write(attempt=attempt, goes_on_from=step)

    def step_begins(self, step: int) -> None:
        """Note that the loop is about to receive a batch; arm a fault that is due in this step."""
        if not self.is_on:
            return
        self._began = time.monotonic()
        for name in ("first", "step") if self._is_first else ("step",):
            if (fault := self._due(name, step)) is not None:
                timer = threading.Timer(fault["share"] * self._step_s, self._reach, (fault, step))
                timer.daemon, self._is_hurt = True, True
                timer.start()
                break
        self._is_first = False

    def step_made(
        self,
        step: int,
        share: Share,
        batch: Any,
        logged: Mapping[str, Any],
        tracked: Mapping[str, Any],
    ) -> None:
        """Trace a step after the user's code for it has run and before anything of it is saved.

        Args:
            step: Number of the step.
            share: The samples of this rank in the step.
            batch: What the loop received.
            logged: The values that the step logged.
            tracked: The tracked objects, by name.
        """
        if not self.is_on:
            return
        self._step_s = time.monotonic() - self._began
        if share.after.sample == 0:
            self.point("epoch", step)
        if self._waits_for is not None:
            self._wait(self._waits_for)
        own, held_bytes = {}, 0
        if step % self._every == 0:
            for name, obj in tracked.items():
                captured = state.captured_object(name, obj)
                for path, leaf in leaves_of(captured).items():
                    own[".".join(map(str, (name, *path)))] = digest(leaf.value())
                    held_bytes += leaf.size_bytes
                for place, part in captured.parts.items():
                    own[place.replace("/", ".")] = digest(part.tensor.cpu())
                    held_bytes += part.tensor.nbytes
            self._every = 1 + held_bytes // MOST_BYTES
        seen = {
            "samples": share.micro_batches,
            "batch": batch,
            "loss": logged,
            "rng": state.rng_state(),
        }
        self._write(
            step=step,
            epoch=share.epoch,
            state=own,
            **{name: digest(value) for name, value in seen.items()},
        )

    def point(self, name: str, step: int) -> None:
        """Mark a point of the run where a fault may be due, and wait for the fault if it is."""
        if not self.is_on:
            return
        if name == "evaluation":
            self._write(has=name)
        if (fault := self._due(name, step)) is not None:
            self._reach(fault, step)
            self._wait(fault["number"])

    def _due(self, name: str, step: int) -> dict[str, Any] | None:
        if not self._is_writer or self._is_hurt:
            return None
        faults: list[dict[str, Any]] = self._plan["faults"]
        left = [
            fault
            for fault in faults
            if not (self.folder / f"reached-{fault['number']}.json").exists()
        ]
        # A fault that is due in step 0 waits for its turn, else all of them would come at the first
        # start. No other one is kept back by one before it, whose point may never come.
        return next(
            (
                fault
                for fault in left
                if fault["point"] == name
                and step >= fault["step"]
                and (fault["step"] or len(faults) - len(left) >= fault["number"])
            ),
            None,
        )

    def _reach(self, fault: Mapping[str, Any], step: int) -> None:
        number = fault["number"]
        self._waits_for, self._is_hurt = number, True
        file = self.folder / f"reached-{number}.json"
        file.with_suffix(".tmp").write_text(json.dumps({"step": step, "time": time.time()}))
        file.with_suffix(".tmp").rename(file)

    def _wait(self, number: int) -> None:
        until = time.monotonic() + WAITS_S
        while not (self.folder / f"go-{number}").exists() and time.monotonic() < until:
            time.sleep(0.002)
        self._waits_for = None


def digest(value: Any) -> str:
    """Return a short digest of the contents of nested data."""
    hasher = hashlib.blake2b(digest_size=8)
    digest_into(
        hasher,
        value,
        lambda other: (
            repr(other).encode() if isinstance(other, complex) else type(other).__name__.encode()
        ),
    )
    return hasher.hexdigest()
