"""A simulated cluster, seed by seed: in whatever order its threads run, and whatever befalls disks,
buckets, machines and single ranks, what was promised holds.

A failure prints its seed and the newest calls; with SEED=N in the environment that seed runs alone.
Each mutation of the program must turn one of a few dozen seeds red.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from blake3 import blake3
from conftest import ENVIRONMENT
from simulated_disk import SimulatedPath
from simulation import POSSIBLE, Simulation
from simulator import SimulationError

from harness.checkpoint import catalog, commit, load, retention
from harness.checkpoint import format as fmt
from harness.checkpoint.attempts import check_fence
from harness.checkpoint.catalog import Catalog
from harness.checkpoint.commit import write_shard
from harness.checkpoint.format import DataFile
from harness.errors import StorageError
from harness.saving import claim
from harness.saving.uploader import Uploader
from harness.sharding import rank_save, shard_uploads
from harness.sharding.rank_save import RankSave
from harness.sharding.shard_uploads import ShardUploads
from harness.sharding.shards import ShardFiles
from harness.store import folders, local
from harness.store.local import LocalSink, LocalStore
from harness.store.remote import RemoteStore

QUICK, MANY, OF_A_MUTATION = 10, 400, 60  # seeds of each shape
ONE = os.environ.get("SEED")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def seeds(count: int, first: int = 0) -> range:
    return range(int(ONE), int(ONE) + 1) if ONE else range(first, first + count)


@pytest.mark.parametrize("shape", POSSIBLE)
def test_what_was_promised_holds(shape):
    for seed in seeds(QUICK):
        Simulation(seed, shape).run()


@pytest.mark.slow
@pytest.mark.parametrize("shape", POSSIBLE)
def test_what_was_promised_holds_for_many_seeds(shape):
    for seed in seeds(MANY, QUICK):
        Simulation(seed, shape).run()


@pytest.mark.parametrize("shape", ["a disk and a bucket", "shards on a disk and in a bucket"])
def test_a_seed_alone_decides_all(shape):
    """Also in another process, where sets have another order."""
    program = (
        "import sys, simulation; print(*simulation.Simulation(3, sys.argv[1]).run(), sep='\\n')"
    )
    traces = [
        subprocess.run(
            [sys.executable, "-c", program, shape],
            env=ENVIRONMENT | {"PYTHONHASHSEED": hashes},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hashes in ("1", "2")
    ]
    assert traces[0] == traces[1] and len(traces[0].splitlines()) > 100
    assert Simulation(3, shape).run() == traces[0].splitlines()


# --- mutations: what each protective line is there for ---


def manifest_first(store, attempt, step, write, build):
    key = fmt.data_key(step, attempt.number)
    with store.writer(key, attempt.number) as sink:
        commit._fill(sink, write)
        manifest = build(DataFile(key.split("/")[1], sink.size_bytes, sink.digest()))
        check_fence(store, attempt)
        store.create(manifest.key, fmt.to_bytes(manifest), attempt.number)
        sink.commit()
    return manifest


def told_before_written(save, write, check):
    buffer = io.BytesIO()
    write(buffer)
    data = buffer.getvalue()
    name = fmt.shard_name(save._step, save._attempt.number, save._world.rank)
    save._file = DataFile(name, len(data), f"blake3:{blake3(data).hexdigest()}")
    save.write_late = write


def written_when_told(save, *, end=RankSave.end, **options):
    end(save, **options)
    write_shard(save._store, save._attempt, save._step, save._world.rank, save.write_late)


def problems_unheard(words, commit, costs, outcome=rank_save._outcome):
    return outcome([word for word in words if "problem" not in word] or words, commit, costs)


def own_of_the_first(parts, payload, ranks, give=ShardFiles.give_own):
    parts.keeps_own = {0}
    give(parts, payload, [0])
    payload["rng"] = payload["rng"][:1] * len(payload["rng"])


def unsynced_commit(sink, *, exclusive=False):
    with local._storage_errors(sink.key, "write"):
        fd, sink._fd = sink._fd, -1
        SimulatedPath.system.close(fd)
        if exclusive:
            folders.take_name(sink.temp, sink._path)
        else:
            SimulatedPath.system.replace(sink.temp, sink._path)
        folders.fsync_folder(sink._path.parent)


def not_exclusive(store, key, data, attempt, creates=RemoteStore.create):
    if store.is_local or key.startswith(fmt.ATTEMPTS):
        store.write(key, data, attempt)
    else:
        creates(store, key, data, attempt)


def unverified(history, verified, policy, to_delete=retention.to_delete):
    return to_delete(history, {m.name for m in history}, policy)


def empty_if_away(store, known, listed=catalog._list):
    try:
        return listed(store, known)
    except StorageError:
        return Catalog(known=known)


def delete_all(store, attempt, written):
    for name in written:
        store.delete(name)


def unsynced_folders(path):
    path.mkdir(parents=True, exist_ok=True)


def nothing(*arguments: Any, **options: Any) -> None:
    pass


def none(*arguments: Any, **options: Any) -> list[str]:
    return []


MUTATIONS: dict[str, tuple[str, str, list[tuple[Any, str, Any]]]] = {
    # what is changed: (the shape of a run, what is found, how it is changed)
    "the manifest comes before the data": (
        "a disk",
        "missing|wrong|no manifest|other bytes",
        [(commit, "_commit", manifest_first), (commit, "check_readable", nothing)],
    ),
    "a word is told before its shard is durable": (
        "shards on a disk",
        "missing",
        [(RankSave, "write", told_before_written), (RankSave, "end", written_when_told)],
    ),
    "what lacks in a shard is not heeded": (
        "shards on a disk",
        "missing|no manifest|was promised",
        [(rank_save, "_outcome", problems_unheard)],
    ),
    "all ranks get what rank 0 had for itself": (
        "shards on a disk",
        "as its own",
        [(ShardFiles, "give_own", own_of_the_first)],
    ),
    "the upload of another rank is not awaited": (
        "shards on a disk and in a bucket",
        "missing",
        [
            (ShardUploads, "_heard", lambda *_: {"problem": ""}),
            (shard_uploads, "_complete", nothing),
        ],
    ),
    "no fence before the manifest": (
        "a disk",
        "though it was superseded",
        [(commit, "check_fence", nothing)],
    ),
    "a claim in a directory is not exclusive": (
        "a disk",
        "are both attempt",
        [(LocalStore, "create", not_exclusive)],
    ),
    "a claim in a bucket is not exclusive": (
        "a bucket",
        "are both attempt",
        [(RemoteStore, "create", not_exclusive)],
    ),
    "a start does not look again after its claim": (
        "a disk",
        "was promised",
        [(claim, "_check_not_overtaken", nothing)],
    ),
    "digests are not compared": (
        "a disk",
        "of two states|holds another state",
        [(load, "compare", nothing)],
    ),
    "digests of shards are not compared": (
        "shards on a disk",
        "of two states|holds another state",
        [(load, "compare", nothing)],
    ),
    "retention counts what nobody has verified": (
        "a disk",
        "is to be kept",
        [(retention, "to_delete", unverified)],
    ),
    "retention deletes what is to be uploaded": (
        "a disk and a bucket",
        "before it was uploaded",
        [(Uploader, "pinned", lambda uploader: set())],
    ),
    "unfinished data is not swept": ("a disk", "left over", [(retention, "_sweep", none)]),
    "files are not made durable": (
        "a disk",
        "after a power loss",
        [(LocalSink, "commit", unsynced_commit)],
    ),
    "names are not made durable": (
        "a disk",
        "after a power loss",
        [(local, "fsync_folder", nothing), (folders, "fsync_folder", nothing)],
    ),
    "new folders are not made durable": (
        "a disk",
        "after a power loss",
        [(local, "make_all", unsynced_folders)],
    ),
    "a store that is away looks empty": (
        "a disk and a bucket",
        "was promised|are both attempt",
        [(catalog, "_list", empty_if_away)],
    ),
    "a failed commit deletes the data of a manifest that may still come": (
        "a bucket",
        "missing|to be kept",
        [(commit, "_clean_up", delete_all)],
    ),
}


# Where no earlier seed has what it takes: damage, or a bucket that is away at a start.
FIRST = {
    "what lacks in a shard is not heeded": 10,
    "digests are not compared": 60,
    "digests of shards are not compared": 50,
    "a store that is away looks empty": 60,
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutation_is_found(mutation, monkeypatch):
    shape, found, changes = MUTATIONS[mutation]
    for owner, name, changed in changes:
        monkeypatch.setattr(owner, name, changed)
    with pytest.raises(SimulationError, match=found):
        for seed in seeds(OF_A_MUTATION, FIRST.get(mutation, 0)):
            Simulation(seed, shape).run()
