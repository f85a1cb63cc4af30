"""Asked through its store, a living run saves, or saves and stops; what was asked of one attempt
never reaches another."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from comparing import differing, losses
from conftest import events, wait_until
from remote_lives import Born, Life, shared_nursery

from harness import cli
from harness.checkpoint import attempts
from harness.checkpoint import format as fmt
from harness.errors import StorageError
from harness.store import LocalStore, Store, open_store
from harness.supervision import control_requests

TASK = [
    "task.name=small_task:build",
    "train.epochs=20",
    "log.every_steps=1",
    "checkpoint.every_s=null",
    "resume.accept=[config]",
]
# A hundred steps: long enough to be asked in between, also by whoever is late.
SLOW = "task.args.sleep_s=0.2"
Cli = Callable[..., tuple[int, str]]


@pytest.fixture(params=["directory", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    place = open_store(
        str(tmp_path / "run")
        if request.param == "directory"
        else f"memory://{secrets.token_hex(8)}/run",
        5,
    )
    place.prepare(fmt.FOLDERS)
    return place


@pytest.fixture
def harness(capsys: pytest.CaptureFixture[str]) -> Cli:
    """The program's command line in this process: exit code, and all that it printed."""

    def call(*arguments: object) -> tuple[int, str]:
        capsys.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return code, said.out + said.err

    return call


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Callable[..., Born]]:
    """Begin to train in a process of its own."""
    nursery = shared_nursery()

    def begin(*settings: str) -> Born:
        return nursery.bear(
            "train",
            {},
            tmp_path / f"log-{time.monotonic_ns()}",
            [*TASK, f"run.dir={tmp_path}/run", *settings],
        )

    yield begin
    nursery.end_all()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole")
    born = shared_nursery().bear(
        "train", {}, directory / "log", [*TASK, f"run.dir={directory}/run"]
    )
    assert born.wait() == 0, born.text
    return directory / "run"


def trains(born: Born, directory: Path, steps: int = 1) -> None:
    """Wait until it has made so many more steps."""
    seen = len(events(directory, "step"))
    wait_until(
        lambda: len(events(directory, "step")) >= seen + steps or born.code is not None,
        f"{steps} steps",
        every_s=0.01,
    )
    assert born.code is None, born.text


def end_of(directory: Path, attempt: int) -> dict:
    return json.loads((directory / fmt.end_key(attempt)).read_text())


def saved(directory: Path) -> list[str]:
    return sorted(path.stem for path in directory.glob("checkpoints/*.json"))


# --- requests in a store ---


def test_a_request_is_seen_by_the_attempt_that_it_names_and_by_no_other(store):
    assert control_requests.pending(store, 3) == {}
    stop, save = control_requests.leave(store, 3, "stop"), control_requests.leave(store, 3, "save")
    again, other = (
        control_requests.leave(store, 3, "save"),
        control_requests.leave(store, 30, "stop"),
    )
    assert control_requests.pending(store, 3) == {stop: "stop", save: "save", again: "save"}
    assert control_requests.pending(store, 30) == {other: "stop"}
    assert [control_requests.pending(store, number) for number in (0, 1, 4, 33, 300)] == [{}] * 5
    assert len({stop, save, again, other}) == 4


def test_what_earlier_attempts_were_asked_for_is_swept_and_nothing_else(store):
    old, new, later = (control_requests.leave(store, number, "stop") for number in (3, 4, 12345))
    control_requests.sweep([store], 4)
    assert control_requests.pending(store, 3) == {}
    assert control_requests.pending(store, 4) == {new: "stop"} and control_requests.pending(
        store, 12345
    ) == {later: "stop"}
    assert not store.exists(old)
    control_requests.sweep([store], 4)


def test_what_is_no_request_is_neither_obeyed_nor_swept(tmp_path):
    store = LocalStore(tmp_path)
    store.prepare((control_requests.REQUESTS,))
    names = [
        "0003.stop",
        "0003.stop.json",
        "0003.halt-0a.json",
        "3.stop-0a.json",
        "0003.stop-0a.json.bak",
        "0003.stop-0a.json.tmp-0003-0a",
        "x",
    ]
    for name in names:
        store.path(f"requests/{name}").write_text("{}")
    assert control_requests.pending(store, 3) == {}
    control_requests.sweep([store], 99)
    assert sorted(os.listdir(tmp_path / "requests")) == sorted(names)


def test_a_store_that_cannot_be_listed_is_no_answer(tmp_path):
    store = LocalStore(tmp_path)
    (tmp_path / "requests").write_text("in the way")
    with pytest.raises(StorageError):
        control_requests.pending(store, 1)
    with pytest.raises(StorageError):
        control_requests.leave(store, 1, "stop")


# --- whom a request can be left for ---


@pytest.mark.parametrize("command", ["stop", "save"])
def test_where_nothing_trains_nothing_is_asked_and_it_is_said_in_words(command, tmp_path, harness):
    store = LocalStore(tmp_path / "run")
    code, said = harness(command, tmp_path / "run")
    assert code == 78 and "there is no run" in said
    store.prepare(fmt.FOLDERS)
    life = Life(store)
    life.save(10)
    attempts.end(store, life.attempt, "finished", step=10)
    code, said = harness(command, tmp_path / "run")
    assert (
        code == 78
        and "attempt 1 has ended" in said
        and "nothing trains" in said
        and "Traceback" not in said
    )
    assert not (tmp_path / "run" / "requests").exists()


def test_the_newest_attempt_is_asked_in_the_store_that_all_its_nodes_see(tmp_path, harness):
    directory, remote = (
        LocalStore(tmp_path / "run"),
        open_store(f"memory://{secrets.token_hex(8)}/run", 5),
    )
    Life(directory, remote)
    Life(directory, remote)
    assert harness("stop", tmp_path / "run")[0] == 0
    assert set(control_requests.pending(remote, 2).values()) == {"stop"}
    assert (
        control_requests.pending(remote, 1) == {} and control_requests.pending(directory, 2) == {}
    )
    assert harness("save", str(remote))[0] == 0
    assert sorted(control_requests.pending(remote, 2).values()) == ["save", "stop"]


# --- real runs ---


def test_a_run_saves_when_it_is_asked_to_and_stops_saved_when_it_is_asked_to(
    whole, tmp_path, live, harness
):
    directory = tmp_path / "run"
    born = live(SLOW)
    trains(born, directory)
    assert saved(directory) == []

    asked_at = time.monotonic()
    code, said = harness("save", directory)
    assert code == 0 and "attempt 1" in said and "asked to save" in said
    wait_until(lambda: saved(directory), "a checkpoint")
    assert time.monotonic() - asked_at < 15, "at the end of the run, which takes 20"
    trains(born, directory, 3)
    assert len(saved(directory)) == 1, "one request, one checkpoint"
    assert harness("status", directory)[1].count("running") == 1

    assert harness("stop", directory)[0] == 0
    assert born.wait() == 0, born.text
    assert "stopped by harness stop" in born.text
    end = end_of(directory, 1)
    assert (end["why"], end["by"], end["signals"], end["saved"]) == (
        "stopped",
        "harness stop",
        [],
        True,
    )
    assert end["step"] == end["saved_step"] == max(losses(directory)) < 100
    assert len(saved(directory)) == 2
    assert harness("stop", directory)[0] == 78, "it has ended"

    before = len(list(directory.glob("requests/*")))
    assert before == 2
    born = live()
    assert born.wait() == 0, born.text
    assert list(directory.glob("requests/*")) == [], "swept: they were asked of the first attempt"
    assert end_of(directory, 2)["why"] == "finished"
    assert losses(directory) == losses(whole)
    assert differing(whole, directory) == []


@pytest.mark.slow
def test_what_one_attempt_was_asked_never_stops_a_later_one(tmp_path, live, harness):
    directory = tmp_path / "run"
    born = live(SLOW, "checkpoint.every_steps=1")
    trains(born, directory, 2)
    os.kill(born.pid, signal.SIGSTOP)
    assert harness("stop", directory)[0] == 0
    born.kill()
    born = live("train.epochs=6", "task.args.sleep_s=0.12")
    trains(born, directory)
    # As a store shows it that is late to list, or a person who asks of what is gone: it is there
    # while the second attempt trains.
    late = control_requests.leave(LocalStore(directory), 1, "stop")
    future = control_requests.leave(LocalStore(directory), 3, "stop")
    assert born.wait() == 0, born.text
    assert end_of(directory, 2)["why"] == "finished"
    assert {Path(late).name, Path(future).name} == set(os.listdir(directory / "requests"))


@pytest.mark.parametrize("ask", ["directory", "url"])
def test_a_run_with_two_stores_obeys_what_is_asked_in_either(ask, tmp_path, live, harness):
    directory, remote = tmp_path / "run", tmp_path / "remote"
    born = live(SLOW, f"run.remote=file://{remote}")
    trains(born, directory)
    assert harness("stop", directory if ask == "directory" else f"file://{remote}")[0] == 0
    assert born.wait() == 0, born.text
    for place in (directory, remote):
        assert end_of(place, 1)["by"] == "harness stop"
        assert saved(place) == [f"step_{end_of(place, 1)['step']:08d}-0001"]


def test_a_run_without_a_directory_obeys_too(tmp_path, live, harness):
    remote = tmp_path / "remote"
    born = live(SLOW, "run.dir=null", f"run.remote=file://{remote}")
    wait_until(lambda: events(remote, "step") or born.code is not None, "a step")
    assert harness("save", f"file://{remote}")[0] == 0
    wait_until(lambda: saved(remote), "a checkpoint")
    assert harness("stop", f"file://{remote}")[0] == 0
    assert born.wait() == 0, born.text
    assert (end_of(remote, 1)["by"], end_of(remote, 1)["saved"]) == ("harness stop", True)


def test_a_folder_of_requests_that_vanishes_or_is_unreadable_stops_nobody(tmp_path, live, harness):
    directory = tmp_path / "run"
    born = live(SLOW)
    trains(born, directory)
    harness("save", directory)
    wait_until(lambda: saved(directory), "a checkpoint")
    shutil.rmtree(directory / "requests")
    (directory / "requests").write_text("in the way")
    trains(born, directory, 6)
    (directory / "requests").unlink()
    assert harness("stop", directory)[0] == 0
    assert born.wait() == 0, born.text
    assert end_of(directory, 1)["by"] == "harness stop"


def test_a_signal_and_a_request_together_are_one_stop(tmp_path, live, harness):
    directory = tmp_path / "run"
    born = live("task.args.sleep_from=2", "task.args.sleep_s=2.5")
    trains(born, directory)
    born.stop()  # or it might obey the requests before the signal comes
    assert harness("stop", directory)[0] == 0
    assert harness("stop", directory)[0] == 0
    os.kill(born.pid, signal.SIGTERM)
    born.wake()
    assert born.wait() == 0, born.text
    end = end_of(directory, 1)
    assert (end["why"], end["saved"]) == ("stopped", True)
    assert end["signals"] == ["SIGTERM"]
    assert len(list(directory.glob("attempts/*"))) == 2
