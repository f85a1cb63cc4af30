"""The processes of a drill: a run is started, hurt as planned, and started again, until it is finished."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness import preemption
from harness.drill.faults import KINDS, Fault
from harness.drill.traces import read
from harness.errors import EXIT_FINISHED, EXIT_STOPPED, HarnessError
from harness.run.drill_hooks import DRILL, PLAN, REMOTE, RUN
from harness.supervision.launches import REDIRECT

LOOK_S, GONE_WITHIN_S = 0.02, 20.0
ANOTHER = ("SLURM_", "TORCHELASTIC_", "HARNESS_")  # variables of whatever starts the drill
WORKERS = (2, 0)  # num_workers of a life whose predecessor had another number


@dataclass(frozen=True)
class Program:
    """What is drilled, as it is given to `harness launch`: options, settings, a program with its arguments."""

    words: tuple[str, ...]
    has_remote: bool
    code: Path  # the package's `__main__.py`


@dataclass
class Caused:
    """A fault that was caused."""

    fault: Fault
    at: float  # seconds since the epoch
    step: int  # that the run was in


@dataclass
class ProgramRun:
    """A run of the drill, in a folder of its own."""

    folder: Path
    plan: dict[str, Any]
    caused: list[Caused] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def run(self) -> Path:
        return self.folder / RUN

    @property
    def has_remote(self) -> bool:
        return (self.folder / REMOTE).is_dir()


class InterruptedDrillError(HarnessError):
    """The drill was asked to stop, or its time was over."""


def run_program(
    program: Program, folder: Path, plan: Mapping[str, Any], faults: list[Fault], until: float, say: Callable[[str], None]
) -> ProgramRun:
    """Let the program train from the beginning to its end, with these faults; what it prints is in the folder's output.txt.

    Raises HarnessError if it fails of anything else; InterruptedDrillError if the time, `until` by `time.monotonic`, is over.
    """
    folder.mkdir(parents=True)
    life = ProgramRun(folder, dict(plan))
    began = time.monotonic()
    while True:
        (folder / PLAN).write_text(json.dumps(life.plan | {"faults": [fault.plan() for fault in faults]}))
        code, was_hurt = _one_launch(program, life, faults, until, say)
        life.seconds = time.monotonic() - began
        if code == EXIT_FINISHED:
            return life
        if not was_hurt and code != EXIT_STOPPED:
            tail = "\n".join((folder / "output.txt").read_text(errors="replace").splitlines()[-12:])
            raise HarnessError(
                f"the program failed by itself, with exit code {code}", tail, f"All that it printed: {folder / 'output.txt'}."
            )


def _one_launch(program: Program, life: ProgramRun, faults: list[Fault], until: float, say: Callable[[str], None]) -> tuple[int, bool]:
    """One `harness launch`, until it ends; its exit code, and whether it was hurt."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ANOTHER) or name == "HARNESS_CODE"}
    environment |= {REDIRECT: str(life.folder), DRILL: "1", "WANDB_MODE": "disabled"}
    remote = [f"run.remote=file://{life.folder / REMOTE}"] if program.has_remote else []
    own = [
        f"run.dir={life.run}",
        *remote,
        "log.to=[]",
        "notify.command=[]",
        "notify.webhook_env=null",
        f"run.max_failures={len(faults) + 3}",
    ]
    command = [sys.executable, str(program.code), "launch", *_settings_first(program.words, own)]
    caused = len(life.caused)
    with (life.folder / "output.txt").open("a") as output:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, preexec_fn=preemption.die_with_parent
        )
        try:
            while process.poll() is None:
                if time.monotonic() > until or preemption.requested():
                    why = f"stopped by {preemption.requested()}" if preemption.requested() else "the time for the drill is over"
                    raise InterruptedDrillError(
                        why, f"found: {len(life.caused)} of {len(faults)} faults caused", "Give it more: --limit-s."
                    )
                for fault in faults[len(life.caused) :][:1]:
                    if (reached := life.folder / f"reached-{fault.number}.json").exists():
                        step = int(json.loads(reached.read_text())["step"])
                        say(f"step {step}: {KINDS[fault.kind].words}")
                        life.caused.append(Caused(fault, time.time(), step))
                        _cause(fault, process, life)
                time.sleep(LOOK_S)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
            _until_gone(life)
    for done in life.caused[caused:]:
        _afterwards(done.fault, life)
    return process.returncode, len(life.caused) > caused


def _settings_first(words: tuple[str, ...], own: list[str]) -> list[str]:
    """The words of a launch with these settings of ours in place of what they say of the same."""
    names = tuple(f"{setting.partition('=')[0]}=" for setting in own)
    return [*(word for word in words if not word.startswith(names)), *own]


def _cause(fault: Fault, process: subprocess.Popen[bytes], life: ProgramRun) -> None:
    kind = KINDS[fault.kind]
    target = process.pid
    if kind.whom == "rank":
        newest = {rank: pid for _, rank, pid in sorted(read(life.folder).pids)}
        ranks = sorted(newest)
        target = newest[ranks[int(fault.share * len(ranks))]]
    preemption.forward(target, kind.signal)
    if kind.whom != "tree":  # the ranks may go on: they meet it at the end of their step
        (life.folder / f"go-{fault.number}").touch()


def _afterwards(fault: Fault, life: ProgramRun) -> None:
    """What is different when the next process starts."""
    if fault.kind == "lost-disk":
        shutil.rmtree(life.run, ignore_errors=True)
    if fault.kind == "workers":
        life.plan["workers"] = WORKERS[life.plan.get("workers") == WORKERS[0]]


def _until_gone(life: ProgramRun) -> None:
    """Wait until no process of the run is left; they die with their launcher."""
    limit, pids = time.monotonic() + GONE_WITHIN_S, [pid for _, _, pid in read(life.folder).pids]
    while time.monotonic() < limit and any(map(_lives, pids)):
        time.sleep(LOOK_S)


def _lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state not in "ZX" and DRILL.encode() in Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False
