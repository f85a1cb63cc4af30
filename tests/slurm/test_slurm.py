"""Submit once, walk away: on a real SLURM, through real preemptions, to the model of an
uninterrupted run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import wait_until
from slurm_cluster import SlurmCluster
from slurm_runs import STEPS, Submitted, assert_equal, submitted, train_whole

from harness.config.schema_services import SlurmSettings
from harness.supervision.job_script import Job, script

Folders = pytest.TempPathFactory


@pytest.fixture(scope="module")
def slurm(slurm_cluster: SlurmCluster) -> Iterator[SlurmCluster]:
    """The cluster, for all tests of this file together: a requeue is mostly waiting, in which the
    others may run."""
    slurm_cluster.idle()
    yield slurm_cluster
    slurm_cluster.idle()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: Folders) -> Path:
    return train_whole(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def crashing(slurm: SlurmCluster, tmp_path_factory: Folders) -> Submitted:
    """A run that dies in its third step whenever it is started, on a node that nobody preempts."""
    options = (
        "--partition",
        "high",
        "--procs-per-node",
        "2",
        "slurm.extra=[--nodelist=n3]",
        "task.args.fail_at=3",
    )
    run = submitted(slurm, tmp_path_factory.mktemp("crashing"), "crashes", *options, nodes=1)
    run.hasten()
    return run


@pytest.mark.usefixtures("crashing")
@pytest.mark.parametrize("times", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_that_is_preempted_finishes_as_if_it_never_was(
    slurm: SlurmCluster, whole: Path, tmp_path: Path, times: int
) -> None:
    run = submitted(
        slurm, tmp_path, "preempted", "--partition", "low", 'slurm.extra=["--nodelist=n1,n2"]'
    )
    run.edit()
    for _ in range(times):
        run.train(4)
        run.slow(2)  # however long SLURM takes, there are steps left
        run.preempt()
        wait_until(lambda: slurm.state(run.job) != "RUNNING", "the preemption")
        run.slow(0.4)
    run.train(1)
    run.hasten()
    run.ended()
    assert run.steps() == list(range(1, STEPS + 1)), "a step was lost, or done twice"
    assert_equal(whole, run.directory)
    assert run.lives() == times + 1
    assert run.ends() == [("stopped", True)] * times + [("finished", True)]
    log = run.log()
    for line in (
        "attempt 1 begins at step 0",
        f"attempt {times + 1} resumes from step",
        "harness: finished at step 40",
    ):
        assert log.count(line) == 1, log
    assert log.count("everything saved; start again to go on") == times and log.rstrip().endswith(
        "harness: finished: at step 40"
    ), log
    # torchrun logs a traceback if another agent has left before its barrier at the end.
    own = "\n".join(line for line in log.splitlines() if "elastic/agent/server/api.py" not in line)
    assert "Traceback" not in own and "Terminated" not in own, log


def test_what_always_crashes_is_started_three_times_and_then_fails_with_its_cause(
    slurm: SlurmCluster, crashing: Submitted
) -> None:
    run = crashing
    run.ended("FAILED")
    assert slurm.fields(run.job)["ExitCode"] == "1:0"
    assert run.lives() == 3
    assert run.ends() == [("failed", False)] * 3
    assert {
        (end["step"], end["rank"])
        for name, end in run.records("attempts").items()
        if name.endswith(".end")
    } == {(3, 1)}
    last = run.log().rstrip().splitlines()
    assert "ValueError: the task fails in step 3" in last[-2], run.log()
    assert last[-1].startswith(
        "harness: failed: 3 in a row died without a new checkpoint, each at step 3; "
        "the first: attempt 1 failed at step 3"
    )
    status = run.harness("status", str(run.directory))
    assert status.returncode == 1 and "each at step 3" in status.stdout, status.stdout


def test_a_finished_run_that_is_submitted_again_ends_without_starting_anything(
    slurm: SlurmCluster, whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path / "done")
    run = submitted(slurm, tmp_path, "done", "--partition", "high", "resume.accept=[config]")
    run.ended()
    assert (
        run.log().strip()
        == f"harness: the run in {run.directory} is finished, at step 40; nothing to do"
    )
    assert run.records("attempts").keys() == {"0001", "0001.end"} and not run.records("launches")
    assert_equal(whole, run.directory)


# Stands in for the program: the first launch asks to be started again, and each writes its name.
PROGRAM = """\
#!/bin/bash
case $* in
    *" before"*) exit 75 ;;
    *" launch "*) echo "$HARNESS_LAUNCH" >>{folder}/launches ;;
    *) [[ $HARNESS_LAUNCH == *.0 ]] && exit 75; exit 0 ;;
esac
"""


@pytest.mark.slow
def test_a_job_array_that_is_submitted_without_and_with_the_variables_of_others(
    slurm: SlurmCluster, tmp_path: Path
) -> None:
    program = tmp_path / "program"
    program.write_text(PROGRAM.format(folder=tmp_path))
    program.chmod(0o755)
    other = {"SLURM_ARRAY_JOB_ID": "4", "SLURM_ARRAY_TASK_ID": "1", "SLURM_RESTART_COUNT": "3"}
    jobs = []
    for name, options in {"array": ["--array=0-1"], "alone": []}.items():
        text = script(
            Job(
                SlurmSettings(nodes=1),
                name,
                f"{tmp_path}/{name}-%j.out",
                [],
                directory=str(tmp_path),
                code=str(tmp_path),
                python=str(program),
            )
        )
        (tmp_path / name).write_text(text)
        # Variables of SLURM are inherited even so. srun would pass on nothing but them.
        options += ["-p", "high", "--export=NONE"]
        jobs.append(slurm.submit(tmp_path / name, *options, environment=other))
    array, alone = jobs
    written = tmp_path / "launches"
    wait_until(lambda: written.exists() and written.read_text().count("\n") == 6, "two starts each")
    for job in (f"{array}_0", f"{array}_1", alone):
        assert slurm.wait_for(job) == "COMPLETED"
        assert slurm.restarts(job) == 1
    names = [slurm.fields(job)["JobId"] for job in (f"{array}_0", f"{array}_1", alone)]
    assert sorted(written.read_text().split()) == sorted(
        f"{name}.{count}" for name in names for count in (0, 1)
    )
