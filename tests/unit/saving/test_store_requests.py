"""What a start, a save and a stop ask of the stores: nothing whose answer is known."""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import wait_until
from library_runs import checkpointer_of, train
from store_requests import BUCKET, DIRECTORY, CountedBucket, Requests
from there import there

import harness
from harness.checkpoint import attempts, retention
from harness.checkpoint import format as fmt
from harness.checkpoint.attempts import Attempt
from harness.checkpoint.catalog import Catalog, going_on_from, read_catalog
from harness.checkpoint.commit import About, commit
from harness.checkpoint.known import Known
from harness.checkpoint.retention import Policy
from harness.cli import main
from harness.errors import SupersededError
from harness.monitoring import trackers
from harness.store import LocalStore, Store, open_store

COMMITS = 4
EVERYWHERE = pytest.mark.parametrize("where", ["directory", "both", "bucket"])
IN_PROCESS = pytest.mark.usefixtures("process_as_it_was")


class Place:
    """A run in a directory, in a bucket, or in both."""

    def __init__(self, root: Path, where: str) -> None:
        self.root, self.bucket = root, secrets.token_hex(6)
        self.directory = None if where == "bucket" else root
        self.remote = None if where == "directory" else f"counted://{self.bucket}/run"
        self.parts = [DIRECTORY] * (where != "bucket") + [BUCKET] * (where != "directory")

    def train(self, **options: Any) -> None:
        more = {"save_every_steps": 1, "keep_best": 0, "epochs": 30, "remote": self.remote}
        train(self.directory, **(more | options))  # type: ignore[arg-type]

    def settle(self, run_: harness.Run) -> None:
        """Wait until the last save is committed everywhere, and what it replaces is deleted."""
        parts = checkpointer_of(run_)
        kept = parts.settings.remote_policy.last
        wait_until(lambda: not parts.background.is_busy, "the save is committed")
        wait_until(lambda: not parts._uploader or not parts._uploader.pinned(), "it is uploaded")
        wait_until(lambda: self.files_in_bucket() <= kept, "the bucket has no more than is kept")

    def files_in_bucket(self) -> int:
        folder = f"/{self.bucket}/run/checkpoints/"
        return sum(
            key.startswith(folder) and key.endswith(".pt") for key in list(CountedBucket.store)
        )


@pytest.mark.slow
@IN_PROCESS
@EVERYWHERE
def test_a_start_reads_each_manifest_and_each_record_once(tmp_path, where):
    """It lists twice, once to choose and once after the claim, and reads only what is new then."""
    run, requests = Place(tmp_path / "a", where), Requests()
    for step in (3, 5, 7):
        run.train(leave_at=step, keep_last=5, each=run.settle)
    requests.begin(run.root)
    run.train(leave_at=9, keep_last=5, save_every_steps=None, each=lambda run_: requests.end())
    for part in run.parts:
        manifests = requests.of(part, "read", "checkpoints/", ".json")
        assert len(manifests) == 5 and set(manifests.values()) == {1}
        records = requests.of(part, "read", "attempts/")
        assert records.pop(fmt.attempt_key(4)) <= 2  # after the claim, and whether all ranks see it
        assert records == {fmt.attempt_key(number): 1 for number in (1, 2, 3)}
        # A directory is also searched for temporary files. An uploader looks for newer attempts.
        searches, looks = int(part == DIRECTORY), int(part == BUCKET)
        assert requests.of(part, "list", "checkpoints") == {"checkpoints": 2 + searches}
        assert requests.of(part, "list", "attempts")["attempts"] in (
            2 + searches,
            2 + searches + looks,
        )
        assert requests.of(part, "list", "events") == {"events": 1 + searches}


@pytest.mark.slow
@IN_PROCESS
@EVERYWHERE
def test_a_commit_reads_no_more_of_many_checkpoints_than_of_few(tmp_path, where):
    few, many = (of_commits(Place(tmp_path / str(kept), where), kept) for kept in (3, 30))
    for part in Place(tmp_path, where).parts:
        for requests in (few, many):
            assert requests.of(part, "read", "", ".json") == {}
            # The listings stay: others may have deleted checkpoints, or begun a newer attempt.
            assert requests.of(part, "list", "checkpoints") == {"checkpoints": COMMITS}
            assert requests.of(part, "list", "attempts")["attempts"] >= 3 * COMMITS
        for kind in ("read", "write"):
            asked = [
                found.by_folder(part, kind, "checkpoints", "attempts") for found in (few, many)
            ]
            assert asked[0] == asked[1], kind
        # The uploader looks for newer attempts, too, when it comes to it.
        listed = [found.of(part, "list", "attempts")["attempts"] for found in (few, many)]
        assert abs(listed[0] - listed[1]) <= COMMITS


def of_commits(run: Place, kept: int) -> Requests:
    """The requests of a few commits, each of which deletes a checkpoint."""
    requests, begin = Requests(), kept + 4

    def each(run_: harness.Run) -> None:
        run.settle(run_)
        if run_.step == begin:
            requests.begin(run.root)
        if run_.step == begin + COMMITS:
            requests.end()

    run.train(leave_at=begin + COMMITS, keep_last=kept, each=each)
    return requests


@IN_PROCESS
@EVERYWHERE
def test_the_end_of_an_attempt_is_written_once(tmp_path, where):
    run, requests = Place(tmp_path / "a", where), Requests()

    def each(run_: harness.Run) -> None:
        if run_.step == 5:
            requests.begin(run.root)
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit):
        run.train(each=each)
    requests.end()
    for part in run.parts:
        assert requests.of(part, "write", fmt.end_key(1)) == {fmt.end_key(1): 1}
        assert requests.of(part, "read", fmt.end_key(1)) == {}


@IN_PROCESS
def test_lives_of_a_single_upload_do_not_fill_the_bucket(tmp_path):
    """Each of them reads the resume point in the run directory, and none of the bucket."""
    run = Place(tmp_path / "a", "both")
    for step in range(2, 5):
        run.train(leave_at=step, keep_last=2, each=run.settle)
    found = read_catalog(open_store(there(run.remote)))
    assert found.greatest == 3 and [m.step for m in found.manifests] == [2, 3]


def killed_attempts(count: int, segments: int) -> Store:
    """A run in a bucket whose attempts have made steps, and no checkpoint."""
    bucket = open_store(f"counted://{secrets.token_hex(6)}/run")
    for number in range(1, count + 1):
        attempts.claim(read_catalog(bucket), None, 1)
        for at in range(segments):
            step = {"event": "step", "step": at + 1, "time": "", "loss": 1.0, "more": "x" * 4000}
            bucket.write(fmt.segment_key(number, at), f"{json.dumps(step)}\n".encode(), number)
    return bucket


def test_status_of_many_attempts_lists_once_and_reads_their_ends_together(
    tmp_path, monkeypatch, capsys
):
    bucket, requests = killed_attempts(16, 30), Requests()
    launch = {"launch": "7.0", "supervisor": "7"}
    for number in range(16):
        bucket.write(f"launches/{number}.0.json", json.dumps(launch).encode(), 0)
    # Each read waits until others are under way.
    together, does = threading.Barrier(4, timeout=20), CountedBucket.cat_file

    def cat_file(self: CountedBucket, path: str, *range_: Any, **more: Any) -> Any:
        if "/launches/" in path or "-000029." in path:
            together.wait()
        return does(self, path, *range_, **more)

    monkeypatch.setattr(CountedBucket, "cat_file", cat_file)
    requests.begin(tmp_path)
    try:
        assert main(["status", str(bucket)]) == 75
    finally:
        requests.end()
    assert requests.of(BUCKET, "list", "events") == {"events": 1}
    reads = requests.of(BUCKET, "read", "events/")
    assert len(reads) < 15 * 10 + 31, "the end of each, and all that is left of the newest"
    assert max(reads.values()) == 1
    assert "0–30" in capsys.readouterr().out


@pytest.mark.parametrize("names", [[], ["mute"]])
def test_trackers_are_told_only_of_attempts_of_which_something_is_left(
    tmp_path, names, monkeypatch
):
    bucket, requests, told = killed_attempts(5, 3), Requests(), dict[int, Any]()

    def mute(store: Store, run_id: str, before: Callable[[int], Any]) -> Any:
        told.update(before(2))

    monkeypatch.setitem(trackers.MAKERS, "mute", mute)
    catalog = read_catalog(bucket)
    requests.begin(tmp_path)
    trackers.Trackers(names, catalog, "run", 2, print)
    requests.end()
    segments = [fmt.segment_key(5, at) for at in range(3)] if names else []
    assert sorted(requests.of(BUCKET, "read", "events/")) == segments
    assert requests.of(BUCKET, "list") == ({"events": 1} if names else {})
    assert list(told) == ([2] if names else [])


def test_a_curve_that_takes_too_long_to_read_is_told_in_part_and_that_is_said(monkeypatch):
    bucket, said = open_store(f"counted://{secrets.token_hex(6)}/run"), list[str]()
    for number in (1, 2, 3):
        attempt = attempts.claim(found := read_catalog(bucket), found.head, 1)
        saved(bucket, attempt, number * 10)
        line = json.dumps({"event": "step", "step": number * 10, "loss": 1.0})
        bucket.write(fmt.segment_key(number, 0), line.encode(), number)
    catalog = read_catalog(bucket)
    assert list(trackers.history(catalog, 30, 0, said.append)) == [10, 20, 30] and not said
    monkeypatch.setattr(trackers, "AT_ONCE", 1)
    monkeypatch.setattr(trackers, "READ_S", -1.0)
    assert list(trackers.history(catalog, 30, 0, said.append)) == [30], "the newest always"
    assert len(said) == 1 and "the curve up to step 20 is not told again" in said[0]


def lacks(bucket: Store, *names: str) -> None:
    """The bucket has not got these checkpoints."""
    for name in names:
        bucket.delete(f"checkpoints/{name}.json")
        bucket.delete(f"checkpoints/{name}.pt")


@IN_PROCESS
@pytest.mark.parametrize("damaged", [False, True], ids=["all whole", "one damaged here"])
def test_the_next_start_of_a_finished_run_uploads_all_that_its_end_would_have(
    tmp_path, capfd, damaged
):
    """The newest, every fourth and the best; not step 7, which was overtaken."""
    options: dict[str, Any] = {
        "remote": f"counted://{secrets.token_hex(6)}/run",
        "save_every_steps": 1,
        "keep_last": 99,
        "keep_every_steps": 4,
    }
    train(tmp_path / "a", **options)
    bucket = open_store(options["remote"])
    names = [f"step_{step:08d}-0001" for step in (4, 7, 8, 12)]
    lacks(bucket, *names)
    if damaged:
        (tmp_path / "a" / "checkpoints" / f"{names[2]}.pt").write_bytes(b"cut")
    capfd.readouterr()
    train(tmp_path / "a", **options)
    expected = {4, 12} | ({8} if not damaged else set())
    assert expected <= {m.step for m in read_catalog(bucket).manifests} <= expected | {
        1, 2, 3, 5, 6, 9, 10, 11
    }  # fmt: skip
    said = capfd.readouterr().out
    assert "were missing in" in said and "step_00000012-0001" in said
    assert (f"{names[2]} is not in {bucket}" in said) == damaged
    train(tmp_path / "a", **options)
    assert ("nothing to do" in capfd.readouterr().out) != damaged


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    store = LocalStore(tmp_path / "run")
    store.prepare(fmt.FOLDERS)
    return store


def saved(store: Store, attempt: Attempt, *steps: int) -> set[str]:
    """Commit these steps; returns their names."""
    origin = next((m for m in read_catalog(store).history if m.attempt != attempt.number), None)
    about, names = About(1, going_on_from(origin), {}, "-"), set()
    for step in steps:
        content: dict[str, Any] = {
            "step": step,
            "epoch": 0,
            "loss": None,
            "metrics": {},
            "w": torch.zeros(1),
        }
        names.add(commit(store, attempt, content, about).name)
    return names


def begun(store: LocalStore) -> Attempt:
    found = read_catalog(store)
    return attempts.claim(found, found.head, 1)


def told(found: Catalog) -> dict[str, Any]:
    """What a catalog says, to be compared."""
    fields = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
    return fields | {"parts": len(found.parts), "newer": list(found.newer)}


def torn(store: LocalStore, key: str) -> None:
    path = store.path(key)
    path.write_bytes(path.read_bytes()[:-20])


def of_newer_format(store: LocalStore) -> None:
    manifest = read_catalog(store).manifests[-1]
    new = dataclasses.replace(manifest, step=99, format_version=9, lineage=((1, 99),))
    store.path(fmt.manifest_key(99, 1)).write_bytes(fmt.to_bytes(new))


CHANGES: dict[str, Callable[[LocalStore], object]] = {
    "a deletion": lambda store: store.delete(fmt.manifest_key(20, 1)),
    "a checkpoint that is set aside": lambda store: store.set_aside([fmt.manifest_key(30, 1)]),
    "a mark": lambda store: store.path(fmt.manifest_key(20, 1) + ".damaged").touch(),
    "a newer attempt": begun,
    "its checkpoint": lambda store: saved(store, begun(store), 31),
    "an end": lambda store: attempts.end(store, Attempt(1, "", ""), "stopped", saved_step=30),
    "a record that is deleted": lambda store: store.delete(fmt.attempt_key(1)),
    "a newer format": of_newer_format,
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_changes_beside_this_process_is_seen(store, what):
    saved(store, begun(store), 10, 20, 30)
    known = Known()
    before = told(read_catalog(store, known=[known]))
    CHANGES[what](store)
    after = told(read_catalog(store, known=[known]))
    assert after == told(read_catalog(store)) and after != before


def test_what_was_torn_is_read_again_once_it_is_whole(store):
    saved(store, begun(store), 10, 20)
    whole = {key: store.read(key) for key in (fmt.manifest_key(20, 1), fmt.attempt_key(1))}
    known = Known()
    for key in whole:
        torn(store, key)
    found = read_catalog(store, known=[known])
    assert list(found.damaged) == [fmt.manifest_key(20, 1)] and found.attempts == {1: {}}
    for key, content in whole.items():
        store.path(key).write_bytes(content)
    found = read_catalog(store, known=[known])
    assert [m.step for m in found.manifests] == [10, 20] and not found.damaged
    assert found.attempts == {1: json.loads(whole[fmt.attempt_key(1)])}


def test_a_record_that_came_damaged_from_a_bucket_is_read_again():
    bucket, key, known = open_store(f"counted://{secrets.token_hex(6)}/run"), "0001.json", Known()
    bucket.write(f"attempts/{key}", b'{"attempt": 1, "no', 1)
    assert read_catalog(bucket, known=[known]).attempts == {1: {}}
    bucket.write(f"attempts/{key}", b'{"attempt": 1}', 1)
    assert read_catalog(bucket, known=[known]).attempts == {1: {"attempt": 1}}


def test_what_others_deleted_does_not_count_towards_what_is_kept(store):
    attempt, known = begun(store), Known()
    verified = saved(store, attempt, 10, 20, 30, 40)
    read_catalog(store, known=[known])
    for step in (30, 40):
        store.delete(fmt.manifest_key(step, 1))
    assert retention.apply(store, attempt, verified, Policy(last=2, best=0), (), known) == []
    assert [m.step for m in read_catalog(store).manifests] == [10, 20]


def test_who_knows_all_checkpoints_still_sees_a_newer_attempt_before_a_delete(store):
    attempt, known = begun(store), Known()
    verified = saved(store, attempt, 10, 20, 30)
    read_catalog(store, known=[known])
    begun(store)
    with pytest.raises(SupersededError):
        retention.apply(store, attempt, verified, Policy(last=2, best=0), (), known)
    assert [m.step for m in read_catalog(store).manifests] == [10, 20, 30]
