"""Runs whose state is sharded: killed and resumed, equal bit for bit, on as many ranks or others,
and what one rank's trouble does to all of them."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from library_runs import newest, steps_of
from programs import STEP, Lived, killed_once, live, printed

from harness.checkpoint import load
from harness.checkpoint.catalog import read_catalog
from harness.cli import main
from harness.errors import DamagedError
from harness.exchange.compare import differences
from harness.sharding.shards import ShardFiles
from harness.store import LocalStore

BUILT = """
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

run = init()
torch.manual_seed(3)
model = nn.Sequential(
    nn.Linear(8, 13), nn.ReLU(), nn.Dropout(0.1), nn.BatchNorm1d(13), nn.Linear(13, 7),
    nn.Linear(7, 1),
)
model[5].bias.requires_grad_(False)
WRAP
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
run.track(model=model, optimizer=optimizer, scheduler=scheduler)
"""
LOOP = """
for x, y in run.batches(points(), 12, epochs=2):
    loss = (model(x) - y).square().mean()
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    scheduler.step()
    run.log(loss=loss)
    die(run)
"""
FSDP = "for part in (model[0], model[4]): fully_shard(part)\nfully_shard(model)"
HSDP = (
    "fully_shard(model, mesh=init_device_mesh('cpu', (2, run.world_size // 2), "
    "mesh_dim_names=('copies', 'shards')))"
)
DDP = "model = nn.parallel.DistributedDataParallel(model)"
WHOLE = """
import json
from programs import whole_digest

inner = getattr(model, "module", model)
found = {key: value for key, value in inner.state_dict().items() if not key.startswith("3.r")}
found = [run.step, whole_digest(found), whole_digest(optimizer.state_dict()["state"])]
if run.is_writer:
    print("whole", json.dumps(found), flush=True)
"""


def program(wrap: str, loop: str = LOOP) -> str:
    return BUILT.replace("WRAP", wrap) + loop


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("ranks", "wrap"),
    [
        pytest.param(2, FSDP, id="fsdp"),
        pytest.param(3, FSDP, id="fsdp, uneven", marks=SLOW),
        pytest.param(4, HSDP, id="hsdp", marks=SLOW),
    ],
)
def test_a_killed_run_of_a_sharded_model_equals_the_undisturbed_one(
    tmp_path: Path, ranks: int, wrap: str
) -> None:
    outcome = killed_once(tmp_path, program(wrap), ranks=ranks)
    assert outcome.is_equal, (outcome.rows, outcome.resumed.texts)
    assert "warning" not in outcome.resumed.text, outcome.resumed.text
    manifest = read_catalog(LocalStore(tmp_path / "killed")).manifests[-1]
    assert (len(manifest.shards), manifest.format_version) == (ranks, 4)


STEPS = LOOP.replace("epochs=2", "epochs=2, max_steps=STEPS")
END = "\n" + WHOLE


def begun(folder: Path, wrap: str, ranks: int) -> Any:
    """Train six steps and return the step and the digests at their end."""
    source = program(wrap, STEPS.replace("STEPS", "6") + END)
    return printed(live(folder, source, "run", ranks=ranks), "whole")[-1]


def resumed(folder: Path, wrap: str, ranks: int) -> Any:
    """Resume from step 6 and return the step and the digests before the first step."""
    source = program(wrap, WHOLE + STEPS.replace("STEPS", "8"))
    return printed(live(folder, source, "run", ranks=ranks), "whole")[-1]


NONE = "pass"
OTHERS = [
    ("three to two", (FSDP, 3), (FSDP, 2)),
    ("two to three", (FSDP, 2), (FSDP, 3)),
    ("to one process", (FSDP, 2), (NONE, 1)),
    ("to ddp", (FSDP, 2), (DDP, 2)),
    ("from ddp", (DDP, 2), (FSDP, 2)),
    ("from one process", (NONE, 1), (FSDP, 2)),
    ("to hsdp", (FSDP, 2), (HSDP, 4)),
    ("from hsdp", (HSDP, 4), (FSDP, 3)),
]
QUICK = ("three to two", "to one process", "from ddp")


@pytest.mark.parametrize(
    ("saved", "then"),
    [
        pytest.param(saved, then, id=name, marks=() if name in QUICK else SLOW)
        for name, saved, then in OTHERS
    ],
)
def test_any_ranks_resume_what_any_other_have_saved(
    tmp_path: Path, saved: tuple[str, int], then: tuple[str, int]
) -> None:
    assert begun(tmp_path, *saved) == resumed(tmp_path, *then)


@pytest.fixture(scope="module")
def six_steps(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[object]]:
    """A run of a sharded model with checkpoints at steps 3 and 6, and the digests at its end."""
    folder = tmp_path_factory.mktemp("six")
    return folder / "run", begun(folder, FSDP, 2)


def test_every_file_of_a_checkpoint_is_read_without_the_package(
    six_steps: tuple[Path, list[object]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, _ = six_steps
    manifest = json.loads((run / "checkpoints/step_00000006-0001.json").read_text())
    assert manifest["format_version"] == 4
    names = [file["name"] for file in manifest["files"]]
    stem = "step_00000006-0001"
    assert names == [f"{stem}.pt", f"{stem}/00000.pt", f"{stem}/00001.pt"]
    read = [torch.load(run / "checkpoints" / name, weights_only=True) for name in names]
    main_file, *shards = read
    weight = main_file["model_state_dict"]["0.weight"]
    assert weight.is_meta and tuple(weight.shape) == (13, 8)
    assert main_file["layout"]["tensors"]["model_state_dict/0.weight"] == [0, [["shard", 0]]]
    path = "optimizer_state_dict/state/0/exp_avg"
    assert [shard["boxes"][path] for shard in shards] == [[[0, 0], [7, 8]], [[7, 0], [6, 8]]]
    whole = torch.cat([shard["parts"][path] for shard in shards])
    assert torch.equal(newest(run)["optimizer_state_dict"]["state"][0]["exp_avg"], whole)
    assert main(["export", str(run), str(tmp_path / "m.pt")]) == 0
    exported = torch.load(tmp_path / "m.pt", weights_only=True)
    parts = [shard["parts"]["model_state_dict/0.weight"] for shard in shards]
    assert torch.equal(exported["0.weight"], torch.cat(parts))
    for command in ("ls", "show", "verify", "status", "report"):
        assert main([command, str(run)]) == 0, capfd.readouterr().err
    assert main(["diff", str(run), str(run)]) == 0
    shard = str(run / "checkpoints" / names[1])
    assert main(["export", str(run), shard, "--force"]) == 78


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def swap(path: Path) -> None:
    shutil.copy(path.parents[1] / "step_00000003-0001" / path.name, path)


@pytest.mark.parametrize("harm", [flip, swap, Path.unlink], ids=["flipped", "swapped", "deleted"])
@pytest.mark.parametrize("name", ["00000.pt", "00001.pt"])
def test_a_damaged_shard_is_passed_over_by_all_ranks(
    six_steps: tuple[Path, list[object]], tmp_path: Path, harm: Callable[[Path], object], name: str
) -> None:
    run, _ = six_steps
    shutil.copytree(run, tmp_path / "run")
    harm(tmp_path / "run/checkpoints/step_00000006-0001" / name)
    if harm is not flip or name != "00001.pt":  # the commands alone: a start takes seconds
        assert main(["verify", str(tmp_path / "run")]) != 0
        return
    source = program(FSDP, WHOLE + STEPS.replace("STEPS", "8"))
    lived = live(tmp_path, source, "run", ranks=2)
    assert printed(lived, "whole")[-1][0] == 3, lived.text
    assert "skipped" in lived.text and "step_00000006-0001/00001.pt" in lived.text
    assert steps_of(tmp_path / "run")[-1] == 8


TROUBLE = """
for x, y in run.batches(points(), 12, epochs=2):
    optimizer.zero_grad()
    (model(x) - y).square().mean().backward()
    optimizer.step()
    if run.rank == 1 and TROUBLE == "disk" and run.step == 3:  # something is in the way
        os.makedirs(f"{sys.argv[1]}/checkpoints/step_00000003-0001/00001.pt")
    if run.rank == 1 and TROUBLE == "nan" and run.step == 6:
        with torch.no_grad():
            model[0].weight.to_local()[0] = float("nan")
    if run.rank == 1 and TROUBLE == "dies" and run.step == 6:
        from harness.sharding import rank_save

        write = rank_save.write_shard

        def writes_and_dies(*arguments):
            write(*arguments)
            os.kill(os.getpid(), signal.SIGKILL)

        rank_save.write_shard = writes_and_dies
"""


def troubled(folder: Path, trouble: str) -> Lived:
    source = BUILT.replace("init()", "init(timeout_s=9, keep_last=9)").replace("WRAP", FSDP)
    return live(folder, source + TROUBLE.replace("TROUBLE", repr(trouble)), "run", ranks=2)


def test_a_disk_that_refuses_on_one_rank_costs_all_ranks_that_checkpoint(tmp_path: Path) -> None:
    lived = troubled(tmp_path, "disk")
    assert lived.codes == [0, 0], lived.texts
    assert lived.text.count("NOT SAVED, training goes on: rank 1: cannot write") == 1, lived.text
    assert steps_of(tmp_path / "run") == [*range(6, 25, 3), 26]
    there = {path.name for path in (tmp_path / "run/checkpoints").glob("step_00000003*/*")}
    assert there == {"00001.pt"}, "the other shard is deleted"


def test_a_parameter_that_is_not_finite_on_one_rank_ends_all_ranks(tmp_path: Path) -> None:
    lived = troubled(tmp_path, "nan")
    assert lived.codes == [1, 1], lived.texts
    assert "rank 1: nothing is saved: parameters are not finite" in lived.text, lived.text
    assert steps_of(tmp_path / "run") == [3]
    assert not (tmp_path / "run/checkpoints/step_00000006-0001").exists()


@pytest.mark.slow
def test_a_rank_that_dies_after_its_shard_leaves_no_checkpoint(tmp_path: Path) -> None:
    lived = troubled(tmp_path, "dies")
    assert lived.codes[1] == -9 and lived.codes[0] not in (0, -9), lived.texts
    lost = ("another rank of this attempt is lost", "rank 1 does not answer")
    assert any(words in lived.text for words in lost), lived.text
    left = tmp_path / "run/checkpoints/step_00000006-0001"
    assert steps_of(tmp_path / "run") == [3] and (left / "00001.pt").exists()
    again = troubled(tmp_path, "nothing")
    assert again.codes == [0, 0] and "resumes from step 3" in again.text, again.texts
    assert steps_of(tmp_path / "run") == [*range(3, 25, 3), 26] and not left.exists()


ACCUMULATED = """
for x, y in run.batches(points(), 12, epochs=2):
    (model(x) - y).square().mean().backward()
    if run.step == 24:
        optimizer.step()
        optimizer.zero_grad()
    if run.step == int(os.environ.get("STOP", 0)):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)
"""


@pytest.mark.slow
def test_gradients_under_way_come_back_to_each_rank(tmp_path: Path) -> None:
    source = program(FSDP, ACCUMULATED)
    whole = live(tmp_path, source, "whole", ranks=2)
    stopped = live(tmp_path, source, "run", ranks=2, env={"STOP": "10"})
    again = live(tmp_path, source, "run", ranks=2)
    assert [*whole.codes, *stopped.codes, *again.codes] == [0] * 6, (stopped.texts, again.texts)
    assert "resumes from step 1" in again.text, again.text  # step 10, or when all have agreed
    kept = newest(tmp_path / "whole")
    assert kept["own"][0]["gradients"].keys() == kept["own"][1]["gradients"].keys() != set()
    assert list(differences(kept, newest(tmp_path / "run"))) == []


LOGGED = """
for x, y in run.batches(points(), 12, epochs=2):
    loss = (model(x) - y).square().mean()
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    run.log(loss=loss, norm=norm)
    if run.step == 5:
        run.log(total=model[0].weight.detach().square().sum())
"""


def test_a_number_that_is_spread_over_the_ranks_is_not_logged_silently(tmp_path: Path) -> None:
    lived = live(tmp_path, program(FSDP, LOGGED), "run", ranks=2)
    assert set(lived.codes) == {78} and "total.full_tensor()" in lived.text, lived.texts


EVALUATED = """
for x, y in run.batches(points(), 12, epochs=1):
    optimizer.zero_grad()
    (model(x) - y).square().mean().backward()
    optimizer.step()

    def sums(batch):
        return {"val_loss": (model(batch[0]) - batch[1]).square().sum(), "seen": len(batch[0])}

    for count in (1, 5):
        means = run.evaluate(points(count), sums, batch_size=2)
        assert means["seen"] == 1.0, means
"""


def test_an_evaluation_with_unlike_numbers_of_batches_does_not_hang(tmp_path: Path) -> None:
    lived = live(tmp_path, program(FSDP, EVALUATED), "run", ranks=2, limit_s=60)
    assert lived.codes == [0, 0], lived.texts


AFTER_EVALUATION = """
held_out = points(7)
for x, y in run.batches(points(), 12, epochs=2):
    loss = (model(x) - y).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()
    run.log(loss=loss)
    if run.step % 3 == 0:  # the save follows a forward pass without a backward pass
        run.evaluate(held_out, lambda b: {"val_loss": (model(b[0]) - b[1]).square().sum()})
    die(run)
"""


@pytest.mark.slow
def test_a_save_after_an_evaluation_holds_the_parts(tmp_path: Path) -> None:
    outcome = killed_once(tmp_path, program(FSDP, AFTER_EVALUATION), ranks=2)
    assert outcome.is_equal, (outcome.rows, outcome.resumed.texts)
    assert "warning" not in outcome.resumed.text + outcome.whole.text, outcome.whole.text
    names = newest(tmp_path / "whole")["names"]["optimizer"]
    assert names[0][0] == "model.0.weight" and None not in names[0], names


def test_what_is_missing_or_left_behind_of_a_checkpoint_is_shown_and_pruned(
    six_steps: tuple[Path, list[object]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(six_steps[0], run)
    folder = run / "checkpoints/step_00000003-0001"
    (folder / "00001.pt").unlink()
    main(["ls", str(run)])
    assert "SHARDS MISSING" in capfd.readouterr().out
    (run / "checkpoints/step_00000003-0001.json").unlink()
    (run / "checkpoints/step_00000003-0001.pt").unlink()
    (folder / "00001.pt.tmp-0001-00c0ffee").write_bytes(b"cut off")
    (folder / "of somebody else").write_bytes(b"kept")
    for command in ("ls", "verify"):
        main([command, str(run)])
        assert "checkpoints/step_00000003-0001" in capfd.readouterr().out
    end = run / "attempts/0001.end.json"
    elsewhere = end.rename(tmp_path / end.name)  # without it the attempt may still be writing
    assert main(["prune", "--yes", str(run)]) == 0 and (folder / "00000.pt").exists()
    elsewhere.rename(end)
    assert main(["prune", "--yes", str(run)]) == 0
    assert [path.name for path in folder.iterdir()] == ["of somebody else"]
    assert steps_of(run) == [6]


def test_a_claim_deletes_what_a_killed_save_has_left_in_a_folder(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.prepare(("checkpoints/step_00000003-0001",))
    left = tmp_path / "checkpoints/step_00000003-0001/00001.pt.tmp-0001-00c0ffee"
    left.write_bytes(b"cut off")
    assert store.sweep(("checkpoints",), below_attempt=1) == []
    assert store.sweep(("checkpoints",), below_attempt=2) != []
    assert not left.exists()


TIED = """
from torch.distributed.fsdp import fully_shard

run = init()
torch.manual_seed(3)
model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 1))
model[2].weight = model[0].weight
fully_shard(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
run.track(model=model, optimizer=optimizer)
for x, y in run.batches(points(), 12, epochs=2):STEP
held = [os.readlink(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")
        if os.path.islink(f"/proc/self/fd/{number}")]
assert not [name for name in held if "memfd:step" in name], held
before = [parameter.to_local().clone() for parameter in model.parameters()]
with torch.no_grad():
    for parameter in model.parameters():
        parameter.to_local().zero_()
harness.load_weights(model, sys.argv[1])
for parameter, part in zip(model.parameters(), before, strict=True):
    assert torch.equal(parameter.to_local(), part)
"""


def test_tied_weights_stay_tied_and_are_written_once(tmp_path: Path) -> None:
    outcome = killed_once(tmp_path, TIED.replace("STEP", STEP), ranks=2)
    assert outcome.is_equal, (outcome.rows, outcome.resumed.texts)
    run = str(tmp_path / "killed")
    assert main(["show", run]) == 0 and main(["export", run, str(tmp_path / "m.pt")]) == 0
    exported = torch.load(tmp_path / "m.pt", weights_only=True)
    assert exported["0.weight"].data_ptr() == exported["2.weight"].data_ptr()


def test_layouts_that_cannot_be_are_damage(six_steps: tuple[Path, list[object]]) -> None:
    store = LocalStore(six_steps[0])
    manifest = read_catalog(store).manifests[-1]
    weight = "model_state_dict/0.weight"
    for placements, mesh in (
        ([["shard", 7]], 0),
        ([["shard", None]], 0),
        ([], 0),
        ([["strided", 0]], 0),
        ([["elsewhere", 0]], 0),
        ([["shard", 0]], 1),
        ("shard", 0),
    ):
        payload = load.load(store, manifest)
        payload["layout"]["meshes"].append([0, 5])
        payload["layout"]["tensors"][weight] = [mesh, placements]
        with pytest.raises(DamagedError, match="layouts"):
            ShardFiles((store,), manifest, payload)
    payload = load.load(store, manifest)
    payload["model_state_dict"]["0.weight"] = torch.empty(10**9, 10**3, device="meta")
    with pytest.raises(DamagedError, match="far larger"):
        ShardFiles((store,), manifest, payload)


NOT_SYNCHRONISED = """
for x, y in run.batches(points(), 12, epochs=2):
    model.SET(run.step % 4 == 0)
    (model(x) - y).square().mean().backward()
    if run.step % 4 == 0:
        optimizer.step()
        optimizer.zero_grad()
    if run.step == int(os.environ.get("STOP", 0)):
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.1)
"""
LASTING = """
from harness.distributed.dtensors import version_of

before = None
for x, y in run.batches(points(), 12, epochs=2):
    (model(x) - y).square().mean().backward()
    assert before != version_of(model[0].weight.grad), "a sum that is no new one looks used"
    before = version_of(model[0].weight.grad)
    if run.step % 4 == 0:
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    if run.step == int(os.environ.get("STOP", 0)):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)
"""
STATE = """
class AppState:  # as DCP's `Stateful`
    def __init__(self, model):
        self.model = model

    def state_dict(self):
        return {"model": self.model.state_dict()}

    def load_state_dict(self, state):
        self.model.load_state_dict(state["model"])

run.track(app=AppState(model))
for x, y in run.batches(points(), 12, epochs=1):
    die(run)
"""
SLOW_WRITER = """
for x, y in run.batches(points(), 12, epochs=1):
    if run.rank == 0 and run.step == 3:
        from harness.sharding import rank_save

        write = rank_save.write_shard

        def writes_late(*arguments):
            time.sleep(7)
            return write(*arguments)

        rank_save.write_shard = writes_late
    if run.step == 6:
        break
"""


@pytest.mark.parametrize(
    ("ranks", "wrap", "switch"),
    [
        pytest.param(2, FSDP, "set_requires_gradient_sync", id="fsdp", marks=SLOW),
        pytest.param(4, HSDP, "set_requires_all_reduce", id="hsdp", marks=SLOW),
    ],
)
def test_saves_and_stops_wait_for_gradients_that_no_state_holds(
    tmp_path: Path, ranks: int, wrap: str, switch: str
) -> None:
    source = program(wrap, NOT_SYNCHRONISED.replace("SET", switch))
    whole = live(tmp_path, source, "whole", ranks=ranks)
    stopped = live(tmp_path, source, "run", ranks=ranks, env={"STOP": "9"})
    assert set(whole.codes) == set(stopped.codes) == {0}, (whole.texts, stopped.texts)
    assert "NOT SAVED" not in whole.text and "not saved" not in stopped.text, whole.text
    assert "warning: rank 0: gradients are accumulated that are in no state" in whole.text
    assert [step % 4 for step in steps_of(tmp_path / "whole")] == [0, 0, 2]
    assert steps_of(tmp_path / "run")[-1] in (12, 16), stopped.text
    again = live(tmp_path, source, "run", ranks=ranks)
    assert set(again.codes) == {0}, again.texts
    assert list(differences(newest(tmp_path / "whole"), newest(tmp_path / "run"))) == []


@pytest.mark.slow
def test_gradients_that_last_come_back(tmp_path: Path) -> None:
    source = program(FSDP, LASTING)
    live(tmp_path, source, "whole", ranks=2)
    stopped = live(tmp_path, source, "run", ranks=2, env={"STOP": "9"})
    again = live(tmp_path, source, "run", ranks=2)
    assert stopped.codes == again.codes == [0, 0], (stopped.texts, again.texts)
    rows = list(differences(newest(tmp_path / "whole"), newest(tmp_path / "run")))
    assert rows == [], (rows, again.text)


def test_the_state_of_an_object_of_the_programs_own_is_sharded_too(tmp_path: Path) -> None:
    source = BUILT.partition("optimizer =")[0].replace("WRAP", FSDP) + STATE
    lived = live(tmp_path, source, "run", ranks=2)
    assert lived.codes == [0, 0], lived.texts
    assert len(read_catalog(LocalStore(tmp_path / "run")).manifests[-1].shards) == 2
    again = live(tmp_path, source.replace("epochs=1", "epochs=2"), "run", ranks=2)
    assert again.codes == [0, 0] and "resumes from step 13" in again.text, again.texts


@pytest.mark.slow
def test_ranks_that_are_done_wait_for_a_slow_writer(tmp_path: Path) -> None:
    source = BUILT.replace("init()", "init(timeout_s=4)").replace("WRAP", FSDP) + SLOW_WRITER
    lived = live(tmp_path, source, "run", ranks=2)
    assert "does not answer" not in "".join(lived.texts), lived.texts
    assert 3 in steps_of(tmp_path / "run"), lived.texts


AHEAD = """
def ahead(batches):
    yield from batches

for epoch, batches in run.by_epoch(ahead(run.batches(points(), 12, epochs=2))):
    noise = torch.rand(1)
    for x, y in batches:""" + textwrap.indent(STEP, "    ")


@pytest.mark.slow
def test_a_resume_inside_an_epoch_whose_first_batch_is_made_ahead(tmp_path: Path) -> None:
    outcome = killed_once(tmp_path, program(FSDP, AHEAD), ranks=2)
    assert outcome.is_equal, (outcome.rows, outcome.resumed.texts)
    shutil.rmtree(tmp_path / "killed")
    live(tmp_path, program(DDP, AHEAD), "killed", ranks=2, env={"DIE": "7"})
    again = live(tmp_path, program(FSDP, AHEAD), "killed", ranks=2)
    assert again.codes == [0, 0] and "resumes from step 6" in again.text, again.texts


SEEN = """
class Seen(nn.Module):
    def __init__(self):
        super().__init__()
        self.seen = {}

    def forward(self, x):
        self.seen[f"by rank {run.rank}"] = 1
        return x

    def get_extra_state(self):
        return dict(self.seen)

    def set_extra_state(self, state):
        self.seen = dict(state)

model.append(Seen())
run.track("""


def test_a_sharded_model_whose_state_has_other_keys_on_other_ranks_is_refused(
    tmp_path: Path,
) -> None:
    source = program(FSDP).replace("run.track(", SEEN.lstrip(), 1)
    lived = live(tmp_path, source, "run", ranks=2)
    assert lived.code == 78, lived.text
    for text in (
        "the state of a sharded object has other keys or kinds on other ranks",
        "found: in model_state_dict",
    ):
        assert text in lived.text, lived.text


def test_what_to_empty_has_left_uninitialised_is_refused_at_the_start(tmp_path: Path) -> None:
    wrap = f"{FSDP}\nwith torch.no_grad():\n    model[4].bias.to_local().fill_(float('nan'))"
    lived = live(tmp_path, program(wrap), "run", ranks=2)
    assert set(lived.codes) == {78} and "to_empty()" in lived.text, lived.texts
    assert "model.4.bias" in lived.text and steps_of(tmp_path / "run") == []
