"""State that is another one on each rank: each gets its own back, and what cannot be kept for each
is said."""

from __future__ import annotations

import pytest
import torch
from library_runs import newest
from programs import STEP, killed_once, live

from harness import state
from harness.data import sampler_state
from harness.distributed.ranks import World
from harness.run import drill_hooks
from harness.tracking.attribute_values import digest_of
from harness.tracking.payload import RankEntries
from harness.tracking.tensor_leaves import Leaf, leaves_of

NORMALISER = """
class Normaliser:
    def __init__(self):
        self.n, self.mean = 0, torch.zeros(8)

    def __call__(self, x):
        self.n += len(x)
        self.mean += (x.sum(0) - len(x) * self.mean) / self.n
        return x - self.mean

    def state_dict(self):
        return {"n": self.n, "mean": self.mean}

    def load_state_dict(self, state):
        self.n, self.mean = state["n"], state["mean"]
"""

DDP = """
run = init()
model = nn.parallel.DistributedDataParallel(
    nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
"""

LOOP = (
    """
for x, y in run.batches(points(), 16, epochs=2):"""
    + STEP
)

OWN = (
    NORMALISER
    + DDP
    + """
normaliser = Normaliser()
run.track(model=model, optimizer=optimizer, normaliser=normaliser)
run.state.setdefault("seen", [])
print("state at the start:", run.state["seen"], normaliser.n)
"""
    + LOOP.replace("model(x)", "model(normaliser(x))").replace(
        "    die(run)",
        "    run.state['seen'] = [run.rank, round(float(x.sum()), 6)]\n"
        "    run.state['alike'] = run.step\n    die(run)",
    )
    + "print('last:', run.state, normaliser.n, normaliser.mean.tolist())\n"
)


def last(lived):
    return [
        next(line for line in text.splitlines() if line.startswith("last:")) for text in lived.texts
    ]


def check_each_has_its_own(outcome):
    assert outcome.is_equal, (outcome.rows, outcome.resumed.texts)
    assert last(outcome.whole) == last(outcome.resumed)
    assert last(outcome.whole)[0] != last(outcome.whole)[1]


def test_a_normaliser_and_plain_values_of_its_own_come_back_to_each_rank(tmp_path):
    outcome = killed_once(tmp_path, OWN, ranks=2)
    check_each_has_its_own(outcome)
    assert "normaliser is another one on each rank: each keeps its own" in outcome.whole.text
    payload = newest(tmp_path / "whole")
    assert payload["format_version"] == 2
    assert sorted(payload["own"][1]) == ["normaliser_state_dict", "state"]
    # And nothing that is alike.
    assert [path for path, _ in payload["own"][1]["state"]] == [("seen",)]
    first = next(
        line
        for line in outcome.resumed.texts[1].splitlines()
        if line.startswith("state at the start:")
    )
    assert first.split()[4:5] == ["[1,"]  # before the loop already


KINDS = (
    """
class Holder:
    def __init__(self):
        self.held = {"last": None}

    def state_dict(self):
        return self.held

    def load_state_dict(self, state):
        self.held = state
"""
    + DDP
    + """
holder = Holder()
run.track(model=model, optimizer=optimizer, holder=holder)
print("first:", {key: type(value).__name__ for key, value in (run.state | holder.held).items()})
mine = run.rank == 0
"""
    + LOOP.replace(
        "    die(run)",
        "    run.state[f'seen{run.rank}'] = np.zeros(8, np.float32)\n"
        "    run.state['lower'] = np.float32(0.5) if mine else 0.5\n"
        "    run.state['best'] = np.float32(run.step) if mine else None\n"
        "    holder.held['last'] = np.ones(2) if mine else torch.ones(2, dtype=torch.float64)\n"
        "    die(run)",
    )
    + "print('last:', run.state)\n"
)


@pytest.mark.slow
def test_values_of_other_kinds_on_each_rank_come_back_in_their_kinds(tmp_path):
    outcome = killed_once(tmp_path, KINDS, ranks=2)
    assert outcome.is_equal, (outcome.rows, outcome.resumed.texts)
    assert last(outcome.whole) == last(outcome.resumed)
    for rank, kinds in enumerate(
        (
            {"seen0": "ndarray", "lower": "float32", "best": "float32", "last": "ndarray"},
            {"seen1": "ndarray", "lower": "float", "best": "NoneType", "last": "Tensor"},
        )
    ):
        assert f"first: {kinds}" in outcome.resumed.texts[rank]


def test_another_number_of_ranks_is_told_what_is_lost(tmp_path):
    outcome = killed_once(tmp_path, OWN, ranks=2, ranks_then=1)
    assert outcome.resumed.code == 0
    assert (
        "2 rank(s) before, 1 now: what each rank had for itself is lost "
        "(normaliser_state_dict, state)" in outcome.resumed.text
    )


ORDINARY = (
    DDP
    + """
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
ema = torch.optim.swa_utils.AveragedModel(model.module)
run.track(model=model, optimizer=optimizer, scheduler=scheduler, ema=ema)
"""
    + LOOP.replace(
        "    run.log",
        "    scheduler.step()\n    ema.update_parameters(model.module)\n"
        "    run.state['best'] = run.step\n    run.log",
    )
)


EVALUATE = """    if run.step % 3 == 0:
        run.evaluate(points(4), lambda batch: {"val_loss": model(batch[0]).square().sum()})
"""


@pytest.mark.parametrize("evaluate", ["", EVALUATE], ids=["trains", "evaluates"])
def test_an_ordinary_loop_keeps_nothing_for_each_rank_and_is_told_nothing(evaluate, tmp_path):
    source = ORDINARY.replace("    run.log", evaluate + "    run.log")
    lived = live(tmp_path, source, "whole", ranks=2)
    assert lived.codes == [0, 0], lived.texts
    assert "another one on each rank" not in lived.text
    payload = newest(tmp_path / "whole")
    assert "own" not in payload
    assert payload["format_version"] == 1


ALONE = (
    """
run = init()
torch.manual_seed(run.rank)
model = nn.Linear(8, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
run.track(model=model, optimizer=optimizer)
"""
    + LOOP.replace("    die(run)", "    die(run)\n")
    + "print('last:', model.weight.tolist())\n"
)


def test_a_model_without_ddp_comes_back_to_each_rank(tmp_path):
    outcome = killed_once(tmp_path, ALONE, ranks=2)
    check_each_has_its_own(outcome)


LATER = (
    """
class Counter:
    n = 0

    def state_dict(self):
        return {"n": self.n}

    def load_state_dict(self, state):
        self.n = state["n"]

"""
    + DDP
    + """
counter = Counter()
run.track(model=model, optimizer=optimizer, counter=counter)
"""
    + LOOP.replace("    die(run)", "    counter.n += run.rank if run.step > 4 else 1\n    die(run)")
    + "print('last:', counter.n)\n"
)


@pytest.mark.slow
@pytest.mark.parametrize("more", ["", ', "table": torch.full((1 << 20,), self.n)'])
def test_what_begins_to_differ_after_the_first_save_is_found_at_the_next(tmp_path, more):
    """What is large, too."""
    source = LATER.replace('"n": self.n', f'"n": self.n{more}')
    outcome = killed_once(tmp_path, source, ranks=2)
    assert outcome.is_equal, (outcome.rows, outcome.resumed.texts)
    assert last(outcome.whole) == last(outcome.resumed) == ["last: 4", "last: 20"]


IGNORED = (
    """
class Own(nn.Linear):
    def __init__(self):
        super().__init__(8, 1)
        self.own = nn.Parameter(torch.zeros(1))
        self.register_buffer("sum", torch.zeros(1))

    def forward(self, x):
        self.sum += x.sum()
        return super().forward(x) + self.own + 0.01 * self.sum

run = init()
torch.manual_seed(0)
model = Own()
nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
    model, [".own", "sum"]
)
ddp = nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
run.track(model=ddp, optimizer=optimizer)
"""
    + LOOP.replace("model(x)", "ddp(x)")
    + "print('last:', model.own.item(), model.sum.item())\n"
)


def test_what_ddp_is_set_to_ignore_comes_back_to_each_rank(tmp_path):
    outcome = killed_once(tmp_path, IGNORED, ranks=2)
    check_each_has_its_own(outcome)
    kept = newest(tmp_path / "whole")["own"][1]
    assert {path for path, _ in kept["model_state_dict"]} == {("own",), ("sum",)}


NOT_BROADCAST = (
    DDP.replace("nn.Linear(8, 1))\n)", "nn.Linear(8, 1)), broadcast_buffers=False\n)")
    + """
model.module.register_buffer("mask", torch.ones(3))
average = torch.optim.swa_utils.AveragedModel(model.module)
run.track(model=model, optimizer=optimizer, average=average)
"""
    + LOOP.replace("    die(run)", "    average.update_parameters(model.module)\n    die(run)")
    + "means = [one.module[1].running_mean.tolist() for one in (model, average)]\n"
    + "print('last:', means, model.module.mask.tolist())\n"
)


def test_buffers_that_ddp_does_not_broadcast_come_back_to_each_rank(tmp_path):
    outcome = killed_once(tmp_path, NOT_BROADCAST, ranks=2)
    check_each_has_its_own(outcome)
    kept = newest(tmp_path / "whole")["own"][1]
    assert {path for path, _ in kept["model_state_dict"]} == {
        ("1.running_mean",),
        ("1.running_var",),
    }
    alone = World(0, 1, torch.device("cpu"), 10)
    assert "of average, model all have that of rank 0" in RankEntries().restore(
        {"own": [{"average_state_dict": [], "model_state_dict": []}] * 2}, alone
    )


EVALUATED = (
    """
class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.memory = torch.zeros(8)
        self.register_buffer("sum", torch.zeros(3))
        self.register_buffer("sliced", self.memory[1::3])
        self.register_buffer("overlapping", self.memory[0:5])
        self.register_buffer("expanded", torch.zeros(1).expand(64, 64))
        self.register_buffer("sparse", torch.eye(2).to_sparse())
        self.register_buffer("flags", torch.zeros((), dtype=torch.bool))
        self.register_buffer("complex", torch.zeros(2, dtype=torch.complex64))
        self.register_buffer("sized", torch.zeros(run.rank))

    def forward(self, x):
        if self.training:
            self.sum += x.sum()
            self.memory += run.rank + 1
            self.expanded[:1, :1] += run.rank + 1
            self.flags ^= run.rank == 1
            self.complex += run.rank * 1j
        return x

run = init()
torch.manual_seed(0)
own = Own()
layers = nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)
model = nn.parallel.DistributedDataParallel(nn.Sequential(*layers))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
run.track(model=model, optimizer=optimizer, holder=own)

def told():
    return [own.sum.tolist(), own.sliced.tolist(), own.overlapping.tolist(),
            own.expanded[5, 5].item(), own.flags.item(), own.complex.tolist()]

def measure(batch):
    seen.append(told())
    return {"val_loss": model(own(batch[0])).square().sum()}

seen = []
"""
    + LOOP.replace("model(x)", "model(own(x))").replace(
        "    die(run)",
        """    before, memory = told(), own.memory.tolist()
    if run.step % 2 == 0:
        run.evaluate(points(5), measure, batch_size=3)
        mine = run.world.gather(before)
        assert all(of == mine[0] for of in seen), (seen, mine)
        seen.clear()
    assert (told(), own.memory.tolist()) == (before, memory), (told(), before)
    die(run)""",
    )
    + "print('last:', told())\n"
)


def test_an_evaluation_gives_each_rank_its_own_buffers_back(tmp_path):
    """Also those that are views of memory, or repeat it."""
    outcome = killed_once(tmp_path, EVALUATED, ranks=2)
    assert outcome.is_equal, (outcome.rows, outcome.whole.texts, outcome.resumed.texts)
    assert last(outcome.whole) == last(outcome.resumed)
    assert last(outcome.whole)[0] != last(outcome.whole)[1]


SHARED = """
from harness.distributed.shared_tensors import share_state
run = init()
memory = torch.full((4, 4), float(run.rank))
model = nn.Linear(4, 2)
model.weight = nn.Parameter(memory[:, 1:3].t())
model.register_buffer("sparse", (run.rank + torch.eye(2)).to_sparse())
model.register_buffer("expanded", torch.full((1,), float(run.rank)).expand(64, 64))
share_state(model, run.world)
assert memory.tolist() == [[run.rank, 0, 0, run.rank]] * 4, memory
assert model.sparse.to_dense().tolist() == torch.eye(2).tolist() and not model.expanded.any()
assert len({str(of) for of in run.world.gather(model.bias.tolist())}) == 1
"""


def test_shared_weights_are_written_where_they_lie(tmp_path):
    lived = live(tmp_path, SHARED, "a", ranks=2)
    assert lived.codes == [0, 0], lived.texts


UNSYNCHRONISED = {
    "local steps": """
    with model.no_sync():
        (model(x) - y).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    if run.step % 4 == 0:
        for parameter in model.parameters():
            torch.distributed.all_reduce(parameter.data)
            parameter.data /= 2
    die(run)
""",
    "a hook that does not reduce": STEP,
    "a body unfrozen late": STEP,
}


@pytest.mark.slow
@pytest.mark.parametrize("how", UNSYNCHRONISED)
def test_what_ddp_is_kept_from_synchronising_comes_back_to_each_rank(how, tmp_path):
    setup = DDP
    if how == "a hook that does not reduce":
        setup += """
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
model.register_comm_hook(None, noop_hook)
"""
    if how == "a body unfrozen late":
        frozen = """
body = nn.Linear(8, 8).requires_grad_(False)
model = nn.parallel.DistributedDataParallel(nn.Sequential(body, nn.Linear(8, 1)))
body.requires_grad_(True)
"""
        setup = setup.replace("optimizer =", frozen + "optimizer =")
    source = (
        setup
        + "run.track(model=model, optimizer=optimizer)"
        + "\nfor x, y in run.batches(points(), 16, epochs=2):"
        + UNSYNCHRONISED[how]
        + "print('last:', sum(p.double().sum().item() for p in model.parameters()))\n"
    )
    outcome = killed_once(tmp_path, source, ranks=2)
    assert outcome.is_equal, (outcome.rows, outcome.resumed.texts)
    assert last(outcome.whole) == last(outcome.resumed)
    assert "model is another one on each rank: each keeps its own" in outcome.whole.text


PLATEAU = (
    DDP
    + """
for parameter in model.parameters():
    parameter.requires_grad_(True)
scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
run.track(model=model, optimizer=optimizer, scheduler=scheduler)
"""
    + LOOP.replace("    die(run)", "    scheduler.step(float(loss))\n    die(run)")
    + "print('last:', model.module[0].weight.tolist())\n"
)


@pytest.mark.slow
def test_a_schedule_by_each_ranks_own_loss_makes_the_model_differ_and_all_of_it_comes_back(
    tmp_path,
):
    outcome = killed_once(tmp_path, PLATEAU, ranks=2)
    check_each_has_its_own(outcome)


BIG = (
    DDP
    + """
class Table:
    def __init__(self):
        self.values = torch.full((17 << 20,), float(run.rank))

    def state_dict(self):
        return {"values": self.values}

    def load_state_dict(self, state):
        self.values = state["values"]


table = Table()
run.track(model=model, optimizer=optimizer, table=table)
"""
    + LOOP.replace("epochs=2", "epochs=1, max_steps=3")
)


def test_what_is_too_big_to_be_kept_for_each_is_said_at_the_first_save(tmp_path):
    lived = live(tmp_path, BIG, "whole", ranks=2)
    assert lived.codes == [0, 0], lived.texts
    assert (
        "table is another one on each rank, and 71.3 MB of it differ: only the writer's is saved"
        in lived.text
    )
    assert "own" not in newest(tmp_path / "whole")


AVERAGED = (
    """
class Average(nn.Module):
    def __init__(self, source):
        super().__init__()
        import copy
        self.module = copy.deepcopy(source)

    @torch.no_grad()
    def update(self, source, step):
        for own, theirs in zip(self.module.state_dict().values(), source.state_dict().values()):
            (
                own.lerp_(theirs, 1.0 if step <= 3 else 0.1)
                if own.is_floating_point()
                else own.copy_(theirs)
            )
"""
    + DDP
    + """
average = Average(model.module)
run.track(model=model, optimizer=optimizer, average=average)
"""
    + LOOP.replace("    die(run)", "    average.update(model.module, run.step)\n    die(run)")
    + "print('last:', average.module[1].running_mean.tolist())\n"
)


@pytest.mark.slow
def test_an_average_that_begins_as_a_copy_of_each_ranks_buffers_is_kept_for_each(tmp_path):
    # Resumes from step 3, where it still is a copy.
    outcome = killed_once(tmp_path, AVERAGED, ranks=2, die=5)
    assert "resumes from step 3" in outcome.resumed.text
    assert outcome.is_equal, outcome.rows
    assert last(outcome.whole) == last(outcome.resumed) and len(set(last(outcome.whole))) == 2


DIGESTS = {
    "of each rank": lambda tensor: [
        leaf.digest() for leaf in leaves_of(state.as_captured("", {"x": tensor})).values()
    ],
    "of an attribute": digest_of,
    "of a step of a drill": drill_hooks.digest,
    "of a sampler": sampler_state._digest,
}


@pytest.mark.filterwarnings("ignore:torch.quantize:UserWarning")
@pytest.mark.parametrize("name", DIGESTS)
def test_quantized_tensors_of_the_same_integers_and_another_scale_have_other_digests(name):
    digest = DIGESTS[name]
    a, b = (
        torch.quantize_per_tensor(torch.arange(4.0) * scale, scale, 0, torch.qint8)
        for scale in (1.0, 2.0)
    )
    scales, zeros = torch.tensor([0.1, 0.2]), torch.zeros(2, dtype=torch.int64)
    c, d = (
        torch.quantize_per_channel(torch.zeros(2, 3), scales * by, zeros, 0, torch.qint8)
        for by in (1, 2)
    )
    assert digest(a) == digest(a.clone()) != digest(b)
    assert digest(c) == digest(c.clone()) != digest(d)


LOSSES = (
    DDP
    + """
run.track(model=model, optimizer=optimizer)
"""
    + LOOP.replace(
        "    run.log(loss=loss)",
        "    if run.step % 7 == 2 + 2 * run.rank:\n        run.log(loss=loss)\n"
        "    if run.step % 10 == 5:\n"
        "        run.evaluate(points(4), means)",
    )
).replace(
    "run = init()",
    """
def means(batch):
    value = len(batch[0]) * run.step / 100
    return {"up": value, "down": -value}


run = init(log_every_steps=50, best=os.environ.get("BEST", "up:max"))""",
)


@pytest.mark.slow
def test_a_loss_that_each_rank_logs_now_and_then_and_another_metric(tmp_path):
    outcome = killed_once(tmp_path, LOSSES, die=14, ranks=2)
    assert outcome.is_equal, (outcome.rows, outcome.resumed.text)
    last = newest(tmp_path / "whole")
    assert last["loss"] is not None and last["best"] == pytest.approx(0.15)
    more = live(
        tmp_path,
        LOSSES.replace("epochs=2", "epochs=3"),
        "whole",
        ranks=2,
        env={"BEST": "down:min"},
    )
    assert more.code == 0 and "are ranked by down:min from here on" in more.text
    assert newest(tmp_path / "whole")["best"] == pytest.approx(-0.25)


VIEWS = """
run = init()
model = nn.parallel.DistributedDataParallel(
    nn.Linear(8, 8), gradient_as_bucket_view=True, find_unused_parameters=True
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
run.track(model=model, optimizer=optimizer)
for x, y in run.batches(points(60), 6, epochs=1):
    optimizer.zero_grad(set_to_none=False)
    (model(x) - y).square().mean().backward()
    optimizer.step()
    run.log(loss=0)
    die(run)
"""


def test_gradients_that_ddp_rounds_otherwise_after_a_restart_are_named(tmp_path):
    """Torch divides a gradient that is part of a bucket, and multiplies another one."""
    live(tmp_path, VIEWS, "run", ranks=3, env={"DIE": "7"})
    resumed = live(tmp_path, VIEWS, "run", ranks=3)
    assert "resumes from step 6" in resumed.text, resumed.text
    assert resumed.text.count("model: DDP with gradient_as_bucket_view") == 1, resumed.text


@pytest.mark.parametrize("count", [1, 511, 512, 513, 1 << 15, (1 << 15) + 1, 300_005])
def test_a_digest_tells_changed_and_exchanged_elements(count: int) -> None:
    content, last = torch.arange(count, dtype=torch.int64) ** 2 + 1, count - 1
    places = {(0, last), (last // 2, last), (0, min(1 << 15, last)), (0, min(1, last))} - {(0, 0)}
    found = [content, content.roll(1)] if last else [content]
    for one, other in places:
        exchanged, changed = content.clone(), content.clone()
        exchanged[[one, other]] = content[[other, one]]
        changed[[one, other]] += torch.tensor([5, -5])
        found += [exchanged, changed]
    assert len({Leaf(tensor).digest() for tensor in found}) == len(found)
    assert Leaf(content.clone()).digest() == Leaf(content).digest()


@pytest.mark.parametrize("width", [64, 512, 2048])
def test_permutation_matrices_have_other_digests(width: int) -> None:
    found = {
        Leaf(torch.eye(width, dtype=torch.float64)[torch.randperm(width)]).digest()
        for _ in range(3)
    }
    assert len(found) == 3
