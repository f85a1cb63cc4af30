"""How much time is left, and what is done with it: what SLURM says, however it says it, and real
runs that it ends.

`squeue` and `scontrol` are small shell scripts here, which print what the real ones were seen to
print.
"""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from comparing import differing, losses
from conftest import events, wait_until
from hypothesis import given
from hypothesis import strategies as st
from remote_lives import Born, shared_nursery

from harness import cli, preemption
from harness.preemption import deadline
from harness.preemption.deadline import (
    SAFETY,
    Deadline,
    job_left_s,
    parse_left,
    plan,
    slurm_grace_s,
)

JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_PARTITION": "low"}
SHOWS = (
    'case "$1 $2 $3" in\n'
    '"show partition low") echo "PartitionName=low AllowGroups=ALL ExclusiveUser=NO '
    'GraceTime=20 Hidden=NO PreemptMode=REQUEUE State=UP" ;;\n'
    '"show config "*) printf \'Configuration data as of 2026-11-22\\n'
    "KillOnBadExit           = 0\\nKillWait                = 10 sec\\n' ;;\n"
    '*) echo "slurm error" >&2; exit 1 ;;\n'
    "esac\n"
)
TASK = [
    "task.name=small_task:build",
    "train.epochs=3",
    "log.every_steps=1",
    "checkpoint.every_s=null",
    "resume.accept=[config]",
]


class Programs:
    """A folder that is searched for programs before, or instead of, all others."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def put(self, name: str, script: str) -> None:
        (self.folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (self.folder / name).chmod(0o755)

    @property
    def path(self) -> str:
        return f"{self.folder}{os.pathsep}{os.environ['PATH']}"


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    found = Programs(tmp_path / "bin")
    monkeypatch.setenv("PATH", found.path)
    return found


@pytest.fixture(autouse=True)
def nothing_requested() -> Iterator[None]:
    preemption.clear()
    yield
    preemption.clear()


# --- what SLURM says ---


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0:59", 59),
        ("0:00", 0),
        ("1:00", 60),
        ("59:59", 3599),
        ("1:29:59", 5399),
        ("3:19:59", 11999),
        ("23:59:59", 86399),
        ("2-00:59:59", 176399),
        ("1-00:00:00", 86400),
        ("364-23:59:59", 31535999),
        ("0:42\n", 42),
        (" 0:42 ", 42),
    ],
)
def test_every_format_of_a_time_left_is_read(text, seconds):
    assert parse_left(text) == seconds


@pytest.mark.parametrize(
    "text",
    [
        "UNLIMITED",
        "NOT_SET",
        "INVALID",
        "",
        "\n",
        "N/A",
        "Partition_Limit",
        "-1:00",
        "1:2:3:4:5",
        "1-",
        "slurm_load_jobs error: x",
    ],
)
def test_no_limit_and_what_is_no_time_are_no_deadline(text):
    assert parse_left(text) == math.inf


@given(st.integers(0, 400 * 86400))
def test_a_time_left_is_read_as_slurm_spells_it(seconds):
    days, rest = divmod(seconds, 86400)
    hours, minutes, last = rest // 3600, rest % 3600 // 60, rest % 60
    spelled = (
        f"{days}-{hours:02}:{minutes:02}:{last:02}"
        if days
        else f"{hours}:{minutes:02}:{last:02}"
        if hours
        else f"{minutes}:{last:02}"
    )
    assert parse_left(spelled) == seconds


def test_newer_slurm_says_in_the_environment_when_the_job_ends(programs):
    programs.put("squeue", "echo 0:01")
    end = int(time.time()) + 500
    assert 490 < job_left_s(JOB | {"SLURM_JOB_END_TIME": str(end)}) <= 500


@pytest.mark.parametrize("end", ["", "soon", "Unknown", "-5"])
def test_older_slurm_is_asked(end, programs):
    programs.put("squeue", '[ "$*" = "-h -j 7 -o %A %L" ] && echo 7 1:40')
    assert job_left_s(JOB | {"SLURM_JOB_END_TIME": end}) == 100
    assert job_left_s(JOB) == 100


def test_of_a_job_array_the_task_alone_is_asked_for(programs):
    """The id of one of its tasks is the whole array's: asked for that, SLURM answers for all of
    them."""
    programs.put("squeue", r'[ "$3" = 7 ] && printf "8 5:00\n7 1:40\n9 3:00\n"')
    for array in ("7", "5"):  # 5: of the job in which this one was submitted
        assert job_left_s(JOB | {"SLURM_ARRAY_JOB_ID": array, "SLURM_ARRAY_TASK_ID": "2"}) == 100


@pytest.mark.parametrize(
    "script",
    [
        "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1",
        "echo",
        "echo 7 UNLIMITED",
        "exit 0",
        r"printf '\xff\xfe\x00\n'",
        "kill -9 $$",
        "echo 17 0:1; echo 7; echo 0:2",
    ],
)
def test_a_controller_that_talks_rubbish_gives_no_deadline(script, programs):
    for name in ("squeue", "scontrol"):
        programs.put(name, script)
    assert job_left_s(JOB) == math.inf
    assert slurm_grace_s(JOB) is None


def test_without_slurms_programs_there_is_no_deadline(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert job_left_s(JOB) == math.inf
    assert slurm_grace_s(JOB) is None
    (tmp_path / "squeue").write_text("not a program")
    assert job_left_s(JOB) == math.inf


def test_the_grace_after_a_preemption_is_the_partitions_and_then_the_clusters(programs):
    programs.put("scontrol", SHOWS)
    assert slurm_grace_s(JOB) == 30
    assert slurm_grace_s({"SLURM_JOB_ID": "7"}) is None
    assert slurm_grace_s(JOB | {"SLURM_JOB_PARTITION": "other"}) is None


def test_a_program_that_hangs_is_given_up(programs, monkeypatch):
    monkeypatch.setattr(deadline, "ASK_S", 0.2)
    for name in ("squeue", "scontrol"):
        programs.put(name, "exec sleep 20")
    began = time.monotonic()
    assert job_left_s(JOB) == math.inf
    assert slurm_grace_s(JOB) is None
    assert time.monotonic() - began < 15


# --- when the process will be killed ---


def asked(environment: dict[str, str], grace_s: float | None = None) -> Deadline:
    """A deadline whose question has been answered."""
    found = Deadline(grace_s, environment)
    found.ask()
    wait_until(
        lambda: not any(thread.name == "deadline" for thread in threading.enumerate()), "an answer"
    )
    return found


def test_outside_of_slurm_nobody_is_asked_and_nothing_is_known(programs):
    programs.put("squeue", f"touch {programs.folder}/asked")
    found = asked({})
    assert (found.left_s(), found.is_near(1e9)) == (math.inf, False)
    assert not (programs.folder / "asked").exists()


@pytest.mark.parametrize("newer", [True, False])
def test_the_time_limit_counts_down_and_is_near_when_what_is_needed_no_longer_fits(newer, programs):
    programs.put("squeue", "echo 7 16:40")
    programs.put("scontrol", "exit 1")
    found = asked(JOB | ({"SLURM_JOB_END_TIME": str(int(time.time()) + 1000)} if newer else {}))
    assert 970 < found.left_s() <= 1000
    assert found.is_near(1001) and not found.is_near(900)
    at = time.monotonic()
    found.clock = lambda: at + 950
    assert 20 < found.left_s() <= 50
    found.clock = lambda: at + 2000
    assert found.left_s() == 0.0 and found.is_near(0)


def test_garbage_about_the_limit_does_not_hide_the_grace(programs):
    programs.put("squeue", r"printf '\xff\xfe\x00\n'")
    programs.put("scontrol", SHOWS)
    assert asked(JOB).grace_s == 30


def test_a_grace_that_was_told_is_not_asked_for(programs):
    programs.put("squeue", "echo 10:00")
    programs.put("scontrol", SHOWS)
    assert asked(JOB, grace_s=5.0).grace_s == 5.0


@pytest.mark.parametrize(
    ("why", "begins"),
    [
        ("SIGTERM", True),
        ("SIGINT", False),
        ("SIGUSR1", False),
        ("SIGUSR2", False),
        ("harness stop", False),
    ],
)
def test_of_all_that_stops_a_run_only_sigterm_is_followed_by_a_kill(why, begins):
    found = Deadline(40.0, {})
    assert found.left_s() == math.inf
    preemption.request(why)
    assert (30 < found.left_s() <= 40) if begins else found.left_s() == math.inf


def test_the_grace_begins_with_the_first_sigterm_whatever_came_before():
    found, offset = Deadline(40.0, {}), 0.0
    found.clock = lambda: time.monotonic() + offset
    preemption.request("SIGUSR1")
    preemption.request("SIGTERM")
    offset = 10
    preemption.request("SIGTERM")
    assert 20 < found.left_s() <= 30
    offset = 50
    assert found.left_s() == 0.0


@pytest.mark.parametrize("why", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"])
@pytest.mark.parametrize(("value", "limit_s"), [(None, 30), ("", 30), ("300", 300), ("5", 5)])
def test_torchrun_kills_its_workers_after_any_signal_that_it_passes_on(why, value, limit_s):
    environment = {"TORCHELASTIC_RUN_ID": "none"} | (
        {} if value is None else {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": value}
    )
    found = Deadline(None, environment)
    assert found.left_s() == math.inf
    preemption.request(why)
    assert limit_s - 4 < found.left_s() <= limit_s
    assert Deadline(None, environment | {"TORCHELASTIC_RUN_ID": "x"}).left_s() <= limit_s


def test_torchrun_kills_nobody_for_what_is_no_signal():
    found = Deadline(None, {"TORCHELASTIC_RUN_ID": "none"})
    preemption.request("harness stop")
    assert found.left_s() == math.inf


def test_torchruns_time_begins_with_its_signal_and_not_with_an_earlier_request():
    preemption.request("harness stop")
    before = time.monotonic()
    wait_until(lambda: time.monotonic() > before + 0.3, "a moment")
    signalled = time.monotonic()
    preemption.request("SIGTERM")
    environment = {"TORCHELASTIC_RUN_ID": "none", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "1"}
    assert Deadline(None, environment, clock=lambda: signalled).left_s() >= 1


def test_the_nearest_of_all_ends_counts():
    found = Deadline(
        500.0, {"TORCHELASTIC_RUN_ID": "none", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "200"}
    )
    found.job_end = time.monotonic() + 50
    preemption.request("SIGTERM")
    assert 40 < found.left_s() <= 50
    found.job_end = math.inf
    assert 190 < found.left_s() <= 200
    found.grace_s = 30.0
    assert 20 < found.left_s() <= 30


# --- what is done with the time ---

SECONDS = st.floats(0, 1e6) | st.just(math.inf)


@given(SECONDS, st.floats(0, 1e5), st.floats(0, 1e5), st.booleans(), st.booleans())
def test_nothing_is_planned_that_does_not_fit_and_nothing_left_out_that_does(
    left_s, save_s, upload_s, has_remote, is_scratch
):
    planned = plan(left_s, save_s, upload_s, has_remote=has_remote, is_scratch=is_scratch)
    needed_s = save_s + (upload_s if has_remote else 0)
    if planned.save:
        assert save_s <= left_s
    if planned.upload:
        assert has_remote and planned.save and needed_s <= left_s
    if SAFETY * needed_s <= left_s:
        assert planned.save and planned.upload == has_remote
    if has_remote and is_scratch:
        assert planned.save == planned.upload, "what lies on a lost disk is no checkpoint"
    elif save_s <= left_s:
        assert planned.save
    assert bool(planned.message) or (planned.save and planned.upload == has_remote), (
        "what is left out is said"
    )


def test_a_plan_says_what_is_left_out_and_why():
    assert plan(100, 10, 20, has_remote=True, is_scratch=True) == deadline.Plan(True, True)
    assert plan(math.inf, 10, 20, has_remote=False, is_scratch=False) == deadline.Plan(True, False)
    locally = plan(40, 10, 20, has_remote=True, is_scratch=False)
    assert locally == deadline.Plan(
        True,
        False,
        "saved locally, not uploaded: 40 s left, a save takes 10.0 s and an upload 20.0 s",
    )
    nothing = "no time to save: {} s left, a save takes 10.0 s{}; the checkpoint before stands"
    assert plan(40, 10, 20, has_remote=True, is_scratch=True).message == nothing.format(
        40, " and an upload 20.0 s"
    )
    assert plan(9, 10, 20, has_remote=True, is_scratch=False).message == nothing.format(
        9, " and an upload 20.0 s"
    )
    assert plan(9, 10, 20, has_remote=False, is_scratch=False).message == nothing.format(9, "")


def test_without_a_remote_store_nobody_speaks_of_uploads():
    tight = plan(12, 10, 0, has_remote=False, is_scratch=False)
    assert tight.save
    assert "upload" not in tight.message


# --- real runs ---


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Callable[..., Born]]:
    nursery = shared_nursery()

    def begin(*settings: str, **environment: str) -> Born:
        clean = {"SLURM_JOB_ID": "", "SLURM_JOB_END_TIME": "", "SLURM_JOB_PARTITION": "low"}
        given = {key: value for key, value in (clean | environment).items() if value}
        return nursery.bear(
            "train",
            given,
            tmp_path / f"log-{time.monotonic_ns()}",
            [*TASK, f"run.dir={tmp_path}/run", *settings],
        )

    yield begin
    nursery.end_all()


def last_end(directory: Path) -> dict:
    return json.loads(max(directory.glob("attempts/*.end.json")).read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole")
    born = shared_nursery().bear(
        "train", {}, directory / "log", [*TASK, f"run.dir={directory}/run"]
    )
    assert born.wait() == 0, born.text
    return directory / "run"


def test_a_run_leaves_by_itself_before_its_time_limit_with_everything_saved(whole, tmp_path, live):
    limit = int(time.time()) + 37
    born = live(
        "run.margin_s=30", "task.args.sleep_s=0.8", SLURM_JOB_ID="7", SLURM_JOB_END_TIME=str(limit)
    )
    assert born.wait() == 0, born.text
    left_s = limit - time.time()
    assert 0 < left_s < 34, "not in time, or far too early"
    end = last_end(tmp_path / "run")
    assert (end["why"], end["by"], end["signals"], end["saved"]) == (
        "stopped",
        "time limit",
        [],
        True,
    )
    assert end["step"] == end["saved_step"] == max(losses(tmp_path / "run")) > 0
    assert "stopped by time limit" in born.text
    assert cli.main(["status", str(tmp_path / "run")]) == 75
    assert live().wait() == 0
    assert losses(tmp_path / "run") == losses(whole)
    assert differing(whole, tmp_path / "run") == []


@pytest.mark.slow
def test_a_run_leaves_by_itself_when_only_squeue_knows_its_limit(tmp_path, live, programs):
    programs.put("squeue", "echo 7 0:33")
    programs.put("scontrol", "exec sleep 20")
    born = live("run.margin_s=30", "task.args.sleep_s=0.7", SLURM_JOB_ID="7", PATH=programs.path)
    assert born.wait() == 0, born.text
    end = last_end(tmp_path / "run")
    assert (end["why"], end["by"], end["saved"]) == ("stopped", "time limit", True)
    assert 0 < end["step"] < 15


def test_a_controller_that_hangs_does_not_delay_a_run(tmp_path, live, programs):
    for name in ("squeue", "scontrol"):
        programs.put(name, f"touch {programs.folder}/asked; exec sleep 20")
    began = time.monotonic()
    born = live("train.epochs=1", "task.args.sleep_s=0.1", SLURM_JOB_ID="7", PATH=programs.path)
    assert born.wait() == 0, born.text
    assert time.monotonic() - began < deadline.ASK_S
    assert last_end(tmp_path / "run")["why"] == "finished"
    wait_until((programs.folder / "asked").exists, "the question")


# After a save in step 4; until that in step 8 there is time.
SLOW_FROM_5 = ("task.args.sleep_from=5", "task.args.sleep_s=1.0")


def checkpoints(directory: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in directory.glob("checkpoints/*")}


@pytest.mark.parametrize("scratch", [False, True])
def test_what_does_not_fit_into_the_grace_is_not_begun_and_the_checkpoint_before_stands(
    scratch, whole, tmp_path, live
):
    directory = tmp_path / "run"
    places = ["run.scratch=true", f"run.remote=file://{tmp_path}/remote"] if scratch else []
    born = live(*places, "run.grace_s=0.0001", "checkpoint.every_steps=4", *SLOW_FROM_5)
    wait_until(lambda: len(events(directory, "step")) >= 5 or born.code is not None, "step 5")
    if scratch:
        wait_until(lambda: list((tmp_path / "remote").glob("checkpoints/*.json")), "an upload")
    wait_until(
        lambda: events(directory, "saved") or born.code is not None, "the checkpoint of step 4"
    )
    before = checkpoints(directory)
    assert sorted(before) == ["step_00000004-0001.json", "step_00000004-0001.pt"]
    os.kill(born.pid, signal.SIGTERM)
    born.wait()
    assert (
        "no time to save: 0 s left, a save takes" in born.text
        and "the checkpoint before stands" in born.text
    )
    assert ("and an upload" in born.text) == scratch
    assert checkpoints(directory) == before
    end = last_end(directory)
    assert (end["why"], end["saved"], end["signals"], end["saved_step"]) == (
        "stopped",
        False,
        ["SIGTERM"],
        4,
    )
    assert "no time to save" in end["plan"]
    assert cli.main(["status", str(directory)]) == 75, "to be stopped is free, saved or not"
    born = live(*places)
    assert born.wait() == 0 and "resumes from step 4" in born.text
    assert losses(directory) == losses(whole)
    assert differing(whole, directory) == []


def test_a_short_grace_is_sigterms_alone(tmp_path, live):
    born = live("run.grace_s=0.0001", "checkpoint.every_steps=4", *SLOW_FROM_5)
    wait_until(
        lambda: len(events(tmp_path / "run", "step")) >= 5 or born.code is not None, "step 5"
    )
    os.kill(born.pid, signal.SIGUSR1)
    assert born.wait() == 0, born.text
    end = last_end(tmp_path / "run")
    assert (end["saved"], end["signals"], end["plan"]) == (True, ["SIGUSR1"], None)
    assert end["saved_step"] == end["step"] >= 5


def test_a_run_that_was_never_saved_is_saved_however_little_time_there_is(tmp_path, live):
    """How long a save takes is not known yet, and there is nothing to lose."""
    born = live("run.grace_s=0.0001", "task.args.sleep_s=0.3")
    wait_until(
        lambda: len(events(tmp_path / "run", "step")) >= 1 or born.code is not None, "a step"
    )
    os.kill(born.pid, signal.SIGTERM)
    assert born.wait() == 0, born.text
    assert last_end(tmp_path / "run")["saved"] is True
