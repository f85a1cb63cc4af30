"""The memory tier beside a sharded model: each rank keeps its part, and a restart on this machine
loses no more than the step that was under way."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from library_runs import newest, steps_of
from programs import Lived, live

from harness.checkpoint import memory_copy
from harness.checkpoint.catalog import read_catalog
from harness.exchange.compare import differences
from harness.store import LocalStore

PROGRAM = """
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel, RowwiseParallel, parallelize_module,
)
from harness.checkpoint import memory_copy
from harness.store import LocalStore
from pathlib import Path

run = init(memory=1, save_every_steps=6)
torch.manual_seed(3)
model = nn.Sequential(nn.Linear(8, 14), nn.ReLU(), nn.Dropout(0.1), nn.Linear(14, 1))
WRAP
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
run.track(model=model, optimizer=optimizer)
kept = memory_copy.place(LocalStore(sys.argv[1])).root / "checkpoints"


def arrived(step):
    # whether a step was saved, unless the attempt has begun with it
    names = [name.name for folder in (kept, Path(sys.argv[1], "checkpoints"))
             for name in folder.glob(f"step_{step:08d}-*.json")]
    return bool(names) or run.batch == BEGUN


BEGUN = run.batch
for x, y in run.batches(points(), 12, epochs=1, max_steps=12):
    loss = (model(x) - y).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    run.log(loss=loss)
    until = time.monotonic() + float(os.environ.get("WAIT", 30))
    while run.is_writer and run.step > 1 and not arrived(run.step - 1) and time.monotonic() < until:
        time.sleep(0.01)  # a step is left out of the tier while the save before is under way
    if run.step == int(os.environ.get("DIE", 0)):
        if run.is_writer:
            print("in memory", sorted(path.name for path in kept.iterdir()), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
"""
FSDP = "fully_shard(model)"
TP = (
    "parallelize_module(model, init_device_mesh('cpu', (2,)), "
    "{'0': ColwiseParallel(), '3': RowwiseParallel()})"
)


@pytest.fixture
def tier(tmp_path: Path) -> Iterator[Path]:
    """The folder of the tier of the run that is killed."""
    root = memory_copy.place(LocalStore(tmp_path / "run")).root
    yield root
    shutil.rmtree(root, ignore_errors=True)
    shutil.rmtree(memory_copy.place(LocalStore(tmp_path / "whole")).root, ignore_errors=True)


def lived(folder: Path, name: str, wrap: str = FSDP, *, ranks: int = 2, **env: str) -> Lived:
    return live(folder, PROGRAM.replace("WRAP", wrap), name, ranks=ranks, env=env)


@pytest.mark.parametrize(
    "wrap", [FSDP, pytest.param(TP, marks=pytest.mark.slow)], ids=["fsdp", "tp"]
)
def test_a_killed_run_goes_on_from_the_last_step(tmp_path: Path, tier: Path, wrap: str) -> None:
    whole = lived(tmp_path, "whole", wrap)
    assert whole.codes == [0, 0] and "not kept in memory" not in whole.text, whole.texts
    assert not memory_copy.place(LocalStore(tmp_path / "whole")).root.exists()
    killed = lived(tmp_path, "run", wrap, DIE="9")
    assert killed.codes[0] == -9 and steps_of(tmp_path / "run") == [6], killed.texts
    manifest = read_catalog(LocalStore(tier)).manifests[-1]  # the one before may be there still
    assert (manifest.step, len(manifest.shards), manifest.format_version) == (8, 2, 4)
    again = lived(tmp_path, "run", wrap)
    assert again.codes == [0, 0], again.texts
    assert "resumes from step 8" in again.text and "this machine's memory" in again.text
    assert steps_of(tmp_path / "run")[-1] == 12 and not tier.exists()
    rows = list(differences(newest(tmp_path / "whole"), newest(tmp_path / "run")))
    assert rows == [], (rows, again.texts)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["00000.pt", "00001.pt", "the folder"])
def test_what_is_damaged_in_memory_is_passed_over(tmp_path: Path, tier: Path, name: str) -> None:
    assert lived(tmp_path, "run", DIE="9").codes[0] == -9
    folder = tier / "checkpoints/step_00000008-0001"
    if name == "the folder":
        shutil.rmtree(folder)
    else:
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)
    again = lived(tmp_path, "run")
    assert again.codes == [0, 0] and "resumes from step 6" in again.text, again.texts
    assert not tier.exists()


@pytest.mark.slow
def test_another_number_of_ranks_takes_the_step_in_memory(tmp_path: Path, tier: Path) -> None:
    assert lived(tmp_path, "run", DIE="9").codes[0] == -9
    again = lived(tmp_path, "run", ranks=3)
    assert set(again.codes) == {0} and "resumes from step 8" in again.text, again.texts


@pytest.mark.slow
def test_what_a_killed_save_has_left_in_memory_goes_with_the_next_attempt(
    tmp_path: Path, tier: Path
) -> None:
    assert lived(tmp_path, "run", DIE="9").codes[0] == -9
    left = tier / "checkpoints/step_00000009-0001"
    left.mkdir(exist_ok=True)
    (left / "00001.pt").write_bytes(b"cut off")
    again = lived(tmp_path, "run", DIE="11")
    assert again.codes[0] == -9 and "resumes from step 8" in again.text, again.texts
    assert not left.exists()
    assert read_catalog(LocalStore(tier)).manifests[-1].step == 10


@pytest.mark.slow
def test_a_tier_that_is_somebody_elses_is_left_alone(tmp_path: Path, tier: Path) -> None:
    os.mkdir(tier, 0o755)
    whole = lived(tmp_path, "run", WAIT="0")
    assert whole.codes == [0, 0] and whole.text.count("are not kept in memory") == 1, whole.texts
    assert list(tier.iterdir()) == [] and steps_of(tmp_path / "run")[-1] == 12
