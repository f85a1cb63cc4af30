"""A checkpoint is sent to the bucket from memory, while it is written to the disk: the bucket is
never ahead of the disk, nor wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from big_state import STOPPED, clamp_openly, trained, written
from conftest import wait_until
from fault_proxy import FaultProxy
from library_runs import checkpointer_of, steps_of, train
from remote_runs import Home
from s3_server import S3Server
from there import there

import harness
from harness.checkpoint import format as fmt
from harness.checkpoint.attempts import Attempt
from harness.checkpoint.catalog import read_catalog
from harness.checkpoint.format import Manifest
from harness.checkpoint.known import Known
from harness.checkpoint.replicate import send
from harness.checkpoint.retention import Policy
from harness.errors import DamagedError
from harness.monitoring.event_log import EventLog
from harness.monitoring.store_health import StoreHealth
from harness.saving.locations import listen
from harness.saving.upload_queue import EarlyUpload, Route, UploadQueue
from harness.saving.uploader import Uploader
from harness.store import LocalStore, open_store
from harness.store.staging_buffer import LENT_BYTES, StagingBuffer

MB = 1 << 20


@pytest.fixture
def home(bucket: tuple[S3Server, str], monkeypatch: pytest.MonkeyPatch) -> Home:
    found = Home(*bucket)
    for name, value in found.env().items():
        monkeypatch.setenv(name, value)
    return found


def check_like_the_directory(home: Home, directory: Path) -> None:
    """What is in the bucket is what is in the run directory, to the byte, and no upload is left
    open."""
    home.check_none_is_torn()
    for manifest in home.manifests():
        stem = f"checkpoints/step_{manifest['step']:08d}-0001"
        for ending in ("pt", "json"):
            assert home.read(f"{stem}.{ending}") == (directory / f"{stem}.{ending}").read_bytes()
    assert "Uploads" not in home.client.list_multipart_uploads(Bucket=home.bucket)


@pytest.mark.slow
def test_it_is_sent_while_it_is_written_and_appears_after_it(
    home: Home, tmp_path: Path, started: Callable[..., subprocess.Popen[str]]
) -> None:
    """The process that writes is stopped: all the data gets to the bucket, and nothing comes of it
    there."""
    options = f"remote={home.url!r}, save_every_s=None, save_every_steps=2, keep_last=99"
    with FaultProxy(home.server.host, home.server.port) as proxy:
        process = started(
            written(tmp_path, STOPPED, options=options), cwd=tmp_path, env=home.env(proxy)
        )

        def parts() -> list[int | None]:
            return [
                r.status
                for r in list(proxy.requests)
                if "step_00000004-0001.pt" in r.path and "partNumber" in r.query
            ]

        wait_until(
            lambda: len(parts()) == 7 and set(parts()) == {200},
            "all but the last part of 64 MB, which has to know that it is",
        )
        assert steps_of(tmp_path / "a") == [2]
        assert "step_00000004" not in " ".join(home.keys())
        (writer,) = [
            p
            for p in psutil.Process(process.pid).children()
            if "saving/writer_process.py" in " ".join(p.cmdline())
        ]
        writer.resume()
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, out + err
        assert len(parts()) == 8, "it was sent again"
    assert {4, 8} <= set(home.steps())
    check_like_the_directory(home, tmp_path / "a")


@pytest.mark.slow
@pytest.mark.usefixtures("process_as_it_was")
def test_what_is_dropped_here_does_not_appear_there(home: Home, tmp_path: Path) -> None:
    """From some step on the state changes while it is copied; that is known only when all of it may
    have been sent."""
    calls = iter(range(99))
    trained(
        tmp_path / "a",
        before=lambda model: clamp_openly(model) if next(calls) >= 4 else None,
        remote=home.url,
    )
    assert steps_of(tmp_path / "a") == [1, 2, 3, 5, 6, 7, 8]
    assert home.steps()[-1] == 8 and 4 not in home.steps()
    check_like_the_directory(home, tmp_path / "a")


@pytest.fixture
def committed(
    home: Home, tmp_path: Path, process_as_it_was: None
) -> tuple[LocalStore, Manifest, list[bytes]]:
    """A checkpoint in a run directory, and its bytes as they are lent."""
    trained(tmp_path / "a", steps=1)
    store = LocalStore(tmp_path / "a")
    (manifest,) = read_catalog(store).manifests
    data = store.read(manifest.data_key)
    assert len(data) > 2 * LENT_BYTES
    return store, manifest, [data[at : at + LENT_BYTES] for at in range(0, len(data), LENT_BYTES)]


@pytest.mark.parametrize("early", ["nothing", "a part", "everything"])
def test_the_rest_comes_from_the_file(committed, home: Home, early: str) -> None:
    store, manifest, pieces = committed
    lent = {"nothing": [], "a part": pieces[:1], "everything": pieces}[early]
    if early == "everything":
        os.unlink(store.path(manifest.data_key))
    assert (
        send(
            store,
            manifest.data_key,
            manifest.size_bytes,
            lent,
            lambda: manifest,
            open_store(home.url, 30),
            Attempt(1, manifest.run_id, ""),
        )
        == manifest
    )
    assert home.data(home.manifests()[0]) == b"".join(pieces)


@pytest.mark.parametrize("what", ["early bytes", "the file", "no manifest"])
def test_nothing_appears_that_is_not_what_the_manifest_says(
    committed, home: Home, what: str
) -> None:
    store, manifest, pieces = committed
    if what == "early bytes":
        pieces[0] = bytes([pieces[0][0] ^ 1]) + pieces[0][1:]
    if what == "the file":
        os.truncate(store.path(manifest.data_key), manifest.size_bytes - 1)
        pieces = pieces[:1]

    def told() -> Manifest | None:
        return None if what == "no manifest" else manifest

    target, attempt = open_store(home.url, 30), Attempt(1, manifest.run_id, "")
    if what == "no manifest":
        assert (
            send(store, manifest.data_key, manifest.size_bytes, pieces, told, target, attempt)
            is None
        )
    else:
        with pytest.raises(DamagedError, match="wrong size" if what == "the file" else "checksum"):
            send(store, manifest.data_key, manifest.size_bytes, pieces, told, target, attempt)
    assert home.keys() == []
    assert "Uploads" not in home.client.list_multipart_uploads(Bucket=home.bucket)


def test_one_that_is_never_committed_is_dropped_and_the_next_one_sent(
    committed, home: Home
) -> None:
    store, manifest, _ = committed
    route = Route(store, open_store(home.url, 30), Policy())
    uploader = Uploader(
        route,
        Attempt(1, manifest.run_id, ""),
        EventLog(store, "events/0001.jsonl", kept=True),
        StoreHealth(home.url, print),
    )
    uploader.start([], [], None, set(), Known())
    staging = StagingBuffer()
    staging.reserve(3 * LENT_BYTES)
    with uploader.ahead("checkpoints/step_00000099-0001.pt", staging.lend()):
        wait_until(
            lambda: "Uploads" in home.client.list_multipart_uploads(Bucket=home.bucket),
            "it is being sent",
        )
    uploader.offer(manifest)
    assert uploader.settle(60) == ""
    uploader.close(10)
    staging.close()
    assert home.steps() == [1]
    check_like_the_directory(home, Path(str(store)))


@pytest.mark.slow
def test_a_stalled_upload_is_given_up_although_the_store_answers_others(
    committed, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training thread asks for requests of users all the time."""
    store, manifest, _ = committed
    with FaultProxy(home.server.host, home.server.port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        remote = open_store(home.url, 30)
        health = listen((remote,), False)
        attempt = Attempt(1, manifest.run_id, "")
        events = EventLog(store, "events/0001.jsonl", kept=True)
        uploader = Uploader(Route(store, remote, Policy()), attempt, events, health)
        hold = proxy.hold("PUT", ".pt", count=None)
        uploader.start([manifest], [], None, set(), Known())
        assert hold.reached.wait(60)
        over = threading.Event()

        def ask() -> None:
            while not over.wait(0.1):
                remote.exists("requests/save")

        asking = threading.Thread(target=ask)
        asking.start()
        try:
            assert "does not answer" in uploader.settle(1)
        finally:
            over.set()
            asking.join()
            hold.release(forward=False)
            uploader.close(10)


class SlowDisk(LocalStore):
    """A run directory whose large files are read slowly, or no further than their first piece."""

    takes_s = 0.0
    goes_on = threading.Event()

    def chunks(self, key: str, start: int = 0) -> Iterator[bytes]:
        pieces = list(super().chunks(key, start))
        for piece in pieces:
            time.sleep(self.takes_s / len(pieces))
            yield piece
            self.goes_on.wait()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["slow", "stalled"])
@pytest.mark.parametrize("target", ["a bucket", "file://"])
def test_an_upload_that_makes_progress_is_waited_for_wherever_it_goes(
    committed, home: Home, tmp_path: Path, target: str, how: str
) -> None:
    """A directory as the remote store makes no requests that could succeed."""
    source, manifest, _ = committed
    store = SlowDisk(source.root)
    store.goes_on, store.takes_s = threading.Event(), 4.0
    if how == "slow":
        store.goes_on.set()
    remote = open_store(home.url if target == "a bucket" else f"file://{tmp_path}/there", 30)
    remote.prepare(fmt.FOLDERS)
    attempt = Attempt(1, manifest.run_id, "")
    events = EventLog(source, "events/0001.jsonl", kept=True)
    uploader = Uploader(
        Route(store, remote, Policy()), attempt, events, StoreHealth(str(remote), print)
    )
    uploader.start([manifest], [], None, set(), Known())
    problem = uploader.settle(1)
    assert (problem == "") == (how == "slow"), problem
    assert [m.step for m in read_catalog(remote).manifests] == ([1] if how == "slow" else [])
    store.goes_on.set()
    uploader.close(30)


@pytest.mark.usefixtures("process_as_it_was")
@pytest.mark.parametrize("old_is_wanted", [False, True])
def test_a_stop_does_not_wait_for_an_upload_that_is_overtaken(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old_is_wanted: bool
) -> None:
    """The server has one of its parts and does not answer; there may be time for one upload."""
    trained(tmp_path / "a", steps=3)
    store = LocalStore(tmp_path / "a")
    old, new, _ = read_catalog(store).manifests  # the last one of a run goes last in any case
    policy = Policy(best=0, every_steps=1 if old_is_wanted else None)
    with FaultProxy(home.server.host, home.server.port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        remote = open_store(home.url, 30)
        health = StoreHealth(home.url, print)
        attempt = Attempt(1, old.run_id, "")
        events = EventLog(store, "events/0001.jsonl", kept=True)
        uploader = Uploader(Route(store, remote, policy), attempt, events, health)
        part = proxy.hold("PUT", f"{old.name}.pt")
        manifest = proxy.hold("PUT", f"{new.name}.json", after=True)
        uploader.start([old], [], None, set(), Known())
        assert part.reached.wait(60)
        uploader.offer(new)
        settled = threading.Thread(
            target=uploader.settle, args=(60,), kwargs={"newest_first": True}
        )
        settled.start()
        assert manifest.reached.wait(15), "a request to a silent server times out after 20 s"
        assert home.steps() == [2]
        assert "Uploads" not in home.client.list_multipart_uploads(Bucket=home.bucket)
        manifest.release()
        settled.join(60)
        part.release(forward=False)
        uploader.close(10)
    assert home.steps() == ([1, 2] if old_is_wanted else [2])
    check_like_the_directory(home, tmp_path / "a")


@pytest.mark.usefixtures("process_as_it_was")
@pytest.mark.parametrize("how", ["left", "failed"])
def test_the_thread_ends_with_the_loop_once_it_has_sent_what_there_is(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """In a notebook, where the process goes on after a break or an error."""
    found: list[Any] = []
    with FaultProxy(home.server.host, home.server.port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        hold = proxy.hold("PUT", "step_00000004-0001.json")

        def each(run_: harness.Run) -> None:
            if run_.step == 5:
                assert hold.reached.wait(60)
                found.append(checkpointer_of(run_)._uploader)

        ends: dict[str, Any] = {"leave_at": 5} if how == "left" else {"fail_at": 6}
        with contextlib.suppress(ZeroDivisionError):
            train(tmp_path / "a", remote=home.url, each=each, **ends)
        (uploader,) = found
        assert uploader._thread.is_alive() and home.steps() == []
        hold.release()
        wait_until(lambda: not uploader._thread.is_alive(), "the thread has ended")
    assert home.steps() == [4] and not uploader.has_failed


@pytest.mark.usefixtures("process_as_it_was")
def test_the_last_checkpoint_is_sent_after_all_others_that_are_wanted(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With it the run counts as finished, and nobody would send the others. The server answers
    again once the last one is on the disk."""
    with FaultProxy(home.server.host, home.server.port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        hold = proxy.hold("PUT", "step_00000004-0001.json")

        def answer() -> None:
            wait_until(lambda: 12 in steps_of(tmp_path / "a"), "the last step is on the disk")
            hold.release()

        answering = threading.Thread(target=answer)
        answering.start()
        train(tmp_path / "a", remote=home.url, keep_every_steps=4)
        answering.join()
        manifests = [
            request.path.rpartition("/")[2]
            for request in list(proxy.requests)
            if request.method == "PUT" and "step_" in request.path and ".json" in request.path
        ]
    assert manifests == [f"step_{step:08d}-0001.json" for step in (4, 8, 12)]
    check_like_the_directory(home, tmp_path / "a")


@pytest.mark.parametrize("missing", ["nothing", "an overtaken one", "one that is kept"])
def test_the_last_checkpoint_waits_only_for_those_that_are_still_wanted_beside_it(
    committed, missing: str
) -> None:
    _, saved, _ = committed
    last = dataclasses.replace(saved, step=2, final={"epochs": 1, "max_steps": None})
    last = dataclasses.replace(last, files=(dataclasses.replace(saved.data, name="last.pt"),))
    policy = Policy(best=0, every_steps=1 if missing == "one that is kept" else None)
    queue = UploadQueue(policy, threading.Condition(), is_on=True)
    queue.begin([] if missing == "nothing" else [saved], [])
    staging, found = StagingBuffer(), list[EarlyUpload | None]()
    staging.reserve(1)
    taking = threading.Thread(target=lambda: found.append(queue.next()))
    with queue.ahead(last.data_key, staging.lend(), is_final=True):
        taking.start()
        taking.join(0.5)
        assert len(found) == (missing == "nothing"), "it is sent ahead if nothing else is missing"
        assert all(there(upload).size_bytes == 1 for upload in found), "as much as is lent"
        queue.add(last)
    taking.join(10)
    (first,) = [there(upload) for upload in found]
    if missing == "one that is kept":
        assert (first.key, first.size_bytes) == (saved.data_key, saved.size_bytes)
        queue.arrived(saved)
        first = there(queue.next())
    assert first.key == last.data_key
    queue.arrived(last)
    assert queue.next() is None
    staging.close()


def test_what_retention_deletes_before_it_was_sent_is_waited_for_by_nobody(committed) -> None:
    _, manifest, _ = committed
    queue = UploadQueue(Policy(), threading.Condition(), is_on=True)
    queue.add(manifest)
    early = queue.next()
    queue.forget([manifest.name])
    waiting = threading.Thread(
        target=queue.committed, args=(early, lambda manifest: None), daemon=True
    )
    waiting.start()
    waiting.join(5)
    assert not waiting.is_alive()


def test_what_is_lent_is_read_until_it_is_needed() -> None:
    staging, data = StagingBuffer(), os.urandom(2 * LENT_BYTES + 77)

    def fill() -> Iterator[bytes]:
        staging.reserve(len(data))
        assert staging.memory is not None
        staging.memory[: len(data)] = data
        return staging.lend().chunks()

    assert b"".join(fill()) == data
    for end in (lambda: staging.reserve(1), staging.close):
        reading = fill()
        assert next(reading) == data[:LENT_BYTES]
        end()
        assert list(reading) == []
