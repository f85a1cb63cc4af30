"""Saves of sharded state in the background: training goes on, and all ranks do the same."""

from __future__ import annotations

from pathlib import Path

import pytest
from library_runs import newest, steps_of
from programs import Lived, live

from harness.cli import main
from harness.exchange.compare import differences

BUILT = """
import threading
from torch.distributed.fsdp import fully_shard
from harness.errors import StorageError
from harness.sharding import rank_save
from harness.store.staging_buffer import StagingBuffer

run = init(keep_last=9)
torch.manual_seed(3)
model = nn.Sequential(nn.Linear(8, 1500), nn.ReLU(), nn.Linear(1500, 1500), nn.Linear(1500, 1))
for part in (model[0], model[2]):
    fully_shard(part)
fully_shard(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.001)
run.track(model=model, optimizer=optimizer)
write, written = rank_save.write_shard, threading.Event()
"""
LOOP = """
for x, y in run.batches(points(), 16, epochs=1):
    DISTURBED
    optimizer.zero_grad()
    (model(x) - y).square().mean().backward()
    optimizer.step()
"""
GOES_ON = """
def writes_late(*arguments):
    if arguments[2] == 3 and not written.wait(30):
        print("training waits")
    return write(*arguments)

if run.rank == RANK:
    rank_save.write_shard = writes_late
"""
NO_MEMORY = """
def no_room(self, size_bytes):
    if size_bytes > 1 << 20:  # the main file is small
        raise StorageError("there is no memory for a copy", "found: 1048576 bytes")

if run.rank == RANK:
    StagingBuffer.check_room = no_room
"""
NEWER = """
def begin_another():
    while not os.path.exists(f"{sys.argv[1]}/checkpoints/step_00000003-0001.json"):
        time.sleep(0.01)
    open(f"{sys.argv[1]}/attempts/0002.json", "w")
"""
STEPS = [3, 6, 9, 10]


def lived(folder: Path, before: str = "", disturbed: str = "pass", rank: int = 1) -> Lived:
    source = BUILT + before + LOOP.replace("DISTURBED", disturbed)
    return live(folder, source.replace("RANK", str(rank)), "run", ranks=2)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    life = lived(folder)
    assert life.codes == [0, 0] and steps_of(folder / "run") == STEPS, life.texts
    assert "Warning" not in "".join(life.texts), life.texts
    return folder / "run"


@pytest.mark.parametrize("rank", [0, 1])
def test_training_goes_on_while_a_rank_writes(undisturbed: Path, tmp_path: Path, rank: int) -> None:
    life = lived(tmp_path, GOES_ON, "if run.step == 6: written.set()", rank)
    assert life.codes == [0, 0] and "training waits" not in "".join(life.texts), life.texts
    assert steps_of(tmp_path / "run") == STEPS
    assert list(differences(newest(undisturbed), newest(tmp_path / "run"))) == []


@pytest.mark.parametrize("rank", [0, 1])
def test_a_state_that_changes_on_one_rank_while_it_is_copied_is_not_saved(
    tmp_path: Path, rank: int
) -> None:
    changed = "if run.rank == RANK and run.step == 7: model[2].weight.to_local().data.mul_(1.5)"
    life = lived(tmp_path, "", changed, rank)
    assert life.codes == [0, 0], life.texts
    steps = steps_of(tmp_path / "run")
    assert (steps[0], steps[-2:]) == (3, [9, 10]) and 6 not in steps, life.text
    assert "NOT SAVED" not in life.text, "it is saved again at once, and nothing is lost"
    assert f"saves make training wait: rank {rank}: the state changes" in life.text
    assert main(["verify", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_without_memory_for_a_copy_writes_while_all_wait(
    undisturbed: Path, tmp_path: Path, rank: int
) -> None:
    life = lived(tmp_path, NO_MEMORY, rank=rank)
    assert life.codes == [0, 0], life.texts
    assert f"saves make training wait: rank {rank}: there is no memory for a copy" in life.text
    assert steps_of(tmp_path / "run") == STEPS
    assert list(differences(newest(undisturbed), newest(tmp_path / "run"))) == []


@pytest.mark.parametrize("rank", [0, 1])
def test_the_last_save_fails_on_all_ranks_if_one_cannot_write(tmp_path: Path, rank: int) -> None:
    in_the_way = 'os.makedirs(f"{sys.argv[1]}/checkpoints/step_00000010-0001/0000RANK.pt")'
    life = lived(tmp_path, "", f"if run.rank == RANK and run.step == 10: {in_the_way}", rank)
    assert life.codes == [1, 1], life.texts
    assert "the last checkpoint, of step 10, was not saved" in life.text
    assert f"rank {rank}: cannot write" in life.text
    assert steps_of(tmp_path / "run") == [3, 6, 9]


UNREADABLE = """
class Unknown:
    pass

def writes_what_no_restart_reads(*arguments):
    return write(*arguments[:4], lambda sink: torch.save(Unknown(), sink))

if run.rank == RANK:
    rank_save.write_shard = writes_what_no_restart_reads
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_a_first_shard_that_cannot_be_loaded_ends_all_ranks(tmp_path: Path, rank: int) -> None:
    life = lived(tmp_path, UNREADABLE, rank=rank)
    assert life.codes == [78, 78], life.texts
    assert "what is tracked can be saved, but not loaded again" in life.text, life.text
    assert steps_of(tmp_path / "run") == []


def test_all_ranks_leave_when_a_newer_attempt_has_begun(tmp_path: Path) -> None:
    life = lived(tmp_path, NEWER, "if run.step == 5 and run.is_writer: begin_another()")
    assert life.codes == [76, 76], life.texts
    assert steps_of(tmp_path / "run") == [3]
    assert not (tmp_path / "run/checkpoints/step_00000006-0001").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_write_to_a_part_that_only_the_sharded_tensor_counts_is_noticed(
    tmp_path: Path, rank: int
) -> None:
    changed = "if run.rank == RANK and run.step == 7: torch.no_grad()(model[2].weight.mul_)(mask)"
    life = lived(tmp_path, MASK, changed, rank)
    assert life.codes == [0, 0], life.texts
    assert 6 not in steps_of(tmp_path / "run"), life.text
    assert f"saves make training wait: rank {rank}: the state changes" in life.text


MASK = """
from torch.distributed.tensor import distribute_tensor

mask = torch.ones(1500, 1500)
mask[::397, 3] = 0.5  # between the words that are sampled
mask = distribute_tensor(mask, model[2].weight.device_mesh, model[2].weight.placements)
"""
BESIDE = """
beside = nn.Linear(3, 3)
run.track(beside=beside)
"""


def test_a_parameter_beside_the_sharded_ones_that_is_not_finite_ends_all_ranks(
    tmp_path: Path,
) -> None:
    broken = "if run.step == 5: beside.weight.data[0] = float('nan')"
    life = lived(tmp_path, BESIDE, broken)
    assert life.codes == [1, 1] and "NaN or Inf in beside.weight" in life.text, life.texts
    assert steps_of(tmp_path / "run") == [3]


def test_a_main_file_that_cannot_be_copied_is_written_while_all_wait(
    undisturbed: Path, tmp_path: Path
) -> None:
    life = lived(tmp_path, NO_MEMORY.replace("> 1 << 20", "< 1 << 20"), rank=0)
    assert life.codes == [0, 0], life.texts
    assert "saves make training wait: rank 0: there is no memory for a copy" in life.text
    assert steps_of(tmp_path / "run") == STEPS
    assert list(differences(newest(undisturbed), newest(tmp_path / "run"))) == []


def test_ranks_that_have_no_room_together_write_while_all_wait(
    undisturbed: Path, tmp_path: Path
) -> None:
    little = "from harness.sharding import start_checks\nstart_checks.free_memory_bytes = lambda: 1"
    life = lived(tmp_path, little)
    assert life.codes == [0, 0], life.texts
    assert "there is no memory for copies of the parts of 2 rank(s)" in life.text
    assert steps_of(tmp_path / "run") == STEPS
    assert list(differences(newest(undisturbed), newest(tmp_path / "run"))) == []


def test_a_last_save_that_cannot_be_copied_is_made_in_another_way(
    undisturbed: Path, tmp_path: Path
) -> None:
    full = "if run.rank == 1 and run.step == 10: StagingBuffer.reserve = full"
    life = lived(tmp_path, FULL, full)
    assert life.codes == [0, 0], life.texts
    assert steps_of(tmp_path / "run")[-1] == STEPS[-1]
    assert list(differences(newest(undisturbed), newest(tmp_path / "run"))) == []


FULL = """
def full(self, size_bytes):
    raise StorageError("there is not enough memory for a copy of the state", "found: none")
"""
