"""A model made on the device meta begins alike on any number of ranks, however it is sharded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from library_runs import newest
from programs import STEP, Lived, killed_once, live, printed

import harness
from harness.exchange.compare import differences

MODEL = """
import hashlib, json


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(7))
        self.register_buffer("table", torch.arange(6.0) / 7, persistent=False)
        self.register_buffer("count", torch.zeros(2, dtype=torch.long))
        self.reset_parameters()

    def reset_parameters(self):
        self.table = torch.arange(6.0) / 7
        self.count.zero_()
        nn.init.normal_(self.scale)


class Model(nn.ModuleDict):
    def forward(self, x):
        return x


def built(device="meta"):
    with torch.device(device):
        model = Model({
            "embed": nn.Embedding(11, 8), "linear": nn.Linear(8, 13), "norm": nn.BatchNorm1d(13),
            "table": Table(), "heads": nn.MultiheadAttention(12, 3), "lstm": nn.LSTM(8, 9),
            "blocks": nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 4)),
            "out": nn.Linear(8, 11, bias=False),
        })
        model["out"].weight = model["embed"].weight
    return model


def digests(model):
    tensors = dict((*model.named_parameters(), *model.named_buffers()))
    whole = {
        name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        for name, tensor in tensors.items()
    } | {"drawn": torch.get_rng_state()}
    return {
        name: hashlib.sha256(str(of.dtype).encode() + of.detach().numpy().tobytes()).hexdigest()
        for name, of in whole.items()
    }


def sharded(model):
    if run.world_size > 1:
        from torch.distributed.fsdp import fully_shard

        for part in (model["linear"], model["heads"], model["blocks"][0], model):
            fully_shard(part)
    return model


run = init()
"""
PLAIN = f"{MODEL}\nprint('BEGUN', json.dumps(digests(built('cpu'))))"
ON_META = f"""{MODEL}
model = sharded(built())
optimizer = torch.optim.AdamW(model.parameters())
before = [*map(id, model.parameters())]
assert harness.materialize(model) is model and before == [*map(id, model.parameters())]
assert model["out"].weight is model["embed"].weight
print("BEGUN", json.dumps(digests(model)))
"""


def begun(folder: Path, source: str, ranks: int = 1) -> list[dict[str, str]]:
    return printed(live(folder, source, "run", ranks=ranks), "BEGUN")


def test_any_number_of_ranks_begins_as_one_process_and_as_constructors_do(tmp_path: Path) -> None:
    (plain,) = begun(tmp_path, PLAIN)
    assert len(plain) == 24
    for ranks in (1, 2, 3):
        for own in begun(tmp_path, ON_META, ranks):
            assert own == plain, {name for name in plain if own[name] != plain[name]}


WITH_INIT = """
drawn = []


def initialise(module):
    drawn.append(type(module).__name__)
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight)


harness.materialize(model, initialise)
model.apply(lambda module: drawn.remove(type(module).__name__))
assert not drawn
"""


def test_a_function_as_for_apply_is_called_for_each_module(tmp_path: Path) -> None:
    source = ON_META.replace(
        "assert harness.materialize(model) is model and", f"{WITH_INIT}\nassert"
    )
    (one,) = begun(tmp_path, source)
    (other,) = begun(tmp_path, ON_META)
    unlike = {name for name in one if one[name] != other[name]}
    assert {"linear.weight", "heads.out_proj.weight", "blocks.1.weight", "drawn"} < unlike
    assert unlike.isdisjoint({"embed.weight", "linear.bias", "norm.weight", "heads.out_proj.bias"})
    assert begun(tmp_path, source, 2) == [one, one]


PARALLEL = """
run = init()
import json
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel, RowwiseParallel, parallelize_module
)
from programs import whole_digest

with torch.device("meta"):
    model = nn.Sequential(nn.Linear(8, 13), nn.ReLU(), nn.Linear(13, 6), nn.LayerNorm(6))
if run.world_size > 1:
    mesh = torch.distributed.device_mesh.init_device_mesh(
        "cpu", (run.world_size // 2, 2), mesh_dim_names=("dp", "tp")
    )
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    if run.world_size > 2:
        fully_shard(model, mesh=mesh["dp"])
harness.materialize(model)
state = model.state_dict()
print("BEGUN", json.dumps(whole_digest(dict(state) | {"drawn": torch.get_rng_state()})))
"""


def test_tensor_parallelism_alone_and_under_fully_shard_begins_alike(tmp_path: Path) -> None:
    (one,) = begun(tmp_path, PARALLEL)
    assert begun(tmp_path, PARALLEL, 2) == [one] * 2
    assert begun(tmp_path, PARALLEL, 4) == [one] * 4


def test_weights_are_read_before_it_is_known_which_ranks_have_copies(tmp_path: Path) -> None:
    """Beside tensor parallelism, what `fully_shard` alone has sharded lies on some of the ranks."""
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 13), torch.nn.ReLU(), torch.nn.Linear(13, 6), torch.nn.LayerNorm(6)
    )
    torch.save(model.state_dict(), tmp_path / "model.pt")
    load = f"model.to_empty(device='cpu')\nharness.load_weights(model, '{tmp_path}/model.pt')"
    source = PARALLEL.replace("harness.materialize(model)", load)
    (one,) = begun(tmp_path, source)
    assert begun(tmp_path, source, 4) == [one] * 4


NO_TABLE = "model['table'].reset_parameters = lambda: nn.init.normal_(model['table'].scale)\n"
RECURSIVE = """
def init_all():
    for parameter in model.parameters():
        nn.init.normal_(parameter)


model["table"].reset_parameters()
model.register_buffer("own", torch.empty(1, device="meta"))
model.reset_parameters = init_all
"""


@pytest.mark.parametrize(
    ("ranks", "before", "found"),
    [
        (1, NO_TABLE, "neither reset_parameters() nor init writes table.table, table.count"),
        (2, NO_TABLE, "neither reset_parameters() nor init writes table.table, table.count"),
        (2, RECURSIVE, "the initialiser of the model itself initialises sharded tensors"),
        (2, "torch.manual_seed(run.rank)\n", "torch's generator of rank 1 is not where"),
    ],
)
def test_what_would_not_begin_alike_is_refused(
    tmp_path: Path, ranks: int, before: str, found: str
) -> None:
    source = ON_META.replace("before =", f"{before}\nbefore =", 1)
    lived = live(tmp_path, source, "run", ranks=ranks)
    assert set(lived.codes) == {78} and found in lived.text, lived.texts
    assert "Traceback" not in lived.text, lived.text


def test_generators_that_no_initialiser_draws_from_may_differ(tmp_path: Path) -> None:
    seeds = "random.seed(run.rank)\nnp.random.seed(run.rank)\nbefore ="
    source = ON_META.replace("before =", seeds, 1)
    one, other = begun(tmp_path, source, 2)
    assert one == other


TRAINED = f"""
from torch.distributed.fsdp import fully_shard

run = init()
with torch.device("meta"):
    model = nn.Sequential(nn.Linear(8, 13), nn.BatchNorm1d(13), nn.Linear(13, 1))
fully_shard(model[0])
fully_shard(model)
harness.materialize(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
run.track(model=model, optimizer=optimizer)
for x, y in run.batches(points(), 8, epochs=1, max_steps=9):{STEP}"""


def test_a_killed_run_of_a_model_from_meta_equals_the_undisturbed_one(tmp_path: Path) -> None:
    outcome = killed_once(tmp_path, TRAINED, ranks=2)
    assert outcome.is_equal, (outcome.rows, outcome.resumed.texts)


TASK = """
from harness.task import Task


def build(device="meta"):
    torch.random.manual_seed(4)
    with torch.device(device):
        model = nn.Sequential(
            nn.Linear(8, 16), *(nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(2)),
            nn.LayerNorm(16), NORM, nn.Linear(16, 1)
        )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return Task(model, optimizer, points(), lambda m, b: (m(b[0]) - b[1]).square().mean())


class Scale(nn.Module):  # without an initialiser
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(16))

    def forward(self, x):
        return x * self.scale


sys.modules["task_of_test"] = sys.modules["__main__"]
from harness import train

train.main([
    f"run.dir={sys.argv[1]}", "task.name=task_of_test:build", "train.global_batch_size=8",
    "train.max_steps=3", "checkpoint.every_s=null", *os.environ["MORE"].split()
])
"""


def task(
    folder: Path, name: str, *settings: str, ranks: int = 2, norm: str = "nn.LayerNorm(16)"
) -> Lived:
    source = TASK.replace("NORM", norm)
    return live(folder, source, name, ranks=ranks, env={"MORE": " ".join(settings)})


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (1, ()),
        (2, ("train.ema_decay=0.9",)),
        (2, ("train.shard=fsdp", "train.ema_decay=0.9", "train.checkpoint_activations=true")),
        (2, ("train.shard=hsdp", "train.shard_size=1")),
    ],
)
def test_a_task_on_meta_trains_as_one_that_is_not(
    tmp_path: Path, ranks: int, settings: tuple[str, ...]
) -> None:
    for device in ("cpu", "meta"):
        lived = task(tmp_path, device, f"task.args.device={device}", *settings, ranks=ranks)
        assert set(lived.codes) == {0} and "warning" not in lived.text, lived.texts
    rows = differences(newest(tmp_path / "cpu"), newest(tmp_path / "meta"))
    assert [row for row in rows if not row[0].startswith("config.")] == []


@pytest.mark.parametrize("shard", ["none", "fsdp"])
def test_a_task_on_meta_without_initialisers_needs_a_file(tmp_path: Path, shard: str) -> None:
    lived = task(tmp_path, "none", f"train.shard={shard}", norm="Scale()")
    assert set(lived.codes) == {78} and "left them: model.4.scale\n" in lived.text, lived.texts


@pytest.mark.parametrize("settings", [("train.shard=none",), ("train.shard=fsdp",)])
def test_a_task_on_meta_begins_with_the_weights_of_a_file(
    tmp_path: Path, settings: tuple[str, ...]
) -> None:
    saved = task(tmp_path, "whole", "task.args.device=cpu", norm="Scale()", ranks=1)
    assert saved.code == 0, saved.text
    harness.export(tmp_path / "whole", tmp_path / "hf", "hf")
    more = (*settings, "train.ema_decay=0.999", f"init.from={tmp_path}/hf", "train.max_steps=1")
    lived = task(tmp_path, "warm", *more, norm="Scale()")
    assert set(lived.codes) == {0} and "loaded 11 of 11 tensors" in lived.text, lived.texts
    before: Any = newest(tmp_path / "whole")["model_state_dict"]
    average: Any = newest(tmp_path / "warm")["ema_state_dict"]
    assert before.keys() == average.keys()
    again = task(tmp_path, "warm", *more, "train.max_steps=2", norm="Scale()")
    assert set(again.codes) == {0} and "resumes from step 1" in again.text, again.texts
    assert all(torch.allclose(before[key], average[key], atol=1e-4) for key in before)
