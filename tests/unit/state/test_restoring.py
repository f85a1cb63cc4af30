"""What a checkpoint gives back is what was there: by its name, in its kind, in its dtype; or it is
refused in words."""

from __future__ import annotations

import collections
import copy
import io
import itertools
import re
import shutil
from typing import Any, cast

import numpy as np
import pytest
import torch
from library_runs import newest
from programs import killed_once, live
from torch import nn

import harness
from harness import state
from harness.checkpoint.format import version_of
from harness.checkpoint.load import reason
from harness.data.dataset_source import OwnSource
from harness.distributed.ranks import World
from harness.errors import UsageError
from harness.exchange.compare import compare, differences
from harness.selfcheck import resume_checks
from harness.state import lr_schedules
from harness.state.rng import gpu_states
from harness.tracking.user_state import UserState
from harness.untracked import foreign_optimizers

LOOP = """
for x, y in run.batches(points(), 16, epochs=int(os.environ.get("EPOCHS", 2))):
    loss = (model(x) - y).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    {}
    run.log(loss=loss)
    die(run)
"""


def test_a_ranks_own_gpu_goes_on_where_its_own_was_on_whatever_node_it_is_now():
    """The others keep their numbers, if they can."""
    assert gpu_states("abcd", before=1, own=1, count=4) == (
        {0: "a", 1: "b", 2: "c", 3: "d"},
        "",
    )
    assert gpu_states("abcd", before=0, own=2, count=4) == (
        {0: "a", 1: "b", 2: "a", 3: "d"},
        "",
    )
    chosen, notice = gpu_states("abcd", before=3, own=0, count=1)
    assert chosen == {0: "d"} and "4 GPU(s) seen by a rank before, 1 now" in notice
    assert "those of others are not" in notice
    assert gpu_states("a", before=0, own=2, count=4)[0] == {2: "a"}
    chosen, notice = gpu_states("ab", before=1, own=0, count=0)
    assert chosen == {} and notice.endswith("the generators of GPUs are not restored")
    assert gpu_states("", before=0, own=3, count=4) == ({}, "")


def test_gpus_that_are_gone_are_named_at_the_resume():
    gone = [torch.zeros(16, dtype=torch.uint8)] * (torch.cuda.device_count() + 1)
    payload = {"rng": [state.rng_state() | {"cuda": gone}], "data": {"iterators": [None]}}
    world = World(0, 1, torch.device("cpu"), 10)
    (notice,) = resume_checks.restore_generators(payload, world, OwnSource(), 1, 0)
    assert f"{len(gone)} GPU(s) seen by a rank before, {len(gone) - 1} now" in notice


def saved_and_read(payload):
    file = io.BytesIO()
    torch.save(payload, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


def stepped(model, optimizer, times=3):
    torch.manual_seed(1)
    for _ in range(times):
        optimizer.zero_grad()
        sum((p * torch.randn_like(p)).sum() for p in model.parameters()).backward()
        optimizer.step()


# --- names beside numbers ---

TWINS = """
run = init()
model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 1))
layers = [f"{at}.{kind}" for at in (0, 1, 2) for kind in ("weight", "bias")]
# as of a set of names: another in each process
order = list(reversed(layers)) if "BACKWARDS" in os.environ else layers
named = dict(model.named_parameters())
if "GROUPS" in os.environ:
    groups = [{"params": [named[name]], "lr": 0.01 * (1 + layers.index(name))} for name in order]
else:
    groups = [named[name] for name in order]
optimizer = torch.optim.AdamW(groups, lr=0.05)
run.track(model=model, optimizer=optimizer)
"""


@pytest.mark.parametrize("how", [{}, {"GROUPS": "1"}])
def test_moments_go_to_the_parameters_of_their_names(how, tmp_path):
    outcome = killed_once(tmp_path, TWINS + LOOP.format(""), env=how, then={"BACKWARDS": "1"})
    assert outcome.whole.code == outcome.resumed.code == 0, outcome.resumed.text
    found = compare(tmp_path / "whole", tmp_path / "killed")
    assert found.count == 0, str(found)


REGROUPED = """
run = init()
model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 1))
layers = [[model[0].weight], [model[1].weight, model[2].weight], [model[0].bias, model[2].bias]]
groups = [
    {"params": layer, "lr": 0.01 * (1 + at), "momentum": 0.1 * at}
    for at, layer in enumerate(layers)
]
of_epochs = [lambda epoch, at=at: 0.9 ** (at * epoch) for at in range(3)]
if "BACKWARDS" in os.environ:  # as of a set: another order in each process
    groups, of_epochs = groups[::-1], of_epochs[::-1]
optimizer = torch.optim.SGD(groups, lr=0.05)
run.track(model=model, optimizer=optimizer)
schedulers = torch.optim.lr_scheduler
scheduler = {
    "lambdas": lambda: schedulers.LambdaLR(optimizer, of_epochs),
    "several": lambda: schedulers.SequentialLR(
        optimizer,
        [schedulers.ConstantLR(optimizer, 0.5), schedulers.LambdaLR(optimizer, of_epochs)],
        [4],
    ),
}[os.environ["SCHEDULE"]]()
run.track(scheduler=scheduler)
"""


@pytest.mark.parametrize("schedule", ["lambdas", "several"])
def test_schedules_follow_groups_that_have_changed_their_places(schedule, tmp_path):
    """Of unequal sizes, and the scheduler is tracked after the optimizer."""
    outcome = killed_once(
        tmp_path,
        REGROUPED + LOOP.format("scheduler.step()"),
        env={"SCHEDULE": schedule},
        then={"BACKWARDS": "1"},
    )
    assert outcome.whole.code == outcome.resumed.code == 0, outcome.resumed.text
    assert "warning: scheduler" not in outcome.resumed.text
    found = compare(tmp_path / "whole", tmp_path / "killed")
    assert found.count == 0, str(found)


class OwnSchedule(torch.optim.lr_scheduler.LRScheduler):
    def __init__(self, optimizer):
        self.floors = [group["lr"] / 10 for group in optimizer.param_groups]
        super().__init__(optimizer)

    def get_lr(self):
        return [
            max(base * 0.9**self.last_epoch, floor)
            for base, floor in zip(self.base_lrs, self.floors, strict=True)
        ]


def test_a_schedule_whose_values_cannot_follow_their_groups_is_refused():
    def made(order):
        model = net(4, 4, 4)
        groups = [{"params": list(model[at].parameters()), "lr": 0.1 + at} for at in order]
        optimizer = torch.optim.SGD(groups)
        return {"model": model, "optimizer": optimizer, "scheduler": OwnSchedule(optimizer)}

    payload = saved_and_read(state.capture(made((0, 1))))
    state.restore(made((0, 1)), {}, payload, "it")
    with pytest.raises(UsageError, match=r"another order than before\s*found: floors of OwnSch"):
        state.restore(made((1, 0)), {}, payload, "it")


def test_an_order_that_is_not_the_models_is_kept_and_another_one_told(tmp_path):
    outcome = killed_once(
        tmp_path, TWINS + LOOP.format(""), env={"BACKWARDS": "1"}, then={"BACKWARDS": "1"}
    )
    assert outcome.is_equal, outcome.resumed.text
    payload = newest(tmp_path / "killed")
    assert payload["format_version"] == 2
    assert payload["names"] == {
        "optimizer": [[f"model.{at}.{kind}" for at in (2, 1, 0) for kind in ("bias", "weight")]]
    }


def net(*sizes):
    return nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(sizes)))


def test_an_ordinary_checkpoint_needs_no_names():
    model, other = net(4, 4, 4), net(4, 4, 4)
    decay = (
        [p for p in model.parameters() if p.dim() > 1],
        [p for p in model.parameters() if p.dim() < 2],
    )
    for optimizer in (
        torch.optim.AdamW(model.parameters()),
        torch.optim.AdamW([{"params": list(part)} for part in decay]),
    ):
        assert "names" not in state.capture({"model": model, "optimizer": optimizer, "ema": other})
    both = {
        "g": model,
        "d": other,
        "g_opt": torch.optim.SGD(model.parameters()),
        "d_opt": torch.optim.SGD(other.parameters()),
    }
    assert "names" not in state.capture(both)
    swapped = both | {
        "g_opt": torch.optim.SGD(other.parameters()),
        "d_opt": torch.optim.SGD(model.parameters()),
    }
    assert set(state.capture(swapped)["names"]) == {"g_opt", "d_opt"}
    assert "names" in state.capture(
        {"model": model, "optimizer": torch.optim.SGD(list(model[1].parameters()))}
    )


def trained(groups_of, sizes=(4, 4, 4)):
    model = net(*sizes)
    optimizer = torch.optim.AdamW(groups_of(model), lr=0.1)
    stepped(model, optimizer)
    return {"model": model, "optimizer": optimizer}


def backwards(model):
    return list(model.parameters())[::-1]


def test_parameters_under_a_new_grouping_or_other_ones_are_refused_with_their_names():
    payload = saved_and_read(state.capture(trained(backwards)))
    model = net(4, 4, 4)
    halves = {"model": model, "optimizer": torch.optim.AdamW(model[0].parameters())}
    with pytest.raises(UsageError, match="parameter groups are others"):
        state.restore(halves, {}, payload, "it")
    model, other = net(4, 4, 4), net(4, 4, 4)
    mixed = {
        "model": model,
        "twin": other,
        "optimizer": torch.optim.AdamW(
            [*list(model.parameters())[:2], *list(other.parameters())[:2]]
        ),
    }
    payload["twin_state_dict"] = payload["model_state_dict"]
    with pytest.raises(
        UsageError, match=r"not there any more: model.1.bias, model.1.weight; new: twin.0.bias"
    ):
        state.restore(mixed, {}, payload, "it")


def test_without_names_shapes_are_compared_in_every_dimension():
    payload = saved_and_read(state.capture(trained(nn.Module.parameters, (4, 3, 4))))
    model = net(4, 3, 4)
    swapped = {
        "model": model,
        "optimizer": torch.optim.AdamW(
            [model[1].weight, model[0].bias, model[0].weight, model[1].bias]
        ),
    }
    with pytest.raises(
        UsageError,
        match=r"another order than in it.*\n.*parameter 0 is of shape \(4, 3\); expected: \(3, 4\)",
    ):
        state.restore(swapped, {}, payload, "it", says_names=False)  # of an older harness
    state.restore(swapped, {}, payload, "it")
    assert torch.equal(
        swapped["optimizer"].state[model[0].weight]["exp_avg"],
        payload["optimizer_state_dict"]["state"][0]["exp_avg"],
    )


def test_names_that_the_optimizer_was_given_are_used_where_no_module_is_tracked():
    class Holder:
        def __init__(self):
            self.tensors = {
                "a": torch.zeros(3, requires_grad=True),
                "b": torch.zeros(3, requires_grad=True),
            }

        def state_dict(self):
            return {name: tensor.detach() for name, tensor in self.tensors.items()}

        def load_state_dict(self, saved):
            for name, tensor in self.tensors.items():
                tensor.data.copy_(saved[name])

    one, other = Holder(), Holder()
    optimizer = torch.optim.Adam(one.tensors.items())
    tracked = {"holder": one, "optimizer": optimizer}
    one.tensors["a"].sum().backward()
    optimizer.step()
    payload = saved_and_read(state.capture(tracked))
    fresh = torch.optim.Adam([("b", other.tensors["b"]), ("a", other.tensors["a"])])
    state.restore({"holder": other, "optimizer": fresh}, {}, payload, "it")
    assert set(fresh.state) == {other.tensors["a"]} and fresh.param_groups[0]["param_names"] == [
        "b",
        "a",
    ]


def test_compiled_layers_leave_no_trace_in_files_and_older_files_still_load():
    def made(compiled):
        model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.BatchNorm1d(4)), nn.Linear(4, 1))
        for at in compiled:
            model[at] = cast("nn.Module", torch.compile(model[at], backend="eager"))
        return {"model": model, "optimizer": torch.optim.AdamW(model.parameters())}

    one, plain = made([0, 1]), made([])
    stepped(one["model"], one["optimizer"])
    payload = saved_and_read(state.capture(one))
    assert (
        list(payload["model_state_dict"]) == list(plain["model"].state_dict())
        and "names" not in payload
    )
    assert payload["model_state_dict"]._metadata == plain["model"].state_dict()._metadata
    older = payload | {"model_state_dict": one["model"].state_dict()}
    for file in (payload, older):
        for compiled in ([], [0, 1], [2]):
            again = made(compiled)
            state.restore(again, {}, file, "it")
            assert not list(differences(state.capture(again), state.capture(one)))


# --- dtypes ---


def test_another_dtype_is_refused_unless_it_is_accepted():
    one = trained(nn.Module.parameters)
    payload = saved_and_read(state.capture(one))
    model = net(4, 4, 4).bfloat16()
    other = {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=0.1)}
    with pytest.raises(
        UsageError,
        match=r"model is of another dtype(.|\n)*0.weight: float32 in the checkpoint, bfloat16 here"
        r"(.|\n)*resume.accept=\[dtype\]",
    ):
        state.restore(other, {}, payload, "it")
    said = state.restore(other, {}, payload, "it", ["dtype"])
    assert said == ["model: 4 tensor(s) are bfloat16 now, and were float32: no exact resume"]
    stepped(model, other["optimizer"])


def test_what_is_kept_of_parameters_of_the_same_dtype_stays_exact_beside_accepted_ones():
    def made(dtype):
        first, second = net(4, 4, 4).to(dtype), net(4, 4, 4).bfloat16()
        both = torch.optim.Adam([*first.parameters(), *second.parameters()])
        return {"first": first, "second": second, "optimizer": both}

    one = made(torch.float32)
    # In single precision, as some optimizers keep it of half parameters.
    for parameter in one["optimizer"].param_groups[0]["params"]:
        one["optimizer"].state[parameter] = {
            "step": torch.tensor(1.0),
            "exp_avg": torch.randn(parameter.shape),
        }
    payload = saved_and_read(state.capture(one))
    other = made(torch.bfloat16)
    said = state.restore(other, {}, payload, "it", ["dtype"])
    assert said == ["first: 4 tensor(s) are bfloat16 now, and were float32: no exact resume"]
    kept = [entry["exp_avg"] for entry in other["optimizer"].state_dict()["state"].values()]
    assert [summary.dtype for summary in kept] == [torch.bfloat16] * 4 + [torch.float32] * 4
    saved = payload["optimizer_state_dict"]["state"]
    assert all(torch.equal(kept[at], saved[at]["exp_avg"]) for at in range(4, 8))


HALF = """
run = init(accept=os.environ.get("ACCEPT", "").split())
torch.manual_seed(0)
dtype = getattr(torch, os.environ.get("DTYPE", "float32"))
model = nn.Linear(8, 1).to(dtype)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
run.track(model=model, optimizer=optimizer)
for x, y in run.batches(points(), 16, epochs=1):
    loss = (model(x.to(dtype)) - y).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    die(run)
"""


def test_a_second_life_in_half_precision_is_refused_unless_it_is_accepted(tmp_path):
    """SGD would go on without a word."""
    assert live(tmp_path, HALF, "run", env={"DIE": "5"}).code == -9
    refused = live(tmp_path, HALF, "run", env={"DTYPE": "bfloat16"})
    assert refused.code == 78, refused.text
    assert "weight: float32 in the checkpoint, bfloat16 here" in refused.text
    accepted = live(tmp_path, HALF, "run", env={"DTYPE": "bfloat16", "ACCEPT": "dtype"})
    assert accepted.code == 0, accepted.text
    assert "2 tensor(s) are bfloat16 now, and were float32: no exact resume" in accepted.text


def test_the_reason_of_a_refused_file_is_one_line_without_escape_codes(tmp_path):
    torch.save({"a": collections.deque([1])}, tmp_path / "x.pt")
    with pytest.raises(Exception, match="\x1b") as pages:
        torch.load(tmp_path / "x.pt", weights_only=True)
    text = reason(pages.value)
    assert "\x1b" not in text and "\n" not in text and "deque" in text


# --- kinds ---


class Pair(collections.namedtuple("Pair", "x y")):
    pass


VALUES = {
    "array": np.arange(6, dtype=np.uint16).reshape(2, 3),
    "fortran": np.asfortranarray(np.random.default_rng(0).normal(size=(3, 4))),
    "scalar": np.float32(0.1),
    "bool": np.bool_(True),
    "none": np.array(5),
    "text": np.array(["a", "bcd"]),
    "big": np.arange(3, dtype=">i4"),
    "dates": np.array(["2020-01-01"], dtype="datetime64[D]"),
    "half": np.float16(2),
    "str": np.str_("x"),
    "empty": np.zeros((0, 3)),
    "counts": collections.defaultdict(int, {"a": 1}),
    "lists": collections.defaultdict(list, {(1, "k"): [np.int8(3)]}),
    "counter": collections.Counter("aab"),
    "ordered": collections.OrderedDict(b=1, a=np.int64(2)),
    "last": collections.deque([1, 2], 5),
    "size": torch.Size([2, 3]),
    "dtype": torch.bfloat16,
    "device": torch.device("cpu"),
    "plain": [1, (2.5, None), {"x": b"y"}],
}


@pytest.mark.parametrize("root", ["state", "state_dict"])
def test_values_come_back_in_their_kinds(root):
    if root == "state":
        captured = state.captured({"step": 1, "state": copy.deepcopy(VALUES)}, {}).fill()
        back = state.rebuilt(saved_and_read(captured), "state")
    else:
        thing = Custom(copy.deepcopy(VALUES))
        captured, other = state.capture({"thing": thing}), Custom({})
        state.restore({"thing": other}, {}, saved_and_read(captured), "it")
        back = other.value
    assert version_of(captured) == 2
    assert list(back) == list(VALUES)
    for name, value in VALUES.items():
        assert type(back[name]) is type(value), name
        assert repr(back[name]) == repr(value), name
        if isinstance(value, np.ndarray):
            assert (
                back[name].dtype == value.dtype
                and back[name].strides == value.strides
                and back[name].flags.writeable
            )
    assert (
        back["counts"]["new"] == 0
        and back["last"].maxlen == 5
        and type(back["lists"][1, "k"][0]) is np.int8
    )


class Custom:
    def __init__(self, value):
        self.value = value

    def state_dict(self):
        return self.value

    def load_state_dict(self, saved):
        self.value = saved


def test_plain_values_need_no_kinds():
    assert (
        "kinds"
        not in state.captured(
            {"state": {"a": [1, (2.0, None)], "t": torch.ones(2)}}, {"c": Custom({"x": 1.0})}
        ).payload
    )


PUT_IN = """
import collections, dataclasses
Pair = collections.namedtuple("Pair", "x y")
@dataclasses.dataclass
class Point:
    x: int = 1
run = init()
model = nn.Linear(8, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
run.track(model=model, optimizer=optimizer)
run.state["seen"] = []
"""


@pytest.mark.parametrize(
    "value",
    [
        *("Pair(1, 2)", "Point()", "{1, 2}", "collections.defaultdict(lambda: 0)"),
        *("np.array([None])", "torch.zeros(1, requires_grad=True)", "model.bias"),
    ],
)
def test_what_could_not_come_back_is_refused_at_the_first_boundary(value, tmp_path):
    lived = live(
        tmp_path,
        PUT_IN + LOOP.format(f"run.state['seen'] += [{value}] if run.step == 2 else [run.step]"),
        "run",
    )
    assert lived.code == 78 and "state['seen'][0]" in lived.text, lived.text
    assert re.search("Put plain values there|Keep what it is made of|Put tensor.detach", lived.text)
    assert "Traceback" not in lived.text and not list((tmp_path / "run/checkpoints").iterdir())


def test_a_namedtuple_in_a_state_dict_is_refused_when_it_is_tracked():
    with pytest.raises(UsageError, match=r"thing_state_dict\['p'\] cannot be saved"):
        state.check({"thing": Custom({"p": Pair(1, 2)})})


NORMALISER = """
class Normaliser:
    def __init__(self):
        self.mean, self.count = np.zeros(8, dtype=np.float32), np.int64(0)
    def __call__(self, x):
        self.count += 1
        self.mean += (x.numpy().mean(0) - self.mean) / np.float32(self.count)
        return x - torch.from_numpy(self.mean)
    def state_dict(self):
        return {"mean": self.mean, "count": self.count}
    def load_state_dict(self, saved):
        self.mean, self.count = saved["mean"], saved["count"]
run = init()
model, normal = nn.Linear(8, 1), Normaliser()
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
run.track(model=model, optimizer=optimizer, normal=normal)
"""


def test_a_normaliser_held_in_numpy_goes_on(tmp_path):
    outcome = killed_once(
        tmp_path, NORMALISER + LOOP.replace("model(x)", "model(normal(x))").format("")
    )
    assert outcome.is_equal, outcome.resumed.text


# --- what gets its size in training ---


class Bank(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("keys", torch.empty(0, 2))
        self.register_buffer("scale", None)
        self.extra = None

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, saved):
        self.extra = saved


def test_buffers_and_extra_state_that_get_their_size_in_training_come_back():
    one, other = Bank(), Bank()
    one.keys, one.scale, one.extra = (
        torch.randn(5, 2),
        torch.tensor(3.0, dtype=torch.float64),
        torch.ones(7),
    )
    payload = saved_and_read(state.capture({"bank": one}))
    state.restore({"bank": other}, {}, payload, "it")
    assert not list(differences(one.state_dict(), other.state_dict())) and other.keys.shape == (
        5,
        2,
    )
    with pytest.raises(
        UsageError,
        match=r"another bank(.|\n)*mis-shaped  layer.weight(.|\n)*run.epoch and run.step are known",
    ):
        larger = Bank()
        larger.layer = nn.Linear(2, 3)
        state.restore({"bank": larger}, {}, payload, "it")


def test_observers_of_torch_resize_themselves():
    from torch.ao.quantization import PerChannelMinMaxObserver

    one, other = PerChannelMinMaxObserver(), PerChannelMinMaxObserver()
    one(torch.randn(3, 4))
    state.restore({"model": other}, {}, saved_and_read(state.capture({"model": one})), "it")
    assert torch.equal(one.min_val, other.min_val) and other.min_val.shape == (3,)


class Repeated(nn.Module):
    once: torch.Tensor
    wide: torch.Tensor

    def __init__(self, value):
        super().__init__()
        self.register_buffer("once", torch.full((1, 3), value))
        self.register_buffer("wide", self.once.expand(4, 3))


def test_an_expanded_buffer_comes_back_and_stays_a_view():
    one, other = Repeated(2.0), Repeated(0.0)
    state.restore({"model": other}, {}, saved_and_read(state.capture({"model": one})), "it")
    other.once.fill_(7.0)
    assert other.wide.stride() == (0, 1) and (other.wide == 7).all()


class FromOne(nn.Module):
    """Tied weights, and buffers that are registered from one tensor."""

    h: torch.Tensor
    c: torch.Tensor
    first: torch.Tensor
    bias: torch.Tensor

    def __init__(self):
        super().__init__()
        self.inside, self.head = nn.Embedding(2, 2), nn.Linear(2, 2)
        self.head.weight = self.inside.weight
        for name, zeros in zip(("h", "c", "first"), [torch.zeros(3)] * 3, strict=True):
            self.register_buffer(name, zeros)
        self.register_buffer("bias", self.head.bias.data)


def test_buffers_that_have_parted_come_back_apart_and_what_is_tied_stays_tied():
    one, other = FromOne(), FromOne()
    one.c, one.bias = one.h + 1, one.head.bias.data + 1
    state.restore({"model": other}, {}, saved_and_read(state.capture({"model": one})), "it")
    assert list(differences(one.state_dict(), other.state_dict())) == []
    other.h.add_(5)
    other.head.bias.data.add_(5)
    assert other.first.tolist() == [5.0] * 3 and other.c.tolist() == [1.0] * 3
    assert torch.equal(other.bias, one.bias)
    assert other.head.weight is other.inside.weight


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_come_back(layout):
    def nested(value):
        return torch.nested.nested_tensor(
            [torch.full((2, 3), value), torch.full((1, 3), value)], layout=layout
        )

    class Holds(nn.Module):
        rows: torch.Tensor

        def __init__(self, value):
            super().__init__()
            self.register_buffer("rows", nested(value))

    one, other = Holds(2.0), Holds(0.0)
    payload = saved_and_read(state.capture({"model": one, "thing": Custom({"n": nested(3.0)})}))
    thing = Custom({})
    state.restore({"model": other, "thing": thing}, {}, payload, "it")
    assert [part.tolist() for part in other.rows.unbind()] == [
        part.tolist() for part in one.rows.unbind()
    ]
    assert thing.value["n"].layout is layout and thing.value["n"].unbind()[1].tolist() == [
        [3.0] * 3
    ]


# --- tensors of a class of their own ---


class Codes(torch.Tensor):
    """As 8-bit optimizers keep their state: numbers of eight bits, and a scale."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(
            cls, codes.shape, dtype=torch.float32, device=codes.device
        )

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], [True]

    @classmethod
    def __tensor_unflatten__(cls, parts, context, size=None, stride=None):
        return cls(parts["codes"], parts["scale"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args, kwargs=None):  # type: ignore[override]
        if func in (
            torch.ops.aten.detach.default,
            torch.ops.aten._to_copy.default,
            torch.ops.aten.clone.default,
        ):
            return cls(args[0].codes.clone(), args[0].scale.clone())
        raise NotImplementedError(func)


class Tagged(torch.Tensor):
    pass


class Hidden(torch.Tensor):
    """Holds no numbers that torch can take apart."""

    @staticmethod
    def __new__(cls):
        return torch.Tensor._make_wrapper_subclass(cls, (3,), dtype=torch.float32)

    @classmethod
    def __torch_dispatch__(cls, func, types, args, kwargs=None):  # type: ignore[override]
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(func)


def test_a_tensor_that_cannot_be_taken_apart_is_refused_at_the_start():
    with pytest.raises(UsageError, match=r"own_state_dict\['a'\] cannot be saved as plain data"):
        state.check({"own": Custom({"a": Hidden()})})


def test_tensors_of_a_class_of_their_own_are_kept_as_what_they_are_made_of():
    def made():
        parameter = nn.Parameter(torch.zeros(4))
        return torch.optim.SGD([parameter], lr=1.0), parameter

    (one, p), (other, q) = made(), made()
    one.state[p] = {
        "m": Codes(torch.arange(4, dtype=torch.uint8), torch.tensor(0.5)),
        "t": torch.ones(2).as_subclass(Tagged),
    }
    payload = state.capture({"optimizer": one})
    assert type(payload["optimizer_state_dict"]["state"][0]["t"]) is torch.Tensor
    state.restore({"optimizer": other}, {}, saved_and_read(payload), "it")
    back = other.state[q]["m"]
    assert type(back) is Codes and back.codes.tolist() == [0, 1, 2, 3] and back.scale.item() == 0.5
    assert type(other.state[q]["t"]) is Tagged
    assert state.size_bytes({"optimizer": one}) == 4 + 4 + 8


def test_a_class_that_the_program_has_not_imported_is_named():
    payload = {
        "thing_state_dict": {"a": torch.ones(1)},
        "kinds": {"thing_state_dict['a']": "tensor os.system"},
    }
    with pytest.raises(UsageError, match=r"no class of tensors is called os.system"):
        state.restore({"thing": Custom({})}, {}, payload, "it")
    payload["kinds"] = {"thing_state_dict['a']": "pickle x"}
    with pytest.raises(UsageError, match="of a kind that this harness does not know"):
        state.restore({"thing": Custom({})}, {}, payload, "it")


def test_parameters_without_data_are_refused_at_the_start():
    with pytest.raises(
        UsageError, match=r"model_state_dict\['weight'\] is a tensor without data(.|\n)*to_empty"
    ):
        state.check({"model": nn.Linear(2, 2, device="meta")})


# --- optimizers ---


class Lookahead(torch.optim.Optimizer):
    """With a state dict of its own, as in pytorch_optimizer."""

    def __init__(self, inner):
        self.inner, self.slow = inner, {}
        self.defaults, self.param_groups = {}, inner.param_groups

    def step(self, closure=None):
        self.inner.step()

    def zero_grad(self):  # type: ignore[override]
        self.inner.zero_grad()

    def state_dict(self):
        return {"slow": self.slow, "inner_state": self.inner.state_dict()}

    def load_state_dict(self, saved):
        self.slow = saved["slow"]
        self.inner.load_state_dict(saved["inner_state"])


class Delegates(Lookahead):
    """Its state is that of the optimizer inside."""

    def state_dict(self):
        return self.inner.state_dict()

    def load_state_dict(self, saved):
        self.inner.load_state_dict(saved)


@pytest.mark.parametrize("kind", [Lookahead, Delegates])
def test_an_optimizer_with_a_state_dict_of_its_own_comes_back(kind):
    def made():
        model = net(3, 3).bfloat16()
        return {
            "model": model,
            "optimizer": kind(torch.optim.AdamW(model.parameters(), lr=0.1)),
        }

    one, other = made(), made()
    stepped(one["model"], one["optimizer"])
    for entry in one["optimizer"].inner.state.values():
        entry["exp_avg"] = entry["exp_avg"].float() / 3
    payload = saved_and_read(state.capture(one))
    state.restore(other, {}, payload, "it")
    assert not list(differences(payload, state.capture(other)))


class Packed(torch.optim.Adam):
    """Packs what it keeps of each parameter for its state dict, as bitsandbytes does."""

    def state_dict(self):
        saved = super().state_dict()
        return saved | {"state": {at: {"packed": own} for at, own in saved["state"].items()}}

    def load_state_dict(self, saved):
        own = {at: packed["packed"] for at, packed in saved["state"].items()}
        super().load_state_dict(saved | {"state": own})


def counting(parameters, lr):
    """An optimizer whose load adds something to what is kept of each parameter."""

    def count(optimizer):
        for own in optimizer.state.values():
            own["age"] = own["step"].clone()

    optimizer = torch.optim.Adam(parameters, lr=lr)
    optimizer.register_load_state_dict_post_hook(count)
    return optimizer


@pytest.mark.parametrize(("make", "more"), [(Packed, set()), (counting, {"age"})])
def test_what_an_optimizers_own_load_makes_of_its_state_stays(make, more):
    def made():
        model = net(3, 3)
        return {"model": model, "optimizer": make(model.parameters(), lr=0.1)}

    one, other = made(), made()
    stepped(one["model"], one["optimizer"])
    payload = saved_and_read(state.capture(one))
    state.restore(other, {}, payload, "it")
    for own in other["optimizer"].state.values():
        assert set(own) == {"step", "exp_avg", "exp_avg_sq"} | more
    for each in (one, other):
        stepped(each["model"], each["optimizer"])
    assert all(map(torch.equal, one["model"].parameters(), other["model"].parameters()))


class Average:
    """A weight average written by hand, which takes the tensors that it is given."""

    def __init__(self, device):
        one = torch.ones(3, device=device)
        self.shadow: dict[str, Any] = {
            "weight": one,
            "tied": one,
            "more": [(torch.ones(2, device=device), 1)],
        }
        self.cpu = torch.ones(2)

    def state_dict(self):
        return {"shadow": self.shadow, "cpu": self.cpu}

    def load_state_dict(self, saved):
        self.shadow, self.cpu = saved["shadow"], saved["cpu"]


def test_tensors_go_to_the_devices_where_the_object_has_them():
    """The device without data stands for a GPU."""
    payload = saved_and_read(state.capture({"average": Average("cpu")}))
    average = Average("meta")
    state.restore_object("average", average, payload["average_state_dict"], "it")
    weight, tied, more = average.shadow.values()
    assert weight.is_meta and tied is weight and more[0][0].is_meta and more[0][1] == 1
    assert torch.equal(average.cpu, torch.ones(2))


def test_a_tensor_in_the_users_state_that_is_not_on_the_cpu_is_named_once():
    values: dict[str, Any] = {"seen": [1, torch.ones(1, device="meta")], "one": 1}
    user_state = UserState()
    (warning,) = user_state.look(values)
    assert (
        warning.startswith("run.state['seen'] holds a tensor on meta") and "to(run.dev" in warning
    )
    values["seen"].append(torch.ones(1, device="meta"))
    assert user_state.look(values) == []


LOOKAHEAD = """
class Lookahead(torch.optim.Optimizer):  # as in torch_optimizer: without Optimizer.__init__
    def __init__(self, inner, k=5):
        self.inner, self.k, self.slow = inner, k, {}
        self.defaults, self.param_groups, self.state = {}, inner.param_groups, inner.state
        for group in self.param_groups:
            group["counter"] = 0

    @property
    def numbered(self):
        return enumerate(p for group in self.param_groups for p in group["params"])

    def step(self, closure=None):
        self.inner.step()
        for group in self.param_groups:
            group["counter"] += 1
        for number, p in self.numbered:
            slow = self.slow.setdefault(number, {"slow": p.data.clone()})["slow"]
            if self.param_groups[0]["counter"] % self.k == 0:
                slow.add_(p.data - slow, alpha=0.5)
                p.data.copy_(slow)

    def zero_grad(self, set_to_none=True):
        self.inner.zero_grad(set_to_none)

    def state_dict(self):
        inner = self.inner.state_dict()
        return {
            "fast_state": inner["state"],
            "slow_state": self.slow,
            "param_groups": inner["param_groups"],
        }

    def load_state_dict(self, saved):
        self.slow = saved["slow_state"]
        self.inner.load_state_dict(
            {"state": saved["fast_state"], "param_groups": saved["param_groups"]}
        )
        self.param_groups, self.state = self.inner.param_groups, self.inner.state


run = init()
model = nn.Sequential(nn.Linear(8, 1500), nn.Linear(1500, 1500), nn.Linear(1500, 1))
optimizer = Lookahead(torch.optim.Adam(model.parameters(), lr=0.01))
run.track(model=model, optimizer=optimizer)
""" + LOOP.format("")


@pytest.mark.slow
def test_an_optimizer_that_is_no_whole_one_of_torchs_goes_on(tmp_path):
    """It announces no step, and keeps the state of its parameters under keys of its own."""
    outcome = killed_once(tmp_path, LOOKAHEAD, die=9)
    assert outcome.is_equal, (outcome.rows, outcome.whole.text, outcome.resumed.text)
    assert "resumes from step 6" in outcome.resumed.text


def test_an_update_of_an_optimizer_inside_another_waits_for_the_copy():
    model, calls = net(3, 3), list[int]()
    optimizer = Lookahead(torch.optim.AdamW(model.parameters()))
    state.before_update({"model": model, "optimizer": optimizer}, lambda: calls.append(1))
    stepped(model, optimizer)
    assert len(calls) == 3


class ByHook(Lookahead):
    """Its state is that of the optimizer inside; it goes on to use what that has then."""

    def state_dict(self):
        return self.inner.state_dict()

    def load_state_dict(self, saved):
        self.inner.load_state_dict(saved)
        self.param_groups = self.inner.param_groups
        self.first = self.inner.param_groups[0]


@pytest.mark.parametrize("kind", [None, Delegates, ByHook])
def test_who_holds_the_groups_and_the_state_of_an_optimizer_holds_the_restored_ones(kind):
    """A tensor too: a learning rate that the program holds is the optimizer's after a restore."""

    def made():
        model, rate = net(3, 3), torch.tensor(0.1)
        groups = [{"params": [p], "lr": rate} for p in model.parameters()]
        optimizer = torch.optim.AdamW(groups)
        return {"model": model, "optimizer": kind(optimizer) if kind else optimizer}, rate

    (one, rate), (other, other_rate) = made(), made()
    rate.fill_(0.02)
    stepped(one["model"], one["optimizer"])
    payload = saved_and_read(state.capture(one))
    optimizer = getattr(other["optimizer"], "inner", other["optimizer"])
    seen: list[Any] = []
    optimizer.register_load_state_dict_post_hook(lambda it: seen.append(it.param_groups))
    groups, first, held = optimizer.param_groups, optimizer.param_groups[0], optimizer.state
    state.restore(other, {}, payload, "it")
    entry = next(iter(held.values()))
    for _ in range(2):  # as at a later `track`
        assert optimizer.param_groups is groups is other["optimizer"].param_groups is seen[-1]
        assert groups[0] is first is getattr(other["optimizer"], "first", first)
        assert optimizer.state is held and next(iter(held.values())) is entry
        assert all(group["lr"] is other_rate for group in groups) and other_rate == rate
        assert not list(differences(payload, state.capture(other)))
        other_rate.fill_(0.5)
        state.restore(other, {}, payload, "it")


WARM_UP = """
run = init()
model = nn.Linear(8, 1)
optimizer = torch.optim.AdamW([{"params": [p]} for p in model.parameters()], lr=0.05)
class Warmup:
    def __init__(self):
        self.groups, self.n = optimizer.param_groups, 0
    def step(self):
        self.n += 1
        for group in self.groups:
            group["lr"] = 0.01 * self.n
    def state_dict(self):
        return {"n": self.n}
    def load_state_dict(self, saved):
        self.n = saved["n"]
warmup = Warmup()
weight, bias = optimizer.param_groups
run.track(model=model, optimizer=optimizer)
run.track(warmup=warmup)
"""


def test_a_schedule_that_holds_the_groups_moves_the_learning_rate_after_a_restart(tmp_path):
    loop = WARM_UP + LOOP.format("(warmup.step(), bias.update(weight_decay=0.01 * run.step))")
    outcome = killed_once(tmp_path, loop)
    assert outcome.is_equal, (outcome.rows, outcome.whole.text, outcome.resumed.text)


def test_settings_as_built_are_not_what_a_restore_fills():
    rate = torch.tensor(0.1)
    optimizer = torch.optim.AdamW(net(3, 3).parameters(), lr=rate)
    saved = copy.deepcopy(optimizer.state_dict())
    built = {"optimizer": state.as_built(optimizer)}
    saved["param_groups"][0]["lr"].fill_(0.02)
    for _ in range(2):
        state.restore({"optimizer": optimizer}, {}, {"optimizer_state_dict": saved}, "it")
        assert rate == torch.tensor(0.02)
        (text,) = state.apply_override(built, {"optimizer": optimizer})
        assert "lr" in text and optimizer.param_groups[0]["lr"] == torch.tensor(0.1)


class Wraps(torch.optim.Optimizer):
    """As SAM does: the momentum is the inner optimizer's."""

    def __init__(self, parameters, *, shares):
        super().__init__(parameters, {"lr": 0.1})
        self.inner = torch.optim.SGD(self.param_groups, lr=0.1, momentum=0.9)
        self.param_groups = self.inner.param_groups
        if shares:
            self.state = self.inner.state

    def step(self, closure=None):
        self.inner.step()


@pytest.mark.parametrize("shares", [False, True])
def test_an_inner_optimizer_whose_momentum_nobody_keeps_is_told(shares):
    model = net(3, 3)
    said, steps = list[str](), [0]
    tracked = {"model": model, "optimizer": Wraps(list(model.parameters()), shares=shares)}
    end = foreign_optimizers.on_untracked_update(
        tracked, lambda _, text: said.append(text), lambda: steps[0]
    )
    stepped(model, tracked["optimizer"])
    assert said == []
    steps[0] += 1
    stepped(model, tracked["optimizer"])
    end()
    expected = [
        "(SGD) inside 'optimizer' makes updates, and no tracked object's state_dict() "
        "holds what it keeps"
    ]
    assert said == ([] if shares else expected)


GROWS = """
run = init()
model, head = nn.Linear(8, 1), nn.Linear(8, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
if "GROWN" in os.environ and run.epoch >= 1:
    optimizer.add_param_group({"params": head.parameters()})
run.track(model=model, head=head, optimizer=optimizer)
"""


def test_groups_that_the_loop_adds_are_explained_and_the_advice_is_true(tmp_path):
    loop = GROWS + LOOP.format(
        "run.step == 10 and optimizer.add_param_group({'params': head.parameters()})"
    ).replace("epochs=int", "epochs=1 + int")
    env = {"EPOCHS": "1"}
    killed = live(tmp_path, loop, "run", env=env | {"DIE": "17"})
    assert killed.code == -9, killed.text
    refused = live(tmp_path, loop, "run", env=env)
    assert (
        refused.code == 78
        and "found: 1 group(s), of 2 parameter(s); expected: 2, of 2, 2" in refused.text
    ), refused.text
    assert "run.epoch and run.step are known as soon as harness.init has returned" in refused.text
    resumed = live(tmp_path, loop, "run", env=env | {"GROWN": "1"})
    whole = live(tmp_path, loop, "whole", env=env)
    assert resumed.code == whole.code == 0, resumed.text
    assert compare(tmp_path / "whole", tmp_path / "run").count == 0


GROWS_AT_A_HEAD = """
run = init()
model, head = nn.Linear(8, 1), nn.Linear(8, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
def grow():
    optimizer.add_param_group({"params": head.parameters()})
if "GROWN" in os.environ and run.step > 9:
    grow()
run.track(model=model, head=head, optimizer=optimizer)
for epoch, batches in run.by_epoch(run.batches(points(144), 16, epochs=2)):
    if epoch == 1 and len(optimizer.param_groups) < 2:
        grow()
    for x, y in batches:
        loss = (model(x) + head(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.log(loss=loss)
        die(run)
"""


@pytest.mark.parametrize("die", [10, 14], ids=["at the border", "inside the epoch"])
def test_the_advice_is_true_for_groups_that_the_head_of_an_epoch_adds(die, tmp_path):
    outcome = killed_once(tmp_path, GROWS_AT_A_HEAD, die=die, then={"GROWN": "1"})
    assert f"resumes from step {(die - 1) // 3 * 3}" in outcome.resumed.text
    assert outcome.is_equal, outcome.rows
    if die == 14:
        refused = live(tmp_path, GROWS_AT_A_HEAD, "run", env={"DIE": "14"})
        refused = live(tmp_path, GROWS_AT_A_HEAD, "run")
        assert refused.code == 78 and "its parameter groups are others" in refused.text
        assert "`if run.step > N` what it does before step N + 1" in refused.text


# --- objects that give nothing, and schedules ---


class Metric(nn.Module):
    """As torchmetrics keeps its numbers: in attributes, unless it is told to be persistent."""

    def __init__(self):
        super().__init__()
        self.total = torch.zeros(())


def test_an_empty_state_dict_is_told_and_nothing_else_is():
    class Empty(Custom):
        def state_dict(self):
            return {}

    assert (
        foreign_optimizers.gives_nothing(Metric())
        and foreign_optimizers.gives_nothing(nn.Sequential(Metric()))
        and foreign_optimizers.gives_nothing(Empty(3))
    )
    for fine in (
        nn.ReLU(),
        nn.MSELoss(),
        nn.Linear(1, 1),
        torch.amp.GradScaler("cpu", enabled=False),
        Custom({"a": 1}),
        nn.Sequential(),
    ):
        assert not foreign_optimizers.gives_nothing(fine), fine


EMPTY = """
class Metric(nn.Module):
    def __init__(self):
        super().__init__()
        self.total = torch.zeros(())
run = init()
model = nn.Linear(8, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
run.track(model=model, optimizer=optimizer, metric=Metric(), relu=nn.ReLU())
"""


def test_what_gives_nothing_is_said_at_track_and_by_diff(tmp_path):
    for name in ("a", "b"):
        lived = live(tmp_path, EMPTY + LOOP.format(""), name)
        assert (
            lived.code == 0
            and "warning: metric.state_dict() is empty" in lived.text
            and "relu" not in lived.text
        ), lived.text
    found = compare(tmp_path / "a", tmp_path / "b")
    assert (
        found.count == 0
        and "nothing is known of metric: its state_dict() was empty, in both" in str(found)
    )


SCHEDULED = """
run = init(override=os.environ.get("OVERRIDE", "").split())
model = nn.Linear(8, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
steps = 10 * int(os.environ.get("EPOCHS", 2))
make = {"cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps),
        "cycle": lambda: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps),
        "plateau": lambda: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "min", 0.5, 2)}
scheduler = make[os.environ["KIND"]]()
run.track(model=model, optimizer=optimizer, scheduler=scheduler)
"""


def test_a_schedule_of_another_length_is_told_with_both_values_and_can_be_overridden(tmp_path):
    loop, env = SCHEDULED + LOOP.format("scheduler.step()"), {"KIND": "cosine"}
    assert live(tmp_path, loop, "run", env=env).code == 0
    longer = live(tmp_path, loop, "run", env=env | {"EPOCHS": "3", "DIE": "25"})
    assert "scheduler.T_max: 20 in the checkpoint, 30 as built" in longer.text, longer.text
    assert "resume.override=[scheduler.T_max]" in longer.text
    overridden = live(
        tmp_path, loop, "run", env=env | {"EPOCHS": "3", "OVERRIDE": "scheduler.T_max"}
    )
    assert overridden.code == 0 and "overridden: scheduler.T_max: 20 -> 30" in overridden.text, (
        overridden.text
    )


def test_an_override_is_applied_once_and_not_at_each_restart(tmp_path):
    """What a schedule has made of the settings since then is the training's."""
    loop = SCHEDULED.replace("lr=0.05", "lr=float(os.environ['LR'])") + LOOP.format(
        "scheduler.step(1.0)"
    )
    then = {"KIND": "plateau", "LR": "0.04", "OVERRIDE": "optimizer"}
    live(tmp_path, loop, "killed", env={"KIND": "plateau", "LR": "0.05", "DIE": "7"})
    shutil.copytree(tmp_path / "killed", tmp_path / "whole")
    killed = live(tmp_path, loop, "killed", env=then | {"DIE": "14"})
    assert "overridden: optimizer[0].lr: 0.025 -> 0.04" in killed.text, killed.text
    for name in ("whole", "killed"):
        lived = live(tmp_path, loop, name, env=then)
        assert lived.code == 0 and ("overridden" in lived.text) == (name == "whole"), lived.text
    assert compare(tmp_path / "whole", tmp_path / "killed").count == 0


def test_a_cycle_past_its_end_has_words(tmp_path):
    loop, env = SCHEDULED + LOOP.format("scheduler.step()"), {"KIND": "cycle"}
    assert (
        live(
            tmp_path,
            loop.replace("scheduler.step()", "run.step < 20 and scheduler.step()"),
            "run",
            env=env,
        ).code
        == 0
    )
    longer = live(tmp_path, loop, "run", env=env | {"EPOCHS": "3"})
    assert "scheduler.total_steps: 20 in the checkpoint, 30 as built" in longer.text, longer.text
    assert longer.code == 1 and "harness: hint: a OneCycleLR is at its end" in longer.text


def sgd():
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)


def schedules_of(optimizer, n):
    lr = torch.optim.lr_scheduler
    yield lr.MultiStepLR(optimizer, [n, 2 * n]), "s.milestones"
    yield lr.LambdaLR(optimizer, lambda step: 1.0), None
    yield lr.ReduceLROnPlateau(optimizer, patience=n), "s.patience"
    yield (
        lr.SequentialLR(
            optimizer,
            [lr.LinearLR(optimizer, total_iters=2), lr.CosineAnnealingLR(optimizer, n)],
            [2],
        ),
        "s[1].T_max",
    )
    yield lr.CosineAnnealingWarmRestarts(optimizer, n, T_mult=2), "s.T_0"
    yield lr.CyclicLR(optimizer, 0.01, 0.1, step_size_up=n), "s.total_size"


def test_only_settings_of_a_schedule_are_told(recwarn):
    for (before, _), (same, _), (other, where) in zip(
        schedules_of(sgd(), 3), schedules_of(sgd(), 3), schedules_of(sgd(), 5), strict=True
    ):
        for _ in range(7):
            before.step(1.0) if "Plateau" in type(before).__name__ else before.step()
        for now, expected in ((same, []), (other, [where] if where else [])):
            built = {"s": lr_schedules.as_built(now)}
            now.load_state_dict(copy.deepcopy(before.state_dict()))
            told = [
                line.partition(":")[0] for line in lr_schedules.other_settings(built, {"s": now})
            ]
            assert told == expected, type(now)
            lr_schedules.apply_override(built, {"s": now})
            assert lr_schedules.other_settings(built, {"s": now}) == []


# --- messages ---


def test_the_whole_cause_of_a_refused_state_is_told():
    class Picky(nn.Linear):
        def _load_from_state_dict(self, *args):
            args[-1].append("the sixth sense is missing")

    with pytest.raises(UsageError, match=r"the sixth sense is missing"):
        state.restore({"model": Picky(2, 2)}, {}, state.capture({"model": nn.Linear(2, 2)}), "it")

    class Odd(Custom):
        def load_state_dict(self, saved):
            return saved["nothing"].missing

    with pytest.raises(
        UsageError, match=r"found: KeyError: 'nothing' \(.*test_restoring.py, line \d+\)"
    ):
        state.restore({"odd": Odd(1)}, {}, state.capture({"odd": Custom({})}), "it")


def test_a_dtype_in_a_parameter_group_is_kept():
    one, other = (
        torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "kept_in": torch.float32}])
        for _ in range(2)
    )
    one.param_groups[0]["kept_in"] = torch.bfloat16
    state.restore({"o": other}, {}, saved_and_read(state.capture({"o": one})), "it")
    assert other.param_groups[0]["kept_in"] is torch.bfloat16


def test_the_user_is_not_told_of_a_state_dict_for_a_value_of_his_own():
    with pytest.raises(UsageError) as caught:
        state.captured({"state": {"open": {1, 2}}}, {})
    assert "state_dict" not in str(caught.value) and "no order" in str(caught.value)


def test_conjugate_and_complex_tensors_are_compared():
    a = torch.tensor([1 + 2j, 3 - 1j])
    assert not list(differences({"x": a.conj()}, {"x": a.conj().resolve_conj()}))
    ((where, _, _, gap),) = differences({"x": a.conj()}, {"x": a})
    assert where == "x" and gap == "4 (2 of 2)"


def test_a_tensor_and_its_conjugate_are_two():
    a = torch.tensor([1 + 2j, 3 - 1j])
    held = {"a": a, "again": a, "conjugate": a.conj(), "wide": a.view(2, 1)}
    found = saved_and_read(state.captured({"step": 1, "state": held}, {}).fill())["state"]
    assert all(torch.equal(found[name], value) for name, value in held.items())
    assert found["a"].data_ptr() == found["again"].data_ptr()


@pytest.mark.filterwarnings("ignore:torch.quantize:UserWarning")
def test_quantized_tensors_of_the_same_integers_and_another_scale_differ():
    a, b = (
        torch.quantize_per_tensor(torch.arange(4.0) * scale, scale, 0, torch.qint8)
        for scale in (1.0, 2.0)
    )
    scales, zeros = torch.tensor([0.1, 0.2]), torch.zeros(2, dtype=torch.int64)
    c, d = (
        torch.quantize_per_channel(torch.zeros(2, 3), scales * by, zeros, 0, torch.qint8)
        for by in (1, 2)
    )
    assert not list(differences([a, c], [a.clone(), c.clone()]))
    ((where, _, _, gap),) = differences({"x": a}, {"x": b})
    assert where == "x" and gap == "3 (3 of 4)"
    assert [where for where, *_ in differences([c], [d])] == ["[0]"]


def test_a_question_before_the_loop_is_answered_in_words(tmp_path):
    run = harness.init(tmp_path)
    with pytest.raises(UsageError, match="asked before the loop"):
        run.due(10)


STREAM = """
class Stream(IterableDataset):
    def __init__(self):
        self.at = 0
    def __iter__(self):
        while self.at < 160:
            self.at += 1
            yield torch.full((8,), self.at / 160), torch.ones(1)
        self.at = 0
    def state_dict(self):
        return {"at": self.at, "spelled": os.environ.get("SPELLED", "so")}
    def load_state_dict(self, saved):
        self.at = saved["at"]
run = init()
model = nn.Linear(8, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
run.track(model=model, optimizer=optimizer)
"""


def test_another_spelling_of_a_streams_place_does_not_count(tmp_path):
    loop = STREAM + LOOP.format("").replace("points()", "Stream()").replace(
        "epochs=int", "max_steps=12, epochs=int"
    )
    for name in ("a", "b"):
        lived = live(tmp_path, loop, name, env={"SPELLED": name})
        assert lived.code == 0, lived.text
    found = compare(tmp_path / "a", tmp_path / "b")
    assert found.count == 0 and "does not count" in str(found) and "spelled" in str(found)


def test_a_value_is_put_into_what_the_program_holds_as_far_as_both_match():
    inner, weight = [1, 2, 3], torch.zeros(3)
    held = {"inner": inner, "again": inner, "weight": weight, "pair": (inner, 1), "gone": 1}
    new = {"inner": [4], "again": [4], "weight": torch.ones(3), "pair": ([4], 2), "more": {"a": 1}}
    assert state.put_into(held, new) is held
    assert held["inner"] is held["again"] is held["pair"][0] is inner == [4]
    assert held["weight"] is weight and torch.equal(weight, torch.ones(3))
    assert held.keys() == new.keys() and held["pair"][1] == 2 and held["more"] == {"a": 1}


def test_one_object_that_is_held_twice_takes_one_of_two_unlike_values():
    one = torch.zeros(2)
    held = state.put_into({"a": one, "b": one}, {"a": torch.ones(2), "b": torch.full((2,), 2.0)})
    assert held["a"] is one and held["a"].tolist() == [1, 1] and held["b"].tolist() == [2, 2]
