"""Runs that are submitted to the tests' SLURM cluster as a user would, with `harness submit`, and
what is left of them."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from comparing import differing, losses
from conftest import REPO, events, harness, run, torchrun
from slurm_cluster import SlurmCluster

STEPS = 40
SETTINGS = (
    "task.name=mine:build",
    "train.epochs=8",
    "log.every_steps=1",
    "checkpoint.every_s=null",
    "checkpoint.best=val_loss:min",
    "eval.every_steps=10",
)

# The user's own code, in two files: each step takes as many seconds as the file `slow` in the
# folder says, and fails where told to.
MINE = """\
import contextlib, dataclasses, os, time
from pathlib import Path
from parts.small import build as small

def build(
    folder: str, width: int = 32, fail_at: int = -1, fail_rank: int = 1, fail_once: bool = False
):
    task, folder, rank = small(width=width), Path(folder), int(os.environ.get("RANK", "0"))

    def loss(model, batch):
        step = task.schedulers.last_epoch + 1
        if (
            step == fail_at
            and rank == fail_rank
            and not (fail_once and (folder / "failed").exists())
        ):
            (folder / "failed").touch()
            raise ValueError(f"the task fails in step {step}")
        with contextlib.suppress(OSError, ValueError):
            time.sleep(float((folder / "slow").read_text()))
        return task.loss(model, batch)

    return dataclasses.replace(task, loss=loss)
"""
EDITED = 'raise RuntimeError("this was edited after the run was submitted")\n'


def write_task(folder: Path) -> Path:
    """The user's working directory, with the code in it."""
    (folder / "parts").mkdir(parents=True)
    (folder / "parts" / "__init__.py").touch()
    shutil.copyfile(REPO / "tests/support/small_task.py", folder / "parts" / "small.py")
    (folder / "mine.py").write_text(MINE)
    (folder / "slow").write_text("0.4")
    return folder


def train_whole(folder: Path, *settings: str) -> Path:
    """The directory of the same training, uninterrupted and without SLURM, on two processes."""
    work = write_task(folder / "work")
    (work / "slow").unlink()
    done = run(
        torchrun(2, *SETTINGS, f"task.args.folder={work}", f"run.dir={folder}/run", *settings),
        cwd=work,
    )
    assert done.returncode == 0, done.stderr
    return folder / "run"


@dataclass
class Submitted:
    """One run: its user's directory, its own, and the job that trains it."""

    slurm: SlurmCluster
    work: Path
    directory: Path
    home: Path  # of script, code and logs
    arguments: list[str]
    env: dict[str, str] = field(default_factory=dict)
    job: str = ""

    def submit(self) -> Submitted:
        """`harness submit`, in the user's directory."""
        done = self.harness("submit", *self.arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        self.job = done.stdout.split()[1].rstrip(":")
        return self

    def harness(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return run(harness(*arguments), cwd=self.work, env=self.slurm.environment | self.env)

    def edit(self) -> None:
        """Break the user's code, as somebody does who goes on working on it."""
        for name in ("mine.py", "parts/small.py"):
            (self.work / name).write_text(EDITED)

    def slow(self, step_s: float) -> None:
        """Let each step from here on take so long."""
        (self.work / "new").write_text(str(step_s))
        (self.work / "new").replace(self.work / "slow")

    def hasten(self) -> None:
        """Let the training go as fast as it can from here on."""
        (self.work / "slow").unlink(missing_ok=True)

    # What is there now.

    def log(self, job: str | None = None) -> str:
        file = self.home / "logs" / f"slurm-{job or self.job}.out"
        return file.read_text() if file.exists() else ""

    def steps(self) -> list[int]:
        """The steps that were made, in the order of attempts."""
        return [event["step"] for event in events(self.directory, "step")]

    def records(self, kind: str) -> dict[str, dict[str, Any]]:
        """`attempts` or `launches`, by name: 0001, 0001.end, 17.0, 17.0.end."""
        return {
            file.name[: -len(".json")]: json.loads(file.read_text())
            for file in sorted(self.directory.glob(f"{kind}/*.json"))
        }

    def ends(self) -> list[tuple[str, bool]]:
        """How each attempt ended, and whether it had saved."""
        records = self.records("attempts")
        names = [name for name in records if name.isdigit()]
        return [
            (end.get("why", "killed"), bool(end.get("saved")))
            for end in (records.get(f"{name}.end", {}) for name in names)
        ]

    def lost(self) -> list[int]:
        """The steps that had to be made again, after each attempt."""
        made = [
            [event["step"] for event in self.events_of(number)]
            for number in range(1, len(self.ends()) + 1)
        ]
        return [
            max(0, max(before, default=0) - min(after, default=STEPS) + 1)
            for before, after in itertools.pairwise(made)
        ]

    def events_of(self, attempt: int) -> list[dict[str, Any]]:
        """The steps that one attempt made."""
        file = self.directory / "events" / f"{attempt:04d}.jsonl"
        found = (
            [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]
            if file.exists()
            else []
        )
        return [event for event in found if event["event"] == "step"]

    def starts(self) -> dict[str, dict[str, Any]]:
        """The records of the launches themselves, without those of their ends."""
        return {
            name: record
            for name, record in self.records("launches").items()
            if re.fullmatch(r"[\w-]+\.[0-9]+", name)
        }

    def failures(self) -> list[int]:
        """How many failures in a row each launch was told of."""
        return [record["failures"] for record in self.starts().values()]

    def nodes(self, job: str | None = None) -> str:
        """Comma between them, as `-w` takes them."""
        listed = self.slurm.fields(job or self.job)["NodeList"]
        return ",".join(self.slurm.command("scontrol", "show", "hostnames", listed).stdout.split())

    # What happens to it.

    def train(self, more: int = 4, limit_s: float = 200) -> None:
        """Wait until it has made so many more steps."""
        seen = len(self.steps())
        self.wait(lambda: len(self.steps()) >= seen + more, f"{more} more steps", limit_s)

    def wait(self, condition: Callable[[], object], what: str, limit_s: float = 200) -> None:
        until = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < until, (
                f"not within {limit_s} s: {what}\n"
                f"{self.slurm.fields(self.job)}\n{self.log()[-6000:]}"
            )
            time.sleep(0.05)

    def preempt(self) -> str:
        """Submit a short job of higher priority for its nodes; the number of that."""
        hog = self.work / "hog.sh"
        hog.write_text("#!/bin/bash\nsleep 0.2\n")
        return self.slurm.submit(
            hog,
            "-p",
            "high",
            "-N",
            str(len(self.nodes().split(","))),
            "-w",
            self.nodes(),
            "--exclusive",
            "-o",
            "/dev/null",
        )

    def ended(self, state: str = "COMPLETED", limit_s: float = 300) -> None:
        """Wait until the job is over for good, and in this state."""
        found = self.slurm.wait_for(self.job, limit_s=limit_s)
        assert found == state, f"{self.slurm.fields(self.job)}\n{self.log()[-8000:]}"

    def lives(self, all_began: bool = True) -> int:
        """How often SLURM has started the job; its records must tell the same, but for lives that
        ended before they did anything."""
        starts = [f"{self.job}.{life}" for life in range(self.slurm.restarts(self.job) + 1)]
        launches = {name for name in self.starts() if name.startswith(f"{self.job}.")}
        assert launches <= set(starts) and (not all_began or len(launches) == len(starts)), (
            f"{launches}, not {starts}:\n{self.log()[-8000:]}"
        )
        return len(starts)


def submitted(
    slurm: SlurmCluster,
    folder: Path,
    name: str,
    *arguments: str,
    env: dict[str, str] | None = None,
    nodes: int = 2,
) -> Submitted:
    """Submit a run with one process on each of so many nodes; `name` is its job's."""
    work = folder / "work"
    if not work.exists():
        write_task(work)
    own = [
        "--nodes",
        str(nodes),
        "--procs-per-node",
        "1",
        f"task.args.folder={work}",
        f"run.dir={folder / name}",
    ]
    return Submitted(
        slurm, work, folder / name, folder / name, [*own, *SETTINGS, *arguments], env or {}
    ).submit()


def assert_equal(whole: Path, directory: Path) -> None:
    """Both are finished, with the same tensors and the same losses on the way."""
    assert differing(whole, directory) == []
    assert losses(directory) == losses(whole)
