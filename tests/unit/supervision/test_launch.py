"""`harness launch` starts again what failed, tells a crash loop from bad luck, and leaves nobody
behind."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from comparing import losses
from conftest import alone, events, harness, outliving, run, torchrun, tree, wait_until, workers_of
from launches import (
    CRASHING_TASK,
    SMALL,
    STEPS,
    after_steps,
    begun,
    check_equal,
    crashing,
    ended,
    launch,
    left_behind,
)
from s3_server import free_ports

from harness import preemption, retry
from harness.cli import launch as launching
from harness.cli import supervise
from harness.cli.launch import CommandLine
from harness.config import load
from harness.supervision.restart_policy import Outcome

Start = Callable[..., "subprocess.Popen[str]"]
# So that a save, which goes on in the background, is over when a crash comes some steps later.
SLOWLY = "task.args.sleep_s=0.3"


# --- what fails is started again ---


@pytest.mark.parametrize(
    ("plan", "error"),
    [
        pytest.param(
            "13-1-raise-1", "ValueError: the task crashes at step 13", marks=pytest.mark.slow
        ),
        pytest.param(
            "13-0-raise-1", "ValueError: the task crashes at step 13", marks=pytest.mark.slow
        ),
        *[
            pytest.param(f"13-{rank}-{how}-1", "", marks=pytest.mark.slow)
            for rank in (0, 1)
            for how in ("kill", "segfault", "exit", "leave")
        ],
        pytest.param("1-0-kill-1", "", marks=pytest.mark.slow),
        pytest.param(
            "40-1-raise-1", "ValueError: the task crashes at step 40", marks=pytest.mark.slow
        ),
    ],
)
def test_what_dies_once_is_started_again_and_comes_out_equal(
    plan: str, error: str, whole: Callable[[int], Path], folder: Path
) -> None:
    directory = folder / "run"
    done = run(launch(2, *crashing(folder, plan), "checkpoint.every_steps=5"), cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(folder.glob("*.crashed"))) == 1
    assert list(ended(directory, "launches")) == list(begun(directory, "launches"))
    ends = list(ended(directory, "attempts").values())
    assert ends[-1]["why"] == "finished" and len(ends) <= 2
    assert len(begun(directory, "attempts")) == len(begun(directory, "launches")) == 2
    if error:
        assert (ends[0]["why"], ends[0]["error"], ends[0]["step"]) == (
            "failed",
            error,
            int(plan.split("-")[0]),
        )
        assert ends[0]["rank"] == int(plan.split("-")[1])
        assert done.stderr.count("Traceback (most recent call last)") == 1, done.stderr
    assert done.stderr.count("harness: to be continued: failed") == 1, done.stderr
    check_equal(directory, whole(2))
    assert left_behind(directory) == []
    launches = list(begun(directory, "launches"))
    assert sorted(file.name for file in directory.glob("logs/*")) == [
        f"{name}-rank1.log" for name in launches
    ]
    for name in (
        "attempt 2 begins" if plan.startswith("1-") else "attempt 2 resumes",
        "finished at step 40",
    ):
        assert done.stdout.count(name) == 1, done.stdout


@pytest.mark.slow
def test_what_dies_again_and_again_is_tried_three_times_and_last_from_the_checkpoint_before(
    folder: Path,
) -> None:
    directory = folder / "run"
    settings = (*crashing(folder, "13-0-raise-99"), "checkpoint.every_steps=5")
    assert run(alone(*settings), cwd=folder).returncode == 1
    done = run(launch(1, *settings), cwd=folder)
    assert done.returncode == 1, done.stdout + done.stderr
    attempts = begun(directory, "attempts")
    assert [record["from"] and record["from"]["step"] for record in attempts.values()] == [
        None,
        10,
        10,
        5,
    ]
    assert [end["step"] for end in ended(directory, "attempts").values()] == [13] * 4
    starts = begun(directory, "launches")
    assert [start["failures"] for start in starts.values()] == [0, 1, 2]
    assert [start["steps_back"] for start in starts.values()] == [False, False, True]
    assert len({record["launch"] for record in attempts.values()} - {None}) == 3
    assert done.stderr.count("Traceback (most recent call last)") == 3, done.stderr
    *_, before, last = done.stderr.strip().split("\n")
    assert before == "ValueError: the task crashes at step 13", (
        "the traceback comes last, but for the verdict"
    )
    assert last.startswith(
        "harness: failed: 3 in a row died without a new checkpoint, each at step 13"
    ), last
    assert "the task crashes at step 13" in last and left_behind(directory) == []
    status = run(harness("status", str(directory)))
    assert status.returncode == 1 and "3 in a row" in status.stdout, status.stdout


@pytest.mark.slow
def test_crashes_with_progress_between_them_are_no_crash_loop(
    whole: Callable[[int], Path], folder: Path
) -> None:
    directory = folder / "run"
    plan = ",".join(
        f"{step}-0-{how}-2"
        for step, how in ((7, "raise"), (14, "kill"), (21, "raise"), (28, "exit"))
    )
    done = run(
        launch(1, *crashing(folder, plan), "checkpoint.every_steps=5", SLOWLY),
        cwd=folder,
        limit_s=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(folder.glob("*.crashed"))) == 8 and len(begun(directory, "attempts")) == 9
    check_equal(directory, whole(1))


@pytest.mark.slow
def test_a_second_launch_after_a_crash_loop_tries_three_times_anew(
    whole: Callable[[int], Path], folder: Path
) -> None:
    directory = folder / "run"
    command = launch(1, *crashing(folder, "3-0-raise-4"))
    assert run(command, cwd=folder).returncode == 1
    assert len(begun(directory, "attempts")) == 3
    assert run(command, cwd=folder).returncode == 0
    assert len(begun(directory, "attempts")) == 5
    check_equal(directory, whole(1))


@pytest.mark.slow
@pytest.mark.parametrize("most", [1, 2, 5])
def test_so_many_failures_as_are_set_end_it(most: int, folder: Path) -> None:
    done = run(
        launch(1, *crashing(folder, "3-0-kill-99"), f"run.max_failures={most}"),
        cwd=folder,
        limit_s=300,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert len(list(folder.glob("*.crashed"))) == len(begun(folder / "run", "attempts")) == most
    assert f"{most} in a row" in done.stderr.strip().split("\n")[-1]


@pytest.mark.slow
def test_a_crash_before_any_attempt_exists_is_counted_and_said(
    whole: Callable[[int], Path], folder: Path
) -> None:
    directory = folder / "run"
    done = run(launch(2, *crashing(folder, "0-1-raise-99")), cwd=folder)
    assert done.returncode == 1, done.stdout + done.stderr
    assert begun(directory, "attempts") == {} and len(list(folder.glob("*.crashed"))) == 3
    failed = [json.loads(file.read_text()) for file in directory.glob("launches/*.failed.json")]
    assert [(end["why"], end["error"], end["rank"]) for end in failed] == [
        ("failed", "ValueError: the task crashes while it is built", 1)
    ] * 3
    assert "the task crashes while it is built" in done.stderr.strip().split("\n")[-1], done.stderr
    assert done.stderr.count("Traceback (most recent call last)") == 3, done.stderr
    status = run(harness("status", str(directory)))
    assert status.returncode == 1 and "while it is built" in status.stdout, status.stdout
    (folder / "crashing_task.py").write_text(
        CRASHING_TASK.replace('crash(0, "while it is built")', "")
    )
    assert run(launch(2, *crashing(folder, "")), cwd=folder).returncode == 0
    check_equal(directory, whole(2))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["kill", "raise", "exit"])
def test_torchrun_may_start_again_in_place(
    how: str, whole: Callable[[int], Path], folder: Path
) -> None:
    directory = folder / "run"
    settings = (*crashing(folder, f"13-1-{how}-1,23-0-{how}-1"), "checkpoint.every_steps=5", SLOWLY)
    done = run(harness("launch", "--nproc-per-node=2", "--max-restarts=2", *settings), cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(begun(directory, "launches")) == 1
    attempts = begun(directory, "attempts")
    assert [record["from"] and record["from"]["step"] for record in attempts.values()] == [
        None,
        10,
        20,
    ]
    check_equal(directory, whole(2))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "is_supervised"),
    [
        (("--standalone", "--nnodes", "1:1", "--rdzv-backend=c10d"), True),
        (
            (
                "--nnodes=1:2",
                "--rdzv-backend=c10d",
                "--rdzv-endpoint=localhost:0",
                "--rdzv-conf=last_call_timeout=1",
            ),
            False,
        ),
    ],
    ids=["one node", "several nodes"],
)
def test_options_for_one_node_do_not_end_the_supervision_and_those_for_several_say_so(
    options: tuple[str, ...], is_supervised: bool, folder: Path
) -> None:
    settings = crashing(folder, "3-0-raise-1")
    done = run(harness("launch", *options, "--nproc-per-node=1", *settings), cwd=folder)
    assert done.returncode == (0 if is_supervised else 1), done.stdout + done.stderr
    assert ("harness launch: not supervised" in done.stderr) != is_supervised, done.stderr
    assert len(begun(folder / "run", "launches")) == (2 if is_supervised else 0)


@pytest.mark.parametrize(
    ("options", "environment", "expected"),
    [
        ([], {}, False),
        (["--nnodes=1"], {}, False),
        (["--nn", "1", "--master-addr=a"], {}, False),
        (["--nnodes", "2"], {}, True),
        (["--nnode=1:4"], {}, True),
        ([], {"PET_NNODES": "2"}, True),
        (["--no-python"], {}, False),
    ],
)
def test_only_more_than_one_node_is_several(
    options: list[str],
    environment: dict[str, str],
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("PET_NNODES", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    line = CommandLine("1", options, None, [], load(None, [])[0], {})
    assert line.is_for_several_nodes == expected


# --- asked to stop ---


def interrupt(process: subprocess.Popen[str], number: signal.Signals) -> tuple[int, str]:
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    return process.returncode, out + err


@pytest.mark.slow
@pytest.mark.parametrize(
    "number",
    [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP],
    ids=lambda number: number.name,
)
def test_a_signal_to_launch_saves_ends_everything_and_starts_nothing_again(
    number: signal.Signals, whole: Callable[[int], Path], tmp_path: Path, started: Start
) -> None:
    directory, settings = tmp_path / "run", (*SMALL, f"run.dir={tmp_path}/run")
    process = started(launch(2, *settings, "task.args.sleep_s=0.05"))
    after_steps(directory, 3, process)
    code, text = interrupt(process, number)
    assert code == 75 and "Traceback" not in text, text
    assert left_behind(directory) == []
    (end,) = ended(directory, "attempts").values()
    assert (end["why"], end["saved"], end["signals"]) == ("stopped", True, [number.name])
    assert end["step"] == end["saved_step"] == max(losses(directory))
    assert [end["why"] for end in ended(directory, "launches").values()] == ["stopped"]
    assert run(torchrun(2, *settings)).returncode == 0
    assert [event["step"] for event in events(directory, "step")] == list(range(1, STEPS + 1)), (
        "a step was lost or done twice"
    )
    check_equal(directory, whole(2))


@pytest.mark.slow
def test_a_second_interrupt_ends_everything_at_once(
    whole: Callable[[int], Path], tmp_path: Path, started: Start
) -> None:
    directory, settings = (
        tmp_path / "run",
        (*SMALL, f"run.dir={tmp_path}/run", "checkpoint.every_steps=2"),
    )
    process = started(launch(2, *settings, "task.args.sleep_s=20"))
    wait_until(lambda: events(directory, "begun"), "the attempt")
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.wait(timeout=5)
    assert process.returncode == 130
    wait_until(lambda: not left_behind(directory), "the end of all processes", limit_s=3)
    process.communicate()
    assert run(launch(2, *settings)).returncode == 0
    check_equal(directory, whole(2))


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_saved_and_launch_starts_them_again(
    whole: Callable[[int], Path], tmp_path: Path, started: Start
) -> None:
    directory = tmp_path / "run"
    process = started(launch(2, *SMALL, f"run.dir={directory}", "task.args.sleep_s=0.05"))
    after_steps(directory, 3, process)
    rank_1 = [worker for member in tree(process.pid) for worker in workers_of(member.pid)][1]
    rank_1.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=90)
    assert process.returncode == 0, out + err
    assert [end["why"] for end in ended(directory, "attempts").values()] == ["stopped", "finished"]
    assert [record["failures"] for record in begun(directory, "launches").values()] == [0, 0]
    assert [event["step"] for event in events(directory, "step")] == list(range(1, STEPS + 1))
    check_equal(directory, whole(2))


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 2])
def test_harness_stop_ends_a_launch_and_the_next_goes_on(
    times: int, whole: Callable[[int], Path], tmp_path: Path, started: Start
) -> None:
    directory, settings = tmp_path / "run", (*SMALL, f"run.dir={tmp_path}/run")
    process = started(launch(2, *settings, "task.args.sleep_s=0.2"))
    after_steps(directory, 3, process)
    # At once: when the first has had its way, nobody is there.
    asking = [started(harness("stop", str(directory))) for _ in range(times)]
    assert [one.wait(timeout=60) for one in asking] == [0] * times
    out, err = process.communicate(timeout=30)
    assert process.returncode == 75 and "not started again" in err, out + err
    assert len(begun(directory, "launches")) == 1 and left_behind(directory) == []
    assert run(harness("stop", str(directory))).returncode == 78, "nothing trains now"
    assert run(launch(2, *settings)).returncode == 0
    assert [event["step"] for event in events(directory, "step")] == list(range(1, STEPS + 1))
    check_equal(directory, whole(2))


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT], ids=lambda number: number.name
)
def test_a_signal_in_the_pause_between_two_starts_ends_it(
    number: signal.Signals, folder: Path, started: Start
) -> None:
    directory = folder / "run"
    process = started(launch(1, *crashing(folder, "3-0-exit-99")), cwd=folder)
    wait_until(lambda: len(ended(directory, "launches")) == 2, "the second crash", limit_s=150)
    began = time.monotonic()
    code, text = interrupt(process, number)
    assert code == 75 and "Traceback" not in text, text
    assert time.monotonic() - began < 20 and left_behind(directory) == []


# --- killed ---


@pytest.mark.slow
def test_killed_it_takes_all_its_processes_with_it(tmp_path: Path, started: Start) -> None:
    directory = tmp_path / "run"
    process = started(
        launch(
            2,
            *SMALL,
            f"run.dir={directory}",
            "train.epochs=400",
            "checkpoint.every_steps=2",
            "task.args.sleep_s=0.1",
        )
    )
    after_steps(directory, 3, process)
    workers = [worker for member in tree(process.pid) for worker in workers_of(member.pid)]
    process.kill()
    assert len(workers) == 2 and outliving(workers) == [], "workers outlive what started them"
    process.communicate()
    wait_until(lambda: not left_behind(directory), "the end of all processes", limit_s=20)
    assert ended(directory, "attempts") == ended(directory, "launches") == {}


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["launch", "torchrun", "both"])
def test_killed_it_is_no_failure_and_the_run_goes_on(
    whom: str, whole: Callable[[int], Path], tmp_path: Path, started: Start
) -> None:
    directory, settings = (
        tmp_path / "run",
        (*SMALL, f"run.dir={tmp_path}/run", "checkpoint.every_steps=2"),
    )
    process = started(launch(2, *settings, "task.args.sleep_s=0.1"))
    after_steps(directory, 3, process)
    child = next(member for member in tree(process.pid) if workers_of(member.pid))
    workers = workers_of(child.pid)
    targets: dict[str, list[subprocess.Popen[str] | psutil.Process]] = {
        "launch": [process],
        "torchrun": [child],
        "both": [process, child],
    }
    for target in targets[whom]:
        target.send_signal(signal.SIGKILL)
    assert outliving(workers, limit_s=2) == [], "workers outlive what started them"
    if whom == "torchrun":
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, out + err
        assert len(begun(directory, "launches")) == 2
    else:
        process.communicate()
        wait_until(lambda: not left_behind(directory), "the end of all processes", limit_s=2)
        status = json.loads(run(harness("status", "--json", str(directory))).stdout)
        assert (
            status["state"] in ("running", "to be continued")
            and status["attempts"][0]["end"] is None
        ), status
        assert run(torchrun(2, *settings)).returncode == 0
    check_equal(directory, whole(2))


@pytest.mark.slow
@pytest.mark.parametrize("delay_s", [0.5, 1.5, 3.0, 4.5, 6.0, 8.0])
def test_killed_while_it_starts_it_leaves_nobody_behind(
    delay_s: float, tmp_path: Path, started: Start
) -> None:
    directory = tmp_path / "run"
    process = started(launch(2, *SMALL, f"run.dir={directory}", "task.args.sleep_s=0.5"))
    time.sleep(delay_s)
    process.kill()
    process.wait()
    wait_until(lambda: not left_behind(directory), "the end of all processes", limit_s=10)


# --- what is finished, or trains nothing, is not started again ---


@pytest.mark.slow
def test_a_finished_run_is_not_started_again_where_the_directory_is_empty(tmp_path: Path) -> None:
    bucket = f"run.remote=file://{tmp_path}/bucket"
    first, second = (
        launch(1, *SMALL, f"run.dir={tmp_path / name}", bucket) for name in ("first", "second")
    )
    done = run(first)
    assert done.returncode == 0, done.stdout + done.stderr
    process = run([*second, "run.max_failures=2"], limit_s=120)
    assert process.returncode == 0, process.stdout + process.stderr
    assert f"{tmp_path}/bucket is finished, at step {STEPS}" in process.stdout
    assert not (tmp_path / "second").exists()


LOOP = """
import os, signal, sys, time
from pathlib import Path
import torch
import harness

run = harness.init(sys.argv[1], seed=1)
model = torch.nn.Linear(8, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
run.track(model=model, optimizer=optimizer)
data = torch.utils.data.TensorDataset(torch.ones(160, 8))
for (x,) in run.batches(data, 16, epochs=EPOCHS):
    model(x).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
here = Path(__file__).parent
with open(here / "after.txt", "a") as file:
    file.write(f"{run.step}\\n")
if (here / "kill").exists():
    (here / "kill").unlink()
    os.kill(os.getpid(), signal.SIGKILL)
if (here / "wait").exists():
    time.sleep(300)
"""


@pytest.mark.slow
def test_a_program_goes_on_after_its_loop_whatever_is_killed_there_and_may_become_longer(
    tmp_path: Path, started: Start
) -> None:
    program, after = tmp_path / "my_loop.py", tmp_path / "after.txt"
    program.write_text(LOOP.replace("EPOCHS", "1"))
    for name in ("kill", "wait"):
        (tmp_path / name).touch()
    command = launch(1, f"run.dir={tmp_path}/run", str(program), f"{tmp_path}/run")
    process = started(command)
    wait_until(
        lambda: (after.exists() and after.read_text() == "10\n10\n") or process.poll() is not None,
        "the second start's end of the loop",
    )
    code, text = interrupt(process, signal.SIGTERM)
    assert code == 75 and "my_loop.py was ended from outside; a start" in text, text
    assert "failed (after new checkpoints): the run is finished, but" in text, text
    (tmp_path / "wait").unlink()
    for epochs, steps in ((1, 10), (2, 20)):
        program.write_text(LOOP.replace("EPOCHS", str(epochs)))
        done = run(command)
        assert done.returncode == 0 and "my_loop.py is started" in done.stdout, done.stderr
        assert after.read_text().endswith(f"\n{steps}\n"), done.stdout
    assert left_behind(tmp_path / "run") == []


@pytest.mark.slow
def test_a_task_that_exits_before_training_ends_as_a_failure(folder: Path) -> None:
    done = run(launch(1, *crashing(folder, "0-0-quit-99")), cwd=folder, limit_s=120)
    assert done.returncode == 78, done.stdout + done.stderr
    assert "crashing_task:build ended the process with exit code 0 before training" in done.stderr
    assert "stopped" not in done.stderr and "Traceback" not in done.stderr
    assert len(list(folder.glob("*.crashed"))) == 1, "it is not started again"


# --- what cannot work is refused at once ---


@pytest.mark.slow
def test_a_wrong_configuration_spawns_nothing_and_writes_nothing(
    tmp_path: Path, started: Start
) -> None:
    directory = tmp_path / "run"
    for wrong in ("run.max_failures=0", "train.global_batch_size=47", "task.args.fall_at=3"):
        process = started(launch(2, *SMALL, f"run.dir={directory}", wrong))
        seen = 0
        while process.poll() is None:
            seen = max(seen, len(tree(process.pid)))
            time.sleep(0.05)
        out, err = process.communicate()
        assert process.returncode == 78 and "Traceback" not in err, out + err
        assert wrong.partition("=")[0].rpartition(".")[2] in err or "47" in err, err
        assert seen <= 1, f"{wrong}: a process was spawned"
        assert not directory.exists()


@pytest.mark.slow
def test_a_wrong_configuration_that_only_the_ranks_can_see_is_not_tried_again(
    whole: Callable[[int], Path], tmp_path: Path
) -> None:
    directory, settings = tmp_path / "run", (*SMALL[:-1], f"run.dir={tmp_path}/run")
    assert run(launch(1, *settings, "train.max_steps=10")).returncode == 0
    done = run(launch(1, *settings, "train.max_steps=20", "train.clip_norm=0.5"))
    assert done.returncode == 78 and "train.clip_norm" in done.stderr, done.stdout + done.stderr
    assert len(begun(directory, "launches")) == 2 and len(begun(directory, "attempts")) == 1
    assert run(launch(1, *settings)).returncode == 0


@pytest.mark.slow
def test_an_unreachable_remote_ends_it_within_its_limit(tmp_path: Path) -> None:
    keys = {
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    began = time.monotonic()
    done = run(
        launch(
            1, *SMALL, f"run.dir={tmp_path}/run", "run.remote=s3://bucket/run", "store.wait_s=4"
        ),
        env=keys | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_ports(1)[0]}"},
    )
    assert done.returncode == 74 and "Traceback" not in done.stderr, done.stdout + done.stderr
    assert time.monotonic() - began < 45
    assert not list(tmp_path.glob("run/attempts/*.json"))


# --- pauses between two starts ---


class Pauses:
    """A sleeper that waits for nothing, and asks to give up after so many seconds."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, give_up_after_s: float = float("inf")
    ) -> None:
        self.now, self.limit_s = 0.0, give_up_after_s
        monkeypatch.setattr(time, "monotonic", lambda: self.now)

    def sleep(self, seconds: float) -> None:
        assert 0 < seconds <= retry.SLICE_S
        self.now += seconds

    def give_up(self) -> bool:
        return self.now >= self.limit_s


def test_pauses_between_starts_grow_to_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses, began = Pauses(monkeypatch), list[float]()

    def work() -> int:
        began.append(pauses.now)
        return len(began)

    assert retry.until_enough(work, lambda result: result < 12, sleep=pauses.sleep) == 12
    waits = [later - earlier for earlier, later in itertools.pairwise(began)]
    for number, wait in enumerate(waits):
        full = min(retry.LONGEST_PAUSE_S, retry.FIRST_PAUSE_S * 2**number)
        assert 0.5 * full - 1e-6 <= wait <= full + 1e-6, (number, wait)


def test_a_result_that_is_enough_is_returned_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses = Pauses(monkeypatch)
    assert (
        retry.until_enough(lambda: "enough", lambda result: False, sleep=pauses.sleep) == "enough"
    )
    assert pauses.now == 0


def test_a_pause_ends_when_it_is_given_up_and_who_gave_up_has_the_last_word(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pauses, calls = Pauses(monkeypatch, give_up_after_s=20.0), list[float]()

    def work() -> str:
        calls.append(pauses.now)
        return f"result {len(calls)}"

    assert (
        retry.until_enough(work, lambda result: True, give_up=pauses.give_up, sleep=pauses.sleep)
        == f"result {len(calls)}"
    )
    assert pauses.now < 20.0 + 2 * retry.SLICE_S and all(at < 20.0 for at in calls[:-1]), (
        pauses.now,
        calls,
    )


def test_what_raises_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses, calls = Pauses(monkeypatch), list[int]()

    def work() -> int:
        calls.append(1)
        raise ValueError("a mistake")

    with pytest.raises(ValueError, match="a mistake"):
        retry.until_enough(work, lambda result: True, sleep=pauses.sleep)
    assert calls == [1]


def test_stores_that_fail_at_each_end_of_a_launch_end_it(monkeypatch, tmp_path) -> None:
    """The begin of each launch is recorded: only its end, when the disk is full, is not."""
    codes = itertools.chain([74, 75, 74, 74, 74], itertools.repeat(0))
    began = list[str]()

    def before(settings: object, name: str) -> int:
        began.append(name)
        return 75

    monkeypatch.setattr(supervise, "before", before)
    monkeypatch.setattr(
        supervise, "after", lambda *given, stopped: Outcome("unknown", "full", next(codes))
    )
    monkeypatch.setattr(launching, "_child", lambda name, arguments: 1)
    monkeypatch.setattr(preemption, "install", lambda: None)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(retry, "FIRST_PAUSE_S", 0.001)
    settings, _ = load(None, [f"run.dir={tmp_path}"])
    assert launching._supervise(settings, []) == 74
    assert len(began) == 5, "those before one that could be read are forgotten"
