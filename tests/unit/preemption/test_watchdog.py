"""What makes no progress says where it stands and ends; what is only slow, or was suspended, goes
on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import timeit
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from conftest import Clock, events, harness, run, tree, wait_until, workers_of
from launches import SMALL, after_steps, begun, check_equal, crashing, ended, launch, left_behind
from there import there

from harness.monitoring.step_timeouts import LEARNED_S, LEARNED_TIMES, StepTimeouts
from harness.preemption.watchdog import Watchdog
from harness.supervision.exit_record import ExitRecord

Start = Callable[..., "subprocess.Popen[str]"]

WAITING = """thread idler:
  File "/lib/threading.py", line 1, in wait
    pass

thread MainThread:
  File "/home/me/task.py", line 7, in loss
    model(batch)
  File "/lib/torch/nn/parallel/distributed.py", line 900, in _sync_buffers
    dist._broadcast_coalesced(tensors)
"""


@pytest.mark.parametrize(
    ("stacks", "waits"),
    [(WAITING, True), (WAITING.rpartition("  File")[0], False)],
    ids=["waiting", "hanging"],
)
def test_a_rank_that_waits_for_another_one_leaves_it_the_first_word(
    stacks: str, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    hook = sys.excepthook
    ExitRecord().hung("a step", 3.0, stacks)
    sys.excepthook = hook
    assert bool(slept) == waits


PROGRAM = """
import ctypes, sys, threading, time
from harness.preemption import watchdog
watchdog.TICK_S, watchdog.SUSPENDED_S = 0.1, 0.5

def tell(what, limit_s, stacks):
    print(f"{what} took longer than {limit_s} s", stacks, sep="\\n", file=sys.stderr, flush=True)

def say(text):
    print(text, flush=True)

def idle():
    time.sleep(60)

threading.Thread(target=idle, daemon=True, name="idler").start()
"""


def program(text: str) -> list[str]:
    """A process that runs this text, with a watchdog that looks more often than the real one."""
    return [sys.executable, "-c", PROGRAM + text]


# --- what hangs ends ---


def test_what_takes_too_long_ends_the_process_with_every_threads_stack(tmp_path: Path) -> None:
    began = time.monotonic()
    done = run(
        program(
            'dog = watchdog.Watchdog(tell); say("begun"); '
            'dog.expect("this piece of work", 0.3); time.sleep(60)'
        )
    )
    assert (done.returncode, done.stdout) == (1, "begun\n"), done.stderr
    assert time.monotonic() - began < 50
    assert done.stderr.startswith("this piece of work took longer than 0.3 s\n")
    threads = done.stderr.split("\nthread ")[1:] or done.stderr.split("thread ")[1:]
    assert "idle" in done.stderr and "thread idler:" in done.stderr
    assert threads[-1].startswith("MainThread:") and "<module>" in threads[-1], done.stderr
    assert "thread watchdog:" not in done.stderr, "who looks on is not of interest"


@pytest.mark.parametrize(
    ("report", "report_s", "backstop_s"),
    [
        ("time.sleep(60)", 0.5, 60),
        ("1 / 0", 60, 60),
        ("sys.exit(0)", 60, 60),
        ("ctypes.PyDLL(None).sleep(60)", 60, 0.5),
    ],
)
def test_a_report_that_hangs_or_fails_does_not_keep_it_alive(
    report: str, report_s: float, backstop_s: float, started: Start
) -> None:
    text = f"""
watchdog.REPORT_S, watchdog.BACKSTOP_S = {report_s}, {backstop_s}
dog = watchdog.Watchdog(lambda *_: {report})
say("begun")
# a tick within it, which sets the alarm, or one so late that it is taken for the end of a
# suspension
dog.expect("work", 0.7)
time.sleep(60)
"""
    process = started(program(text))
    assert there(process.stdout).readline() == "begun\n"
    assert process.wait(timeout=40) == 1


def test_a_hang_that_holds_the_interpreter_is_ended_too(started: Start) -> None:
    text = """
import faulthandler
watchdog.BACKSTOP_S, set_alarm, is_set = 0.5, faulthandler.dump_traceback_later, threading.Event()
def noted(*arguments, **options):
    set_alarm(*arguments, **options)
    is_set.set()
faulthandler.dump_traceback_later = noted
dog = watchdog.Watchdog(tell)
dog.expect("work", 0.7)
is_set.wait()
ctypes.PyDLL(None).sleep(60)
"""
    process = started(program(text))
    out, err = process.communicate(timeout=40)
    assert process.returncode == 1, out + err
    assert "Timeout" in err and "idle" in err and "<module>" in err, (
        "where the threads are, as far as it can be told"
    )


# --- what does not hang goes on ---


@pytest.mark.slow
def test_rest_expect_and_close_prevent_it(started: Start) -> None:
    text = """
watchdog.BACKSTOP_S = 0.5
dog = watchdog.Watchdog(tell)
for _ in range(4):
    dog.expect("a short piece", 1.6)
    time.sleep(0.5)
dog.rest()
time.sleep(1.8)
dog.expect("the next", 1.6)
dog.close()
time.sleep(1.8)
dog.expect("what comes after the end", 0.1)
time.sleep(0.5)
say([thread.name for thread in threading.enumerate() if thread.name == "watchdog"])
"""
    process = started(program(text))
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "[]\n", "")


@pytest.mark.slow
def test_a_process_that_was_stopped_is_not_taken_for_one_that_hangs(started: Start) -> None:
    text = """
dog = watchdog.Watchdog(tell)
dog.expect("work", 3.0)
until = time.monotonic() + 5.0  # known before anybody is told, or the stop comes first
say("begun")
while time.monotonic() < until:
    time.sleep(0.05)
dog.rest()
say("done")
"""
    process = started(program(text))
    assert there(process.stdout).readline() == "begun\n"
    process.send_signal(signal.SIGSTOP)
    wait_until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_STOPPED, "the stop")
    time.sleep(4.0)  # longer than the limit
    process.send_signal(signal.SIGCONT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "done\n"), err


def test_a_process_that_was_stopped_is_still_ended_when_it_hangs_afterwards(started: Start) -> None:
    process = started(
        program(
            'dog = watchdog.Watchdog(tell); dog.expect("work", 1.0); say("begun"); time.sleep(60)'
        )
    )
    assert there(process.stdout).readline() == "begun\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(1.6)
    process.send_signal(signal.SIGCONT)
    out, err = process.communicate(timeout=40)
    assert process.returncode == 1 and "work took longer" in err, out + err


def test_to_say_what_is_expected_costs_next_to_nothing() -> None:
    dog = Watchdog(lambda *_: None)
    try:
        best_s = (
            min(
                timeit.repeat(
                    lambda: dog.expect("a step", 600),
                    timer=time.thread_time,
                    number=10_000,
                    repeat=7,
                )
            )
            / 10_000
        )
    finally:
        dog.close()
    assert best_s < 5e-6


# --- how long what may take ---


@pytest.fixture
def watching() -> Iterator[Callable[..., tuple[StepTimeouts, Clock, Callable[[], float | None]]]]:
    """A watch by a clock of its own, and what it allows now, in seconds."""
    made: list[StepTimeouts] = []

    def make(
        limit_s: float = 600.0, step_s: float | None = None
    ) -> tuple[StepTimeouts, Clock, Callable[[], float | None]]:
        clock = Clock(1000.0)
        watch = StepTimeouts(limit_s, step_s, lambda *_: None, clock)
        made.append(watch)

        def allowed() -> float | None:
            return watch._dog._awaited and watch._dog._awaited[0] - clock.now

        return watch, clock, allowed

    yield make
    for watch in made:
        watch.close()


def test_a_steps_limit_is_learned_from_the_longest_one(watching) -> None:
    watch, clock, allowed = watching(limit_s=LEARNED_S + 5 * LEARNED_TIMES)
    watch.first_step()
    assert allowed() == 3 * watch.limit_s
    watch.step()
    for took_s, longest_s in ((1.0, 1.0), (0.1, 1.0), (4.0, 4.0), (3.0, 4.0), (100.0, 5.0)):
        clock.now += took_s
        watch.step()
        assert allowed() == pytest.approx(LEARNED_S + LEARNED_TIMES * longest_s)


def test_before_a_step_was_measured_it_may_take_as_long_as_any(watching) -> None:
    watch, clock, allowed = watching()
    watch.first_step()
    clock.now += 300
    watch.step()
    assert allowed() == 600, "steps of minutes are legitimate; nothing is learned yet"
    for _ in range(3):
        clock.now += 90
        watch.saving()
        watch.step()
        assert allowed() == 600, "each step is followed by a save, so none was measured"


def test_a_steps_limit_that_is_set_is_taken(watching) -> None:
    watch, clock, allowed = watching(step_s=7.0)
    watch.first_step()
    assert allowed() == 1800, "the first may have to compile"
    for took_s in (1.0, 5.0):
        watch.step()
        assert allowed() == 7
        clock.now += took_s
    watch.evaluation()
    assert allowed() == 1800
    watch.evaluated()
    assert allowed() == 600
    watch.saving()
    assert allowed() == 3600
    watch.rest()
    assert allowed() is None


def test_a_steps_limit_above_that_of_all_waits_holds_for_the_first_step_and_after_an_evaluation(
    watching,
) -> None:
    watch, _, allowed = watching(limit_s=600.0, step_s=3600.0)
    watch.first_step()
    assert allowed() == 3 * 3600
    watch.step()
    assert allowed() == 3600
    watch.evaluation()
    watch.evaluated()
    assert allowed() == 3600


def test_an_evaluation_or_a_save_is_no_step_to_learn_from(watching) -> None:
    watch, clock, allowed = watching(limit_s=10_000)
    watch.step()
    for pause in (watch.evaluation, watch.saving, watch.rest):
        clock.now += 1
        watch.step()
        pause()
        clock.now += 1000
        watch.step()
        assert watch.longest_s == 1 and allowed() == LEARNED_S + LEARNED_TIMES


# --- real runs ---


def hangs(directory: Path) -> dict[int, dict]:
    return {event["rank"]: event for event in events(directory, "hang")}


def check_hang_is_told(directory: Path, output: str, rank: int) -> None:
    found = hangs(directory)
    assert set(found) == {0, 1}, found
    assert (
        "in die" in found[rank]["stacks"]
        and found[rank]["step"] == 13
        and "longer than" in found[rank]["error"]
    )
    assert "in die" not in found[1 - rank]["stacks"], "that one waits for the other"
    end = ended(directory, "attempts")["0001"]
    assert (end["why"], end["rank"], end["step"]) == ("failed", rank, 13), end
    assert "in die" in end["trace"] and "a step took longer than" in end["error"]
    assert (
        f"rank {rank} is stuck in die ("
        in (directory / "hangs/0001.txt").read_text().splitlines()[0]
    )
    logs = {1: "".join(file.read_text() for file in directory.glob("logs/*-rank1.log")), 0: output}
    for own in (0, 1):
        assert f"rank {own} hangs at step 13" in logs[own] and ("in die\n" in logs[own]) == (
            own in (0, rank)
        ), logs[own]


@pytest.mark.slow
def test_a_rank_that_hangs_is_told_of_and_the_run_goes_on(
    whole: Callable[[int], Path], folder: Path
) -> None:
    directory = folder / "run"
    done = run(
        launch(
            2, *crashing(folder, "13-1-hang-1"), "checkpoint.every_steps=5", "run.step_timeout_s=4"
        ),
        cwd=folder,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    check_hang_is_told(directory, done.stderr, 1)
    assert len(begun(directory, "launches")) == 2 and left_behind(directory) == []
    check_equal(directory, whole(2))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["--max-restarts=1", "--max-restarts=0"])
def test_a_writer_that_hangs_is_told_of_and_the_run_goes_on(
    how: str, whole: Callable[[int], Path], folder: Path
) -> None:
    directory = folder / "run"
    settings = (
        *crashing(folder, "13-0-hang-1"),
        "checkpoint.every_steps=5",
        "run.step_timeout_s=4",
    )
    done = run(harness("launch", "--nproc-per-node=2", how, *settings), cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    check_hang_is_told(directory, done.stderr, 0)
    assert len(begun(directory, "launches")) == (1 if how == "--max-restarts=1" else 2)
    check_equal(directory, whole(2))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_hangs_with_the_interpreters_lock_is_given_up(
    rank: int, whole: Callable[[int], Path], folder: Path
) -> None:
    directory = folder / "run"
    settings = (
        *crashing(folder, f"13-{rank}-lock-1"),
        "checkpoint.every_steps=5",
        "run.step_timeout_s=4",
        "run.timeout_s=20",
    )
    done = run(launch(2, *settings), cwd=folder, limit_s=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert 1 - rank in hangs(directory) and left_behind(directory) == []
    check_equal(directory, whole(2))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_stopped_is_left_within_the_limit_and_the_run_goes_on(
    rank: int,
    whole: Callable[[int], Path],
    tmp_path: Path,
    started: Start,
) -> None:
    directory = tmp_path / "run"
    settings = (
        *SMALL,
        f"run.dir={directory}",
        "task.args.sleep_s=0.1",
        "checkpoint.every_steps=2",
        "run.step_timeout_s=4",
    )
    process = started(launch(2, *settings))
    after_steps(directory, 5, process)
    workers = ranks_of(process)
    workers[rank].suspend()
    workers[1 - rank].wait(timeout=4 + 8)
    out, err = process.communicate(timeout=180)  # torchrun gives the stopped one 30 s
    assert process.returncode == 0, out + err
    assert hangs(directory)[1 - rank]["step"] > 4
    assert len(begun(directory, "launches")) == 2 and left_behind(directory) == []
    check_equal(directory, whole(2))


@pytest.mark.slow
@pytest.mark.parametrize("stopped_s", [2, 8, 20])
def test_a_run_that_is_suspended_as_a_whole_goes_on_where_it_was(
    stopped_s: int,
    whole: Callable[[int], Path],
    tmp_path: Path,
    started: Start,
) -> None:
    directory = tmp_path / "run"
    settings = (*SMALL, f"run.dir={directory}", "task.args.sleep_s=0.1", "run.step_timeout_s=4")
    process = started(launch(2, *settings))
    after_steps(directory, 5, process)
    members = tree(process.pid)
    for member in members:
        member.suspend()
    time.sleep(stopped_s)
    for member in members:
        member.resume()
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    assert len(begun(directory, "attempts")) == 1, json.dumps(ended(directory, "attempts"))
    check_equal(directory, whole(2))


def ranks_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The training processes of a launch."""
    found: list[psutil.Process] = []

    def are_there() -> bool:
        found.extend(w for member in tree(process.pid) for w in workers_of(member.pid))
        return bool(found)

    wait_until(are_there, "the ranks")
    return found


CHURN = """
import gc, threading, time
from harness.threads import current_frames


class Cycle:
    def __init__(self):
        self.me = self

    def __del__(self):  # other threads run meanwhile
        time.sleep(0.001)


def churn():
    while True:
        threading.Thread(target=int).start()


threading.Thread(target=churn, daemon=True).start()
gc.set_threshold(1)
for _ in range(100):
    for _ in range(5):
        Cycle()
    assert len(current_frames()) >= 2
print("never blocked")
"""


def test_to_look_at_other_threads_does_not_block_them_though_garbage_is_collected():
    """A collection inside of the look, during which another thread starts, blocks Python 3.11."""
    done = run([sys.executable, "-c", CHURN], limit_s=60)
    assert done.stdout == "never blocked\n", done.stderr
