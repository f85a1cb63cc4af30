"""Asked to stop, all ranks leave at the same step with everything saved; left by one rank, the
others do not wait for ever."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from comparing import differing, losses
from conftest import TRAIN, alone, events, harness, run, torchrun, tree, wait_until, workers_of
from launches import crashing, ended
from programs import live
from s3_server import free_ports
from there import there

from harness.preemption import AGAIN_S

TASK = (
    "task.name=small_task:build",
    "train.epochs=8",
    "log.every_steps=1",
    "checkpoint.best=val_loss:min",
    "resume.accept=[config]",
)
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole") / "run"
    assert run(torchrun(2, *TASK, f"run.dir={directory}")).returncode == 0
    return directory


def after_steps(directory: Path, steps: int, process: subprocess.Popen[str]) -> None:
    wait_until(
        lambda: len(events(directory, "step")) >= steps or process.poll() is not None,
        f"{steps} steps",
    )
    assert process.poll() is None, process.communicate()


@pytest.mark.slow
def test_a_stop_signal_to_any_process_saves_at_one_step_and_loses_none(
    whole: Path, tmp_path: Path, started: Start
) -> None:
    directory = tmp_path / "run"

    def rank_1(pid: int) -> psutil.Process:
        return workers_of(pid)[1]

    def launcher(pid: int) -> psutil.Process:
        return psutil.Process(pid)

    # test_phases has them all.
    for target, number in ((rank_1, signal.SIGUSR1), (launcher, signal.SIGTERM)):
        seen = len(events(directory, "step"))
        process = started(torchrun(2, *TASK, f"run.dir={directory}", "task.args.sleep_s=0.05"))
        after_steps(directory, seen + 3, process)
        target(process.pid).send_signal(number)
        out, err = process.communicate(timeout=60)
        assert f"stopped by {number.name}" in out, out + err
        newest = max(directory.glob("attempts/*.end.json"))
        end = json.loads(newest.read_text())
        assert (end["why"], end["saved"], end["signals"]) == ("stopped", True, [number.name])
        assert end["step"] == max(losses(directory)), (
            "a step was made after the stop, or lost by it"
        )
        if target is rank_1:
            assert process.returncode == 0
    assert run(torchrun(2, *TASK, f"run.dir={directory}")).returncode == 0
    steps = [event["step"] for event in events(directory, "step")]
    assert steps == sorted(set(steps)), "a step was done twice"
    assert differing(whole, directory) == []
    assert losses(directory) == losses(whole)


@pytest.mark.slow
@pytest.mark.parametrize("delay_s", [0.5, 1.5, 3.5, 5.0])
def test_a_signal_during_start_up_ends_the_process_soon_and_the_run_goes_on(
    delay_s: float, whole: Path, tmp_path: Path, started: Start
) -> None:
    directory = tmp_path / "run"
    process = started(torchrun(2, *TASK, f"run.dir={directory}", "task.args.sleep_s=0.02"))
    time.sleep(delay_s)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=45)
    assert run(torchrun(2, *TASK, f"run.dir={directory}")).returncode == 0
    assert differing(whole, directory) == []


def test_two_signals_at_once_are_one_stop(tmp_path: Path, started: Start) -> None:
    directory = tmp_path / "run"
    process = started(
        alone(
            *TASK,
            f"run.dir={directory}",
            "train.epochs=400",
            "task.args.sleep_s=0.05",
            "data.num_workers=1",
        )
    )
    after_steps(directory, 3, process)
    # As SLURM does with proctrack/linuxproc: every descendant gets it, loader processes too.
    for member in tree(process.pid):
        member.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGUSR1)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "everything saved" in out, out + err
    assert len(events(directory, "stopped")) == 1


def is_pending(process: subprocess.Popen[str], number: signal.Signals) -> bool:
    """Whether a process has not yet got a signal that it was sent; another one would be the same
    one then."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return any(
        int(line.split()[1], 16) >> number - 1 & 1
        for line in status.splitlines()
        if line.startswith(("SigPnd", "ShdPnd"))
    )


@pytest.mark.slow
def test_a_second_interrupt_ends_a_process_that_cannot_save(folder: Path, started: Start) -> None:
    process = started(alone(*crashing(folder, "1-0-hang-1")), cwd=folder)
    wait_until(
        lambda: list(folder.glob("1-0-*.crashed")) or process.poll() is not None,
        "a step that never ends",
    )
    process.send_signal(signal.SIGINT)
    wait_until(lambda: not is_pending(process, signal.SIGINT), "the signal")
    time.sleep(AGAIN_S + 0.5)  # a handler is late on a busy machine
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130


@pytest.mark.slow
def test_an_attempt_whose_origin_vanishes_before_its_first_commit_saves_at_once(
    tmp_path: Path, started: Start
) -> None:
    directory = tmp_path / "run"
    common = alone(
        *TASK,
        "train.epochs=400",
        f"run.dir={directory}",
        "checkpoint.every_s=null",
        "task.args.sleep_s=0.05",
    )
    first = started([*common, "checkpoint.every_steps=2"])
    after_steps(directory, 6, first)
    first.kill()
    first.communicate()
    seen = len(events(directory, "step"))
    second = started(common)
    after_steps(directory, seen + 3, second)
    assert not list(directory.glob("checkpoints/*-0002.json")), (
        "nothing but the origin holds the run so far"
    )
    for file in directory.glob("checkpoints/*-0001.*"):
        file.unlink()
    wait_until(
        lambda: list(directory.glob("checkpoints/*-0002.json")),
        "a checkpoint of the second attempt",
    )
    second.kill()
    assert min(int(file.name[5:13]) for file in directory.glob("checkpoints/*-0002.json")) < 1000, (
        "not at the end of the run"
    )


@pytest.mark.slow
def test_a_stopped_peer_is_given_up_within_the_time_limit_and_the_run_goes_on(
    whole: Path, tmp_path: Path, started: Start
) -> None:
    directory = tmp_path / "run"
    process = started(
        torchrun(
            2,
            *TASK,
            f"run.dir={directory}",
            "task.args.sleep_s=0.05",
            "run.timeout_s=3",
            "checkpoint.every_steps=2",
        )
    )
    after_steps(directory, 4, process)
    frozen = workers_of(process.pid)[1]
    frozen.suspend()
    began = time.monotonic()
    survivor = workers_of(process.pid)[0]
    survivor.wait(timeout=30)
    assert time.monotonic() - began < 25
    frozen.kill()
    process.communicate(timeout=60)
    assert process.returncode == 1
    assert run(torchrun(2, *TASK, f"run.dir={directory}")).returncode == 0
    assert differing(whole, directory) == []


@pytest.mark.slow
def test_a_rank_that_leaves_early_fails_the_attempt_at_once_and_the_run_goes_on(
    whole: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    began = time.monotonic()
    done = run(
        torchrun(
            2, *TASK, f"run.dir={directory}", "task.args.leave_at=12", "checkpoint.every_steps=5"
        )
    )
    assert done.returncode == 1 and time.monotonic() - began < 150, (
        "far below the 600 s that a rank is waited for"
    )
    assert json.loads((directory / "attempts" / "0001.end.json").read_text())["why"] == "failed"
    assert run(torchrun(2, *TASK, f"run.dir={directory}")).returncode == 0
    assert differing(whole, directory) == []


def test_a_step_that_never_ends_prints_its_stack_and_exits(tmp_path: Path) -> None:
    done = run(alone(*TASK, f"run.dir={tmp_path}/run", "task.args.hang_at=6", "run.timeout_s=3"))
    assert done.returncode == 1
    assert "hangs at step 6" in done.stderr and "slow_loss" in done.stderr, done.stderr
    assert [event["rank"] for event in events(tmp_path / "run", "hang")] == [0]
    end = json.loads((tmp_path / "run" / "attempts" / "0001.end.json").read_text())
    assert end["why"] == "failed" and end["step"] == 6 and "slow_loss" in end["trace"]


PATIENCE = """
import os, signal, sys, time
from harness.distributed import join
from harness.errors import LostRankError
world = join.join(2.0)
def work():
    if sys.argv[1] == "slow":
        time.sleep(6)
    else:
        os.kill(os.getpid(), signal.SIGSTOP)
    return "done"
try:
    print(world.rank, world.on_writer(work), flush=True)
except LostRankError as error:
    print(world.rank, "lost:", error.what, flush=True)
    os._exit(0)
"""


@pytest.mark.slow
def test_a_slow_writer_is_waited_for_beyond_the_time_limit_and_a_stopped_one_is_not(
    tmp_path: Path, started: Start
) -> None:
    program = tmp_path / "patience.py"
    program.write_text(PATIENCE)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(program),
    ]
    done = run([*command, "slow"])
    assert done.returncode == 0 and sorted(done.stdout.split("\n")[:2]) == ["0 done", "1 done"], (
        done.stdout + done.stderr
    )
    process = started([*command, "stopped"])
    line = there(process.stdout).readline()
    assert line.startswith("1 lost: the writing rank does not answer"), line


@pytest.mark.slow
def test_launch_tells_by_its_exit_code_how_the_run_ended(
    whole: Path, tmp_path: Path, started: Start
) -> None:
    directory = tmp_path / "run"
    command = harness("launch", "--nproc-per-node", "2", *TASK, f"run.dir={directory}")
    process = started([*command, "task.args.sleep_s=0.05"])
    after_steps(directory, 3, process)
    # Plain torchrun would die of it at once, and orphan its workers.
    process.send_signal(signal.SIGUSR1)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75 and "Traceback" not in err, out + err
    assert run(harness("status", str(directory))).returncode == 75

    assert run([*command, "train.epoch=2"]).returncode == 78
    assert run([*command, "train.global_batch_size=47"]).returncode == 78
    failed = run([*command, "task.args.fail_at=3"])
    assert failed.returncode == 1 and "the task fails in forward pass 3" in failed.stderr
    status = run(harness("status", str(directory)))
    assert status.returncode == 1 and "the task fails in forward pass 3" in status.stdout

    assert run(command).returncode == 0
    assert run(harness("status", str(directory))).returncode == 0
    before = sorted((path, path.stat().st_mtime_ns) for path in directory.rglob("*"))
    again = run(command)
    assert again.returncode == 0 and "is finished" in again.stdout
    assert sorted((path, path.stat().st_mtime_ns) for path in directory.rglob("*")) == before
    assert differing(whole, directory) == []


@pytest.mark.slow
def test_of_two_live_starts_the_later_takes_over_and_the_first_ends_superseded(
    whole: Path, tmp_path: Path, started: Start
) -> None:
    directory = tmp_path / "run"
    command = harness(
        "launch",
        "--nproc-per-node",
        "1",
        *TASK,
        f"run.dir={directory}",
        "train.micro_batch_size=48",
        "checkpoint.every_steps=2",
    )
    first = started([*command, "task.args.sleep_s=1.5"])
    after_steps(directory, 3, first)
    second = started(command)
    out, err = second.communicate(timeout=90)
    assert second.returncode == 0, out + err
    out, err = first.communicate(timeout=90)
    assert first.returncode == 76 and "superseded" in err, out + err
    ends = {
        file.name: json.loads(file.read_text())["why"]
        for file in directory.glob("attempts/*.end.json")
    }
    assert ends == {"0001.end.json": "superseded", "0002.end.json": "finished"}


@pytest.mark.parametrize("way", [pytest.param("module", marks=pytest.mark.slow), "elsewhere"])
def test_it_starts_as_a_module_and_from_any_working_directory(way: str, tmp_path: Path) -> None:
    program = ["-m", "harness.train"] if way == "module" else [str(TRAIN)]
    environment = {} if way == "module" else {"PYTHONPATH": ""}
    (tmp_path / "own_task.py").write_text(
        "from small_task import build\n" if way == "module" else OWN_TASK
    )
    settings = [
        "task.name=own_task:build",
        "train.epochs=1",
        "run.dir=relative/run",
        "train.global_batch_size=8",
    ]
    done = run([sys.executable, *program, *settings], cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "relative" / "run" / "config.yaml").exists()


OWN_TASK = """
import torch
from harness import Task

def build():
    model = torch.nn.Linear(2, 1)
    data = torch.utils.data.TensorDataset(torch.randn(32, 2))
    return Task(
        modules=model, optimizers=torch.optim.SGD(model.parameters(), lr=0.1), train_data=data,
        loss=lambda model, batch: model(batch[0]).square().mean(),
    )
"""


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)]
)
def test_a_rank_that_waits_for_others_who_never_come_leaves_when_it_is_asked_to(
    tmp_path, started, number
):
    """The signal that ended them before they could listen only set this one's flag, in a wait that
    no handler interrupts."""
    port = free_ports(1)[0]
    group = {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    process = started(alone("task.name=small_task:build", f"run.dir={tmp_path}/run"), env=group)
    wait_until(lambda: _listens(port), "it waits for the others")
    process.send_signal(number)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0 and "the other ranks did not come" in out, out + err
    assert not (tmp_path / "run" / "checkpoints").exists(), "nothing began"


def _listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
def test_an_interrupt_that_a_launcher_passes_on_at_once_is_no_second_one(
    folder: Path, started: Start
) -> None:
    process = started(
        alone(*crashing(folder, ""), "task.args.sleep_s=0.2", "checkpoint.every_s=null"), cwd=folder
    )
    after_steps(folder / "run", 3, process)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        wait_until(lambda: not is_pending(process, signal.SIGINT), "the signal")
    process.communicate(timeout=60)
    assert process.returncode == 0 and ended(folder / "run", "attempts")["0001"]["saved"] is True


FORKS = """
import multiprocessing, time
from torch.utils.data import get_worker_info

fork = multiprocessing.get_context("fork")
def endless():
    while True:
        time.sleep(0.01)

def hit():  # as early as a signal can come
    os.kill(os.getpid(), signal.SIGTERM)
os.register_at_fork(after_in_child=hit)

class Data(Dataset):
    def __len__(self):
        return 160
    def __getitem__(self, at):
        assert get_worker_info() is not None
        return torch.full((8,), at / 160), torch.ones(1)

run = init()
model = nn.Linear(8, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
run.track(model=model, optimizer=optimizer)
for x, y in run.batches(Data(), 16, epochs=1, num_workers=1):
    if run.step == 2:
        child = fork.Process(target=endless)
        child.start()
        child.join(10)
        print("a child ended with", child.exitcode, flush=True)
        child.kill()
    model(x).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
"""


def test_a_child_that_the_program_forks_ends_by_sigterm_and_loader_workers_do_not(tmp_path):
    lived = live(tmp_path, FORKS, "run")
    assert lived.code == 0, lived.text
    assert "a child ended with -15" in lived.text


ENDS = """
import multiprocessing, time

def endless():
    while True:
        time.sleep(0.01)

run = init()
model = nn.Linear(8, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
run.track(model=model, optimizer=optimizer)
for x, y in run.batches(points(), 16, epochs=1):
    if run.step == 2:
        for daemon in (False, True):
            child = multiprocessing.get_context("fork").Process(target=endless, daemon=daemon)
            child.start()
            if not daemon:
                child.terminate()
                child.join()
                print("a child ended with", child.exitcode, flush=True)
    model(x).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
"""


def test_a_program_that_ends_its_children_by_sigterm_does_not_wait_for_them_for_ever(tmp_path):
    lived = live(tmp_path, ENDS, "run", limit_s=60)
    assert lived.code == 0 and "a child ended with -15" in lived.text, lived.text


CHILDREN = """
import multiprocessing

def fail():
    raise ValueError("the child's own")

run = init()
model = nn.Linear(8, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
run.track(model=model, optimizer=optimizer)
for x, y in run.batches(points(), 16, epochs=1):
    if run.step in (4, 5):
        if not (child := os.fork()):
            sys.exit(3) if run.step == 4 else fail()
        print("a child ended with", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    if run.step == 6:
        child = multiprocessing.get_context("fork").Process(target=fail)
        child.start()
        child.join()
        print("a child ended with", child.exitcode, flush=True)
    model(x).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
"""


def test_a_child_that_ends_by_itself_says_nothing_of_the_run_of_its_parent(tmp_path):
    lived = live(tmp_path, CHILDREN, "run", limit_s=60)
    assert lived.code == 0 and "finished at step 10" in lived.text, lived.text
    assert lived.text.count("a child ended with") == 3 and "child ended with 3" in lived.text
    assert lived.text.count("Error: the child's own") == 2, lived.text
    assert "the loop was left" not in lived.text and "uncaught error" not in lived.text
    end = json.loads((tmp_path / "run/attempts/0001.end.json").read_bytes())
    assert (end["why"], end["step"]) == ("finished", 10)


TWO_RUNS = """
import time
from harness.preemption import AGAIN_S

def train(name, interrupted_at):
    run = harness.init(os.path.join(sys.argv[1], name), seed=1)
    model = nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    run.track(model=model, optimizer=optimizer)
    for x, y in run.batches(points(), 16, epochs=1):
        if run.step == interrupted_at:
            os.kill(os.getpid(), signal.SIGINT)
        model(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return run

try:
    train("a", 3)
except SystemExit as ended:
    print("the first run ended with", ended.code)
run = train("b", None)
print("the second run is finished:", run.finished, run.step)
for _ in range(2):
    time.sleep(AGAIN_S + 0.1)
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    except KeyboardInterrupt:
        print("interrupted")
        os.kill(os.getpid(), signal.SIGINT)  # the same one, passed on by a launcher
print("the first run goes on:", train("a", None).step)
print("and is finished:", train("a", None).finished)
try:
    harness.init(os.path.join(sys.argv[1], "a"), seed=1, config={"other": 1})
except harness.HarnessError as error:
    print("refused")
try:
    train("c", 2)
except SystemExit as ended:
    print("a run after a refused one was stopped by its own signal only")
"""


@pytest.mark.slow
def test_an_interrupt_of_one_run_does_not_stop_the_next_one_in_the_same_process(tmp_path):
    lived = live(tmp_path, TWO_RUNS, "run")
    assert lived.code == 0, lived.text
    for line in (
        "stopped by SIGINT at step 3",
        "the first run ended with 0",
        "the second run is finished: True 10",
        "the first run goes on: 10",
        "and is finished: True",
        "refused",
        "stopped by SIGINT at step 2",
        "a run after a refused one was stopped by its own signal only",
    ):
        assert line in lived.text, lived.text
    assert lived.text.count("interrupted\n") == 2, lived.text


AFTER = """
import time

def train(name, number=None, at=10):
    run = harness.init(os.path.join(sys.argv[1], name), seed=1)
    model = nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    run.track(model=model, optimizer=optimizer)
    for x, y in run.batches(points(), 16, epochs=1):
        if run.step == at and number:
            os.kill(os.getpid(), number)
        model(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return run

signal.signal(signal.SIGUSR1, lambda number, frame: print("the program's own", flush=True))
"""
LATE = (
    AFTER
    + """
print("finished", train("a", signal.SIGTERM).finished)
train("b")
print("not reached")
"""
)
TWICE = (
    AFTER
    + """
from harness.preemption import AGAIN_S
try:
    train("a", signal.SIGTERM, 5)
except SystemExit:
    os.kill(os.getpid(), signal.SIGTERM)  # the same one, passed on by a launcher
    time.sleep(AGAIN_S + 0.1)
    os.kill(os.getpid(), signal.SIGUSR1)
print("finished", train("a").finished)
time.sleep(AGAIN_S + 0.1)
os.kill(os.getpid(), signal.SIGTERM)
print("not reached")
"""
)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2])
def test_after_a_run_a_signal_does_what_it_did_before(
    number: signal.Signals, tmp_path: Path
) -> None:
    source = f"""
print("finished", train("a").finished)
os.kill(os.getpid(), signal.SIGUSR1)
os.kill(os.getpid(), {int(number)})
time.sleep(1)
print("not reached")
"""
    lived = live(tmp_path, AFTER + source, "run")
    assert lived.code == -number, lived.text
    assert "finished True\nthe program's own\n" in lived.text and "not reached" not in lived.text


def test_a_signal_that_came_too_late_for_one_run_stops_the_next(tmp_path: Path) -> None:
    lived = live(tmp_path, LATE, "run")
    assert lived.code == 0 and "finished True" in lived.text, lived.text
    assert "SIGTERM came too late to stop it" in lived.text, lived.text
    assert "stopped before training began" in lived.text and "not reached" not in lived.text


def test_a_stop_that_is_over_neither_stops_the_next_run_nor_keeps_signals_away(
    tmp_path: Path,
) -> None:
    lived = live(tmp_path, TWICE, "run")
    assert lived.code == -signal.SIGTERM, lived.text
    assert "the program's own\n" in lived.text and "finished True" in lived.text, lived.text
    assert "not reached" not in lived.text
