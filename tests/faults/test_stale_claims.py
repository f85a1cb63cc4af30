"""Starts from a listing that is not true any more, or that cannot be read: nothing is cut off,
deleted or trained twice by that."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import IO, cast

import pytest
import torch
from conftest import harness, torchrun, wait_until
from jobs import Job
from late_claims import LATE
from programs import HEAD
from remote_lives import Life, payload
from sealing import seal
from there import there

from harness import cli, retry
from harness.arguments import Settings
from harness.checkpoint import attempts, resume
from harness.checkpoint import format as fmt
from harness.checkpoint.catalog import read_catalog
from harness.checkpoint.commit import About, commit
from harness.checkpoint.replicate import replicate
from harness.distributed.ranks import World
from harness.errors import (
    EXIT_STOPPED,
    EXIT_STORAGE,
    EXIT_SUPERSEDED,
    EXIT_USAGE,
    OvertakenError,
    StorageError,
    SupersededError,
    UsageError,
)
from harness.saving.claim import claim
from harness.store import LocalStore
from harness.supervision import control_requests, launches
from harness.supervision.restart_messages import describe_end
from harness.supervision.restart_policy import outcome, verdict

Start = Callable[..., "subprocess.Popen[str]"]


def path_of(store: LocalStore, key: str) -> Path:
    return store.root / key


def tree(store: LocalStore) -> dict[str, bytes]:
    return {
        str(path.relative_to(store.root)): path.read_bytes()
        for path in store.root.rglob("*")
        if path.is_file()
    }


def make_newer(store: LocalStore, step: int, attempt: int = 1, version: int = 99) -> str:
    """The manifest of a checkpoint as a later version writes it; returns its key."""
    key = fmt.manifest_key(step, attempt)
    later = json.loads(path_of(store, key).read_bytes()) | {
        "format_version": version,
        "shards": {"of": "a later version"},
    }
    path_of(store, key).write_bytes(seal(later))
    return key


@pytest.fixture
def stores(tmp_path: Path) -> tuple[LocalStore, LocalStore]:
    return LocalStore(tmp_path / "run"), LocalStore(tmp_path / "other")


@pytest.fixture
def store(stores: tuple[LocalStore, LocalStore]) -> LocalStore:
    return stores[0]


def command(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    capsys.readouterr()
    code = cli.main(list(words))
    said = capsys.readouterr()
    return code, said.out + said.err


# --- a checkpoint of a newer format ---


def test_a_newer_format_at_the_head_refuses_a_start_in_whichever_store(stores, world: World):
    life = Life(*stores)
    for step in (10, 20, 30):
        life.copied(step)
    shutil.rmtree(path_of(stores[1], fmt.CHECKPOINTS))
    stores[1].prepare(fmt.FOLDERS)
    replicate(stores[0], there(read_catalog(stores[0]).head), stores[1], life.attempt)
    key = make_newer(stores[1], 30)
    for path in (path_of(stores[0], key), path_of(stores[0], fmt.data_key(30, 1))):
        path.unlink()
    before = tree(stores[0]), tree(stores[1])
    with pytest.raises(UsageError, match="format version 99") as error:
        resume.choose(stores, world)
    assert (
        error.value.exit_code == EXIT_USAGE
        and "Use a harness that reads format version 99" in str(error.value)
    )
    assert (tree(stores[0]), tree(stores[1])) == before


def test_a_newer_format_that_was_cut_off_is_in_nobodys_way(store, world: World, capsys):
    life = Life(store)
    for step in (10, 20):
        life.save(step)
    key = make_newer(store, 20)
    code, said = command(capsys, "rollback", str(store), "10")
    assert code == 0, said
    assert there(resume.choose(store, world).manifest).order == (2, 10)
    assert command(capsys, "prune", str(store), "--keep-last", "1", "--yes")[0] == 0
    assert path_of(store, key).exists() and path_of(store, fmt.data_key(20, 1)).exists(), (
        "what nobody here can read is nobody's to delete"
    )


def test_the_commands_say_what_a_newer_format_is_and_leave_it(store, capsys):
    life = Life(store)
    for step in (10, 20, 30, 40, 50):
        life.save(step, {"epochs": 30, "max_steps": None} if step == 40 else None)
    key = make_newer(store, 50)
    before = tree(store)
    for words, code in (
        ("status", EXIT_USAGE),
        ("ls", 0),
        ("verify", EXIT_USAGE),
        ("prune", EXIT_USAGE),
        ("show", EXIT_USAGE),
    ):
        found, said = command(capsys, words, str(store), *(["--yes"] if words == "prune" else []))
        assert found == code, (words, said)
        assert (
            "format version 99" in said
            and "DAMAGED" not in said
            and "next start resumes" not in said
        ), (words, said)
    code, said = command(capsys, "launch", f"run.dir={store}", "task.name=small_task:build")
    assert code == EXIT_USAGE and f"{key} has format version 99" in said
    assert tree(store) == before


def test_a_file_of_a_newer_format_than_its_manifest_says_refuses_a_start_and_is_not_set_aside(
    store, world: World, capsys
):
    life = Life(store)
    life.save(10)
    later = torch.load(path_of(store, fmt.data_key(10, 1)), weights_only=True) | {
        "step": 20,
        "format_version": fmt.READABLE[-1] + 1,
    }
    about = About(1, ((1, 10),), {"model": "Linear"}, "-")
    made = commit(
        store,
        life.attempt,
        payload(20) | {"config": {}},
        about,
        lambda sink: torch.save(later, cast("IO[bytes]", sink)),
    )
    assert made.format_version == 1
    before = tree(store)
    with pytest.raises(UsageError, match=f"format version {fmt.READABLE[-1] + 1}"):
        resume.choose(store, world)
    code, said = command(capsys, "verify", str(store))
    assert code == EXIT_USAGE and "NEWER" in said and "DAMAGED" not in said
    assert tree(store) == before


def test_fields_that_are_not_known_go_on_with_a_copy(stores):
    life = Life(*stores)
    manifest = life.save(10)
    text = seal(
        json.loads(path_of(stores[0], manifest.key).read_bytes())
        | {"surplus": [1], "more": {"x": None}}
    )
    path_of(stores[0], manifest.key).write_bytes(text)
    found = there(read_catalog(stores[0]).head)
    assert fmt.to_bytes(found) == text
    replicate(stores[0], found, stores[1], life.attempt)
    assert path_of(stores[1], manifest.key).read_bytes() == text
    assert read_catalog(*stores).copies(found) == list(stores)


# --- a claim from a listing that is not true any more ---


def test_who_claims_from_an_old_listing_leaves_to_be_started_again(store, world: World, capsys):
    job = Job("b", store)
    first = Life(store)
    first.save(20)
    seen = resume.choose(store, world)
    first.save(50)
    first.save(60)
    store.delete(fmt.manifest_key(20, 1))  # as retention does
    store.delete(fmt.data_key(20, 1))
    before = tree(store)
    job.begin()
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(launches.ENVIRONMENT, job.launch)
        with pytest.raises(
            OvertakenError, match="from step_00000020-0001 to step_00000060-0001"
        ) as error:
            claim((store,), seen, 1, Settings(), said.append)
    assert error.value.exit_code == EXIT_STOPPED and not said
    with pytest.raises(SupersededError):
        first.save(70)
    now = tree(store)
    assert before.items() <= now.items(), "the late one deletes and replaces nothing"
    job.end(code=0)
    found = read_catalog(store)
    assert "to be started again" in describe_end(found.ends[2])
    stands, failed = verdict(found, launches.read([store]), job.launch)
    assert (stands.exit_code, failed) == (EXIT_STOPPED, []), "that is no failure"
    assert not stands.is_leaving
    code, text = command(capsys, "status", str(store))
    assert (
        code == EXIT_STOPPED
        and "to be started again: the run has got from step_00000020-0001 to step_00000060-0001"
        in text
    )
    again = resume.choose(store, world)
    assert there(again.manifest).order == (1, 60)
    assert claim((store,), again, 1, Settings(), said.append).number == 3


@pytest.mark.slow
@pytest.mark.parametrize("how", ["launch", "torchrun"])
def test_of_two_starts_the_late_one_trains_on_and_the_first_one_ends(
    how: str, tmp_path: Path, started: Start
):
    program = tmp_path / "program.py"
    program.write_text(HEAD + LATE)
    run = tmp_path / "run"

    def words(restarts: int) -> list[str]:
        if how == "launch":
            return harness("launch", f"run.dir={run}", str(program), str(run))
        return [*torchrun(1, options=(f"--max-restarts={restarts}",))[:-1], str(program), str(run)]

    first = started(words(0))
    wait_until(lambda: list(run.glob("checkpoints/*.json")), "a checkpoint")
    late = started(words(1), env={"LATE": "1"})
    texts = [process.communicate(timeout=120) for process in (first, late)]
    assert late.returncode == 0, texts
    assert first.returncode == (EXIT_SUPERSEDED if how == "launch" else 1), texts
    found = read_catalog(LocalStore(run))
    assert there(found.head).final is not None and there(found.head).step == 80
    assert [found.ends[number]["why"] for number in (1, 2, 3)] == [
        "superseded",
        "stopped",
        "finished",
    ], texts
    assert found.attempts[3]["from"]["attempt"] == 1, "on from what the first one had come to"
    assert outcome(found).exit_code == 0


def test_who_is_overtaken_by_the_end_of_the_run_does_not_unfinish_it(store, world: World, capsys):
    first, late = Job("a", store).begin(), Job("b", store)
    life = first.attempt(20)
    seen = resume.choose(store, world)
    late.begin()
    life.save(30, {"epochs": 30, "max_steps": None})
    attempts.end(store, life.attempt, "finished", step=30)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(launches.ENVIRONMENT, late.launch)
        with pytest.raises(OvertakenError):
            claim((store,), seen, 1, Settings(), lambda text: None)
    found = read_catalog(store)
    assert outcome(found, launches.read([store])).exit_code == 0
    assert [
        verdict(found, launches.read([store]), job.launch)[0].exit_code for job in (first, late)
    ] == [0, 0]
    code, said = command(capsys, "launch", f"run.dir={store}", "task.name=small_task:build")
    assert code == 0 and "nothing to do" in said


# --- housekeeping ---


def test_what_cannot_be_tidied_up_is_said_and_training_begins(store, world: World, monkeypatch):
    life = Life(store)
    life.save(10)
    life.save(20)
    path_of(store, fmt.data_key(20, 1)).write_bytes(b"damaged")
    foreign = control_requests.leave(store, 1, "stop")
    stale = path_of(store, f"{fmt.CHECKPOINTS}/x.pt.tmp-0001-0123")
    stale.write_bytes(b"")
    swept = [
        path_of(store, f"{fmt.CHECKPOINTS}/y.pt.tmp-0001-0123"),
        path_of(store, control_requests.leave(store, 1, "save")),
    ]
    swept[0].write_bytes(b"")
    barred = {
        str(path_of(store, foreign)),
        str(stale),
        str(path_of(store, fmt.manifest_key(20, 1))),
        str(path_of(store, "config.yaml")),
    }

    def refuse(real, which):
        def call(*paths, **more):
            if str(paths[which]) in barred:
                raise PermissionError(errno.EPERM, "Operation not permitted", str(paths[which]))
            return real(*paths, **more)

        return call

    monkeypatch.setattr(os, "unlink", refuse(os.unlink, 0))
    monkeypatch.setattr(os, "rename", refuse(os.rename, 0))
    monkeypatch.setattr(os, "replace", refuse(os.replace, 1))
    said: list[str] = []
    resume_point = resume.choose(store, world)
    attempt = claim((store,), resume_point, 1, Settings(), said.append)
    assert attempt.number == 2 and there(resume_point.manifest).step == 10
    assert len(said) == 4 and all(line.startswith("harness: warning: ") for line in said), said
    assert not any(path.exists() for path in swept), "what can be tidied up is"
    assert control_requests.pending(store, 2) == {}


# --- what cannot be read is not damaged ---

AWAY = (errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.ENOMEM, errno.EACCES)


def failing(
    monkeypatch: pytest.MonkeyPatch,
    path: Path,
    number: int,
    times: float,
    at_first: Callable[[], object] = lambda: None,
) -> None:
    """Let the system refuse to read this file so many times."""
    monkeypatch.setattr(retry, "READ_AGAIN_S", (0.01, 0.01, 0.01))
    left, real_read, real_open = times, os.read, os.open

    def fail(where: str) -> None:
        nonlocal left
        if where == str(path) and left > 0:
            left -= 1
            at_first()
            raise OSError(number, os.strerror(number), where)

    def read(fd, size):
        fail(os.readlink(f"/proc/self/fd/{fd}"))
        return real_read(fd, size)

    def opened(where, flags, *rest, **more):
        if str(where).endswith(".json") and flags & os.O_ACCMODE == os.O_RDONLY:
            fail(str(where))
        return real_open(where, flags, *rest, **more)

    monkeypatch.setattr(os, "read", read)
    monkeypatch.setattr(os, "open", opened)


@pytest.fixture
def finished(store: LocalStore) -> LocalStore:
    life = Life(store)
    life.save(10)
    life.save(20, {"epochs": 1, "max_steps": None})
    return store


@pytest.mark.parametrize("number", AWAY, ids=errno.errorcode.get)
@pytest.mark.parametrize(
    "key", [fmt.data_key(20, 1), fmt.manifest_key(20, 1)], ids=["data", "manifest"]
)
def test_what_cannot_be_read_now_is_read_again_and_then_fails_the_start(
    finished, world: World, monkeypatch, number: int, key: str
):
    failing(monkeypatch, path_of(finished, key), number, 2)
    assert there(resume.choose(finished, world).manifest).step == 20
    failing(monkeypatch, path_of(finished, key), number, float("inf"))
    before = set(tree(finished))
    with pytest.raises(StorageError, match=os.strerror(number)) as error:
        resume.choose(finished, world)
    assert error.value.exit_code == EXIT_STORAGE
    assert set(tree(finished)) == before


def test_what_cannot_be_read_in_one_store_is_read_from_the_other(stores, world: World, monkeypatch):
    life = Life(*stores)
    life.copied(10)
    life.copied(20)
    failing(monkeypatch, path_of(stores[0], fmt.data_key(20, 1)), errno.EIO, float("inf"))
    resume_point = resume.choose(stores, world)
    assert there(resume_point.manifest).step == 20
    assert (resume_point.place, resume_point.damaged) == (1, [])


@pytest.mark.parametrize(
    "key", [fmt.data_key(20, 1), fmt.manifest_key(20, 1)], ids=["data", "manifest"]
)
def test_a_stale_handle_of_a_file_that_was_deleted_is_a_file_that_was_deleted(
    finished, world: World, monkeypatch, key: str
):
    def delete() -> None:
        for path in (
            path_of(finished, fmt.manifest_key(20, 1)),
            path_of(finished, fmt.data_key(20, 1)),
        ):
            path.unlink(missing_ok=True)

    failing(monkeypatch, path_of(finished, key), errno.ESTALE, 1, at_first=delete)
    resume_point = resume.choose(finished, world)
    assert (there(resume_point.manifest).step, resume_point.damaged) == (10, [])
