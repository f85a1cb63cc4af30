"""What `to_empty` leaves without values is refused by name, even where the memory holds zeros."""

from __future__ import annotations

from pathlib import Path

import pytest
from library_runs import newest
from programs import STEP, Lived, live, printed

from harness.exchange.compare import differences

MODEL = """
class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("kept", torch.ones(3))
        self.register_buffer("hidden", torch.ones(3), persistent=False)
        self.register_buffer("count", torch.zeros(2, dtype=torch.long), persistent=False)
        self.register_buffer("mask", torch.ones(2, dtype=torch.bool), persistent=False)

    def reset_parameters(self):
        self.kept.fill_(1)
        self.hidden.fill_(1)
        self.count.zero_()
        self.mask.fill_(True)

    def forward(self, x):
        return x * self.hidden[0] * self.kept[0] + self.count[0] * self.mask[0]


def built(device="meta"):
    with torch.device(device):
        return nn.Sequential(nn.Linear(8, 13), nn.BatchNorm1d(13), Table(), nn.Linear(13, 1))


def sharded(model):
    if run.world_size > 1:
        from torch.distributed.fsdp import fully_shard

        fully_shard(model[0])
        fully_shard(model)
    return model


def reset(module):
    if hasattr(module, "reset_parameters"):
        module.reset_parameters()


@torch.no_grad()
def zeroed(model):
    for tensor in (*model.parameters(), *model.buffers()):
        getattr(tensor, "_local_tensor", tensor).zero_()
"""
LOOP = f"""
for x, y in run.batches(points(), 8, epochs=1, max_steps=9):{STEP}"""


def left_out(folder: Path, forget: str, name: str = "run", ranks: int = 1, **env: str) -> Lived:
    """A life of a program that initialises all but what $FORGET names."""
    source = f"""
{MODEL}
run = init()
torch.manual_seed(3)
model = sharded(built()).to_empty(device="cpu")
forgotten = os.environ.get("FORGET", "").split()
kept = {{}}
for path, tensor in (*model.named_parameters(), *model.named_buffers()):
    if path in forgotten:
        tensor = getattr(tensor, "_local_tensor", tensor)
        kept[path] = tensor, tensor.detach().clone()
model.apply(reset)
with torch.no_grad():
    for tensor, before in kept.values():
        tensor.data.copy_(before)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
run.track(model=model, optimizer=optimizer)
{LOOP}"""
    return live(folder, source, name, ranks=ranks, env={"FORGET": forget} | env)


@pytest.mark.parametrize("ranks", [1, 2])
def test_each_kind_of_tensor_is_refused_by_name(tmp_path: Path, ranks: int) -> None:
    forgotten = ["0.bias", "3.weight", "1.running_var", "2.kept", "2.hidden"]
    lived = left_out(tmp_path, " ".join(forgotten), ranks=ranks)
    assert set(lived.codes) == {78}, lived.texts
    assert f"{len(forgotten)} parameter(s) or buffer(s) are not initialised" in lived.text
    assert all(f"model.{name}" in lived.text for name in forgotten), lived.text
    assert "model.0.weight" not in lived.text and "Traceback" not in lived.text, lived.text


WAYS = f"""
{MODEL}
from harness.meta import uninitialised

run = init()


def no_grad(model):
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()


def data_copied(model):
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.copy_(torch.zeros_like(tensor))


def data_set(model):
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = torch.zeros_like(tensor)


def loaded(model, assign=False):
    whole = built("cpu").state_dict()
    if run.world_size > 1:
        from torch.distributed.tensor import distribute_tensor
        own = model.state_dict()
        whole = {{
            key: distribute_tensor(value, own[key].device_mesh, own[key].placements)
            if hasattr(own[key], "placements") else value
            for key, value in whole.items()
        }}
    model.load_state_dict(whole, assign=assign)
    model[2].reset_parameters()


def by_dcp(model):
    import torch.distributed.checkpoint as dcp
    folder = sys.argv[1] + "-dcp"
    dcp.save(sharded(built("cpu")).state_dict(), checkpoint_id=folder)
    state = model.state_dict()
    dcp.load(state, checkpoint_id=folder)
    model.load_state_dict(state)
    model[2].reset_parameters()


def fetched(model):
    file = sys.argv[1] + f"-{{run.rank}}.pt"
    torch.save(built("cpu").state_dict(), file)
    print(harness.load_weights(model, file))
    model[2].reset_parameters()


ways = dict(
    nothing=lambda model: None, parts=zeroed, reset=lambda model: model.apply(reset),
    no_grad=no_grad, data_copied=data_copied, loaded=loaded,
    assigned=lambda model: loaded(model, True), by_dcp=by_dcp, fetched=fetched,
    materialized=harness.materialize
) | (dict(data_set=data_set) if run.world_size == 1 else {{}})
found = {{}}
for name, way in ways.items():
    torch.manual_seed(3)  # `apply(reset)` draws as much as the part of a rank needs
    model = sharded(built())
    if name != "materialized":
        model.to_empty(device="cpu")
    way(model)
    found[name] = len(uninitialised.names_of(model))
import json
print("FOUND", json.dumps(found))
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_whatever_way_a_tensor_is_written_it_counts_as_initialised(
    tmp_path: Path, ranks: int
) -> None:
    for found in printed(live(tmp_path, WAYS, "run", ranks=ranks), "FOUND"):
        assert found.pop("nothing") >= 11 and len(found) == (10 if ranks == 1 else 9)
        assert not any(found.values()), found


def test_a_resume_is_refused_for_what_no_checkpoint_holds_and_for_nothing_else(
    tmp_path: Path,
) -> None:
    assert left_out(tmp_path, "", "whole").code == 0
    assert left_out(tmp_path, "", "killed", DIE="7").code == -9
    refused = left_out(tmp_path, "2.hidden 0.weight", "killed")
    assert refused.code == 78 and "as to_empty() left them: model.2.hidden\n" in refused.text
    resumed = left_out(tmp_path, "0.weight 1.num_batches_tracked 2.kept", "killed")
    assert resumed.code == 0 and "resumes from step 6" in resumed.text, resumed.text
    assert not list(differences(newest(tmp_path / "whole"), newest(tmp_path / "killed")))


def test_integers_that_nobody_has_written_are_refused(tmp_path: Path) -> None:
    source = f"""
{MODEL}
run = init()
model = built().to_empty(device="cpu")
for part in (model[0], model[3]):
    part.reset_parameters()
for name, tensor in model.named_buffers():
    if tensor.is_floating_point():
        tensor.zero_()
with torch.no_grad():
    model[1].weight.fill_(1)
    model[1].bias.zero_()
run.track(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
"""
    lived = live(tmp_path, source, "run")
    names = ("model.1.num_batches_tracked", "model.2.count", "model.2.mask")
    assert lived.code == 78 and f"left them: {', '.join(names)}\n" in lived.text, lived.text


def test_an_optimizer_of_parameters_that_were_replaced_is_refused(tmp_path: Path) -> None:
    source = f"""
{MODEL}
run = init()
model = built()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model.to_empty(device="cpu").apply(reset)
run.track(model=model, optimizer=optimizer)
"""
    lived = live(tmp_path, source, "run")
    text = "optimizer updates 6 parameter(s) on the device meta that no tracked module has"
    assert lived.code == 78 and text in lived.text, lived.text
