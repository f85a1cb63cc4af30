"""A start of a sharded model needs the memory of a rank's parts, and that of one tensor."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from programs import live, printed
from safetensors.torch import save_file

LAYERS, WIDTH = 24, 2048
PART_KB = LAYERS * WIDTH * WIDTH * 4 // 2 // 1024  # of each of two ranks
TENSOR_KB = WIDTH * WIDTH * 4 // 1024
BEGIN = f"""
import json
from torch.distributed.fsdp import fully_shard

run = init()


def held(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def built(layers, width):
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    for part in (*model, model):
        fully_shard(part)
    return model


def begin(model, folder):
    if folder is None:
        return harness.materialize(model)
    model.to_empty(device="cpu")
    harness.warm_start(run, model, folder)


file = os.environ.get("FILE")
begin(built(1, 8), file and f"{{file}}/small.safetensors")  # what is imported late
model = built({LAYERS}, {WIDTH})
open("/proc/self/clear_refs", "w").write("5")  # the peak begins here
before = held("VmRSS")
begin(model, file and f"{{file}}/{{os.environ['WHAT']}}")
print("PEAK", json.dumps(held("VmHWM") - before))
"""


@pytest.mark.parametrize("kind", ["init", "folder", "file"])
def test_a_start_needs_a_rank_s_parts_and_one_tensor(tmp_path: Path, kind: str) -> None:
    env = {}
    if kind != "init":
        for name, layers, width in (("small", 1, 8), ("hf/model", LAYERS, WIDTH)):
            weights = {f"{at}.weight": torch.ones(width, width) for at in range(layers)}
            (tmp_path / "hf").mkdir(exist_ok=True)
            save_file(weights, tmp_path / f"{name}.safetensors")
        env = {"FILE": str(tmp_path), "WHAT": "hf" if kind == "folder" else "hf/model.safetensors"}
    lived = live(tmp_path, BEGIN, "run", ranks=2, env=env)
    for peak_kb in printed(lived, "PEAK"):
        assert 0.9 * PART_KB < peak_kb <= 1.2 * PART_KB + TENSOR_KB, (peak_kb, PART_KB)


READ = """
import json
from torch.distributed.fsdp import fully_shard

run = init()
with torch.device("meta"):
    model = nn.Sequential(*(nn.Linear(1024, 4096, bias=False) for _ in range(4)))
fully_shard(model)
model.to_empty(device="cpu")


def read():
    lines = open("/proc/self/io").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


os.chdir(f"{os.environ['FILE']}/{run.rank}")  # each rank has a file of its own
file = "weights.safetensors"
with open(file, "rb") as opened:
    os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
before = read()
harness.load_weights(model, file)
print("READ", json.dumps(read() - before))
"""


def test_a_rank_reads_its_parts_of_safetensors_alone(tmp_path: Path) -> None:
    weights = {f"{at}.weight": torch.full((4096, 1024), float(at)) for at in range(4)}
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        save_file(weights, tmp_path / str(rank) / "weights.safetensors")
        with (tmp_path / str(rank) / "weights.safetensors").open("rb") as opened:
            os.fsync(opened.fileno())  # else it stays in memory
    lived = live(tmp_path, READ, "run", ranks=2, env={"FILE": str(tmp_path)})
    for read_bytes in printed(lived, "READ"):
        # 0 where the file system is memory
        assert read_bytes < 0.6 * 4 * 4096 * 1024 * 4, f"{read_bytes} bytes"
