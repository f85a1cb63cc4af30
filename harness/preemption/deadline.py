"""How much time is left: until the job's time limit, and, once a signal has come, until the kill that follows it."""

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

ASK_S = 10.0
TORCHRUN_KILLS_AFTER_S = 30.0  # torchrun's default
SAFETY = 1.5  # how much longer than last time a save or an upload may take


@dataclass(frozen=True)
class Plan:
    """What is done before leaving, and why not more."""

    save: bool
    upload: bool
    words: str = ""


def plan(left_s: float, save_s: float, upload_s: float, *, has_remote: bool, is_scratch: bool) -> Plan:
    """What still fits into the time that is left; `is_scratch` says that the run directory is lost with the job."""
    both_s = SAFETY * (save_s + (upload_s if has_remote else 0.0))
    if both_s <= left_s:
        return Plan(True, has_remote)
    times = f"{left_s:.0f} s left, a save takes {save_s:.1f} s" + (f" and an upload {upload_s:.1f} s" if has_remote else "")
    if save_s <= left_s and not has_remote:
        return Plan(True, False)
    if save_s <= left_s and not is_scratch:
        return Plan(True, False, f"saved locally, not uploaded: {times}")
    return Plan(False, False, f"no time to save: {times}; the checkpoint before stands")


class Deadline:
    """When this process will be killed, as far as anybody has told; `time.monotonic` seconds."""

    def __init__(
        self, grace_s: float | None, environment: Mapping[str, str] = os.environ, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.clock, self._environment = clock, environment
        self.grace_s = grace_s
        self.job_end = math.inf

    def ask(self) -> None:
        """Find out what SLURM knows; in a thread, since its controller may not answer."""
        if "SLURM_JOB_ID" in self._environment:
            threading.Thread(target=self._ask, daemon=True, name="deadline").start()

    def _ask(self) -> None:
        left_s = job_left_s(self._environment)
        self.job_end = self.clock() + left_s
        if self.grace_s is None:
            self.grace_s = slurm_grace_s(self._environment)

    def left_s(self) -> float:
        """Seconds until the kill; infinite if nothing is known of one."""
        left = [self.job_end - self.clock()]
        if (signalled_at := preemption.signalled_at()) is not None and "TORCHELASTIC_RUN_ID" in self._environment:
            limit_s = float(self._environment.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT") or TORCHRUN_KILLS_AFTER_S)
            left.append(signalled_at + limit_s - self.clock())
        if (terminated_at := preemption.signalled_at("SIGTERM")) is not None and self.grace_s is not None:
            left.append(terminated_at + self.grace_s - self.clock())
        return max(0.0, min(left))

    def is_near(self, needed_s: float) -> bool:
        """Whether the job's time limit is so near that it is time to leave."""
        return self.job_end - self.clock() <= needed_s


def job_left_s(environment: Mapping[str, str]) -> float:
    """Seconds until the job's time limit; infinite without one. Newer SLURM says it in the environment, older ones when asked."""
    if (end := environment.get("SLURM_JOB_END_TIME", "")).isdigit():
        return int(end) - time.time()
    job = environment["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in environment:  # one task's own id may be the whole array's
        job = f"{environment['SLURM_ARRAY_JOB_ID']}_{environment.get('SLURM_ARRAY_TASK_ID')}"
    return parse_left(_output("squeue", "-h", "-j", job, "-o", "%L"))


def parse_left(text: str) -> float:
    """SLURM's [days-][[hours:]minutes:]seconds; infinite for UNLIMITED and everything else."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(?:(\d+):)?(\d+):)?(\d+)", text.strip())
    if match is None:
        return math.inf
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def slurm_grace_s(environment: Mapping[str, str]) -> float | None:
    """Seconds between a preemption's SIGTERM and its SIGKILL: the partition's GraceTime, then the cluster's KillWait."""
    partition = environment.get("SLURM_JOB_PARTITION")
    if partition is None:
        return None
    grace = re.search(r"\bGraceTime=(\d+)", _output("scontrol", "show", "partition", partition, "-o"))
    kill_wait = re.search(r"\bKillWait\s*=\s*(\d+)", _output("scontrol", "show", "config"))
    return float(int(grace[1]) + int(kill_wait[1])) if grace and kill_wait else None


def _output(*command: str) -> str:
    """What a command of SLURM's prints; "" if there is none, or it does not answer."""
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=ASK_S, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
