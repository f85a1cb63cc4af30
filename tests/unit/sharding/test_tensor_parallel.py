"""Runs with tensor parallelism, alone and under `fully_shard`: killed and resumed, equal bit for
bit; which ranks are given the same samples; and what other ranks make of their checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
from library_runs import newest
from programs import killed_once, live, printed

from harness.exchange.compare import differences

BUILT = """
import hashlib, json
from programs import whole_digest
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module,
)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 14), nn.Linear(14, 8)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        return x + self.down(self.dropout(torch.relu(self.up(self.norm(x)))))


class Scattered(Block):  # sequence parallelism: the norm has a part of the rows
    def forward(self, x):
        tp = self.up.weight.device_mesh["tp"]
        rows = DTensor.from_local(x, tp, [Replicate()]).redistribute(placements=[Shard(0)])
        return x + self.down(torch.relu(self.up(self.norm(rows.to_local()))))


PLAN = {"up": ColwiseParallel(), "down": RowwiseParallel()}
SCATTERED = {
    "norm": SequenceParallel(sequence_dim=0), "up": ColwiseParallel(input_layouts=Shard(0)),
    "down": RowwiseParallel(),
}


def parallel(mesh, plan=PLAN):
    for block in model[:2]:
        parallelize_module(block, mesh, plan)


def digest(model):
    inner = getattr(model, "module", model)
    return whole_digest(inner.state_dict(), optimizer.state_dict()["state"])


def two_d(dp=2):
    return init_device_mesh("cpu", (dp, 2), mesh_dim_names=("dp", "tp"))


def sharded(**mesh):
    for block in model[:2]:
        fully_shard(block, **mesh)
    fully_shard(model, **mesh)


run = init()
torch.manual_seed(3)
model = nn.Sequential(KIND(), KIND(), nn.Linear(8, 1))
WRAP
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
run.track(model=model, optimizer=optimizer)
"""
LOOP = """
seen = []
for x, y in run.batches(points(), 12, epochs=2, max_steps=STEPS):
    loss = (model(x) - y).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    run.log(loss=loss)
    seen.append(hashlib.sha256(x.numpy().tobytes()).hexdigest())
    die(run)
"""
END = """
print("end", json.dumps([run.step, digest(model), seen]), flush=True)
"""
BEGIN = """
print("begin", json.dumps([run.step, digest(model)]), flush=True)
"""
TP = "parallel(init_device_mesh('cpu', (2,), mesh_dim_names=('tp',)))"
FSDP_TP = "mesh = two_d(); parallel(mesh['tp']); sharded(mesh=mesh['dp'])"
SP = "parallel(init_device_mesh('cpu', (2,), mesh_dim_names=('tp',)), SCATTERED)"
FSDP_SP = "mesh = two_d(); parallel(mesh['tp'], SCATTERED); sharded(mesh=mesh['dp'])"
FSDP, NONE = "sharded()", "pass"
DDP = "model = nn.parallel.DistributedDataParallel(model)"
SLOW = pytest.mark.slow


def program(wrap: str, loop: str = LOOP, steps: int = 24) -> str:
    kind = "Scattered" if "SCATTERED" in wrap else "Block"
    return BUILT.replace("KIND", kind).replace("WRAP", wrap) + loop.replace("STEPS", str(steps))


@pytest.mark.parametrize(
    ("ranks", "wrap"),
    [
        pytest.param(2, TP, id="tp"),
        pytest.param(2, SP, id="tp, sequence", marks=SLOW),
        pytest.param(4, FSDP_TP, id="fsdp and tp", marks=SLOW),
        pytest.param(4, FSDP_SP, id="fsdp and tp, sequence", marks=SLOW),
    ],
)
def test_a_killed_run_equals_the_undisturbed_one(tmp_path: Path, ranks: int, wrap: str) -> None:
    outcome = killed_once(tmp_path, program(wrap), ranks=ranks)
    assert outcome.is_equal, (outcome.rows, outcome.resumed.texts)
    assert "warning" not in outcome.resumed.text + outcome.whole.text, outcome.whole.text
    data_size = ranks // 2
    words = f"given the same samples, which are dealt out as to {data_size} rank(s)"
    assert words in outcome.whole.text, outcome.whole.text
    saved = newest(tmp_path / "whole")
    assert [own["data_rank"] for own in saved["own"]] == [rank // 2 for rank in range(ranks)]


def test_ranks_that_compute_together_have_the_same_samples_and_dropout(tmp_path: Path) -> None:
    """Else the model would be none: two halves, each of another batch."""
    ends = printed(live(tmp_path, program(FSDP_TP, LOOP + END, 6), "run", ranks=4), "end")
    assert ends[0] == ends[1] and ends[2] == ends[3] and ends[0][2] != ends[2][2]
    own = newest(tmp_path / "run")
    generators = [str(entry) for entry in own["rng"]]
    assert generators[0] == generators[1] != generators[2] == generators[3]


OTHERS = [
    ("tp to one process", (TP, 2), (NONE, 1)),
    ("one process to tp", (NONE, 1), (TP, 2)),
    ("tp to fsdp", (TP, 2), (FSDP, 2)),
    ("fsdp to tp", (FSDP, 2), (TP, 2)),
    ("fsdp and tp to fsdp", (FSDP_TP, 4), (FSDP, 4)),
    ("fsdp to fsdp and tp", (FSDP, 4), (FSDP_TP, 4)),
    ("fsdp and tp to tp", (FSDP_TP, 4), (TP, 2)),
    ("ddp to fsdp and tp", (DDP, 2), (FSDP_TP, 4)),
    ("fsdp and tp to ddp", (FSDP_TP, 4), (DDP, 2)),
]


@pytest.mark.parametrize(
    ("saved", "then"),
    [
        pytest.param(saved, then, id=name, marks=() if name == "fsdp to tp" else SLOW)
        for name, saved, then in OTHERS
    ],
)
def test_any_mesh_resumes_what_any_other_has_saved(
    tmp_path: Path, saved: tuple[str, int], then: tuple[str, int]
) -> None:
    first = live(tmp_path, program(saved[0], LOOP + END, 6), "run", ranks=saved[1])
    again = live(tmp_path, program(then[0], BEGIN + LOOP, 8), "run", ranks=then[1])
    (before, *_), (after, *_) = printed(first, "end"), printed(again, "begin")
    assert before[:2] == after == [6, before[1]]
    if then[0] in (TP, FSDP_TP):  # the generators of ranks that compute together stay the same
        generators = [str(entry) for entry in newest(tmp_path / "run")["rng"]]
        assert generators[0] == generators[1], again.text


ACCUMULATED = """
for x, y in run.batches(points(), 12, epochs=2):
    (model(x) - y).square().mean().backward()
    if run.step % 8 == 0 or run.step == 26:
        optimizer.step()
        optimizer.zero_grad()
    if run.step == int(os.environ.get("STOP", 0)):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)
"""


@SLOW
@pytest.mark.parametrize(("ranks", "wrap"), [(2, TP), (2, SP)], ids=["tp", "sequence"])
def test_gradients_that_are_not_summed_yet_come_back(tmp_path: Path, ranks: int, wrap: str) -> None:
    source = program(wrap, ACCUMULATED)
    whole = live(tmp_path, source, "whole", ranks=ranks)
    stopped = live(tmp_path, source, "run", ranks=ranks, env={"STOP": "11"})
    again = live(tmp_path, source, "run", ranks=ranks)
    assert [*whole.codes, *stopped.codes, *again.codes] == [0] * 6, (stopped.texts, again.texts)
    assert "resumes from step 1" in again.text, again.text
    assert list(differences(newest(tmp_path / "whole"), newest(tmp_path / "run"))) == []


EVALUATED = """
for x, y in run.batches(points(), 12, epochs=1, max_steps=2):
    optimizer.zero_grad()
    (model(x) - y).square().mean().backward()
    optimizer.step()

    def sums(batch):
        return {"val_loss": (model(batch[0]) - batch[1]).square().sum(), "seen": len(batch[0])}

    for count in (1, 5):
        means = run.evaluate(points(count), sums, batch_size=2)
        assert means["seen"] == 1.0, means
"""


@SLOW
@pytest.mark.parametrize(("ranks", "wrap"), [(2, TP), (4, FSDP_TP)], ids=["tp", "fsdp and tp"])
def test_each_sample_is_evaluated_once(tmp_path: Path, ranks: int, wrap: str) -> None:
    lived = live(tmp_path, program(wrap, EVALUATED), "run", ranks=ranks, limit_s=60)
    assert set(lived.codes) == {0}, lived.texts


STREAM = """
class Stream(IterableDataset):
    def __init__(self):
        self.at = 0

    def __iter__(self):
        rank = RANK
        while self.at < 40:
            self.at += 1
            yield torch.full((8,), float(self.at + 100 * rank)), torch.ones(1)
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


for x, y in run.batches(Stream(), 4, epochs=1):
    loss = (model(x) - y).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    die(run)
"""


@SLOW
def test_a_stream_that_is_read_alike_goes_on_and_another_is_refused(tmp_path: Path) -> None:
    outcome = killed_once(tmp_path, program(TP, STREAM.replace("RANK", "0")), ranks=2)
    assert outcome.is_equal, (outcome.rows, outcome.resumed.texts)
    lived = live(tmp_path, program(TP, STREAM.replace("RANK", "run.rank")), "other", ranks=2)
    assert set(lived.codes) == {78} and "read other samples of Stream" in lived.text, lived.texts


OTHERWISE = "trained on some of the ranks only"
REFUSED = {
    "parts of it under fully_shard": (
        "mesh = two_d(); parallel(mesh['tp']); fully_shard(model[0], mesh=mesh['dp'])",
        4,
        "averaged over other ranks than those of others",
    ),
    "beside ddp": (
        TP + "; ddp = nn.parallel.DistributedDataParallel(nn.Linear(2, 2)); run.track(ddp=ddp)",
        2,
        "averaged over other ranks than those of others",
    ),
    "a length before the model is tracked": (
        "len(run.batches(DataLoader(points(), 4), epochs=1)); " + TP,
        2,
        "dealt out before the model was tracked",
    ),
    "a model of its own on each half of the ranks": (
        "sharded(mesh=two_d()['tp'])",
        4,
        OTHERWISE,
    ),
    "ddp on each half of the ranks": (
        DDP.replace("(model)", "(model, process_group=two_d()['dp'].get_group())"),
        4,
        OTHERWISE,
    ),
    "parts of a sharded model": (
        "fully_shard(model); run.track(first=model[0], second=model[1])",
        2,
        "cannot be told which ranks need the same samples",
    ),
    "context parallel": (
        "mesh = init_device_mesh('cpu', (1, 2), mesh_dim_names=('dp', 'cp')); "
        "sharded(mesh=mesh['dp', 'cp']._flatten('dp_cp'))",
        2,
        "context parallelism is not supported",
    ),
    "state that no module is known for": (
        TP
        + """
class State:
    def state_dict(self):
        return {"model": theirs.state_dict()}
    def load_state_dict(self, state):
        theirs.load_state_dict(state["model"])
theirs, model = model, State()""",
        2,
        "cannot be told which ranks need the same samples",
    ),
    "the writer alone": (
        DDP + "; run.is_writer and run.track(ema=nn.Linear(2, 2))",
        2,
        "the ranks do not track the same objects",
    ),
}


@pytest.mark.parametrize(
    "kind",
    [
        kind
        if kind in ("beside ddp", "parts of a sharded model")
        else pytest.param(kind, marks=SLOW)
        for kind in REFUSED
    ],
)
def test_what_cannot_be_is_refused_before_the_first_step(tmp_path: Path, kind: str) -> None:
    wrap, ranks, words = REFUSED[kind]
    source = program(wrap)
    if "State()" in wrap:
        source = source.replace("AdamW(model.", "AdamW(theirs.")
        source = source.replace("optimizer=optimizer", "other=model")
    lived = live(tmp_path, source, "run", ranks=ranks, limit_s=60)
    assert lived.codes[0] == 78 and words in lived.text, lived.texts
    assert kind == "the writer alone" or set(lived.codes) == {78}, lived.texts


PARTED = """
for x, y in run.batches(points(), 12, epochs=2, max_steps=6):
    loss = (model(x) - y).square().mean()
    optimizer.zero_grad()
    loss.backward()
    with torch.no_grad():  # as where a program forgets to sum over the ranks
        model[0].down.bias.to_local().add_(0.1 * run.rank)
    optimizer.step()
"""


def test_copies_that_have_parted_are_named(tmp_path: Path) -> None:
    lived = live(tmp_path, program(TP, PARTED), "run", ranks=2)
    assert set(lived.codes) == {0}, lived.texts
    assert "copies of sharded state on ranks 0, 1 are no longer the same" in lived.text, lived.text


def test_generators_that_have_parted_are_named(tmp_path: Path) -> None:
    """The writer draws alone: harmless under DDP, another dropout on each half of a layer here."""
    drawing = "    if run.is_writer and run.step == 2:\n        torch.randn(3)\n"
    loop = LOOP.replace("    run.log", f"{drawing}    run.log")
    lived = live(tmp_path, program(TP, loop, 6), "run", ranks=2)
    assert set(lived.codes) == {0}, lived.texts
    assert "ranks 0 and 1 compute each step together, and their generators" in lived.text


ROOT = "mesh = two_d(); parallel(mesh['tp']); fully_shard(model, mesh=mesh['dp'])"


@SLOW
def test_a_forward_pass_before_the_model_is_tracked_changes_nothing(tmp_path: Path) -> None:
    warm = "with torch.no_grad():\n    model(torch.randn(2, 8))\nrun.track(model"
    source = program(ROOT, LOOP + END, 3).replace("run.track(model", warm)
    ends = printed(live(tmp_path, source, "run", ranks=4), "end")
    assert ends[0] == ends[1] and ends[2] == ends[3] and ends[0][2] != ends[2][2]


@SLOW
@pytest.mark.parametrize(
    ("ranks", "wrap"),
    [
        pytest.param(
            4,
            "mesh = init_device_mesh('cpu', (2, 1, 2), mesh_dim_names=('a', 'b', 'tp')); "
            "parallel(mesh['tp']); sharded(mesh=mesh['a', 'b']._flatten('dp'))",
            id="flattened",
        ),
        pytest.param(
            8,
            "mesh = init_device_mesh('cpu', (2, 2, 2), mesh_dim_names=('copies', 'shards', 'tp')); "
            "parallel(mesh['tp']); sharded(mesh=mesh['copies', 'shards'])",
            id="hsdp and tp",
        ),
    ],
)
def test_other_meshes_go_on_exactly(tmp_path: Path, ranks: int, wrap: str) -> None:
    outcome = killed_once(tmp_path, program(wrap, steps=9), ranks=ranks)
    assert outcome.is_equal, (outcome.rows, outcome.resumed.texts)


SCALED = """
for block in model[:2]:
    block.forward = scaled.__get__(block)
    block.scale = nn.Parameter(DTensor.from_local(
        torch.full((14,), 0.5), block.up.weight.device_mesh, [Replicate()], run_check=False,
    ))
"""
SCALED_BLOCK = """
def scaled(self, x):
    return x + self.down(self.up(self.norm(x)) * self.scale)
"""


@SLOW
@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_gradients_that_are_placed_otherwise_than_their_parameters_come_back(
    tmp_path: Path, how: str
) -> None:
    """The scale is replicated, and its gradient is cut as what it scales."""
    plan = '{"up": ColwiseParallel(use_local_output=False), "down": RowwiseParallel()}'
    mesh = "init_device_mesh('cpu', (2,), mesh_dim_names=('tp',))"
    wrap = f"parallel({mesh}, {plan})\n{SCALED_BLOCK}{SCALED}"
    if how == "killed":  # gradients that last are in each checkpoint
        loop = LOOP.replace("zero_grad()", "zero_grad(set_to_none=False)")
        outcome = killed_once(tmp_path, program(wrap, loop), ranks=2)
        assert outcome.is_equal, (outcome.rows, outcome.resumed.texts)
        return
    source = program(wrap, ACCUMULATED)
    whole = live(tmp_path, source, "whole", ranks=2)
    stopped = live(tmp_path, source, "run", ranks=2, env={"STOP": "11"})
    again = live(tmp_path, source, "run", ranks=2)
    assert [*whole.codes, *stopped.codes, *again.codes] == [0] * 6, (stopped.texts, again.texts)
    assert list(differences(newest(tmp_path / "whole"), newest(tmp_path / "run"))) == []


def test_another_mesh_on_as_many_ranks_is_no_mismatch(tmp_path: Path) -> None:
    """Each rank logs the loss of other samples then: means are compared, with a tolerance."""
    env = "WRAP_BY_ENV = os.environ['KIND']\nTP() if WRAP_BY_ENV == 'tp' else FSDP()"
    either = f"def TP():\n    {TP}\ndef FSDP():\n    {FSDP}\n{env}"
    source = program(either, steps=12)
    killed = live(tmp_path, source, "run", ranks=2, env={"KIND": "tp", "DIE": "9"})
    assert killed.codes[0] == -9, killed.texts
    again = live(tmp_path, source, "run", ranks=2, env={"KIND": "fsdp"})
    assert again.codes == [0, 0] and "MISMATCH" not in again.text, again.texts
