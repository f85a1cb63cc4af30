"""Launches of a small task, and the records that they leave."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from comparing import differing, losses
from conftest import alone, events, harness, run, torchrun, wait_until

COMMON = (
    "train.epochs=8",
    "log.every_steps=1",
    "checkpoint.best=val_loss:min",
    "resume.accept=[config]",
)
SMALL, CRASHING = (
    ("task.name=small_task:build", *COMMON),
    ("task.name=crashing_task:build", *COMMON),
)
STEPS = 40
CRASHING_TASK = '''
import ctypes, os, signal, time
from pathlib import Path
import small_task

def die(how, where):
    if how == "quit":
        raise SystemExit(0)
    if how == "raise":
        raise ValueError(f"the task crashes {where}")
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
    if how == "hang":
        time.sleep(3600)
    if how == "lock":  # with the interpreter's lock, as a C extension may
        ctypes.PyDLL(None).sleep(3600)
    if how == "segfault":
        ctypes.string_at(0)
    os._exit({"exit": 3, "leave": 0}[how])

def build(folder: str, crashes: str = "", sleep_s: float = 0.0):
    """`crashes` lists STEP-RANK-HOW-TIMES, with commas between; step 0 is while the task is
    built."""
    task = small_task.build(sleep_s=sleep_s)

    def crash(step, where):
        for at, rank, how, times in (part.split("-") for part in crashes.split(",") if part):
            if (int(at), rank) == (step, os.environ.get("RANK", "0")):
                before = len(list(Path(folder).glob(f"{at}-{rank}-*.crashed")))
                if before < int(times):
                    Path(folder, f"{at}-{rank}-{before}.crashed").touch()
                    die(how, where)

    def loss(model, batch, inner=task.loss):
        step = task.schedulers.last_epoch + 1
        crash(step, f"at step {step}")
        return inner(model, batch)

    crash(0, "while it is built")
    task.loss = loss
    return task
'''
_WHOLE: dict[int, Path] = {}


@pytest.fixture
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """A run of so many ranks that nothing disturbed; made once for all modules."""

    def make(ranks: int) -> Path:
        if ranks not in _WHOLE:
            directory = tmp_path_factory.mktemp("whole") / "run"
            settings = (*SMALL, f"run.dir={directory}")
            done = run(alone(*settings) if ranks == 1 else torchrun(ranks, *settings))
            assert done.returncode == 0, done.stdout + done.stderr
            _WHOLE[ranks] = directory
        return _WHOLE[ranks]

    return make


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a task that crashes can be imported from."""
    (tmp_path / "crashing_task.py").write_text(CRASHING_TASK)
    return tmp_path


def launch(ranks: int, *settings: str) -> list[str]:
    return harness("launch", "--nproc-per-node", str(ranks), *settings)


def crashing(folder: Path, plan: str) -> tuple[str, ...]:
    """Settings for a run in `folder` that dies as planned."""
    return (
        *CRASHING,
        f"run.dir={folder}/run",
        f"task.args.folder={folder}",
        f"task.args.crashes='{plan}'",
    )


def begun(directory: Path, kind: str) -> dict[str, dict]:
    """The records of attempts or launches by their names, in order."""
    files = sorted(
        file
        for file in directory.glob(f"{kind}/*.json")
        if not file.name.endswith((".end.json", ".failed.json", ".replay.json"))
    )
    return {file.name.removesuffix(".json"): json.loads(file.read_text()) for file in files}


def ended(directory: Path, kind: str) -> dict[str, dict]:
    """How they ended, by their names, in order."""
    return {
        file.name.removesuffix(".end.json"): json.loads(file.read_text())
        for file in sorted(directory.glob(f"{kind}/*.end.json"))
    }


def left_behind(directory: Path) -> list[str]:
    """The processes that still have to do with a run."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        line = " ".join(process.info["cmdline"] or [])
        if str(directory) in line and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(f"{process.pid}: {line}")
    return found


def after_steps(directory: Path, steps: int, process: subprocess.Popen[str]) -> None:
    wait_until(
        lambda: len(events(directory, "step")) >= steps or process.poll() is not None,
        f"{steps} steps",
    )
    assert process.poll() is None, process.communicate()


def check_equal(directory: Path, other: Path) -> None:
    assert differing(directory, other) == []
    assert losses(directory) == losses(other)
