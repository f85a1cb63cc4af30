"""One contract for every store: a directory, fsspec's memory, and S3 on a real server pass the very
same tests.

What the medium holds is looked at from outside of the store under test: by the file system, by
fsspec, by a plain S3 client.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import io
import os
import secrets
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pytest
from blake3 import blake3
from fsspec.spec import AbstractFileSystem
from s3_server import S3Server, free_ports

from harness.checkpoint import attempts
from harness.checkpoint import format as fmt
from harness.checkpoint.catalog import read_catalog
from harness.errors import RefusedError, StorageError
from harness.store import SET_ASIDE, Entry, LocalStore, Store, folders, open_store, probe
from harness.store.remote import RemoteStore
from harness.store.s3_client import S3Client

MB = 1 << 20
FOLDERS = (*fmt.FOLDERS, probe.FOLDER, "checkpoints/deeper", "checkpoints2")
BAD_KEYS = (
    "",
    "/etc/passwd",
    "..",
    "../x",
    "a/../../x",
    "a/..",
    "./x",
    "a/./x",
    "a//x",
    "a/",
    "/",
    "a\0b",
    ".",
    "//",
)


@dataclass
class Place:
    """A store under test, and what can be seen of its medium from outside."""

    kind: str
    store: Store
    held: Callable[[], list[str]]  # everything there is, temporary files too
    uploads: Callable[[], list[str]]  # unfinished ones
    fill: Callable[[list[str]], object]  # one byte under each of these keys
    neighbour: Callable[[str], Store]  # a store beside this one, of another name


@pytest.fixture(scope="module")
def s3_place(s3_server: S3Server) -> Iterator[tuple[Place, Callable[[], None]]]:
    """One store for all tests, as opening one takes most of a second, and how to empty it."""
    bucket = s3_server.make_bucket(f"contract-{secrets.token_hex(6)}")
    client: Any = s3_server.client(max_pool_connections=16)

    def keys() -> list[str]:
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix="run/")
        return [
            found["Key"].removeprefix("run/")
            for page in pages
            for found in page.get("Contents", [])
        ]

    def uploads() -> list[str]:
        return [
            upload["Key"]
            for upload in client.list_multipart_uploads(Bucket=bucket).get("Uploads", [])
        ]

    def fill(wanted: list[str]) -> None:
        with ThreadPoolExecutor(8) as pool:
            list(
                pool.map(
                    lambda key: client.put_object(Bucket=bucket, Key=f"run/{key}", Body=b"x"),
                    wanted,
                )
            )

    def empty() -> None:
        names = [{"Key": f"run/{key}"} for key in keys()]
        for at in range(0, len(names), 1000):
            client.delete_objects(Bucket=bucket, Delete={"Objects": names[at : at + 1000]})

    with pytest.MonkeyPatch.context() as patch:
        s3_server.lend(patch)
        store = open_store(f"s3://{bucket}/run", 20)
        yield (
            Place(
                "s3",
                store,
                keys,
                uploads,
                fill,
                lambda name: open_store(f"s3://{bucket}/{name}", 20),
            ),
            empty,
        )


def local_place(root: Path) -> Place:
    store = LocalStore(root / "run")
    store.prepare(FOLDERS)

    def fill(wanted: list[str]) -> None:
        for key in wanted:
            (store.root / key).write_bytes(b"x")

    def neighbour(name: str) -> Store:
        other = LocalStore(root / name)
        other.prepare(FOLDERS)
        return other

    def keys() -> list[str]:
        return sorted(
            str(path.relative_to(store.root)) for path in store.root.rglob("*") if not path.is_dir()
        )

    return Place("local", store, keys, list, fill, neighbour)


def memory_place() -> Place:
    root = f"contract-{secrets.token_hex(6)}"
    medium = fsspec.filesystem("memory")

    def keys() -> list[str]:
        return sorted(path.removeprefix(f"/{root}/run/") for path in medium.find(f"/{root}/run"))

    def fill(wanted: list[str]) -> None:
        for key in wanted:
            medium.pipe_file(f"/{root}/run/{key}", b"x")

    def neighbour(name: str) -> Store:
        return open_store(f"memory://{root}/{name}", 20)

    return Place("memory", neighbour("run"), keys, list, fill, neighbour)


def without(patch: pytest.MonkeyPatch, *operations: str) -> None:
    """Let this process find a file system that supports none of these, as gcsfuse or vfat."""

    def refuses(code: int) -> Callable[..., Any]:
        def refuse(*arguments: Any, **more: Any) -> Any:
            raise OSError(code, os.strerror(code))

        return refuse

    def fsync(fd: int, does: Callable[[int], None] = os.fsync) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        does(fd)

    if "links" in operations:
        patch.setattr(os, "link", refuses(errno.EPERM))
    if "exclusive renames" in operations:
        patch.setattr(ctypes, "CDLL", lambda *arguments, **more: object())
    if "fsync of folders" in operations:
        patch.setattr(os, "fsync", fsync)


LACKING: dict[str, tuple[str, ...]] = {
    "local": (),
    "local without links": ("links", "fsync of folders"),
    "local without links and exclusive renames": ("links", "exclusive renames"),
}


@pytest.fixture(params=[*LACKING, "memory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    if request.param in LACKING:
        without(monkeypatch, *LACKING[request.param])
        return local_place(tmp_path)
    if request.param == "memory":
        return memory_place()
    place, empty = request.getfixturevalue("s3_place")
    empty()
    return place


@pytest.fixture
def store(place: Place) -> Store:
    return place.store


def upload(store: Store, key: str, data: bytes, piece: int) -> Any:
    """Write in pieces; returns the sink for what it counted."""
    with store.writer(key, 1) as sink:
        for at in range(0, len(data), piece):
            sink.write(data[at : at + piece])
        sink.commit()
    return sink


@contextlib.contextmanager
def switching_often() -> Iterator[None]:
    """Threads take turns as often as Python lets them."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


# --- keys ---


@pytest.mark.parametrize("key", BAD_KEYS, ids=repr)
def test_a_key_that_leads_out_is_refused_by_every_operation(place, key):
    store = place.store
    operations: list[Callable[[], object]] = [
        lambda: store.where(key),
        lambda: store.entries(key),
        lambda: store.exists(key),
        lambda: store.read(key),
        lambda: store.open(key),
        lambda: list(store.chunks(key)),
        lambda: upload(store, key, b"in", 1),
        lambda: store.write(key, b"in", 1),
        lambda: store.create(key, b"in", 1),
        lambda: store.delete(key),
        lambda: store.set_aside([key]),
    ]
    for operation in operations:
        with pytest.raises(StorageError, match="not a key"):
            operation()
    assert place.held() == []


def test_a_key_may_be_spelled_with_what_urls_escape(place):
    key = "checkpoints/ä b+c%41#d.json"
    place.store.write(key, b"odd", 1)
    assert place.store.entries("checkpoints") == [Entry(key, 3)]
    assert place.store.read(key) == b"odd" and place.store.exists(key)
    assert place.store.where(key).endswith(key)
    place.store.delete(key)
    assert place.held() == []


# --- listing ---


def test_entries_are_the_files_of_this_folder_alone_sorted_with_their_sizes(place):
    place.fill(["checkpoints/deeper/c", "checkpoints2/d", "attempts/e"])
    for key, data in (
        ("checkpoints/b.json", b"bb"),
        ("checkpoints/a.pt", b""),
        ("checkpoints/a-1", b"123"),
        ("checkpoints/B", b"x"),
    ):
        place.store.write(key, data, 1)
    assert place.store.entries("checkpoints") == [
        Entry("checkpoints/B", 1),
        Entry("checkpoints/a-1", 3),
        Entry("checkpoints/a.pt", 0),
        Entry("checkpoints/b.json", 2),
    ]
    assert place.store.entries("checkpoints/deeper") == [Entry("checkpoints/deeper/c", 1)]


def test_a_folder_that_is_empty_or_not_there_has_no_entries(store):
    assert store.entries("attempts") == []
    assert store.entries("nothing/here") == []


def test_more_entries_than_a_server_lists_at_once_are_all_there(place):
    keys = [f"checkpoints/{number:04d}" for number in range(1005)]
    place.fill(keys)
    assert place.store.entries("checkpoints") == [Entry(key, 1) for key in keys]


def test_what_is_listed_is_fresh(place):
    """Listings are cached by fsspec's file systems, for ever if they are let."""
    assert place.store.entries("attempts") == []
    place.fill(["attempts/0001.json"])
    assert [entry.key for entry in place.store.entries("attempts")] == ["attempts/0001.json"]
    assert place.store.exists("attempts/0001.json")
    place.store.delete("attempts/0001.json")
    assert place.store.entries("attempts") == []


def test_a_folder_is_no_file_and_a_file_no_folder(store):
    store.write("checkpoints/a", b"abc", 1)
    assert not store.exists("checkpoints")
    for operation in (store.read, store.open, lambda key: list(store.chunks(key))):
        with pytest.raises(FileNotFoundError):
            operation("checkpoints")
    with contextlib.suppress(StorageError):  # a directory says that a file is in the way
        assert store.entries("checkpoints/a") == []
    assert store.read("checkpoints/a") == b"abc"


def test_another_run_beside_this_one_is_not_seen(place):
    others = [place.neighbour(name) for name in ("run2", "ru", "run.old")]
    for other in others:
        other.write("checkpoints/theirs", b"theirs", 1)
    place.store.write("checkpoints/ours", b"ours", 1)
    assert [entry.key for entry in place.store.entries("checkpoints")] == ["checkpoints/ours"]
    assert not place.store.exists("checkpoints/theirs")
    place.store.delete("checkpoints/theirs")
    for other in others:
        assert [entry.key for entry in other.entries("checkpoints")] == ["checkpoints/theirs"]
        assert other.read("checkpoints/theirs") == b"theirs"
        other.delete("checkpoints/theirs")


# --- reading ---


def test_what_is_not_there_is_said_so_by_every_operation(place):
    store = place.store
    assert not store.exists("checkpoints/none")
    for operation in (store.read, store.open, lambda key: next(store.chunks(key))):
        with pytest.raises(FileNotFoundError):
            operation("checkpoints/none")
    store.delete("checkpoints/none")
    assert place.held() == []


def test_several_files_go_in_one_call_whether_they_are_there_or_not(place):
    keys = [f"checkpoints/step_00000001-0001/{rank:05d}.pt" for rank in range(20)]
    place.store.make_folder("checkpoints/step_00000001-0001")
    for key in (*keys[:-1], "checkpoints/stays"):
        place.store.write(key, b"data", 1)
    place.store.delete(*keys, "checkpoints/none")
    assert place.held() == ["checkpoints/stays"]


@pytest.mark.parametrize("size_bytes", [0, 1, 8 * MB, 9 * MB, 40 * MB + 7], ids=str)
def test_what_was_written_is_read_back_whole(place, size_bytes):
    data = os.urandom(size_bytes)
    sink = upload(place.store, "checkpoints/a.pt", data, 3 * MB + 1)
    assert (sink.size_bytes, sink.digest()) == (len(data), f"blake3:{blake3(data).hexdigest()}")
    assert place.store.entries("checkpoints") == [Entry("checkpoints/a.pt", size_bytes)]
    assert b"".join(place.store.chunks("checkpoints/a.pt")) == data
    assert place.store.exists("checkpoints/a.pt")
    assert place.store.read("checkpoints/a.pt") == data
    assert (place.held(), place.uploads()) == (["checkpoints/a.pt"], [])


def test_an_open_file_reads_from_anywhere_as_any_file_does(store):
    data = os.urandom(9 * MB)
    store.write("checkpoints/a.pt", data, 1)
    real = io.BytesIO(data)
    with store.open("checkpoints/a.pt") as file:
        for offset, whence, count in (
            *[
                (0, 0, 10),
                (5, 1, 300_000),
                (-22, 2, 100),
                (9 * MB - 3, 0, 3),
                (9 * MB, 0, 1),
                (10 * MB, 0, 1),
                (-4, 1, 0),
            ],
            *[(7, 0, 0), (8 * MB - 1, 0, 2), (1, 0, 8 * MB), (-1, 2, 1), (0, 2, 5), (3, 0, 1)],
        ):
            assert file.seek(offset, whence) == real.seek(offset, whence)
            assert file.read(count) == real.read(count)
            assert file.tell() == real.tell()
        file.seek(5)
        buffer = bytearray(70_000)
        assert file.readinto(buffer) == 70_000 and buffer == data[5:70_005]


def test_seeking_to_before_the_beginning_is_refused_and_spoils_nothing(store):
    store.write("checkpoints/a.pt", b"abc", 1)
    with store.with_retry_limit(20).open("checkpoints/a.pt") as file:
        with pytest.raises((OSError, ValueError)):
            file.seek(-22, io.SEEK_END)  # as who looks for the end of a zip archive does
        assert file.read() == b"abc"


# --- writing ---


@pytest.mark.parametrize("size_bytes", [10, 17 * MB], ids=["small", "large"])
def test_nothing_is_visible_before_the_commit_and_all_of_it_after(place, size_bytes):
    data = os.urandom(size_bytes)
    with place.store.writer("checkpoints/a.pt", 3) as sink:
        assert sink.write(data) == size_bytes
        assert not place.store.exists("checkpoints/a.pt")
        assert "checkpoints/a.pt" not in place.held()
        sink.commit()
        assert place.store.read("checkpoints/a.pt") == data
    assert place.store.read("checkpoints/a.pt") == data, "leaving takes nothing away"
    assert (place.held(), place.uploads()) == (["checkpoints/a.pt"], [])


@pytest.mark.parametrize("size_bytes", [10, 17 * MB], ids=["small", "large"])
@pytest.mark.parametrize(
    "way", ["exception", pytest.param("interrupt", marks=pytest.mark.slow), "without commit"]
)
def test_what_is_not_committed_leaves_nothing_and_keeps_what_was_there(place, size_bytes, way):
    place.store.write("checkpoints/a.pt", b"before", 1)
    raised = {"exception": ZeroDivisionError, "interrupt": KeyboardInterrupt}.get(way)
    with (
        pytest.raises(raised) if raised else contextlib.nullcontext(),
        place.store.writer("checkpoints/a.pt", 1) as sink,
    ):
        sink.write(os.urandom(size_bytes))
        if raised:
            raise raised
    assert place.store.read("checkpoints/a.pt") == b"before"
    assert (place.held(), place.uploads()) == (["checkpoints/a.pt"], [])


def test_a_buffer_may_be_used_again_after_it_was_written(store):
    buffer, expected = bytearray(5 * MB), b""
    with store.writer("checkpoints/a.pt", 1) as sink:
        for value in range(5):
            buffer[:] = bytes([value]) * len(buffer)
            sink.write(memoryview(buffer).cast("I"))
            expected += bytes(buffer)
        sink.commit()
    assert b"".join(store.chunks("checkpoints/a.pt")) == expected
    assert sink.digest() == f"blake3:{blake3(expected).hexdigest()}"


@pytest.mark.parametrize(
    "sizes",
    [(300, 3), (17 * MB, 3), pytest.param((17 * MB, 9 * MB, 3, 17 * MB), marks=pytest.mark.slow)],
    ids=str,
)
def test_writing_again_replaces_all_of_it(place, sizes):
    for size_bytes in sizes:
        data = os.urandom(size_bytes)
        place.store.write("checkpoints/a.pt", data, 1)
        assert place.store.read("checkpoints/a.pt") == data
    assert place.held() == ["checkpoints/a.pt"]


def test_a_reader_sees_the_old_file_or_the_new_one_while_it_is_replaced(store):
    versions = [bytes([k]) * 100_000 for k in range(2)]
    store.write("checkpoints/a.pt", versions[0], 1)
    done = threading.Event()

    def replace() -> None:
        for k in range(20):
            store.write("checkpoints/a.pt", versions[k % 2], 1)
        done.set()

    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(replace)
        seen = set()
        while not done.is_set() and not ended.done():
            seen.add(store.read("checkpoints/a.pt"))
        ended.result()
    assert seen and seen <= set(versions)


# --- exclusive ---


def test_creating_a_taken_key_fails_and_changes_nothing(place):
    store = place.store
    store.create("attempts/0001.json", b"first", 1)
    store.write("attempts/0002.json", b"written", 1)
    for key in ("attempts/0001.json", "attempts/0002.json"):
        with pytest.raises(FileExistsError):
            store.create(key, b"second", 1)
    assert (store.read("attempts/0001.json"), store.read("attempts/0002.json")) == (
        b"first",
        b"written",
    )
    assert place.held() == ["attempts/0001.json", "attempts/0002.json"]
    store.delete("attempts/0001.json")
    store.create("attempts/0001.json", b"third", 1)
    assert store.read("attempts/0001.json") == b"third"


def test_an_empty_file_is_created_exclusively_too(store):
    store.create("attempts/0001.json", b"", 1)
    with pytest.raises(FileExistsError):
        store.create("attempts/0001.json", b"x", 1)
    assert store.read("attempts/0001.json") == b""


def race(place: Place, rounds: int, rivals: int) -> None:
    """So many threads create one key, at once, in each round."""
    barrier, won = threading.Barrier(rivals), list[tuple[str, bytes]]()

    def rival(number: int) -> None:
        for key in (f"attempts/{number_of_round:04d}" for number_of_round in range(rounds)):
            barrier.wait()
            with contextlib.suppress(FileExistsError):
                place.store.create(key, b"%d" % number, 1)
                won.append((key, b"%d" % number))

    with (
        switching_often() if place.kind == "memory" else contextlib.nullcontext(),
        ThreadPoolExecutor(rivals) as pool,
    ):
        list(pool.map(rival, range(rivals)))
    assert sorted(key for key, _ in won) == [
        f"attempts/{number:04d}" for number in range(rounds)
    ], "each key was won once"
    assert all(place.store.read(key) == number for key, number in won), "no loser has overwritten"
    assert len(place.held()) == rounds


def test_of_many_rivals_for_one_key_exactly_one_wins(place):
    """The server has rivals for one key wait for one another in steps of a second, so there are not
    many of them here."""
    race(place, *{"local": (10, 16), "memory": (200, 16), "s3": (2, 5)}[place.kind])


@pytest.mark.slow
def test_of_sixteen_rivals_for_one_key_exactly_one_wins(place):
    race(place, 12, 16)


# --- taking away ---


def test_deleting_takes_this_key_alone_and_may_be_repeated(place):
    place.fill(["checkpoints/a", "checkpoints/ab", "checkpoints/a.json"])
    for _ in range(2):
        place.store.delete("checkpoints/a")
        assert place.held() == ["checkpoints/a.json", "checkpoints/ab"]


def checkpoint(store: Store, step: int) -> fmt.Manifest:
    """A committed checkpoint of attempt 1, with a few bytes for its data."""
    data = os.urandom(100)
    sink = upload(store, fmt.data_key(step, 1), data, 100)
    manifest = fmt.Manifest(
        run_id="r",
        attempt=1,
        step=step,
        epoch=0,
        loss=None,
        metrics={},
        world_size=1,
        lineage=((1, step),),
        files=(fmt.DataFile(f"{fmt.stem(step, 1)}.pt", sink.size_bytes, sink.digest()),),
        classes={},
        final=None,
        time="",
        host="",
        versions={},
        config_digest="",
    )
    store.create(manifest.key, fmt.to_bytes(manifest), 1)
    return manifest


def test_what_is_set_aside_is_no_longer_chosen_first_and_not_lost(place):
    old, new = checkpoint(place.store, 1), checkpoint(place.store, 2)
    keys = [new.key, fmt.data_key(2, 1)]
    before = {key: place.store.read(key) for key in keys}
    assert read_catalog(place.store).candidates == [new, old]
    for _ in range(2):  # a second attempt may find it damaged as well
        place.store.set_aside(keys)
        found = read_catalog(place.store)
        if place.kind == "local":  # renamed: no checkpoint any more, and its history ends before it
            assert (found.candidates, found.marked) == ([old], set())
            assert sorted(found.set_aside) == sorted(key + SET_ASIDE for key in keys)
            kept = {key: place.store.read(key + SET_ASIDE) for key in keys}
        else:  # marked: the last choice
            assert (found.candidates, found.set_aside, found.marked) == ([old, new], [], {new.key})
            kept = {key: place.store.read(key) for key in keys}
        assert kept == before
        assert found.greatest == 1 and found.orphans == [] and found.foreign == []


def test_a_file_system_that_creates_nothing_exclusively_is_refused_in_true_words(
    tmp_path, monkeypatch
):
    without(monkeypatch, "links", "exclusive renames")
    store = local_place(tmp_path).store

    def open_(path: Any, flags: int, *more: Any, does: Any = os.open) -> int:
        if flags & os.O_EXCL and str(path).endswith(".json"):
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return int(does(path, flags, *more))

    monkeypatch.setattr(os, "open", open_)
    with pytest.raises(StorageError, match="cannot create a file exclusively"):
        store.create("attempts/0001.json", b"{}", 1)
    assert store.entries("attempts") == []


def test_a_record_that_a_kill_left_torn_is_a_number_that_is_taken(tmp_path, monkeypatch):
    """Only where there is neither a link nor an exclusive rename: it is written under its name."""
    store = local_place(tmp_path).store
    first = attempts.claim(read_catalog(store), None, 1)
    (tmp_path / "run" / "attempts" / "0002.json").write_bytes(b'{"attempt": 2, "no')
    without(monkeypatch, "links", "exclusive renames")
    with pytest.raises(FileExistsError):
        store.create("attempts/0002.json", b"{}", 2)
    third = attempts.claim(read_catalog(store), None, 1)
    assert (first.number, third.number) == (1, 3) and attempts.holds(store, third)


def test_that_a_folder_cannot_be_made_durable_is_said_once(tmp_path, monkeypatch, capsys):
    without(monkeypatch, "fsync of folders")
    monkeypatch.setattr(folders, "_warned", set())
    store = local_place(tmp_path).store
    store.create("attempts/0001.json", b"{}", 1)
    store.delete("attempts/0001.json")
    said = capsys.readouterr().err
    assert said.count("harness: warning: ") == 1 and "cannot fsync a folder" in said


# --- trying out ---


def test_a_good_store_passes_the_probe_and_nothing_of_it_stays(place):
    place.fill(["attempts/0001.json"])
    probe.check(place.store)
    assert (place.held(), place.uploads()) == (["attempts/0001.json"], [])


class Overwriting(LocalStore):
    """Creates what exists already."""

    def create(self, key: str, data: bytes, attempt: int) -> None:
        self.write(key, data, attempt)


class Garbling(LocalStore):
    """Gives back other bytes."""

    def read(self, key: str) -> bytes:
        return super().read(key)[::-1]


class Blind(LocalStore):
    """Lists nothing."""

    def entries(self, folder: str) -> list[Entry]:
        return []


class Keeping(LocalStore):
    """Forgets to delete, once."""

    kept = False

    def delete(self, *keys: str) -> None:
        if self.kept:
            super().delete(*keys)
        self.kept = True


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Overwriting, "not create exclusively"),
        (Garbling, "other bytes"),
        (Blind, "does not list"),
        (Keeping, "still has"),
    ],
)
def test_a_store_that_breaks_the_contract_does_not_pass_the_probe(tmp_path, kind, said):
    store = kind(tmp_path / "run")
    store.prepare((probe.FOLDER,))
    with pytest.raises(StorageError, match=said) as caught:
        probe.check(store)
    assert isinstance(caught.value, RefusedError) == (kind is Overwriting)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [], (
        "nothing is left behind by a check that fails either"
    )


class LookingFirst(AbstractFileSystem):
    """Has no exclusive creation of its own, as fsspec's webhdfs and ftp have none."""

    protocol = "lookingfirst"

    def info(self, path: str, **more: Any) -> Any:
        raise AssertionError(f"{path} was asked for")


fsspec.register_implementation("lookingfirst", LookingFirst, clobber=True)


def test_a_file_system_that_looks_first_and_then_creates_is_refused_before_anything_is_asked():
    """Both of two rivals could find nothing; one after the other they would pass the probe."""
    store = open_store("lookingfirst://place/run", 1)
    with pytest.raises(RefusedError, match="LookingFirst, which looks first"):
        store.create("attempts/0001.json", b"{}", 1)


# --- unreachable is not empty ---


def questions(store: Store) -> dict[str, Callable[[], object]]:
    """All that may be asked of a store."""
    return {
        "entries": lambda: store.entries("checkpoints"),
        "exists": lambda: store.exists("checkpoints/a.pt"),
        "read": lambda: store.read("checkpoints/a.pt"),
        "open": lambda: store.open("checkpoints/a.pt"),
        "chunks": lambda: list(store.chunks("checkpoints/a.pt")),
        "write": lambda: store.write("checkpoints/a.pt", b"x", 1),
        "large write": lambda: upload(store, "checkpoints/a.pt", bytes(9 * MB), MB),
        "create": lambda: store.create("checkpoints/a.pt", b"x", 1),
        "delete": lambda: store.delete("checkpoints/a.pt"),
        "set_aside": lambda: store.set_aside(["checkpoints/a.pt"]),
        "survey": lambda: read_catalog(store),
        "probe": lambda: probe.check(store),
        "unfinished": lambda: store.unfinished(),  # type: ignore[attr-defined]
        "now": lambda: store.now(),  # type: ignore[attr-defined]
    }


def test_a_missing_bucket_is_refused_by_name_and_never_looks_empty(s3_place):
    store = open_store(f"s3://missing-{secrets.token_hex(6)}/run", 30)
    wrong = dict[str, str]()
    for name, ask in questions(store).items():
        try:
            wrong[name] = f"no error: {ask()!r}"
        except RefusedError as error:
            if (
                "there is no such bucket" not in str(error)
                or "Create the bucket" not in error.remedy
            ):
                wrong[name] = str(error)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the finding
            wrong[name] = repr(error)
    assert wrong == {}


class SilentListings(S3Client):
    """A server that lists nothing of a bucket that is not there, as some do, instead of saying
    so."""

    def _call(self, limit_s: float, method: str, **arguments: Any) -> dict[str, Any]:
        return {} if method == "list_objects_v2" else super()._call(limit_s, method, **arguments)


def test_a_missing_bucket_is_refused_also_where_listing_it_tells_nothing(s3_place):
    url = f"s3://missing-{secrets.token_hex(6)}/run"
    with pytest.raises(RefusedError, match="there is no such bucket"):
        RemoteStore(url, SilentListings(url), 30).entries("checkpoints")


def test_a_server_that_is_down_is_an_error_and_never_looks_empty(s3_place, monkeypatch):
    port = free_ports(1)[0]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    store = open_store("s3://bucket/run", 0.3)
    for name, ask in questions(store).items():
        with pytest.raises(StorageError, match=r"cannot .*s3://bucket/run") as caught:
            ask()
        assert not isinstance(caught.value, RefusedError), f"{name}: a server may come back"
        assert "Is the server up" in caught.value.remedy, name


def test_a_url_opens_the_store_of_its_kind(tmp_path, s3_place):
    for url in (str(tmp_path), f"file://{tmp_path}", f"local://{tmp_path}"):
        opened = open_store(url)
        assert isinstance(opened, LocalStore) and opened.root == tmp_path, (
            "fsspec would overwrite what is to be created"
        )
    for url in ("memory://a/b", "s3://bucket/a/b", "s3a://bucket/a"):
        assert isinstance(open_store(url), RemoteStore)
