"""Folders of safetensors files as Hugging Face lays them out: written, read, and taken by parts."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from programs import live
from torch import nn

import harness
from harness.cli import main
from harness.errors import DamagedError, UsageError
from harness.hf.hf_folder import hf_files, mapped, save_hf
from harness.hf.safetensors_file import mapped_safetensors, save_safetensors

STATE = {
    "one": torch.arange(6.0).reshape(2, 3),
    "odd": torch.arange(3, dtype=torch.uint8),
    "half": torch.arange(5.0).to(torch.bfloat16),
    "none": torch.empty(0, 4),
    "scalar": torch.tensor(3, dtype=torch.int64),
}


def test_what_is_written_is_read_in_one_file_or_in_several(tmp_path: Path) -> None:
    for most_bytes in (1, 30, 1 << 20):
        folder = tmp_path / str(most_bytes)
        folder.mkdir()
        save_hf(folder, STATE, {"format": "pt"}, most_bytes)
        files = hf_files(folder)
        assert (len(files) == 1) == (most_bytes == 1 << 20)
        assert {file.stat().st_mode & 0o777 for file in files} == {0o644}
        found = mapped(folder)
        assert found.keys() == STATE.keys()
        for key, value in STATE.items():
            assert found[key].dtype == value.dtype and torch.equal(found[key], value), key


def test_a_folder_of_other_files_is_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert hf_files(tmp_path) == [] == hf_files(tmp_path / "nothing")


def test_the_index_says_which_file_has_a_tensor(tmp_path: Path) -> None:
    for name, value in (("a", 1.0), ("b", 2.0)):
        save_safetensors(tmp_path / f"{name}.safetensors", {"x": torch.full((2,), value)}, {})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}))
    with pytest.raises(DamagedError, match="places y in b"):
        mapped(tmp_path)
    index.write_text(json.dumps({"weight_map": {"x": "a.safetensors"}}))
    assert torch.equal(mapped(tmp_path)["x"], torch.ones(2))


def test_a_run_that_holds_an_export_of_itself_is_a_run(tmp_path: Path) -> None:
    assert live(tmp_path, SHARDED, "run").codes == [0]
    run = tmp_path / "run"
    assert main(["export", str(run), str(tmp_path / "model.pt")]) == 0
    stale = {key: torch.zeros_like(value) for key, value in read(tmp_path / "model.pt").items()}
    save_safetensors(run / "model.safetensors", stale, {})
    assert main(["export", str(run), str(tmp_path / "again.pt")]) == 0
    assert torch.equal(
        read(tmp_path / "again.pt")["0.weight"], read(tmp_path / "model.pt")["0.weight"]
    )


def read(path: Path) -> dict[str, torch.Tensor]:
    return dict(torch.load(path, weights_only=True))


@pytest.mark.parametrize(
    "index",
    [
        "nonsense",
        "[]",
        '{"weight_map": {"one": "../secret.safetensors"}}',
        '{"weight_map": {"one": "gone.safetensors"}}',
        '{"weight_map": {"one": 3}}',
    ],
)
def test_an_index_that_names_what_is_not_there_is_damage(tmp_path: Path, index: str) -> None:
    (tmp_path / "secret.safetensors").write_bytes(b"not of the model")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(DamagedError):
        hf_files(folder)


@pytest.mark.parametrize("offsets", [[0, 999], [-8, 16], [0, 8], [8, 0]])
def test_a_header_that_points_elsewhere_is_damage(tmp_path: Path, offsets: list[int]) -> None:
    header = json.dumps({"one": {"dtype": "F32", "shape": [6], "data_offsets": offsets}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 24)
    with pytest.raises(DamagedError):
        mapped_safetensors(path)
    with pytest.raises(DamagedError):
        harness.load_weights(nn.Linear(2, 3), tmp_path)


def test_a_model_is_exported_and_loaded_and_an_existing_folder_is_left(tmp_path: Path) -> None:
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    out = tmp_path / "hf"
    command = ["export", str(tmp_path / "model.pt"), str(out), "--format", "hf"]
    assert main([*command, "--file-size", "nothing"]) == 78
    assert main(command) == 0 and main(["show", str(out)]) == 0
    assert main(command) == 78 and main([*command[:2], "s3://b/x", *command[3:]]) == 78
    assert "loaded 2 of 2 tensors" in harness.load_weights(other, out)
    assert torch.equal(other.weight, model.weight)
    with pytest.raises(UsageError):
        harness.load_weights(nn.Linear(4, 2), out)
    assert [path.name for path in tmp_path.iterdir() if "tmp" in path.name] == []


SHARDED = """
from torch.distributed.fsdp import fully_shard

run = init()
torch.manual_seed(run.world_size)
model = nn.Sequential(nn.Linear(8, 5), nn.BatchNorm1d(5), nn.Linear(5, 5), nn.Linear(5, 1))
model[3].weight = nn.Parameter(model[3].weight.detach())
if run.world_size > 1:
    fully_shard(model[0])
    fully_shard(model)
if len(sys.argv) > 2:
    print(harness.load_weights(model, sys.argv[2]))
if "FROM" in os.environ:
    harness.warm_start(run, model, os.environ["FROM"])
optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
run.track(model=model, optimizer=optimizer)
for x, y in run.batches(points(), 12, epochs=1, max_steps=1):
    model.eval()
    (model(x) - y).square().mean().backward()
    optimizer.step()
"""


@pytest.mark.parametrize("kind", ["hf", "weights"])
def test_a_sharded_model_begins_with_the_weights_of_a_file(tmp_path: Path, kind: str) -> None:
    """Each rank reads the parts that it holds."""
    first = live(tmp_path, SHARDED, "first", ranks=1)
    out = tmp_path / ("hf" if kind == "hf" else "model.pt")
    assert first.codes == [0], first.texts
    assert main(["export", str(tmp_path / "first"), str(out), "--format", kind]) == 0
    second = live(tmp_path, SHARDED, "second", ranks=2, env={"FROM": str(out)})
    assert second.codes == [0, 0] and "loaded 11 of 11 tensors" in second.text, second.texts
    assert main(["export", str(tmp_path / "second"), str(tmp_path / "again.pt")]) == 0
    assert main(["export", str(tmp_path / "first"), str(tmp_path / "first.pt")]) == 0
    one, other = (
        torch.load(tmp_path / name, weights_only=True) for name in ("first.pt", "again.pt")
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_file_that_does_not_fit_a_sharded_model_is_refused_on_all_ranks(tmp_path: Path) -> None:
    torch.save({"0.weight": torch.zeros(5, 9)}, tmp_path / "other.pt")
    life = live(tmp_path, SHARDED, "run", ranks=2, env={"FROM": str(tmp_path / "other.pt")})
    assert life.codes == [78, 78] and "does not fit" in life.text, life.texts


def test_weights_for_a_model_on_the_device_meta_are_refused(tmp_path: Path) -> None:
    """torch drops what is loaded there, with a warning."""
    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "model.pt")
    with torch.device("meta"):
        model = nn.Linear(3, 2)
    with pytest.raises(UsageError, match=r"2 tensor.s. of the model are on the device meta"):
        harness.load_weights(model, tmp_path / "model.pt")
