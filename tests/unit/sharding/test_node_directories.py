"""Sharded runs whose nodes have a directory each (`run.scratch=true`), and one bucket: what
survives is read from the disks, what is lost from the bucket. Each rank plays a node here."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from library_runs import newest, steps_of
from programs import SHARDED, Lived, live
from s3_server import S3Server

from harness.checkpoint import memory_copy
from harness.checkpoint.catalog import read_catalog
from harness.cli import main
from harness.exchange.compare import differences
from harness.store import LocalStore, open_store

# Rank r is on the node that $NODES names for it. Uploads of step $KEPT_BACK stay under way.
BUILT = (
    """
from pathlib import Path
from torch.distributed.fsdp import fully_shard
from harness.sharding import shard_uploads
from harness.store import open_store

node = os.environ.get("NODES", "0,1,2,3").split(",")[int(os.environ.get("RANK", 0))]
sys.argv[1] += "." + node
run = init(remote=os.environ["REMOTE"], is_scratch=True, seed=0, ARGUMENTS)
"""
    + SHARDED
    + """
send, store = shard_uploads.send_shard, open_store(os.environ["REMOTE"])


def sends(source, file, *arguments):
    while f"step_0000000{os.environ.get('KEPT_BACK')}-" in file.name:
        time.sleep(1)
    send(source, file, *arguments)


def die(run):
    # Once the writer's node and the bucket have what was saved before it.
    saved = Path(sys.argv[1], "checkpoints/step_00000006-0001.json")
    while "THERE" in os.environ and run.is_writer and run.step == 7 and not saved.exists():
        time.sleep(0.01)  # a step is left out of the tier while a save is under way
    if run.step != int(os.environ.get("DIE", 0)):
        return
    there = "checkpoints/step_0000000%d-0001.json" % (3 if os.environ.get("KEPT_BACK") else 6)
    while run.is_writer and not (
        store.exists(there)
        and saved.exists()
        and os.path.exists(os.environ.get("THERE", sys.argv[1]))
    ):
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGKILL) if run.is_writer else time.sleep(60)


shard_uploads.send_shard = sends
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


def lived(
    folder: Path, home: dict[str, str], arguments: str = "", *, ranks: int = 2, **env: str
) -> Lived:
    return live(folder, BUILT.replace("ARGUMENTS", arguments), "run", ranks=ranks, env=home | env)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("undisturbed")
    source = (
        BUILT.replace('remote=os.environ["REMOTE"], is_scratch=True, ', "")
        .replace('sys.argv[1] += "." + node\n', "")
        .replace(', open_store(os.environ["REMOTE"])', ", None")
    )
    life = live(folder, source.replace("ARGUMENTS", ""), "run", ranks=2)
    assert life.codes == [0, 0], life.texts
    return newest(folder / "run")


def equals(undisturbed: dict[str, Any], home: dict[str, str]) -> bool:
    return list(differences(undisturbed, newest(home["REMOTE"]))) == []


def shards(node: Path) -> list[str]:
    return sorted(str(path.relative_to(node)) for path in node.glob("checkpoints/*/*.pt"))


def test_each_node_keeps_its_own_shards_and_deletes_what_the_writer_deletes(
    undisturbed: dict[str, Any],
    tmp_path: Path,
    home: dict[str, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    life = lived(tmp_path, home, "keep_last=2, keep_best=0, save_every_steps=2")
    assert life.codes == [0, 0], life.texts
    writer, other = tmp_path / "run.0", tmp_path / "run.1"
    steps = steps_of(writer)  # with one that was on its way to the bucket then
    assert steps[-2:] == [8, 10] and len(steps) <= 3 and not list(other.glob("checkpoints/*.json"))
    for rank, node in enumerate((writer, other)):
        kept = [f"checkpoints/step_{step:08d}-0001/0000{rank}.pt" for step in steps]
        assert shards(node) == kept
    remote = open_store(home["REMOTE"])
    head = read_catalog(remote).head
    assert head is not None and read_catalog(remote).whole_copies(head) == [remote]
    assert main(["verify", home["REMOTE"]]) == 0 and main(["status", str(writer)]) == 0
    capsys.readouterr()
    assert main(["verify", str(writer)]) == 0 and main(["ls", str(writer)]) == 0
    out = capsys.readouterr().out
    assert "not all of its shards are on this node" in out and "shards on other nodes" in out
    assert equals(undisturbed, home)


@pytest.mark.parametrize(
    ("lost", "read"),
    [
        ((), 0),
        pytest.param((1,), 1, marks=pytest.mark.slow),
        ((0,), 1),
        pytest.param((0, 1), 2, marks=pytest.mark.slow),
    ],
)
def test_what_is_lost_with_a_node_is_read_from_the_bucket(
    undisturbed: dict[str, Any],
    tmp_path: Path,
    home: dict[str, str],
    lost: tuple[int, ...],
    read: int,
) -> None:
    assert lived(tmp_path, home, DIE="8").code == -9
    for node in lost:
        shutil.rmtree(tmp_path / f"run.{node}")
    again = lived(tmp_path, home)
    assert again.codes == [0, 0] and "resumes from step 6" in again.text, again.texts
    told = f"{read} of 2 shards of step_00000006-0001 are read from {home['REMOTE']}"
    assert (told in again.text) == bool(read) and ("are read from" in again.text) == bool(read)
    assert equals(undisturbed, home)


def test_what_the_bucket_lacks_is_read_from_the_disks_alone(
    undisturbed: dict[str, Any], tmp_path: Path, home: dict[str, str]
) -> None:
    assert lived(tmp_path, home, DIE="8", KEPT_BACK="6").code == -9
    again = lived(tmp_path, home)
    assert again.codes == [0, 0] and "resumes from step 6" in again.text, again.texts
    assert equals(undisturbed, home)


@pytest.mark.parametrize(
    "change",
    [
        "a node is lost",
        pytest.param("one rank less", marks=pytest.mark.slow),
        pytest.param("two ranks more", marks=pytest.mark.slow),
    ],
)
def test_a_step_that_is_nowhere_whole_is_passed_over_and_not_set_aside(
    undisturbed: dict[str, Any], tmp_path: Path, home: dict[str, str], change: str
) -> None:
    assert lived(tmp_path, home, DIE="8", KEPT_BACK="6").code == -9
    ranks = {"one rank less": 1, "two ranks more": 4}.get(change, 2)
    if ranks == 2:
        shutil.rmtree(tmp_path / "run.1")
    again = lived(tmp_path, home, ranks=ranks)
    assert set(again.codes) == {0} and "resumes from step 3" in again.text, again.texts
    told = "skipped: step_00000006-0001/0000"
    assert told in again.text and "lies on another machine" in again.text, again.text
    assert "set aside" not in again.text and ".damaged" not in "".join(shards(tmp_path / "run.0"))
    if ranks == 2:
        assert equals(undisturbed, home)


@pytest.mark.slow
def test_the_nodes_in_another_order_read_from_the_bucket(
    undisturbed: dict[str, Any], tmp_path: Path, home: dict[str, str]
) -> None:
    assert lived(tmp_path, home, DIE="8").code == -9
    again = lived(tmp_path, home, NODES="1,0")
    assert again.codes == [0, 0] and "resumes from step 6" in again.text, again.texts
    assert "2 of 2 shards" in again.text and equals(undisturbed, home)


def test_a_step_whose_main_file_is_on_another_node_is_named(
    undisturbed: dict[str, Any], tmp_path: Path, home: dict[str, str]
) -> None:
    assert lived(tmp_path, home, DIE="8", KEPT_BACK="6").code == -9
    again = lived(tmp_path, home, NODES="1,0")
    assert again.codes == [0, 0] and "resumes from step 3" in again.text, again.texts
    assert "not taken: step_00000006-0001, whose main file is in" in again.text, again.text
    assert "of rank 1 alone" in again.text and equals(undisturbed, home)


@pytest.mark.slow
def test_another_sharding_that_needs_what_is_on_another_node_is_refused_in_words(
    tmp_path: Path, home: dict[str, str]
) -> None:
    assert lived(tmp_path, home, DIE="8", KEPT_BACK="6").code == -9
    source = BUILT.replace("ARGUMENTS", "")
    by_columns = (
        "from torch.distributed.tensor import Shard\n"
        "from functools import partial\n"
        "fully_shard = partial(fully_shard, shard_placement_fn="
        "lambda p: Shard(1) if p.ndim == 2 and p.shape[1] % 2 == 0 else None)\n"
    )
    life = live(
        tmp_path, source.replace("run = init", by_columns + "run = init"), "run", ranks=2, env=home
    )
    assert 78 in life.codes and "which is on another machine" in "".join(life.texts), life.texts
    assert "harness rollback" in "".join(life.texts)


@pytest.mark.slow
def test_a_finished_run_hands_in_shards_from_all_nodes(
    tmp_path: Path, home: dict[str, str]
) -> None:
    assert lived(tmp_path, home).codes == [0, 0]
    remote = open_store(home["REMOTE"])
    remote.delete("checkpoints/step_00000010-0001.json", "checkpoints/step_00000010-0001/00001.pt")
    again = lived(tmp_path, home)
    assert again.codes == [0, 0] and "is there now" in again.text, again.texts
    assert main(["verify", home["REMOTE"]]) == 0 and steps_of(tmp_path / "run.0")[-1] == 10


@pytest.mark.parametrize("lost", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_memory_of_each_node_holds_its_shards(
    undisturbed: dict[str, Any], tmp_path: Path, home: dict[str, str], lost: bool
) -> None:
    tiers = [memory_copy.place(LocalStore(tmp_path / f"run.{node}")).root for node in (0, 1)]
    kept = tiers[0] / "checkpoints/step_00000007-0001.json"
    try:
        assert lived(tmp_path, home, "memory=1", DIE="8", THERE=str(kept)).code == -9
        names = [sorted(path.name for path in tier.glob("checkpoints/*7-0001/*")) for tier in tiers]
        assert names == [["00000.pt"], ["00001.pt"]]
        if lost:
            shutil.rmtree(tiers[1])
        again = lived(tmp_path, home, "memory=1")
        assert again.codes == [0, 0], again.texts
        assert f"resumes from step {6 if lost else 7}" in again.text, again.text
        assert not any(tier.exists() for tier in tiers) and equals(undisturbed, home)
    finally:
        for tier in tiers:
            shutil.rmtree(tier, ignore_errors=True)
