"""What a run's time was spent on: every second once, over kills, a slow bucket and an evaluation;
and how it is shown."""

from __future__ import annotations

import html.parser
import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Clock, events, harness, kill_tree, run, start, torchrun, wait_until, workers_of
from fault_proxy import FaultProxy, Rule
from remote_lives import Life
from remote_runs import Home
from s3_server import S3Server

from harness.checkpoint import attempts
from harness.checkpoint.attempts import Attempt
from harness.checkpoint.catalog import read_catalog
from harness.cli import main
from harness.monitoring.event_log import EventLog
from harness.monitoring.goodput import DATA, RESTORE, SAVE, STARTUP, Goodput
from harness.report import chart, phrases
from harness.report.page import page
from harness.report.timeline import Timeline, timeline
from harness.store import LocalStore
from harness.supervision import launches

TASK = (
    "task.name=small_task:build",
    "train.epochs=6",
    "log.every_steps=1",
    "checkpoint.every_steps=5",
    "checkpoint.best=val_loss:min",
)


# --- within an attempt ---


def test_at_any_moment_the_time_is_spent_on_one_thing() -> None:
    clock = Clock(100.0)
    account = Goodput(clock, age_s=2.0)
    clock.now += 3
    with account.during(RESTORE):
        clock.now += 4
    account.on(DATA)
    clock.now += 1
    account.redone_until = 1
    for step in (1, 2):
        account.train(step)
        clock.now += 10
        with account.during(SAVE):
            clock.now += 0.5
        account.step_made()
        clock.now += 0.25
    assert account.spent() == {
        "startup": 5.0,
        "restore": 4.0,
        "data": 1.0,
        "redone": 10.0,
        "training": 10.0,
        "save": 1.0,
        "overhead": 0.5,
    }
    assert sum(account.spent().values()) == clock.now - 100 + 2


def test_events_tell_of_it_once_a_second_and_at_the_end(tmp_path: Path) -> None:
    clock, store = Clock(100.0), LocalStore(tmp_path)
    store.prepare(("events",))
    ledger = EventLog(
        store, "events/0001.jsonl", spent=lambda: {STARTUP: clock.now - 100}, clock=clock
    )
    for kind in ("begun", "step", "step", "step", "finished"):
        ledger.write(kind)
        clock.now += 0.6
    told = [(event["event"], event.get("spent", {}).get(STARTUP)) for event in events(tmp_path)]
    assert told == [
        ("begun", 0.0),
        ("step", None),
        ("step", pytest.approx(1.2)),
        ("step", None),
        ("finished", pytest.approx(2.4)),
    ]


def test_a_long_step_is_a_sign_of_life_if_nothing_else_was_written(tmp_path: Path) -> None:
    clock, store = Clock(100.0), LocalStore(tmp_path)
    store.prepare(("events",))
    ledger = EventLog(store, "events/0001.jsonl", clock=clock)
    for step in range(1, 9):
        clock.now += 12
        ledger.alive(step)
        if step == 5:
            ledger.write("step", step=step)
    assert [(event["event"], event["step"]) for event in events(tmp_path)] == [
        ("alive", 3),
        ("step", 5),
        ("alive", 8),
    ]


# --- over all attempts, from what lies in the stores ---


def at(seconds: float) -> str:
    """A time of a made-up day."""
    return (
        f"2026-01-01T{int(seconds) // 3600:02d}:{int(seconds) % 3600 // 60:02d}"
        f":{seconds % 60:06.3f}+00:00"
    )


class Made:
    """A run in a directory, written record by record, at times of the test's own."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.store, self.monkeypatch = LocalStore(directory), monkeypatch

    def at(self, seconds: float) -> None:
        for module in (
            attempts,
            launches,
            __import__("harness.monitoring.event_log", fromlist=["now"]),
        ):
            self.monkeypatch.setattr(module, "now", lambda: at(seconds))

    def launch(self, name: str, seconds: float) -> None:
        self.at(seconds)
        launches.begin([self.store], name, read_catalog(self.store))

    def attempt(self, seconds: float, spent: dict[str, float], launch: str | None = None) -> Life:
        """Claim one, that began so many seconds into the day and had spent this when it did."""
        self.at(seconds + sum(spent.values()))
        self.monkeypatch.delenv(launches.ENVIRONMENT, raising=False)
        if launch is not None:
            self.monkeypatch.setenv(launches.ENVIRONMENT, launch)
        life = Life(self.store)
        self.event(life.attempt, seconds + sum(spent.values()), "begun", step=0, spent=spent)
        return life

    def event(self, attempt: Attempt, when: float, kind: str, **fields: object) -> None:
        self.at(when)
        EventLog(self.store, f"events/{attempt.number:04d}.jsonl").write(kind, **fields)

    def end(self, attempt: Attempt, seconds: float, why: str, **details: object) -> None:
        self.at(seconds)
        attempts.end(self.store, attempt, why, **details)

    def timeline(self) -> Timeline:
        return timeline(read_catalog(self.store))


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Made:
    return Made(tmp_path / "run", monkeypatch)


def interrupted(made: Made) -> None:
    """Submitted, in the queue for 100 s, killed, started again by the next life of the job,
    finished."""
    made.store.prepare(("launches",))
    made.store.create("run.json", json.dumps({"submitted": at(0)}).encode(), 0)
    made.launch("7.0", 100)
    # torchrun took three seconds.
    first = made.attempt(103, {"startup": 2.0, "restore": 1.0}, "7.0")
    first.save(4)
    made.event(first.attempt, 116, "saved", step=4, seconds=0.5, blocked_s=0.125)
    spent = {"startup": 2.0, "restore": 1.0, "data": 1.0, "training": 15.0, "save": 1.0}
    made.event(first.attempt, 123, "step", step=6, loss=2.0, spent=spent)
    made.event(first.attempt, 124, "step", step=7, loss=1.75)
    made.launch("7.1", 200)
    second = made.attempt(202, {"startup": 4.0}, "7.1")
    made.event(second.attempt, 210, "step", step=5, loss=2.5, spent={"startup": 4.0, "redone": 4.0})
    second.save(9, final={"epochs": 1, "max_steps": None})
    made.event(
        second.attempt,
        230,
        "finished",
        step=9,
        spent={"startup": 4.0, "redone": 8.0, "training": 14.0, "evaluation": 2.0},
    )
    made.end(second.attempt, 231, "finished", step=9, saved=True, saved_step=9)
    made.at(233)
    launches.end(made.store, "7.1", "ended", code=0)


def test_every_second_between_the_submission_and_the_end_is_counted_once(made: Made) -> None:
    interrupted(made)
    found = made.timeline()
    assert found.wall_s == pytest.approx(233) and sum(found.spent.values()) == pytest.approx(233)
    assert found.spent == pytest.approx(
        {
            "training": 29,
            "redone": 8,
            "lost": 1,
            "waiting": 100 + 200 - 124,
            "startup": 3 + 2 + 2 + 4,
            "restore": 1,
            "data": 1,
            "evaluation": 2,
            "save": 1,
            "overhead": 1 + 2,
        }
    )
    assert found.useful == pytest.approx(29 / 233)
    first, second = found.stretches
    assert (first.how, first.life.lost, second.how) == ("killed", 3, "finished")
    assert found.interruptions == [first] and found.between_interruptions_s == pytest.approx(
        21 + 29
    )
    assert [(save.step, save.durable_s, save.blocked_s) for save in found.saves] == [
        (4, 0.5, 0.125)
    ]


def test_an_attempt_that_another_one_overtook_is_not_counted_twice(made: Made) -> None:
    zombie = made.attempt(0, {"startup": 2.0})
    made.event(zombie.attempt, 100, "step", step=50, spent={"startup": 2.0, "training": 98.0})
    successor = made.attempt(60, {"startup": 2.0})
    made.event(successor.attempt, 120, "step", step=50, spent={"startup": 2.0, "training": 58.0})
    made.end(zombie.attempt, 110, "superseded")
    found = made.timeline()
    assert found.wall_s == pytest.approx(120) and sum(found.spent.values()) == pytest.approx(120)
    assert [attempt.how for attempt in found.stretches] == [
        "superseded",
        "killed",
    ] and found.interruptions == found.stretches


def test_a_start_in_place_is_no_wait_in_the_queue(made: Made) -> None:
    made.launch("launch-1.0", 0)
    first = made.attempt(2, {"startup": 1.0}, "launch-1.0")
    made.event(first.attempt, 10, "step", step=3, spent={"startup": 1.0, "training": 7.0})
    made.attempt(15, {"startup": 1.0}, "launch-1.0")
    assert made.timeline().spent == pytest.approx({"training": 7, "startup": 2 + 1 + 5 + 1})


def test_a_run_that_never_began_has_nothing_to_tell(made: Made) -> None:
    found = made.timeline()
    assert (found.wall_s, found.useful, found.stretches) == (0, 0, [])
    assert "never interrupted" in phrases.text("it", found) and page("it", found)


# --- shown ---


def test_the_report_says_first_what_matters(made: Made, capfd: pytest.CaptureFixture[str]) -> None:
    interrupted(made)
    assert main(["report", str(made.store)]) == 0
    printed = capfd.readouterr().out
    assert printed.splitlines()[0].endswith("finished (at step 9)")
    assert (
        printed.splitlines()[1]
        == "12.4% of 3:53 was useful training, 1 interruption, 3 steps recomputed"
    )
    assert "interrupted every 50 s on average" in printed
    assert "1 save; one keeps training waiting for 0.125 s and is safe after 0.5 s" in printed
    assert re.search(r"waiting to be started +2:56 +75.5%  █{30}\n", printed)
    assert re.search(r"\n1 +21 s +0–7 +3 +no end is recorded: killed\n", printed)


def test_the_report_for_machines_holds_the_same(
    made: Made, capfd: pytest.CaptureFixture[str]
) -> None:
    interrupted(made)
    assert main(["report", str(made.store), "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert (
        sum(told["spent"].values()) == pytest.approx(told["wall_s"])
        and told["stretches"][0]["how"] == "killed"
    )


class Reader(html.parser.HTMLParser):
    """Counts what is on the page, and checks that what is opened is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attributes)))
        if tag not in ("meta", "rect", "line") or tag == "rect":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_one_whole_file_that_asks_for_nothing(
    made: Made, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    interrupted(made)
    assert main(["report", str(made.store), "--html", str(tmp_path / "r.html")]) == 0
    text = (tmp_path / "r.html").read_text()
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    assert not [
        value
        for _, attributes in reader.seen
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href")
    ]
    assert "url(" not in text and "@import" not in text and "<script" not in text
    kinds = [attributes.get("class") for tag, attributes in reader.seen if tag == "rect"]
    assert kinds.count("redone") == 2 and kinds.count("lost") == 2, (
        "in the bar of shares, and in the attempt's row"
    )
    assert sum(attributes.get("class") == "resume" for _, attributes in reader.seen) == 1
    assert text.count("✖") >= 2 and "attempt 2 resumes from step 4" in text


def test_a_page_that_cannot_be_written_says_so(
    made: Made, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    interrupted(made)
    assert main(["report", str(made.store), "--html", str(tmp_path / "no" / "r.html")]) == 74
    assert "Traceback" not in capfd.readouterr().err


def test_names_from_outside_are_text_on_the_page(made: Made) -> None:
    attempt = made.attempt(0, {"startup": 1.0}).attempt
    made.end(attempt, 5, "failed", error="<script>alert(1)</script>", step=1)
    assert "<script" not in page("a<b>", made.timeline()) and "a&lt;b&gt;" in page(
        "a<b>", made.timeline()
    )


def test_a_long_curve_is_thinned_and_keeps_its_end() -> None:
    points = [(float(step), float(step % 7)) for step in range(100_000)]
    thin = chart.thinned(points)
    assert len(thin) <= chart.MOST_POINTS and thin[-1] == points[-1]
    assert chart.thinned([]) == [] and chart.thinned(points[:1]) == points[:1]
    assert chart.curve([(1.0, float("nan"))], [], "loss", "steps") == ""


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.013, 0.0131), (-5.0, 1e6), (3.0, 3.0)])
def test_ticks_are_few_and_between_the_ends(low: float, high: float) -> None:
    found = chart.ticks(low, high, 5)
    assert len(found) <= 12 and all(low - 1e-9 <= value <= high + 1e-9 for value in found)


# --- real runs ---


def started_at(pid: int) -> float:
    """When a process was started; psutil would say it by the second."""
    ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    return time.time() - (
        time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    )


@pytest.mark.slow
def test_the_time_of_a_run_with_kills_a_slow_bucket_and_evaluations_sums_to_wall_time(
    tmp_path: Path, s3_server: S3Server, started: Callable[..., object]
) -> None:
    home = Home(s3_server, s3_server.make_bucket("ledger"))
    with FaultProxy(s3_server.host, s3_server.port) as proxy:
        proxy.rules.append(Rule("delay", argument=0.1))
        directory = tmp_path / "run"
        settings = (
            *TASK,
            f"run.dir={directory}",
            f"run.remote={home.url}",
            "task.args.sleep_s=0.05",
            "eval.every_steps=10",
        )
        began = 0.0
        for kill in (True, True, False):
            with (tmp_path / "log").open("a") as output:
                process = start(torchrun(2, *settings), env=home.env(proxy), output=output)
            try:
                wait_until(lambda: len(workers_of(process.pid)) == 2, "the ranks")  # noqa: B023
                began = began or started_at(workers_of(process.pid)[0].pid)
                seen = len(events(directory, "step"))
                if kill:
                    wait_until(
                        lambda: len(events(directory, "step")) >= seen + 8,  # noqa: B023
                        "some steps",
                    )
                    process.send_signal(signal.SIGTERM) if seen else kill_tree(process.pid)
                process.wait(timeout=120)
            finally:
                kill_tree(process.pid)
                process.wait()
    ended = (directory / "attempts" / "0003.end.json").stat().st_mtime
    wall_s = ended - began
    found = timeline(read_catalog(LocalStore(directory)))
    assert found.wall_s == pytest.approx(wall_s, rel=0.01)
    assert sum(found.spent.values()) == pytest.approx(wall_s, rel=0.01), found.spent
    assert {
        "training",
        "redone",
        "lost",
        "waiting",
        "startup",
        "restore",
        "evaluation",
        "save",
        "data",
    } <= found.spent.keys()
    assert found.spent["redone"] > 0.05 and len(found.interruptions) == 2
    told = run(harness("report", home.url, "--json"), env=home.env())
    assert told.returncode == 0, told.stderr
    remote = json.loads(told.stdout)
    assert (
        sum(remote["spent"].values()) == pytest.approx(remote["wall_s"])
        and len(remote["stretches"]) == 3
    )


@pytest.mark.slow
def test_a_run_under_a_pipe_prints_no_control_characters(tmp_path: Path) -> None:
    done = run(torchrun(1, *TASK, f"run.dir={tmp_path}/run", "train.epochs=2"))
    assert done.returncode == 0, done.stderr
    assert "\r" not in done.stdout + done.stderr and "\x1b" not in done.stdout
