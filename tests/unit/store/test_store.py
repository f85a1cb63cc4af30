"""The contract of a store, on real file systems: whole or not at all, exclusive, durable, named
errors, nothing outside the root."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from botocore.exceptions import ClientError
from conftest import ENVIRONMENT
from there import there

from harness.errors import RefusedError, StorageError
from harness.store import TEMP, Entry, LocalStore, s3_client
from harness.store.explain import explained
from harness.store.remote import RemoteStore
from harness.store.remote_sink import RemoteSink
from harness.store.s3_client import S3Client

NOBODY = 65534
FOLDERS = ("checkpoints", "attempts")


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    store = LocalStore(tmp_path / "run")
    store.prepare(FOLDERS)
    return store


def names(store: LocalStore) -> list[str]:
    return sorted(
        str(path.relative_to(store.root)) for path in store.root.rglob("*") if not path.is_dir()
    )


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Whoever runs the tests: here permissions apply."""
    if os.geteuid() != 0:
        yield
        return
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that everybody may pass through; pytest's own belong to their user alone."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a real file system of its own with the given options."""
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        place = tmp_path / f"disk{len(mounted)}"
        place.mkdir()
        tried = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)],
            capture_output=True,
            text=True,
        )
        if tried.returncode != 0:
            pytest.skip(f"cannot mount here: {tried.stderr.strip()}")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", str(place)], check=True)


# --- whole or not at all ---


def test_what_is_written_is_read_back_with_its_size_and_digest(store):
    data = os.urandom(100_000)
    with store.writer("checkpoints/a.pt", 1) as sink:
        for at in range(0, len(data), 7_001):
            assert sink.write(data[at : at + 7_001]) == len(data[at : at + 7_001])
        sink.commit()
    assert store.read("checkpoints/a.pt") == data
    assert sink.size_bytes == len(data)
    assert sink.digest() == f"blake3:{blake3(data).hexdigest()}"
    assert store.entries("checkpoints") == [Entry("checkpoints/a.pt", len(data))]


def test_nothing_appears_under_its_key_before_the_commit(store):
    with store.writer("checkpoints/a.pt", 3) as sink:
        sink.write(b"half")
        assert not store.exists("checkpoints/a.pt")
        temps = [entry.key for entry in store.entries("checkpoints")]
        assert len(temps) == 1 and int(there(TEMP.match(temps[0]))["attempt"]) == 3
        assert store.path(temps[0]).parent == store.path("checkpoints/a.pt").parent, (
            "a rename across devices is not atomic"
        )
    assert names(store) == []


def test_an_exception_on_the_way_leaves_nothing_behind_and_is_not_hidden(store):
    store.write("checkpoints/a.pt", b"before", 1)
    with pytest.raises(ZeroDivisionError), store.writer("checkpoints/a.pt", 1) as sink:
        sink.write(b"half")
        raise ZeroDivisionError
    assert names(store) == ["checkpoints/a.pt"]
    assert store.read("checkpoints/a.pt") == b"before"


def test_a_reader_sees_the_old_file_or_the_new_one_while_it_is_replaced(store):
    versions = [bytes([k]) * 300_000 for k in range(2)]
    store.write("checkpoints/a.pt", versions[0], 1)
    done = threading.Event()

    def replace() -> None:
        for k in range(60):
            store.write("checkpoints/a.pt", versions[k % 2], 1)
        done.set()

    writer = threading.Thread(target=replace)
    writer.start()
    seen = set()
    while not done.is_set():
        seen.add(store.read("checkpoints/a.pt"))
    writer.join()
    assert seen <= set(versions)
    assert names(store) == ["checkpoints/a.pt"]


def test_a_file_that_is_open_stays_whole_while_it_is_replaced_and_deleted(store):
    store.write("checkpoints/a.pt", b"a" * 10, 1)
    with store.open("checkpoints/a.pt") as file:
        store.write("checkpoints/a.pt", b"b" * 10, 1)
        store.delete("checkpoints/a.pt")
        assert file.read() == b"a" * 10


# --- exclusive ---

RACE = """
import os, sys
from harness.store import LocalStore
store, go = LocalStore(sys.argv[1]), os.pipe()
rivals = []
for rival in range(8):
    answers = os.pipe()
    if os.fork() == 0:
        os.close(go[1])
        os.read(go[0], 1)  # returns for all at once, when the parent closes its end
        won = []
        for key in range(25):
            try:
                store.create(f"attempts/{key}", f"{rival} {key}".encode() * 1000, 1)
                won.append(key)
            except FileExistsError:
                pass
        os.write(answers[1], f"{rival}:{','.join(map(str, won))}\\n".encode())
        os._exit(0)
    rivals.append(answers[0])
os.close(go[1])
print("".join(os.read(answers, 1000).decode() for answers in rivals))
"""


def test_of_many_processes_that_create_one_key_exactly_one_wins(store):
    ran = subprocess.run(
        [sys.executable, "-c", RACE, str(store)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert ran.returncode == 0, ran.stderr
    won = {
        rival: keys.split(",") if keys else []
        for rival, _, keys in (line.partition(":") for line in ran.stdout.split())
    }
    assert len(won) == 8
    assert sorted(int(key) for keys in won.values() for key in keys) == list(range(25)), (
        "each key was won once"
    )
    for rival, keys in won.items():
        for key in keys:
            assert store.read(f"attempts/{key}") == f"{rival} {key}".encode() * 1000, (
                "the loser did not overwrite"
            )
    assert len(names(store)) == 25, "no temporary file is left"


def test_of_many_threads_that_create_one_key_exactly_one_wins(store):
    barrier, won = threading.Barrier(6), []

    def rival(number: int) -> None:
        for key in range(20):
            barrier.wait()
            with contextlib.suppress(FileExistsError):
                store.create(f"attempts/{key}", b"%d" % number, 1)
                won.append((key, b"%d" % number))

    threads = [threading.Thread(target=rival, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(key for key, _ in won) == list(range(20))
    assert all(store.read(f"attempts/{key}") == number for key, number in won)
    assert len(names(store)) == 20


def test_creating_a_taken_key_changes_nothing(store):
    store.create("attempts/0001.json", b"first", 1)
    with pytest.raises(FileExistsError):
        store.create("attempts/0001.json", b"second", 1)
    assert store.read("attempts/0001.json") == b"first"
    assert names(store) == ["attempts/0001.json"]


@pytest.mark.parametrize(
    "make", [os.mkdir, lambda path: os.symlink("nowhere", path)], ids=["folder", "dangling link"]
)
def test_a_key_taken_by_something_else_is_taken(store, make):
    make(store.path("attempts/0001.json"))
    with pytest.raises(FileExistsError):
        store.create("attempts/0001.json", b"mine", 1)
    assert not store.exists("attempts/0001.json")


def test_a_create_whose_reply_was_lost_has_succeeded(store):
    """NFS: the server made the link, the answer was lost, and the client's second try finds the key
    taken, by itself."""
    with store.writer("attempts/0001.json", 1) as sink:
        sink.write(b"mine")
        os.link(next(store.root.glob("attempts/*.tmp-*")), store.path("attempts/0001.json"))
        sink.commit(exclusive=True)
    assert store.read("attempts/0001.json") == b"mine"
    assert names(store) == ["attempts/0001.json"]


# --- nothing outside the root ---


@pytest.mark.parametrize(
    "key",
    [
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
    ],
    ids=lambda key: repr(key),
)
def test_a_key_that_leads_out_is_refused_by_every_operation(store, key):
    (store.root.parent / "x").write_bytes(b"outside")
    operations: list[Callable[[], object]] = [
        lambda: store.path(key),
        lambda: store.read(key),
        lambda: store.open(key),
        lambda: store.exists(key),
        lambda: store.entries(key),
        lambda: store.write(key, b"in", 1),
        lambda: store.create(key, b"in", 1),
        lambda: store.append(key, b"in"),
        lambda: store.delete(key),
        lambda: store.where(key),
        lambda: store.set_aside((key,)),
        lambda: store.prepare((key,)),
    ]
    for operation in operations:
        with pytest.raises(StorageError, match="not a key"):
            operation()
    assert (store.root.parent / "x").read_bytes() == b"outside"
    assert names(store) == []


def test_links_are_neither_listed_nor_read_nor_deleted_through(store, tmp_path):
    outside = tmp_path / "secret"
    outside.write_bytes(b"outside")
    for name, target in (("file", outside), ("dangling", "nowhere"), ("folder", tmp_path)):
        store.path(f"checkpoints/{name}").symlink_to(target)
    store.write("checkpoints/own", b"own", 1)
    assert [entry.key for entry in store.entries("checkpoints")] == ["checkpoints/own"]
    for name in ("file", "dangling", "folder"):
        assert not store.exists(f"checkpoints/{name}")
        with pytest.raises(FileNotFoundError):
            store.read(f"checkpoints/{name}")
        store.delete(f"checkpoints/{name}")
    assert outside.read_bytes() == b"outside"
    assert names(store) == ["checkpoints/own"]


def test_writing_over_a_link_replaces_the_link_and_not_its_target(store, tmp_path):
    outside = tmp_path / "secret"
    outside.write_bytes(b"outside")
    store.path("checkpoints/a.pt").symlink_to(outside)
    store.write("checkpoints/a.pt", b"own", 1)
    assert outside.read_bytes() == b"outside"
    assert store.read("checkpoints/a.pt") == b"own"


def test_what_is_no_regular_file_is_not_there(store):
    os.mkfifo(store.path("checkpoints/fifo"))  # opening one to read would wait for ever
    store.path("checkpoints/folder").mkdir()
    for name in ("fifo", "folder"):
        assert not store.exists(f"checkpoints/{name}")
        with pytest.raises(FileNotFoundError):
            store.open(f"checkpoints/{name}")
    assert store.entries("checkpoints") == []


# --- unreachable is not empty ---


def test_a_missing_file_is_said_so_and_a_missing_folder_is_empty(store):
    with pytest.raises(FileNotFoundError):
        store.read("checkpoints/none")
    assert not store.exists("checkpoints/none")
    assert store.entries("none") == []
    store.delete("checkpoints/none")
    store.set_aside(("checkpoints/none",))
    assert names(store) == []


def test_a_file_in_the_way_of_the_folder_is_an_error_and_not_emptiness(store):
    store.path("events").write_bytes(b"")
    for operation in (
        lambda: store.entries("events"),
        lambda: store.exists("events/a"),
        lambda: store.read("events/a"),
        lambda: store.write("events/a", b"x", 1),
        lambda: store.create("events/a", b"x", 1),
        lambda: store.append("events/a", b"x"),
        lambda: store.delete("events/a"),
    ):
        with pytest.raises(StorageError, match="events"):
            operation()


def test_no_permission_is_an_error_and_not_emptiness(open_folder):
    store = LocalStore(open_folder / "run")
    store.prepare(FOLDERS)
    store.write("checkpoints/a.pt", b"a", 1)
    os.chmod(store.root / "checkpoints", 0)
    try:
        with as_nobody():
            for operation in (
                lambda: store.entries("checkpoints"),
                lambda: store.exists("checkpoints/a.pt"),
                lambda: store.read("checkpoints/a.pt"),
                lambda: store.write("checkpoints/b.pt", b"b", 1),
                lambda: store.create("checkpoints/b.pt", b"b", 1),
                lambda: store.append("checkpoints/b.pt", b"b"),
                lambda: store.delete("checkpoints/a.pt"),
                lambda: store.set_aside(("checkpoints/a.pt",)),
                lambda: store.sweep(FOLDERS, 9),
            ):
                with pytest.raises(StorageError, match="Permission denied") as caught:
                    operation()
                assert "checkpoints" in caught.value.what and caught.value.exit_code == 74
    finally:
        os.chmod(store.root / "checkpoints", 0o755)
    assert names(store) == ["checkpoints/a.pt"]


def test_a_file_that_may_not_be_read_is_an_error(open_folder):
    store = LocalStore(open_folder / "run")
    store.prepare(FOLDERS)
    store.write("checkpoints/a.pt", b"a", 1)
    os.chmod(store.path("checkpoints/a.pt"), 0)
    with as_nobody(), pytest.raises(StorageError, match=r"checkpoints/a\.pt.*Permission denied"):
        store.read("checkpoints/a.pt")


def test_a_folder_that_has_vanished_is_an_error_and_is_not_made_anew(store):
    for folder in FOLDERS:
        os.rmdir(store.root / folder)
    os.rmdir(store.root)
    for operation in (
        lambda: store.write("checkpoints/a.pt", b"x", 1),
        lambda: store.create("checkpoints/a.pt", b"x", 1),
        lambda: store.append("checkpoints/a.pt", b"x"),
    ):
        with pytest.raises(StorageError, match=r"checkpoints/a\.pt.*vanished"):
            operation()
    assert not store.root.exists()


def test_a_folder_that_vanishes_while_a_file_is_written_is_an_error(store):
    with pytest.raises(StorageError, match="vanished"), store.writer("checkpoints/a.pt", 1) as sink:
        sink.write(b"x")
        os.rename(store.root, f"{store.root}.away")
        sink.commit()
    assert not store.root.exists()


def test_deleting_where_the_folder_has_vanished_is_a_storage_error(store):
    """A file that is gone is fine; a disk that is gone is not, and a save that is being given up
    must not trip over it."""
    os.rename(store.root, f"{store.root}.away")
    with pytest.raises(StorageError):
        store.delete("checkpoints/a.pt")


# --- full and read-only disks ---


def test_a_full_disk_is_named_and_leaves_nothing_behind(small_disk):
    disk = small_disk("size=1m")
    store = LocalStore(disk / "run")
    store.prepare(FOLDERS)
    store.write("checkpoints/before", b"x" * 1000, 1)
    free = os.statvfs(disk).f_bavail
    with pytest.raises(StorageError, match=r"checkpoints/big.*No space left") as caught:
        store.write("checkpoints/big", b"x" * (2 << 20), 1)
    assert "disk is full" in caught.value.remedy
    assert names(store) == ["checkpoints/before"]
    assert store.read("checkpoints/before") == b"x" * 1000
    assert os.statvfs(disk).f_bavail == free, "the space is given back"
    with store.writer("checkpoints/big", 1) as sink:
        with pytest.raises(StorageError, match="No space left") as caught:
            sink.write(b"x" * (2 << 20))
        assert sink.failure is caught.value
    assert names(store) == ["checkpoints/before"]
    store.write("checkpoints/small", b"x", 1)
    assert store.read("checkpoints/small") == b"x", "it goes on once there is room"


def test_a_disk_without_room_for_a_name_is_a_storage_error(small_disk):
    store = LocalStore(small_disk("size=1m,nr_inodes=6") / "run")
    store.prepare(FOLDERS)
    with pytest.raises(StorageError, match="No space left"):
        for number in range(10):
            store.create(f"attempts/{number}", b"x", 1)
    assert [entry.key for entry in store.entries("attempts") if TEMP.match(entry.key)] == []


def test_a_read_only_disk_can_be_read_and_says_so_on_every_write(small_disk):
    disk = small_disk("size=1m")
    store = LocalStore(disk / "run")
    store.prepare(FOLDERS)
    store.write("checkpoints/a.pt", b"a", 1)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for operation in (
        lambda: store.write("checkpoints/b.pt", b"b", 1),
        lambda: store.create("checkpoints/b.pt", b"b", 1),
        lambda: store.append("checkpoints/b.pt", b"b"),
        lambda: store.delete("checkpoints/a.pt"),
        lambda: store.set_aside(("checkpoints/a.pt",)),
        lambda: store.prepare(("events",)),
    ):
        with pytest.raises(StorageError, match="Read-only file system") as caught:
            operation()
        assert "read-only" in caught.value.remedy
    assert store.read("checkpoints/a.pt") == b"a"
    assert names(store) == ["checkpoints/a.pt"]


# --- the rest ---


def test_entries_are_sorted_and_only_of_this_folder(store):
    for key in ("checkpoints/b", "checkpoints/a", "attempts/c"):
        store.write(key, b"x" * len(key), 1)
    store.path("checkpoints/deeper").mkdir()
    store.path("checkpoints/deeper/d").write_bytes(b"")
    assert [entry.key for entry in store.entries("checkpoints")] == [
        "checkpoints/a",
        "checkpoints/b",
    ]


def test_lines_are_appended(store):
    store.append("attempts/log", b"one\n")
    store.append("attempts/log", b"two\n")
    assert store.read("attempts/log") == b"one\ntwo\n"


def test_what_is_set_aside_keeps_its_contents(store):
    store.write("checkpoints/a.pt", b"a", 1)
    store.set_aside(("checkpoints/a.pt",))
    assert names(store) == ["checkpoints/a.pt.damaged"]
    assert store.read("checkpoints/a.pt.damaged") == b"a"


def test_an_attempt_sweeps_the_temporary_files_below_its_own_and_nothing_else(store):
    kept = [
        "checkpoints/a.pt.tmp-0003-0f",
        "checkpoints/a.pt.tmp-0004-0f",
        "checkpoints/a.pt.tmp-10000-0f",
        "attempts/0002.json",
    ]
    kept += [
        "checkpoints/a.pt.tmp",
        "checkpoints/a.tmp-0001-0f.pt",
        "checkpoints/tmp-0001-0f",
        "events/a.tmp-0001-0f",
    ]
    swept = [
        "attempts/0001.json.tmp-0001-00",
        "checkpoints/a.pt.tmp-0002-0123abcd",
        "checkpoints/b.pt.tmp-0000-ff",
        "config.yaml.tmp-0002-0f",
        "x.tmp-0000-ff",
    ]
    kept += ["checkpoints/b.pt.tmp-0000-00", "config.yaml.tmp-0003-0f", "config.yaml"]
    store.prepare(("events",))
    for key in kept + swept:
        store.path(key).write_bytes(b"half")
        if "tmp-0000-ff" in key:  # of a supervisor that was killed long ago
            os.utime(store.path(key), (0, 0))
    store.path("checkpoints/c.pt.tmp-0001-ab").symlink_to(store.path("attempts/0002.json"))
    assert sorted(store.sweep(("", *FOLDERS), below_attempt=3)) == sorted(swept)
    assert names(store) == sorted([*kept, "checkpoints/c.pt.tmp-0001-ab"])


def test_preparing_twice_keeps_what_is_there(store):
    store.write("checkpoints/a.pt", b"a", 1)
    store.prepare(FOLDERS)
    assert store.read("checkpoints/a.pt") == b"a"


def test_a_home_and_a_relative_root_are_resolved_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    relative = LocalStore("run")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert LocalStore("~/run").root == tmp_path / "home" / "run"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    relative.prepare(FOLDERS)
    assert relative.root == tmp_path / "run" and (tmp_path / "run" / "attempts").is_dir()


class EqualParts(S3Client):
    """Answers as Cloudflare R2: all parts of an upload but the last have one size."""

    def __init__(self) -> None:
        super().__init__("s3://bucket/run")
        self.sizes: list[int] = []

    def _call(self, limit_s: float, method: str, **arguments: Any) -> dict[str, Any]:
        if method == "upload_part":
            self.sizes.append(len(arguments["Body"]))
        if method == "complete_multipart_upload" and len(set(self.sizes[:-1])) > 1:
            raise OSError("All non-trailing parts must have the same length.")
        return {
            "UploadId": "1",
            "ETag": "",
            "ContentLength": sum(self.sizes),
            "ServerSideEncryption": "aws:kms",  # so that the ETag says nothing
        }


@pytest.mark.parametrize("known", [True, False])
def test_a_file_of_known_size_is_uploaded_in_equal_parts(monkeypatch, known):
    """The size of the parts grows only where it is not known how many there will be."""
    monkeypatch.setattr(s3_client, "FIRST_PART_BYTES", 8)
    monkeypatch.setattr(s3_client, "MIB", 1)
    monkeypatch.setattr(RemoteSink, "_submit", at_once)
    client = EqualParts()
    with RemoteStore("s3://bucket/run", client, 0).writer("checkpoints/a.pt", 1) as sink:
        if known:
            sink.expect(16_020)
        sink.write(bytes(16_020))
        with contextlib.nullcontext() if known else pytest.raises(StorageError, match="complete"):
            sink.commit()
    assert set(client.sizes[:-1]) == ({8} if known else {8, 16})


def at_once(sink: RemoteSink, verb: str, request: Callable[[float], Any]) -> Future[Any]:
    done = Future[Any]()
    done.set_result(request(1.0))
    return done


@pytest.mark.parametrize("gib", [1e-9, 15.7, 78.2, 484, 5000])
def test_the_parts_of_a_large_file_are_equal_and_not_too_many(gib):
    size_bytes, client = int(gib * (1 << 30)), S3Client("s3://bucket/run")
    parts = {client.part_bytes(number, size_bytes) for number in range(1, 10_001)}
    (part_bytes,) = parts
    assert 8 << 20 <= part_bytes <= 1 << 30 and -(-size_bytes // part_bytes) <= 10_000


def test_a_server_without_conditional_writes_is_refused_in_words():
    where = "cannot create s3://bucket/run/attempts/0001.json"
    error = explained(where, translated_501())
    assert isinstance(error, RefusedError) and error.exit_code == 78
    assert "NotImplemented (501)" in error.found and "If-None-Match" in error.remedy


def translated_501() -> OSError:
    """What s3fs makes of it."""
    said: Any = {
        "Error": {"Code": "NotImplemented", "Message": "A header implies functionality …"},
        "ResponseMetadata": {"HTTPStatusCode": 501},
    }
    error = OSError("A header implies functionality that is not implemented")
    error.__cause__ = ClientError(said, "PutObject")
    return error
