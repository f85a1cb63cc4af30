"""Who is started again, and who is not: what stands in a run's stores decides, whatever has
happened to it."""

from __future__ import annotations

import datetime
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from comparing import differing, losses
from conftest import events
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jobs import Job
from remote_lives import shared_nursery
from there import there

from harness import cli
from harness.checkpoint import attempts, commit
from harness.checkpoint import format as fmt
from harness.checkpoint.catalog import read_catalog
from harness.checkpoint.fresh_start import check_fresh_start
from harness.checkpoint.retention import Policy
from harness.cli import supervise
from harness.config import load
from harness.errors import StorageError, UsageError
from harness.saving.locations import hand_in
from harness.store import LocalStore, Store, open_store
from harness.supervision import attempt_history, launches
from harness.supervision.launches import Launch
from harness.supervision.restart_policy import Outcome, crash_loop, verdict
from harness.text import now

Cli = Callable[..., tuple[int, str]]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """An empty run directory."""
    LocalStore(tmp_path / "run").prepare((*fmt.FOLDERS, launches.LAUNCHES))
    return tmp_path / "run"


@pytest.fixture
def store(run: Path) -> LocalStore:
    return LocalStore(run)


@pytest.fixture(params=["directory", "memory", "directory and memory"])
def stores(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Store, ...]:
    """An empty run, wherever runs may live."""
    directory, memory = (
        LocalStore(tmp_path / "run"),
        open_store(f"memory://{secrets.token_hex(8)}/run", 5),
    )
    found: dict[str, tuple[Store, ...]] = {
        "directory": (directory,), "memory": (memory,), "directory and memory": (directory, memory)
    }  # fmt: skip
    for place in found[request.param]:
        place.prepare(fmt.FOLDERS)
    return found[request.param]


@pytest.fixture
def harness(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """The program's command line in this process: exit code, and all that it printed."""

    def call(*arguments: object, launch: str | None = None) -> tuple[int, str]:
        if launch is None:
            monkeypatch.delenv(launches.ENVIRONMENT, raising=False)
        else:
            monkeypatch.setenv(launches.ENVIRONMENT, launch)
        capsys.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return code, said.out + said.err

    return call


def tree(directory: Path) -> dict[str, tuple[bytes, int]]:
    """Every file with its content and when it was written."""
    found = (path for path in directory.rglob("*") if path.is_file())
    return {
        str(path.relative_to(directory)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in found
    }


# --- what is counted ---


def test_failures_in_a_row_are_counted_until_they_are_a_crash_loop_wherever_the_run_lives(stores):
    job = Job("100", *stores)
    codes = [job.fails(step=step).verdict.exit_code for step in (1, 2, 3)]
    assert codes == [75, 75, 1]
    assert [failure.subject for failure in job.failures] == ["attempt 1", "attempt 2", "attempt 3"]
    assert [failure.launch for failure in job.failures] == ["100.0", "100.1", "100.2"]
    assert job.outcome.exit_code == 1


def test_an_attempt_that_gets_further_than_ever_lets_all_failures_before_it_be_forgotten(stores):
    job = Job("100", *stores)
    job.fails().fails().fails(10)
    assert job.failures == [], (
        "the one that made progress and then failed is none without a new checkpoint, either"
    )
    assert job.verdict.exit_code == 75
    job.fails().fails()
    assert len(job.failures) == 2
    job.stops(20)
    assert job.failures == []
    assert [job.fails().verdict.exit_code for _ in range(3)] == [75, 75, 1]


def test_progress_is_a_step_further_than_ever_and_not_one_made_again(store):
    job = Job("100", store).stops(10, 20)
    job.fails().fails(20)
    assert len(job.failures) == 2, "step 20 was there before"
    job.fails(15)
    assert len(job.failures) == 3 and job.verdict.exit_code == 1
    job.fails(21)
    assert job.failures == []


def test_an_import_that_failed_may_be_repeated_and_nothing_trains_from_step_0_before(
    store, harness, tmp_path, monkeypatch
):
    Job("100", store).stops(10)
    run, adopt = LocalStore(tmp_path / "fork"), commit.adopt

    def full(*given: object) -> None:
        raise StorageError("the disk is full")

    monkeypatch.setattr(commit, "adopt", full)
    assert harness("import", store.root, run.root)[0] == 74
    with pytest.raises(UsageError, match="harness import FILE RUN"):
        check_fresh_start(read_catalog(run), "here", [])
    monkeypatch.setattr(commit, "adopt", adopt)
    assert harness("import", store.root, run.root)[0] == 0
    assert [m.order for m in read_catalog(run).history] == [(2, 10)]
    code, said = harness("import", store.root, run.root)
    assert code == 78 and "holds a run already" in said


def test_an_imported_file_of_others_that_did_not_get_there_is_no_fresh_start(store):
    attempts.claim(read_catalog(store), None, 1, "import")
    with pytest.raises(UsageError, match="attempt 1, an import without a checkpoint"):
        check_fresh_start(read_catalog(store), "here", [])


def test_a_rollback_is_no_progress_and_what_follows_it_is(store, harness):
    job = Job("100", store).stops(10, 20, 30).fails().fails()
    assert harness("rollback", store.root, 10)[0] == 0
    assert len(job.failures) == 2, "a rollback neither counts nor forgives"
    job.fails(15)
    assert job.failures == [] and job.verdict.exit_code == 75
    job.fails(15)
    assert [job.fails(step).verdict.exit_code for step in (16, 17, 18)] == [75, 75, 75]
    assert [job.fails().verdict.exit_code for _ in range(3)] == [75, 75, 1]
    assert harness("rollback", store.root, "step_00000030-0001")[0] == 0
    job.fails(29)
    assert len(job.failures) == 4, "undone, the steps after it do not count any more"
    job.fails(31)
    assert job.failures == []


def test_progress_is_remembered_when_retention_has_let_its_checkpoint_go(store):
    job = Job("100", store).fails(30)
    job.fails()
    for kind in (fmt.manifest_key, fmt.data_key):
        store.delete(kind(30, 1))
    job.fails(20)
    assert len(job.failures) == 2, "what step 30 was reached is in the attempts' records"


def test_stops_are_free_however_many(stores):
    job = Job("100", *stores)
    for details in (
        {"signals": ["SIGTERM"]},
        {"by": "time limit"},
        {"by": "aws"},
        {"signals": ["SIGUSR1"]},
    ):
        assert job.stops(**details).verdict.exit_code == 75
    job.begin().end("stopped", code=0)  # before it got to an attempt
    assert job.failures == []
    assert job.verdict.exit_code == 75


def test_an_attempt_that_another_one_has_overtaken_is_free(store):
    job = Job("100", store).begin()
    job.attempt(why="superseded", error="attempt 2 has begun")
    job.end(code=76)
    assert job.failures == []


def test_a_lost_machine_is_free(store):
    """Neither the attempt nor its launch has an end: nobody was left to write one."""
    job = Job("100", store)
    for _ in range(4):
        job.begin().attempt()
    job.begin()  # lost before an attempt was claimed
    assert job.failures == []
    assert job.outcome.exit_code == 75


def test_what_a_lost_machine_still_said_of_a_failure_counts(store):
    job = Job("100", store).begin()
    job.attempt(why="failed", error="ValueError: no")
    assert [failure.error for failure in job.failures] == ["ValueError: no"]


def test_an_attempt_that_was_killed_while_its_launch_lived_on_counts(stores):
    job = Job("100", *stores)
    codes = [job.dies().verdict.exit_code for _ in range(3)]
    assert codes == [75, 75, 1]
    assert "killed" in job.verdict.why


def test_a_launch_that_never_got_to_an_attempt_counts(stores):
    job = Job("100", *stores)
    for number in range(3):
        job.begin().end("failed", code=1, error=f"no rank began to train {number}")
    assert [(failure.subject, failure.error) for failure in job.failures] == [
        (f"launch 100.{number}", f"no rank began to train {number}") for number in range(3)
    ]
    assert job.verdict.exit_code == 1
    assert "no rank began to train 0" in job.verdict.why


def test_launches_without_an_attempt_are_forgotten_with_the_others_when_one_gets_further(store):
    job = Job("100", store).fails()
    job.begin().end("failed", code=1, error="no rank began to train")
    assert len(job.failures) == 2
    job.stops(5)
    assert job.failures == []
    job.begin().end("failed", code=1, error="no rank began to train")
    assert len(job.failures) == 1


def test_every_attempt_that_torchrun_restarted_in_one_launch_counts(store):
    job = Job("100", store).begin()
    for step in (7, 7, 7):
        job.attempt(why="failed", error="ValueError: no", step=step, rank=1)
    assert [failure.subject for failure in job.end(code=1).failures] == [
        "attempt 1",
        "attempt 2",
        "attempt 3",
    ]
    assert job.verdict.exit_code == 1


def test_what_dies_in_a_launch_that_was_stopped_from_outside_is_free(store):
    job = Job("100", store)
    for _ in range(4):
        job.begin().attempt(why="failed", error="connection reset by peer")
        assert job.end("stopped", code=143).verdict.exit_code == 75
        job.begin().attempt()
        assert job.end("stopped", code=137).verdict.exit_code == 75
    assert job.failures == []


def test_another_supervisor_starts_from_zero_and_its_progress_serves_all(store):
    first, second = Job("100", store), Job("launch-0a", store)
    first.fails().fails().fails()
    assert first.verdict.exit_code == 1
    assert second.failures == []
    assert second.fails().verdict.exit_code == 75
    assert (len(first.failures), len(second.failures)) == (3, 1)
    second.stops(10)
    assert (first.failures, second.failures) == ([], [])


def test_a_supervisors_name_is_compared_whole(store):
    Job("10", store).fails().fails()
    Job("1", store).fails()
    assert [len(Job(name, store).failures) for name in ("10", "1", "0", "")] == [2, 1, 0, 0]


def test_failures_come_in_the_order_in_which_they_happened_beyond_ten_launches(store):
    job = Job("100", store)
    for number in range(12):
        job.begin().end("failed", code=1, error=str(number))
    assert [failure.error for failure in job.failures] == [str(number) for number in range(12)]


def test_failures_come_in_the_order_in_which_they_happened_also_if_a_launchs_record_is_torn(store):
    job = Job("100", store).stops(10).fails(error="1").fails(error="2").fails(error="3")
    store.path("launches/100.2.json").write_bytes(b"")
    assert [failure.error for failure in job.failures] == ["1", "2", "3"]


HAPPENINGS = st.lists(
    st.tuples(
        st.sampled_from(["100", "200"]),  # whose launch
        st.lists(
            st.tuples(
                st.sampled_from(["further", "again", "nothing"]),  # what the attempt commits
                st.sampled_from(["failed", "stopped", "killed"]),  # how it ends
            ),
            max_size=2,
        ),
        st.sampled_from(["ended", "stopped", "lost"]),  # how the launch ends
    ),
    max_size=7,
)


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(happenings=HAPPENINGS)
def test_whatever_happens_the_count_is_what_a_person_would_count(happenings):
    counted, reached = {"100": 0, "200": 0}, 0
    place = Path(tempfile.mkdtemp())
    try:
        store = LocalStore(place)
        store.prepare(fmt.FOLDERS)
        jobs = {name: Job(name, store) for name in counted}
        for name, lives, launch_end in happenings:
            job, deaths = jobs[name].begin(), 0
            for commits, life_end in lives:
                steps = {
                    "further": [reached + 5],
                    "again": [max(1, reached)] if reached else [],
                    "nothing": [],
                }[commits]
                job.attempt(
                    *steps,
                    why=None if life_end == "killed" else life_end,
                    error="e",
                    step=reached,
                    saved=True,
                )
                if commits == "further":
                    reached += 5
                    counted, deaths = dict.fromkeys(counted, 0), 0
                elif life_end == "failed" or (life_end == "killed" and launch_end == "ended"):
                    deaths += 1
            if launch_end != "lost":
                job.end(
                    "failed" if launch_end == "ended" and not lives else launch_end,
                    error="e",
                    code=1,
                )
            deaths += launch_end == "ended" and not lives
            counted[name] += 0 if launch_end == "stopped" else deaths
            assert {name: len(job.failures) for name, job in jobs.items()} == counted
            assert read_catalog(store).reached == reached
    finally:
        shutil.rmtree(place)


# --- in words ---


def test_a_crash_loop_names_the_step_if_it_is_always_the_same(store):
    job = Job("100", store).stops(40)
    for attempt in range(3):
        job.fails(step=57, error=f"RuntimeError: loss\nis gone {attempt}")
    assert job.verdict.why == (
        "3 in a row died without a new checkpoint, each at step 57; the first: attempt 2 failed "
        "at step 57 on rank 0: RuntimeError: loss is gone 0"
    )


def test_a_crash_loop_names_no_step_if_they_differ_or_none_is_known(store):
    job = Job("100", store).fails(step=1).fails(step=2).fails(step=2)
    assert "each at" not in crash_loop(job.failures)
    killed = Job("200", store).dies().dies().dies()
    assert crash_loop(killed.failures) == (
        "3 in a row died without a new checkpoint; the first: attempt 4 failed: killed: "
        "no end is recorded"
    )


# --- the verdict ---


def test_a_finished_run_is_finished(stores):
    job = Job("100", *stores).begin()
    job.attempt(10, why="finished", step=10, final=True)
    assert job.end(code=0).verdict == Outcome("finished", "at step 10", 0)


@pytest.mark.parametrize("lacks", ["the checkpoint", "its data"])
def test_a_run_is_finished_once_its_last_store_has_the_last_checkpoint(tmp_path, lacks):
    """Rank 0 was killed while it uploaded the last checkpoint, which the directory has."""
    here, there = LocalStore(tmp_path / "run"), open_store(f"memory://{secrets.token_hex(8)}/r", 5)
    here.prepare(fmt.FOLDERS)
    job = Job("100", here, there).begin()
    job.attempt(5, 10, final=True)
    there.delete((fmt.manifest_key if lacks == "the checkpoint" else fmt.data_key)(10, 1))
    state = job.end(code=1).verdict
    assert (state.state, state.exit_code) == ("to be continued", 75)
    assert f"is not in {there}" in state.why
    assert job.outcome == state
    found = read_catalog(here, there)
    assert "was missing in" in hand_in(found, found.head, Policy())
    assert job.verdict == job.outcome == Outcome("finished", "at step 10", 0)
    here.set_aside((fmt.manifest_key(10, 1), fmt.data_key(10, 1)))
    assert job.outcome.exit_code == 0, "another machine has an empty directory"


def test_a_finished_run_stays_finished_whatever_its_processes_did_afterwards(store):
    job = Job("100", store).begin()
    job.attempt(10, why="failed", error="a thread aborted at exit", final=True)
    assert job.end(code=134).verdict.exit_code == 0


def test_a_program_that_fails_after_its_loop_is_started_again_and_given_up_in_the_end(store):
    job = Job("100", store).begin(loop="my_loop.py")
    job.attempt(10, why="finished", final=True)
    state = job.end(code=137).verdict
    assert (state.exit_code, state.why) == (
        75,
        "failed (after new checkpoints): the run is finished, but my_loop.py failed: exit code 137",
    )
    for code in (75, 75, 1):
        job.begin(loop="my_loop.py").end("failed", code=1, error="my_loop.py failed")
        assert job.verdict.exit_code == code
    assert len(job.failures) == 3 and job.outcome.exit_code == 0, "the run itself is finished"


def test_a_program_that_was_killed_before_its_end_was_recorded_counts_once(store):
    job = Job("100", store).stops(5).begin(loop="my_loop.py", most_failures=2)
    job.attempt(10, final=True)
    assert job.end(code=137).verdict.exit_code == 75
    job.begin(loop="my_loop.py", most_failures=2).end("failed", code=1, error="no")
    assert (job.verdict.exit_code, len(job.failures)) == (75, 1)


def test_a_program_that_is_ended_from_outside_after_its_loop_is_to_be_started(store):
    job = Job("100", store)
    for _ in range(4):
        job.begin(loop="my_loop.py")
        job.attempt(10, why="finished", final=True)
        assert job.end("stopped", code=143).verdict.exit_code == 75
    assert job.failures == []


def test_what_no_restart_can_mend_after_a_loop_is_final_at_once(store):
    job = Job("100", store).begin(loop="my_loop.py")
    job.attempt(10, why="finished", final=True)
    assert job.end("failed", code=78, error="no such thing").verdict.exit_code == 78


def test_a_program_of_a_finished_run_is_started_until_this_supervisor_saw_it_end_well(run, harness):
    job = Job("100", LocalStore(run)).begin(loop="my_loop.py")
    job.attempt(10, why="finished", final=True)
    job.end(code=0)
    words = (f"run.dir={run}", 'run.loop=["my_loop.py"]')
    code, said = harness("supervise", "before", *words, launch="100.1")
    assert (code, "nothing to do" in said) == (0, True), "the same job, queued again"
    code, said = harness("supervise", "before", *words, launch="101.0")
    assert code == 75 and "finished, at step 10; my_loop.py is started" in said, (
        "it may be longer now"
    )
    code, said = harness("supervise", "after", "--code", "1", *words, launch="101.0")
    assert code == 75 and "the run is finished, but my_loop.py failed: exit code 1" in said
    assert harness("supervise", "before", *words, launch="101.1")[0] == 75
    assert harness("supervise", "after", "--code", "0", *words, launch="101.1")[0] == 0
    assert harness("supervise", "before", *words, launch="101.2")[0] == 0


def test_the_number_of_failures_in_a_row_is_what_the_run_was_told(store):
    job = Job("100", store)
    for most, code in ((5, 75), (5, 75), (5, 75), (5, 75), (5, 1)):
        job.begin(most_failures=most).attempt(why="failed", error="no")
        assert job.end(code=1).verdict.exit_code == code
    once = Job("200", store).begin(most_failures=1)
    once.attempt(why="failed", error="no")
    assert once.end(code=1).verdict.exit_code == 1


def test_a_newer_attempt_elsewhere_supersedes_the_launch_before_anything_else_is_asked(store):
    old, new = Job("100", store).begin(), Job("200", store)
    old.attempt(10)
    new.begin().attempt(20)
    assert old.end(code=1).verdict.exit_code == 76
    assert "attempt 2" in old.verdict.why
    assert new.end(code=1).verdict.exit_code == 75
    finished = Job("300", store).begin()
    finished.attempt(30, why="finished", final=True)
    assert new.verdict.exit_code == 76


def test_a_launch_that_never_got_to_an_attempt_is_superseded_by_one_that_began_after_it(store):
    Job("50", store).stops(10)
    old = Job("100", store).begin()
    Job("200", store).begin().attempt()
    assert old.end("failed", code=1, error="no rank began to train").verdict.exit_code == 76


def test_a_launch_whose_attempt_says_so_is_superseded(store):
    job = Job("100", store).begin()
    job.attempt(why="superseded", error="attempt 1 is superseded")
    assert job.end(code=76).verdict.exit_code == 76


def test_a_launch_that_was_overtaken_before_its_claim_is_superseded(store):
    job = Job("100", store).begin().end("superseded", code=76)
    assert job.verdict.exit_code == 76


def test_who_was_asked_to_stop_by_a_person_is_not_started_again(stores):
    job = Job("100", *stores).stops(10, by="harness stop", signals=[])
    assert job.verdict.exit_code == 130
    assert job.verdict.why == "stopped by harness stop at step 10, saved; not started again"
    assert job.outcome.exit_code == 75, "it may go on, if somebody starts it"


@pytest.mark.parametrize("end", [None, "failed"])
def test_who_was_asked_to_stop_and_died_before_it_could_is_not_started_again(run, harness, end):
    """The job has lost its node and waits in the queue."""
    job = Job("100", LocalStore(run)).stops(10).begin()
    job.attempt(20, why=end, error="no", step=21)
    if end:  # it dies after it was asked
        (run / "attempts" / "0002.end.json").rename(run / "later")
    assert harness("save", run)[0] == 0
    assert harness("supervise", "before", f"run.dir={run}", launch="100.2")[0] == 75
    assert harness("stop", run)[0] == 0
    if end:
        (run / "later").rename(run / "attempts" / "0002.end.json")
    for _ in range(2):
        code, said = harness("supervise", "before", f"run.dir={run}", launch="100.2")
        assert code == 130 and "attempt 2 was asked to by harness stop" in said, said
    assert harness("supervise", "before", f"run.dir={run}", launch="101.0")[0] == 75, (
        "somebody wants it to go on"
    )


def test_a_job_that_was_preempted_and_waits_in_the_queue_can_be_stopped(run, harness):
    Job("100", LocalStore(run)).stops(10)
    code, said = harness("stop", run)
    assert code == 0 and "its job ends when it begins again" in said
    code, said = harness("supervise", "before", f"run.dir={run}", launch="100.1")
    assert code == 130 and "attempt 1 was asked to by harness stop" in said, said
    assert harness("save", run)[0] == 78, "nothing is there to be saved"
    assert harness("supervise", "before", f"run.dir={run}", launch="101.0")[0] == 75


@pytest.mark.parametrize(
    ("name", "end", "code"),
    [
        ("100", {"why": "stopped", "by": "harness stop"}, 78),
        ("100", {"why": "failed", "code": 78, "error": "no"}, 78),
        ("100", {"why": "failed", "error": "no"}, 0),
        ("launch-00", {"why": "failed", "error": "no"}, 0),
        ("launch-00", {"why": "stopped", "by": "time limit"}, 78),
    ],
)
def test_what_is_not_started_again_is_not_asked_to_stop(name, end, code, run, harness):
    job = Job(name, LocalStore(run)).begin()
    job.attempt(**end)
    job.end(code=1)
    assert harness("stop", run)[0] == code


def test_what_no_restart_can_mend_is_final_at_once(stores):
    job = Job("100", *stores).begin()
    job.attempt(why="failed", error="two objects are tracked as 'model'", code=78)
    assert job.end(code=78).verdict == Outcome("failed", "two objects are tracked as 'model'", 78)
    assert job.outcome.exit_code == 1
    early = (
        Job("200", *stores)
        .begin()
        .end("failed", code=78, error="run.dir and run.remote hold different runs")
    )
    assert early.verdict.exit_code == 78
    assert early.outcome.exit_code == 1


def test_an_unreachable_store_is_tried_again_and_counted(store):
    job = Job("100", store)
    assert [
        job.fails(code=74, error="the store does not answer").verdict.exit_code for _ in range(3)
    ] == [75, 75, 1]


def test_without_any_checkpoint_left_whole_nothing_is_started_again(store):
    job = Job("100", store).stops(10)
    store.path(fmt.data_key(10, 1)).write_bytes(b"cut")
    assert job.verdict.exit_code == 1


def test_a_supervisor_judges_by_what_it_started_and_not_by_what_others_did_before(store):
    Job("50", store).stops(10, by="harness stop")
    job = Job("100", store).begin().end("failed", code=1, error="no rank began to train")
    assert job.verdict.exit_code == 75, "the stop by request was of an earlier job"
    job.begin().end("stopped", code=0)
    assert job.verdict.exit_code == 75


def test_status_and_verdict_agree_on_what_is_to_be_done(run, harness):
    def check(job: Job, code: int) -> None:
        assert job.verdict.exit_code == code
        assert harness("status", run)[0] == {76: 75, 78: 1, 130: 75}.get(code, code)

    def job() -> Job:
        return Job(secrets.token_hex(4), LocalStore(run))

    check(job().stops(10, signals=["SIGTERM"]), 75)
    check(job().stops(20, by="harness stop"), 130)
    check(job().fails(), 75)
    check(job().dies(), 75)
    check(job().begin().end("failed", code=1, error="no rank began to train"), 75)
    check(job().begin().end("stopped", code=0), 75)
    check(job().fails(code=78), 78)
    check(job().begin().end("failed", code=78, error="no such setting"), 78)
    looping = job().fails().fails().fails()
    check(looping, 1)
    other = job().begin()
    other.attempt()
    check(looping, 76)
    check(other.end(code=1), 75)
    done = job().begin()
    done.attempt(99, why="finished", final=True)
    check(done.end(code=0), 0)


# --- the command lines of a supervisor ---


def test_before_records_the_launch_in_every_store_and_says_begin(tmp_path, harness):
    directory, memory = tmp_path / "run", f"memory://{secrets.token_hex(8)}/run"
    places = [f"run.dir={directory}", f"run.remote={memory}"]
    assert harness("supervise", "before", *places, launch="1234.0") == (75, "")
    for store in (LocalStore(directory), open_store(memory)):
        record = json.loads(store.read("launches/1234.0.json"))
        assert (
            record["reached"],
            record["greatest"],
            record["failures"],
            record["steps_back"],
        ) == (0, 0, 0, False)
    assert harness("supervise", "before", *places, launch="1234.0")[0] == 75, (
        "asked twice, it says the same"
    )


def test_a_finished_run_is_left_alone_and_a_longer_one_begins(run, harness):
    job = Job("100", LocalStore(run)).begin()
    job.attempt(10, why="finished", final=True)
    job.end(code=0)
    before = tree(run)
    code, said = harness("supervise", "before", f"run.dir={run}", launch="101.0")
    assert (code, "finished" in said) == (0, True)
    assert (
        harness("supervise", "before", f"run.dir={run}", "train.epochs=20", launch="101.0")[0] == 0
    )
    assert (
        harness("supervise", "before", f"run.dir={run}", "train.max_steps=5", launch="101.0")[0]
        == 0
    )
    assert tree(run) == before
    assert (
        harness("supervise", "before", f"run.dir={run}", "train.epochs=31", launch="101.0")[0] == 75
    )
    assert (run / "launches" / "101.0.json").exists()


def test_an_abandoned_extension_leaves_a_finished_run_finished(run, harness):
    store = LocalStore(run)
    job = Job("100", store).begin()
    job.attempt(10, why="finished", final=True)
    job.end(code=0)
    longer = Job("101", store).begin()
    longer.attempt()  # killed before its first save
    longer.end(code=137)
    before = tree(run)
    code, said = harness("supervise", "before", f"run.dir={run}", launch="102.0")
    assert (code, "is finished, at step 10; nothing to do" in said) == (0, True), said
    assert tree(run) == before
    assert (
        harness("supervise", "before", f"run.dir={run}", "train.epochs=31", launch="101.1")[0] == 75
    ), "the extension goes on"
    # A program of the user's own has to be asked, and ends at once.
    words = (f"run.dir={run}", 'run.loop=["my_loop.py"]')
    assert harness("supervise", "before", *words, launch="103.0")[0] == 75
    assert supervise.found_complete(read_catalog(store), load(None, [*words])[0], "103.0")
    code, said = harness("supervise", "after", "--code", "0", *words, launch="103.0")
    assert (code, "finished: at step 10" in said) == (0, True), said


def test_a_stopped_extension_of_a_program_is_not_taken_for_its_end(run, harness):
    job = Job("100", LocalStore(run)).begin(loop="my_loop.py")
    job.attempt(10, why="finished", final=True)
    job.end(code=0)
    words = (f"run.dir={run}", 'run.loop=["my_loop.py"]')
    assert harness("supervise", "before", *words, launch="101.0")[0] == 75
    longer = Job("101", LocalStore(run))
    longer.count = 1
    longer.attempt(why="stopped", saved=True, step=11, signals=["SIGUSR1"])
    assert harness("supervise", "after", "--code", "0", *words, launch="101.0")[0] == 75
    assert harness("supervise", "before", *words, launch="101.1")[0] == 75


def test_a_finished_run_that_a_store_lacks_is_begun_to_be_copied_there(run, harness):
    job = Job("100", LocalStore(run)).begin()
    job.attempt(10, why="finished", final=True)
    remote = f"memory://{secrets.token_hex(8)}/run"
    assert (
        harness("supervise", "before", f"run.dir={run}", f"run.remote={remote}", launch="101.0")[0]
        == 75
    )


def test_a_crash_loop_is_not_begun_again_but_another_job_may(run, harness):
    Job("100", LocalStore(run)).fails(step=7).fails(step=7, trace="Traceback: here").fails(step=7)
    before = tree(run)
    code, said = harness("supervise", "before", f"run.dir={run}", launch="100.3")
    assert code == 1
    assert "3 in a row died without a new checkpoint, each at step 7" in said
    assert tree(run) == before
    assert (
        harness("supervise", "before", f"run.dir={run}", "run.max_failures=4", launch="100.3")[0]
        == 75
    )
    assert harness("supervise", "before", f"run.dir={run}", launch="101.0")[0] == 75


def test_only_the_last_try_of_several_steps_back(run, harness):
    job = Job("100", LocalStore(run)).stops(10, 20)

    def steps_back(name: str, most: int) -> bool:
        assert (
            harness(
                "supervise", "before", f"run.dir={run}", f"run.max_failures={most}", launch=name
            )[0]
            == 75
        )
        return json.loads((run / "launches" / f"{name}.json").read_text())["steps_back"]

    assert not steps_back("100.10", 3) and not steps_back("100.11", 1)
    job.fails()
    assert not steps_back("100.20", 3)
    job.fails()
    assert steps_back("100.30", 3)
    assert not steps_back("101.0", 3)


def test_failures_before_an_attempt_do_not_count_against_a_checkpoint(run, harness, monkeypatch):
    store = LocalStore(run)

    def steps_back(name: str) -> bool:
        assert harness("supervise", "before", f"run.dir={run}", launch=name)[0] == 75
        monkeypatch.setenv(launches.ENVIRONMENT, name)
        catalog = read_catalog(store)
        return launches.steps_back(store, catalog, there(catalog.head))

    Job("50", store).stops(10, 20)
    job = Job("100", store)
    for _ in range(2):
        job.begin().end("failed", code=1, error="no rank began to train")
    assert len(job.failures) == 2 and not steps_back("100.2")
    assert not json.loads((run / "launches" / "100.2.json").read_text())["steps_back"]
    # An attempt of this job died from step 20, and one of another job from what it then saved.
    job = Job("200", store).fails()
    Job("250", store).fails(15).fails()
    job.begin().end("failed", code=1, error="no rank began to train")
    assert len(job.failures) == 2 and not steps_back("200.2"), "no attempt of it began from step 15"
    job = Job("300", store).fails()
    job.begin().end("failed", code=1, error="no rank began to train")
    assert steps_back("300.2")


def test_a_submitted_run_without_its_record_stands_before_another_disk(tmp_path, harness):
    directory = tmp_path / "run"
    code, said = harness("supervise", "before", "--submitted", f"run.dir={directory}", launch="1.0")
    assert code == 78
    assert str(directory / "run.json") in said and "disk" in said and "Traceback" not in said
    assert not directory.exists()
    directory.mkdir()
    (directory / "run.json").write_text("{}\n")
    assert (
        harness("supervise", "before", "--submitted", f"run.dir={directory}", launch="1.0")[0] == 75
    )


def test_a_submitted_run_whose_record_was_purged_is_known_by_its_attempts(run, harness):
    Job("1", LocalStore(run)).stops(10)
    before = ("supervise", "before", "--submitted", f"run.dir={run}")
    assert harness(*before, launch="1.1")[0] == 75
    assert (run / "run.json").exists()
    os.utime(run / "run.json", (0, 0))
    assert harness(*before, launch="1.2")[0] == 75
    assert (run / "run.json").stat().st_mtime > 0, "it is not older than the last start"


def test_a_rollback_takes_a_copy_that_is_whole(tmp_path, harness):
    remote = f"memory://{secrets.token_hex(8)}/run"
    stores = LocalStore(tmp_path / "run"), open_store(remote)
    Job("1", *stores).stops(10, 20)
    path = stores[0].path(fmt.data_key(10, 1))
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    code, said = harness("rollback", tmp_path / "run", 10)
    assert code == 0, said
    assert there(read_catalog(*stores).head).order == (2, 10)


def test_a_job_whose_run_is_rolled_back_goes_on_from_there(store, harness):
    job = Job("1", store).begin()
    life = job.attempt(10, 20)
    rolled = attempts.claim(read_catalog(store), read_catalog(store).manifests[0], 1, "rollback")
    attempts.end(store, life.attempt, "superseded", error="attempt 2 has begun", code=76)
    job.end(code=76)
    assert job.verdict.exit_code == 76 and "start again when it is done" in job.verdict.why
    attempts.end(store, rolled, "stopped", saved=True, saved_step=10, by="rollback")
    assert job.verdict.exit_code == 75 and "a rollback" in job.verdict.why
    job.begin().attempt(30)
    assert verdict(read_catalog(store), launches.read([store]), "1.0")[0].exit_code == 76


@pytest.mark.parametrize("command", ["status", "ls", "launch"])
def test_a_home_that_does_not_exist_is_said_in_words(command, harness):
    place = "~nosuchuser/x"
    code, said = harness(command, f"run.dir={place}" if command == "launch" else place)
    assert code == (74 if command == "status" else 78), said
    assert "~nosuchuser" in said and "Traceback" not in said


def test_a_submitted_run_on_scratch_is_known_by_the_record_in_its_other_store(tmp_path, harness):
    remote = f"memory://{secrets.token_hex(8)}/run"
    open_store(remote).create("run.json", b"{}\n", 0)
    assert (
        harness(
            "supervise",
            "before",
            "--submitted",
            f"run.dir={tmp_path}/new",
            f"run.remote={remote}",
            launch="1.0",
        )[0]
        == 75
    )


@pytest.mark.parametrize(
    "name",
    [
        None,
        "",
        "1234",
        ".0",
        "1234.",
        "1234.x",
        "1234.-1",
        "a b.0",
        "../../x.0",
        "1/2.0",
        "1234.0\n",
        "1.0.json",
        "1234.0.end",
        "1234.0.failed",
    ],
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_launch_without_a_proper_name_is_refused_in_words(when, name, tmp_path, harness):
    code, said = harness("supervise", when, f"run.dir={tmp_path}/run", launch=name)
    assert code == 78
    assert "HARNESS_LAUNCH" in said and "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_wrong_settings_are_refused_in_words(tmp_path, harness):
    for when in ("before", "after"):
        code, said = harness(
            "supervise", when, f"run.dir={tmp_path}/run", "run.max_failure=3", launch="1.0"
        )
        assert (code, "run.max_failures" in said) == (78, True)


def test_a_store_that_does_not_answer_is_no_verdict(tmp_path, harness, monkeypatch):
    for name, value in (
        ("AWS_ACCESS_KEY_ID", "k"),
        ("AWS_SECRET_ACCESS_KEY", "s"),
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:9"),
    ):
        monkeypatch.setenv(name, value)
    settings = [f"run.dir={tmp_path}/run", "run.remote=s3://bucket/run", "store.wait_s=0.2"]
    for when in ("before", "after"):
        code, said = harness("supervise", when, *settings, launch="1.0")
        assert code == 74, said
        assert "Traceback" not in said


def test_a_directory_that_cannot_be_listed_is_no_verdict(tmp_path, harness):
    (tmp_path / "file").write_text("in the way")
    for when in ("before", "after"):
        assert harness("supervise", when, f"run.dir={tmp_path}/file", launch="1.0")[0] == 74


def test_torn_launch_records_are_survived_and_cost_at_most_their_own_word(run, harness):
    store = LocalStore(run)
    job = Job("100", store).stops(10)
    job.fails()
    job.fails()
    for name in ("7.0", "8.0", "9.0", "10.0"):
        store.path(f"launches/{name}.json").write_bytes(b'{"reached": 1')
    for name, text in (("7.0", b""), ("8.0", b"[]"), ("9.0", b"\xff\xfe"), ("11.0", b"{")):
        store.path(f"launches/{name}.end.json").write_bytes(text)
    for name in ("notes.txt", "100.0.json.bak", "100.0.json.tmp-0000-aa"):
        store.path(f"launches/{name}").write_bytes(b"x")
    assert len(job.failures) == 2
    assert harness("supervise", "before", f"run.dir={run}", launch="100.3")[0] == 75
    assert harness("status", run)[0] == 75
    assert harness("supervise", "after", "--code", "1", f"run.dir={run}", launch="100.3")[0] == 1, (
        "the third in a row"
    )


def test_a_launch_whose_own_record_is_torn_is_not_taken_for_superseded(run, harness):
    store = LocalStore(run)
    Job("50", store).stops(10)
    harness("supervise", "before", f"run.dir={run}", launch="100.0")
    store.path("launches/100.0.json").write_bytes(b"")
    code, said = harness("supervise", "after", "--code", "1", f"run.dir={run}", launch="100.0")
    assert code == 75, said


def test_after_counts_and_says_what_the_launch_died_of(run, harness):
    store, job = LocalStore(run), Job("100", LocalStore(run))
    for count, expected in ((0, 75), (1, 75), (2, 1)):
        assert harness("supervise", "before", f"run.dir={run}", launch=f"100.{count}")[0] == 75
        job.count = count + 1
        job.attempt(
            why="failed",
            error=f"ValueError: {count}",
            step=5,
            rank=1,
            trace=f"Traceback of {count}\n",
        )
        code, said = harness(
            "supervise", "after", "--code", "1", f"run.dir={run}", launch=f"100.{count}"
        )
        assert code == expected
        assert f"Traceback of {0 if expected == 1 else count}" in said, (
            "in the end the first one is the cause"
        )
        assert json.loads(store.read(f"launches/100.{count}.end.json"))["why"] == "ended"
    assert "each at step 5" in said.splitlines()[-1]


def test_after_a_finished_run_says_what_failed_beside_it(run, harness):
    """The process leaves that to its supervisor; the reply to its last request was lost, say."""
    job = Job("100", LocalStore(run)).begin()
    error = "finished at step 10, but not everything is in the remote store"
    job.attempt(10, why="failed", error=error, code=74, step=10, rank=0, final=True)
    code, said = harness("supervise", "after", "--code", "74", f"run.dir={run}", launch="100.0")
    assert code == 0 and error in said and "in place all the same" in said


def test_after_a_launch_that_never_began_says_so_and_counts_it(run, harness):
    for count, expected in ((0, 75), (1, 75), (2, 1)):
        harness("supervise", "before", f"run.dir={run}", launch=f"100.{count}")
        code, said = harness(
            "supervise", "after", "--code", "2", f"run.dir={run}", launch=f"100.{count}"
        )
        assert (code, "no rank began to train (exit code 2)" in said) == (expected, True)


def test_after_a_launch_that_was_stopped_before_it_began_counts_nothing(run, harness):
    for count in range(4):
        harness("supervise", "before", f"run.dir={run}", launch=f"100.{count}")
        extra = ["--stopped"] if count % 2 else ["--code", "0"]
        assert (
            harness("supervise", "after", *extra, f"run.dir={run}", launch=f"100.{count}")[0] == 75
        )
    assert Job("100", LocalStore(run)).failures == []


def stopped(harness, run: Path, launch: str) -> int:
    """Tell `supervise` that this launch was stopped from outside; its exit code."""
    words = ("supervise", "after", "--code", "143", "--stopped", f"run.dir={run}")
    return harness(*words, launch=launch)[0]


def test_after_with_stopped_frees_whatever_the_stop_broke(run, harness):
    job = Job("100", LocalStore(run))
    for count in range(4):
        harness("supervise", "before", f"run.dir={run}", launch=f"100.{count}")
        job.count = count + 1
        if count % 2:
            job.attempt(why="failed", error="connection reset by peer", step=3)
        else:
            job.attempt()
        assert stopped(harness, run, f"100.{count}") == 75
    assert job.failures == []


def test_after_with_stopped_frees_also_what_a_node_has_called_a_failure_first(run, harness):
    """A preemption that has begun is no failure, whatever it broke: also if a node's launcher has
    left its word already."""
    job = Job("100", LocalStore(run))
    for count in range(4):
        assert harness("supervise", "before", f"run.dir={run}", launch=f"100.{count}")[0] == 75
        job.count = count + 1
        if count % 2:
            job.attempt()
        assert launches.failed(
            LocalStore(run), f"100.{count}", code=1, error="torchrun failed on n2"
        )
        assert stopped(harness, run, f"100.{count}") == 75
    assert job.failures == []


def test_what_a_node_has_called_a_failure_is_the_error_that_is_told_and_counted_once(run, harness):
    job = Job("100", LocalStore(run))
    for count, expected in ((0, 75), (1, 75), (2, 1)):
        harness("supervise", "before", f"run.dir={run}", launch=f"100.{count}")
        assert launches.failed(
            LocalStore(run), f"100.{count}", code=1, error=f"torchrun failed on n{count}"
        )
        assert not launches.failed(
            LocalStore(run), f"100.{count}", code=1, error="the first word stands"
        )
        assert (
            harness("supervise", "after", "--code", "1", f"run.dir={run}", launch=f"100.{count}")[0]
            == expected
        )
    assert [failure.error for failure in job.failures] == [
        "torchrun failed on n0",
        "torchrun failed on n1",
        "torchrun failed on n2",
    ]


def test_a_failure_on_another_nodes_disk_or_of_no_launch_is_not_recorded(store):
    assert not launches.failed(store, "100.0", code=1, error="torchrun failed on n2")
    assert launches.read([store]) == []


@pytest.mark.parametrize("text", [b"", b"[]", b'{"why": "fail'])
def test_a_torn_word_of_a_node_does_not_hide_what_the_supervisor_says(text, run, harness):
    store = LocalStore(run)
    for count, expected in ((0, 75), (1, 75), (2, 1)):
        harness("supervise", "before", f"run.dir={run}", launch=f"100.{count}")
        store.path(f"launches/100.{count}.failed.json").write_bytes(text)
        assert (
            harness("supervise", "after", "--code", "2", f"run.dir={run}", launch=f"100.{count}")[0]
            == expected
        )


def test_after_asked_twice_says_the_same(run, harness):
    job = Job("100", LocalStore(run)).begin()
    job.attempt(why="failed", error="no")
    said = [
        harness("supervise", "after", "--code", "1", f"run.dir={run}", launch="100.0")
        for _ in range(2)
    ]
    assert said[0] == said[1] and said[0][0] == 75
    assert len(job.failures) == 1


# --- status ---


def test_only_complete_steps_are_lost_and_all_that_the_next_attempt_makes_again(run):
    store = LocalStore(run)

    def lost(number: int, *lines: dict) -> tuple[int, int]:
        summary = attempt_history.summarise(read_catalog(store), number, [*lines])
        return summary.reached, summary.lost

    Job("100", store).fails(10, step=13)
    assert lost(1) == (12, 2), "a record of an earlier release does not hold what is complete"
    Job("100", store).fails(20, step=23, made_step=23)
    assert lost(2) == (23, 3), "it failed between two steps"
    life = Job("100", store).begin().attempt(30)
    assert lost(3, {"event": "evaluated", "step": 34}, {"event": "hang", "step": 35}) == (34, 4)
    assert lost(3, {"event": "step", "step": 35}) == (35, 5)
    store.set_aside((fmt.manifest_key(30, 3), fmt.data_key(30, 3)))
    Job("100", store).stops(35)
    assert lost(3, {"event": "step", "step": 34}) == (34, 14), "step 30 was damaged"
    assert lost(2) == (23, 3) and lost(4) == (35, 0)
    assert life.attempt.number == 3


def test_status_shows_every_attempt_its_steps_and_what_it_lost(run, harness):
    store = LocalStore(run)
    Job("100", store).stops(10, 20, signals=["SIGTERM"])
    Job("100", store)
    job = Job("200", store).begin()
    killed = job.attempt(30)
    store.append(
        fmt.events_key(killed.attempt.number),
        b'{"event": "step", "step": 37, "time": "2020-01-01T00:00:00+00:00"}\n{"event": "st',
    )
    job.end(code=137)
    job.fails(step=33, error="ValueError: no\nmore")
    job.begin().end("failed", code=1, error="no rank began to train")
    code, text = harness("status", run, "--json")
    found = json.loads(text)
    assert code == 75
    assert [
        (a["attempt"], a["launch"], a["went_on_from"], a["reached"], a["saved"], a["lost"])
        for a in found["attempts"]
    ] == [
        (1, "100.0", 0, 20, 20, 0),
        (2, "200.0", 20, 37, 30, 7),
        (3, "200.1", 30, 32, 30, 2),  # it failed in step 33
    ]
    assert [launch["launch"] for launch in found["launches"]] == [
        "100.0",
        "200.0",
        "200.1",
        "200.2",
    ]
    assert (found["step"], found["checkpoint"]) == (30, "step_00000030-0002")
    code, text = harness("status", run)
    assert code == 75
    for words in (
        "stopped by SIGTERM at step 20, saved",
        "no end recorded",
        "failed: ValueError: no more",
        "20–37",
        "30–32",
    ):
        assert words in text
    assert "launch 200.2 never began to train: no rank began to train" in text


@pytest.mark.parametrize(
    ("step_s", "ago_s", "state"),
    [
        (1, 150, "to be continued"),
        (100, 150, "running"),
        (100, 250, "to be continued"),
        (600, 1000, "running"),
        (86400, 5000, "to be continued"),
    ],
)
def test_a_run_whose_steps_are_long_is_not_said_to_be_hung_within_one(
    run, harness, step_s, ago_s, state
):
    store = LocalStore(run)
    life = Job("100", store).begin().attempt(10)
    now = datetime.datetime.now(datetime.timezone.utc)
    path = store.path(fmt.attempt_key(life.attempt.number))
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"time": "2020-01-01T00:00:00+00:00"})
    )
    for number in range(5, 0, -1):
        when = now - datetime.timedelta(seconds=ago_s + (number - 1) * step_s)
        line = json.dumps({"event": "step", "step": 15 - number, "time": when.isoformat()}) + "\n"
        store.append(fmt.events_key(life.attempt.number), line.encode())
    code, text = harness("status", run, "--json")
    assert (code, json.loads(text)["state"]) == (75, state), text


def test_status_says_running_only_while_something_was_heard_lately(run, harness):
    store = LocalStore(run)
    life = Job("100", store).begin().attempt(10)
    code, text = harness("status", run)
    assert (code, "running (heard of" in text) == (75, True)
    path = store.path(fmt.attempt_key(life.attempt.number))
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"time": "2020-01-01T00:00:00+00:00"}))
    code, text = harness("status", run)
    assert (code, "hung, or killed" in text) == (75, True)
    store.append(
        fmt.events_key(life.attempt.number),
        (json.dumps({"event": "step", "step": 12, "time": now()}) + "\n").encode(),
    )
    code, text = harness("status", run)
    assert "at step 12" in text and "running" in text


def test_status_of_what_is_no_run_cannot_tell(tmp_path, harness):
    code, text = harness("status", tmp_path)
    assert (code, "cannot tell" in text) == (74, True)


# --- a real run in a crash loop ---


def test_the_last_try_goes_on_from_the_checkpoint_before_and_the_run_is_the_same(tmp_path, harness):
    task = [
        "task.name=small_task:build",
        "train.epochs=2",
        "checkpoint.every_steps=2",
        "log.every_steps=1",
        "resume.accept=[config]",
    ]
    directory, nursery = tmp_path / "run", shared_nursery()

    def life(name: str | None, *settings: str, place: Path = directory) -> tuple[int, str]:
        environment = {launches.ENVIRONMENT: name} if name else {}
        born = nursery.bear(
            "train", environment, tmp_path / f"{name}.log", [*task, f"run.dir={place}", *settings]
        )
        return born.wait(), born.text

    assert life(None, place=tmp_path / "whole")[0] == 0
    # What a checkpoint does to whoever loads it is played by a task that fails in its first step.
    for count, fail_at in enumerate((6, 1, 1)):
        assert (
            harness("supervise", "before", *task, f"run.dir={directory}", launch=f"9.{count}")[0]
            == 75
        )
        assert life(f"9.{count}", f"task.args.fail_at={fail_at}")[0] == 1
        code, said = harness(
            "supervise", "after", "--code", "1", *task, f"run.dir={directory}", launch=f"9.{count}"
        )
        assert (code, f"the task fails in forward pass {fail_at}" in said) == (75, True)
    assert harness("supervise", "before", *task, f"run.dir={directory}", launch="9.3")[0] == 75
    code, said = life("9.3")
    assert code == 0, said
    assert "skipping step_00000004-0001" in said
    origins = [
        json.loads(path.read_text())["from"]
        for path in sorted(directory.glob("attempts/*[0-9].json"))
    ]
    assert [origin and origin["step"] for origin in origins] == [None, 4, 4, 2]
    ends = [json.loads(path.read_text()) for path in sorted(directory.glob("attempts/*.end.json"))]
    assert [(end["step"], end.get("made_step")) for end in ends[:3]] == [(6, 5), (5, 4), (5, 4)]
    assert (
        harness("supervise", "after", "--code", "0", *task, f"run.dir={directory}", launch="9.3")[0]
        == 0
    )
    assert harness("status", directory)[0] == 0
    assert differing(tmp_path / "whole", directory) == []
    assert losses(directory) == losses(tmp_path / "whole")
    assert [event["step"] for event in events(directory, "begun")] == [0, 4, 4, 2]


def test_the_last_try_takes_the_only_checkpoint_if_there_is_no_other(tmp_path, harness):
    directory = tmp_path / "run"
    task = [
        "task.name=small_task:build",
        "train.epochs=1",
        "checkpoint.every_s=null",
        f"run.dir={directory}",
        "resume.accept=[config]",
    ]
    nursery = shared_nursery()
    LocalStore(directory).prepare((*fmt.FOLDERS, launches.LAUNCHES))
    Job("9", LocalStore(directory))
    assert (
        nursery.bear(
            "train",
            {},
            tmp_path / "0.log",
            [*task, "checkpoint.every_steps=2", "task.args.fail_at=3"],
        ).wait()
        == 1
    )
    job = Job("9", LocalStore(directory))
    for _ in range(2):
        job.begin().attempt(why="failed", error="no")
        job.end(code=1)
    assert harness("supervise", "before", *task, launch="9.2")[0] == 75
    assert json.loads((directory / "launches" / "9.2.json").read_text())["steps_back"] is True
    born = nursery.bear("train", {launches.ENVIRONMENT: "9.2"}, tmp_path / "2.log", task)
    assert born.wait() == 0, born.text
    assert "resumes from step 2" in born.text


def test_a_launch_without_a_record_is_judged_by_its_attempts(store):
    job = Job("100", store)
    job.count = 1
    job.attempt(why="failed", error="no")
    found = read_catalog(store)
    assert verdict(found, [], "100.0")[0].exit_code == 1, "nobody counts, so nobody starts it again"
    assert verdict(found, [Launch("100.0", {}, {"why": "ended"})], "100.0")[0].exit_code == 75


def test_status_says_that_a_launch_never_began_only_where_it_made_no_attempt(
    run: Path, store: LocalStore, harness: Cli
) -> None:
    job = Job("100", store)
    job.begin()
    job.attempt(10, why="failed", error="ValueError: no", step=12, rank=0)
    launches.failed(store, job.launch, code=1, error="rank 0 was the first to end")
    job.end(code=1)
    assert "never began" not in harness("status", run)[1]
    job.begin()
    launches.failed(store, job.launch, code=1, error="no module of that name")
    job.end(code=1)
    assert (
        f"launch {job.launch} never began to train: no module of that name"
        in harness("status", run)[1]
    )
