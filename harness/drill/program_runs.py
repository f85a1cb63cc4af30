"""Processes of a drill: start a run, inject the planned faults, restart it until it is finished."""

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
from harness.preemption import children
from harness.run.drill_hooks import DRILL, PLAN, REMOTE, RUN
from harness.supervision.launches import REDIRECT

LOOK_S, GONE_WITHIN_S = 0.02, 20.0
# Prefixes of environment variables that belong to the launcher or job that starts the drill.
ANOTHER = ("SLURM_", "TORCHELASTIC_", "HARNESS_")
WORKERS = (2, 0)  # num_workers after a "workers" fault: the first that is not in use


@dataclass(frozen=True)
class Program:
    """The program under test, with its command line for `harness launch`."""

    arguments: tuple[str, ...]  # options, settings, the program with its arguments
    has_remote: bool
    code: Path  # the package's `__main__.py`


@dataclass
class Caused:
    """A fault that was injected."""

    fault: Fault
    at: float  # seconds since the epoch
    step: int  # the step that the run was in


@dataclass
class ProgramRun:
    """A run of the drill, in a folder of its own."""

    folder: Path
    plan: dict[str, Any]  # what `run/drill_hooks.py` reads, without the faults
    caused: list[Caused] = field(default_factory=list)  # in the order of time
    seconds: float = 0.0  # wall time of all launches

    @property
    def run(self) -> Path:
        """Return the run directory."""
        return self.folder / RUN

    @property
    def has_remote(self) -> bool:
        """Return whether the run has used a remote store."""
        return (self.folder / REMOTE).is_dir()


class InterruptedDrillError(HarnessError):
    """The drill received a stop signal, or its time limit has passed."""


def run_program(
    program: Program,
    folder: Path,
    plan: Mapping[str, Any],
    faults: list[Fault],
    until: float,
    say: Callable[[str], None],
) -> ProgramRun:
    """Train from the first step to the last, with these faults and a restart after each launch.

    The output of the program is in `output.txt` of the folder.

    Args:
        program: The program under test.
        folder: Folder of the run; it must not exist.
        plan: What `run/drill_hooks.py` reads, without the faults.
        faults: Faults to inject, each at its point; one that is not reached keeps no other back.
        until: Time limit by `time.monotonic`.
        say: Prints a line for each injected fault.

    Returns:
        The finished run. Faults whose point was not reached are missing in `caused`.

    Raises:
        HarnessError: A launch failed in which no fault was injected.
        InterruptedDrillError: The time limit has passed, or this process received a stop signal.
    """
    folder.mkdir(parents=True)
    program_run = ProgramRun(folder, dict(plan))
    began = time.monotonic()
    while True:
        (folder / PLAN).write_text(
            json.dumps(program_run.plan | {"faults": [fault.plan() for fault in faults]})
        )
        code, was_hurt = _run_launch(program, program_run, faults, until, say)
        program_run.seconds = time.monotonic() - began
        if code == EXIT_FINISHED:
            return program_run
        if not was_hurt and code != EXIT_STOPPED:
            tail = "\n".join((folder / "output.txt").read_text(errors="replace").splitlines()[-40:])
            raise HarnessError(
                f"the program failed by itself, with exit code {code}",
                tail,
                f"With --keep DIR, all that it prints stays in DIR/{folder.name}/output.txt.",
            )


def _run_launch(
    program: Program,
    program_run: ProgramRun,
    faults: list[Fault],
    until: float,
    say: Callable[[str], None],
) -> tuple[int, bool]:
    """Run one `harness launch` to its end and inject the faults that become due.

    Args:
        program: The program under test.
        program_run: The run; injected faults are added to it.
        faults: All faults of the drill.
        until: Time limit by `time.monotonic`.
        say: Prints a line for each injected fault.

    Returns:
        The exit code, and whether a fault was injected.

    Raises:
        InterruptedDrillError: The time limit has passed, or this process received a stop signal.
    """
    caused = len(program_run.caused)
    with (program_run.folder / "output.txt").open("a") as output:
        process = subprocess.Popen(
            _command(program, program_run, len(faults)),
            env=_environment(program_run.folder),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            preexec_fn=preemption.die_with_parent,
        )
        try:
            while process.poll() is None:
                _check_may_go_on(program_run, len(faults), until)
                before = {done.fault.number for done in program_run.caused}
                for fault in faults:
                    if fault.number not in before:
                        _cause_if_due(fault, process, program_run, say)
                time.sleep(LOOK_S)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
            _until_gone(program_run)
    for done in program_run.caused[caused:]:
        _afterwards(done.fault, program_run)
    return process.returncode, len(program_run.caused) > caused


def _environment(folder: Path) -> dict[str, str]:
    """Return the environment variables of a launch, with those that make it part of a drill."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(ANOTHER) or name == "HARNESS_CODE"
    }
    return environment | {REDIRECT: str(folder), DRILL: "1", "WANDB_MODE": "disabled"}


def _command(program: Program, program_run: ProgramRun, faults: int) -> list[str]:
    """Return the command line of a launch; `faults` is the number of faults of the drill."""
    remote = [f"run.remote=file://{program_run.folder / REMOTE}"] if program.has_remote else []
    own = [
        f"run.dir={program_run.run}",
        *remote,
        "log.to=[]",
        "notify.command=[]",
        "notify.webhook_env=null",
        f"run.max_failures={faults + 3}",
    ]
    return [sys.executable, str(program.code), "launch", *_settings_first(program.arguments, own)]


def _settings_first(arguments: tuple[str, ...], own: list[str]) -> list[str]:
    """Return the command line with our settings in place of its own settings of the same names."""
    names = tuple(f"{setting.partition('=')[0]}=" for setting in own)
    return [*(argument for argument in arguments if not argument.startswith(names)), *own]


def _check_may_go_on(program_run: ProgramRun, faults: int, until: float) -> None:
    """Raise InterruptedDrillError after the time limit or a stop signal to this process."""
    if time.monotonic() <= until and not preemption.requested():
        return
    why = (
        f"stopped by {preemption.requested()}"
        if preemption.requested()
        else "the time for the drill is over"
    )
    raise InterruptedDrillError(
        why,
        f"found: {len(program_run.caused)} of {faults} faults caused",
        "Give it more: --limit-s.",
    )


def _cause_if_due(
    fault: Fault,
    process: subprocess.Popen[bytes],
    program_run: ProgramRun,
    say: Callable[[str], None],
) -> None:
    """Inject a fault if the run has reached its point.

    Args:
        fault: A fault that was not injected yet.
        process: The launcher.
        program_run: The run; the injected fault is added to it.
        say: Prints a line for the injected fault.
    """
    if (reached := program_run.folder / f"reached-{fault.number}.json").exists():
        step = int(json.loads(reached.read_text())["step"])
        say(f"step {step}: {KINDS[fault.kind].description}")
        program_run.caused.append(Caused(fault, time.time(), step))
        _cause(fault, process, program_run)


def _cause(fault: Fault, process: subprocess.Popen[bytes], program_run: ProgramRun) -> None:
    kind = KINDS[fault.kind]
    target = process.pid
    if kind.whom == "rank":
        newest = {rank: pid for _, rank, pid in sorted(read(program_run.folder).pids)}
        ranks = sorted(newest)
        target = newest[ranks[int(fault.share * len(ranks))]]
    children.forward(target, kind.signal)
    # The writer waits for this file at the end of its step. The signal has been sent, so the ranks
    # may continue to the step boundary at which they act on it.
    if kind.whom != "tree":
        (program_run.folder / f"go-{fault.number}").touch()


def _afterwards(fault: Fault, program_run: ProgramRun) -> None:
    """Apply what a fault changes before the next launch: the lost disk, or the worker count."""
    if fault.kind == "lost-disk":
        shutil.rmtree(program_run.run, ignore_errors=True)
    if fault.kind == "workers":
        program_run.plan["workers"] = WORKERS[read(program_run.folder).workers == WORKERS[0]]


def _until_gone(program_run: ProgramRun) -> None:
    """Wait until no process of the run is left, at most GONE_WITHIN_S seconds.

    The ranks die with their launcher.
    """
    limit, pids = (
        time.monotonic() + GONE_WITHIN_S,
        [pid for _, _, pid in read(program_run.folder).pids],
    )
    while time.monotonic() < limit and any(map(_is_alive, pids)):
        time.sleep(LOOK_S)


def _is_alive(pid: int) -> bool:
    """Return whether this PID is that of a live process of a drill.

    An unrelated process may have reused the PID. A zombie is not alive.
    """
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state not in "ZX" and DRILL.encode() in Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False
