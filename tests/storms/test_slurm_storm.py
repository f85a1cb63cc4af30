"""On a real SLURM: what else can end a job, what may bring it back, and what must not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import library_runs
import psutil
import pytest
import torch
from comparing import losses
from conftest import events, wait_until
from late_claims import LATE
from programs import HEAD
from remote_runs import Home
from remote_runs import losses as remote_losses
from s3_server import S3Server
from slurm_cluster import GRACE_S, SlurmCluster
from slurm_runs import STEPS, Submitted, assert_equal, submitted, train_whole
from there import there

from harness.checkpoint.catalog import read_catalog
from harness.errors import EXIT_SUPERSEDED
from harness.exchange.compare import differences
from harness.store import LocalStore

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_whole(tmp_path_factory.mktemp("whole"))


def made_once(run: Submitted) -> bool:
    """Whether no step was lost, and none done twice."""
    return run.steps() == list(range(1, STEPS + 1))


def test_with_a_bucket_as_all_that_survives_a_preempted_run_loses_nothing(
    slurm: SlurmCluster,
    whole: Path,
    tmp_path: Path,
    bucket: tuple[S3Server, str],
) -> None:
    server, name = bucket
    home, local = Home(server, name), tmp_path / "local"
    arguments = (
        "--partition",
        "low",
        f"run.dir={local}/${{oc.env:SLURMD_NODENAME,login}}",
        f"run.remote={home.url}",
        "run.scratch=true",
        "slurm.job_name=scratch",
        'slurm.extra=["--nodelist=n1,n2"]',
        f"slurm.setup=['rm -rf {local}']",
        "checkpoint.every_steps=10",
    )
    run = submitted(slurm, tmp_path, "scratch", *arguments, env=server.environment)
    run.home = run.work / "scratch"
    run.edit()

    def made() -> int:  # the nodes' disks are wiped before each life, and either may hold rank 0
        return sum(len(events(local / node, "step")) for node in ("n1", "n2"))

    for _ in range(2):
        run.wait(lambda: made() >= 4, "four steps in this life")
        run.preempt()
        wait_until(lambda: slurm.state(run.job) != "RUNNING", "the preemption")
        wait_until(lambda: made() == 0, "the next life, with an empty disk")
    run.wait(made, "a step")
    run.hasten()
    run.ended()
    assert run.log().count("everything saved") == 2, run.log()
    assert [event["step"] for event in home.events("step")] == list(range(1, STEPS + 1))
    assert remote_losses(home) == losses(whole)
    assert home.manifests()[-1]["final"] and list(differences(home.newest(), newest(whole))) == []
    assert sorted(home.attempts()) == [1, 2, 3] and slurm.restarts(run.job) == 2
    assert len({file.parent for file in local.glob("*/checkpoints/*.pt")}) == 1, (
        "only the writer writes"
    )
    assert server.secret_key not in run.log()


def is_swapped(log: str) -> bool:
    """Whether the writer of the second life is on another node than that of the first."""
    writers = re.findall(r"attempt [12] (?:begins|resumes) .* in \S+/(n[12])", log)
    assert len(writers) == 2, log
    return writers[0] != writers[1]


@pytest.mark.parametrize("lost", ["n2", "n1", "*"])
def test_a_sharded_run_on_disks_of_the_nodes_goes_on_after_the_loss_of_one(
    slurm: SlurmCluster,
    tmp_path: Path,
    bucket: tuple[S3Server, str],
    monkeypatch: pytest.MonkeyPatch,
    lost: str,
) -> None:
    server, name = bucket
    server.lend(monkeypatch)
    home, local = Home(server, name), tmp_path / "local"
    sharded = ("train.shard=fsdp", "checkpoint.every_steps=10")
    run = submitted(
        slurm,
        tmp_path,
        "sharded",
        *("--partition", "low"),
        f"run.dir={local}/${{oc.env:SLURMD_NODENAME,login}}",
        f"run.remote={home.url}",
        "run.scratch=true",
        "slurm.job_name=sharded",
        'slurm.extra=["--nodelist=n1,n2"]',
        f"slurm.setup=['rm -rf {local}/{lost}']",
        *sharded,
        env=server.environment,
    )
    run.home = run.work / "sharded"
    run.wait(lambda: sum(len(events(local / node, "step")) for node in ("n1", "n2")) >= 4, "steps")
    run.preempt()
    wait_until(lambda: slurm.state(run.job) != "RUNNING", "the preemption")
    run.hasten()
    run.ended()
    # Each node holds one shard of what the second life has saved.
    kept = [{path.name for path in local.glob(f"{node}/*/*-0002/*")} for node in ("n1", "n2")]
    assert sorted(map(sorted, kept)) == [["00000.pt"], ["00001.pt"]]
    # torchrun orders nodes by their addresses. These have one, so that their ranks may be swapped:
    # then no rank finds its shard on its node.
    assert f"{2 if lost == '*' or is_swapped(run.log()) else 1} of 2 shards of step_" in run.log()
    assert [event["step"] for event in home.events("step")] == list(range(1, STEPS + 1))
    done = train_whole(tmp_path / "whole", *sharded)
    rows = differences(library_runs.newest(home.url), library_runs.newest(done))
    assert [row for row in rows if not row[0].startswith("config.")] == []
    assert sorted(home.attempts()) == [1, 2] and slurm.restarts(run.job) == 1


def newest(directory: Path) -> dict[str, Any]:
    """What is in a run directory's newest checkpoint, but for the settings."""
    payload = torch.load(max(directory.glob("checkpoints/*.pt")), weights_only=True)
    payload.pop("config")
    return payload


def test_a_time_limit_ends_a_life_in_time_and_nothing_is_lost_by_it(
    slurm: SlurmCluster, whole: Path, tmp_path: Path
) -> None:
    run = submitted(slurm, tmp_path, "limited", "--time", "00:02:00", "run.margin_s=75")
    run.slow(2.5)
    run.edit()
    for life in (1, 2):

        def has_stopped(life: int = life) -> bool:
            return len(run.ends()) > life and run.ends()[life - 1] == ("stopped", True)

        run.wait(has_stopped, f"life {life} and the next", 200)
    run.train(1)
    run.hasten()
    run.ended()
    assert made_once(run), run.steps()
    assert_equal(whole, run.directory)
    assert run.lives() == len(run.ends()) >= 3 and run.ends()[:-1] == [("stopped", True)] * (
        run.lives() - 1
    )
    assert {
        end["by"] for name, end in run.records("attempts").items() if end.get("why") == "stopped"
    } == {"time limit"}
    assert not any(run.failures())
    assert "DUE TO TIME LIMIT" not in run.log(), run.log()


def test_scancel_ends_a_run_for_good_until_it_is_submitted_again(
    whole: Path, tmp_path: Path
) -> None:
    # so that the script gets to the point where it might bring the job back
    with SlurmCluster(extra="KillWait=60\n") as slurm:
        run = submitted(slurm, tmp_path, "cancelled", "--partition", "low")
        run.train()
        slurm.cancel(run.job)
        run.ended("CANCELLED")
        assert "to be continued: stopped by SIGTERM" in run.log().splitlines()[-1], run.log()
        assert (
            slurm.restarts(run.job) == 0 and run.ends() == [("stopped", True)] and run.lives() == 1
        )

        run.submit()
        run.train(2)
        run.slow(4)
        run.train(1)
        run.preempt()
        wait_until(lambda: slurm.fields(run.job)["PreemptTime"] != "None", "the grace time")
        assert (
            slurm.state(run.job) in ("RUNNING", "SIGNALING")
            and len(run.ends()) == 2
            and run.ends()[1][0] == "killed"
        )
        slurm.cancel(run.job)
        run.ended("CANCELLED")
        assert "to be continued: stopped by SIGTERM" in run.log().splitlines()[-1], run.log()
        assert (
            slurm.restarts(run.job) == 0 and run.ends()[1] == ("stopped", True) and run.lives() == 1
        )

        run.submit()
        run.hasten()
        run.ended()
    assert made_once(run), run.steps()
    assert_equal(whole, run.directory)


def test_a_run_is_saved_and_stopped_by_request_and_not_queued_again(
    slurm: SlurmCluster, whole: Path, tmp_path: Path
) -> None:
    run = submitted(slurm, tmp_path, "asked", "checkpoint.every_steps=1000")
    run.slow(1)
    run.train(2)
    assert run.harness("save", str(run.directory)).returncode == 0
    run.wait(
        lambda: list(run.directory.glob("checkpoints/*.json")),
        "the checkpoint that was asked for",
        15,
    )
    assert slurm.state(run.job) == "RUNNING"
    assert run.harness("stop", str(run.directory)).returncode == 0
    run.wait(lambda: run.ends() == [("stopped", True)], "the stop that was asked for", 15)
    run.ended("FAILED", limit_s=30)  # what a job that ends with 130 is to SLURM
    assert slurm.fields(run.job)["ExitCode"] == "130:0" and run.lives() == 1
    assert "not started again" in run.log().splitlines()[-1]
    assert run.harness("status", str(run.directory)).returncode == 75

    run.submit()
    run.hasten()
    run.ended()
    assert made_once(run), run.steps()
    assert_equal(whole, run.directory)


def test_somebody_elses_requeue_is_no_failure(
    slurm: SlurmCluster, whole: Path, tmp_path: Path
) -> None:
    run = submitted(slurm, tmp_path, "requeued")
    for _ in range(2):
        run.train()
        slurm.command("scontrol", "requeue", run.job)
    run.train(1)
    run.hasten()
    run.ended()
    assert made_once(run), run.steps()
    assert_equal(whole, run.directory)
    assert run.lives() == 3 and run.failures() == [0, 0, 0]
    assert run.ends() == [("stopped", True), ("stopped", True), ("finished", True)]


@pytest.mark.parametrize("whose", ["the batch script's", "the other rank's"])
@pytest.mark.parametrize("is_noticed", [True, False], ids=["noticed", "unnoticed"])
def test_a_lost_node_costs_one_checkpoint_interval_at_most(
    slurm: SlurmCluster, whole: Path, tmp_path: Path, whose: str, is_noticed: bool
) -> None:
    run = submitted(slurm, tmp_path, "bereft", "checkpoint.every_steps=5")
    run.train(8)
    first, second = run.nodes().split(",")
    lost = first if whose.startswith("the batch") else second
    slurm.kill_node(lost)
    if is_noticed:
        slurm.mark_down(lost)
    run.hasten()
    run.ended(limit_s=200)
    assert lost not in run.nodes() or not is_noticed
    assert_equal(whole, run.directory)
    assert max(run.lost()) <= 5 and sum(run.lost()) <= 5, run.lost()
    assert run.lives(all_began=is_noticed) == 2 or not is_noticed
    assert max(run.failures()) <= 1, (
        "a rank may see the other one vanish before SLURM sees the node do so, but once only"
    )


def test_a_sharded_run_on_nodes_that_share_nothing_but_a_bucket_survives_a_lost_node(
    slurm: SlurmCluster,
    tmp_path: Path,
    bucket: tuple[S3Server, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server, name = bucket
    server.lend(monkeypatch)
    home = Home(server, name)
    whole = train_whole(tmp_path / "whole", "train.shard=fsdp")
    run = submitted(
        slurm,
        tmp_path,
        "sharded",
        "run.dir=null",
        f"run.remote={home.url}",
        "train.shard=fsdp",
        "checkpoint.every_steps=5",
        "slurm.job_name=sharded",
        env=server.environment,
    )
    run.home = run.work / "sharded"
    run.wait(lambda: max(home.steps(), default=0) >= 10, "two checkpoints")
    lost = run.nodes().split(",")[1]
    slurm.kill_node(lost)
    slurm.mark_down(lost)
    run.hasten()
    run.ended(limit_s=200)
    assert lost not in run.nodes() and slurm.restarts(run.job) == 1
    assert [file["name"].count("/") for file in home.manifests()[-1]["files"]] == [0, 1, 1]
    rows = differences(library_runs.newest(whole), library_runs.newest(home.url))
    assert [row for row in rows if not row[0].startswith("config.")] == []
    assert "resumes from step" in run.log()
    assert remote_losses(home) == losses(whole)


@pytest.mark.parametrize("place", [0, 1], ids=["batch", "other"])
def test_a_node_whose_daemon_dies_keeps_its_processes_and_they_do_no_harm(
    slurm: SlurmCluster, whole: Path, tmp_path: Path, place: int
) -> None:
    run = submitted(slurm, tmp_path, "orphaned", "checkpoint.every_steps=5", "train.epochs=8")
    run.train(8)
    lost = run.nodes().split(",")[place]
    slurm.kill_slurmd(lost)
    slurm.mark_down(lost)
    run.wait(lambda: len(run.ends()) >= 2, "the next attempt")
    run.hasten()
    run.ended()
    assert lost not in run.nodes()
    assert_equal(whole, run.directory)
    assert max(run.lost()) <= 5, run.lost()
    assert run.lives() == 2 and run.failures() == [0, 0]


def test_without_a_grace_time_at_most_one_checkpoint_interval_is_lost(
    slurm: SlurmCluster, whole: Path, tmp_path: Path
) -> None:
    run = submitted(slurm, tmp_path, "killed", "--partition", "lowkill", "checkpoint.every_steps=5")
    for _ in range(3):
        run.train(6)
        run.preempt()
        wait_until(lambda: slurm.state(run.job) != "RUNNING", "the preemption")
    run.train(1)
    run.hasten()
    run.ended()
    assert_equal(whole, run.directory)
    assert run.lives() == 4 and max(run.lost()) <= 5 and run.failures() == [0] * 4, run.lost()


WIDE = ("task.args.width=5000", "train.epochs=4")


@pytest.mark.parametrize("told_s", [None, 60])
def test_a_grace_time_shorter_than_a_save_tears_nothing(
    tmp_path: Path, told_s: float | None
) -> None:
    whole = train_whole(tmp_path / "whole", *WIDE)
    # more than there is: saving is begun, and killed
    grace = () if told_s is None else (f"run.grace_s={told_s}",)
    with SlurmCluster(extra="KillWait=1\n") as slurm:
        run = submitted(
            slurm,
            tmp_path,
            "hurried",
            "--partition",
            "lowkill",
            "checkpoint.every_steps=3",
            *WIDE,
            *grace,
        )
        for _ in range(2):
            run.train(4)
            run.preempt()
            wait_until(lambda: slurm.state(run.job) != "RUNNING", "the preemption")
        run.hasten()
        run.ended(limit_s=240)
        assert run.lives() == 3 and max(run.lost()) <= 3 and run.failures() == [0] * 3, run.lost()
    assert told_s or any(end != ("stopped", True) for end in run.ends()[:2]), (
        f"it had the time to save: {run.ends()}"
    )
    assert_equal(whole, run.directory)
    assert run.harness("verify", str(run.directory)).returncode == 0


def test_a_requeue_before_an_empty_disk_fails_loudly_and_does_not_begin_anew(
    slurm: SlurmCluster, tmp_path: Path
) -> None:
    local, kept = (
        tmp_path / "empty",
        ("run.json", "checkpoints", "attempts", "launches", "events", "requests", "config.yaml"),
    )
    wipe = " ".join(f"{local}/{name}" for name in kept)
    run = submitted(
        slurm, tmp_path, "empty", f"slurm.setup=['[ $SLURM_RESTART_COUNT ] && rm -rf {wipe}']"
    )
    run.train()
    slurm.command("scontrol", "requeue", run.job)
    run.ended("FAILED")
    assert slurm.fields(run.job)["ExitCode"] == "78:0" and slurm.restarts(run.job) == 1
    assert "this run was submitted, but its record is not here" in run.log()
    assert not any((local / name).exists() for name in kept)
    assert len(run.log().split("begins at step 0")) == 2, run.log()


def test_where_a_preemption_cancels_the_script_queues_the_job_again_in_time(
    slurm: SlurmCluster, whole: Path, tmp_path: Path
) -> None:
    run = submitted(slurm, tmp_path, "shunned", "--partition", "lowcancel")
    run.train()
    run.preempt()
    wait_until(
        lambda: slurm.state(run.job) not in ("RUNNING", "SIGNALING"), "the requeue", GRACE_S - 5
    )
    run.train(1)
    run.hasten()
    run.ended()
    assert made_once(run), run.steps()
    assert_equal(whole, run.directory)
    assert run.lives() == 2 and run.ends() == [("stopped", True), ("finished", True)]


def test_without_a_way_to_queue_itself_again_a_job_says_what_to_do(
    slurm: SlurmCluster, whole: Path, tmp_path: Path
) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "scontrol").write_text("#!/bin/sh\necho 'scontrol: not for you' >&2; exit 1\n")
    (tools / "scontrol").chmod(0o755)
    run = submitted(slurm, tmp_path, "stuck", f"slurm.setup=['export PATH={tools}:$PATH']")
    run.train()
    slurm.command("scancel", "--signal=TERM", f"{run.job}.0")
    run.ended("FAILED", limit_s=250)
    assert (
        slurm.fields(run.job)["ExitCode"] == "75:0"
        and run.lives() == 1
        and run.ends() == [("stopped", True)]
    )
    assert (
        run.log()
        .rstrip()
        .endswith("harness: this job cannot be requeued; submit it again to continue")
    ), run.log()
    (tools / "scontrol").unlink()
    run.submit()
    run.hasten()
    run.ended()
    assert made_once(run), run.steps()
    assert_equal(whole, run.directory)


def test_a_controller_that_is_away_while_a_job_stops_queues_it_again_later(
    slurm: SlurmCluster, whole: Path, tmp_path: Path
) -> None:
    run = submitted(slurm, tmp_path, "alone")
    run.slow(1)
    run.train(7)  # the controller writes a job down within five seconds
    named = [
        process
        for process in psutil.process_iter(["cmdline"])
        if str(run.directory) in str(process.info["cmdline"])
    ]
    ranks = [process for process in named if "LOCAL_RANK" in process.environ()]
    assert len(ranks) == 2
    slurm.kill_controller()
    ranks[0].terminate()
    run.wait(lambda: run.ends() == [("stopped", True)], "the stop")
    run.wait(lambda: "harness: to be continued" in run.log(), "the script's last words")
    slurm.start_controller()
    run.train(1, limit_s=240)
    run.hasten()
    run.ended()
    assert made_once(run), run.steps()
    assert_equal(whole, run.directory)
    assert run.lives() == 2 and run.failures() == [0, 0]


def test_two_runs_on_one_node_do_not_meet(slurm: SlurmCluster, whole: Path, tmp_path: Path) -> None:
    options = ("--procs-per-node", "2", "slurm.extra=[--nodelist=n1]")
    runs = []
    for name in ("one", "two"):
        runs.append(submitted(slurm, tmp_path, name, *options, nodes=1))
        runs[-1].slow(3)  # both: the task is the same
    for run in runs:
        run.train(1)
    assert {slurm.state(run.job) for run in runs} == {"RUNNING"}
    runs[0].hasten()
    for run in runs:
        run.ended()
        assert_equal(whole, run.directory)
        assert run.lives() == 1 and len(run.ends()) == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_one_crash_is_one_requeue(
    slurm: SlurmCluster, whole: Path, tmp_path: Path, rank: int
) -> None:
    failing = ("task.args.fail_at=13", f"task.args.fail_rank={rank}", "task.args.fail_once=true")
    run = submitted(slurm, tmp_path, "crashed", "checkpoint.every_steps=5", *failing)
    run.hasten()
    run.ended()
    assert_equal(whole, run.directory)
    assert run.lives() == 2 and run.ends() == [("failed", False), ("finished", True)]
    assert (
        run.records("attempts")["0002"]["from"]["step"] == 10
        and "ValueError: the task fails in step 13" in run.log()
    )


def test_of_two_jobs_of_one_run_the_late_one_trains_on_and_the_first_one_ends(
    slurm: SlurmCluster, tmp_path: Path
) -> None:
    """Under another name, as else SLURM would let it wait. It has looked at the run before the
    first saved more and deleted what it saw, and claims after that."""
    work, directory = tmp_path / "work", tmp_path / "run"
    work.mkdir()
    (work / "loop.py").write_text(HEAD.replace("from programs import die", "") + LATE)
    words = [
        "--nodes",
        "1",
        "--procs-per-node",
        "1",
        "--partition",
        "high",
        f"run.dir={directory}",
        "loop.py",
        str(directory),
    ]
    first = Submitted(slurm, work, directory, directory, words).submit()
    first.wait(lambda: bool(list(directory.glob("checkpoints/*.json"))), "a checkpoint")
    late = Submitted(
        slurm,
        work,
        directory,
        directory,
        ["slurm.extra=[--job-name=late]", *words],
        env={"LATE": "1"},
    ).submit()
    late.ended()
    first.ended("FAILED")
    assert slurm.fields(first.job)["ExitCode"] == f"{EXIT_SUPERSEDED}:0", first.log()
    assert late.ends() == [("superseded", False), ("stopped", False), ("finished", True)], (
        first.log(),
        late.log(),
    )
    found = read_catalog(LocalStore(directory))
    assert (
        there(found.head).final is not None
        and there(found.head).step == 80
        and found.attempts[3]["from"]["attempt"] == 1
    )
