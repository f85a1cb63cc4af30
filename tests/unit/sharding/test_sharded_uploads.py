"""Sharded checkpoints in a bucket: all ranks send their shards, and any of the stores will do."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from library_runs import newest, steps_of
from programs import SHARDED, Lived, live
from s3_server import S3Server

from harness.checkpoint import load
from harness.checkpoint.catalog import read_catalog
from harness.cli import main
from harness.cli.prune import OWN
from harness.exchange.compare import differences
from harness.sharding.shards import ShardFiles
from harness.store import LocalStore, open_store
from harness.store.remote import RemoteStore

BUILT = (
    """
from torch.distributed.fsdp import fully_shard
from harness.errors import DamagedError, StorageError
from harness.saving import uploader
from harness.sharding import shard_uploads
from harness.store import open_store

run = init(remote=os.environ.get("REMOTE"), seed=0)
"""
    + SHARDED
    + """

def die(run):
    # Once the bucket has what was saved before it.
    if run.step == int(os.environ.get("DIE", 0)):
        there = "ANY" in os.environ or "checkpoints/step_00000006-0001.json"
        while run.is_writer and there is not True and not store.exists(there):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL) if run.is_writer else time.sleep(60)


store = open_store(os.environ["REMOTE"]) if "REMOTE" in os.environ else None
send, failed = shard_uploads.send_shard, []


def sends(source, file, *arguments):
    TROUBLE
    send(source, file, *arguments)
    print("sent", file.name, flush=True)


shard_uploads.send_shard = sends
uploader.AGAIN_S = 0.2
for x, y in run.batches(points(), 16, epochs=1):
    loss = (model(x) - y).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    die(run)
"""
)


@pytest.fixture
def home(bucket: tuple[S3Server, str], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What a program needs to keep its run in an empty bucket, too; the test sees it as well."""
    server, called = bucket
    server.lend(monkeypatch)
    return server.environment | {"REMOTE": f"s3://{called}/run"}


def lived(folder: Path, home: dict[str, str], trouble: str = "pass", ranks: int = 2) -> Lived:
    return live(folder, BUILT.replace("TROUBLE", trouble), "run", ranks=ranks, env=home)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    life = lived(folder, {})
    assert life.codes == [0, 0], life.texts
    return folder / "run"


def sent(life: Lived, rank: int) -> list[str]:
    lines = [line for line in life.texts[rank].splitlines() if line.startswith("sent ")]
    return [line.removeprefix("sent ") for line in lines]


def equals(undisturbed: Path, run: Path) -> bool:
    return list(differences(newest(undisturbed), newest(run))) == []


def test_each_rank_sends_its_own_shards_and_either_store_resumes_the_run(
    undisturbed: Path, tmp_path: Path, home: dict[str, str]
) -> None:
    killed = lived(tmp_path, home | {"DIE": "8"})
    assert killed.code == -9, killed.texts
    remote = open_store(home["REMOTE"])
    (first,) = read_catalog(remote).manifests[:1]
    assert len(first.shards) == 2 and sent(killed, 0) and sent(killed, 1), killed.texts
    for rank in (0, 1):
        assert all(name.endswith(f"/0000{rank}.pt") for name in sent(killed, rank))
    for name in ("verify", "ls", "show"):
        assert main([name, home["REMOTE"]]) == 0
    shutil.rmtree(tmp_path / "run")
    again = lived(tmp_path, home)
    assert again.codes == [0, 0] and "resumes from step" in again.text, again.texts
    assert equals(undisturbed, tmp_path / "run")
    here, there = read_catalog(LocalStore(tmp_path / "run")), read_catalog(remote)
    assert there.head is not None and there.head == here.head
    assert there.whole_copies(there.head) == [remote]
    assert main(["export", home["REMOTE"], str(tmp_path / "there.pt")]) == 0
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "here.pt")]) == 0
    assert (tmp_path / "there.pt").read_bytes() == (tmp_path / "here.pt").read_bytes()


@pytest.mark.parametrize(
    ("here", "there"),
    [
        ("/00001.pt", ""),
        pytest.param("/00000.pt", "", marks=pytest.mark.slow),
        pytest.param(".pt", "/00001.pt", marks=pytest.mark.slow),
        ("/00001.pt", ".pt"),
        pytest.param("/00000.pt", "/00001.pt", marks=pytest.mark.slow),
    ],
)
def test_what_is_damaged_in_one_store_is_read_from_the_other(
    undisturbed: Path, tmp_path: Path, home: dict[str, str], here: str, there: str
) -> None:
    assert lived(tmp_path, home | {"DIE": "8"}).code == -9
    name, noise = "checkpoints/step_00000006-0001", b"not what was written"
    (tmp_path / f"run/{name}{here}").write_bytes(noise)
    if there:
        remote = open_store(home["REMOTE"])
        remote.delete(name + there)
        remote.write(name + there, noise, 1)
    for die in ("7", "0"):  # the second time, what was damaged is set aside already
        again = lived(tmp_path, home | {"DIE": die, "ANY": "1"})
        assert again.code == (-9 if die != "0" else 0), again.texts
        assert "resumes from step 6" in again.text, again.text
        assert ("set aside" in again.text) == (die != "0"), again.text
    assert (tmp_path / f"run/{name}{here}.damaged").exists()
    assert equals(undisturbed, tmp_path / "run")


@pytest.mark.slow
def test_a_bucket_alone_holds_the_run(
    undisturbed: Path, tmp_path: Path, home: dict[str, str]
) -> None:
    source = BUILT.replace("TROUBLE", "pass").replace(
        'init(remote=os.environ.get("REMOTE"), seed=0)',
        'harness.init(None, remote=os.environ["REMOTE"], seed=0, save_every_steps=3)',
    )
    killed = live(
        tmp_path, source.replace("()\n    die(run)", "()\n    " + STOPS), "run", ranks=2, env=home
    )
    assert killed.codes == [0, 0] and "resumes" not in killed.text, killed.texts
    again = live(tmp_path, source, "run", ranks=2, env=home)
    assert again.codes == [0, 0] and "resumes from step" in again.text, again.texts
    copied = tmp_path / "copied"
    assert main(["import", home["REMOTE"], str(copied)]) == 0
    assert equals(undisturbed, copied)


STOPS = "os.kill(os.getpid(), signal.SIGTERM) if run.step == 7 else None; time.sleep(0.1)"

ONCE = """if run.rank == 1 and file.name.startswith("step_00000010") and not failed:
        failed.append(True)
        raise StorageError("cannot write it", "found: 503", "Wait.")"""


def test_a_rank_whose_upload_fails_tries_again_and_nothing_is_sent_twice(
    tmp_path: Path, home: dict[str, str]
) -> None:
    life = lived(tmp_path, home, ONCE)
    assert life.codes == [0, 0], life.texts
    assert "rank 1: cannot write it" in life.text, life.text
    last = [f"step_00000010-0001/0000{rank}.pt" for rank in (0, 1)]
    assert [sent(life, rank).count(last[rank]) for rank in (0, 1)] == [1, 1], life.texts
    remote = open_store(home["REMOTE"])
    head = read_catalog(remote).head
    assert head is not None and head.step == 10 and read_catalog(remote).whole_copies(head)


@pytest.mark.slow
def test_what_the_bucket_lacks_of_a_finished_run_is_sent_by_the_next_start(
    tmp_path: Path, home: dict[str, str]
) -> None:
    assert lived(tmp_path, home).codes == [0, 0]
    remote = open_store(home["REMOTE"])
    remote.delete("checkpoints/step_00000010-0001.json")
    remote.delete("checkpoints/step_00000010-0001/00001.pt")
    again = lived(tmp_path, home)
    assert again.codes == [0, 0] and "is there now" in again.text, again.texts
    assert main(["verify", home["REMOTE"]]) == 0
    assert steps_of(tmp_path / "run")[-1] == 10


@pytest.mark.slow
def test_run_directories_of_the_nodes_own_are_refused(tmp_path: Path, home: dict[str, str]) -> None:
    source = (
        BUILT.replace("TROUBLE", "pass")
        .replace("init(remote", "sys.argv[1] += os.environ['RANK']; run = init(remote")
        .replace("run = sys", "sys")
    )
    life = live(tmp_path, source, "run", ranks=2, env=home)
    assert life.codes == [78, 78] and "not shared" in life.text, life.texts
    assert "or say that each node has its own: run.scratch=true" in life.text, life.texts


@pytest.mark.slow
def test_a_remote_directory_that_the_nodes_do_not_share_is_refused(tmp_path: Path) -> None:
    source = BUILT.replace("TROUBLE", "pass").replace(
        'remote=os.environ.get("REMOTE")', 'remote=os.environ["REMOTE"] + os.environ["RANK"]'
    )
    life = live(tmp_path, source, "run", ranks=2, env={"REMOTE": str(tmp_path / "remote")})
    assert life.codes == [78, 78] and "not shared" in life.text, life.texts
    assert f"found: {tmp_path}/remote0" in life.text and "run.scratch" not in life.text, life.texts


def whole_in(home: dict[str, str]) -> list[int]:
    """Return the steps whose checkpoints the bucket has whole."""
    catalog = read_catalog(open_store(home["REMOTE"]))
    return [m.step for m in catalog.manifests if catalog.whole_copies(m)]


SLOW = """while file.name.startswith("step_00000003") and run.rank == 1:
        if os.path.exists(f"{sys.argv[1]}/checkpoints/step_00000010-0001.json"):
            break
        time.sleep(0.02)"""


def test_a_checkpoint_on_its_way_is_not_deleted_in_the_run_directory(
    tmp_path: Path, home: dict[str, str]
) -> None:
    life = lived(tmp_path, home, SLOW)
    assert life.codes == [0, 0] and "cannot be uploaded" not in life.text, life.texts
    assert whole_in(home) == [3, 10]


@pytest.mark.slow
def test_a_shard_that_somebody_deletes_on_the_way_is_sent_again(
    tmp_path: Path, home: dict[str, str]
) -> None:
    source = BUILT.replace("TROUBLE", "pass").replace(
        'print("sent", file.name, flush=True)',
        "store.delete(file.key) if run.rank == 1 else None",
    )
    life = live(tmp_path, source, "run", ranks=2, env=home)
    assert life.codes == [0, 0], life.texts
    assert 10 in whole_in(home)


ALONE = 'if run.rank == 1:\n        raise DamagedError("cut short", "found: another node")'


@pytest.mark.slow
def test_what_a_rank_alone_reads_damaged_is_sent_by_the_writer(
    tmp_path: Path, home: dict[str, str]
) -> None:
    life = lived(tmp_path, home, ALONE)
    assert life.codes == [0, 0] and "damaged" not in life.text, life.texts
    assert 10 in whole_in(home) and "step_00000010-0001/00001.pt" in sent(life, 0)


LEFT = """()
    if run.step == 7:
        break
until = time.monotonic() + 20
while run.is_writer and time.monotonic() < until:
    if store.exists("checkpoints/step_00000006-0001.json"):
        break
    time.sleep(0.1)
"""


def test_a_loop_that_is_left_uploads_what_is_committed(
    tmp_path: Path, home: dict[str, str]
) -> None:
    slow = "time.sleep(30 if run.rank == 1 else 0)"
    source = BUILT.replace("TROUBLE", slow).replace("()\n    die(run)\n", LEFT)
    life = live(tmp_path, source, "run", ranks=2, env=home)
    assert life.codes == [0, 0], life.texts
    assert whole_in(home)[-1:] == [6], life.texts


class Garbled(RemoteStore):
    """A store whose first read of a large file is damaged on the way."""

    def spans(self, *arguments: Any) -> Iterator[bytes]:
        for number, chunk in enumerate(super().spans(*arguments)):
            is_first, self.was_read = not getattr(self, "was_read", False), True
            yield b"x" + chunk[1:] if is_first and number == 0 else chunk


@pytest.mark.slow
def test_a_shard_that_is_damaged_on_the_way_is_read_once_more(
    tmp_path: Path, home: dict[str, str]
) -> None:
    assert lived(tmp_path, home).codes == [0, 0]
    plain = open_store(home["REMOTE"])
    assert isinstance(plain, RemoteStore)
    head = read_catalog(plain).head
    assert head is not None
    payload = load.load(plain, head)
    files = ShardFiles((Garbled(plain.url, plain.bucket, 60),), head, payload)
    files.keep(0, 1)


def test_prune_finds_unfinished_uploads_of_shards() -> None:
    assert OWN.match("checkpoints/step_00000006-0001/00001.pt")
    assert not OWN.match("checkpoints/of somebody else/00001.pt")
