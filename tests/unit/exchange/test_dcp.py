"""Folders of torch.distributed.checkpoint: read without running anything, imported, written."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from programs import live
from recipe_runs import TASK, newest
from recipes import Net, points
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.functional import cross_entropy

import harness
from harness.cli import main
from harness.errors import DamagedError, HarnessError, UsageError
from harness.sharding.dcp_folder import read_dcp
from harness.sharding.dcp_state import optimizers_by_name

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is", "ignore:TypedStorage")
dcp: Any = torch_dcp  # torch does not list what it exports

# What a script without the harness saves: FSDP2 on two ranks, by DCP's own helpers.
SCRIPT = """
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.fsdp import fully_shard

torch.set_num_threads(1)
dist.init_process_group("gloo")
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 13), nn.BatchNorm1d(13), nn.ReLU(), nn.Linear(13, 1))
fully_shard(model[0])
fully_shard(model)
groups = [
    {"params": [model[0].weight, model[3].weight]},
    {"params": [model[0].bias, *model[1].parameters(), model[3].bias], "weight_decay": 0.0},
]
optimizer = torch.optim.AdamW(groups, lr=0.01)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
for _ in range(3):
    model(torch.randn(4, 8)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    scheduler.step()
whole = lambda value: value.full_tensor() if hasattr(value, "full_tensor") else value
moments = [
    {key: whole(value) for key, value in optimizer.state[parameter].items()}
    for group in optimizer.param_groups for parameter in group["params"]
]
weights = {key: whole(value) for key, value in model.state_dict().items()}
for flat in (False, True):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    of_model, of_optimizer = get_state_dict(model, optimizer, options=options)
    state = {"model": of_model} if not flat else of_model
    dcp.save(
        state | {"optimizer": of_optimizer, "scheduler": scheduler.state_dict(), "step": 3},
        checkpoint_id=f"{sys.argv[1]}/{'flat' if flat else 'nested'}",
    )
if dist.get_rank() == 0:
    torch.save([weights, moments], f"{sys.argv[1]}/whole.pt")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dcp")
    (folder / "run").mkdir()
    lived = live(folder, SCRIPT, "run", ranks=2)
    assert lived.codes == [0, 0], lived.texts
    return folder / "run"


def is_same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return bool(a == b)


@pytest.mark.parametrize("form", ["nested", "flat"])
def test_what_pytorch_has_saved_is_read_whole(saved: Path, form: str) -> None:
    weights, moments = torch.load(saved / "whole.pt", weights_only=True)
    state, facts = read_dcp(saved / form)
    assert facts == {} and state["step"] == 3 and state["scheduler"]["last_epoch"] == 3
    assert state["model"].keys() == weights.keys()
    assert all(is_same(state["model"][key], value) for key, value in weights.items())
    groups = state["optimizer"]["param_groups"]
    names = [name for group in groups for name in group["params"]]
    assert names == [
        *("0.weight", "3.weight"),
        *("0.bias", "1.weight", "1.bias", "3.bias"),
    ]
    assert [group["weight_decay"] for group in groups] == [0.01, 0.0]
    for name, own in zip(names, moments, strict=True):
        assert all(is_same(state["optimizer"]["state"][name][key], own[key]) for key in own), name


def test_it_is_shown_and_gives_weights_to_a_module(
    saved: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    weights, _ = torch.load(saved / "whole.pt", weights_only=True)
    assert main(["show", str(saved / "nested")]) == 0
    shown = capfd.readouterr().out
    assert "torch.distributed.checkpoint" in shown and "Adam, AdamW" in shown, shown
    model = nn.Sequential(nn.Linear(8, 13), nn.BatchNorm1d(13), nn.ReLU(), nn.Linear(13, 1))
    harness.load_weights(model, saved / "flat")
    assert all(is_same(value, weights[key]) for key, value in model.state_dict().items())
    assert main(["export", str(saved / "nested"), str(tmp_path / "m.pt")]) == 0
    exported = torch.load(tmp_path / "m.pt", weights_only=True)
    assert all(is_same(value, weights[key]) for key, value in exported.items())
    assert main(["diff", str(saved / "nested"), str(saved / "nested")]) == 0


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model, data = Net(), points()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for at in range(4):
        x, y = data[8 * at : 8 * at + 8]
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, optimizer


def test_a_run_goes_on_from_it_with_weights_and_moments(tmp_path: Path) -> None:
    model, optimizer = trained()
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optim": moments}, checkpoint_id=tmp_path / "a", no_dist=True)
    harness.import_checkpoint(tmp_path / "a", tmp_path / "run", settings=TASK, epoch=1)
    payload = newest(tmp_path / "run")
    assert all(is_same(v, model.state_dict()[k]) for k, v in payload["model_state_dict"].items())
    live_state = optimizer.state_dict()["state"]
    assert payload["optimizer_state_dict"]["state"].keys() == live_state.keys()
    for number, own in payload["optimizer_state_dict"]["state"].items():
        assert all(is_same(value, live_state[number][key]) for key, value in own.items())


def test_what_is_written_is_loaded_by_pytorch(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model, optimizer = trained()
    torch.save(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 1},
        tmp_path / "file.pt",
    )
    harness.import_checkpoint(tmp_path / "file.pt", tmp_path / "run", settings=TASK)
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--format", "dcp"]) == 0
    assert 'dcp.load({"model": weights, "optimizer": moments}' in capfd.readouterr().out
    other = Net()
    its = torch.optim.SGD(other.parameters(), lr=0.5, momentum=0.1)
    weights, moments = get_state_dict(other, its)
    state: dict[str, Any] = {"model": weights, "optimizer": moments}
    dcp.load(state, checkpoint_id=tmp_path / "out", no_dist=True)
    set_state_dict(other, its, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    assert all(is_same(v, model.state_dict()[k]) for k, v in other.state_dict().items())
    (group,) = newest(tmp_path / "run")["optimizer_state_dict"]["param_groups"]
    assert all(its.param_groups[0][key] == group[key] for key in ("lr", "momentum"))
    for number, own in optimizer.state_dict()["state"].items():
        loaded = its.state_dict()["state"][number]
        assert all(is_same(loaded[key], value) for key, value in own.items())
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--format", "dcp"]) == 78


class Runs:
    """An object whose pickle makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def changed(folder: Path, change: Callable[[Metadata], object]) -> None:
    path = folder / ".metadata"
    found = pickle.loads(path.read_bytes())
    change(found)
    path.write_bytes(pickle.dumps(found))


def first_info(found: Metadata) -> Any:
    return next(iter(found.storage_data.values()))


def without_last_piece(found: Metadata) -> None:
    described: Any = found.state_dict_metadata["model.0.weight"]
    described.chunks.pop()


def claims(found: Metadata) -> None:
    described: Any = found.state_dict_metadata["model.0.weight"]
    described.size = torch.Size([1 << 40, 8])
    described.chunks[0].offsets = torch.Size([0, 0])
    described.chunks[0].sizes = torch.Size([1 << 40, 8])
    del described.chunks[1:]


def negative(found: Metadata) -> None:
    described: Any = found.state_dict_metadata["model.0.weight"]
    described.size = torch.Size([-4, 8])


def flip_a_piece(folder: Path) -> None:
    found = pickle.loads((folder / ".metadata").read_bytes())
    pieces = found.storage_data.items()
    info = next(of for index, of in pieces if index.fqn == "model.0.weight")
    path = folder / info.relative_path
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(io.BytesIO(content[info.offset : info.offset + info.length])) as records:
        record = next(each for each in records.infolist() if "/data/" in each.filename)
    header = info.offset + record.header_offset
    name, extra = struct.unpack("<HH", content[header + 26 : header + 30])
    content[header + 30 + name + extra] ^= 1
    path.write_bytes(content)


def link_out(folder: Path) -> None:
    (folder / "__1_0.distcp").rename(folder.parent / "elsewhere")
    (folder / "__1_0.distcp").symlink_to(folder.parent / "elsewhere")


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "code": (
        lambda folder: (folder / ".metadata").write_bytes(pickle.dumps(Runs(folder / "made"))),
        "may be made to run code",
    ),
    "code inside": (
        lambda folder: changed(
            folder, lambda found: found.planner_data.update(x=Runs(folder / "made"))
        ),
        "may be made to run code",
    ),
    "no pickle": (lambda folder: (folder / ".metadata").write_bytes(b"abc"), "no metadata"),
    "a plain value": (
        lambda folder: (folder / ".metadata").write_bytes(pickle.dumps({"a": 1})),
        "no metadata",
    ),
    "a path that leads out": (
        lambda folder: changed(
            folder, lambda found: setattr(first_info(found), "relative_path", "../whole.pt")
        ),
        "which is not there",
    ),
    "a piece beyond the end": (
        lambda folder: changed(folder, lambda found: setattr(first_info(found), "offset", 1 << 40)),
        "cut short",
    ),
    "a piece before the beginning": (
        lambda folder: changed(folder, lambda found: setattr(first_info(found), "offset", -5)),
        "at no place",
    ),
    "a hole": (lambda folder: changed(folder, without_last_piece), "elements are there"),
    "a negative length": (
        lambda folder: changed(folder, negative),
        "has lengths that are none",
    ),
    "a number that takes memory": (
        lambda folder: (folder / ".metadata").write_bytes(b"\x80\x02Nr\xff\xff\xff\x07."),
        "more objects than it can hold",
    ),
    "a flipped bit": (flip_a_piece, "checksum|damaged|CRC"),
    "a value at the place of others": (
        lambda folder: changed(folder, lambda found: found.planner_data.update(step=("model",))),
        "at no place",
    ),
    "a link": (link_out, "which is not there"),
    "terabytes": (lambda folder: changed(folder, claims), "claims 35184.4 GB"),
    "a file that is gone": (lambda folder: (folder / "__1_0.distcp").unlink(), "not there"),
    "compressed pieces": (
        lambda folder: changed(
            folder,
            lambda found: setattr(first_info(found), "transform_descriptors", ["zstd"]),
        ),
        "compressed pieces",
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_nothing_in_a_folder_is_run_or_believed(saved: Path, tmp_path: Path, kind: str) -> None:
    harm, words = HOSTILE[kind]
    folder = tmp_path / "folder"
    shutil.copytree(saved / "nested", folder)
    shutil.copy(saved / "whole.pt", tmp_path)  # outside of the folder
    harm(folder)
    with pytest.raises((DamagedError, UsageError), match=words):
        read_dcp(folder)
    assert not (folder / "made").exists()
    for command in (["show", str(folder)], ["export", str(folder), str(tmp_path / "m.pt")]):
        assert main(command) in (0, 1, 78) and not (folder / "made").exists()


def test_a_value_that_needs_code_is_named_and_not_loaded(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    dcp.save(
        {"model": {"a": torch.ones(3)}, "extra": Path("x")},
        checkpoint_id=tmp_path / "a",
        no_dist=True,
    )
    state, facts = read_dcp(tmp_path / "a")
    assert facts == {"needs code": "extra (not loaded)"} and "extra" not in state
    assert main(["show", str(tmp_path / "a")]) == 0
    assert "extra (not loaded)" in capfd.readouterr().out


def test_a_piece_that_unpacks_to_more_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    dcp.save({"model": {"a": torch.zeros(1 << 20)}}, checkpoint_id=folder, no_dist=True)
    (file,) = folder.glob("*.distcp")
    small = io.BytesIO()
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(small, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    content = small.getvalue()
    file.write_bytes(content + bytes(5 << 20))
    changed(folder, lambda found: setattr(first_info(found), "length", len(content)))
    with pytest.raises(HarnessError, match="unpack to"):
        read_dcp(folder)


def test_an_optimizer_whose_parameters_cannot_be_told_is_left_out() -> None:
    optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"params": [0]}]}
    for shape, names in (((4,), ["w"]), ((3,), None)):  # of a buffer beside the parameter
        model = {"w": torch.zeros(3), "mask": torch.zeros(shape)}
        payload = {"model_state_dict": model, "optimizer_state_dict": optimizer}
        found, left_out = optimizers_by_name(payload, "model")
        assert left_out == ([] if names else ["optimizer"])
        assert [own["param_groups"][0]["params"] for own in found.values()] == [names] * bool(names)


def saved_alone(folder: Path, state: dict[str, Any]) -> dict[str, Any]:
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    return read_dcp(folder)[0]


def test_an_optimizer_with_numbered_parameters_is_left_out_and_that_is_said(tmp_path: Path) -> None:
    """DCP does not keep the order of a model's tensors: moments would go to other parameters."""
    model, optimizer = trained()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    assert saved_alone(tmp_path / "a", state).keys() == {"model"}
    assert "optimizer" in read_dcp(tmp_path / "a")[1]["left out"]
    said = harness.import_checkpoint(tmp_path / "a", tmp_path / "run", settings=TASK, epoch=1)
    assert "optimizer: not taken from the file" in said
    assert newest(tmp_path / "run")["optimizer_state_dict"]["state"] == {}


def test_a_model_at_the_top_keeps_all_its_tensors(tmp_path: Path) -> None:
    one = torch.ones(3)
    named = {
        "state": {"token": {"m": one}},
        "param_groups": [{"lr": 0.1, "params": ["token", "s"]}],
    }
    state = {"a.w": one, "token": one, "s": torch.tensor(2.0), "step": torch.tensor(5)}
    found = saved_alone(tmp_path / "a", state | {"optimizer": named})
    assert found["model"].keys() == {"a.w", "token", "s"} and int(found["step"]) == 5


def test_what_one_object_holds_and_what_is_empty_is_found(tmp_path: Path) -> None:
    empty = {"state": {}, "param_groups": [{"lr": 0.1, "params": ["a"]}]}
    of_app = {"app": {"model": {"a": torch.ones(3)}, "optim": empty}}
    found = saved_alone(tmp_path / "a", of_app)
    assert found["optim"] == empty and torch.equal(found["model"]["a"], torch.ones(3))


def test_lists_come_back_in_their_order(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    saved_alone(
        folder, {"model": {"a": torch.ones(3)}, "list": [torch.tensor(n) for n in range(3)]}
    )

    def turn_round(found: Metadata) -> None:
        found.state_dict_metadata = dict(reversed(found.state_dict_metadata.items()))

    changed(folder, turn_round)
    assert [int(item) for item in read_dcp(folder)[0]["list"]] == [0, 1, 2]
