"""Compute the time that is left until this process is killed.

The kill comes at the job's time limit or, after a stop signal, when the grace time is over.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from harness import preemption

ASK_S = 10.0  # time limit of a SLURM command
TORCHRUN_KILLS_AFTER_S = 30.0  # torchrun's default
SAFETY = 1.5  # factor by which a save or an upload may take longer than the last one


@dataclass(frozen=True)
class Plan:
    """The actions to take before the process leaves, and the reason if some are left out."""

    save: bool
    upload: bool
    message: str = ""


def plan(
    left_s: float, save_s: float, upload_s: float, *, has_remote: bool, is_scratch: bool
) -> Plan:
    """Decide which of a last save and its upload fit into the time that is left.

    Args:
        left_s: Seconds until the kill.
        save_s: Expected duration of a save in seconds.
        upload_s: Expected duration of an upload in seconds.
        has_remote: Whether the run has a remote store.
        is_scratch: Whether the run directory is lost with the job, so that a save without an upload
            is useless.
    """
    both_s = SAFETY * (save_s + (upload_s if has_remote else 0.0))
    if both_s <= left_s:
        return Plan(True, has_remote)
    times = f"{left_s:.0f} s left, a save takes {save_s:.1f} s" + (
        f" and an upload {upload_s:.1f} s" if has_remote else ""
    )
    if save_s <= left_s and not has_remote:
        return Plan(True, False)
    if save_s <= left_s and not is_scratch:
        return Plan(True, False, f"saved locally, not uploaded: {times}")
    return Plan(False, False, f"no time to save: {times}; the checkpoint before stands")


class Deadline:
    """The time at which this process will be killed, as far as it is known.

    Times are in seconds of `clock`. `job_end` is infinite until a time limit is known.

    Args:
        grace_s: Seconds from SIGTERM to SIGKILL, or None to take SLURM's value.
        environment: Environment variables of SLURM and torchrun.
        clock: Function that returns the current time in seconds.
    """

    def __init__(
        self,
        grace_s: float | None,
        environment: Mapping[str, str] = os.environ,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.clock, self._environment = clock, environment
        self.grace_s = grace_s
        self.job_end = math.inf

    def ask(self) -> None:
        """Query SLURM for its limits, in a thread because the SLURM controller may not answer."""
        if "SLURM_JOB_ID" in self._environment:
            threading.Thread(target=self._ask, daemon=True, name="deadline").start()

    def _ask(self) -> None:
        """Set `job_end`, and `grace_s` if it is not given."""
        left_s = job_left_s(self._environment)
        self.job_end = self.clock() + left_s
        if self.grace_s is None:
            self.grace_s = slurm_grace_s(self._environment)

    def left_s(self) -> float:
        """Return the seconds until the kill, at least 0; infinite if no kill is expected."""
        left = [self.job_end - self.clock()]
        if (
            signalled_at := preemption.signalled_at()
        ) is not None and "TORCHELASTIC_RUN_ID" in self._environment:
            limit_s = float(
                self._environment.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT") or TORCHRUN_KILLS_AFTER_S
            )
            left.append(signalled_at + limit_s - self.clock())
        if (
            terminated_at := preemption.signalled_at("SIGTERM")
        ) is not None and self.grace_s is not None:
            left.append(terminated_at + self.grace_s - self.clock())
        return max(0.0, min(left))

    def is_near(self, needed_s: float) -> bool:
        """Return True if at most `needed_s` seconds are left until the job's time limit."""
        return self.job_end - self.clock() <= needed_s


def job_left_s(environment: Mapping[str, str]) -> float:
    """Return the seconds until the job's time limit; infinite without one.

    Newer versions of SLURM set it in the environment. For older versions `squeue` is called.
    """
    if (end := environment.get("SLURM_JOB_END_TIME", "")).isdigit():
        return int(end) - time.time()
    job = environment["SLURM_JOB_ID"]
    # The ID of one task of a job array is that of the whole array, which is listed then.
    # SLURM_ARRAY_JOB_ID may have been inherited from a job in which this one was submitted.
    for line in _output("squeue", "-h", "-j", job, "-o", "%A %L").splitlines():
        listed, _, left = line.partition(" ")
        if listed == job:
            return parse_left(left)
    return math.inf


def parse_left(text: str) -> float:
    """Convert SLURM's [days-][[hours:]minutes:]seconds to seconds.

    UNLIMITED and every other text yield infinity.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(?:(?:(\d+):)?(\d+):)?(\d+)", text.strip())
    if match is None:
        return math.inf
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def slurm_grace_s(environment: Mapping[str, str]) -> float | None:
    """Return the seconds between SIGTERM and SIGKILL of a preemption, or None if unknown.

    This is the partition's GraceTime plus the cluster's KillWait.
    """
    partition = environment.get("SLURM_JOB_PARTITION")
    if partition is None:
        return None
    grace = re.search(
        r"\bGraceTime=(\d+)", _output("scontrol", "show", "partition", partition, "-o")
    )
    kill_wait = re.search(r"\bKillWait\s*=\s*(\d+)", _output("scontrol", "show", "config"))
    return float(int(grace[1]) + int(kill_wait[1])) if grace and kill_wait else None


def _output(*command: str) -> str:
    """Return the output of a SLURM command; "" if it does not exist or does not answer in time."""
    try:
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=ASK_S, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
