"""Watching a run: what it waits for, how fast it is after a resume, what it tells others, where it
hangs, several runs at once."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import secrets
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import Clock, events, harness, kill_tree, run, torchrun, wait_until, workers_of
from library_runs import train

import harness as harness_package
from harness.checkpoint import attempts
from harness.checkpoint.catalog import read_catalog
from harness.cli import main
from harness.errors import UsageError
from harness.monitoring import trackers
from harness.monitoring.goodput import DATA, OVERHEAD, RESTORE, STARTUP, TRAINING, Goodput
from harness.monitoring.throughput import TRUSTED_S, Throughput
from harness.monitoring.wait_notices import WaitNotices
from harness.store import LocalStore, open_store
from harness.supervision import attempt_history, hang_report
from harness.text import now, say

pytestmark = pytest.mark.usefixtures("process_as_it_was")
TASK = (
    "task.name=small_task:build",
    "log.every_steps=1",
    "checkpoint.every_steps=5",
    "checkpoint.best=val_loss:min",
)


# --- what it waits for ---


@pytest.fixture
def account() -> SimpleNamespace:
    """An account with a clock of its own, what looks at it, and what was said."""
    clock, said = Clock(50.0), list[str]()
    account = Goodput(clock)
    account.say = said.append
    return SimpleNamespace(
        it=account, clock=clock, said=said, look=partial(WaitNotices().look, account)
    )


@pytest.mark.parametrize(
    ("what", "words"),
    [(DATA, "the next batch"), (OVERHEAD, "the other ranks"), (RESTORE, "the stores")],
)
def test_what_takes_long_is_said_after_ten_seconds_and_then_ever_more_rarely(what, words, account):
    account.it.on(what)
    heard: list[int] = []
    for second in range(100):
        account.look()
        if len(account.said) > len(heard):
            heard.append(second)
        account.clock.now += 1
    assert heard == [10, 20, 40, 80] and all(
        f"waiting for {words}" in line for line in account.said
    )


def test_each_wait_is_said_anew_and_a_short_one_never(account):
    for _ in range(30):
        account.it.on(DATA)
        account.clock.now += 9
        account.look()
    assert account.said == []
    for _ in range(2):
        account.it.on(DATA)
        account.clock.now += 11
        account.look()
    assert len(account.said) == 2


def test_a_step_may_take_long_but_the_first_one_is_said_to_compile(account):
    account.it.on(TRAINING)
    account.clock.now += 15
    account.look()
    assert "may have to compile" in account.said.pop()
    account.it.step_made()
    account.it.on(TRAINING)
    account.clock.now += 1000
    account.look()
    account.it.on(STARTUP)
    account.clock.now += 1000
    account.look()
    assert account.said == []


@pytest.mark.slow
def test_a_rank_that_others_do_not_join_says_so(
    tmp_path: Path, started: Callable[..., subprocess.Popen[str]]
) -> None:
    loop_file = tmp_path / "alone.py"
    loop_file.write_text("import harness\nharness.init('runs/a')\n")
    env = {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    from s3_server import free_ports

    env["MASTER_PORT"] = str(free_ports(1)[0])
    with (tmp_path / "log").open("w") as output:
        started([sys.executable, str(loop_file)], cwd=tmp_path, env=env, output=output)
    wait_until(
        lambda: "waiting for the other ranks to join" in (tmp_path / "log").read_text(),
        "the word",
        limit_s=60,
    )


# --- how fast it is ---


def test_the_rate_survives_a_resume_and_then_gives_way_to_what_is_seen():
    clock = Clock(50.0)
    pace = Throughput(clock)
    pace.begin(100, before=4.0)
    assert pace.steps_per_s(100) == pytest.approx(4.0) and pace.left_s(100, 140) == pytest.approx(
        10.0
    )
    clock.now += TRUSTED_S
    assert pace.steps_per_s(100 + int(2 * TRUSTED_S)) == pytest.approx(3.0)
    clock.now += 1e6
    assert pace.steps_per_s(100 + int(2 * (TRUSTED_S + 1e6))) == pytest.approx(2.0, rel=1e-3)


def test_the_rate_is_that_of_the_last_steps_which_the_events_tell_of():
    def step(number: int, at: float) -> dict:
        return {"event": "step", "step": number, "time": f"2026-01-01T00:00:{at:06.3f}+00:00"}

    assert (
        attempt_history.steps_per_s([]) is None
        and attempt_history.steps_per_s([step(1, 1)]) is None
    )
    slow = [step(number, number / 2) for number in range(1, 11)]
    fast = [step(10 + number, 5 + number / 10) for number in range(1, 31)]
    assert attempt_history.steps_per_s(slow) == pytest.approx(2.0)
    assert attempt_history.steps_per_s(
        [*slow, {"event": "saved", "step": 3}, *fast]
    ) == pytest.approx(10.0)
    assert (
        attempt_history.steps_per_s(
            [{"event": "step", "step": 1}, {"event": "step", "time": "soon", "step": 2}]
        )
        is None
    )


def test_of_many_events_only_the_end_is_read(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.prepare(("events",))
    lines = "".join(json.dumps({"event": "step", "step": step}) + "\n" for step in range(100_000))
    (tmp_path / "events/0001.jsonl").write_text(lines)
    told = attempt_history.events([store], 1)
    assert told[-1]["step"] == 99_999 and 1000 < len(told) < 20_000
    assert len(attempt_history.events([store], 1, float("inf"))) == 100_000
    for number in (1, 2, 3):
        (tmp_path / f"events/0002-{number:06d}.jsonl").write_text(
            json.dumps({"event": "step", "step": number}) + "\n"
        )
    assert [event["step"] for event in attempt_history.events([store], 2)] == [1, 2, 3]


def test_events_are_of_one_attempt_also_where_its_number_begins_another_one(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "run")
    store.prepare(("events",))
    for number, names in (
        (1000, ("1000", "1000-000001", "1000-rank1")),
        (10000, ("10000", "10000-rank0")),
    ):
        for name in names:
            store.append(
                f"events/{name}.jsonl",
                json.dumps({"event": "step", "attempt": number}).encode() + b"\n",
            )
    assert [event["attempt"] for event in attempt_history.events([store], 1000)] == [1000] * 3
    assert [event["attempt"] for event in attempt_history.events([store], 10000)] == [10000] * 2


@pytest.mark.slow
def test_a_resumed_run_knows_its_rate_and_what_is_left_at_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def rates() -> list[int]:
        found = re.findall(r"([\d,]+) samples/s", capfd.readouterr().out)
        return [int(rate.replace(",", "")) for rate in found]

    train(tmp_path / "a", leave_at=9, log_every_steps=1, each=lambda job: time.sleep(0.1))
    before = rates()[-1]
    train(tmp_path / "a", log_every_steps=1)
    assert before / 2 < rates()[0] < before * 2 and before < 105, (
        "that of the first attempt: ten samples in each of nearly ten steps a second at most"
    )


@pytest.mark.parametrize("encoding", ["iso-8859-1", "ascii", "utf-8"])
def test_a_terminal_that_lacks_a_character_shows_the_rest(encoding: str) -> None:
    raw = io.BytesIO()
    terminal = io.TextIOWrapper(raw, encoding)
    say("steps 0–30 … ü", terminal)
    say("the next line", terminal)
    shown = raw.getvalue().decode(encoding)
    expected = {"ascii": "steps 0?30 ? ?", "iso-8859-1": "steps 0?30 ? ü"}
    assert shown == f"{expected.get(encoding, 'steps 0–30 … ü')}\nthe next line\n"


# --- who else is told ---


def curve(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(directory / "tensorboard"), size_guidance={"scalars": 0})
    found.Reload()
    return {
        tag: [(event.step, event.value) for event in found.Scalars(tag)]
        for tag in found.Tags()["scalars"]
    }


def told(directory: Path) -> dict[int, object]:
    """The loss of each step by the events; of one that was made twice, once."""
    return {
        event["step"]: pytest.approx(event["loss"], rel=1e-6) for event in events(directory, "step")
    }


@pytest.mark.slow
def test_tensorboard_shows_one_curve_after_three_kills(tmp_path: Path) -> None:
    for leave_at in (3, 7, 10, None):
        train(tmp_path / "a", leave_at=leave_at, log_every_steps=1, log_to=["tensorboard"])
    shown = curve(tmp_path / "a")
    assert [step for step, _ in shown["loss"]] == list(range(1, 13))
    assert dict(shown["loss"]) == told(tmp_path / "a")
    assert len(list((tmp_path / "a/tensorboard").iterdir())) == 4


def test_tensorboard_shows_the_whole_curve_of_a_run_that_lost_its_disk(tmp_path: Path) -> None:
    remote = (tmp_path / "remote").as_uri()
    (tmp_path / "remote").mkdir()
    train(tmp_path / "a", leave_at=7, log_every_steps=1, remote=remote)
    for folder, name in (("events", "*.jsonl"), ("checkpoints", "step_00000004-*.json")):
        there = (tmp_path / "remote" / folder).glob
        wait_until(lambda: list(there(name)), f"the {folder} in the remote store")  # noqa: B023
    train(tmp_path / "b", log_every_steps=1, log_to=["tensorboard"], remote=remote)
    steps = [step for step, _ in curve(tmp_path / "b")["loss"]]
    assert steps == sorted(set(steps)) and steps[-1] == 12 and len(steps) >= 8


def records(file: Path) -> Iterator[bytes]:
    """What lies in a file of W&B's: a header of seven bytes, then blocks as LevelDB's log has
    them."""
    data, at, record = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        size, kind = struct.unpack_from("<HB", data, at + 4)
        record, at = record + data[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def offline(directory: Path) -> dict[str, dict[int, float]]:
    """What W&B has been told, in each attempt: the loss of each step."""
    from wandb.proto import wandb_internal_pb2

    found: dict[str, dict[int, float]] = {}
    for file in sorted(directory.glob("wandb/offline-run-*/*.wandb")):
        steps = dict[int, float]()
        for data in records(file):
            record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]  # made at import
            record.ParseFromString(data)
            items = (
                {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
                if record.HasField("history")
                else {}
            )
            if "loss" in items:
                step = record.history.step.num
                assert step not in steps, "twice"
                steps[step] = float(items["loss"])
        found[str(file)] = steps
    return found


KILLED = """\
import os, signal, sys
import torch, harness

run = harness.init(
    "runs/a",
    save_every_s=None,
    save_every_steps=4,
    log_every_steps=1,
    log_to=["tensorboard", "wandb"],
)
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
run.track(model=model, optimizer=optimizer)
for number in run.steps(16):
    loss = model(torch.randn(8, 4)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    run.log(loss=loss)
    if run.step == int(sys.argv[1]):
        # else the kill may come before the save of step 4, and the attempt has nothing to show
        run._checkpointer.background.wait()
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_one_curve_is_shown_after_three_kills(tmp_path: Path) -> None:
    (tmp_path / "killed.py").write_text(KILLED)
    env = {
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "WANDB_CONFIG_DIR": str(tmp_path),
        "WANDB_CACHE_DIR": str(tmp_path),
    }
    for kill_at in (6, 7, 11, 0):
        done = run([sys.executable, "killed.py", str(kill_at)], cwd=tmp_path, env=env)
        assert (
            done.returncode == (-signal.SIGKILL if kill_at else 0) and "warning" not in done.stdout
        ), done.stdout + done.stderr
    directory = tmp_path / "runs/a"
    found, run_id = offline(directory), read_catalog(LocalStore(directory)).run_id
    assert len(found) == 4 and all(f"run-{run_id}" in name for name in found), (
        "one run there, whatever was killed here"
    )
    assert list(told(directory)) == list(range(1, 17))
    assert list(found.values())[-1] == told(directory)
    assert dict(curve(directory)["loss"]) == told(directory) and len(curve(directory)["loss"]) == 16


def test_what_was_cut_off_is_no_part_of_the_curve(tmp_path: Path) -> None:
    train(tmp_path / "a", leave_at=7, log_every_steps=1)
    train(tmp_path / "a", leave_at=6, log_every_steps=1)
    store = LocalStore(tmp_path / "a")
    assert list(trackers.history(read_catalog(store), 100)) == [1, 2, 3, 4, 5], (
        "step 6 is of an attempt that others have cut off"
    )
    assert list(trackers.history(read_catalog(store), 3)) == [1, 2, 3]


def test_who_fails_to_listen_is_left_alone_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(self: object, step: int, values: dict) -> None:
        if step == 3:
            raise OSError("the disk is full")

    monkeypatch.setattr(trackers.TensorBoard, "log", refuse)
    assert train(tmp_path / "a", log_every_steps=1, log_to=["tensorboard"]).finished
    assert (
        capfd.readouterr().out.count(
            "nothing more is told to tensorboard: OSError: the disk is full"
        )
        == 1
    )


def test_who_is_not_known_or_not_installed_is_refused_before_anything_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="expected: a list of: tensorboard, wandb"):
        harness_package.init(tmp_path / "a", log_to=["mlflow"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="tensorboard is not installed") as caught:
        harness_package.init(tmp_path / "a", log_to=["tensorboard"])
    assert caught.value.remedy == "pip install tensorboard" and not (tmp_path / "a").exists()


@pytest.mark.parametrize("name", ["step", "time", "event", "spent", "of", "kind"])
def test_nothing_that_is_logged_is_called_like_a_part_of_each_event(
    name: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=f"can be called '{name}'"):
        train(tmp_path / "a", each=lambda job: job.log(**{name: 1.0}))


# --- where it hangs ---


def stack(file: str, line: int, function: str) -> str:
    return f'  File "{file}", line {line}, in {function}\n    code\n'


OWN, LIBRARY = (
    stack("/home/me/my_task.py", 7, "loss"),
    stack("/env/lib/python3.12/site-packages/torch/nn/functional.py", 9, "linear"),
)
COLLECTIVE = stack("/env/lib/python3.12/site-packages/torch/distributed/c10d.py", 3, "all_reduce")


def test_the_place_of_a_rank_is_the_last_line_of_the_users_own() -> None:
    assert hang_report.place(f"thread MainThread:\n{OWN}{LIBRARY}") == hang_report.Place(
        "loss (my_task.py:7)", waits=False
    )
    assert hang_report.place(OWN + COLLECTIVE) == hang_report.Place(
        "loss (my_task.py:7)", waits=True
    )
    assert hang_report.place(
        LIBRARY
    ).description == "linear (functional.py:9)" and hang_report.place(
        "nothing"
    ) == hang_report.Place("an unknown place", waits=False)


@pytest.mark.parametrize(
    ("ranks", "size", "words"),
    [
        (
            {0: OWN + COLLECTIVE, 1: OWN},
            2,
            "rank 1 is stuck in loss (my_task.py:7); rank 0 waited for the others",
        ),
        (
            {0: OWN + COLLECTIVE, 2: OWN + COLLECTIVE},
            3,
            "rank 1 said nothing: stopped, dead, or busy outside of Python; "
            "ranks 0, 2 waited for the others",
        ),
        (
            {0: OWN + COLLECTIVE, 1: COLLECTIVE},
            2,
            "rank 0 waits for the others in loss (my_task.py:7); "
            "rank 1 waits for the others in all_reduce (c10d.py:3)",
        ),
        (
            {0: OWN, 1: OWN},
            2,
            "rank 0 is stuck in loss (my_task.py:7); rank 1 is stuck in loss (my_task.py:7)",
        ),
    ],
)
def test_one_sentence_tells_who_is_stuck_and_who_waits(
    ranks: dict[int, str], size: int, words: str
) -> None:
    told = [
        {"rank": rank, "step": 5, "error": "e", "stacks": stacks} for rank, stacks in ranks.items()
    ]
    assert hang_report.sentence(told, size) == words
    text = hang_report.page(told, size)
    assert text.startswith(words + ".\n\n--- rank 0, step 5: e") and text.count("--- rank") == len(
        ranks
    )


def test_the_report_of_a_rank_on_another_nodes_disk_is_named_where_it_is(tmp_path: Path) -> None:
    """Its run.dir is not that of the writer, so it holds neither the attempt nor its events."""
    elsewhere, bucket = (
        LocalStore(tmp_path / "run"),
        open_store(f"memory://{secrets.token_hex(8)}/run", 5),
    )
    attempt = attempts.Attempt(1, "run", "nonce")
    attempts.first_word(bucket, "attempts/0001.json", {"run_id": "run", "nonce": "nonce"})
    for rank in (0, 1):
        attempts.add_event(
            bucket, attempt, rank, hang_report.line(rank, 5, "a step took longer than 3 s", OWN, "")
        )
    words, where = hang_report.report((elsewhere, bucket), attempt, 2, 5.0)
    assert words.startswith("rank 0 is stuck in loss (my_task.py:7)") and where == bucket.where(
        "hangs/0001.txt"
    )
    assert bucket.exists("hangs/0001.txt") and not elsewhere.exists("hangs/0001.txt")
    assert hang_report.report((elsewhere,), attempt, 2, 5.0) == ("", "")


@pytest.mark.parametrize("kind", ["directory", "bucket"])
def test_the_reports_of_many_ranks_are_all_read(tmp_path: Path, kind: str) -> None:
    store = (
        LocalStore(tmp_path / "run")
        if kind == "directory"
        else open_store(f"memory://{secrets.token_hex(8)}/run", 5)
    )
    store.prepare(("events", "attempts"))
    attempt = attempts.Attempt(1, "run", "nonce")
    attempts.first_word(store, "attempts/0001.json", {"run_id": "run", "nonce": "nonce"})
    others = "thread of another:\n" + LIBRARY * 300 + "ünï 🙂" * 5000
    for rank in range(64):
        line = hang_report.line(rank, 5, "🙂" * 9000, f"{others}\nmain:\n{OWN}", "🙂" * 9000)
        assert len(line) <= hang_report.RANK_BYTES and json.loads(line)["rank"] == rank
        if rank != 7:
            attempts.add_event(store, attempt, rank, line)
    words, _ = hang_report.report((store,), attempt, 64, 5.0)
    assert words.count("is stuck in loss (my_task.py:7)") == 63
    assert words.endswith("; rank 7 said nothing: stopped, dead, or busy outside of Python")
    page = store.read("hangs/0001.txt").decode()
    assert page.count("--- rank") == page.count("(the beginning is cut off)") == 63
    assert json.loads(hang_report.line(0, 5, "e", OWN, ""))["stacks"] == OWN, "what fits is whole"


HANGING = """\
import os, time
import torch, harness

run = harness.init("runs/a", step_timeout_s=3, save_every_s=None)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
run.track(model=model, optimizer=optimizer)


def dawdle():
    time.sleep(3600)


for number in run.steps(100):
    if number == 2 and run.rank == 1:
        dawdle()
    loss = model(torch.randn(8, 4)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
"""


@pytest.mark.slow
def test_the_report_of_a_hang_names_the_rank_and_the_line_first(tmp_path: Path) -> None:
    (tmp_path / "my_loop.py").write_text(HANGING)
    done = run([*torchrun(2)[:-1], str(tmp_path / "my_loop.py")], cwd=tmp_path)
    assert done.returncode == 1, done.stdout
    text = (tmp_path / "runs/a/hangs/0001.txt").read_text()
    assert text.startswith(
        "rank 1 is stuck in dawdle (my_loop.py:11); rank 0 waited for the others.\n"
    ), text
    assert (
        text.count("--- rank") == 2
        and "in dawdle" in text
        and "all_reduce" in text.partition("--- rank 1")[0]
    ), text
    assert text.count("last collective: gloo:") == 2, text
    assert (
        "rank 1 is stuck in dawdle (my_loop.py:11); rank 0 waited for the others; all stacks: "
        in done.stderr
    ), done.stderr
    end = json.loads((tmp_path / "runs/a/attempts/0001.end.json").read_text())
    assert (
        end["rank"] == 1
        and end["error"] == "a step took longer than 3 s: stuck in dawdle (my_loop.py:11)"
    ), end


# --- several runs at once ---


def test_top_shows_each_run_in_a_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train(tmp_path / "done", log_every_steps=1)
    train(tmp_path / "left", leave_at=7, log_every_steps=1)
    train(tmp_path / "failed", leave_at=3, log_every_steps=1)
    end = {"error": "ZeroDivisionError: the user's step fails", "step": 3}
    attempts.first_word(
        LocalStore(tmp_path / "failed"),
        "attempts/0001.end.json",
        {"why": "failed", "time": now()} | end,
    )
    capfd.readouterr()
    assert (
        main(["top", *(str(tmp_path / name) for name in ("done", "left", "failed", "none"))]) == 0
    )
    head, done, left, failed, none = capfd.readouterr().out.splitlines()
    assert head.split()[:5] == ["run", "state", "step", "rate", "left"]
    assert "finished" in done and "12/12" in done and "s ago" in done
    assert "running" in left and "6/12" in left and re.search(r"[\d.e+]+/s", left), left
    assert " failed " in failed and "ZeroDivisionError: the user's step fails" in failed
    assert "cannot tell" in none or "to be continued" in none


@pytest.mark.slow
def test_top_of_a_run_that_trains_tells_rate_and_time_left(
    tmp_path: Path, started: Callable[..., subprocess.Popen[str]]
) -> None:
    settings = (
        *TASK,
        f"run.dir={tmp_path}/run",
        "task.args.sleep_s=0.1",
        "train.max_steps=300",
        "train.epochs=100",
    )
    with (tmp_path / "log").open("w") as output:
        process = started(torchrun(2, *settings), output=output)
    wait_until(lambda: len(events(tmp_path / "run", "step")) > 20, "some steps")
    done = run(harness("top", str(tmp_path / "run")))
    assert done.returncode == 0 and "\x1b" not in done.stdout, done.stderr
    line = done.stdout.splitlines()[-1]
    assert (
        shown := re.search(r" running +(\d+)/300 +([\d.]+)/s +(\d+) s +\d+ s ago", line)
    ) is not None, line
    assert 3 < float(shown[2]) < 12 and 10 < int(shown[3]) < 100
    assert len(workers_of(process.pid)) == 2
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=60)
    kill_tree(process.pid)
