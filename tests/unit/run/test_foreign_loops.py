"""Loops that nobody wrote for this: four lines of each are changed, and it is killed, stopped, and
goes on as if nothing had happened."""

from __future__ import annotations

import ast
import difflib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from comparing import differing
from conftest import REPO, events, kill_tree, run, start, wait_until
from remote_runs import Home
from s3_server import S3Server
from slurm_cluster import SlurmCluster
from slurm_runs import Submitted

LOOPS = REPO / "tests" / "loops"
NAMES = ("ddp", "gpt", "gan", "stream")
MOST_LINES = 4
Start = Callable[..., subprocess.Popen[str]]


def command(name: str) -> list[str]:
    """How the loop's user starts it: the GAN is for one process."""
    launcher = (
        []
        if name.endswith("gan")
        else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    )
    return [sys.executable, *launcher, str(LOOPS / f"{name}.py")]


def code(name: str) -> list[str]:
    """The loop's statements, a line each however it is wrapped, without its docstring."""
    tree = ast.parse((LOOPS / f"{name}.py").read_text())
    del tree.body[0]
    return [line.strip() for line in ast.unparse(tree).splitlines() if line.strip()]


@pytest.mark.parametrize("name", NAMES)
def test_at_most_four_lines_of_the_plain_loop_are_changed(name: str) -> None:
    changes = difflib.ndiff(code(f"plain_{name}"), code(name))
    # What is left out costs nobody anything.
    added = [line for line in changes if line.startswith("+ ")]
    assert 0 < len(added) <= MOST_LINES, "\n".join(added)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "last"),
    [("ddp", "epoch 5"), ("gpt", "iter 40"), ("gan", "[3/4]"), ("stream", "epoch 2")],
)
def test_the_plain_loop_trains(name: str, last: str, tmp_path: Path) -> None:
    # Its exit code is PyTorch's: gloo aborts some that hold their model to the end.
    done = run(command(f"plain_{name}"), cwd=tmp_path)
    assert last in done.stdout, done.stderr


def whole(name: str, folder: Path) -> Path:
    """The run's directory, of the loop left in peace."""
    folder.mkdir()
    done = run(command(name), cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "runs/a"


def life(
    begin: Start,
    name: str,
    folder: Path,
    more: int,
    number: int | None,
    env: dict[str, str] | None = None,
) -> str:
    """Start the loop, let it save `more` times, and send the signal to the launcher, or kill all of
    it; what it printed."""
    directory, log = folder / "runs/a", folder / "log"
    seen = len(events(directory, "saved"))
    with log.open("w") as output:
        process = begin(
            command(name), cwd=folder, output=output, env={"SAMPLE_S": "0.01"} | (env or {})
        )
    until = time.monotonic() + 120
    while len(events(directory, "saved")) < seen + more:
        assert time.monotonic() < until and process.poll() is None, log.read_text()
        time.sleep(0.01)
    kill_tree(process.pid) if number is None else process.send_signal(number)
    process.wait(timeout=120)
    return log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_loop_that_is_killed_and_stopped_ends_as_if_nothing_had_happened(
    name: str, tmp_path: Path, started: Start
) -> None:
    untouched, folder = whole(name, tmp_path / "whole"), tmp_path / "killed"
    folder.mkdir()
    life(started, name, folder, 2, None)
    said = life(started, name, folder, 3, signal.SIGTERM)
    assert "resumes from step" in said and "everything saved; start again to go on" in said, said
    done = run(command(name), cwd=folder)
    assert done.returncode == 0 and "attempt 3 resumes from step" in done.stdout, (
        done.stdout + done.stderr
    )
    assert differing(untouched, folder / "runs/a") == []
    again = run(command(name), cwd=folder)
    assert again.returncode == 0 and "is finished: step" in again.stdout, (
        again.stdout + again.stderr
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_loop_goes_on_from_a_bucket_when_its_disk_is_gone(
    name: str, tmp_path: Path, started: Start, s3_server: S3Server
) -> None:
    untouched, folder = whole(name, tmp_path / "whole"), tmp_path / "killed"
    folder.mkdir()
    home = Home(s3_server, s3_server.make_bucket(f"loop-{name}"), "a")
    script = (
        (LOOPS / f"{name}.py").read_text().replace('"runs/a", ', f'"runs/a", remote="{home.url}", ')
    )
    assert home.url in script
    (folder / "loop.py").write_text(script)
    here = [*command(name)[:-1], str(folder / "loop.py")]
    for kill in range(3):
        with (folder / "log").open("w") as output:
            process = start(here, cwd=folder, output=output, env=home.env() | {"SAMPLE_S": "0.05"})
        try:
            until, seen = time.monotonic() + 120, len(home.steps())
            while home.head()[0] <= kill or len(home.steps()) <= seen:
                assert time.monotonic() < until and process.poll() is None, (
                    folder / "log"
                ).read_text()
                time.sleep(0.05)
        finally:
            kill_tree(process.pid)
            process.wait()
        (folder / "runs").rename(folder / f"lost-{kill}")
    done = run(here, cwd=folder, env=home.env())
    assert done.returncode == 0 and "resumes from step" in done.stdout, done.stdout + done.stderr
    assert differing(untouched, folder / "runs/a") == []


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_loop_that_is_submitted_once_is_preempted_and_finishes(
    name: str, tmp_path: Path, slurm: SlurmCluster
) -> None:
    untouched, work = whole(name, tmp_path / "whole"), tmp_path / "work"
    work.mkdir()
    shutil.copyfile(LOOPS / f"{name}.py", work / "loop.py")
    directory = work / "runs/a"
    nodes = 1 if name == "gan" else 2
    words = [
        "--nodes",
        str(nodes),
        "--procs-per-node",
        "1",
        "--partition",
        "low",
        "run.dir=runs/a",
        "loop.py",
    ]
    job = Submitted(slurm, work, directory, directory, words, {"SAMPLE_S": "0.05"}).submit()
    (work / "loop.py").write_text("raise SystemExit('edited after it was submitted')")
    job.wait(lambda: len(events(directory, "saved")) >= 2, "two saves")
    job.preempt()
    wait_until(lambda: slurm.state(job.job) != "RUNNING", "the preemption")
    job.ended()
    assert job.lives() == 2 and job.ends() == [("stopped", True), ("finished", True)], job.log()
    assert differing(untouched, directory) == []
