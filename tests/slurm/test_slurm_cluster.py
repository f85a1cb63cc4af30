"""What the other tests rely on in a real SLURM: who gets which signal when, what comes back, and
what never does."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from conftest import wait_until
from slurm_cluster import GRACE_S, SlurmCluster

pytestmark = pytest.mark.slow  # what SLURM does, as the other tests rely on it

# Two tasks that report a SIGTERM and end with 75, under a shell that reports its own and then waits
# for its end.
JOB = """\
#!/bin/bash
#SBATCH -N2 -n2 --open-mode=append
say() { echo "$1 $EPOCHREALTIME"; }  # no child, which would get the SIGTERM too
say "life ${SLURM_RESTART_COUNT:-0}"
[ "${SLURM_RESTART_COUNT:-0}" = 0 ] || exit 0
trap 'say shell-term; termed=1' TERM
srun bash -c 'trap "echo task-term \\$EPOCHREALTIME; exit 75" TERM; echo task-ready; \
for i in {1..600}; do sleep 0.1; done' 2>/dev/null &
step=$!
until ! kill -0 $step 2>/dev/null; do wait $step; code=$?; done
say "step-$code"
%s
for i in {1..900}; do [ -n "$termed" ] && break; sleep 0.1; done
say shell-ends
"""
HOG = "#!/bin/bash\n#SBATCH -p high -N3 --exclusive -o /dev/null\nsleep 1\n"


class Job:
    """A job of the text above, and what it wrote."""

    def __init__(self, slurm: SlurmCluster, directory: Path, *options: str, then: str = "") -> None:
        self.slurm, self.output = slurm, directory / "out"
        self.hog = directory / "hog.sh"
        self.hog.write_text(HOG)
        script = directory / "job.sh"
        script.write_text(JOB.replace("%s", then))
        self.id = slurm.submit(script, "-o", str(self.output), *options)
        wait_until(lambda: self.lines("task-ready") == 2, "both tasks run")

    def lines(self, word: str) -> int:
        return (
            sum(line.startswith(word) for line in self.output.read_text().splitlines())
            if self.output.exists()
            else 0
        )

    def at(self, word: str) -> float:
        return next(
            float(line.split()[-1])
            for line in self.output.read_text().splitlines()
            if line.startswith(word)
        )

    def preempt(self) -> float:
        self.slurm.submit(self.hog)
        return time.time()


def test_a_job_runs_on_two_nodes(slurm: SlurmCluster, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    script.write_text(
        '#!/bin/bash\nsrun bash -c "echo $GREETING \\$SLURM_PROCID \\$SLURMD_NODENAME"\n'
    )
    job = slurm.submit(
        script, "-N2", "-n2", "-o", str(tmp_path / "out"), environment={"GREETING": "hello"}
    )
    assert slurm.wait_for(job) == "COMPLETED"
    assert sorted((tmp_path / "out").read_text().split("\n")[:-1]) == ["hello 0 n1", "hello 1 n2"]
    fields = slurm.fields(job)
    assert (fields["Restarts"], fields["ExitCode"], fields["Requeue"]) == ("0", "0:0", "1")


def test_in_the_grace_time_only_the_step_is_told(slurm: SlurmCluster, tmp_path: Path) -> None:
    job = Job(slurm, tmp_path, "-p", "low")
    asked = job.preempt()
    wait_until(lambda: job.lines("step-75"), "the step ends at the beginning of the grace time")
    assert slurm.fields(job.id)["JobState"] == "RUNNING"
    assert slurm.fields(job.id)["PreemptTime"] != "None"
    assert slurm.wait_for(job.id, limit_s=60) == "COMPLETED"
    assert job.at("task-term") - asked < 3
    assert GRACE_S - 1 <= job.at("shell-term") - asked < GRACE_S + 5
    assert job.lines("task-term") == 2 and job.lines("life 1") == 1
    assert slurm.restarts(job.id) == 1


def test_without_a_grace_time_shell_and_step_are_told_at_once(
    slurm: SlurmCluster, tmp_path: Path
) -> None:
    job = Job(slurm, tmp_path, "-p", "lowkill")
    job.preempt()
    assert slurm.wait_for(job.id, limit_s=30) == "COMPLETED"
    assert abs(job.at("shell-term") - job.at("task-term")) < 1
    assert job.lines("life 1") == 1 and slurm.restarts(job.id) == 1


def test_a_requeue_from_within_in_the_grace_time_is_one_restart(
    slurm: SlurmCluster, tmp_path: Path
) -> None:
    job = Job(
        slurm,
        tmp_path,
        "-p",
        "low",
        then="sleep 2; say still-there; scontrol requeue $SLURM_JOB_ID",
    )
    asked = job.preempt()
    assert slurm.wait_for(job.id, limit_s=30) == "COMPLETED"
    assert time.time() - asked < GRACE_S
    assert job.at("task-term") < job.at("step-75") < job.at("still-there") < job.at("shell-term")
    assert job.lines("life 1") == 1 and slurm.restarts(job.id) == 1


def test_a_cancelled_job_stays_so_unless_it_asks_to_be_requeued(
    slurm: SlurmCluster, tmp_path: Path
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    job, careless = (
        Job(slurm, tmp_path / "a"),
        Job(slurm, tmp_path / "b", then="scontrol requeue $SLURM_JOB_ID"),
    )
    slurm.cancel(job.id)
    slurm.cancel(careless.id)
    # the trap that the harness has to avoid
    assert slurm.wait_for(careless.id, limit_s=30) == "COMPLETED"
    assert slurm.restarts(careless.id) == 1 and careless.lines("life 1") == 1
    assert slurm.state(job.id) == "CANCELLED"
    assert slurm.restarts(job.id) == 0 and not job.lines("life 1")


def test_a_dead_node_is_a_restart_elsewhere(slurm: SlurmCluster, tmp_path: Path) -> None:
    job = Job(slurm, tmp_path, "-w", "n1,n2")
    slurm.kill_node("n2")
    slurm.mark_down("n2")
    wait_until(lambda: job.lines("shell-term"), "the rest of the job is told")
    slurm.start_node("n2")
    assert slurm.wait_for(job.id, limit_s=30) == "COMPLETED"
    assert job.lines("task-term") == 1 and job.lines("life 1") == 1 and slurm.restarts(job.id) == 1


def test_a_dead_node_is_noticed(slurm: SlurmCluster, tmp_path: Path) -> None:
    job = Job(slurm, tmp_path)
    batch_host = slurm.fields(job.id)["BatchHost"]
    slurm.kill_node(batch_host)
    assert slurm.wait_for(job.id, limit_s=120) == "COMPLETED"  # on the other two
    assert job.lines("life 1") == 1 and not job.lines("shell-term") and slurm.restarts(job.id) == 1
    assert slurm.fields(job.id)["BatchHost"] != batch_host


def test_jobs_survive_their_daemon_and_the_controller(slurm: SlurmCluster, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    script.write_text("#!/bin/bash\nsleep 8; echo done\n")
    job = slurm.submit(script, "-w", "n3", "-o", str(tmp_path / "out"))
    slurm.wait_for(job, "RUNNING")
    time.sleep(6)  # until the controller has written the job down
    slurm.kill_slurmd("n3")
    slurm.kill_controller()
    slurm.start_controller()
    slurm.start_node("n3")
    assert slurm.wait_for(job, limit_s=40) == "COMPLETED"
    assert (tmp_path / "out").read_text() == "done\n" and slurm.restarts(job) == 0
