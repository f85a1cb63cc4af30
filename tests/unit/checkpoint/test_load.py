"""A checkpoint comes into memory once on each machine, verified, and what is verified is what is
parsed."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import gc
import io
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from conftest import ENVIRONMENT
from s3_server import free_ports
from there import there

from harness import state
from harness.checkpoint import attempts, load
from harness.checkpoint import format as fmt
from harness.checkpoint.catalog import read_catalog
from harness.checkpoint.commit import About, commit
from harness.checkpoint.format import Manifest
from harness.errors import DamagedError
from harness.store import Handle, LocalStore, attached, keep
from harness.store.sealed_memory import SEALS

LARGE_BYTES, MEDIUM_BYTES = 300 << 20, 40 << 20  # the latter is sent in three parts
PRELUDE = """
import os, sys, threading, time
from harness.checkpoint import load
from harness.checkpoint.catalog import read_catalog
from harness.store import LocalStore
store = LocalStore(sys.argv[1])
"""


def payload(tensors: int, numel: int) -> dict:
    weights = {
        f"layer.{at}": torch.arange(at, at + numel, dtype=torch.float32) for at in range(tensors)
    }
    values = {"step": 10, "epoch": 0, "loss": 0.5, "metrics": {}, "config": {}, "format_version": 1}
    return {"model_state_dict": weights, "rng": [{"torch": torch.arange(100)}]} | values


def committed(root: Path, tensors: int, numel: int) -> LocalStore:
    store = LocalStore(root)
    store.prepare(fmt.FOLDERS)
    commit(
        store,
        attempts.claim(read_catalog(store), None, 1),
        payload(tensors, numel),
        About(1, (), {"model": "Linear"}, "-"),
    )
    return store


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return committed(tmp_path / "run", 3, 1000)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStore]:
    store = committed(tmp_path_factory.mktemp("large") / "run", 10, LARGE_BYTES // 40)
    yield store
    shutil.rmtree(store.root)


@pytest.fixture(scope="module")
def medium(tmp_path_factory: pytest.TempPathFactory) -> LocalStore:
    return committed(tmp_path_factory.mktemp("medium") / "run", 10, MEDIUM_BYTES // 40)


def the_one(store: LocalStore) -> Manifest:
    return read_catalog(store).manifests[0]


def data_path(store: LocalStore) -> Path:
    return store.path(the_one(store).data_key)


def mapped() -> set[str]:
    """The kept memories that this process has mapped."""
    return set(re.findall(r"/memfd:(harness-\w+)", Path("/proc/self/maps").read_text()))


def child(store: LocalStore, code: str, *before: str) -> str:
    done = subprocess.run(
        [*before, sys.executable, "-c", PRELUDE + code, str(store.root)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- how much memory ---

MEASURED = """
def held():
    found = dict(
        line.split(":") for line in open("/proc/self/smaps_rollup").read().splitlines()[1:]
    )
    files = {}
    for fd in os.listdir("/proc/self/fd"):
        try:
            if "/memfd:" in os.readlink(f"/proc/self/fd/{fd}"):
                about = os.stat(f"/proc/self/fd/{fd}")
                files[about.st_ino] = about.st_blocks * 512
        except OSError:
            pass
    kib = {name: int(value.split()[0]) for name, value in found.items()}
    return (kib["Pss_Anon"] << 10) + max(kib["Pss_Shmem"] << 10, sum(files.values()))

manifest = read_catalog(store).manifests[0]
before = most = held()
done = False

def watch():
    global most
    while not done:
        most = max(most, held())
        time.sleep(0.002)

watcher = threading.Thread(target=watch)
watcher.start()
loaded = load.load(store, manifest)
total = sum(float(tensor.sum()) for tensor in loaded["model_state_dict"].values())
most = max(most, held())
done = True
watcher.join()
extra = most - before
del loaded
print(extra, held() - before)
"""


def test_a_load_needs_the_memory_of_the_state_once_and_gives_it_back(large):
    most_bytes, left_bytes = map(int, child(large, MEASURED).split())
    assert LARGE_BYTES * 0.9 < most_bytes < LARGE_BYTES * 1.1 + (32 << 20)
    assert left_bytes < 32 << 20


def test_memory_is_free_when_the_last_tensor_is_gone(store):
    others, before = mapped(), set(os.listdir("/proc/self/fd"))
    loaded = load.load(store, the_one(store))
    assert set(os.listdir("/proc/self/fd")) == before
    assert len(mapped() - others) == 1
    del loaded
    gc.collect()
    assert mapped() <= others


def test_who_keeps_what_is_no_state_dict_does_not_keep_the_whole(store):
    others = mapped()
    generators = load.load(store, the_one(store))["rng"]
    gc.collect()
    assert mapped() <= others
    assert torch.equal(generators[0]["torch"], torch.arange(100))


class Keeper:
    """Keeps what it is given, as many a state dict's owner does."""

    def load_state_dict(self, state: dict) -> None:
        self.state = state

    def state_dict(self) -> dict:
        return self.state


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.LBFGS])
def test_nothing_that_is_restored_keeps_the_memory_of_the_load(tmp_path, kind):
    model = torch.nn.Linear(30, 20)
    optimizer, keeper = kind(model.parameters()), Keeper()
    model(torch.ones(1, 30)).sum().backward()
    optimizer.step(lambda: model(torch.ones(1, 30)).sum())
    tracked = {"model": model, "optimizer": optimizer, "keeper": keeper}
    keeper.state = {"kept": torch.arange(1000)}
    store = LocalStore(tmp_path / "run")
    store.prepare(fmt.FOLDERS)
    saved = state.capture(tracked)
    commit(
        store,
        attempts.claim(read_catalog(store), None, 1),
        payload(1, 1) | saved,
        About(1, (), {}, "-"),
    )
    loaded = load.load(store, the_one(store))
    state.restore(tracked, {}, loaded, "a test")
    del loaded
    gc.collect()
    assert not mapped()
    assert torch.equal(keeper.state["kept"], torch.arange(1000))
    for key, value in state.capture({"optimizer": optimizer})["optimizer_state_dict"]["state"][
        0
    ].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, saved["optimizer_state_dict"]["state"][0][key])


@pytest.mark.parametrize("room", ["RLIMIT_AS", "RLIMIT_FSIZE"])
def test_too_little_memory_is_said_in_words_and_is_no_damage(medium, room):
    code = f"""
import resource
from harness.errors import HarnessError, DamagedError
manifest = read_catalog(store).manifests[0]
used = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(
    resource.{room}, (used + (30 << 20),) * 2 if "{room}" == "RLIMIT_AS" else (30 << 20,) * 2
)
try:
    load.load(store, manifest)
except DamagedError as error:
    print("damaged", error)
except HarnessError as error:
    print(error)
"""
    assert "there is not enough memory to load step_00000010-0001.pt" in child(medium, code)


# --- what is verified is what is parsed ---


def test_what_happens_to_the_file_after_it_was_verified_does_not_matter(store):
    expected = payload(3, 1000)["model_state_dict"]
    with load.verified(store, the_one(store).data) as memory:
        data_path(store).write_bytes(bytes(data_path(store).stat().st_size))
        loaded = load.parse(memory, the_one(store))["model_state_dict"]
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_verified_memory_can_be_changed_by_nobody(store):
    with load.verified(store, the_one(store).data) as memory:
        fd = os.open(memory.path, os.O_RDWR)
        for attack in (
            lambda: os.pwrite(fd, b"x", 100),
            lambda: os.ftruncate(fd, 0),
            lambda: os.ftruncate(fd, 1 << 20),
        ):
            with pytest.raises(PermissionError):
                attack()
        os.close(fd)
        loaded = load.parse(memory, the_one(store))
        # Who changes a tensor changes a page of his own.
        loaded["model_state_dict"]["layer.0"].zero_()
        again = load.parse(memory, the_one(store))
    assert torch.equal(
        again["model_state_dict"]["layer.0"], torch.arange(1000, dtype=torch.float32)
    )


def test_a_file_that_is_cut_short_while_it_is_read_is_refused(medium, tmp_path):
    shutil.copytree(medium.root, tmp_path / "run")
    store = LocalStore(tmp_path / "run")
    chunks = load.verified_chunks(store, the_one(store).data)
    next(chunks)
    os.truncate(data_path(store), MEDIUM_BYTES // 2)
    with pytest.raises(DamagedError, match="wrong size"):
        for _ in chunks:
            pass


def test_a_disk_that_fails_while_it_is_read_is_no_damage(medium):
    code = """
from harness.errors import StorageError
try:
    load.load(store, read_catalog(store).manifests[0])
except StorageError as error:
    print(error)
"""
    said = child(
        medium,
        code,
        "strace",
        "-f",
        "-qq",
        "-o",
        "/dev/null",
        "-P",
        str(data_path(medium)),
        "-e",
        "inject=read:error=EIO:when=3",
    )
    assert (
        "cannot read checkpoints/step_00000010-0001.pt" in said and os.strerror(errno.EIO) in said
    )


def test_tensors_that_do_not_lie_in_the_file_as_they_are_are_not_mapped(store):
    """Another program packed the file anew, and a manifest was made for it."""
    packed = io.BytesIO()
    with (
        zipfile.ZipFile(data_path(store)) as old,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    legacy = io.BytesIO()
    torch.save(
        torch.load(data_path(store), weights_only=True),
        legacy,
        _use_new_zipfile_serialization=False,
    )
    for data in (packed.getvalue(), legacy.getvalue()):
        data_path(store).write_bytes(data)
        file = fmt.DataFile(
            "step_00000010-0001.pt", len(data), f"blake3:{blake3(data).hexdigest()}"
        )
        loaded = load.load(store, dataclasses.replace(the_one(store), files=(file,)))
        assert torch.equal(
            loaded["model_state_dict"]["layer.2"], torch.arange(2, 1002, dtype=torch.float32)
        )
        assert not mapped()


# --- another process's memory ---


def test_a_memory_is_taken_over_by_its_path_and_name():
    with keep([b"ab", b"c"], 3, "a test") as memory:
        assert memory.open().read() == b"abc"
        with there(attached(memory.offer, 3)) as other:
            assert other.open().read() == b"abc"
            assert os.stat(other.path).st_ino == os.stat(memory.path).st_ino


def test_what_is_kept_of_a_source_that_fails_is_nothing():
    def fails() -> Iterator[bytes]:
        yield b"ab"
        raise DamagedError("it is not whole")

    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(DamagedError):
        keep(fails(), 3, "a test")
    assert set(os.listdir("/proc/self/fd")) == before


def test_another_file_in_the_place_of_an_offered_memory_is_not_used(tmp_path):
    """In another container, or on another machine, the same path may lead to anything, with the
    same numbers."""
    with keep([b"abc"], 3, "a test") as memory, keep([b"abc"], 3, "a test") as other:
        name = memory.offer.name
        (tmp_path / "file").write_bytes(b"abc")
        os.symlink(f"/memfd:{name} (deleted)", tmp_path / "link")
        os.mkfifo(tmp_path / "fifo")
        wrong = [
            other.offer.path,
            *(tmp_path / kind for kind in ("file", "link", "fifo")),
            "/dev/null",
            "/proc/1/fd/0",
            "/proc/0/fd/1",
        ]
        for path in wrong:
            assert attached(Handle(str(path), name), 3) is None, path
        assert attached(memory.offer, 4) is None
        assert attached(Handle(memory.offer.path, f"{name}0"), 3) is None
        fd = os.memfd_create(name, os.MFD_ALLOW_SEALING)
        os.write(fd, b"abc")
        assert attached(Handle(f"/proc/self/fd/{fd}", name), 3) is None, (
            "somebody may still write to it"
        )
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
        there(attached(Handle(f"/proc/self/fd/{fd}", name), 3)).close()
        os.close(fd)


# --- several ranks ---

RANK = """
import json
from harness.checkpoint import resume
from harness.distributed import join
if os.environ["SEES"].startswith("nothing"):
    store = LocalStore("/nonexistent")
if "flipped" in os.environ["SEES"]:
    import torch.distributed
    whole = torch.distributed.broadcast
    def broadcast(tensor, *args, **options):
        done = whole(tensor, *args, **options)
        if tensor.dtype == torch.uint8 and tensor.numel() > 1000:
            tensor[-1] ^= 1
        return done
    torch.distributed.broadcast = broadcast
world = join.join(60)
try:
    choice = resume.choose(store, world)
    maps = {line.split()[4] for line in open("/proc/self/maps") if "/memfd:harness-" in line}
    said = [
        sorted(maps),
        float(choice.payload["model_state_dict"]["layer.9"][-1]),
        choice.notes if world.is_writer else [],
    ]
except Exception as error:
    said = [type(error).__name__, str(error), []]
print(json.dumps(said))
world.leave()
"""


def started(
    store: LocalStore, port: int, size: int, rank: int, sees: str, *before: str
) -> subprocess.Popen[str]:
    where = {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "SEES": sees,
    }
    command = [*before, sys.executable, "-c", PRELUDE + RANK, str(store.root)]
    return subprocess.Popen(
        command, env=ENVIRONMENT | where, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended(*processes: subprocess.Popen[str]) -> list[list]:
    said = []
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        said.append(json.loads(out.splitlines()[-1]))
    return said


@pytest.fixture
def elsewhere() -> Iterator[tuple[str, ...]]:
    """What to start a process with, so that it sees no process of ours under /proc, as in another
    container; all so started see each other."""
    holder = subprocess.Popen(
        ["unshare", "--pid", "--fork", "--mount-proc", "sleep", "1000"], stderr=subprocess.PIPE
    )
    try:
        children = Path(f"/proc/{holder.pid}/task/{holder.pid}/children")
        for _ in range(500):
            if holder.poll() is not None:
                pytest.skip("this user may not make name spaces")
            if inside := children.read_text().split():
                break
            os.sched_yield()
        yield ("nsenter", f"--target={inside[0]}", "--pid", "--mount", "--")
    finally:
        for pid in children.read_text().split() if holder.poll() is None else ():
            os.kill(int(pid), 9)
        holder.kill()
        holder.wait()


LAST = float(9 + MEDIUM_BYTES // 40 - 1)


@pytest.mark.slow
def test_the_ranks_of_a_machine_parse_the_same_pages(medium):
    port = free_ports(1)[0]
    said = ended(
        *(
            started(medium, port, 3, rank, "the run" if rank == 0 else "nothing")
            for rank in range(3)
        )
    )
    assert [value for _, value, _ in said] == [LAST] * 3
    assert len({inode for maps, _, _ in said for inode in maps}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("sees", ["the run", "nothing"])
def test_elsewhere_one_rank_reads_or_is_sent_the_data_and_the_others_share_its_pages(
    medium, elsewhere, sees
):
    port = free_ports(1)[0]
    said = ended(
        started(medium, port, 4, 0, "the run"),
        started(medium, port, 4, 1, sees, *elsewhere),
        started(medium, port, 4, 2, sees, *elsewhere),
        started(medium, port, 4, 3, "nothing"),
    )
    assert [value for _, value, _ in said] == [LAST] * 4
    (writer, first, second, mate) = [maps for maps, _, _ in said]
    assert writer == mate and first == second and len(writer) == len(first) == 1 and writer != first


@pytest.mark.slow
def test_bytes_that_do_not_reach_a_rank_whole_are_no_damage_of_the_stored_copy(medium, elsewhere):
    """It is neither passed over for an older one nor set aside; a retry may succeed."""
    port = free_ports(1)[0]
    said = ended(
        started(medium, port, 2, 0, "the run"),
        started(medium, port, 2, 1, "nothing, and what it receives is flipped", *elsewhere),
    )
    for kind, text, _ in said:
        assert kind == "StorageError" and "cannot be read" in text
        assert "as it was sent to this rank, is damaged" in text and "(rank 1)" in text


@pytest.mark.slow
def test_a_rank_without_room_is_named_and_the_others_do_not_wait_for_it(medium, elsewhere):
    port = free_ports(1)[0]
    limited = ("prlimit", f"--fsize={10 << 20}")
    said = ended(
        started(medium, port, 2, 0, "the run"),
        started(medium, port, 2, 1, "nothing", *elsewhere, *limited),
    )
    for _, text, _ in said:
        assert (
            "not enough memory to load" in text and "(rank 1)" in text and "cannot be read" in text
        )
