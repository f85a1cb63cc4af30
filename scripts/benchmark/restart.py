"""From kill -9 of one rank to the first new step: torchrun restarts both, with the same settings;
only the script is another."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmark.bench import Bench, SampleError
from benchmark.findings import HARNESS, Finding, ratios

ROW, PLAIN = "restart", "torchrun and torch.load"
LAUNCH = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=3")
# For both alike, and only the plain script needs it: with torchrun's own setting (torch 2.13) its
# restarted ranks find the keys of those that were killed, and hang in init_process_group.
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
MOST_MB = 200  # of state: a restart, and not only a load, is measured
KILL_AT, LIMIT_S = 25, 180.0  # steps; there are checkpoints by then
STAGES = ("killed", "started", "imported", "joined", "restored", "stepped")


def measure(bench: Bench) -> list[Finding]:
    size_mb = min(bench.size_mb, MOST_MB)
    taken = bench.turns({who: partial(_killed, bench, who, size_mb) for who in (PLAIN, HARNESS)})
    found = [
        Finding(ROW, "from kill -9 to a new step", who, "s", tuple(t["stepped"] for t in turns))
        for who, turns in taken.items()
    ]
    if len(taken) == 2:
        ratio = ratios(*([turn["stepped"] for turn in taken[who]] for who in (HARNESS, PLAIN)))
        found.append(
            Finding(
                ROW,
                f"from kill -9 to a new step over {PLAIN}",
                HARNESS,
                "x",
                ratio,
                most=1.1,
                note=f"{size_mb} MB of state",
            )
        )
    for who, turns in taken.items():
        for before, stage in itertools.pairwise(STAGES):
            spent = tuple(turn[stage] - turn[before] for turn in turns)
            found.append(Finding(ROW, f"of that: {before} to {stage}", who, "s", spent))
    return found


def _killed(bench: Bench, who: str, size_mb: int) -> dict[str, float]:
    """Seconds after the kill at which each stage was reached, by the rank that reached it last."""
    folder = bench.folder()
    command = [sys.executable, *LAUNCH, "-m", "benchmark.lives", who, str(folder), str(size_mb)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=os.environ | OWN_STORE,
        )
    try:
        before = _until(
            process,
            folder,
            lambda lines: (
                lines if _steps(lines, 0) >= KILL_AT and _steps(lines, 1) >= KILL_AT else None
            ),
        )
        victim = next(line["pid"] for line in before if line["rank"] == 1)
        old, killed_at = {line["pid"] for line in before}, time.monotonic()
        os.kill(victim, signal.SIGKILL)

        def new(lines: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
            fresh = [line for line in lines if line["pid"] not in old]
            return (
                fresh
                if {line["rank"] for line in fresh if line["stage"] == "stepped"} == {0, 1}
                else None
            )

        fresh = _until(process, folder, new)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for line in _lines(folder):  # torchrun's workers have sessions of their own
            with contextlib.suppress(ProcessLookupError):
                os.kill(line["pid"], signal.SIGKILL)
    reached = {
        stage: max(_first(fresh, stage, rank) for rank in (0, 1)) - killed_at
        for stage in STAGES[1:]
    }
    return {"killed": 0.0} | reached


def _first(lines: list[dict[str, Any]], stage: str, rank: int) -> float:
    return min(
        float(line["at"]) for line in lines if line["stage"] == stage and line["rank"] == rank
    )


def _steps(lines: list[dict[str, Any]], rank: int) -> int:
    return sum(line["rank"] == rank and line["stage"] == "stepped" for line in lines)


def _lines(folder: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for file in folder.glob("stages-*.jsonl")
        for line in file.read_text().splitlines()
        if line.endswith("}")
    ]


def _until(process: Any, folder: Path, wanted: Any) -> Any:
    """What `wanted` makes of the stages reported so far, once that is something. Raises
    SampleError."""
    until = time.monotonic() + LIMIT_S
    while not (found := wanted(_lines(folder))):
        if process.poll() is not None or time.monotonic() > until:
            raise SampleError(" ".join((folder / "log").read_text(errors="replace")[-600:].split()))
        time.sleep(0.05)
    return found
