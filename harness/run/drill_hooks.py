"""A run under `harness drill`: what it writes goes elsewhere, each step leaves its traces, and where a fault is due it waits for it.

    HARNESS_REDIRECT=DIR    the run lives in DIR/run, and in DIR/remote if the program names a remote, whatever directory and remote it
                            names; nobody outside is told of it (log_to, notices)
    HARNESS_DRILL=1         beside it, so that a program can know. DIR/plan.json says where the run ends, how often it saves, and the faults

Each process writes DIR/traces-TIME-RANK.jsonl: which attempt it is of, and of each step what it trained on, the loss, and digests of
everything that it holds. Where a fault is due the writer creates DIR/reached-N.json, and waits at the end of that step for DIR/go-N,
or for its end.
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
MOST_BYTES = 64 << 20  # of state that is digested in each step; of more, only every so many steps
WAITS_S = 60.0  # for who causes the fault


def redirected(
    directory: str | Path | None, remote: str | None, settings: Settings
) -> tuple[str | Path | None, str | None, Settings]:  # fmt: skip
    """Where a run lives that the program wants there, and how."""
    if REDIRECT not in os.environ:
        return directory, remote, settings
    folder = Path(os.environ[REDIRECT]).absolute()
    every_steps = settings.save_every_steps or plan().get("save_every_steps")
    settings = dataclasses.replace(settings, log_to=(), notices=None, save_every_steps=every_steps)
    return str(folder / RUN), None if remote is None else f"file://{folder / REMOTE}", settings


def plan() -> dict[str, Any]:
    """What `harness drill` has planned for this run; {} without a drill."""
    if DRILL not in os.environ or REDIRECT not in os.environ:
        return {}
    return json.loads(Path(os.environ[REDIRECT], PLAN).read_text())  # type: ignore[no-any-return]


class Traces:
    """What this process leaves behind for `harness drill`; without a drill, nothing."""

    def __init__(self, world: World) -> None:
        self._plan = plan()
        self.is_on = bool(self._plan)
        if not self.is_on:
            return
        self.folder, self._is_writer = Path(os.environ[REDIRECT]), world.is_writer
        self._file = (self.folder / f"traces-{time.time_ns()}-{world.rank}.jsonl").open("a", buffering=1)
        self._every, self._step_s, self._began, self._is_first = 1, 0.0, time.monotonic(), True
        self._waits_for: int | None = None
        self._is_hurt = False  # one fault a process
        self._write(pid=os.getpid(), rank=world.rank, writes=world.is_writer)

    def _write(self, **fields: Any) -> None:
        self._file.write(json.dumps({"time": time.time()} | fields) + "\n")

    def end_step(self, end_step: int | None) -> int | None:
        """The number of the last step: the drill may end a run sooner."""
        wanted = self._plan.get("steps")
        return end_step if wanted is None else wanted if end_step is None else min(wanted, end_step)

    def workers(self, number: int) -> int:
        """How many processes load ahead, where the program wants so many."""
        if self.is_on:
            self._write(has="workers")
        wanted = self._plan.get("workers")
        return number if wanted is None else int(wanted)

    def begun(self, attempt: int, step: int) -> None:
        """An attempt goes on from a step."""
        if self.is_on:
            self._write(attempt=attempt, goes_on_from=step)

    def step_begins(self, step: int) -> None:
        """The loop is about to be handed a batch."""
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

    def step_made(self, step: int, share: Share, batch: Any, logged: Mapping[str, Any], tracked: Mapping[str, Any]) -> None:
        """The user's step on a batch is over; nothing of it is saved yet."""
        if not self.is_on:
            return
        self._step_s = time.monotonic() - self._began
        if share.after.sample == 0:
            self.point("epoch", step)
        if self._waits_for is not None:
            self._wait(self._waits_for)
        own, held_bytes = {}, 0
        if step % self._every == 0:
            for name, thing in tracked.items():
                for path, leaf in leaves_of(state.captured_one(name, thing)).items():
                    own[".".join(map(str, (name, *path)))] = digest(leaf.value())
                    held_bytes += leaf.size_bytes
            self._every = 1 + held_bytes // MOST_BYTES
        seen = {"samples": share.micro_batches, "batch": batch, "loss": logged, "rng": state.rng_state()}
        self._write(step=step, epoch=share.epoch, state=own, **{name: digest(value) for name, value in seen.items()})

    def point(self, name: str, step: int) -> None:
        """The run has come to a place where a fault may be due; wait there for it."""
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
        faults = (f for f in self._plan["faults"] if not (self.folder / f"reached-{f['number']}.json").exists())
        fault = next(faults, None)
        return fault if fault is not None and fault["point"] == name and step >= fault["step"] else None

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
    """A short digest of nested data by its contents."""
    found = hashlib.blake2b(digest_size=8)
    digest_into(found, value, lambda other: repr(other).encode() if isinstance(other, complex) else type(other).__name__.encode())
    return found.hexdigest()
