"""Recomputed steps are compared after a kill with what they were; whatever a checkpoint does not
hold shows there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import harness, kill_tree, run, torchrun, wait_until
from programs import HEAD, Outcome, killed_once, live
from remote_runs import Home
from there import there

from harness.arguments import Settings
from harness.checkpoint import attempts
from harness.checkpoint import format as fmt
from harness.checkpoint.catalog import Catalog, read_catalog
from harness.checkpoint.format import Manifest
from harness.cli import main
from harness.distributed.ranks import World
from harness.monitoring.event_log import EventLog
from harness.selfcheck import identity, step_log, step_records
from harness.selfcheck.recomputed import RecomputedSteps
from harness.store import LocalStore, Store, open_store
from harness.supervision import attempt_history
from harness.supervision.restart_messages import SAME, describe_replays

LOOP = """
run = init(on_mismatch=os.environ.get("ON_MISMATCH", "warn"))
hidden = torch.Generator().manual_seed(0)
model = nn.Linear(8, 1)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
run.track(model=model, optimizer=optimizer)
order = (
    None
    if not os.environ.get("OTHER")
    else (lambda epoch: list(range(160))[:: -1 if os.environ["OTHER"] == "yes" else 1])
)
for x, y in run.batches(points(), 16, epochs=2, order=order):
    if os.environ.get("NOISY"):
        x = x + torch.randn(x.shape, generator=hidden)
    loss = (model(x) - y).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    run.log(loss=loss)
    if run.step == int(os.environ.get("DIE", 0)):
        time.sleep(0.2)
    die(run)
"""
NOISY = {"NOISY": "yes"}


SILENT = LOOP.replace("    run.log(loss=loss)\n", "")


def test_status_and_report_count_the_steps_that_a_loop_without_a_log_has_lost(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def seen() -> list[int]:
        """The steps that were lost, and the last that was made, of the first attempt."""
        capfd.readouterr()
        main(["status", str(tmp_path / "run"), "--json"])
        lost = json.loads(capfd.readouterr().out)["attempts"][0]["lost"]
        main(["report", str(tmp_path / "run"), "--json"])
        return [lost, json.loads(capfd.readouterr().out)["stretches"][0]["life"]["reached"]]

    assert live(tmp_path, SILENT, "run", env={"DIE": "9"}).code == -9
    assert seen() == [2, 8]
    assert live(tmp_path, SILENT, "run").code == 0
    assert seen() == [2, 8]


def told(folder: Path, kind: str) -> list[dict]:
    """The events of that kind in the run's last attempt."""
    lines = sorted((folder / "killed" / "events").glob("*.jsonl"))[-1].read_text().splitlines()
    return [event for line in lines if (event := json.loads(line))["event"] == kind]


def said(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    """What a command prints."""
    main(list(command))
    return capsys.readouterr().out


def outcome(
    folder: Path, env: dict[str, str], then: dict[str, str] | None = None, **options: object
) -> Outcome:
    return killed_once(folder, LOOP, env=env, then=then, die=9, **options)  # type: ignore[arg-type]


def test_equal_steps_are_said_to_be_equal(tmp_path, capsys):
    lived = outcome(tmp_path, {})
    assert lived.is_equal, lived.rows
    assert "2 steps to recompute" in lived.resumed.text
    assert "harness: 2 recomputed steps, all equal" in lived.resumed.text
    assert "MISMATCH" not in lived.resumed.text
    (event,) = told(tmp_path, "replayed")
    assert (event["recomputed"], event["compared"], event["verdict"]) == (2, 2, "equal")
    for command in ("status", "report"):
        assert "2 recomputed steps, all equal" in said(capsys, command, str(tmp_path / "killed"))
    assert not list(tmp_path.glob("*/events/*.steps")), (
        "the last checkpoint is newer than all of them"
    )
    # By a run that was killed as it let them go.
    left = tmp_path / "killed" / "events" / "0001.steps"
    left.write_bytes(step_records.head({}) + step_records.pack(LINES[0]))
    assert (
        "events/0001.steps" in said(capsys, "prune", str(tmp_path / "killed"), "--yes")
        and not left.exists()
    )


def test_a_generator_that_nobody_tracks_is_caught_at_the_first_step(tmp_path, capsys):
    lived = outcome(tmp_path, NOISY)
    assert lived.resumed.code == 0, "by default it is only said"
    assert lived.resumed.text.count("MISMATCH") == 1
    assert (
        "MISMATCH: recomputed step 7 is not what it was: loss: same samples" in lived.resumed.text
    )
    (event,) = told(tmp_path, "mismatch")
    assert (event["step"], event["what"], event["before"], event["attempt"]) == (7, "loss", 1, 2)
    assert event["was"] != event["now"] and len(event["hosts"]) == len(event["devices"]) == 2
    assert str(event["was"]) in lived.resumed.text and str(event["now"]) in lived.resumed.text
    assert not told(tmp_path, "replayed")
    for command in ("status", "report"):
        assert "MISMATCH: recomputed step 7" in said(capsys, command, str(tmp_path / "killed"))
    assert (
        json.loads(said(capsys, "status", "--json", str(tmp_path / "killed")))["replays"]["2"][
            "verdict"
        ]
        == "mismatch"
    )


def test_other_samples_are_told_as_such(tmp_path):
    lived = outcome(tmp_path, {"OTHER": "no"}, {"OTHER": "yes"})
    assert (
        "MISMATCH: recomputed step 7 is not what it was: data: other samples" in lived.resumed.text
    )


def test_a_run_that_is_to_stop_ends_before_its_next_save_and_is_not_started_again(tmp_path):
    lived = outcome(tmp_path, NOISY | {"ON_MISMATCH": "stop"})
    assert lived.resumed.code == 78
    assert not list((tmp_path / "killed" / "checkpoints").glob("*-0002.json"))
    end = json.loads((tmp_path / "killed" / "attempts" / "0002.end.json").read_text())
    assert (end["why"], end["code"]) == ("failed", 78)
    again = live(tmp_path, LOOP, "killed", env=NOISY | {"ON_MISMATCH": "stop"})
    assert again.code == 78, "what it was is not what the attempt made that was stopped"
    insisted = live(tmp_path, LOOP, "killed", env=NOISY)
    assert insisted.code == 0


def test_all_ranks_stop(tmp_path):
    live(tmp_path, LOOP, "killed", env=NOISY | {"DIE": "9"}, ranks=2)
    assert live(tmp_path, LOOP, "killed", env=NOISY | {"ON_MISMATCH": "stop"}, ranks=2).codes == [
        78,
        78,
    ]


def test_a_program_that_has_changed_is_expected_to_differ(tmp_path):
    live(tmp_path, LOOP, "killed", env=NOISY | {"DIE": "9"})
    lived = live(tmp_path, LOOP + "\n# changed\n", "killed", env=NOISY | {"ON_MISMATCH": "stop"})
    assert lived.code == 0
    assert "MISMATCH" not in lived.text
    assert "expected to differ: program.py has changed" in lived.text


def test_a_loop_that_logs_no_loss_is_compared_in_its_samples(tmp_path):
    source = LOOP.replace("run.log(loss=loss)", "run.log(lr=0.05)")
    live(tmp_path, source, "killed", env=NOISY | {"DIE": "9"})
    lived = live(tmp_path, source, "killed", env=NOISY)
    assert (
        "2 recomputed steps, all equal (in their samples: there is no loss to compare)"
        in lived.text
    )


@pytest.mark.slow
def test_on_another_number_of_ranks_samples_are_compared_and_means_of_losses_about(tmp_path):
    source = LOOP.replace(
        "nn.Linear(8, 1)", "nn.parallel.DistributedDataParallel(nn.Linear(8, 1))"
    ).replace("init(", "init(log_every_steps=1, ")
    source = source.replace(
        "    loss = (",
        "    time.sleep(0.1 * (run.step > 3 and 'DIE' in os.environ))"
        "  # the ranks meet every quarter of a second\n    loss = (",
    )
    live(tmp_path, source, "killed", env={"DIE": "9"}, ranks=2)
    lived = live(tmp_path, source, "killed")
    assert lived.code == 0
    assert "all within 0.001, not exactly: world_size: 2 before, 1 now" in lived.text
    live(tmp_path, source, "other", env=NOISY | {"DIE": "9"}, ranks=2)
    lived = live(tmp_path, source, "other", env=NOISY | {"ON_MISMATCH": "stop"})
    assert lived.code == 0 and "expected to differ: 2 rank(s) before, 1 now" in lived.text


@pytest.mark.slow
def test_a_launcher_starts_again_after_a_kill_and_not_after_a_mismatch(tmp_path):
    (tmp_path / "loop.py").write_text(HEAD + LOOP)
    env = NOISY | {"ON_MISMATCH": "stop", "DIE": "9"}
    directory = tmp_path / "run"
    lived = run(
        harness("launch", f"run.dir={directory}", str(tmp_path / "loop.py"), str(directory)),
        env=env,
        cwd=tmp_path,
    )
    assert lived.returncode == 78, lived.stdout + lived.stderr
    assert "MISMATCH: recomputed step 7" in lived.stdout + lived.stderr
    assert sorted(path.name for path in directory.glob("attempts/*.end.json")) == ["0002.end.json"]
    assert not list(directory.glob("attempts/0003.json"))


@pytest.mark.slow
def test_what_each_step_was_outlives_a_kill_of_the_whole_tree(tmp_path, started):
    settings = [
        "task.name=small_task:build",
        "task.args={sleep_s: 0.02}",
        "checkpoint.every_s=null",
        "log.every_steps=5",
    ]
    process = started(torchrun(2, *settings, f"run.dir={tmp_path / 'run'}"))
    store = LocalStore(tmp_path / "run")
    wait_until(
        lambda: any(
            line.rank for lines in read_back(store, 2).after(5).values() for _, line in lines
        ),
        "ten steps",
        every_s=0.005,
    )
    kill_tree(process.pid)
    log = read_back(store, 2).logs[1]
    assert log.about["world_size"] == 2
    made = [line for line in log.lines if line.rank == 0 and line.samples is not None]
    assert [line.step for line in made] == list(range(1, len(made) + 1)) and len(made) >= 10
    assert all(line.loss is not None for line in made), "on a CPU at once"
    others = {line.step for line in log.lines if line.rank == 1}
    assert others and all(step % 5 == 0 for step in others), "with what is logged"


@contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """For a store that is used in this process."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield


def read_back(store: Store, attempt: int) -> step_records.Before:
    before, problem = step_records.before([store], attempt)
    assert not problem
    return before


LINES = [step_records.Line(step, bytes([step] * 8), 0, 7, step / 3) for step in range(1, 21)]


def test_a_damaged_file_gives_what_is_whole_in_it(tmp_path):
    content = step_records.head({"attempt": 1}) + b"".join(map(step_records.pack, LINES))
    about, lines = step_records.parse(content)
    assert (about["attempt"], lines) == (1, LINES)
    assert step_records.parse(content[:-3])[1] == LINES[:-1], "torn"
    at = len(content) - 3 * step_records.RECORD.size
    assert (
        step_records.parse(content[:at] + b"\xff" + content[at + 1 :])[1] == LINES[:17] + LINES[18:]
    )
    assert step_records.parse(content.replace(b'"steps": 1', b'"steps": 9')) == ({}, [])
    for hostile in (
        b"",
        b"\n",
        b"{" * 100_000,
        b"[]\n" + content,
        b"\xff" * 1000 + b"\n",
        os.urandom(5000),
    ):
        assert step_records.parse(hostile) == ({}, [])
    events = LocalStore(tmp_path)
    events.prepare(("events",))
    with (tmp_path / "events" / "0001.steps").open("wb") as file:
        file.write(content)
        file.truncate(1 << 40)  # holds nothing
    assert read_back(events, 2).logs[1].lines == LINES
    assert attempt_history.events([events], 1) == []


@pytest.mark.parametrize("wrong", [True, 5, "x", [], ["one"], {"a": 1}, None], ids=repr)
def test_records_of_a_resume_that_hold_anything_at_all_are_no_traceback(wrong, tmp_path, capsys):
    store = LocalStore(tmp_path)
    store.prepare(("attempts", "events", "checkpoints"))
    result = {
        "verdict": "mismatch",
        "what": "loss",
        "step": 5,
        "attempt": 2,
        "before": 1,
    } | dict.fromkeys(
        ("hosts", "devices", "suspects", "expected", "was", "now", "name", "rank"), wrong
    )
    for number, origin in ((1, None), (2, {"attempt": 1, "step": 4})):
        record = {"run_id": "a", "nonce": "b", "from": origin, "insisted": wrong, "sources": wrong}
        record["environment"] = {"torch": wrong, "distributions": wrong}
        store.create(f"attempts/{number:04d}.json", attempts.spell(record), number)
    (tmp_path / "attempts" / "0001.replay.json").write_text("[" * 100_000)
    (tmp_path / "attempts" / "0002.replay.json").write_bytes(attempts.spell(result))
    for command in ("status", "report"):
        assert "MISMATCH: recomputed step 5 is not what it was" in said(
            capsys, command, str(tmp_path)
        )
    programs = read_catalog(store).attempts
    assert isinstance(identity.AttemptIdentities(2, {}, {1: {}}, programs).expected(1), list)


def recomputing(
    folder: Path, second: dict[str, Any], ranks: int = 1, on_mismatch: str = "stop"
) -> tuple[RecomputedSteps, list[str]]:
    """Attempt 3, alone, goes on from step 7 of attempt 2, which went on from step 5 of attempt 1;
    this has recorded steps up to 20.

    Returns what compares its steps, and what it has said.
    """
    store, world, said = LocalStore(folder), World(0, 1, torch.device("cpu"), 60.0), list[str]()
    store.prepare(("attempts", "events"))
    machine, settings = identity.of_machine(world), Settings(on_mismatch=on_mismatch)
    lines = [
        line._replace(name=step_records.name_of("loss"), rank=rank)
        for line in LINES
        for rank in range(ranks)
    ]
    head = step_records.head(machine | {"world_size": ranks})
    (folder / "events" / "0001.steps").write_bytes(head + b"".join(map(step_records.pack, lines)))
    known = {"device": "cpu", "torch": machine["torch"], "threads": machine["threads"]}
    record = {"kind": "train", "world_size": 1, "environment": known} | identity.of_program(
        settings
    )
    found = Catalog((store,), attempts={1: record | {"world_size": ranks}, 2: record | second})
    file = fmt.DataFile(f"{fmt.stem(7, 2)}.pt", 1, "blake3:0")
    origin = Manifest(
        "run", 2, 7, 0, None, {}, 1, ((1, 5), (2, 7)), (file,), {}, None, "", "", {}, ""
    )
    replay = RecomputedSteps(world, settings, lambda: None, [])
    replay.read(found, origin, attempts.Attempt(3, "run", "nonce"), said.append)
    replay.begin(EventLog(store, "events/0003.jsonl"), 20)
    return replay, said


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "another number of ranks": (
        {"world_size": 2},
        "expected to differ: 2 rank(s) in attempt 2, 1 now",
    ),
    "another program": ({"sources": {"program.py": "f00"}}, "program.py has changed"),
    "another torch": ({"environment": {"torch": "1.0"}}, "torch: 1.0 in attempt 2"),
    "nothing else": ({}, "MISMATCH"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_an_attempt_between_has_trained_otherwise_is_no_fault_of_this_one(tmp_path, name):
    """The steps of the first attempt beyond those of the second are of another course than this
    one's."""
    second, words = OTHERS[name]
    replay, said = recomputing(tmp_path, second)
    replay.step_made(8, LINES[7].samples, {"loss": there(LINES[7].loss) + 1.0})
    replay.close()
    assert words in "".join(said), said
    assert replay.has_failed == (name == "nothing else"), "only that one ends the run"


def test_samples_that_differ_after_losses_that_were_expected_to_are_told_once_and_recorded(
    tmp_path,
):
    replay, said = recomputing(tmp_path, {"world_size": 2}, ranks=2, on_mismatch="warn")
    store = LocalStore(tmp_path)
    for line in LINES[7:]:
        replay.step_made(line.step, bytes(8) if line.step > 10 else line.samples, {"loss": 9.0})

        def is_written(step: int = line.step) -> bool:
            return bool(read_back(store, 4).after(step - 1))

        wait_until(is_written, "it is written")
    replay.close()
    assert (
        len(said) == 2
        and "expected to differ: 2 rank(s) before, 1 now" in said[0]
        and "step 11" in said[1]
    ), said
    (verdict,) = step_records.verdicts([store]).values()
    assert (verdict["verdict"], verdict["what"], verdict["step"]) == ("mismatch", "data", 11)


def test_losses_that_were_expected_to_differ_are_the_result_if_the_samples_do_not(tmp_path):
    replay, said = recomputing(tmp_path, {"world_size": 2}, ranks=2)
    for line in LINES[7:]:
        replay.step_made(line.step, line.samples, {"loss": 9.0})
    replay.close()
    assert len(said) == 1 and not replay.has_failed
    assert [
        verdict["verdict"] for verdict in step_records.verdicts([LocalStore(tmp_path)]).values()
    ] == ["expected"]


def test_lines_are_dropped_when_every_store_has_a_newer_checkpoint(tmp_path, bucket):
    (tmp_path / "events").mkdir()
    (tmp_path / "events" / "0001.steps").write_bytes(
        step_records.head({}) + b"".join(map(step_records.pack, LINES[:4]))
    )
    with environment(bucket[0].environment):
        local, remote = LocalStore(tmp_path), open_store(Home(*bucket).url, 30)
        remote.prepare(("events",))
        log = step_log.StepLog(
            local, True, 2, {"attempt": 2}, step_records.before([local, remote], 2)[0]
        )
        for line in LINES[:9]:
            log.add(line)
        wait_until(lambda: read_back(local, 3).after(8), "they are written")
        log.send(lambda: remote)
        assert read_back(remote, 3).logs[2].lines == LINES[:9]
        log.on_event({"event": "saved", "checkpoint": "step_00000009-0002"})
        log.add(LINES[9])
        wait_until(lambda: read_back(local, 3).after(9), "another one")
        assert read_back(local, 3).logs[2].lines == LINES[:10] and 1 in read_back(local, 3).logs, (
            "the bucket has none yet"
        )
        log.on_event({"event": "uploaded", "checkpoint": "step_00000009-0002"})
        wait_until(lambda: 1 not in read_back(local, 3).logs, "the earlier attempt's are gone")
        log.send(lambda: remote)
        assert read_back(remote, 3).logs[2].lines == LINES[9:10], "what was sent before is gone"
        log.on_event({"event": "saved", "checkpoint": "step_00000010-0002"})
        log.on_event({"event": "uploaded", "checkpoint": "step_00000010-0002"})
        log.close()
        log.send(lambda: remote)
        assert not read_back(remote, 3).logs and not read_back(local, 3).logs


def test_of_very_many_lines_the_file_keeps_those_that_are_needed(tmp_path):
    (tmp_path / "events").mkdir()
    store = LocalStore(tmp_path)
    log = step_log.StepLog(store, False, 1, {}, step_records.before([store], 1)[0])
    for step in range(1, 10_001):
        log.add(step_records.Line(step, bytes(8)))
    wait_until(lambda: len(read_back(store, 2).after(0)) == 10_000, "they are written")
    log.on_event({"event": "saved", "checkpoint": "step_00009990-0001"})
    wait_until(lambda: len(read_back(store, 2).logs[1].lines) == 10, "the last ten are left")
    log.add(step_records.Line(10_001, bytes(8)))
    log.close()
    assert [line.step for line in read_back(store, 2).logs[1].lines] == list(range(9_991, 10_002))
    assert [path.name for path in (tmp_path / "events").iterdir()] == ["0001.steps"]


@pytest.mark.slow
def test_in_a_bucket_alone(bucket, tmp_path):
    """Lines are sent with the events, every twenty seconds."""
    home = Home(*bucket)
    source = LOOP.replace("init(on_mismatch", "init(remote=os.environ['URL'], on_mismatch").replace(
        "time.sleep(0.2)", "time.sleep(25); os.kill(os.getpid(), signal.SIGKILL)"
    )
    head = HEAD.replace("harness.init(sys.argv[1]", "harness.init(None")
    env = home.env() | {"URL": home.url} | NOISY
    killed = live(tmp_path, source, "killed", env=env | {"DIE": "9"}, head=head)
    assert killed.code == -9
    resumed = live(tmp_path, source, "killed", env=env, head=head)
    assert "MISMATCH: recomputed step 7" in resumed.text
    assert not [key for key in sorted(home.keys()) if key.endswith(".steps")]
    assert "MISMATCH: recomputed step 7" in run(harness("status", home.url), env=home.env()).stdout


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ((12, 12, 12, 12), "12 recomputed steps, all equal"),
        ((12, 10, 10, 10), "12 recomputed steps, 10 compared, all equal"),
        (
            (12, 10, 10, 12),
            "12 recomputed steps, all equal (the losses of 10 and the samples of 12 steps)",
        ),
        (
            (12, 12, 12, 5),
            "12 recomputed steps, all equal (the losses of 12 and the samples of 5 steps)",
        ),
    ],
)
def test_what_was_compared_is_counted_by_its_kind(counts, words):
    names = ("recomputed", "compared", "of_losses", "of_samples")
    record = {"verdict": SAME} | dict(zip(names, counts, strict=True))
    assert describe_replays({1: record}) == [words]
