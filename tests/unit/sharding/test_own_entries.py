"""What each rank of a sharded run has for itself lies in its shard, and comes back to that rank
alone; format 3, in which the main file held it, is resumed as before."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from library_runs import newest, steps_of
from older_runs import LAST, RELEASES, SHARDED, live_once
from programs import SHARDED as MODEL
from programs import STEP, Lived, live, printed

from harness.checkpoint import load
from harness.checkpoint.catalog import read_catalog
from harness.cli import main
from harness.errors import DamagedError
from harness.exchange.compare import differences
from harness.exchange.files import read_any
from harness.sharding.shards import ShardFiles, made_whole
from harness.store import LocalStore

SLOW = pytest.mark.slow
LOST = "what each rank had for itself is lost (attributes, generators, model_state_dict, state); of"


LONGER = SHARDED.replace("epochs=2", "epochs=9")  # for several lives, one after another


def shards_of(run: Path, step: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The main file of a step, and the shards beside it, as torch reads them."""
    (stem,) = {path.with_suffix("") for path in run.glob(f"checkpoints/step_{step:08d}-*.pt")}
    shards = sorted(stem.glob("*.pt"))
    return torch.load(f"{stem}.pt", weights_only=True), [
        torch.load(path, weights_only=True) for path in shards
    ]


def parts_of(told: Path, name: str, ranks: int, what: str = "seen") -> list[dict[str, Any]]:
    """What each rank has told of itself in its last life."""
    return [
        torch.load(told / f"{name}.{what}.{rank}.pt", weights_only=False) for rank in range(ranks)
    ]


def check_own(seen: dict[str, Any], rng: dict[str, Any], own: dict[str, Any]) -> None:
    """A rank has begun with this of its own."""
    assert torch.equal(seen["torch"], rng["torch"])
    assert seen["python"] == tuple(rng["python"]["words"].tolist())
    assert (seen["numpy"] == rng["numpy"]["key"].numpy()).all()
    assert torch.equal(seen["noise"], own["generators"]["noise"]["state"])
    assert seen["warmth"] == own["attributes"]["model"][""]["warmth"]["now"]
    values = {tuple(path): value for path, value in own["model_state_dict"]}
    assert torch.equal(seen["means"], values[("layers.1.running_mean",)])
    assert seen["state"]["samples"] == {tuple(p): v for p, v in own["state"]}[("samples",)]


def said(lived: Lived) -> list[str]:
    """What was said of the ranks at a start."""
    return [line for line in lived.text.splitlines() if "rank(s) before" in line or "noise" in line]


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=SLOW)])
def test_each_rank_gets_its_own_back_after_a_kill(tmp_path: Path, ranks: int) -> None:
    whole = live_once(tmp_path, "whole", SHARDED, ranks)
    assert whole.codes == [0] * ranks, whole.texts
    assert live_once(tmp_path, "run", SHARDED, ranks, DIE="9").code < 0
    _, shards = shards_of(tmp_path / "run", 6)
    again = live_once(tmp_path, "run", SHARDED, ranks)
    assert again.codes == [0] * ranks and "resumes from step 6" in again.text, again.texts
    assert "warning" not in again.text and not said(again), again.text
    seen = parts_of(tmp_path, "run", ranks)
    for rank, shard in enumerate(shards):
        assert shard["own"].keys() == {
            "rng", "iterator", "attributes", "generators", "model_state_dict", "state",
        }  # fmt: skip
        check_own(seen[rank], shard["own"]["rng"], shard["own"])
    assert not torch.equal(seen[0]["torch"], seen[1]["torch"])
    assert not torch.equal(seen[0]["means"], seen[1]["means"])
    rows = list(differences(newest(tmp_path / "whole"), newest(tmp_path / "run")))
    assert rows == [], rows
    for one, other in zip(
        *(parts_of(tmp_path, name, ranks, "last") for name in ("whole", "run")), strict=True
    ):
        assert one["whole"] == other["whole"] and one["warmth"] == other["warmth"]
        for key in ("means", "noise", "torch"):
            assert torch.equal(one[key], other[key]), key


SENT = """
import pickle
import torch.distributed as dist

gather = dist.gather_object


def counted(value, *rest, **named):
    print("sent", len(pickle.dumps(value)), flush=True)
    return gather(value, *rest, **named)


dist.gather_object = counted
"""


def test_the_main_file_says_of_the_ranks_only_how_many_they_are(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sizes = dict[int, int]()
    for ranks in (2, 4):
        run = tmp_path / f"run{ranks}"
        lived = live_once(tmp_path, run.name, SENT + SHARDED, ranks, STOP="3")
        sent = printed(lived, "sent")  # to the writer, in a save
        assert len(sent) >= ranks and max(sent) < 500, sent
        step = steps_of(run)[-1]
        file, shards = shards_of(run, step)
        assert file.keys() & {"rng", "own"} == set() and "iterators" not in file["data"]
        assert file["ranks"].pop("attributes")["model"][""]["warmth"]["built"] == 1.0
        assert file["ranks"] == {
            "data_ranks": [*range(ranks)],
            "own": ["attributes", "generators", "model_state_dict", "state"],
            "has_iterators": False,
        }
        assert (file["format_version"], len(shards)) == (4, ranks)
        (path,) = run.glob(f"checkpoints/step_{step:08d}-*.pt")
        sizes[ranks] = path.stat().st_size
        # Those who read a checkpoint find what they would find in one file.
        read = read_any(run).value
        assert [len(read[key]) for key in ("rng", "own")] == [ranks, ranks]
        assert read["data"]["iterators"] == [None] * ranks and "ranks" not in read
        assert torch.equal(read["rng"][1]["torch"], shards[1]["own"]["rng"]["torch"])
    # The generators of two more ranks alone would be 30 kB.
    assert abs(sizes[4] - sizes[2]) < 256, sizes
    capfd.readouterr()
    assert main(["show", str(run)]) == 0
    assert "warmth = " in capfd.readouterr().out
    assert main(["export", str(run), str(tmp_path / "model.pt")]) == 0
    assert main(["verify", str(run)]) == 0 and main(["diff", str(run), str(run)]) == 0


@pytest.fixture
def older(tmp_path: Path) -> Path:
    """A run of format 3, as the code that wrote that has left it."""
    shutil.copytree(RELEASES / "0.1.0" / "sharded", tmp_path / "run")
    return tmp_path / "run"


def test_a_checkpoint_of_format_3_is_resumed_by_as_many_ranks(older: Path) -> None:
    file, shards = shards_of(older, LAST)
    assert (file["format_version"], len(file["rng"]), "own" in shards[0]) == (3, 2, False)
    for command in ("show", "verify"):
        assert main([command, str(older)]) == 0
    assert [*read_any(older).value["rng"]] and main(["diff", str(older), str(older)]) == 0
    again = live_once(older.parent, "run", SHARDED)
    assert again.codes == [0, 0] and f"resumes from step {LAST} " in again.text, again.texts
    assert "differ" not in again.text and not said(again)
    seen = parts_of(older.parent, "run", 2)
    for rank in range(2):
        check_own(seen[rank], file["rng"][rank], file["own"][rank])
    manifest = read_catalog(LocalStore(older)).manifests[-1]
    assert (manifest.step, manifest.format_version) == (16, 4)


@pytest.mark.parametrize("form", [3, pytest.param(4, marks=SLOW)])
def test_another_number_of_ranks_says_and_does_the_same_in_both_formats(
    older: Path, form: int
) -> None:
    folder = older.parent
    if form == 4:
        shutil.rmtree(older)
        assert live_once(folder, "run", LONGER, STOP=str(LAST)).codes == [0, 0]
    before = newest(older)
    ways = [(3, 2), (1, 3), (2, 1)] if form == 4 else [(3, 2)]
    for ranks, were in ways:
        lived = live_once(folder, "run", LONGER, ranks, STOP=str(before["step"] + 1))
        assert lived.codes == [0] * ranks, lived.texts
        lines = "\n".join(said(lived))
        assert f"{were} rank(s) before, {ranks} now: same samples" in lines, lived.text
        if were > 1:
            assert f"{were} rank(s) before, {ranks} now: {LOST}" in lines, lived.text
        seen = parts_of(folder, "run", ranks)
        for rank in range(ranks):
            assert seen[rank]["step"] == before["step"]
            if rank < were:  # the generators of the rank of that number, and no other's
                assert torch.equal(seen[rank]["torch"], before["rng"][rank]["torch"])
            values = before["model_state_dict"]
            assert torch.equal(seen[rank]["means"], values["layers.1.running_mean"])
        before = newest(older)
        assert len(before["rng"]) == ranks


def test_shards_and_main_files_that_do_not_belong_together_are_damage(older: Path) -> None:
    store = LocalStore(older)
    old = read_catalog(store).manifests[-1]
    payload = load.load(store, old) | {"format_version": 4}
    with pytest.raises(DamagedError, match=r"\.pt is not what .*") as error:
        ShardFiles((store,), old, dict(payload))
    assert "nothing of the ranks" in str(error.value)
    said_of = {"data_ranks": [0, 1], "own": [], "has_iterators": False}
    with pytest.raises(DamagedError, match="for itself"):  # shards of format 3
        made_whole(store, old, dict(payload) | {"ranks": said_of})
    for wrong in ({"data_ranks": [0]}, {"data_ranks": [0, 7]}, {"own": 1}, {"has_iterators": 0}):
        with pytest.raises(DamagedError, match="nothing of the ranks"):
            ShardFiles((store,), old, dict(payload) | {"ranks": said_of | wrong})


MESHES = """
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel, RowwiseParallel, parallelize_module,
)

run = init()
torch.manual_seed(3)
model = nn.Sequential(nn.Linear(8, 14), nn.ReLU(), nn.Dropout(0.1), nn.Linear(14, 1))
if run.world_size == 4:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "3": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
else:
    fully_shard(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
run.track(model=model, optimizer=optimizer)
first = run.step + 1
for x, y in run.batches(points(), 12, epochs=2, max_steps=6 if run.world_size == 4 else 8):
    if run.step == first:
        torch.save(torch.get_rng_state(), f"generator.{run.rank}.pt")
    loss = (model(x) - y).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
"""


@pytest.mark.slow
def test_generators_of_another_mesh_are_read_from_the_shard_that_has_them(tmp_path: Path) -> None:
    """Rank 1 of two goes on with the samples of ranks 2 and 3 of four, and keeps shards 1 and 3."""
    for ranks in (4, 2):
        lived = live(tmp_path, MESHES, "run", ranks=ranks)
        assert lived.codes == [0] * ranks, lived.texts
        if ranks == 4:
            _, shards = shards_of(tmp_path / "run", 6)
    assert "resumes from step 6" in lived.text, lived.text
    assert not torch.equal(shards[1]["own"]["rng"]["torch"], shards[2]["own"]["rng"]["torch"])
    for rank, number in enumerate((0, 2)):
        begun = torch.load(tmp_path / f"generator.{rank}.pt", weights_only=True)
        assert torch.equal(begun, shards[number]["own"]["rng"]["torch"]), rank


STREAM = """
from torch.distributed.fsdp import fully_shard


class Stream(IterableDataset):
    def __init__(self):
        self.at = 0

    def __iter__(self):
        while self.at < 60:
            self.at += 1 + run.rank
            yield torch.full((8,), self.at / 60), torch.ones(1)

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]
        print("goes on at", self.at, flush=True)


run = init()
SHARDED
for x, y in run.batches(Stream(), 6, epochs=1, max_steps=9):"""


@pytest.mark.slow
def test_each_rank_goes_on_in_its_own_stream_and_other_ranks_cannot(tmp_path: Path) -> None:
    source = STREAM.replace("SHARDED", MODEL) + STEP
    killed = live(tmp_path, source, "run", ranks=2, env={"DIE": "8"})
    assert killed.code < 0 and steps_of(tmp_path / "run")[-1] == 6, killed.texts
    file, shards = shards_of(tmp_path / "run", 6)
    assert file["ranks"]["has_iterators"]
    assert all(shard["own"]["iterator"] is not None for shard in shards)
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    other = live(tmp_path, source, "other", ranks=3)
    assert set(other.codes) == {78} and "2 rank(s) before, 3 now" in other.text, other.texts
    again = live(tmp_path, source, "run", ranks=2)
    assert again.codes == [0, 0], again.texts
    places = [text.split("goes on at ")[1].split()[0] for text in again.texts]
    assert places[0] != places[1], places
